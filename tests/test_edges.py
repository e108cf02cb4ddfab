"""Edge-level ablation against GPT-2 written out in NumPy, every receiver's own input summed by hand, and against what edges must be."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization import edges as module
from circuit_generalization.ablation import ABLATIONS, Ablation, Replacements, capture, circuit_mask, universe_mask
from circuit_generalization.circuit import Circuit, CircuitError, load_circuit
from circuit_generalization.edges import (
    EdgeReplacements,
    capture_senders,
    check_edges,
    edge_logits_with_hooks,
    edge_passes,
    every_edge,
    head_views,
    listeners,
)
from circuit_generalization.errors import InputError
from circuit_generalization.exact_scores import causal_softmax, gelu_new, layer_norm, numpy_weights
from circuit_generalization.forward import Edit, PathEdit, path_patch_with_hooks, run_edits
from circuit_generalization.metrics import logit_difference
from circuit_generalization.models import as_bridge, component_names, final_logits, micro_gpt2, random_gpt2
from circuit_generalization.prompts import PromptSet
from circuit_generalization.tasks import make_prompts
from circuit_generalization.views import edge_logits

LAYERS, HEADS, VOCAB = 3, 2, 20
hf = random_gpt2(seed=3, n_layers=LAYERS, n_heads=HEADS, d_model=16, n_vocab=VOCAB, n_positions=12)
model, weights = as_bridge(hf), numpy_weights(hf)
CLEAN, DONOR = [[3, 1, 4, 1, 5, 9], [2, 6, 5], [3, 5, 8, 9]], [[2, 1, 4, 7, 5, 9], [7, 8, 5], [1, 15, 18, 19]]
prompts = PromptSet.from_tokens(CLEAN, DONOR, [3, 9, 1], [1, 2, 4], {"START": [0, 0, 0], "S2": [3, 1, 2]})
UNIVERSES = ("heads", "heads+mlps")
said = {u: [capture_senders(model, t, u) for t in (prompts.tokens, prompts.counterfactual)] for u in UNIVERSES}
own = final_logits(model, prompts.tokens, prompts.lengths)
everything = {u: every_edge(LAYERS, HEADS, u) for u in UNIVERSES}
universes, keeps, few = st.sampled_from(UNIVERSES), st.sampled_from(["circuit", "complement"]), settings(max_examples=20, deadline=None)


def logits_of(circuit, keep="circuit", some=slice(None)):
    "What the oracle says; the engine says the same, so whatever is asserted of one is true of both."
    clean, new = (acts[some] for acts in said[circuit.universe])
    fast, slow = (f(model, prompts[some], circuit, clean, new, keep) for f in (edge_logits, edge_logits_with_hooks))
    close(fast, slow)
    return slow


def close(a, b, atol=1e-5): np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=0, atol=atol)


# GPT-2 by hand: each receiver adds up what it is told by each sender

class ByHand:
    "The contributions of all senders to the residual stream on one prompt, each computed from its own view."

    def __init__(self, ids, universe, told=lambda sender, receiver: True, donor=None):
        self.universe, self.told, self.donor = universe, told, donor
        self.now = {"input": weights["wte.weight"][ids] + weights["wpe.weight"][: len(ids)]}
        for layer in range(LAYERS):
            for head in range(HEADS): self.now[f"a{layer}.h{head}"] = self.head(layer, head)
            self.now[f"m{layer}"] = self.think(self.view(f"m{layer}", layer, middle=True), layer)
        self.logits = layer_norm(self.view("logits", LAYERS), weights["ln_f.weight"], weights["ln_f.bias"]) @ weights["lm_head.weight"].T

    def w(self, layer, name): return weights[f"h.{layer}.{name}.weight"], weights[f"h.{layer}.{name}.bias"]

    def says(self, sender, receiver):
        if self.donor is None: return self.now[sender]
        return np.where(np.atleast_1d(self.told(sender, receiver))[:, None], self.now[sender], self.donor[sender])

    def think(self, x, layer):
        into, out = self.w(layer, "mlp.c_fc"), self.w(layer, "mlp.c_proj")
        return gelu_new(layer_norm(x, *self.w(layer, "ln_2")) @ into[0] + into[1]) @ out[0] + out[1]

    def view(self, receiver, layer, middle=False):
        "The residual stream as the receiver sees it, before a layer or (`middle`) after its heads."
        x = self.now["input"] if self.universe == "heads" else self.says("input", receiver)
        for k in range(layer + middle):
            x = x + sum(self.says(f"a{k}.h{head}", receiver) for head in range(HEADS)) + self.w(k, "attn.c_proj")[1]
            if k < layer: x = x + (self.think(x, k) if self.universe == "heads" else self.says(f"m{k}", receiver))
        return x

    def head(self, layer, head):
        (W, b), (out, _) = self.w(layer, "attn.c_attn"), self.w(layer, "attn.c_proj")
        size = len(out) // HEADS
        part = [slice(i * len(out) + head * size, i * len(out) + (head + 1) * size) for i in range(3)]
        q, k, v = (layer_norm(self.view(f"a{layer}.h{head}<{x}>", layer), *self.w(layer, "ln_1")) @ W[:, at] + b[at] for x, at in zip("qkv", part))
        return causal_softmax((q @ k.T / np.sqrt(size))[None])[0] @ v @ out[head * size:(head + 1) * size]


def by_hand(circuit, keep, i):
    "Final logits of prompt i."
    listed = {n.name: n.positions for n in circuit.nodes}

    def told(sender, receiver):
        at = np.array([listed.get(sender) is None or any(prompts.positions[r][i] == p for r in listed[sender]) for p in range(len(CLEAN[i]))])
        kept = at & bool({f"{sender}->{receiver}", f"{sender}->{receiver.split('<')[0]}"} & set(circuit.edges or ()))
        return kept if keep == "circuit" else ~kept

    return ByHand(CLEAN[i], circuit.universe, told, ByHand(DONOR[i], circuit.universe).now).logits[-1]


def test_the_hand_written_model_is_gpt2():
    for i, ids in enumerate(CLEAN):
        for universe in UNIVERSES: close(ByHand(ids, universe).logits[-1], own[i])


@st.composite
def circuits(draw, universe=None):
    "Edges of any density, some into whole heads, and nodes listed somewhere."
    universe = universe or draw(universes)
    rng, share = np.random.default_rng(draw(st.integers(0, 10**6))), draw(st.sampled_from([0.1, 0.5, 0.9]))
    chosen = [e for e in everything["heads+mlps"] if rng.random() < share] + [f"a0.h0->a{1 + rng.integers(2)}.h{rng.integers(2)}"]
    nodes = [c for c in component_names(model, universe) if rng.random() < 0.5]
    places = {c: [("END",), ("S2",), ("START", "S2")][rng.integers(3)] for c in nodes if rng.random() < 0.7}
    return Circuit.from_components(nodes, positions=places, universe=universe, edges=tuple(chosen))


@settings(max_examples=40, deadline=None)
@given(circuits(), keeps)
def test_edges_are_the_hand_written_models(circuit, keep):
    got = logits_of(circuit, keep)
    for i in range(len(CLEAN)): close(got[i], by_hand(circuit, keep, i), 1e-4)


# What must be true

@pytest.mark.parametrize("universe", UNIVERSES)
def test_every_edge_is_the_model_and_none_is_everything_ablated(universe):
    full, none = (Circuit((), universe, edges=edges) for edges in (everything[universe], None))
    new = said[universe][1]
    every = Edit(universe_mask(prompts, LAYERS, HEADS, universe), new)
    if universe == "heads": ablated = run_edits(model, prompts.tokens, prompts.lengths, [every])[0]
    else: ablated = final_logits(model, prompts.counterfactual, prompts.lengths)
    assert (own - ablated).abs().max() > 0.1
    for circuit, keep, wanted in ((full, "circuit", own), (none, "circuit", ablated), (full, "complement", ablated), (none, "complement", own)):
        close(logits_of(circuit, keep), wanted)


@few
@given(st.sampled_from(everything["heads"]), universes, st.sampled_from([None, ("S2",), ("START", "END")]))
def test_one_edge_ablated_is_path_patching(edge, universe, positions):
    sender, receiver = edge.split("->")
    circuit = Circuit.from_components([sender], positions={sender: positions} if positions else None, universe=universe, edges=(edge,))
    layer, head = int(sender[1]), int(sender[4])
    to = "logits" if receiver == "logits" else (int(receiver[1]), int(receiver[4]), receiver[6])
    at = circuit_mask(circuit, prompts, LAYERS, HEADS).heads[:, :, layer, head]
    clean, new = capture(model, prompts.tokens, "heads+mlps"), said[universe][1].z[:, :, layer, head]
    path = PathEdit((layer, head), to, new, at)
    close(logits_of(circuit, "complement"), path_patch_with_hooks(model, prompts.tokens, prompts.lengths, path, clean, universe == "heads+mlps"))


@few
@given(circuits())
def test_nodes_are_a_special_case(circuit):
    "All edges among the nodes and to the logits: the node circuit alone. All edges out of the nodes: its complement too."
    universe, nodes = circuit.universe, set(circuit.components)
    mask, whole = circuit_mask(circuit, prompts, LAYERS, HEADS), universe_mask(prompts, LAYERS, HEADS, universe)
    alone, without = run_edits(model, prompts.tokens, prompts.lengths, [Edit(m, said[universe][1]) for m in (whole & ~mask, whole & mask)])
    parts = [(e, *e.split("->")) for e in everything[universe]]
    among = [e for e, s, r in parts if s in {*nodes, "input"} and (r == "logits" or r.split("<")[0] in nodes)]
    out = [e for e, s, r in parts if s in nodes]
    close(logits_of(replace(circuit, edges=tuple(among))), alone)
    close(logits_of(replace(circuit, edges=tuple(out)), "complement"), without)
    if universe == "heads": close(logits_of(replace(circuit, edges=tuple(out))), alone)


def test_a_whole_head_is_its_three_inputs_and_other_universes_ignore_what_they_do_not_ablate():
    whole, three = (Circuit((), edges=e) for e in (("a0.h1->a2.h0",), tuple(f"a0.h1->a2.h0<{x}>" for x in "qkv")))
    assert listeners(whole) == listeners(three) == {f"a2.h0<{x}>": {"a0.h1"} for x in "qkv"}
    more = replace(whole, edges=(*whole.edges, "input->logits", "m0->a1.h1", "a0.h0->m1", "m2->logits", "input->a1.h0<q>"))
    assert listeners(more) == listeners(whole) and len(listeners(replace(more, universe="heads+mlps"))) == 3 + 1 + 3 + 1 + 1


@few
@given(circuits(), keeps, st.permutations(range(3)), st.integers(1, 4))
def test_order_batches_and_padding_change_nothing(circuit, keep, order, extra):
    whole = logits_of(circuit, keep)
    close(logits_of(circuit, keep, list(order)), whole[list(order)])
    close(logits_of(circuit, keep, [order[0]])[0], whole[order[0]])
    def widen(x): return torch.nn.functional.pad(x, (0, extra), value=7)
    wide = replace(prompts, tokens=widen(prompts.tokens), counterfactual=widen(prompts.counterfactual))
    clean, new = (capture_senders(model, t, circuit.universe) for t in (wide.tokens, wide.counterfactual))
    for engine in (edge_logits, edge_logits_with_hooks): close(engine(model, wide, circuit, clean, new, keep), whole)


def test_wanted_tokens_are_columns_and_nothing_is_changed():
    circuit, wanted = Circuit((), "heads+mlps", edges=everything["heads+mlps"][::3]), torch.tensor([7, 2])
    clean, new = said["heads+mlps"]
    before = [x.clone() for acts in (clean, new) for x in (acts.z, acts.mlp)]
    for engine in (edge_logits, edge_logits_with_hooks):
        close(engine(model, prompts, circuit, clean, new, token_ids=wanted), logits_of(circuit)[:, wanted])
    assert all(torch.equal(a, b) for a, b in zip(before, [x for acts in (clean, new) for x in (acts.z, acts.mlp)]))
    assert torch.equal(final_logits(model, prompts.tokens, prompts.lengths), own)
    assert not any(hook for point in model.hook_dict.values() for hook in point.fwd_hooks), "no hook is left behind"


@few
@given(circuits(), keeps)
def test_the_cost_is_known(circuit, keep):
    calls, run = [], module.final_logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "final_logits", lambda *args, **how: calls.append(1) or run(*args, **how))
        edge_logits_with_hooks(model, prompts, circuit, *said[circuit.universe], keep)
    assert len(calls) == edge_passes(circuit, LAYERS, HEADS, keep)


def test_equal_views_are_shared():
    heard = listeners(Circuit((), edges=("a0.h0->a1.h0<k>", "a0.h0->a1.h1<v>", "a1.h0->logits", "a1.h1->a2.h0<q>")))
    assert head_views(heard, 1, 2) == {frozenset(): [(0, "q"), (0, "v"), (1, "q"), (1, "k")], frozenset(["a0.h0"]): [(0, "k"), (1, "v")]}
    assert head_views(heard, 2, 2) == {}, "nobody hears what layer 2 says"
    assert len(head_views(heard, 2, 2, "complement")) == 2
    assert edge_passes(Circuit((), edges=()), 12, 12) == 1


# By hand: one head that moves x from the token before, read through queries, keys and values of the donor

@pytest.mark.parametrize("dropped, z", [("", 3 / 4), ("q", 3 / 4), ("k", 1 / 4), ("v", -3 / 4), ("kv", -1 / 4), ("qkv", -1 / 4)])
def test_the_micro_model_by_hand(dropped, z):
    micro, pair = as_bridge(micro_gpt2()), PromptSet.from_tokens([[0, 1]], [[2, 1]], [0], [2])
    clean, new = (capture_senders(micro, t, "heads+mlps") for t in (pair.tokens, pair.counterfactual))
    edges = tuple(e for e in every_edge(1, 1) if e not in {f"input->a0.h0<{x}>" for x in dropped})
    logits = edge_logits(micro, pair, Circuit((), "heads+mlps", edges=edges), clean, new)[0]
    assert float(logits[0] - logits[2]) == pytest.approx(8 * z / np.sqrt(2 + 2 * z**2), abs=1e-5)


# Replacements for all senders

def test_the_embedding_is_one_more_sender():
    clean = said["heads+mlps"][0]
    assert clean.mlp.shape[2] == LAYERS + 1 and said["heads"][0].mlp is None
    for i, ids in enumerate(CLEAN):
        close(clean.mlp[i, : len(ids), -1], weights["wte.weight"][ids] + weights["wpe.weight"][: len(ids)])
    assert torch.equal(clean.mlp[:, :, :-1], capture(model, prompts.tokens, "heads+mlps").mlp)


@pytest.mark.parametrize("kind", ABLATIONS)
@pytest.mark.parametrize("universe", UNIVERSES)
def test_replacements_agree_with_those_of_nodes(kind, universe):
    at = {"START": [0] * 6, "S2": [3] * 6}
    pool = PromptSet.from_tokens([[i, 1 + i, 4, 2 * i, 5, 9] for i in range(6)], None, [1] * 6, [2] * 6, at)
    six = prompts[:1]
    one, two = (kind_of(model, six, Ablation(kind, 2), pool, universe, seed=4) for kind_of in (Replacements, EdgeReplacements))
    plain, all_senders = (s.draw(1 if kind in ("resample", "noise") else 0, torch.arange(1), c[:1])
                          for s, c in ((one, capture(model, prompts.tokens, universe)), (two, said[universe][0])))
    assert torch.equal(plain.z, all_senders.z) and (all_senders.mlp is None) == (universe == "heads")
    if universe == "heads": return
    stream, pooled = all_senders.mlp[0, :, -1], weights["wte.weight"][pool.tokens] + weights["wpe.weight"][:6]
    if kind != "noise": assert torch.equal(plain.mlp, all_senders.mlp[:, :, :-1])
    here = said[universe][0].mlp[0, :, -1].numpy()
    expected = dict(zero=0 * pooled[0], mean=pooled.mean(0), counterfactual=said[universe][1].mlp[0, :, -1])
    if kind in expected: close(stream, expected[kind])
    elif kind == "resample": close(stream, pooled[two.donors[1, 0]])
    else: assert np.abs((stream.numpy() - here)[pooled.std(0) > 1e-3] / pooled.std(0)[pooled.std(0) > 1e-3]).mean() == pytest.approx(0.8, abs=0.25)


# Refusals

@pytest.mark.parametrize("edge, words", [
    ("a1.h0->a0.h1<q>", "leads backwards"), ("a0.h0->a0.h1<k>", "leads backwards"), ("m0->a0.h1", "leads backwards"), ("m1->m1", "leads backwards"),
    ("a3.h0->logits", "no a3.h0"), ("a0.h0->a1.h2<v>", "no a1.h2"), ("m3->logits", "no m3"), ("input->m7", "3 layers of 2 heads")])
def test_edges_that_the_model_cannot_have_are_refused(edge, words):
    with pytest.raises(InputError, match=words) as caught: logits_of(Circuit((), "heads+mlps", edges=("a0.h0->logits", edge)))
    assert edge in str(caught.value) and "\n" not in str(caught.value)


def test_other_bad_input():
    for engine in (edge_logits, edge_logits_with_hooks):
        with pytest.raises(InputError, match="keep='alone'"): engine(model, prompts, Circuit(()), *said["heads"], "alone")
    with pytest.raises(CircuitError, match="a0.h7"): logits_of(Circuit.from_components(["a0.h7"], edges=("a0.h0->logits",)))
    shared_keys = SimpleNamespace(cfg=SimpleNamespace(n_layers=1, n_heads=4, n_key_value_heads=2))
    with pytest.raises(InputError, match="share their keys and values"): check_edges(Circuit(()), shared_keys)
    check_edges(Circuit((), "heads+mlps", edges=everything["heads+mlps"]), model)


# The edges that exist

def test_every_edge_counts_what_the_papers_count(shared):
    assert len(every_edge(12, 12)) == len(set(every_edge(12, 12))) == 32_491
    graph = json.loads(shared("circuits/mib-ioi-eap-ig-gpt2.json").read_text(encoding="utf-8"))
    assert set(graph["edges"]) == set(every_edge(12, 12))
    assert [len(every_edge(2, h, "heads")) for h in (1, 2)] == [3 + 2, 2 * 6 + 4]


# The compiled model: thirteen edges, of which each kind is needed

@pytest.fixture(scope="module")
def shares(compiled):
    "Sufficiency, by edges, of circuits of the compiled model."
    some = make_prompts("ioi", n=12, tokenizer=compiled.tokenizer)
    clean, new = (capture_senders(compiled, t) for t in (some.tokens, some.counterfactual))
    def ld(logits): return float(logit_difference(logits, some.answers, some.distractors).mean())
    def alone(circuit): return ld(edge_logits(compiled, some, circuit, clean, new))
    whole, nothing = ld(final_logits(compiled, some.tokens, some.lengths)), alone(Circuit(()))
    return lambda circuit: (alone(circuit) - nothing) / (whole - nothing)


def less(drop):
    true = load_circuit("compiled-ioi-ioi")
    return replace(true, edges=tuple(e for e in true.edges if not drop(e)))


def test_the_true_edges_do_what_the_nodes_do(shares):
    true = load_circuit("compiled-ioi-ioi")
    assert len(true.edges) == 13 and shares(true) == pytest.approx(1, abs=0.1)
    names = [*true.components, "logits"]
    among = tuple(e for e in every_edge(4, 8, "heads") if all(end.split("<")[0] in names for end in e.split("->")))
    assert shares(replace(true, edges=among)) == pytest.approx(shares(true), abs=0.05)


@pytest.mark.parametrize("what, drop, low, high", [
    ("duplicate token to S-inhibition", lambda e: e.startswith("a0"), -0.2, 0.2),
    ("S-inhibition to name mover", lambda e: e.startswith("a1"), -0.2, 0.2),
    ("name mover to logits", lambda e: e.startswith("a2") and e.endswith("logits"), -2, 0),
    ("negative mover to logits", lambda e: e.startswith("a3"), 1.3, 2),
    ("name mover to negative mover", lambda e: e.endswith("a3.h3<q>"), 1.3, 2),
    ("one spare of a pair", lambda e: "a0.h6" in e, 0.8, 1.2)])
def test_each_kind_of_edge_is_needed(shares, what, drop, low, high): assert low < shares(less(drop)) < high


def test_a_key_is_no_value(shares):
    true = load_circuit("compiled-ioi-ioi")
    assert abs(shares(replace(true, edges=tuple(e.replace("<k>", "<v>") for e in true.edges)))) < 0.2
    assert abs(shares(replace(true, edges=tuple(e.replace("<q>", "<k>") for e in true.edges)))) < 0.2
