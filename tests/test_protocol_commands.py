"""`circuit-gen protocol` and `circuit-gen evidence` through the real command line."""

import json

import pytest
from test_cli import leftovers, refused  # noqa: F401 (a fixture)

from circuit_generalization import knockouts
from circuit_generalization.circuit import Circuit, save_circuit
from circuit_generalization.cli import main
from circuit_generalization.protocol_commands import NAMES
from circuit_generalization.protocols import PROTOCOLS, reread

QUICK = ["--n-prompts", "10", "--n-random", "3", "--no-calibrations"]
DOSES = ["protocol", "dose-response", "--model", "organism-b", "--tasks", "sva", *QUICK]


@pytest.fixture(autouse=True)
def few_noises(monkeypatch):
    "What is printed and written does not rest on how much noise costs."
    monkeypatch.setattr(knockouts, "LEAST_NOISES", 2)


def test_names_are_those_of_the_protocols(): assert tuple(PROTOCOLS) == NAMES


@pytest.mark.parametrize("name", [n for n in NAMES if n != "rescue-experiment"])  # that one trains: below
def test_each_protocol_prints_and_writes(name, tmp_path, capsys):
    out, figure = tmp_path / "new" / "result.json", tmp_path / "figure.png"
    argv = ["protocol", name, "--model", "organism-b", "--tasks", "sva", "induction", *QUICK, "--out", str(out), "--figure", str(figure)]
    assert main(argv) == 0
    said, data = " ".join(capsys.readouterr().out.split()), json.loads(out.read_text(encoding="utf-8"))
    assert data["name"] == name and data["models"] == ["organism-b"] and data["tasks"] == ["sva", "induction"] and not data["calibrations"]
    for v, again in zip(data["verdicts"], reread(data)):
        assert f"{v['task']}: {v['verdict']}." in said and again["verdict"] == v["verdict"]
        assert all(f"{c} {s}" in said for c, s in v["criteria"].items())
    assert f"{data['passes']['edited']} edited passes" in said and f"Wrote {out} and {figure}." in said
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and leftovers(tmp_path) == ["figure.png", "new", "new/result.json"]


@pytest.mark.slow
def test_the_rescue_and_what_it_says_with_others(tmp_path, capsys):
    files = [tmp_path / f"{name}.json" for name in ("knockout-hierarchy", "rescue-experiment")]
    for out in files: assert main(["protocol", out.stem, "--model", "compiled-ioi", "--tasks", "ioi", *QUICK, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["evidence", *map(str, files), "--out", str(tmp_path / "evidence.json")]) == 0
    said, rows = capsys.readouterr().out, json.loads((tmp_path / "evidence.json").read_text())
    assert "graded redundancy" in said and [r["holds"] for r in rows if r["rule"] == "reversible but dispensable in part"] == [True]


@pytest.mark.slow
def test_models_are_compared_where_several_are_given(tmp_path, capsys):
    out = tmp_path / "r.json"
    argv = ["protocol", "mendelian-randomization", "--models", "organism-a", "organism-c", "--tasks", "sva", "ioi", *QUICK, "--out", str(out)]
    assert main([*argv, "--figure", str(tmp_path / "r.png")]) == 0
    data, said = json.loads(out.read_text()), capsys.readouterr().out
    assert [(v["model"], v["task"]) for v in data["verdicts"]] == [(m, t) for m in ("organism-a", "organism-c") for t in ("sva", "ioi")]
    assert all(v["criteria"]["E6"] in ("met", "not met") for v in data["verdicts"]) and "sva (organism-a in organism-c)" in said


def test_the_same_command_gives_the_same_bytes(tmp_path):
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for out in files: assert main([*DOSES, "--seed", "3", "--out", str(out)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_failed_task_is_refused_with_exit_code_1(tmp_path, capsys):
    out, figure = tmp_path / "r.json", tmp_path / "r.png"
    argv = ["protocol", "dose-response", "--model", "organism-b@1000", "--tasks", "ioi", "--circuits", "organism-b-ioi", *QUICK, "--out", str(out)]
    assert main([*argv, "--figure", str(figure)]) == 1
    said, data = capsys.readouterr().out, json.loads(out.read_text())
    assert "Refused: ioi, since organism-b@1000 on base prompts of ioi: only" in said and list(data["refused"]) == ["ioi"]
    assert not data["verdicts"] and not figure.exists() and "nothing was measured" in said


@pytest.mark.parametrize("names, roles", [(["a0.h0"], None), ([f"a0.h{k}" for k in range(8)], None), (["a0.h0", "m1"], {"a0.h0": "reader"}), (["m1"],
                                                                                                                                              None)])
@pytest.mark.parametrize("name", ["knockout-hierarchy", "mendelian-randomization", "dose-response"])
def test_circuits_of_every_form_are_answered(name, names, roles, tmp_path, capsys):
    file, out = tmp_path / "mine.json", tmp_path / "r.json"
    universe = "heads+mlps" if "m1" in names else "heads"
    save_circuit(Circuit.from_components(names, roles=roles, universe=universe, name="mine", task="sva"), file,
                 {"n_layers": 4, "n_heads": 8, "d_model": 128, "parallel_attn_mlp": False})
    code = main(["protocol", name, "--model", "organism-b", "--tasks", "sva", "--circuits", str(file), *QUICK, "--n-random", "0", "--out", str(out)])
    if names == ["m1"]:
        assert code == 2 and "has no heads" in capsys.readouterr().err and not out.exists()
        return
    assert code == 0
    data = json.loads(out.read_text())
    assert reread(data)[0]["verdict"] == data["verdicts"][0]["verdict"] and "random" in capsys.readouterr().out


@pytest.mark.parametrize("argv, said", [
    (["protocol"], "required: NAME"), (["protocol", "knock-out", "--model", "organism-a", "--tasks", "ioi"],
                                       "no protocol 'knock-out': there is knockout-"),
    (["protocol", "dose-response", "--tasks", "ioi"], "one of the arguments --model --models is required"),
    (["protocol", "dose-response", "--model", "organism-a", "--models", "organism-b", "--tasks", "ioi"], "not allowed with argument"),
    (["protocol", "dose-response", "--model", "organism-A", "--tasks", "ioi"], "did you mean organism-a?"),
    (["protocol", "dose-response", "--models", "organism-a", "organism-a", "--tasks", "ioi"], "are the same model"),
    (["protocol", "dose-response", "--model", "organism-a", "--tasks", "ioi", "ioi"], "tasks listed twice"),
    (["protocol", "dose-response", "--model", "organism-a", "--tasks", "names"], "no task 'names'"),
    ([*DOSES, "--ablation", "burn"], "no ablation 'burn'"), ([*DOSES, "--positions", "here"], "no positions 'here'"),
    ([*DOSES, "--figure", "f.pdf"], "figures are PNG files"), ([*DOSES, "--n-prompts", "0"], "0 is too small"),
    ([*DOSES, "--device", "tpu"], "--device tpu: not available here"), ([*DOSES, "--circuits", "organism-b-ioi"], "is a circuit of task 'ioi'")])
def test_every_mistake_is_one_line(argv, said, refused, tmp_path):  # noqa: F811
    assert said in refused(*argv)


def test_results_that_are_none_are_named(refused, tmp_path):  # noqa: F811
    bad, other = tmp_path / "bad.json", tmp_path / "other.json"
    bad.write_text("{")
    other.write_text("[1]")
    assert "no such file" in refused("evidence", tmp_path / "none.json", out=None)
    assert "not a result that can be read" in refused("evidence", bad, out=None)
    for text in ("[1]", '{"protocol": "MB_KH", "verdicts": [{}]}', '{"protocol": "MB_KH", "verdicts": 5}', '{"protocol": "ZZ", "verdicts": [{}]}',
                 '{"metric": "GN2", "models": ["m"], "findings": [{}]}'):
        other.write_text(text)
        assert "a result: pass what" in refused("evidence", other, out=None).replace("protocol's result: pass what", "a result: pass what")
    other.write_text('{"protocol": "MB_KH", "verdicts": []}')
    assert "nothing was measured" in refused("evidence", other, out=None)
