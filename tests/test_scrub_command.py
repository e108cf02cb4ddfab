"""`circuit-gen scrub` and `circuit-gen hypotheses`, through the real command line."""

import json

import pytest

from circuit_generalization.causal_scrubbing import SCRUB_FIELDS
from circuit_generalization.cli import main
from circuit_generalization.hypotheses import load_hypothesis, packaged_hypotheses, save_hypothesis

QUICK = ["--n", "24", "--pool", "144"]


def test_a_run_prints_and_writes_what_its_fields_say(tmp_path, capsys):
    out, figure = tmp_path / "a" / "s.json", tmp_path / "h.png"
    given = ["scrub", "--model", "organism-a", "--hypothesis", "ioi-detailed", "--target", "ld", *QUICK, "--out", str(out)]
    assert main([*given, "--figure", str(figure)]) == 0
    data, said = json.loads(out.read_text()), capsys.readouterr().out
    assert set(data) == set(SCRUB_FIELDS) and figure.read_bytes()[:4] == b"\x89PNG"
    assert data["passes"] == dict(whole=144, edited=24 * (1 + 3)) and "Cost: 144 whole prompts and 96 components computed." in said
    assert "Hardly tested" in said and "relay: a2.h0 at END-2, carries informative" in said
    first = out.read_bytes()
    main(given)
    assert out.read_bytes() == first


def test_the_cost_is_stated_and_nothing_is_run(tmp_path, capsys):
    assert main(["scrub", "--model", "organism-a", "--hypothesis", "ioi-naive", "--dry-run", "--out", str(tmp_path / "s.json")]) == 0
    assert "Cost: 4000 whole prompts and 500 components computed." in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_variants_and_an_adversary(tmp_path, capsys):
    out = tmp_path / "s.json"
    code = main(["scrub", "--model", "organism-a", "--hypothesis", "ioi-refined", "--target", "ld", *QUICK, "--variants", "hospital", "same_initial",
                 "--adversary", "order", "--out", str(out)])
    data, said = json.loads(out.read_text()), capsys.readouterr().out
    assert code == 1 and [r["variant"] for r in data["variants"]] == ["base", "hospital"] and "same_initial" in data["refused"]
    assert "Refused: same_initial" in said and {r["added"] for r in data["adversary"]} == {"carries order"}


def test_the_classifier_of_brackets_and_an_own_file(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    save_hypothesis(load_hypothesis("brackets-1b"), mine)
    assert main(["scrub", "--model", "brackets", "--hypothesis", str(mine), *QUICK, "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["right"] == 1


def test_prompts_from_a_file(tmp_path, capsys):
    file = tmp_path / "p.csv"
    rows = [f"Then, {a} and {b} went to the store. {b} gave a ring to, {a}, {b}" for a, b in (("Mary", "John"), ("John", "Mary")) for _ in range(12)]
    cells = [r.rsplit(", ", 2) for r in rows]
    file.write_text("prompt,answer,distractor\n" + "\n".join(f'"{text}"," {a}"," {b}"' for text, a, b in cells))
    bare = dict(output=["x"], claims={"x": dict(nodes=["a2.h0"], feature=["answer"])})
    (tmp_path / "h.json").write_text(json.dumps(bare))
    out = tmp_path / "s.json"
    assert main(["scrub", "--model", "organism-a", "--hypothesis", str(tmp_path / "h.json"), "--prompts", str(file), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["n"] == 24


def test_hypotheses_are_listed(capsys):
    assert main(["hypotheses"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in packaged_hypotheses())


@pytest.mark.parametrize("args, says", [
    (["--hypothesis", "nope"], "nope: no such file, and no packaged hypothesis: there is brackets-1a"),
    (["--target", "what"], "no target 'what': there is loss, ld"),
    (["--variants", "nope"], "task 'ioi' has no variant 'nope': there is base"),
    (["--variants", "hospital", "--prompts", "x.csv"], "--variants are generated, so that they do not go with --prompts"),
    (["--prompts", "nope.csv"], "nope.csv: no such file"),
    (["--n", "0"], "0 is too small"), (["--model", "organism-z"], "did you mean organism"),
    (["--model", "brackets"], "has no tokenizer, and prompts are text"),
    (["--hypothesis", "brackets-1a"], "is about a model that reads brackets, not text"),
    (["--hypothesis", "induction-naive", "--adversary", "nope", "--n", "24", "--pool", "100"], "no feature 'nope'"),
    (["--device", "cuda:9"], "--device cuda:9: not available here")])
def test_bad_input_is_answered_in_one_line(args, says, tmp_path, capsys):
    given = dict(zip(["--model", "--hypothesis", "--out"], ["organism-a", "ioi-naive", str(tmp_path / "s.json")]))
    rest, i = [], 0
    while i < len(args):
        values = [args[i + 1]]
        if args[i] in given: given[args[i]] = values[0]
        else: rest += [args[i], *values]
        i += 2
    assert main(["scrub", *(x for pair in given.items() for x in pair), *rest]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "s.json").exists()


def test_a_bad_file_is_named(tmp_path, capsys):
    file = tmp_path / "bad.yaml"
    file.write_text("output: [x]\nclaims:\n  x: {nodes: a0.h0, fature: [order]}\n")
    assert main(["scrub", "--model", "organism-a", "--hypothesis", str(file), "--out", str(tmp_path / "s.json")]) == 2
    assert "bad.yaml: claim 'x': unknown field 'fature'" in capsys.readouterr().err


def test_a_head_that_the_model_lacks_is_named(tmp_path, capsys):
    file = tmp_path / "h.yaml"
    file.write_text("task: ioi\noutput: [x]\nclaims:\n  x: {nodes: a9.h6, feature: [answer]}\n")
    assert main(["scrub", "--model", "organism-a", "--hypothesis", str(file), *QUICK, "--out", str(tmp_path / "s.json")]) == 2
    assert "claim 'x': the model has no a9.h6: it has 4 layers of 8 heads" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_classifier_of_brackets_reads_at_each_bracket():
    "Both shares are needed; the published split is not this model's."
    from circuit_generalization.causal_scrubbing import scrub
    from circuit_generalization.models import load_model, quiet

    with quiet(): model = load_model("brackets")
    names = ("1a", "1b", "2a", "2b", "2b-left", "2b-neither")
    share = {name: scrub(model, f"brackets-{name}", n=300, pool=2000).recovered.estimate for name in names}
    assert share["2a"] > 0.99 and share["2b"] > 0.95 and share["1b"] > share["1a"] + 0.1
    assert share["2b-left"] < 0.85 and share["2b-neither"] < 0.4


@pytest.mark.slow
def test_hypotheses_are_ordered_as_they_should_be():
    from circuit_generalization.causal_scrubbing import prompts_for, scrub
    from circuit_generalization.models import load_model, quiet

    for model, names in (("organism-a", ["ioi-wrong-roles", "ioi-naive", "ioi-detailed", "ioi-refined"]),
                         ("organism-c", ["induction-wrong", "induction-naive", "induction-refined"])):
        with quiet(): bridge = load_model(model)
        prompts = prompts_for(bridge, load_hypothesis(names[0]), 300, pool=2400)
        share = [scrub(bridge, name, prompts, 300, target="ld").recovered for name in names]
        assert share[-1].low > 0.75 and share[-1].estimate > share[-2].estimate and share[0].high < share[-1].low
