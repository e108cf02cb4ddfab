"""Hypotheses as data: what can be meant, every message for what cannot, files, text and graph."""

import json

import pytest
import yaml
from guesses import hypotheses
from hypothesis import given
from matplotlib.figure import Figure

from circuit_generalization.circuit import Component
from circuit_generalization.errors import InputError
from circuit_generalization.hypotheses import (
    Claim,
    Hypothesis,
    HypothesisError,
    describe,
    hypothesis_from_dict,
    hypothesis_graph,
    hypothesis_to_dict,
    load_hypothesis,
    packaged_hypotheses,
    plot_hypothesis,
    save_hypothesis,
)

TEXT = """
name: example
task: ioi
model: organism-a
universe: heads+mlps
unimportant: separately
says: The mover copies.
output: [mover, rest]
claims:
  mover: {nodes: [a1.h6, a1.h7], feature: [answer, order], reads: {q: [middle, quiet], kv: previous}}
  middle: {nodes: m0, positions: [END, S2], feature: [distractor], reads: [previous, early], part: subspace 2}
  previous: {nodes: [a0.h7], positions: all}
  early: {nodes: embed, positions: each, feature: token}
  quiet: {nodes: rest, feature: []}
  rest: {nodes: rest}
"""
EXAMPLE = hypothesis_from_dict(yaml.safe_load(TEXT))


def test_the_example():
    mover, middle = EXAMPLE.claim("mover"), EXAMPLE.claim("middle")
    assert mover == Claim("mover", ("a1.h6", "a1.h7"), ("END",), ("answer", "order"),
                          {"q": ("middle", "quiet"), "k": ("previous",), "v": ("previous",)})
    assert middle == Claim("middle", ("m0",), ("END", "S2"), ("distractor",), {"in": ("previous", "early")}, "subspace 2")
    assert EXAMPLE.claim("previous").feature is None and EXAMPLE.claim("quiet").feature == ()
    assert (EXAMPLE.name, EXAMPLE.task, EXAMPLE.model, EXAMPLE.universe) == ("example", "ioi", "organism-a", "heads+mlps")
    assert (EXAMPLE.unimportant, EXAMPLE.says, EXAMPLE.output) == ("separately", "The mover copies.", ("mover", "rest"))
    assert mover.components == (Component(1, 6), Component(1, 7)) and mover.children == ("middle", "quiet", "previous")
    assert [c.layers for c in EXAMPLE.claims] == [(1, 1), (0, 0), (0, 0), (-1, -1), (-1, -1), (-1, -1)]
    assert Claim("x", ("m3", "m1")).layers == (1, 3)
    assert [c.inputs for c in EXAMPLE.claims] == [("q", "k", "v"), ("in",), ("q", "k", "v"), (), (), ()]
    assert [c.is_rest for c in EXAMPLE.claims] == [False, False, False, False, True, True]


def test_defaults():
    h = hypothesis_from_dict(dict(output="m", claims={"m": dict(nodes="a0.h1")}))
    assert h == Hypothesis((Claim("m", ("a0.h1",)),), ("m",), "hypothesis", None, None, "heads", "per parent", "")
    assert h.claim("m") == Claim("m", ("a0.h1",), ("END",), None, None, None)


def test_lists_of_inputs():
    def reads(given):
        claims = {"m": dict(nodes="a1.h1", reads=given), "p": dict(nodes="a0.h1")}
        return hypothesis_from_dict(dict(output=["m", "p"], claims=claims)).claim("m").reads

    assert reads("own") == {x: ("own",) for x in "qkv"} and reads([]) == {x: () for x in "qkv"}
    assert reads({"qk": "p", "v": None}) == {"q": ("p",), "k": ("p",), "v": ()} and reads({}) == {} and reads(None) is None


# The tree


def test_walk():
    assert [path for path, _ in EXAMPLE.walk()] == [
        ("mover",), ("mover", "middle"), ("mover", "middle", "previous"), ("mover", "middle", "early"), ("mover", "quiet"), ("mover", "previous"),
        ("rest",)]
    assert all(claim.name == path[-1] for path, claim in EXAMPLE.walk())


def test_describe():
    assert describe(EXAMPLE) == str(EXAMPLE) == """\
example (heads+mlps; what does not matter is sampled separately)
The mover copies.
logits at END
  in: mover: a1.h6, a1.h7 at END, carries answer, order
    q: middle: m0 at END, S2, carries distractor (subspace 2)
      in: previous: a0.h7 at all, carries everything
      in: early: embed at each, carries token
    q: quiet: rest, carries nothing
    k: previous: a0.h7 at all, carries everything
    v: previous: a0.h7 at all, carries everything
  in: rest: rest, carries everything"""
    h = hypothesis_from_dict(dict(output="m", claims={"m": dict(nodes="a0.h1", reads=dict(q="own", k=[]))}))
    assert describe(h) == """\
hypothesis (heads; what does not matter is sampled per parent)
logits at END
  in: m: a0.h1 at END, carries everything
    q: own prompt
    k: any prompt"""
    assert describe(Hypothesis((), ())).endswith("logits at END\n  in: any prompt")


def test_graph():
    graph = hypothesis_graph(EXAMPLE)
    assert {(a, b): into for a, b, into in graph.edges(data="into")} == {
        ("mover", "logits"): "", ("rest", "logits"): "", ("middle", "mover"): "q", ("quiet", "mover"): "q", ("previous", "mover"): "kv",
        ("previous", "middle"): "in", ("early", "middle"): "in"}
    assert graph.nodes["middle"]["label"] == "middle\nm0 at END, S2\ndistractor (subspace 2)"
    assert graph.nodes["quiet"]["label"] == "quiet\nrest\nnothing" and graph.nodes["logits"]["label"] == "logits"
    own = hypothesis_from_dict(dict(output="m", claims={"m": dict(nodes="a0.h1", reads="own")}))
    assert list(hypothesis_graph(own).edges) == [("m", "logits")]


def test_plot():
    figure = plot_hypothesis(EXAMPLE)
    assert isinstance(figure, Figure) and figure.axes[0].get_title() == "example"
    height = {t.get_text().split("\n")[0]: t.get_position()[1] for t in figure.axes[0].texts if "\n" in t.get_text() or t.get_text() == "logits"}
    assert height["logits"] > height["mover"] == height["rest"] > height["middle"] == height["quiet"] > height["previous"] == height["early"]
    assert plot_hypothesis(Hypothesis((), ())).axes


@given(hypotheses())
def test_every_claim_is_upstream_of_its_reader_and_described(h):
    lines = describe(h).splitlines()
    paths = [path for path, _ in h.walk()]
    assert {p[-1] for p in paths} == {c.name for c in h.claims} == set(hypothesis_graph(h)) - {"logits"}
    for path, claim in h.walk():
        assert sum(f": {claim.name}: " in line for line in lines) >= 1
        if len(path) > 1: assert claim.layers[1] <= h.claim(path[-2]).layers[0]


# Files


@given(hypotheses())
def test_round_trips(tmp_path_factory, h):
    folder = tmp_path_factory.mktemp("saved")
    assert hypothesis_from_dict(hypothesis_to_dict(h)) == h and hypothesis_from_dict(json.loads(json.dumps(hypothesis_to_dict(h)))) == h
    for ending in ("yaml", "json"):
        save_hypothesis(h, folder / f"h.{ending}")
        assert load_hypothesis(folder / f"h.{ending}") == h
    assert json.loads((folder / "h.json").read_text(encoding="utf-8")) == hypothesis_to_dict(h)


def test_saved_as_it_is_read(tmp_path):
    save_hypothesis(EXAMPLE, tmp_path / "h.yaml")
    assert yaml.safe_load((tmp_path / "h.yaml").read_text()) == hypothesis_to_dict(EXAMPLE)
    assert list(hypothesis_to_dict(EXAMPLE)) == ["name", "task", "model", "universe", "unimportant", "says", "output", "claims"]
    assert hypothesis_to_dict(EXAMPLE)["claims"]["quiet"] == dict(nodes=["rest"], positions=["END"], feature=[])
    assert [p.name for p in tmp_path.iterdir()] == ["h.yaml"]


def test_packaged_hypotheses_can_be_read():
    for name, path in packaged_hypotheses().items(): assert load_hypothesis(name) == load_hypothesis(path)


# What cannot be meant


M, P = "m: {nodes: a1.h0, reads: {q: p}}", "p: {nodes: a0.h0}"
BAD = {
    # not data
    "output: [": "cannot be read as YAML or JSON",
    "name: 2020-99-99": "cannot be read as YAML or JSON \\(month",
    "output: m\nclaims: {m: {nodes: m0}, m: {nodes: a0.h0}}": "'m' is given twice",
    "output: m\noutput: n\nclaims: {}": "'output' is given twice",
    "": "a hypothesis is a mapping with name, task, model, universe, unimportant, says, output, claims, not a NoneType",
    "[1]": "a hypothesis is a mapping .* not a list",
    "claims: {}": "a hypothesis needs 'output'",
    "output: m": "a hypothesis needs 'claims'",
    "output: m\nclaims: {}\nmodle: x": "unknown field 'modle': there is name, task",
    "output: m\nclaims: [m]": "claims should be a mapping from names to claims",
    "output: 5\nclaims: {}": "hypothesis: output should be a name or a list of names, not 5",
    "output: [[m]]\nclaims: {}": "output should be a name or a list",
    # a claim's fields
    "output: m\nclaims: {m: a0.h0}": "claim 'm': should have nodes, such as",
    "output: m\nclaims: {m: {feature: x}}": "claim 'm': should have nodes, such as",
    "output: m\nclaims: {m: {nodes: a0.h0, fature: x}}": "claim 'm': unknown field 'fature': there is nodes, positions, feature, reads, part",
    "output: m\nclaims: {m: {nodes: 5}}": "claim 'm': nodes should be a name or a list of names, not 5",
    "output: m\nclaims: {m: {nodes: a0.h0, positions: null}}": "claim 'm': positions should be a name",
    "output: m\nclaims: {m: {nodes: a0.h0, feature: {x: y}}}": "claim 'm': feature should be a name",
    "output: m\nclaims: {m: {nodes: a0.h0, reads: 5}}": "claim 'm': reads should be a name",
    "output: m\nclaims: {m: {nodes: a0.h0, reads: {q: 5}}}": "claim 'm': reads of 'q' should be a name",
    "output: m\nclaims: {m: {nodes: a0.h0, reads: {qk: own, k: own}}}": "claim 'm': input 'k' is given twice",
    "output: m\nclaims: {m: {nodes: a0.h0, reads: {qx: own}}}": "claim 'm' has no input 'x': there is q, k, v",
    "output: m\nclaims: {m: {nodes: m0, reads: {in: own, q: own}}}": "claim 'm' has no input 'q': there is in",
    "output: m\nclaims: {m: {nodes: embed, reads: {q: own}}}": "claim 'm' has no input 'q'$",
    "output: m\nclaims: {m: {nodes: embed, reads: own}}": "claim 'm' has no inputs: leave its reads out",
    "output: m\nclaims: {m: {nodes: rest, reads: []}}": "claim 'm' has no inputs: leave its reads out",
    "output: m\nclaims: {m: {nodes: a1.h0, reads: {q: [own, p]}}, p: {nodes: a0.h0}}": "claim 'm': input 'q' is 'own' and more",
    # a claim
    "output: m\nclaims: {m: {nodes: []}}": "claim 'm' is about no component: give nodes",
    "output: own\nclaims: {own: {nodes: a0.h0}}": "claim 'own': a claim cannot be called so",
    "output: ''\nclaims: {'': {nodes: a0.h0}}": "claim '': a claim cannot be called so",
    "output: rest\nclaims: {rest: {nodes: a0.h0}}": "claim 'rest': a claim cannot be called so",
    "output: m\nclaims: {m: {nodes: [embed, a0.h0]}}": "claim 'm': 'embed' must stand alone",
    "output: m\nclaims: {m: {nodes: [a0.h0, rest]}}": "claim 'm': 'rest' must stand alone",
    "output: m\nclaims: {m: {nodes: a0}}": "claim 'm': 'a0' is not a component",
    "output: m\nclaims: {m: {nodes: [a0.h0, m0], reads: own}}":
        "claim 'm' reads, and has heads and MLPs, whose inputs are not the same: make it two claims",
    "output: m\nclaims: {m: {nodes: [a0.h0, a0.h0]}}": "claim 'm' names a component twice: a0.h0, a0.h0",
    "output: m\nclaims: {m: {nodes: [a0.h01]}}": "claim 'm': write a0.h1, not a0.h01",
    "output: m\nclaims: {m: {nodes: a0.h0, positions: []}}": "claim 'm' is at no position",
    "output: m\nclaims: {m: {nodes: a0.h0, positions: [all, END]}}": "claim 'm': 'all' and 'each' must stand alone",
    "output: m\nclaims: {m: {nodes: a0.h0, positions: [END, each]}}": "claim 'm': 'all' and 'each' must stand alone",
    "output: m\nclaims: {m: {nodes: a0.h0, positions: each, reads: []}}": "claim 'm': where every position is drawn for itself",
    "output: m\nclaims: {m: {nodes: a0.h0, positions: each, feature: x, part: fitted}}": "claim 'm': where every position is drawn for itself",
    "output: m\nclaims: {m: {nodes: rest, positions: each}}": "claim 'm': where every position is drawn for itself",
    "output: m\nclaims: {m: {nodes: a0.h0, feature: x, part: half}}": "claim 'm': no part 'half': there is 'subspace N', N at least 1, and 'fitted'",
    "output: m\nclaims: {m: {nodes: a0.h0, feature: x, part: subspace 0}}": "claim 'm': no part 'subspace 0'",
    "output: m\nclaims: {m: {nodes: a0.h0, feature: x, part: subspace}}": "claim 'm': no part 'subspace'",
    "output: m\nclaims: {m: {nodes: a0.h0, feature: x, part: fitted 2}}": "claim 'm': no part 'fitted 2'",
    "output: m\nclaims: {m: {nodes: a0.h0, part: fitted}}": "claim 'm': a fitted is found by the claim's feature, and it has none",
    "output: m\nclaims: {m: {nodes: a0.h0, feature: [], part: subspace 1}}": "claim 'm': a subspace is found by the claim's feature",
    "output: m\nclaims: {m: {nodes: rest, feature: x, part: fitted}}": "claim 'm': no part can be taken of 'rest'",
    # a hypothesis
    "output: m\nuniverse: neurons\nclaims: {m: {nodes: a0.h0}}": "universe 'neurons' is not one of heads, heads\\+mlps",
    "output: m\nunimportant: often\nclaims: {m: {nodes: a0.h0}}": "unimportant 'often' is not one of together, per parent, separately",
    "output: n\nclaims: {m: {nodes: a0.h0}}": "'n' is read, and there is no such claim",
    "output: own\nclaims: {}": "hypothesis 'hypothesis' has no claim 'own'",
    "name: best\noutput: m\nclaims: {m: {nodes: a0.h0}, n: {nodes: a0.h1}}": "hypothesis 'best': nothing reads 'n': leave it out, or say who does",
    "output: m\nclaims: {m: {nodes: m0}}": "claim 'm' is about an MLP; .*: set the universe to 'heads\\+mlps'",
    "output: m\nclaims: {m: {nodes: a1.h0, reads: {q: p}}, p: {nodes: a1.h1}}": "input 'q' of claim 'm' reads 'p', which is not upstream of it",
    "output: m\nclaims: {m: {nodes: [a1.h0, a2.h0], reads: {q: p}}, p: {nodes: a1.h1}}": "reads 'p', which is not upstream",
    "output: m\nclaims: {m: {nodes: a1.h0, reads: {q: m}}}": "reads 'm', which is not upstream",
    "output: m\nuniverse: heads+mlps\nclaims: {m: {nodes: m1, reads: p}, p: {nodes: [m0, m1]}}": "reads 'p', which is not upstream",
    "output: m\nuniverse: heads+mlps\nclaims: {m: {nodes: a1.h0, reads: {v: p}}, p: {nodes: m1}}": "reads 'p', which is not upstream",
    "output: m\nclaims: {m: {nodes: a1.h0, reads: {q: p}}, p: {nodes: a0.h0, positions: S2}}": "'q' of .* reads 'p' at S2, but is itself at END",
    "output: m\nuniverse: heads+mlps\nclaims: {m: {nodes: m1, reads: p}, p: {nodes: a0.h0, positions: S2}}": "'in' of .* at S2, but is itself at END",
    "output: m\nclaims: {m: {nodes: a1.h0, reads: {k: [p, r]}}, p: {nodes: rest}, r: {nodes: rest}}": "'k' of .* reads two claims about 'rest'",
    "output: [p, r]\nclaims: {p: {nodes: rest}, r: {nodes: rest}}": "the output reads two claims about 'rest': there is one rest",
    "output: m\nclaims: {m: {nodes: a0.h0, positions: S2}}": "the logits read 'm' at S2, but they are at END",
    "output: [m, m]\nclaims: {m: {nodes: a0.h0}}": "the output reads a0.h0 from 'm' and again from 'm': make it one claim, or claims about parts",
    "output: [m, p]\nclaims: {m: {nodes: [a0.h0, a0.h1]}, p: {nodes: [a0.h1], positions: all}}": "reads a0.h1 from 'm' and again from 'p'",
    "output: [m, p]\nclaims: {m: {nodes: a0.h0}, p: {nodes: a0.h0, feature: x, part: fitted}}": "reads a0.h0 from 'm' and again from 'p'",
    "output: m\nclaims: {m: {nodes: a1.h0, reads: {k: [p, p]}}, p: {nodes: a0.h0, feature: x, part: fitted}}": "a0.h0 from 'p' and again from",
}


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_meant(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(HypothesisError, match=f"^{file}: .*{BAD[text]}") as e: load_hypothesis(file)
    assert isinstance(e.value, InputError) and "\n" not in str(e.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(HypothesisError, match="^nowhere.yaml: no such file, and no packaged hypothesis"): load_hypothesis("nowhere.yaml")
    with pytest.raises(HypothesisError, match=f"^{tmp_path}: cannot be read"): load_hypothesis(tmp_path)
    (tmp_path / "twice.json").write_text('{"output": "m", "claims": {"m": {"nodes": "m0"}, "m": {"nodes": "m1"}}}')
    with pytest.raises(HypothesisError, match="twice.json: cannot be read as YAML or JSON \\('m' is given twice\\)"):
        load_hypothesis(tmp_path / "twice.json")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(HypothesisError, match="latin.yaml: cannot be read as YAML or JSON"): load_hypothesis(tmp_path / "latin.yaml")


def test_two_claims_of_one_name():
    with pytest.raises(HypothesisError, match="hypothesis 'h' has two claims of one name: m"):
        Hypothesis((Claim("m", ("a0.h0",)), Claim("m", ("a0.h1",))), ("m",), "h")
    with pytest.raises(HypothesisError, match="hypothesis 'example' has no claim 'x': there is mover, middle, previous, early, quiet, rest"):
        EXAMPLE.claim("x")


@pytest.mark.parametrize("text", [
    "output: m\nuniverse: heads+mlps\nclaims: {m: {nodes: m1, reads: p}, p: {nodes: a1.h0}}",  # its layer's heads are before an MLP
    "output: m\nclaims: {m: {nodes: a1.h0, reads: {kv: p}}, p: {nodes: a0.h0, positions: S2}}",  # keys and values come from anywhere
    "output: m\nclaims: {m: {nodes: a1.h0, positions: all, reads: {q: p}}, p: {nodes: a0.h0, positions: S2}}",
    "output: m\nclaims: {m: {nodes: a1.h0, reads: {q: r}}, r: {nodes: rest, positions: S2}}",
    "output: m\nclaims: {m: {nodes: a1.h0, reads: {k: [p, r]}}, p: {nodes: a0.h0, positions: S2}, r: {nodes: a0.h0}}",  # two places
    "output: [m, p]\nclaims: {m: {nodes: a0.h0, feature: x, part: subspace 1}, p: {nodes: a0.h0, feature: y, part: fitted}}",
])
def test_what_can_be_meant(text): hypothesis_from_dict(yaml.safe_load(text))
