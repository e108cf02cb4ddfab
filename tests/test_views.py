"""Views, paths and edges of the fast engine against plain hooks, on every architecture that has them; and what is not computed twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import made
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization import views
from circuit_generalization.ablation import capture
from circuit_generalization.circuit import Circuit
from circuit_generalization.cone import CleanRun
from circuit_generalization.edges import capture_senders, edge_logits_with_hooks, every_edge
from circuit_generalization.errors import InputError
from circuit_generalization.forward import PathEdit, clean_run, path_patch_with_hooks
from circuit_generalization.models import load_model
from circuit_generalization.prompts import PromptSet
from circuit_generalization.tasks import make_prompts
from circuit_generalization.views import edge_logits, path_logits, path_patch

OWN_KEYS = ("gpt2", "llama", "pythia", "in_turn", "one_layer")
families, keeps = st.sampled_from(OWN_KEYS), st.sampled_from(["circuit", "complement"])


@pytest.fixture(scope="module")
def models(): return {name: made(name) for name in (*OWN_KEYS, "grouped")}


def random_set(lengths, seed, n_vocab):
    rng = np.random.default_rng(seed)
    clean, other = ([rng.integers(0, n_vocab, n).tolist() for n in lengths] for _ in range(2))
    return PromptSet.from_tokens(clean, other, [1] * len(lengths), [2] * len(lengths), {"S2": [max(0, n - 2) for n in lengths]})


def random_paths(model, prompts, seed, n, receivers="qkv"):
    g, cfg = torch.Generator().manual_seed(seed), model.cfg
    def below(most): return int(torch.randint(0, most, (), generator=g))
    def some(): return torch.rand(prompts.tokens.shape, generator=g) < 0.5 if below(2) else None
    paths = []
    for _ in range(n):
        sender, layer = (below(cfg.n_layers), below(cfg.n_heads)), below(cfg.n_layers + 1)
        receiver = "logits" if layer == cfg.n_layers else (layer, below(cfg.n_heads), receivers[below(len(receivers))])
        paths.append(PathEdit(sender, receiver, torch.randn(*prompts.tokens.shape, cfg.d_head, generator=g), some(), some()))
    return paths


def slow_paths(model, prompts, paths, hold_mlps=False):
    clean = capture(model, prompts.tokens, "heads+mlps")
    return torch.stack([path_patch_with_hooks(model, prompts.tokens, prompts.lengths, p, clean, hold_mlps) for p in paths])


def gap(a, b): return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


# Paths

lengths = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(families, lengths, st.integers(0, 10**6), st.integers(1, 6), st.booleans())
def test_paths_of_every_architecture(models, name, lengths, seed, n, hold_mlps):
    model, prompts = models[name], random_set(lengths, seed, 97)
    paths = random_paths(model, prompts, seed, n)
    assert gap(path_patch(model, prompts.tokens, prompts.lengths, paths, hold_mlps), slow_paths(model, prompts, paths, hold_mlps)) <= 1e-5


def test_where_keys_are_shared_only_queries_are_a_heads_own(models):
    model, prompts = models["grouped"], random_set([6, 4], 0, 97)
    paths = random_paths(model, prompts, 3, 12, "q")
    assert gap(path_patch(model, prompts.tokens, prompts.lengths, paths), slow_paths(model, prompts, paths)) <= 1e-5
    for x in "kv":
        bad = replace(paths[0], sender=(0, 0), receiver=(1, 3, x))
        with pytest.raises(InputError, match="a1.h3 shares its keys and values"): path_patch(model, prompts.tokens, prompts.lengths, [bad])
        with pytest.raises(InputError, match="a1.h3 shares its keys and values"): slow_paths(model, prompts, [bad])
    with pytest.raises(InputError, match="share their keys and values"):
        edge_logits(model, prompts, Circuit((), edges=("a0.h0->a1.h0",)), *(capture(model, t) for t in (prompts.tokens, prompts.counterfactual)))


def test_paths_may_be_taken_a_part_at_a_time(models, monkeypatch):
    model, prompts = models["pythia"], random_set([6, 4, 5], 1, 97)
    paths = random_paths(model, prompts, 1, 7)
    whole = slow_paths(model, prompts, paths)
    assert gap(path_logits(CleanRun(model, prompts.tokens, prompts.lengths, budget=1), paths), whole) <= 1e-5
    monkeypatch.setattr(views, "_TOGETHER", 2)
    monkeypatch.setattr(views, "prompts_at_once", lambda model, width: 2)
    assert gap(path_patch(model, prompts.tokens, prompts.lengths, paths), whole) <= 1e-5


def test_no_paths_are_no_question(models):
    prompts = random_set([6, 4], 2, 97)
    with pytest.raises(InputError, match="no paths were given"): path_patch(models["gpt2"], prompts.tokens, prompts.lengths, [])


def test_a_shared_clean_run_is_used(models, monkeypatch):
    model, prompts = models["gpt2"], random_set([6, 4], 2, 97)
    run, paths = clean_run(model, prompts.tokens, prompts.lengths), random_paths(model, prompts, 2, 3)
    monkeypatch.setattr(views, "CleanRun", None)
    assert gap(path_patch(model, prompts.tokens, prompts.lengths, paths, clean=run), slow_paths(model, prompts, paths)) <= 1e-5


def test_a_path_to_the_logits_costs_one_row_of_the_mlps_between(models):
    model, prompts = models["gpt2"], random_set([8, 8], 0, 97)
    run, seen = CleanRun(model, prompts.tokens, prompts.lengths), []
    assert run.kept
    for i, layer in enumerate(run.layers):
        def counted(x, own=layer.mlp, i=i): return seen.append((i, x.shape[:-1].numel())) or own(x)
        layer.mlp = counted
    new = torch.randn(2, 8, 8)
    path_logits(run, [PathEdit((1, 0), "logits", new), PathEdit((1, 1), (1, 2, "q"), new)])
    assert seen == [(1, 2), (2, 2)], "two prompts, their last position, from the sender on; a head of the same layer hears nothing"
    seen.clear()
    path_logits(run, [PathEdit((0, 0), "logits", new)], hold_mlps=True)
    assert not seen


# Edges

@st.composite
def circuits(draw, n_layers, n_heads):
    universe, share = draw(st.sampled_from(["heads", "heads+mlps"])), draw(st.sampled_from([0.03, 0.3, 0.9]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    edges = [e for e in every_edge(n_layers, n_heads) if rng.random() < share]
    heads = [f"a{layer}.h{head}" for layer in range(n_layers) for head in range(n_heads) if rng.random() < 0.5]
    places = {h: [("END",), ("S2",), ("S2", "END")][rng.integers(3)] for h in heads if rng.random() < 0.7}
    return Circuit.from_components(heads, positions=places, universe=universe, edges=tuple(edges))


def both(model, prompts, circuit, keep):
    clean, new = (capture_senders(model, t, circuit.universe) for t in (prompts.tokens, prompts.counterfactual))
    return [f(model, prompts, circuit, clean, new, keep) for f in (edge_logits, edge_logits_with_hooks)]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(OWN_KEYS[:4]), lengths, circuits(3, 4), keeps)
def test_edges_of_every_architecture(models, name, lengths, circuit, keep):
    assert gap(*both(models[name], random_set(lengths, 0, 97), circuit, keep)) <= 1e-5


@pytest.mark.parametrize("name", ["organism-a", "organism-c"])
@pytest.mark.parametrize("keep", ["circuit", "complement"])
@pytest.mark.parametrize("universe", ["heads", "heads+mlps"])
def test_edges_of_shipped_models(name, keep, universe):
    model = load_model(name)
    prompts = make_prompts("ioi", n=3, tokenizer=model.tokenizer)
    circuit = Circuit((), universe, edges=every_edge(4, 8, universe)[::7])
    assert gap(*both(model, prompts, circuit, keep)) <= 1e-4


def test_prompts_may_be_taken_a_part_at_a_time(models, monkeypatch):
    prompts, seen = random_set([6, 4, 5], 3, 97), []
    for universe in ("heads", "heads+mlps"):
        circuit = Circuit((), universe, edges=every_edge(3, 4)[::5])
        whole, slow = both(models["llama"], prompts, circuit, "circuit")
        with monkeypatch.context() as patch:
            patch.setattr(views, "_HELD", 1)
            patch.setattr(views, "CleanRun", lambda model, tokens, lengths: seen.append(len(tokens)) or CleanRun(model, tokens, lengths))
            assert gap(both(models["llama"], prompts, circuit, "circuit")[0], whole) <= 1e-5
    assert seen == [1, 1, 1] * 2


def test_views_that_begin_alike_are_computed_once(models, monkeypatch):
    "Four queries hear a0.h0, and one head of layer 1 each: one view up to layer 1, four after it; then one row, for the logits."
    model, prompts = models["gpt2"], random_set([5], 0, 97)
    edges = [e for h in range(4) for e in (f"a0.h0->a2.h{h}<q>", f"a1.h{h}->a2.h{h}<q>", f"a2.h{h}->logits")]
    seen, own = [], CleanRun.write
    monkeypatch.setattr(CleanRun, "write", lambda run, block, stream, *said: seen.append(stream.shape[:-1].numel()) or own(run, block, stream, *said))
    circuit = Circuit((), "heads", edges=tuple(edges))
    clean, new = (capture_senders(model, t) for t in (prompts.tokens, prompts.counterfactual))
    seen.clear()
    edge_logits(model, prompts, circuit, clean, new)
    assert seen == [5, 5, 4 * 5, 5, 1, 5], "the views' rows, and the base's, of three layers"


# Models without a cone

def test_the_oracle_answers_where_hooks_are_hung_in(models):
    model, prompts = models["gpt2"], random_set([6, 4], 5, 97)
    paths, circuit = random_paths(model, prompts, 4, 3), Circuit((), "heads+mlps", edges=every_edge(3, 4)[::9])
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, out: out * 1.5)
    try:
        assert clean_run(model, prompts.tokens, prompts.lengths) is None
        assert torch.equal(path_patch(model, prompts.tokens, prompts.lengths, paths), slow_paths(model, prompts, paths))
        assert torch.equal(*both(model, prompts, circuit, "complement"))
        changed = path_patch(model, prompts.tokens, prompts.lengths, paths)
    finally: handle.remove()
    assert gap(path_patch(model, prompts.tokens, prompts.lengths, paths), changed) > 1e-3
