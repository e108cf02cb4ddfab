"""The genetics lens through the real command line: what is printed, what is written, and every mistake in one line."""

import json

import pandas as pd
import pytest
from test_cli import leftovers, refused  # noqa: F401 (a fixture)

from circuit_generalization.circuit import Circuit
from circuit_generalization.circuit_scorer import CircuitScorer
from circuit_generalization.cli import main
from circuit_generalization.errors import InputError
from circuit_generalization.genetics_commands import GENETICS
from circuit_generalization.genetics_figures import plot_genetics
from circuit_generalization.models import final_logits, load_model
from circuit_generalization.tasks import make_prompts

QUICK = ["--n-prompts", "18", "--n-random", "3"]


@pytest.mark.parametrize("command", GENETICS)
def test_each_command_prints_and_writes(command, tmp_path, capsys):
    out, figure = tmp_path / "new" / "result.json", tmp_path / "figure.png"
    assert main([command, "--model", "organism-c", "--tasks", "ioi", "induction", *QUICK, "--out", str(out), "--figure", str(figure)]) == 0
    said, data = capsys.readouterr().out, json.loads(out.read_text(encoding="utf-8"))
    assert data["name"] == command and data["models"] == ["organism-c"] and data["tasks"] == ["ioi", "induction"]
    for finding in data["findings"]: assert f"{', '.join(finding['tasks'])}: {finding['verdict']}." in said
    assert f"{data['passes']['edited']} edited passes" in said and "passes" in said and f"Wrote {out} and {figure}." in said
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and leftovers(tmp_path) == ["figure.png", "new", "new/result.json"]


def test_the_same_command_gives_the_same_bytes(tmp_path):
    files = [tmp_path / f"{i}.{kind}" for i in range(2) for kind in ("json", "png")]
    for i in range(2):
        where = ["--out", str(files[2 * i]), "--figure", str(files[2 * i + 1])]
        assert main(["chimera", "--model", "organism-c", "--tasks", "ioi", *QUICK, "--seed", "3", *where]) == 0
    assert files[0].read_bytes() == files[2].read_bytes() and files[1].read_bytes() == files[3].read_bytes()


def test_models_are_compared_where_several_are_given(tmp_path, capsys):
    out = tmp_path / "r.json"
    assert main(["convergent-evolution", "--model", "organism-a", "organism-b", "--tasks", "ioi", "sva", "--out", str(out)]) == 0
    data, said = json.loads(out.read_text()), capsys.readouterr().out
    kinds = [f["metadata"]["kind"] for f in data["findings"]]
    assert kinds.count("homology") == 2 and kinds.count("convergence") == 2 and "ioi (organism-a, organism-b)" in said


def test_a_failed_task_is_refused_with_exit_code_1(tmp_path, capsys):
    out, figure = tmp_path / "r.json", tmp_path / "r.png"
    code = main(["epistasis", "--model", "organism-b@1000", "--tasks", "ioi", "--circuits", "organism-b-ioi", *QUICK, "--out", str(out),
                 "--figure", str(figure)])
    said, data = capsys.readouterr().out, json.loads(out.read_text())
    assert code == 1 and "Refused: ioi, since organism-b@1000 on base prompts of ioi: only" in said and data["value"] is None
    assert list(data["refused"]) == ["ioi"] and data["findings"] == [] and not figure.exists()


def test_some_tasks_may_fail_and_the_others_are_measured(tmp_path, capsys):
    out = tmp_path / "r.json"
    given = ["--circuits", "organism-b-ioi", "organism-b-induction"]
    assert main(["epistasis", "--model", "organism-b@1000", "--tasks", "ioi", "induction", *given, *QUICK, "--out", str(out)]) == 1
    data = json.loads(out.read_text())
    assert [f["tasks"] for f in data["findings"]] == [["induction"]] and list(data["refused"]) == ["ioi"]


EPISTASIS = ["epistasis", "--model", "organism-a", "--tasks", "ioi", *QUICK]


@pytest.mark.parametrize("argv, said", [
    (["epistasis", "--model", "organism-a"], "required: --tasks"),
    (["epistasis", "--model", "organism-a", "--tasks"], "expected at least one argument"),
    (["epistasis", "--model", "organism-A", "--tasks", "ioi"], "did you mean organism-a?"),
    (["epistasis", "--model", "organism-a", "--tasks", "gendered_pronoun"], "no task 'gendered_pronoun': there is ioi, sva, greater_than, induction"),
    (["epistasis", "--model", "organism-a", "--tasks", "ioi", "ioi"], "tasks listed twice"),
    (["epistasis", "--model", "compiled-ioi", "--tasks", "sva"], "no circuit comes with model 'compiled-ioi' and task 'sva': give one with"),
    ([*EPISTASIS, "--ablation", "burn"], "no ablation 'burn'"),
    ([*EPISTASIS, "--positions", "here"], "no positions 'here'"),
    ([*EPISTASIS, "--n-prompts", "0"], "0 is too small"),
    ([*EPISTASIS, "--n-random", "-1"], "-1 is too small"),
    ([*EPISTASIS, "--circuits", "organism-a-sva"], "is a circuit of task 'sva', which is not among ioi"),
    ([*EPISTASIS, "--circuits", "nowhere.json"], "no circuit 'nowhere.json'"),
    ([*EPISTASIS, "--circuits", "organism-c-ioi", "organism-a-ioi"], "a second circuit of task 'ioi'"),
    ([*EPISTASIS, "--device", "abacus"], "--device abacus: not available here"),
    (["knock-in", "--model", "organism-a", "--tasks", "ioi"], "give at least two, such as --tasks ioi sva"),
    (["convergent-evolution", "--model", "organism-a", "--tasks", "ioi"], "give at least two tasks"),
    (["convergent-evolution", "--model", "organism-a", "organism-b", "--tasks", "ioi", "--circuits", "organism-a-ioi"], "goes with one model"),
    (["epistasis", "--model", "organism-a", "organism-b", "--tasks", "ioi"], "unrecognized arguments: organism-b"),
    (["epistatis", "--model", "organism-a"], "did you mean epistasis?"),
])
def test_mistakes_are_one_line(argv, said, refused):  # noqa: F811
    assert said in refused(*argv)


def test_files_that_would_be_lost_or_cannot_be_written(refused, tmp_path):  # noqa: F811
    circuit = tmp_path / "mine.json"
    circuit.write_text("{}")
    (tmp_path / "folder").mkdir()
    assert "that is an input" in refused(*EPISTASIS, "--circuits", circuit, "--out", circuit)
    assert "--figure" in refused(*EPISTASIS, "--figure", tmp_path / "folder") and "a folder" in refused(*EPISTASIS, "--out", tmp_path / "folder")
    same = tmp_path / "x.png"
    assert "give two files" in refused(*EPISTASIS, "--out", same, "--figure", same)
    assert "ends in .png" in refused(*EPISTASIS, "--figure", tmp_path / "x.jpg")
    assert "cannot be written" in refused(*EPISTASIS, "--out", tmp_path / f"{'x' * 250}.json")
    assert "not a file that can be replaced" in refused(*EPISTASIS, "--out", "/dev/null")
    model = tmp_path / "folder"
    assert "in its folder" in refused("epistasis", "--model", model, "--tasks", "ioi", *QUICK, "--out", model / "config.json")
    assert "no 'nodes' object" in refused(*EPISTASIS, "--circuits", circuit)


def test_a_circuit_of_another_model_is_refused(refused, tmp_path):  # noqa: F811
    circuit = tmp_path / "big.json"
    circuit.write_text(json.dumps({"nodes": {"a9.h9": {}}, "task": "ioi"}))
    assert "a9.h9" in refused(*EPISTASIS, "--circuits", circuit)
    circuit.write_text(json.dumps({"nodes": {"a0.h2": {"position": "SUBJ"}}, "task": "ioi"}))
    assert "listed at SUBJ" in refused(*EPISTASIS, "--circuits", circuit, "--positions", "listed")


def test_figures_refuse_what_is_no_result():
    with pytest.raises(InputError, match="not a result"): plot_genetics({"metric": "GN2"})
    with pytest.raises(InputError, match="not a result"): plot_genetics([1])


# the gate of `measure`, and what is shown beside LD

def test_measure_refuses_a_task_that_the_model_fails(refused):  # noqa: F811
    argv = ["measure", "--model", "organism-b@1000", "--circuit", "organism-b-ioi", "--n-prompts", "18"]
    assert "organism-b@1000 on base prompts of ioi: only" in refused(*argv, out="out")
    assert "at least 75% must be" in refused(*argv, "--dry-run", out="out")


def test_the_difference_of_probabilities_stands_beside_ld_where_it_is_usual(tmp_path, capsys):
    common = ["--model", "organism-a", "--axes", "domain", "--n-prompts", "18", "--n-random", "0", "--ablation", "mean", "--positions", "listed",
              "--levels", "node", "--workers", "1"]
    assert main(["measure", "--task", "greater_than", "--variants", "conflict", *common, "--out", str(tmp_path / "gt")]) == 0
    said = capsys.readouterr().out
    scores, table = (pd.read_csv(tmp_path / "gt" / f"{name}.csv") for name in ("scores", "generalization"))
    assert scores.prob_diff_model.between(-1, 1).all() and scores.prob_diff_circuit.notna().all() and "Mean P(answers) - P(distractors)" in said
    base = scores[scores.variant == "base"]
    assert table.prob_diff_model[0] == pytest.approx(base.prob_diff_model.mean()) and base.prob_diff_model.mean() > 0.2
    assert main(["measure", "--task", "induction", "--variants", "places", *common, "--out", str(tmp_path / "ind")]) == 0
    assert "prob_diff_model" not in pd.read_csv(tmp_path / "ind" / "scores.csv")


def test_differences_of_probabilities_are_those_of_the_whole_vocabulary():
    model = load_model("organism-c")
    prompts = make_prompts("greater_than", n=12, tokenizer=model.tokenizer)
    scores = CircuitScorer(model, "organism-c-greater_than").score(prompts, "mean", n_random=0, profile=False)
    p = final_logits(model, prompts.tokens, prompts.lengths).softmax(-1)
    for i in range(12):
        later, earlier = ([k for k in ids[i].tolist() if k >= 0] for ids in (prompts.answers, prompts.distractors))
        assert scores.prob_diff_model[i] == pytest.approx(float(p[i, later].sum() - p[i, earlier].sum()), abs=1e-5)
    whole = Circuit.from_components([f"a{layer}.h{h}" for layer in range(4) for h in range(8)], task="greater_than")
    alone = CircuitScorer(model, whole).score(prompts, "mean", n_random=0, profile=False)
    assert alone.prob_diff_circuit.tolist() == pytest.approx(alone.prob_diff_model.tolist(), abs=1e-5)
