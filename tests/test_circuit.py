"""Circuits: what they claim, what they refuse, and that files give back what was written."""

import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_generalization import circuit as module
from circuit_generalization.circuit import (
    FORMAT,
    Circuit,
    CircuitError,
    Component,
    Node,
    check_fits,
    circuit_from_dict,
    circuit_to_dict,
    load_circuit,
    packaged_circuits,
    role_components,
    save_circuit,
    without,
    write_text_atomically,
)
from circuit_generalization.errors import InputError

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "circuits"

component = st.builds(Component, st.integers(0, 40), st.none() | st.integers(0, 40))
text = st.text(min_size=1, max_size=8)
roles_of = st.lists(text, max_size=3).map(tuple)
claims = st.tuples(component, st.none() | text, st.none() | st.lists(text, min_size=1, max_size=3).map(tuple), roles_of)
ends = component.map(str)
edges = st.one_of(st.builds("{}->{}".format, ends | st.just("input"), ends | st.just("logits")),
                  st.builds("{}->a{}.h{}<{}>".format, ends, st.integers(0, 40), st.integers(0, 40), st.sampled_from("qkv")))


@st.composite
def circuits(draw):
    "Any circuit, with MLPs or without; its nodes in any order."
    nodes = tuple(Node(*claim) for claim in draw(st.lists(claims, max_size=8, unique_by=lambda claim: claim[0])))
    return Circuit(nodes, "heads+mlps" if any(n.component.head is None for n in nodes) else draw(st.sampled_from(module.UNIVERSES)),
                   draw(text), draw(st.none() | text), draw(st.none() | text),
                   draw(st.none() | st.lists(edges, max_size=4, unique=True).map(tuple)),
                   draw(st.dictionaries(text, text | st.integers(), max_size=3)))


@pytest.fixture
def toy():
    return Circuit.from_components(["a1.h0", "a0.h1", "a1.h1", "m1"], roles=["name mover", "duplicate token", "name mover", None],
                                   positions=["END", ["S2", "S1"], None, "END"], attends_to={"a1.h0": "IO"}, name="toy",
                                   task="ioi", model="tiny", edges=["input->a0.h1<k>", "m1->logits"], provenance={"kind": "made up"})


def complaint(change, entry="a0.h2", **top):
    "What is said about a file with one node changed, or one key of the file."
    nodes = {"input": {"in_graph": True}, "a1.h1": {"in_graph": True}} | ({} if change is None else {entry: change})
    with pytest.raises(CircuitError) as caught: circuit_from_dict({"nodes": nodes} | top, "folder/bad.json")
    return str(caught.value)


# Components and nodes

@given(component)
def test_component_names_round_trip(c):
    assert Component.parse(str(c)) == c


@pytest.mark.parametrize("name", ["a9h6", "a9.h", "A9.h6", "a-1.h0", "m", "m1.h1", " a1.h1", "a1.h1\n", "logits", "", 7, None,
                                  "m" + "9" * 5000, "a١.h١"])
def test_other_names_are_refused(name):
    with pytest.raises(CircuitError, match="is not a component: write a head as 'a9.h6' and an MLP as 'm3'"): Component.parse(name)


def test_errors_are_input_errors():
    assert issubclass(CircuitError, InputError)


# What a circuit claims

def test_toy_is_what_was_said(toy):
    assert toy.components == ("a0.h1", "a1.h0", "a1.h1", "m1") and len(toy) == 4
    assert [n.positions for n in toy.nodes] == [("S2", "S1"), ("END",), None, ("END",)]
    assert [n.attends_to for n in toy.nodes] == [(), ("IO",), (), ()]
    assert toy.roles == ("duplicate token", "name mover") and toy.universe == "heads+mlps"


@given(circuits(), st.randoms(use_true_random=False))
def test_the_order_of_nodes_is_no_claim(circuit, random):
    shuffled = list(circuit.nodes)
    random.shuffle(shuffled)
    other = module.replace(circuit, nodes=tuple(shuffled), name="another", task="other", model="other", provenance={"by": "me"})
    assert other.hash == circuit.hash and other.nodes == circuit.nodes


@pytest.mark.parametrize("change", [
    dict(roles=["name mover", "induction"]), dict(positions=["END", "S1"]), dict(positions=["END", None]), dict(attends_to=["IO", "S2"]),
    dict(universe="heads+mlps"), dict(edges=["a0.h1->a1.h0<q>"]), dict(components=["a1.h0", "a0.h2"])])
def test_the_hash_is_of_the_claim(change):
    plain = dict(components=["a1.h0", "a0.h1"], roles=["name mover", "duplicate token"], positions=["END", "S2"], attends_to=["IO", "S1"])
    assert Circuit.from_components(**plain | change).hash != Circuit.from_components(**plain).hash == Circuit.from_components(**plain).hash


def test_circuits_are_values(toy):
    with pytest.raises(AttributeError): toy.name = "other"
    assert {toy: 1}[circuit_from_dict(circuit_to_dict(toy))] == 1


@pytest.mark.parametrize("build, message", [
    (lambda: Circuit.from_components(["a1.h1", "a1.h1"]), "lists a1.h1 more than once"),
    (lambda: Circuit.from_components(["a1.h1", "a01.h1"]), "lists a1.h1 more than once"),
    (lambda: Circuit.from_components(["a1.h1", "m1", "m0"], universe="heads"), "lists m0, m1|lists m1, m0"),
    (lambda: Circuit.from_components(["a1.h1"], universe="mlps"), "universe 'mlps' is not one of"),
    (lambda: Circuit.from_components(["a1.h1"], roles=["a", "b"]), r"roles must be one per component \(1\)"),
    (lambda: Circuit.from_components(["a1.h1", "a2.h1"], positions="S2"), r"positions must be one per component \(2\)"),
    (lambda: Circuit.from_components(["a1.h1"], attends_to={"a3.h1": "S2"}), "attends_to are given for a3.h1"),
    (lambda: Circuit.from_components(["a1.h1"], positions=[7]), "position of a1.h1 should be role positions such as 'END', not 7"),
    (lambda: Circuit.from_components(["a1.h1"], positions=[[]]), "a1.h1 is listed at no position"),
    (lambda: Circuit.from_components(["a1.h1"], attends_to=[["S1", None]]), "attends_to of a1.h1"),
    (lambda: Circuit.from_components(["a1.h1"], edges=["a0.h1-a1.h1"]), "'a0.h1-a1.h1' is not an edge"),
])
def test_nonsense_is_refused_when_it_is_built(build, message):
    with pytest.raises(CircuitError, match=message): build()


# Parts

def test_without(toy):
    assert without(toy, ["a1.h0", "m1"]).components == ("a0.h1", "a1.h1") and len(toy) == 4
    assert without(toy, []).nodes == toy.nodes and len(without(toy, toy.components)) == 0
    assert without(toy, ["a1.h0"]).edges is None, "edges of what is left are not known"
    assert without(toy, ["a1.h0"]).universe == without(toy, ["m1"]).universe == "heads+mlps", "the universe stays"
    with pytest.raises(CircuitError, match="'toy' has no a0.h0, a3.h3"): without(toy, ["a3.h3", "a0.h0", "a1.h0"])


def test_role_components(toy):
    assert role_components(toy, "name mover") == ("a1.h0", "a1.h1") and role_components(toy, "duplicate token") == ("a0.h1",)
    with pytest.raises(CircuitError, match="has no role 'induction': it has duplicate token, name mover"): role_components(toy, "induction")
    with pytest.raises(CircuitError, match="it has none"): role_components(Circuit.from_components(["a0.h0"]), "induction")


def test_check_fits(toy):
    check_fits(toy, n_layers=2, n_heads=2)
    with pytest.raises(CircuitError, match=r"names a1.h0, a1.h1, m1, but the model has 1 layers of 2 heads.*\(tiny\)\?"): check_fits(toy, 1, 2)
    with pytest.raises(CircuitError, match="names a0.h1, a1.h1, but the model has 2 layers of 1 heads"): check_fits(toy, 2, 1)
    check_fits(without(toy, toy.components), 0, 0)


# Files

@given(circuits())
def test_json_round_trip(circuit):
    read = circuit_from_dict(json.loads(json.dumps(circuit_to_dict(circuit))))
    assert read == circuit and read.hash == circuit.hash and read.provenance == circuit.provenance


@given(circuits())
def test_what_is_written_is_an_eap_ig_graph(circuit):
    data = circuit_to_dict(circuit, dict(n_layers=41, n_heads=41, d_model=8, parallel_attn_mlp=False))
    assert {"cfg", "nodes", "edges"} <= set(data) and set(data["cfg"]) == {"n_layers", "n_heads", "d_model", "parallel_attn_mlp"}
    assert all(entry["in_graph"] is True for entry in (data["nodes"] | data["edges"]).values()) and list(data["nodes"]) == list(circuit.components)


def test_file_round_trip(toy, tmp_path):
    save_circuit(toy, tmp_path / "deep" / "toy.json", {"n_layers": 2})
    read = load_circuit(tmp_path / "deep" / "toy.json")
    assert read == toy and read.provenance == {"kind": "made up"} and json.loads((tmp_path / "deep" / "toy.json").read_text())["format"] == FORMAT


def test_plain_eap_ig_file():
    plain = {"cfg": {"n_layers": 2, "n_heads": 2},
             "nodes": {"input": {"in_graph": True}, "logits": {"in_graph": True}, "a0.h0": {"in_graph": False},
                       "a1.h1": {"in_graph": True}, "m0": {"in_graph": True}, "m1": {"in_graph": False}},
             "edges": {"input->a1.h1<q>": {"in_graph": True, "score": 0.5}, "m0->logits": {"in_graph": False, "score": 9}}}
    read = circuit_from_dict(plain, "folder/graph.json")
    assert read.components == ("m0", "a1.h1") or read.components == ("a1.h1", "m0")
    assert (read.name, read.universe, read.edges, read.roles, read.task) == ("graph", "heads+mlps", ("input->a1.h1<q>",), (), None)
    assert all(n.positions is None and n.attends_to == () for n in read.nodes)
    plain["nodes"]["m0"]["in_graph"] = False
    assert circuit_from_dict(plain).universe == "heads"


@pytest.mark.parametrize("change, names", [
    (7, ["node 'a0.h2'", "not 7"]), ({"role": 3}, ["role of a0.h2", "not 3"]), ({"role": ["x"]}, ["role of a0.h2"]),
    ({"position": 7}, ["position of a0.h2", "'END'", "not 7"]), ({"position": ["END", 7]}, ["position of a0.h2"]),
    ({"position": ""}, ["position of a0.h2"]),
    ({"position": {"END": 1}}, ["position of a0.h2"]), ({"position": False}, ["position of a0.h2"]),
    ({"position": []}, ["a0.h2 is listed at no position"]),
    ({"attends_to": 7.5}, ["attends_to of a0.h2", "not 7.5"]), ({"attends_to": [None]}, ["attends_to of a0.h2"]),
    ({"in_graph": "no"}, ["in_graph of a0.h2", "'no'"]), ({"in_graph": None}, ["in_graph of a0.h2"])])
def test_bad_node_is_named(change, names):
    message = complaint(change)
    assert message.startswith("folder/bad.json: ") and message.count("folder/bad.json") == 1 and "\n" not in message
    assert all(n in message for n in names)


@pytest.mark.parametrize("top, names", [
    (dict(universe="everything"), ["universe 'everything'", "heads+mlps"]), (dict(universe=["heads"]), ["'universe' should be text"]),
    (dict(name=7), ["'name' should be text, not 7"]), (dict(task=[]), ["'task'"]), (dict(model={}), ["'model'"]),
    (dict(edges=["a0.h1->m1"]), ["'edges'"]),
    (dict(edges=5), ["'edges'"]), (dict(edges={"a0.h1": True}), ["'a0.h1' is not an edge"]),
    (dict(edges={"a0.h1->m1": {"in_graph": 1}}), ["in_graph of a0.h1->m1"]),
    (dict(provenance="a paper"), ["'provenance' should hold an object"]),
    (dict(format="circuit-generalization-2"), ["circuit-generalization-2", FORMAT])])
def test_bad_field_is_named(top, names):
    message = complaint(None, **top)
    assert message.startswith("folder/bad.json: ") and all(n in message for n in names)


def test_bad_name_and_universe_are_named():
    assert complaint({}, entry="head nine") == "folder/bad.json: 'head nine' is not a component: write a head as 'a9.h6' and an MLP as 'm3'"
    assert "lists m3, but its universe is 'heads'" in complaint({}, entry="m3", universe="heads")
    assert "lists a1.h1 more than once" in complaint({}, entry="a01.h1")


@pytest.mark.parametrize("data", [None, [], "a9.h6", 3, {}, {"nodes": ["a9.h6"]}, {"edges": {}}])
def test_no_circuit_at_all(data):
    with pytest.raises(CircuitError, match="x.json: no 'nodes' object, so this is not a circuit"): circuit_from_dict(data, "x.json")


keys_of_a_node = st.sampled_from(["a0.h1", "role", "position", "in_graph", "x"])
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["a0.h1", "m1", "END", ""]),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys_of_a_node, inner, max_size=3), max_leaves=6)


@given(st.dictionaries(st.sampled_from(["nodes", "edges", "universe", "provenance", "name", "task", "cfg", "format"]), json_values, max_size=5))
def test_any_json_is_a_circuit_or_refused(data):
    try: read = circuit_from_dict(data, "x.json")
    except CircuitError as e: assert str(e).startswith("x.json: ")
    else: assert circuit_from_dict(circuit_to_dict(read), "x.json") == read


@pytest.mark.parametrize("content, message", [
    (b"{", "not JSON"), (b"", "not JSON"), (b"\xff\xfe{}", "not JSON"), (b"[" * 100_000, "not JSON"), (b"[]", "no 'nodes'"),
    (b'{"nodes": {"a0.h1": {"position": "S2"}, "a0.h1": {"position": "END"}}}', "'a0.h1' is there more than once")])
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(CircuitError, match=message) as caught: load_circuit(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-circuit", "", "no/such/file.json", "."])
def test_absent_files_list_what_there_is(name):
    with pytest.raises(CircuitError, match="neither a readable file nor one of") as caught: load_circuit(name)
    assert all(known in str(caught.value) for known in packaged_circuits())


def test_packaged_circuits_load():
    for name, path in packaged_circuits().items():
        circuit = load_circuit(name)
        assert circuit == load_circuit(path) and circuit.name == name and circuit.task and circuit.model and circuit.provenance
        shape = json.loads(path.read_text())["cfg"]
        check_fits(circuit, shape["n_layers"], shape["n_heads"])


# Writing

def test_writing_replaces_whole_files(tmp_path):
    write_text_atomically(tmp_path / "x.txt", "one")
    write_text_atomically(tmp_path / "x.txt", "two ä")
    assert (tmp_path / "x.txt").read_text(encoding="utf-8") == "two ä" and os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("broken", ["write", "rename"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, broken):
    def disk_full(*_): raise OSError("no space left")
    def half(self, text, encoding):
        self.write_bytes(text.encode()[:3])
        raise OSError("no space left")
    (tmp_path / "x.txt").write_text("old")
    if broken == "write": monkeypatch.setattr(Path, "write_text", half)
    else: monkeypatch.setattr(module.os, "replace", disk_full)
    with pytest.raises(OSError, match="no space"): write_text_atomically(tmp_path / "x.txt", "new and longer")
    assert (tmp_path / "x.txt").read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_what_cannot_be_json_is_not_half_written(toy, tmp_path):
    with pytest.raises(TypeError): save_circuit(module.replace(toy, provenance={"when": object()}), tmp_path / "toy.json")
    assert os.listdir(tmp_path) == []


# Published circuits

@pytest.mark.parametrize("name, n_heads, n_mlps, n_edges", [("eap-ig-ioi-canonical-gpt2", 26, 12, 963), ("mib-ioi-eap-ig-gpt2", None, None, 756)])
def test_published_files(name, n_heads, n_mlps, n_edges):
    path = PUBLISHED / f"{name}.json"
    if not path.is_file(): pytest.skip(f"{name}.json is not part of this repository")
    circuit, data = load_circuit(path), json.loads(path.read_text())
    assert set(circuit.components) == {n for n, e in data["nodes"].items() if e["in_graph"]} - {"input", "logits"}
    assert len(circuit.edges) == n_edges and circuit.universe == "heads+mlps" and circuit.name == name
    heads = [n for n in circuit.nodes if n.component.head is not None]
    assert n_heads is None or (len(heads), len(circuit) - len(heads)) == (n_heads, n_mlps)
    check_fits(circuit, 12, 12)
    with pytest.raises(CircuitError): check_fits(circuit, 4, 8)
    assert circuit_from_dict(json.loads(json.dumps(circuit_to_dict(circuit)))) == circuit
    assert n_heads is None or {"a9.h9", "a9.h6", "a10.h0", "a7.h3", "a8.h6", "a0.h1", "a5.h5"} < set(circuit.components), "Wang et al.'s heads"
    assert all(set(c) <= set(string.ascii_lowercase + string.digits + ".") for c in circuit.components)
