"""The command line: what it writes when all is well, and one plain line, exit code 2 and no leftovers when it is not."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from circuit_generalization import __version__, cli
from circuit_generalization.circuit import load_circuit, packaged_circuits
from circuit_generalization.circuit_scorer import COLUMNS
from circuit_generalization.cli import main, one_line
from circuit_generalization.models import embedded_models, load_model
from circuit_generalization.tasks import list_variants
from circuit_generalization.terminal import progress_lines

PROGRAM = Path(sys.executable).with_name("circuit-gen")
QUICK = ["--draws", "2", "--n-random", "1"]
MEASURE = ["measure", "--model", "compiled-ioi", "--n-prompts", "18", "--axes", "lexical", *QUICK]
SCORE = ["score", "--model", "compiled-ioi", "--circuit", "compiled-ioi-ioi", "--ablation", "counterfactual", *QUICK]

ROW = {"prompt": "Then, Kathleen and Walter went to the library. Walter gave a cup to",
       "counterfactual": "Then, Kathleen and Walter went to the library. Raymond gave a cup to",
       "answer": " Kathleen", "distractor": " Walter", "pos_IO": "2", "pos_S1": "4", "pos_S2": "10"}
UNINFORMATIVE = [ROW | {"prompt": f"Then, Kathleen and Walter went to the library. {name} gave a cup to"}
                 for name in ("Raymond", "Christine", "Anthony")]


def write_csv(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def leftovers(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) if folder.is_dir() else []


@pytest.fixture
def refused(tmp_path, capfd):
    """Run a command that must fail; returns what it says, having checked that it fails cleanly."""
    def run(*argv, out="out/file"):
        where = [] if out is None or "--out" in argv else ["--out", str(tmp_path / out)]
        code = main([str(a) for a in argv] + where)
        said = capfd.readouterr()
        assert code == 2, said
        assert said.out == ""
        assert said.err.startswith("circuit-gen: ") and said.err.endswith("\n") and said.err.count("\n") == 1
        assert leftovers(tmp_path / "out") == []
        return said.err

    return run


@pytest.fixture
def circuit_file(tmp_path):
    """The compiled model's circuit with nodes added or changed."""
    def make(**nodes):
        data = json.loads(packaged_circuits()["compiled-ioi-ioi"].read_text(encoding="utf-8"))
        data["nodes"].update(nodes)
        path = tmp_path / "circuit.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return make


# nothing heavy before it is needed

def imported_by(*argv):
    """The modules that a run of the real program imports."""
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([PROGRAM, *argv], env=environment, capture_output=True, text=True, check=True)
    return done.stdout, {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}


@pytest.mark.parametrize("argv", [["--help"], ["measure", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(argv):
    printed, modules = imported_by(*argv)
    assert printed and "circuit_generalization" in modules
    assert not modules & {"torch", "pandas", "numpy", "transformers", "transformer_lens", "matplotlib", "scipy", "rich"}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and f"circuit-gen {command}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"circuit-gen {__version__}\n"


# what there is

def test_models_circuits_and_tasks_are_listed(capsys):
    assert main(["models"]) == main(["circuits"]) == main(["tasks"]) == 0
    printed = capsys.readouterr().out
    for name in (*embedded_models(), *packaged_circuits(), *list_variants("ioi").variant):
        assert name in printed


def test_a_reader_who_has_enough_is_no_error():
    first = subprocess.Popen([PROGRAM, "tasks"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first.stdout.close()
    assert first.stderr.read() == b"" and first.wait() == 0


# measure

QUICKLY = ["--variants", "rare_names", "--ablation", "resample", "counterfactual", "--positions", "listed", "--levels", "node"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A small real measurement: its folder, and what was printed."""
    out = tmp_path_factory.mktemp("measured")
    command = [PROGRAM, *MEASURE, *QUICKLY, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_measure_writes_what_the_contract_says_and_nothing_else(measured):
    out, _ = measured
    figures = [f"figures/{name}.png" for name in ("ablations", "active_share", "engagement", "model_vs_circuit", "verdicts")]
    tables = ["generalization.csv", "manifest.json", "report.html", "scores.csv", "sweep.csv", "variance.csv"]
    assert leftovers(out) == ["ablations.csv", "figures", *figures, *tables]
    scores = pd.read_csv(out / "scores.csv")
    assert list(scores.columns[:len(COLUMNS)]) == COLUMNS
    assert scores.groupby("variant").size().to_dict() == {"base": 18, "rare_names": 18}
    assert set(scores.ablation) == {"resample"} and set(pd.read_csv(out / "sweep.csv").ablation) == {"counterfactual"}
    assert pd.read_csv(out / "generalization.csv").variant.tolist() == ["base", "rare_names"]
    assert all((out / f).read_bytes().startswith(b"\x89PNG") for f in figures)


def test_every_option_is_in_the_manifest(measured):
    options = json.loads((measured[0] / "manifest.json").read_text(encoding="utf-8"))["options"]
    assert options == dict(model="compiled-ioi", task="ioi", axes=["lexical"], variants=["rare_names"], circuit=None, n_prompts=18, seed=0,
                           ablations=["resample", "counterfactual"], positions=["listed"], levels=["node"],
                           n_draws=2, n_random=1, device="cpu", batch_size=128, bos=False)


def test_measure_prints_the_table(measured):
    out, printed = measured
    table = pd.read_csv(out / "generalization.csv").set_index("variant")
    row = next(line for line in printed.splitlines() if line.strip().startswith("rare_names"))
    share = table.active_share["rare_names"]
    assert f"{table.n_right['rare_names']}/{table.n['rare_names']}" in row and f" {100 * share:.0f} [" in row
    assert "among 1 layer-matched random circuits" in printed and str(out) in printed


def test_an_interrupted_measurement_resumes_to_the_same_bytes(measured, tmp_path, capfd, monkeypatch):
    original, interrupted = cli.progress_bar, []

    @contextlib.contextmanager
    def impatient():
        def progress(done, total, what):
            interrupted.append(done)
            if len(interrupted) == 2: raise KeyboardInterrupt
        yield progress

    command = [*MEASURE, *QUICKLY, "--out", str(tmp_path)]
    monkeypatch.setattr(cli, "progress_bar", impatient)
    assert main(command) == 130
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "same command" in said
    assert not (tmp_path / "scores.csv").exists()
    assert any(tmp_path.rglob("*.csv"))  # what was finished is kept
    monkeypatch.setattr(cli, "progress_bar", original)
    assert main(command) == 0
    assert leftovers(tmp_path) == leftovers(measured[0])
    for name in leftovers(tmp_path):
        if name.endswith((".csv", ".png")):
            assert (tmp_path / name).read_bytes() == (measured[0] / name).read_bytes(), name


def test_a_dry_run_says_the_cost_and_writes_nothing(tmp_path, capsys):
    assert main([*MEASURE, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("90 prompts, ") and " MB" in printed and " s." in printed and leftovers(tmp_path) == []


# score

def test_score_writes_a_row_a_prompt(tmp_path, capsys):
    prompts = write_csv(tmp_path / "prompts.csv", ROW, *UNINFORMATIVE)
    out = tmp_path / "new" / "scores.csv"
    assert main([*SCORE, "--prompts", prompts, "--out", str(out)]) == 0
    scores = pd.read_csv(out)
    assert scores.prompt.tolist() == [ROW["prompt"], *(r["prompt"] for r in UNINFORMATIVE)]
    assert scores.ld_model[0] > 1 and scores.verdict[0] == "active"
    assert set(scores.ablation) == {"counterfactual"} and set(scores.n_random) == {1} and set(scores.seed) == {0}
    assert leftovers(tmp_path / "new") == ["scores.csv"]
    printed = capsys.readouterr().out
    assert "4 prompts" in printed and "active" in printed and "among 1 layer-matched random circuits" in printed


@pytest.fixture
def all_progress(monkeypatch):
    """Progress lines without a pause between them."""
    monkeypatch.setattr(cli, "progress_bar", lambda: progress_lines(sys.stderr, every=0))


def test_score_shows_progress(tmp_path, capfd, all_progress):
    prompts = write_csv(tmp_path / "prompts.csv", ROW, *UNINFORMATIVE)
    assert main([*SCORE, "--prompts", prompts, "--batch-size", "2", "--out", str(tmp_path / "scores.csv")]) == 0
    assert capfd.readouterr().err == "2 of 4: counterfactual\n4 of 4: counterfactual\n"


def test_score_draws_from_the_reference(tmp_path):
    prompts, reference = write_csv(tmp_path / "p.csv", ROW), write_csv(tmp_path / "r.csv", *UNINFORMATIVE)
    tables = {}
    for kind in ("resample", "mean"):
        out = tmp_path / f"{kind}.csv"
        assert main([*SCORE, "--prompts", prompts, "--reference", reference, "--ablation", kind, "--seed", "3", "--out", str(out)]) == 0
        tables[kind] = pd.read_csv(out).iloc[0]
    assert tables["resample"].n_draws == 2 and tables["mean"].n_draws == 1 and tables["mean"].seed == 3
    assert tables["resample"].ld_model == tables["mean"].ld_model and tables["resample"].ld_ablated != tables["mean"].ld_ablated


def test_a_dry_run_of_score_writes_nothing(tmp_path, capsys):
    prompts = write_csv(tmp_path / "prompts.csv", ROW)
    assert main([*SCORE, "--prompts", prompts, "--dry-run", "--out", str(tmp_path / "scores.csv")]) == 0
    assert capsys.readouterr().out.startswith("1 prompts, ") and leftovers(tmp_path) == ["prompts.csv"]


def test_score_does_not_replace_its_input(tmp_path, refused):
    prompts = write_csv(tmp_path / "prompts.csv", ROW)
    before = Path(prompts).read_bytes()
    assert "that is an input" in refused(*SCORE, "--prompts", prompts, "--out", prompts)
    assert Path(prompts).read_bytes() == before


def test_score_at_edge_level_and_at_all_positions(tmp_path, refused, capfd):
    prompts, tables = write_csv(tmp_path / "prompts.csv", ROW, *UNINFORMATIVE), {}
    for how in (["--level", "edge"], ["--positions", "all"], []):
        assert main([*SCORE, *how, "--prompts", prompts, "--out", str(tmp_path / "scores.csv")]) == 0
        tables[" ".join(how)] = pd.read_csv(tmp_path / "scores.csv").iloc[0]
        assert ("no random circuits were drawn" in capfd.readouterr().out) == ("edge" in how)
    edge, everywhere, plain = tables.values()
    assert (edge.level, edge.n_random, edge.positions) == ("edge", 0, "listed") and (everywhere.level, everywhere.positions) == ("node", "all")
    assert edge.ld_circuit != plain.ld_circuit and all(t.verdict == "active" for t in tables.values())
    assert "level 'atom'" in refused(*SCORE, "--level", "atom", "--prompts", prompts)


# compare

def test_compare_pairs_two_runs(measured, tmp_path, capsys):
    out, _ = measured
    assert main(["compare", str(out), f"{out}:counterfactual", "--out", str(tmp_path / "compared.csv")]) == 0
    printed, table = capsys.readouterr().out, pd.read_csv(tmp_path / "compared.csv").set_index("variant")
    assert set(table.index) == {"base", "rare_names"} and (table.n_prompts == 18).all() and table.same_text.eq(1).all()
    assert f"{100 * table.same_verdict['rare_names']:.0f}" in printed and "Verdicts: A down, B across" in printed and "counterfactual" in printed
    assert main(["compare", str(out), str(out)]) == 0 and "+0" in capsys.readouterr().out


@pytest.mark.parametrize("a, b, complaint", [("no/such", "OUT", "no/such: no such folder"), ("OUT", "OUT:fire", "measured without 'fire'"),
                                             ("OUT", "EMPTY", "not a measurement, it has no scores.csv")])
def test_what_cannot_be_compared(a, b, complaint, measured, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    folders = [x.replace("OUT", str(measured[0])).replace("EMPTY", str(tmp_path / "empty")) for x in (a, b)]
    assert complaint in refused("compare", *folders, "--out", str(tmp_path / "new" / "compared.csv"), out=None)
    assert not (tmp_path / "new").exists()


# discover and train-organism

@pytest.mark.slow
@pytest.mark.skipif("organism-a" not in embedded_models(), reason="organism-a has not been trained yet")
def test_discover_writes_a_circuit_that_measure_takes(tmp_path, capfd, all_progress):
    out = tmp_path / "new" / "found.json"
    assert main(["discover", "--model", "organism-a", "--n-prompts", "18", "--seed", "2", "--out", str(out)]) == 0
    found, said = load_circuit(out), capfd.readouterr()
    assert (found.model, found.task, found.name) == ("organism-a", "ioi", "organism-a-ioi") and leftovers(out.parent) == ["found.json"]
    assert found.provenance["seed"] == 2 and found.provenance["n_prompts"] == 18 and "--seed 2" in found.provenance["command"]
    assert f"{len(found)} components" in said.out and all(name in said.out for name in (*found.components, *found.roles))
    assert all(what in said.err for what in ("effects of single heads", "pruning, ", "path patching"))
    measure = [*MEASURE, "--model", "organism-a", "--circuit", str(out), "--variants", "rare_names", "--ablation", "counterfactual"]
    assert main([*measure, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["hashes"]["circuit"] == found.hash


@pytest.mark.slow
def test_train_organism_writes_a_model_that_loads(tmp_path, capfd):
    out = tmp_path / "organism"
    assert main(["train-organism", "organism-a", "--steps", "2", "--seed", "1", "--out", str(out)]) == 0
    said = capfd.readouterr()
    assert "greater_than" in said.out and said.err == ""
    assert load_model(out).cfg.n_layers == 4 and json.loads((out / "card.json").read_text(encoding="utf-8"))["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["organism"]


# bad input: options

@pytest.mark.parametrize("argv, complaint", [
    ([], "required: COMMAND"),
    (["mesure"], "did you mean measure?"),
    (["models", "--all"], "unrecognized arguments: --all"),
    (["measure", "--model", "compiled-ioi"], "required: --out"),
    (["score", "--model", "compiled-ioi", "--out", "x"], "required: --circuit, --prompts"),
    (["train-organism"], "required: name"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_incomplete_commands(argv, complaint, refused):
    assert complaint in refused(*argv, out=None)


@pytest.mark.parametrize("option, value, complaint", [
    ("--n-prompts", "-3", "--n-prompts: -3 is too small: give 1 or more"),
    ("--n-prompts", "0", "--n-prompts: 0 is too small"),
    ("--n-prompts", "many", "--n-prompts: 'many' is not a whole number"),
    ("--n-prompts", "1.5", "--n-prompts: '1.5' is not a whole number"),
    ("--n-prompts", "nan", "--n-prompts: 'nan' is not a whole number"),
    ("--seed", "-1", "--seed: -1 is too small: give 0 or more"),
    ("--draws", "0", "--draws: 0 is too small"),
    ("--n-random", "-1", "--n-random: -1 is too small: give 0 or more"),
    ("--batch-size", "0", "--batch-size: 0 is too small"),
    ("--device", "abacus", "--device abacus: not available here"),
    ("--model", "compiled-oii", "did you mean compiled-ioi?"),
    ("--model", "./no/such/folder", "./no/such/folder"),
    ("--task", "chess", "no task 'chess': there is ioi"),
    ("--axes", "sideways", "no axis 'sideways': there is base, lexical"),
    ("--variants", "rare_name", "no variant 'rare_name'"),
    ("--variants", "hospital", "no variant 'hospital' on lexical"),  # it is on another axis
    ("--ablation", "resampel", "no ablation 'resampel': there is resample"),
    ("--positions", "everywhere", "no positions 'everywhere': there is listed, all"),
    ("--levels", "atom", "no level 'atom': there is node, edge"),
    ("--circuit", "no-such.json", "no circuit 'no-such.json'"),
])
def test_bad_options_of_measure(option, value, complaint, refused):
    assert complaint in refused(*MEASURE, option, value, out="out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(refused):
    assert "--device cuda: not available here" in refused(*MEASURE, "--device", "cuda", out="out")


@pytest.mark.parametrize("model", ["gpt2", "nobody/nothing"])
@pytest.mark.parametrize("command", ["measure", "score", "discover"])
def test_without_a_hub(command, model, refused, no_hub, tmp_path):
    circuit = ["--circuit", "compiled-ioi-ioi"]
    more = {"measure": circuit, "score": [*circuit, "--prompts", write_csv(tmp_path / "p.csv", ROW)], "discover": []}
    said = refused(command, "--model", model, *more[command])
    assert model in said and "hub cannot be reached" in said


def test_the_real_program_refuses_in_one_line(tmp_path):
    command = [PROGRAM, *MEASURE, "--circuit", "compiled-ioi-ioi", "--model", "gpt2", "--out", tmp_path / "out"]
    done = subprocess.run(command, env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "hub cannot be reached" in done.stderr and leftovers(tmp_path) == []


# bad input: where results should go

@pytest.mark.parametrize("command", [MEASURE, [*SCORE, "--prompts", "never-read.csv"], ["discover", "--model", "compiled-ioi"],
                                     ["train-organism", "organism-a"]], ids=lambda c: c[0])
def test_out_below_a_file(command, refused, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "is a file, not a folder" in refused(*command, "--out", tmp_path / "file" / "below")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write into")
@pytest.mark.parametrize("command", [MEASURE, [*SCORE, "--prompts", "never-read.csv"]], ids=lambda c: c[0])
def test_out_that_cannot_be_written(command, refused):
    assert "--out /proc/" in refused(*command, "--out", "/proc/here/x")


def test_out_of_the_wrong_kind(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refused(*MEASURE, "--out", tmp_path / "file")
    assert "a folder; give the name of a file in it" in refused(*SCORE, "--prompts", "never-read.csv", "--out", tmp_path)


@pytest.mark.parametrize("options, complaint", [
    (["--model", "compiled-oii"], "did you mean compiled-ioi?"), (["--model", "./no/such/folder"], "no such folder"),
    (["--task", "chess"], "no task 'chess': there is ioi"), (["--n-prompts", "0"], "--n-prompts: 0 is too small")],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_options_of_discover(options, complaint, refused):
    assert complaint in refused("discover", "--model", "compiled-ioi", *options)


def test_discover_refuses_a_model_that_cannot_do_the_task(refused, tmp_path):
    folder = Path(shutil.copytree(embedded_models()["compiled-ioi"], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v * (0.0 if "c_proj.weight" in k else 1.0) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    assert "on base prompts of ioi: only 56% are right" in refused("discover", "--model", folder, "--n-prompts", "18")


def test_an_organism_replaces_no_other_folder(refused, tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    assert "give another one" in refused("train-organism", "organism-a", "--out", tmp_path)
    assert leftovers(tmp_path) == ["precious.txt"]


def test_an_organism_that_is_not_known(refused):
    assert "no recipe for 'organism-z': there is organism-a" in refused("train-organism", "organism-z")


# bad input: circuits

@pytest.mark.parametrize("command", ["measure", "score"])
@pytest.mark.parametrize("nodes, complaint", [
    ({"a12.h3": {"role": "name mover"}}, "a12.h3"),
    ({"attention 3": {}}, "'attention 3' is not a component"),
    ({"a0.h2": {"role": 7}}, "role of a0.h2"),
    ({"a0.h2": {"position": 7}}, "position of a0.h2"),
    ({"a0.h2": {"position": ["S9"]}}, "a0.h2 is listed at S9"),
    ({"m1": {}}, "universe is 'heads'"),
], ids=["unknown head", "not a component", "role", "position", "position that the task lacks", "mlp"])
def test_bad_circuits(nodes, complaint, command, refused, circuit_file, tmp_path):
    argv = MEASURE if command == "measure" else [*SCORE, "--prompts", write_csv(tmp_path / "prompts.csv", ROW)]
    assert complaint in refused(*argv, "--circuit", circuit_file(**nodes), out="out")


@pytest.mark.parametrize("text, complaint", [("{", "not JSON"), ("[]", "no 'nodes'"), ("", "not JSON")])
def test_files_that_are_no_circuit(text, complaint, refused, tmp_path):
    (tmp_path / "circuit.json").write_text(text)
    assert complaint in refused(*MEASURE, "--circuit", tmp_path / "circuit.json", out="out")


# bad input: prompts

@pytest.mark.parametrize("change, complaint", [
    ({"answer": " Zanzibarian"}, "answer ' Zanzibarian' is "),
    ({"answer": ""}, "row 2"),
    ({"answer": "Kathleen"}, "would run into"),
    ({"distractor": " Kathleen"}, "the answer is also the distractor"),
    ({"counterfactual": ROW["counterfactual"] + " a"}, "15 tokens, its counterfactual 16"),
    ({"prompt": " "}, "the prompt is empty"),
    ({"prompt": " a" * 500, "counterfactual": " a" * 500}, "500"),
    ({"pos_S2": "99"}, "S2 is at token 99"),
    ({"pos_S2": "second"}, "pos_S2 should be a token's index (from 0; empty for none), not 'second'"),
    ({"pos_S2": ""}, "S2, which prompt row2"),
], ids=["answer of two tokens", "no answer", "no space", "same", "unequal counterfactual", "empty", "too long", "position outside", "position text",
        "no position"])
def test_bad_prompts(change, complaint, refused, tmp_path):
    assert complaint in refused(*SCORE, "--prompts", write_csv(tmp_path / "prompts.csv", ROW | change))


@pytest.mark.parametrize("text, complaint", [
    (b"", "not a CSV file"),
    (b"prompt,answer,distractor\n", "no prompts, only a header"),
    (b"prompt,answer\na, b\n", "no column distractor"),
    (b"\xff\xfe\x00", "not a CSV file"),
], ids=["empty", "only a header", "missing column", "binary"])
def test_files_that_hold_no_prompts(text, complaint, refused, tmp_path):
    (tmp_path / "prompts.csv").write_bytes(text)
    assert complaint in refused(*SCORE, "--prompts", tmp_path / "prompts.csv")


def test_prompts_that_are_not_there(refused, tmp_path):
    assert "no such file" in refused(*SCORE, "--prompts", tmp_path / "nowhere.csv")


def test_prompts_without_the_role_position_of_the_circuit(refused, tmp_path):
    row = {k: v for k, v in ROW.items() if k != "pos_S2"}
    assert "give pos_S2" in refused(*SCORE, "--prompts", write_csv(tmp_path / "prompts.csv", row))


def test_prompts_without_what_the_ablation_needs(refused, tmp_path):
    prompts = write_csv(tmp_path / "prompts.csv", {k: v for k, v in ROW.items() if k != "counterfactual"})
    assert "needs a counterfactual" in refused(*SCORE, "--prompts", prompts)
    assert "--reference FILE" in refused(*SCORE, "--prompts", prompts, "--ablation", "mean")
    few = write_csv(tmp_path / "few.csv", UNINFORMATIVE[0])
    assert "use --draws 1" in refused(*SCORE, "--prompts", prompts, "--ablation", "resample", "--reference", few)


# bad input: models

def cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pickled_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def nan_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v * float("nan") for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("damage, complaint", [
    (cut_weights, "damaged or incomplete safetensors"),
    (pickled_weights, "only a pickle (pytorch_model.bin)"),
    (nan_weights, "prompt"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
    (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "tokenizer"),
], ids=["corrupt safetensors", "pickle", "nan", "config", "no config", "tokenizer", "no tokenizer"])
@pytest.mark.parametrize("command", ["measure", "score", "discover"])
def test_bad_model_folders(command, damage, complaint, refused, tmp_path):
    folder = Path(shutil.copytree(embedded_models()["compiled-ioi"], tmp_path / "model"))
    damage(folder)
    commands = {"measure": [*MEASURE, "--circuit", "compiled-ioi-ioi"], "discover": ["discover", "--n-prompts", "18"],
                "score": [*SCORE, "--prompts", write_csv(tmp_path / "prompts.csv", ROW)]}
    assert complaint in refused(*commands[command], "--model", folder)


# the end of the line

def test_an_error_is_one_line_without_control_characters():
    assert one_line("a\nb\t c\x1b[31m") == "a b c?[31m"


def test_an_error_of_the_system_is_one_line(refused, monkeypatch, tmp_path):
    def full(*args): raise OSError(28, "No space left on device", "scores.csv")
    monkeypatch.setitem(cli.COMMANDS, "tasks", cli.Command("", full))
    assert refused("tasks", out=None) == "circuit-gen: scores.csv: No space left on device\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "tasks", cli.Command("", lambda args: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        main(["tasks"])


def test_a_failed_check_is_exit_code_1(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "tasks", cli.Command("", lambda args: 1))
    assert main(["tasks"]) == 1
