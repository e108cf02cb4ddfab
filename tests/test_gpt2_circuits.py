"""GPT-2 small's circuits as data, and the graphs of the benchmarks: tables of the papers, samples in the field's format, readers of other people."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_generalization.ablation import circuit_mask
from circuit_generalization.attribution import edge_attribution
from circuit_generalization.circuit import (
    Circuit,
    CircuitError,
    circuit_from_dict,
    circuit_of,
    load_circuit,
    packaged_circuits,
    role_components,
    source_of,
)
from circuit_generalization.cli import main
from circuit_generalization.edges import capture_senders, listeners
from circuit_generalization.models import random_gpt2
from circuit_generalization.prompts import PromptSet
from circuit_generalization.scored_graphs import (
    ScoredGraph,
    connected,
    graph_of,
    graph_to_dict,
    model_shape,
    node_scores,
    possible_edges,
    read_graph,
    save_graph,
    top_edges,
    top_nodes,
)
from circuit_generalization.tasks import TASKS, make_prompts

PROGRAM = Path(sys.executable).with_name("circuit-gen")
CANONICAL, SCORED = "circuits/eap-ig-ioi-canonical-gpt2.json", "circuits/mib-ioi-eap-ig-gpt2.json"
GPT2 = dict(n_layers=12, n_heads=12, d_model=768, parallel_attn_mlp=False)
TINY = dict(n_layers=2, n_heads=2, d_model=4, parallel_attn_mlp=False)
OURS = ("gpt2-ioi", "gpt2-ioi-naive", "gpt2-greater_than", "gpt2-induction")

# Typed from Wang et al. (2022), Figure 2 and appendix F: class, where it acts, what it reads, heads.
WANG = [("name mover", "END", "IO", "9.9 10.0 9.6"), ("negative name mover", "END", "IO", "10.7 11.10"),
        ("backup name mover", "END", "IO", "9.0 10.1 10.10 10.6"), ("backup name mover", "END", "IO S1", "10.2 11.9"),
        ("backup name mover", "END", "S1", "11.2"), ("backup name mover", "END", "S2", "9.7"),
        ("S-inhibition", "END", "S2", "7.3 7.9 8.6 8.10"), ("induction", "S2", "S1+1", "5.5 5.8 5.9 6.9"),
        ("duplicate token", "S2", "S1", "0.1 0.10 3.0"), ("previous token", "S1+1", "S1", "2.2 4.11")]
# From the code that Hanna et al. (2023) released, `attention_set_extenders`, `lower_extenders`, `mlp_set_extender`.
HANNA = {"END": "9.1 8.11 7.10 6.9 5.5 8.8 5.1 m8 m9 m10 m11", "YY": "m3 m2 m1 m0 0.5 0.3 0.1"}


def named(heads): return [f"a{h.replace('.', '.h')}" if "." in h else h for h in heads.split()]


# The catalogue

def test_the_ioi_circuit_is_the_papers_table():
    claims = {head: (role, (at,), tuple(reads.split())) for role, at, reads, heads in WANG for head in named(heads)}
    assert {n.name: (n.role, n.positions, n.attends_to) for n in load_circuit("gpt2-ioi").nodes} == claims and len(claims) == 26


def test_the_naive_circuit_is_a_part_of_it_with_the_same_claims():
    naive, whole = load_circuit("gpt2-ioi-naive"), {n.name: n for n in load_circuit("gpt2-ioi").nodes}
    assert set(naive.components) == set(named("9.6 9.9 10.0 7.3 7.9 8.6 8.10 5.5 5.9 3.0 0.10 2.2 4.11"))
    assert all(whole[n.name] == n for n in naive.nodes)


def test_the_greater_than_circuit_is_the_authors():
    circuit = load_circuit("gpt2-greater_than")
    assert {n.name: n.positions for n in circuit.nodes} == {name: (at,) for at, heads in HANNA.items() for name in named(heads)}
    assert {n.name for n in circuit.nodes if n.attends_to == ("YY",)} == {n for n in named(HANNA["END"]) if n.startswith("a")}
    assert "a6.h1" in circuit.provenance["uncertain"][0] and "a6.h1" not in circuit.components, "the other encodings are named"


def test_the_induction_core():
    circuit = load_circuit("gpt2-induction")
    assert {(n.name, n.role, n.positions, n.attends_to) for n in circuit.nodes} == {(h, "induction", ("END",), ("B1",)) for h in
                                                                                   named("5.1 5.5 6.9 7.2 7.10")}


@pytest.mark.parametrize("name", OURS)
def test_each_says_whose_claim_it_is_and_what_is_uncertain(name):
    circuit, data = load_circuit(name), json.loads(packaged_circuits()[name].read_text(encoding="utf-8"))
    assert circuit.provenance["kind"] == "published" and "arXiv 2" in source_of(circuit) and circuit.model == "gpt2"
    assert circuit.provenance["uncertain"] and all(len(text) > 60 for text in circuit.provenance["uncertain"])
    assert model_shape(data) == GPT2 and circuit.universe == ("heads+mlps" if name == "gpt2-greater_than" else "heads")


@pytest.mark.parametrize("model", ["gpt2", "openai-community/gpt2", "/some/folder/gpt2"])
def test_they_are_found_by_model_and_task(model):
    for task in ("ioi", "greater_than", "induction"): assert circuit_of(model, task).name == f"gpt2-{task}"
    with pytest.raises(CircuitError, match="no circuit comes with model .* and task 'sva'.*gpt2-ioi"): circuit_of(model, "sva")
    with pytest.raises(CircuitError, match="gpt2-medium"): circuit_of("gpt2-medium", "ioi")


@pytest.mark.parametrize("task", ["ioi", "greater_than", "induction"])
def test_prompts_have_the_positions_that_circuits_list(task, gpt2):
    circuit, prompts = circuit_of("gpt2", task), make_prompts(task, n=18, tokenizer=gpt2)
    mask = circuit_mask(circuit, prompts, 12, 12)
    heads = sum(n.component.head is not None for n in circuit.nodes)
    assert mask.heads.sum() == 18 * heads and mask.mlps.sum() == 18 * (len(circuit) - heads)
    assert all(set(n.attends_to) <= set(prompts.positions) for n in circuit.nodes)
    if TASKS[task].role_names:
        for n in circuit.nodes:
            if n.attends_to: assert TASKS[task].role_names[n.positions[0], n.attends_to[0]] == n.role, "our name for it"


def test_the_canonical_graph_has_the_same_heads_and_joins_their_classes(shared):
    "An independent reading of the same paper: edges between heads are those between the classes, through the inputs that the classes read with."
    graph, ioi = load_circuit(shared(CANONICAL)), load_circuit("gpt2-ioi")
    assert {n.name for n in graph.nodes if n.component.head is not None} == set(ioi.components)
    layer = {n.name: n.component.layer for n in ioi.nodes}
    joins = [("previous token", "induction", "kv"), ("induction", "S-inhibition", "kv"), ("duplicate token", "S-inhibition", "kv"),
             *(("S-inhibition", mover, "q") for mover in ("name mover", "negative name mover", "backup name mover"))]
    expected = {f"{a}->{b}<{x}>" for senders, readers, inputs in joins for x in inputs
                for a, b in product(role_components(ioi, senders), role_components(ioi, readers)) if layer[a] < layer[b]}
    assert {e for e in graph.edges if e.startswith("a") and "->a" in e} == expected and len(expected) == 124


# Shapes and edges

def eap_ig_edges(n_layers, n_heads, parallel):
    "All edges in the way that EAP-IG grows its graph: a layer at a time, what is in the stream so far feeds it."
    stream, edges = ["input"], []
    for layer in range(n_layers):
        heads = [f"a{layer}.h{h}" for h in range(n_heads)]
        edges += [f"{s}->{h}<{x}>" for s in stream for h in heads for x in "qkv"]
        edges += [f"{s}->m{layer}" for s in stream + ([] if parallel else heads)]
        stream += [*heads, f"m{layer}"]
    return edges + [f"{s}->logits" for s in stream]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("n_layers, n_heads", [(1, 1), (2, 3), (12, 12)])
def test_possible_edges(n_layers, n_heads, parallel):
    edges = possible_edges(dict(n_layers=n_layers, n_heads=n_heads, d_model=8, parallel_attn_mlp=parallel))
    assert len(edges) == len(set(edges)) and set(edges) == set(eap_ig_edges(n_layers, n_heads, parallel))
    if (n_layers, parallel) == (12, False): assert len(edges) == 32_491


@pytest.mark.parametrize("cfg, says", [
    (None, "no 'cfg' object"), ([], "no 'cfg' object"), ({}, "'n_layers' of cfg should be above 0, not None"),
    (TINY | {"n_heads": 0}, "'n_heads'"), (TINY | {"d_model": "4"}, "'d_model'"), (TINY | {"n_layers": True}, "'n_layers'"),
    (TINY | {"parallel_attn_mlp": "no"}, "'parallel_attn_mlp' of cfg should be true or false, not 'no'")])
def test_a_shape_that_is_none(cfg, says):
    with pytest.raises(CircuitError, match=says) as caught: model_shape({"cfg": cfg}, "folder/x.json")
    assert str(caught.value).startswith("folder/x.json: ")


def test_a_shape_need_not_say_that_it_is_not_parallel():
    assert model_shape({"cfg": {k: v for k, v in TINY.items() if k != "parallel_attn_mlp"}}) == TINY


# Scores

def write_graph(path, scores=None, changes=None):
    "A file of edges with scores; some of its keys changed."
    data = {"cfg": TINY, "nodes": {}, "edges": {e: {"score": s, "in_graph": False} for e, s in (scores or {}).items()}} | (changes or {})
    path.write_text(json.dumps(data))
    return path


def test_a_graph_by_hand(tmp_path):
    "input → a0.h0 → m1 → logits is a path; a1.h1 hears nobody, what m0 writes nobody reads."
    scores = {"input->a0.h0<k>": 0.5, "a0.h0->m1": -3.0, "m1->logits": 1.0, "a1.h1->logits": -9.0, "input->m0": 8.0, "a0.h1->a1.h0<q>": 0.1}
    graph = read_graph(write_graph(tmp_path / "hand.json", scores))
    assert graph.edges == scores and graph.nodes == {} and graph.cfg == TINY
    circuit = top_edges(graph, 5)
    assert circuit.edges == ("a0.h0->m1", "m1->logits", "input->a0.h0<k>") and circuit.components == ("a0.h0", "m1")
    assert (circuit.universe, circuit.name) == ("heads+mlps", "hand") and "top 5 edges by absolute score, 3 of them on a path" in source_of(circuit)
    assert top_edges(graph, 2, prune=False).components == ("m0", "a1.h1") and top_edges(graph, 2, prune=False).edges == ("a1.h1->logits", "input->m0")
    assert top_edges(graph, 4, absolute=False, prune=False).edges == ("input->m0", "m1->logits", "input->a0.h0<k>", "a0.h1->a1.h0<q>")
    assert node_scores(graph) == {"a0.h0": -3.0, "m1": 1.0, "a1.h1": -9.0, "a0.h1": 0.1}
    assert top_nodes(graph, 2).components == ("a0.h0", "a1.h1") and top_nodes(graph, 2, absolute=False).components == ("a0.h1", "m1")
    assert top_nodes(graph, 2).edges is None
    with pytest.raises(CircuitError, match="hand.json: of the top 2 edges none is on a path.*take more"): top_edges(graph, 2)


def test_components_with_scores_of_their_own(tmp_path):
    "Not the sums of their edges; one without a score (NaN, or none at all) is kept beside the n, as EAP-IG keeps it."
    own = {"input": {"score": 99.0}, "a0.h0": {"score": 1.0}, "a0.h1": {"score": -2.0}, "m0": {"score": 0.5}, "a1.h0": {"score": float("nan")},
           "a1.h1": {"score": 3.0}, "m1": {}}
    graph = read_graph(write_graph(tmp_path / "x.json", {"a0.h0->logits": 100.0}, {"nodes": own}))
    assert node_scores(graph) == {"a0.h0": 1.0, "a0.h1": -2.0, "m0": 0.5, "a1.h1": 3.0}
    circuit = top_nodes(graph, 2)
    assert set(circuit.components) == {"a0.h1", "a1.h1", "a1.h0", "m1"} and "and 2 without one" in source_of(circuit)
    assert set(top_nodes(read_graph(write_graph(tmp_path / "y.json", {}, {"nodes": own})), 1, absolute=False).components) == {"a1.h1", "a1.h0", "m1"}


def test_of_equals_the_first_in_the_file_is_taken(tmp_path):
    graph = read_graph(write_graph(tmp_path / "x.json", {"input->m1": 1.0, "input->m0": -1.0, "m0->logits": 1.0, "m1->logits": 2.0}))
    assert top_edges(graph, 2, prune=False).edges == ("m1->logits", "input->m1")


@pytest.mark.parametrize("changes, says", [
    (dict(edges={"a0.h0->m1": {"in_graph": True}}), "neither edges nor nodes have a 'score'"),
    (dict(edges=None), "no 'edges' object"), (dict(nodes=[]), "no 'nodes' object"), (dict(cfg=None), "no 'cfg' object"),
    (dict(edges={"a0.h0->m1": 3}), "'a0.h0->m1' should hold an object, not 3"),
    (dict(edges={"a0.h0->m1": {"score": "high"}}), "the score of a0.h0->m1 should be a number, not 'high'"),
    (dict(edges={"a0.h0->m1": {"score": True}}), "not True"), (dict(edges={"a0.h0->m1": {"score": float("nan")}}), "not nan"),
    (dict(edges={"a0.h0->m1": {"score": float("inf")}}), "not inf"),
    (dict(edges={"a1.h0->m0": {"score": 1}}), "2 layers of 2 heads has no edge 'a1.h0->m0'"),
    (dict(edges={"a0.h0->a1.h0": {"score": 1}}), "has no edge 'a0.h0->a1.h0'"),
    (dict(edges={"a0.h7->logits": {"score": 1}}), "has no edge 'a0.h7->logits'"),
    (dict(nodes={"a7.h0": {"score": 1}}), "2 layers of 2 heads has no component 'a7.h0'"),
    (dict(nodes={"head": {"score": 1}}), "no component 'head'")])
def test_graphs_that_make_no_sense_are_named(tmp_path, changes, says):
    with pytest.raises(CircuitError, match=says) as caught: read_graph(write_graph(tmp_path / "bad.json", {}, changes))
    assert "bad.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("n, says", [(0, "0 edges cannot be taken: it scores 3"), (4, "4 edges"), (-1, "-1 edges")])
def test_an_n_that_cannot_be(n, says):
    with pytest.raises(CircuitError, match=says): top_edges(ScoredGraph(TINY, {"input->m0": 1.0, "m0->m1": 2.0, "m1->logits": 0.0}), n)


def test_scores_that_are_all_the_same_choose_nothing():
    with pytest.raises(CircuitError, match="all edges have the score 0.0"): top_edges(ScoredGraph(TINY, {"input->m0": 0.0, "m0->logits": 0.0}), 1)
    with pytest.raises(CircuitError, match="all components have the score 2"): top_nodes(ScoredGraph(TINY, {}, {"m0": 2, "m1": 2}), 1)
    assert top_edges(ScoredGraph(TINY, {"input->logits": 0.0}), 1).edges == ("input->logits",), "of one there is no choice"


SMALL = possible_edges(TINY)


def on_a_path(edges):
    "By walking every path from the input."
    used, paths = set(), [["input"]]
    while paths:
        path = paths.pop()
        if path[-1] == "logits": used |= {*zip(path, path[1:])}
        paths += [[*path, end] for end in {e.split("->")[1].split("<")[0] for e in edges if e.split("->")[0] == path[-1]}]
    return [e for e in edges if (e.split("->")[0], e.split("->")[1].split("<")[0]) in used]


@given(st.lists(st.sampled_from(SMALL), unique=True, max_size=14))
def test_what_is_left_is_on_a_path_from_input_to_logits(edges):
    assert connected(edges) == on_a_path(edges)
    assert connected(connected(edges)) == connected(edges)


@given(st.dictionaries(st.sampled_from(SMALL), st.floats(-5, 5).map(lambda x: round(x, 1)), min_size=2, max_size=12), st.data())
def test_the_top_n_are_no_lower_than_the_rest(scores, data):
    n, absolute = data.draw(st.integers(1, len(scores))), data.draw(st.booleans())
    if len(set(scores.values())) == 1: return
    def size(e): return abs(scores[e]) if absolute else scores[e]
    kept = top_edges(ScoredGraph(TINY, scores), n, absolute, prune=False).edges
    assert len(kept) == n and min(map(size, kept)) >= max([size(e) for e in scores if e not in kept], default=-9)


# Our own scores

def test_a_component_counts_what_its_edges_count_together():
    "The first-order effect of a head or an MLP, by a gradient with respect to what it writes, is the sum over its outgoing edges."
    from circuit_generalization.models import as_bridge

    model = as_bridge(random_gpt2(seed=3, n_layers=2, n_heads=2, d_model=16, n_vocab=20).double())
    prompts = PromptSet.from_tokens([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], [[3, 1, 4, 7, 5], [9, 8, 6, 5, 1]], answers=[3, 9], distractors=[1, 2])
    clean, donor = (capture_senders(model, t, "heads+mlps") for t in (prompts.tokens, prompts.counterfactual))
    graph, kept = graph_of(edge_attribution(model, prompts, donor), TINY, "ours"), {}

    def watch(name):
        def hook(value, hook):
            kept[name] = value.detach().requires_grad_() if name.startswith("z0") else value
            if not name.startswith("z0"): value.retain_grad()
            return kept[name]
        return hook

    hooks = [(f"blocks.{i}.attn.hook_z", watch(f"z{i}")) for i in range(2)] + [(f"blocks.{i}.hook_mlp_out", watch(f"m{i}")) for i in range(2)]
    logits = model.run_with_hooks(prompts.tokens, fwd_hooks=hooks)[:, -1]
    (logits.gather(1, prompts.answers) - logits.gather(1, prompts.distractors)).sum().backward()
    by_hand = {f"a{i}.h{h}": ((clean.z - donor.z)[:, :, i, h] * kept[f"z{i}"].grad[:, :, h]).sum() / 2 for i in range(2) for h in range(2)}
    by_hand |= {f"m{i}": ((clean.mlp - donor.mlp)[:, :, i] * kept[f"m{i}"].grad).sum() / 2 for i in range(2)}
    ours = node_scores(graph)
    assert set(ours) == set(by_hand) and max(abs(float(x)) for x in by_hand.values()) > 1e-3
    for name, effect in by_hand.items(): assert ours[name] == pytest.approx(-float(effect), rel=1e-6, abs=1e-9), "EAP-IG's sign is a loss's"


# Writing

components = st.sampled_from([f"a{i}.h{h}" for i, h in product(range(2), range(2))] + ["m0", "m1"])


@st.composite
def circuits(draw):
    heads_only = draw(st.booleans())
    names = draw(st.lists(components.filter(lambda c: not heads_only or c.startswith("a")), unique=True, max_size=6))
    edges = draw(st.none() | st.lists(st.sampled_from(SMALL), unique=True, min_size=1, max_size=8))
    return Circuit.from_components(names, roles=[draw(st.sampled_from([None, "mover"])) for _ in names],
                                   positions=[draw(st.sampled_from([None, "END", ("S1", "S2")])) for _ in names],
                                   universe="heads" if heads_only else "heads+mlps", edges=edges, name="drawn", provenance={"kind": "drawn"})


@given(circuits())
def test_what_is_written_is_read_back_and_is_a_whole_graph(circuit):
    data = json.loads(json.dumps(graph_to_dict(circuit, TINY)))
    assert circuit_from_dict(data) == circuit and circuit_from_dict(data).provenance == {"kind": "drawn"}
    nodes, edges = data["nodes"], data["edges"]
    assert set(edges) == set(eap_ig_edges(2, 2, False)) and set(nodes) == {"input", "logits", *(f"a{i}.h{h}" for i in "01" for h in "01"), "m0", "m1"}
    assert all(type(entry["in_graph"]) is bool for entry in [*nodes.values(), *edges.values()])
    assert all(type(entry["score"]) is float for entry in edges.values())
    inside = {n for n, entry in nodes.items() if entry["in_graph"]}
    assert {"input", "logits", *circuit.components} <= inside and (circuit.universe == "heads+mlps" or {"m0", "m1"} <= inside)
    kept = {e for e, entry in edges.items() if entry["in_graph"]}
    between = {e for e in edges if {e.split("->")[0], e.split("->")[1].split("<")[0]} <= inside}
    if circuit.edges is None: assert kept == between, "a circuit of nodes keeps all that is between them"
    elif circuit.universe == "heads+mlps": assert kept == set(circuit.edges)
    else: assert kept == set(circuit.edges) | {e for e in between if e.startswith(("input", "m")) or "->m" in e}, "MLPs are never ablated"


def test_scores_of_both_kinds_are_written(tmp_path):
    graph = ScoredGraph(TINY, {"input->m0": 0.5, "m0->logits": -2.0}, {"m0": 3.0, "a1.h1": -1.0})
    save_graph(top_edges(graph, 2), tmp_path / "x.json", TINY, graph)
    read = read_graph(tmp_path / "x.json")
    assert read.nodes == graph.nodes and {e: s for e, s in read.edges.items() if s} == graph.edges and len(read.edges) == len(SMALL)


def test_an_edge_into_a_whole_head_is_written_as_three():
    circuit = Circuit.from_components(["a0.h0", "a1.h1"], edges=["a0.h0->a1.h1", "a1.h1->logits"])
    data = graph_to_dict(circuit, TINY)
    read = circuit_from_dict(data)
    assert read.edges == (*(f"a0.h0->a1.h1<{x}>" for x in "qkv"), "a1.h1->logits") and listeners(read) == listeners(circuit)


@pytest.mark.parametrize("circuit, says", [
    (Circuit.from_components(["a7.h0"]), "names a7.h0"), (Circuit.from_components(["a0.h0"], edges=["a1.h0->m0"]), "has no edge 'a1.h0->m0'"),
    (Circuit.from_components(["a0.h0"], edges=["a0.h3->logits"]), "has no edge 'a0.h3->logits'")])
def test_what_the_shape_lacks_is_not_written(circuit, says, tmp_path):
    with pytest.raises(CircuitError, match=says): save_graph(circuit, tmp_path / "x.json", TINY)
    assert list(tmp_path.iterdir()) == []


def test_in_a_parallel_model_an_mlp_hears_no_head_of_its_layer():
    circuit = Circuit.from_components(["a0.h0", "m0"], edges=["a0.h0->m0", "m0->logits"])
    with pytest.raises(CircuitError, match="has no edge 'a0.h0->m0'"): graph_to_dict(circuit, TINY | {"parallel_attn_mlp": True})
    assert "a0.h0->m0" in graph_to_dict(circuit, TINY)["edges"]


def test_implied_is_yes_or_no():
    with pytest.raises(CircuitError, match="implied of m0 should be true or false, not 'yes'"):
        circuit_from_dict({"nodes": {"m0": {"implied": "yes"}}})


@pytest.mark.parametrize("name", OURS)
def test_the_catalogue_survives_the_way_to_eap_ig_and_back(name, tmp_path):
    save_graph(load_circuit(name), tmp_path / "x.json", GPT2)
    assert load_circuit(tmp_path / "x.json") == load_circuit(name) and len(json.loads((tmp_path / "x.json").read_text())["edges"]) == 32_491


# The samples

@pytest.mark.parametrize("sample", [CANONICAL, SCORED])
def test_a_sample_is_written_as_it_was(sample, shared, tmp_path):
    theirs, graph = json.loads(shared(sample).read_text(encoding="utf-8")), read_graph(shared(sample))
    circuit = load_circuit(shared(sample))
    save_graph(circuit, tmp_path / "again.json", graph.cfg, graph)
    ours = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert ours["cfg"] == theirs["cfg"] and ours["edges"] == theirs["edges"], "each flag, each score"
    assert {n: e["in_graph"] for n, e in ours["nodes"].items()} == {n: e["in_graph"] for n, e in theirs["nodes"].items()}
    read = load_circuit(tmp_path / "again.json")
    assert read.hash == circuit.hash and read_graph(tmp_path / "again.json").edges == graph.edges


def test_the_samples_own_circuit_is_its_top_800(shared):
    "Its file does not say how its 756 edges were chosen. They are the 800 largest by absolute score, less what is on no path."
    graph, own = read_graph(shared(SCORED)), load_circuit(shared(SCORED))
    top = top_edges(graph, 800)
    assert set(top.edges) == set(own.edges) and top.components == own.components and len(top.edges) == 756
    assert len(top_edges(graph, 963).edges) == 904 and len(top_edges(graph, 963, prune=False).edges) == 963
    assert [len(top_edges(graph, n).edges) for n in (799, 801)] == [755, 757]


def test_the_sign_of_the_sample_is_a_losss(shared):
    graph = read_graph(shared(SCORED))
    assert graph.edges["a9.h9->logits"] == min(graph.edges.values()), "the name mover that helps most has the lowest score"
    first = top_edges(graph, 2, absolute=False, prune=False)
    assert set(first.components) == {"a10.h7", "a11.h10"} == set(role_components(load_circuit("gpt2-ioi"), "negative name mover"))
    assert top_edges(graph, 1, prune=False).edges == ("a9.h9->logits",)


def test_the_samples_components(shared):
    "Scores of components are sums here. Of the top twenty, every head is one of Wang et al.'s 26 (of 144)."
    top = top_nodes(read_graph(shared(SCORED)), 20)
    heads = {n.name for n in top.nodes if n.component.head is not None}
    assert len(top) == 20 and len(heads) == 17 and heads < set(load_circuit("gpt2-ioi").components)


def test_the_canonical_graph_has_no_scores_to_choose_by(shared):
    with pytest.raises(CircuitError, match="all edges have the score 0.0"): top_edges(read_graph(shared(CANONICAL)), 963)


# The command

@pytest.fixture
def refused(tmp_path, capfd):
    "Run the command, which must fail; what it says in its one line."
    def run(*argv):
        assert main(["circuits", *map(str, argv)]) == 2
        said = capfd.readouterr()
        assert said.out == "" and said.err.startswith("circuit-gen: ") and said.err.count("\n") == 1 and not (tmp_path / "out.json").exists()
        return said.err

    return run


def test_the_list_names_every_circuit_and_its_source():
    done = subprocess.run([PROGRAM, "circuits"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == ""
    for name in packaged_circuits(): assert sum(line.startswith(f"{name} ") for line in lines) == 1
    for number in ("2211.00593", "2305.00586", "2209.11895"): assert number in done.stdout
    assert "discovered" in next(line for line in lines if line.startswith("organism-a-ioi "))


def test_the_top_of_a_graph_is_written(shared, tmp_path, capsys):
    out, command = tmp_path / "new" / "mine.json", ["circuits", "--from", str(shared(SCORED))]
    assert main([*command, "--top-edges", "800", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "79 components, 756 edges." in printed and "top 800 edges by absolute score, 756 of them on a path" in printed
    assert f"Wrote {out}." in printed
    assert load_circuit(out).edges == top_edges(read_graph(shared(SCORED)), 800).edges and json.loads(out.read_text())["cfg"] == GPT2
    assert main([*command, "--top-edges", "800", "--signed", "--no-prune", "--eap-ig", "--out", str(out)]) == 0
    signed = load_circuit(out)
    assert len(signed.edges) == 800 and "signed" in source_of(signed) and read_graph(out).edges == read_graph(shared(SCORED)).edges
    assert main([*command, "--top-nodes", "7", "--out", str(out)]) == 0 and len(load_circuit(out)) == 7
    assert main([*command, "--top-nodes", "7", "--signed", "--out", str(out)]) == 0
    assert load_circuit(out).components == top_nodes(read_graph(shared(SCORED)), 7, absolute=False).components


def test_a_packaged_circuit_is_printed_and_written_for_others(tmp_path, capsys):
    assert main(["circuits", "--from", "gpt2-ioi"]) == 0
    printed = capsys.readouterr().out
    assert "26 components, no edges. Source: Wang et al. 2022, arXiv 2211.00593." in printed and "Wrote" not in printed
    assert "negative name mover" in printed and "S1+1" in printed
    assert main(["circuits", "--from", "gpt2-ioi", "--eap-ig", "--out", str(tmp_path / "x.json")]) == 0
    assert load_circuit(tmp_path / "x.json") == load_circuit("gpt2-ioi")


@pytest.mark.parametrize("argv, says", [
    (["--top-edges", "3"], "--top-edges needs --from FILE"), (["--out", "x.json"], "--out needs --from FILE"),
    (["--signed"], "--signed needs --from FILE"), (["--top-nodes", "3"], "--top-nodes needs"), (["--no-prune"], "--no-prune needs"),
    (["--eap-ig"], "--eap-ig needs"),
    (["--from", "GRAPH", "--top-edges", "3", "--top-nodes", "3"], "--top-edges and --top-nodes: give one of them"),
    (["--from", "GRAPH", "--signed"], "--signed says how scores are ranked"), (["--from", "GRAPH", "--no-prune"], "--no-prune is about the edges"),
    (["--from", "GRAPH", "--top-nodes", "1", "--no-prune"], "--no-prune is about"), (["--from", "GRAPH", "--eap-ig"], "--eap-ig is about the file"),
    (["--from", "GRAPH", "--top-edges", "0"], "--top-edges: 0 is too small"),
    (["--from", "GRAPH", "--top-edges", "9"], "9 edges cannot be taken: it scores 2"),
    (["--from", "GRAPH", "--top-edges", "1", "--out", "OUT"], "of the top 1 edges none is on a path"),
    (["--from", "GRAPH", "--out", "GRAPH"], "that is an input"),
    (["--from", "gpt2-ioi", "--top-edges", "3"], "neither edges nor nodes have a 'score'"), (["--from", "nowhere.json"], "no circuit 'nowhere.json'"),
    (["--from", "SHAPELESS", "--eap-ig", "--out", "OUT"], "no 'cfg' object")])
def test_bad_options(argv, says, refused, tmp_path):
    write_graph(tmp_path / "graph.json", {"input->m0": 1.0, "m0->logits": 2.0})
    (tmp_path / "shapeless.json").write_text('{"nodes": {"a0.h0": {}}, "cfg": 5}')
    paths = dict(GRAPH=tmp_path / "graph.json", SHAPELESS=tmp_path / "shapeless.json", OUT=tmp_path / "out.json")
    assert says in refused(*(paths.get(a, a) for a in argv))


def test_a_circuit_without_a_shape_is_copied(tmp_path):
    (tmp_path / "x.json").write_text('{"nodes": {"a0.h0": {"role": "mover"}}, "cfg": 5}')
    assert main(["circuits", "--from", str(tmp_path / "x.json"), "--out", str(tmp_path / "y.json")]) == 0
    assert load_circuit(tmp_path / "y.json").nodes == load_circuit(tmp_path / "x.json").nodes
