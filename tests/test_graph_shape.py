"""The shape of a graph: by hand, against all paths and all edges listed, and unmoved by sign, unit, order, batches and padding."""

from dataclasses import replace
from math import inf, nan

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from families import made
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from circuit_generalization.attribution import edge_attribution
from circuit_generalization.circuit import Circuit, load_circuit
from circuit_generalization.edges import capture_senders, stage
from circuit_generalization.errors import InputError
from circuit_generalization.graph_shape import graph_features, graph_shape
from circuit_generalization.models import final_logits, load_model
from circuit_generalization.prompts import PromptSet
from circuit_generalization.tasks import make_prompts

SENDERS, RECEIVERS = ("input", "a0.h0", "m0"), ("a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "m0", "logits")
BY_HAND = np.array([[[0, 1, -3, 2, 1], [0, 0, 0, 2, 4], [0, 0, 0, 0, -5]]], float)
TWO_LAYERS = ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")
HEARD = tuple(f"a{layer}.h{head}<{x}>" for layer in (0, 1) for x in "qkv" for head in (0, 1))
HEARD = (*HEARD[:6], "m0", *HEARD[6:], "m1", "logits")
POSSIBLE = np.array([[stage(s) < stage(r) for r in HEARD] for s in TWO_LAYERS])
graphs = arrays(np.float64, (3, len(TWO_LAYERS), len(HEARD)), elements=st.floats(-9, 9).map(lambda x: round(x, 1))).map(lambda x: x * POSSIBLE)


def draw_prompts(n=6, n_vocab=64, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 8, n)
    clean, other = ([rng.integers(0, n_vocab, k).tolist() for k in lengths] for _ in range(2))
    return PromptSet.from_tokens(clean, other, [1] * n, [2] * n)


def by_node(size):
    "Sender -> node that hears it, one prompt."
    return pd.DataFrame(size, TWO_LAYERS, [r.split("<")[0] for r in HEARD]).T.groupby(level=0).sum().T


# By hand


def test_every_feature_by_hand():
    found = graph_features(BY_HAND, SENDERS, RECEIVERS, Circuit.from_components(["a0.h0", "m0"]), cover=0.5)
    expected = dict(n_edges=2, density=2 / 8, share_of_nodes=1, effective_edges=18**2 / 60, mean_path_length=0.1 + 0.4 * 2 + 0.5 * 2.5,
                    longest_path=1, depth=11 / 18, logits_from_heads=0.4, logits_from_mlps=0.5, logits_from_input=0.1, share_in_circuit=1)
    assert found.iloc[0].to_dict() == pytest.approx(expected) and [*found] == [*expected]
    assert isinstance(found.index, pd.RangeIndex) and set(map(str, found.dtypes)) == {"float64"}


@pytest.mark.parametrize(("cover", "n_edges", "nodes", "longest"), [(0.1, 1, 0.5, 1), (0.6, 3, 1, 2), (0.8, 5, 1, 3), (0.9, 7, 1, 3), (1, 7, 1, 3)])
def test_the_largest_edges_by_hand(cover, n_edges, nodes, longest):
    found = graph_features(BY_HAND, SENDERS, RECEIVERS, cover=cover).iloc[0]
    assert (found.n_edges, found.share_of_nodes, found.longest_path) == (n_edges, nodes, longest) and "share_in_circuit" not in found


def test_depth_runs_from_the_embedding_to_the_last_layer():
    for sender, depth in (("input", 0), ("a0.h1", 0.5), ("m0", 0.5), ("m1", 1)):
        effect = np.zeros((1, len(TWO_LAYERS), len(HEARD)))
        effect[0, TWO_LAYERS.index(sender), -1] = -2
        found = graph_features(effect, TWO_LAYERS, HEARD).iloc[0]
        assert found.depth == depth and found.n_edges == found.effective_edges == found.longest_path == 1
        assert found.mean_path_length == 1 if sender == "input" else np.isnan(found.mean_path_length), "no way leads back to the input"
        assert found.share_of_nodes == (0 if sender == "input" else 1 / 6)


def test_edges_of_one_size_come_together():
    effect = np.zeros((2, len(TWO_LAYERS), len(HEARD)))
    effect[0, 1:4, -1] = 3, 3 * (1 + 1e-6), 3
    effect[1, 1:4, -1] = 3, 3.01, 3
    assert graph_features(effect, TWO_LAYERS, HEARD, cover=0.3).n_edges.tolist() == [3, 1]


def test_side_by_side_an_mlp_hears_no_head_of_its_layer():
    effect = BY_HAND.copy()
    with pytest.raises(InputError, match="leads backwards"): graph_features(effect, SENDERS, RECEIVERS, parallel=True)
    effect[0, 1, 3] = 0
    assert graph_features(effect, SENDERS, RECEIVERS, parallel=True, cover=1).density[0] == 6 / 7
    assert graph_features(effect, SENDERS, RECEIVERS, cover=1).density[0] == 6 / 8


@pytest.mark.parametrize(("circuit", "share"), [
    (Circuit.from_components(["a0.h0"]), 10 / 10),  # MLPs are never ablated: only edges of the head count
    (Circuit(()), 0 / 10),
    (Circuit.from_components(["a0.h0"], universe="heads+mlps"), 8 / 17),
    (Circuit.from_components(["m0"]), 7 / 17),
    (Circuit((), universe="heads+mlps"), 0 / 17)])
def test_the_share_in_the_circuit_by_hand(circuit, share):
    assert graph_features(BY_HAND, SENDERS, RECEIVERS, circuit).share_in_circuit[0] == pytest.approx(share)


def test_where_no_edge_has_an_effect_there_is_no_graph():
    found = graph_features(np.concatenate([BY_HAND, 0 * BY_HAND, 2 * BY_HAND]), SENDERS, RECEIVERS, Circuit(()))
    assert found.isna().all(axis=1).tolist() == [False, True, False] and found.iloc[0].equals(found.iloc[2])
    silent = BY_HAND * (np.arange(5) < 4)
    assert graph_features(silent, SENDERS, RECEIVERS).iloc[0].filter(like="logits").isna().all()


# Against everything listed


@given(graphs, st.sampled_from([0.3, 0.9, 1.0]))
def test_a_graph_is_its_literal_version(effect, cover):
    sizes = np.abs(effect[0])
    assume(sizes.any())
    found = graph_features(effect, TWO_LAYERS, HEARD, cover=cover).iloc[0]
    ranked = sorted(((w, s, r) for s, row in zip(TWO_LAYERS, sizes) for r, w in zip(HEARD, row) if w > 0), reverse=True)
    n = next(k for k in range(1, len(ranked) + 1) if sum(w for w, *_ in ranked[:k]) >= cover * sizes.sum() - 1e-9)
    edges = [(s, r.split("<")[0]) for w, s, r in ranked if w >= ranked[n - 1][0]]
    graph = nx.DiGraph(edges)
    assert found.n_edges == len(edges) and found.share_of_nodes == pytest.approx(len({*graph} - {"input", "logits"}) / 6)
    ends = nx.ancestors(graph, "logits") | {"logits"} if "logits" in graph else {}
    assert found.longest_path == nx.dag_longest_path_length(graph.subgraph(ends), weight=None)


@settings(max_examples=50)
@given(graphs)
def test_mean_path_length_is_that_of_all_paths(effect):
    weight = by_node(np.abs(effect[0]))
    assume(weight["logits"].any())
    share = (weight / weight.sum()).stack().to_dict()
    graph = nx.DiGraph([(s, r) for s in weight.index for r in weight.columns if weight.loc[s, r] > 0])
    paths = [*nx.all_simple_paths(graph, "input", "logits")] if "input" in graph else []
    p = [np.prod([share[edge] for edge in nx.utils.pairwise(path)]) for path in paths]
    found = graph_features(effect, TWO_LAYERS, HEARD).mean_path_length[0]
    if paths: assert found == pytest.approx(np.average([len(path) - 1 for path in paths], weights=p))
    else: assert np.isnan(found)


@given(graphs, st.floats(0.1, 10), st.permutations(range(3)))
def test_sign_unit_and_order_change_nothing(effect, scale, order):
    circuit = Circuit.from_components(["a0.h1", "a1.h0"])
    found = graph_features(effect, TWO_LAYERS, HEARD, circuit)
    moved = graph_features(-scale * effect[order], TWO_LAYERS, HEARD, circuit)
    assert np.allclose(moved, found.iloc[order], equal_nan=True)


# From a model


@pytest.mark.parametrize("name", ["gpt2", "pythia"])
def test_a_models_graph_is_that_of_its_edges(name):
    model, prompts = made(name), draw_prompts(n_vocab=97)
    circuit = Circuit.from_components(["a0.h1", "m1", "a2.h3"])
    found = graph_shape(model, prompts, circuit, batch_size=4)
    effects = edge_attribution(model, prompts, capture_senders(model, prompts.counterfactual, "heads+mlps"))
    possible, inside = len(effects.edges) - (3 * 4 if name == "pythia" else 0), {"input", "logits", *circuit.components}
    edges = effects.table().edge
    sizes = pd.DataFrame(torch.stack([effects.of(e) for e in edges], 1).abs().double().numpy(), columns=edges)
    ends = [e.split("<")[0].split("->") for e in edges]
    total, into, claimed = sizes.sum(axis=1), sizes.filter(like="->logits"), sizes.drop(columns="input->logits")
    held = [e for e, two in zip(edges, ends) if {*two} <= inside and e != "input->logits"]
    assert np.allclose(found.effective_edges, total**2 / (sizes**2).sum(axis=1), rtol=1e-3)
    assert np.allclose(found.depth, sizes @ [(stage(sender)[0] + 1) / 3 for sender, _ in ends] / total, rtol=1e-3)
    assert np.allclose(found.logits_from_mlps, into.filter(regex="^m").sum(axis=1) / into.sum(axis=1), rtol=1e-3)
    assert np.allclose(found.share_in_circuit, claimed[held].sum(axis=1) / claimed.sum(axis=1), rtol=1e-3)
    fewest = 1 + (np.sort(-sizes.to_numpy(), 1).cumsum(1) > -0.9 * total.to_numpy()[:, None]).sum(1)
    assert found.n_edges.tolist() == fewest.tolist() and np.allclose(found.density, fewest / possible)


def test_order_batches_and_padding_change_nothing(random_model):
    prompts, order = draw_prompts(), [4, 0, 5, 2]
    before, found = final_logits(random_model, prompts.tokens, prompts.lengths), graph_shape(random_model, prompts)
    def pad(x): return torch.nn.functional.pad(x, (0, 6), value=3)
    padded = replace(prompts, tokens=pad(prompts.tokens), counterfactual=pad(prompts.counterfactual))
    assert len(found) == 6 and found.notna().all(axis=None)
    batched = graph_shape(random_model, prompts[order], batch_size=3)
    assert np.allclose(batched, found.iloc[order], rtol=1e-3) and isinstance(batched.index, pd.RangeIndex)
    assert np.allclose(graph_shape(random_model, padded), found, rtol=1e-3)
    assert torch.equal(final_logits(random_model, prompts.tokens, prompts.lengths), before)


def test_a_counterfactual_that_says_the_same_leaves_no_graph(random_model):
    prompts = draw_prompts()
    same = replace(prompts, counterfactual=torch.where(torch.arange(6)[:, None] == 2, prompts.tokens, prompts.counterfactual))
    assert graph_shape(random_model, same).isna().all(axis=1).tolist() == [i == 2 for i in range(6)]


def test_few_edges_matter_in_models_with_a_circuit(compiled):
    known = graph_shape(compiled, make_prompts("ioi", n=8, tokenizer=compiled.tokenizer), load_circuit("compiled-ioi-ioi"))
    model = load_model("organism-a")
    trained = graph_shape(model, make_prompts("ioi", n=8, tokenizer=model.tokenizer), load_circuit("organism-a-ioi"))
    assert known.n_edges.max() < trained.n_edges.min() < 100 and known.depth.min() > trained.depth.max()
    assert known.share_in_circuit.min() > 0.7 and trained.share_in_circuit.min() > 0.7
    assert (known.logits_from_input == 0).all(), "a prompt and its counterfactual end in the same token"


# What is refused

BAD = {
    "above 0 and at most 1": dict(cover=0),
    "cover 1.1": dict(cover=1.1),
    "pass finite numbers": dict(effect=BY_HAND * nan),
    "effects of shape": dict(effect=BY_HAND[0]),
    "3 senders and 5 receivers": dict(effect=BY_HAND[:, :2]),
    "go on as they speak": dict(senders=("input", "m0", "a0.h0"), effect=0 * BY_HAND),
    "begin with 'input'": dict(senders=("a0.h0", "a0.h1", "m0"), effect=0 * BY_HAND),
    "receivers end with 'logits'": dict(receivers=RECEIVERS[::-1], effect=0 * BY_HAND),
    "leads backwards": dict(effect=BY_HAND + 1),
    "names a0.h3, a2.h0, which the graph lacks": dict(circuit=Circuit.from_components(["a0.h0", "a2.h0", "a0.h3"])),
    "not a component": dict(senders=("input", "head", "m0")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_graphs(message):
    with pytest.raises(InputError, match=message): graph_features(**dict(effect=BY_HAND, senders=SENDERS, receivers=RECEIVERS) | BAD[message])


def test_infinite_effects_are_refused():
    with pytest.raises(InputError, match="finite"): graph_features(np.where(BY_HAND == 4, inf, BY_HAND), SENDERS, RECEIVERS)


def test_what_cannot_be_attributed_is_refused(random_model):
    prompts = draw_prompts()
    with pytest.raises(InputError, match="these prompts have none"): graph_shape(random_model, replace(prompts, counterfactual=None))
    with pytest.raises(InputError, match="batch size 0"): graph_shape(random_model, prompts, batch_size=0)
    with pytest.raises(InputError, match="share their keys"): graph_shape(made("grouped"), prompts)
    brackets = PromptSet.from_tokens([[0, 1, 2]] * 2, [[0, 2, 1]] * 2, [0] * 2, [1] * 2)
    with pytest.raises(InputError, match="it is not causal"): graph_shape(load_model("brackets"), brackets)
    handle = random_model.blocks[1].mlp.register_forward_hook(lambda module, args, out: out * 1.5)
    try:
        with pytest.raises(InputError, match="hooks are hung into it"): graph_shape(random_model, prompts)
    finally: handle.remove()


def test_nothing_is_changed():
    effect = BY_HAND.copy()
    graph_features(effect, SENDERS, RECEIVERS, Circuit.from_components(["a0.h0"]))
    assert (effect == BY_HAND).all()
