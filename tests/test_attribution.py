"""Edge attribution against exact ablation of every edge, and against what gradients must add up to."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import made

from circuit_generalization import attribution
from circuit_generalization.ablation import Activations, capture
from circuit_generalization.attribution import edge_attribution
from circuit_generalization.circuit import Circuit
from circuit_generalization.edges import capture_senders, every_edge
from circuit_generalization.errors import InputError
from circuit_generalization.metrics import logit_difference
from circuit_generalization.models import final_logits
from circuit_generalization.prompts import PromptSet
from circuit_generalization.views import edge_logits

NAMES = ("gpt2", "llama", "pythia", "in_turn", "one_layer")


@pytest.fixture(scope="module")
def models(): return {name: made(name).double() for name in NAMES}


def draw(lengths=(6, 4, 5), n_vocab=97, seed=0):
    rng = np.random.default_rng(seed)
    clean, other = ([rng.integers(0, n_vocab, n).tolist() for n in lengths] for _ in range(2))
    return PromptSet.from_tokens(clean, other, [[1, 2]] * len(lengths), [3] * len(lengths))


def senders(model, prompts): return [capture_senders(model, t, "heads+mlps") for t in (prompts.tokens, prompts.counterfactual)]


def towards(clean, other, share):
    "A donor that is only a little different."
    return Activations(*(a + share * (b - a) for a, b in ((clean.z, other.z), (clean.mlp, other.mlp))))


def ld_of(logits, prompts): return logit_difference(logits, prompts.answers, prompts.distractors)


def exact(model, prompts, clean, new, edges):
    whole = ld_of(final_logits(model, prompts.tokens, prompts.lengths), prompts)
    alone = [Circuit((), "heads+mlps", edges=(e,)) for e in edges]
    return torch.stack([whole - ld_of(edge_logits(model, prompts, c, clean, new, "complement"), prompts) for c in alone], 1)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_small_changes_are_first_order(models, name, steps):
    model, prompts = models[name], draw()
    clean, other = senders(model, prompts)
    edges = every_edge(model.cfg.n_layers, model.cfg.n_heads)[::1 if name == "one_layer" else 3]
    worst = {}
    for share in (1e-2, 1e-3):  # Llama's norm computes in float32, whatever it is given
        new = towards(clean, other, share)
        found = edge_attribution(model, prompts, new, steps)
        slow = exact(model, prompts, clean, new, edges)
        worst[share] = ((torch.stack([found.of(e) for e in edges], 1) - slow).abs().max() / slow.abs().max()).item()
    assert worst[1e-3] < 5e-3 and worst[1e-3] < 0.2 * worst[1e-2], "the error is of second order"
    assert torch.allclose(found.ld, ld_of(final_logits(model, prompts.tokens, prompts.lengths), prompts))
    unheard = 4 * 3 if name == "pythia" else 0  # side by side, an MLP hears no head of its layer
    assert found.effect.count_nonzero(0).bool().sum() == len(found.edges) - unheard


@pytest.mark.parametrize("name", NAMES)
def test_with_many_steps_the_embeddings_edges_are_the_whole_difference(models, name):
    model, prompts = models[name], draw((5, 4), seed=1)
    prompts = replace(prompts, tokens=torch.where(torch.arange(5) == 1, prompts.counterfactual, prompts.tokens))  # closer to the donor
    (_, other), found = senders(model, prompts), {}
    whole, donor = (ld_of(final_logits(model, t, prompts.lengths), prompts) for t in (prompts.tokens, prompts.counterfactual))
    difference = whole - donor
    for steps in (10, 300):
        effect = edge_attribution(model, prompts, other, steps)
        found[steps] = (effect.effect[:, effect.senders.index("input")].sum(1) - difference).abs().max().item()
    assert found[300] < 0.02 * float(difference.abs().max()) and found[300] < 0.3 * found[10]


def test_prompts_do_not_depend_on_their_neighbours(models, monkeypatch):
    model, prompts = models["llama"], draw()
    _, other = senders(model, prompts)
    whole, order = edge_attribution(model, prompts, other), [2, 0, 1]
    assert torch.allclose(edge_attribution(model, prompts[order], other[order]).effect, whole.effect[order])
    monkeypatch.setattr(attribution, "_HELD", 1)
    parts = edge_attribution(model, prompts, other)
    assert torch.allclose(parts.effect, whole.effect) and torch.allclose(parts.ld, whole.ld)


def test_a_donor_that_says_the_same_has_no_effect(models):
    model, prompts = models["gpt2"], draw()
    clean, _ = senders(model, prompts)
    assert edge_attribution(model, prompts, clean).effect.abs().max() < 1e-10


def test_names_and_table(models):
    model, prompts = models["gpt2"], draw()
    _, other = senders(model, prompts)
    found = edge_attribution(model, prompts, other)
    table = found.table()
    assert set(table.edge) == set(every_edge(3, 4)) and len(table) == len(set(table.edge)) and table["size"].is_monotonic_decreasing
    row = table[table.edge == "a0.h1->a2.h3<k>"].iloc[0]
    own = found.of("a0.h1->a2.h3<k>")
    assert row.effect == pytest.approx(float(own.mean())) and row["size"] == pytest.approx(float(own.abs().mean()))
    assert row.sd == pytest.approx(float(own.std(correction=0)))
    assert torch.allclose(found.of("a0.h1->a2.h3"), sum(found.of(f"a0.h1->a2.h3<{x}>") for x in "qkv"))
    assert not found.of("a2.h0->a1.h0<q>").any(), "no edge leads backwards"
    for bad in ("a0.h1->a2.h9<k>", "a0.h9->logits", "a0.h1", "m9->logits", "a0.h1->a2.h3<z>"):
        with pytest.raises(InputError, match="has no edge"): found.of(bad)


def test_the_model_is_left_as_it_was(models):
    model, prompts = models["gpt2"], draw()
    own, (_, other) = final_logits(model, prompts.tokens, prompts.lengths), senders(model, prompts)
    found = edge_attribution(model, prompts, other)
    assert not found.effect.requires_grad and not found.ld.requires_grad and all(p.grad is None for p in model.parameters())
    assert torch.equal(final_logits(model, prompts.tokens, prompts.lengths), own)


def test_what_cannot_be_attributed_is_refused(models):
    model, prompts = models["gpt2"], draw()
    _, other = senders(model, prompts)
    with pytest.raises(InputError, match="0 steps"): edge_attribution(model, prompts, other, 0)
    for new in (capture(model, prompts.counterfactual), capture(model, prompts.counterfactual, "heads+mlps")):
        with pytest.raises(InputError, match="capture_senders"): edge_attribution(model, prompts, new)
    with pytest.raises(InputError, match="share their keys"): edge_attribution(made("grouped"), prompts, other)
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, out: out * 1.5)
    try:
        with pytest.raises(InputError, match="hooks are hung into it"): edge_attribution(model, prompts, other)
    finally: handle.remove()
