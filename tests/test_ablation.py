"""What is replaced, where, by what: each kind of ablation computed a second way."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization import ablation as module
from circuit_generalization.ablation import (
    ABLATIONS,
    STOCHASTIC,
    Ablation,
    Activations,
    Mask,
    Remembered,
    Replacements,
    capture,
    circuit_mask,
    draw_donors,
    each,
    pool_members,
    universe_mask,
)
from circuit_generalization.circuit import Circuit, CircuitError
from circuit_generalization.errors import InputError
from circuit_generalization.models import as_bridge, micro_gpt2, random_gpt2
from circuit_generalization.prompts import PromptSet

LAYERS, HEADS, SIZE, WIDTH = 2, 2, 8, 16
hf = random_gpt2(seed=1, n_layers=LAYERS, n_heads=HEADS, d_model=WIDTH, n_vocab=30)
model = as_bridge(hf)
few = settings(max_examples=15, deadline=None)

SCORED = [[3, 1, 4, 1, 5], [3, 4, 1, 4, 5], [3, 2, 4, 2, 5], [3, 1, 1, 5]]
COUNTERFACTUAL = [[3, 1, 4, 7, 5], [3, 4, 1, 7, 5], [3, 2, 4, 7, 5], [3, 1, 7, 5]]
POOL = [[3, a, b, c, 5] for a, b, c in [(6, 7, 8), (7, 8, 9), (8, 9, 10), (10, 6, 7), (9, 10, 6), (6, 9, 7)]]
POOL += [[3, 8, 9, 5], [3, 9, 6, 5], [3, 10, 8, 5]]
CELLS = {0: range(6), 1: range(6), 2: range(6), 3: range(6, 9)}


def scored(**changes):
    given = dict(clean=SCORED, counterfactual=COUNTERFACTUAL, answers=[4, 1, 4, 1], distractors=[1, 4, 2, 2], positions={"S2": [3, 3, 3, 2]})
    return PromptSet.from_tokens(**given | changes)


def pool(clean=POOL, **changes):
    given = dict(answers=[1] * len(clean), distractors=[2] * len(clean), positions={"S2": [len(c) - 2 for c in clean]},
                 labels={"prompt_id": [f"r{i}" for i in range(len(clean))]})
    return PromptSet.from_tokens(clean, **given | changes)


prompts, reference, every = scored(), pool(), torch.arange(4)
clean = capture(model, prompts.tokens, "heads+mlps")
alone = [capture(model, torch.tensor([ids]), "heads+mlps") for ids in POOL]


def source(kind, n_draws=3, universe="heads+mlps", seed=0, prompts=prompts, reference=reference, **options):
    return Replacements(model, prompts, Ablation(kind, n_draws), reference, universe, seed, **options)


def real(acts, i, n=None):
    "Heads and MLPs of prompt i, without padding, as one list of numbers."
    n = len(SCORED[i]) if n is None else n
    return torch.cat([acts.z[i, :n].flatten(), acts.mlp[i, :n].flatten()])


def refusal(f, *args, **given):
    with pytest.raises(InputError) as caught: f(*args, **given)
    return str(caught.value)


# What components write

def test_captured_values_are_what_pytorch_hooks_see():
    seen, handles = {}, []
    for layer, block in enumerate(hf.transformer.h):
        handles.append(block.attn.c_proj.register_forward_pre_hook(lambda m, args, layer=layer: seen.update({("z", layer): args[0].detach()})))
        handles.append(block.mlp.register_forward_hook(lambda m, args, out, layer=layer: seen.update({("mlp", layer): out.detach()})))
    with torch.no_grad(): hf(prompts.tokens)
    for handle in handles: handle.remove()
    for layer in range(LAYERS):
        torch.testing.assert_close(clean.z[:, :, layer].flatten(2), seen["z", layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(clean.mlp[:, :, layer], seen["mlp", layer], atol=1e-5, rtol=1e-5)
    assert clean.z.shape == (4, 5, LAYERS, HEADS, SIZE) and clean.mlp.shape == (4, 5, LAYERS, WIDTH)


def test_heads_alone():
    heads = capture(model, prompts.tokens)
    assert heads.mlp is None and torch.equal(heads.z, clean.z) and heads[1:3].mlp is None and torch.equal(heads[1:3].z, clean.z[1:3])


def test_the_micro_model_by_hand():
    "Its first value is +1 for token 0 and -1 for token 2; a lone token attends to itself."
    acts = capture(as_bridge(micro_gpt2()), torch.tensor([[0], [2]]), "heads+mlps")
    torch.testing.assert_close(acts.z[:, 0, 0, 0], torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    torch.testing.assert_close(acts.mlp[:, 0, 0], torch.tensor([[0, 0, 1.0, -1.0]] * 2))


def test_padding_is_not_read():
    for i, ids in enumerate(SCORED):
        torch.testing.assert_close(real(capture(model, torch.tensor([ids]), "heads+mlps"), 0, len(ids)), real(clean, i), atol=1e-5, rtol=1e-5)


def test_each_applies_to_both():
    doubled = each(lambda a, b: a + b, clean, clean)
    assert torch.equal(doubled.z, 2 * clean.z) and torch.equal(doubled.mlp, 2 * clean.mlp)
    assert each(torch.neg, Activations(clean.z)).mlp is None


# Where

masks = st.integers(0, 10**6).map(lambda seed: (g := torch.Generator().manual_seed(seed)) and Mask(
    torch.rand(4, 5, LAYERS, HEADS, generator=g) < 0.5, torch.rand(4, 5, LAYERS, generator=g) < 0.5))


def same(a, b): return torch.equal(a.heads, b.heads) and torch.equal(a.mlps, b.mlps)


@few
@given(masks, masks)
def test_masks_are_an_algebra_of_sets(a, b):
    whole, heads = universe_mask(prompts, LAYERS, HEADS, "heads+mlps"), universe_mask(prompts, LAYERS, HEADS, "heads")
    assert same(a & b, b & a) and same(~~a, a) and same(a & a, a) and same(a & whole, a) and same(~(a & b)[1:], ~(a[1:] & b[1:]))
    assert not (a & ~a).heads.any() and not (a & ~a).mlps.any() and torch.equal((a & heads).heads, a.heads) and not (a & heads).mlps.any()
    assert torch.equal((a & b).heads, torch.tensor(np.logical_and(a.heads.numpy(), b.heads.numpy()))) and torch.equal((~a).mlps, a.mlps.logical_not())
    assert not whole.heads.logical_not().any() and not whole.mlps.logical_not().any()


names = st.sampled_from(["a0.h0", "a0.h1", "a1.h0", "a1.h1", "m0", "m1"])
places = st.none() | st.lists(st.sampled_from(["S2", "END"]), min_size=1, max_size=2, unique=True)


@few
@given(st.dictionaries(names, places))
def test_a_circuits_mask_is_its_pairs(listed):
    circuit = Circuit.from_components(list(listed), positions=listed)
    mask = circuit_mask(circuit, prompts, LAYERS, HEADS)
    pairs = {(int(i), int(p), name) for name, roles in listed.items() for i in every
             for p in (range(5) if roles is None else [prompts.positions[r][i] for r in roles])}
    heads = {(i, p, f"a{layer}.h{head}") for i, p, layer, head in mask.heads.nonzero().tolist()}
    assert heads | {(i, p, f"m{layer}") for i, p, layer in mask.mlps.nonzero().tolist()} == pairs


def test_masks_of_what_is_not_there():
    assert "a5.h0" in refusal(circuit_mask, Circuit.from_components(["a5.h0"]), prompts, LAYERS, HEADS)
    with pytest.raises(CircuitError): circuit_mask(Circuit.from_components(["a0.h2"]), prompts, LAYERS, HEADS)
    message = refusal(circuit_mask, Circuit.from_components(["a0.h1"], positions=["IO"]), prompts, LAYERS, HEADS)
    assert "a0.h1 is listed at IO, but the prompts have only END, S2" in message and "pos_IO" in message
    some = scored(positions={"S2": [3, 3, -1, 2]})
    message = refusal(circuit_mask, Circuit.from_components(["a0.h1"], positions=["S2"]), some, LAYERS, HEADS)
    assert "a0.h1 is listed at S2, which prompt p0002 does not have" in message


# The kinds

def test_kinds():
    assert Ablation().kind == "resample" and Ablation().n_draws >= 8
    assert all(Ablation(k, 5).n_draws == (5 if k in STOCHASTIC else 1) for k in ABLATIONS)
    assert {k for k in ABLATIONS if Ablation(k).needs_reference} == {"resample", "mean", "noise"}
    assert "no ablation 'media': there is resample, mean" in refusal(Ablation, "media") and "0 draws" in refusal(Ablation, n_draws=0)


def test_zero_is_zero():
    drawn = source("zero", reference=None).draw(0, every)
    assert drawn.z.shape == clean.z.shape and drawn.mlp.shape == clean.mlp.shape and not drawn.z.any() and not drawn.mlp.any()


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [3, 1]])
def test_counterfactual_is_the_prompts_own(index):
    drawn = source("counterfactual", reference=None).draw(0, torch.tensor(index))
    for k, i in enumerate(index):
        own = capture(model, torch.tensor([COUNTERFACTUAL[i]]), "heads+mlps")
        torch.testing.assert_close(real(drawn, k, len(SCORED[i])), real(own, 0, len(SCORED[i])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_mean_is_the_pools_mean_at_the_position(batch_size):
    index = [3, 0, 2]
    drawn = source("mean", batch_size=batch_size).draw(0, torch.tensor(index))
    for k, i in enumerate(index):
        expected = torch.stack([real(alone[j], 0, len(SCORED[i])) for j in CELLS[i]]).mean(0)
        torch.testing.assert_close(real(drawn, k, len(SCORED[i])), expected, atol=1e-5, rtol=1e-5)


def test_resample_is_one_donor_for_all_components_of_a_draw():
    s = source("resample")
    for d in range(3):
        drawn = s.draw(d, every)
        for i in range(4):
            matches = [j for j in range(len(POOL)) if len(POOL[j]) == len(SCORED[i])
                       and torch.allclose(real(drawn, i), real(alone[j], 0, len(SCORED[i])), atol=1e-5)]
            assert matches == [int(s.donors[d, i])] and matches[0] in CELLS[i], "heads and MLPs of one reference prompt of the cell"


def test_draws_have_different_donors():
    donors = source("resample").donors
    assert donors.shape == (3, 4) and all(len(set(donors[:, i].tolist())) == 3 for i in range(4))
    assert sorted(donors[:, 3].tolist()) == [6, 7, 8], "as many draws as the pool has prompts: each once"


def test_donors_are_seeded_and_belong_to_the_prompt():
    donors = source("resample", seed=5).donors
    assert torch.equal(source("resample", seed=5).donors, donors) and not torch.equal(source("resample", seed=6).donors, donors)
    assert torch.equal(source("resample", seed=5, prompts=prompts[[2, 0]]).donors, donors[:, [2, 0]])
    wider = scored(clean=[*SCORED[:3], SCORED[3] + [1, 1, 1]], counterfactual=None)
    assert torch.equal(source("resample", seed=5, prompts=wider[[0, 1, 2]]).donors, donors[:, :3]), "padding does not count"
    assert torch.equal(source("resample", n_draws=2, seed=5).donors, donors[:2]), "more draws keep the first ones"


def test_donors_are_spread_over_the_pool():
    many = PromptSet.from_tokens([[3, a, b, a, 5] for a in range(11, 29) for b in range(11, 29) if a != b], answers=[1] * 306, distractors=[2] * 306,
                                 positions={"S2": [3] * 306})
    counts = Counter(draw_donors(many, pool_members(many, reference), 1, seed=0)[0].tolist())
    assert set(counts) == set(range(6)) and min(counts.values()) > 25, "306 / 6 = 51 each, ± 6.5"


def test_noise_is_the_value_plus_the_pools_spread():
    s, strong = source("noise", 4), Replacements(model, prompts, Ablation("noise", 4, sigma=3.0), reference, "heads+mlps")
    a, b, again, loud = (x.draw(d, every, clean) for x, d in ((s, 0), (s, 1), (source("noise", 4), 0), (strong, 0)))
    for i in range(4):
        spread = torch.stack([real(alone[j], 0, len(SCORED[i])) for j in CELLS[i]]).numpy().std(axis=0)
        unit = (real(a, i) - real(clean, i)).numpy()[spread > 1e-3] / spread[spread > 1e-3]
        assert abs(unit.mean()) < 0.3 and 0.75 < unit.std() < 1.25 and abs(unit).max() < 5, "standard normal, in the pool's units"
        np.testing.assert_allclose((real(a, i) - real(clean, i)).numpy()[spread < 1e-7], 0, atol=1e-5)
        torch.testing.assert_close(real(loud, i) - real(clean, i), 3 * (real(a, i) - real(clean, i)), atol=1e-4, rtol=1e-3)
        assert torch.equal(real(a, i), real(again, i)) and not torch.allclose(real(a, i), real(b, i), atol=1e-2)
    assert not torch.allclose(source("noise", 4, seed=1).draw(0, every, clean).z, a.z, atol=1e-2)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_a_prompt_gets_the_same_in_any_batch(kind):
    s, order = source(kind), torch.tensor([2, 3, 0])
    whole, part = s.draw(0, every, clean), s.draw(0, order, clean[order])
    for k, i in enumerate(order.tolist()): torch.testing.assert_close(real(part, k, len(SCORED[i])), real(whole, i), atol=1e-5, rtol=1e-5)
    assert source(kind, universe="heads").draw(0, every, capture(model, prompts.tokens)).mlp is None
    own = scored(clean=SCORED[3:], counterfactual=COUNTERFACTUAL[3:], answers=[1], distractors=[2], positions={"S2": [2]})
    drawn = source(kind, prompts=own).draw(0, torch.tensor([0]), capture(model, own.tokens, "heads+mlps"))
    torch.testing.assert_close(real(drawn, 0, 4), real(whole, 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_nothing_is_changed_by_drawing(kind):
    before = [x.clone() for x in (prompts.tokens, prompts.counterfactual, reference.tokens, clean.z, clean.mlp)]
    state = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    source(kind).draw(0, every, clean)
    assert all(torch.equal(a, b) for a, b in zip(before, (prompts.tokens, prompts.counterfactual, reference.tokens, clean.z, clean.mlp)))
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


# Pools

def test_members_share_the_cell():
    assert [m.tolist() for m in pool_members(prompts, reference)] == [list(CELLS[i]) for i in range(4)]
    moved = pool(positions={"S2": [3, 3, 1, 3, 3, 3, 2, 2, 2]})
    assert pool_members(prompts, moved)[0].tolist() == [0, 1, 3, 4, 5], "role positions"
    for column in ("variant", "template", "order"):
        labels = {"prompt_id": [f"r{i}" for i in range(9)], column: ["x"] + [""] * 8}
        assert pool_members(prompts, pool(labels=labels))[0].tolist() == [1, 2, 3, 4, 5], column


def test_roles_that_the_reference_does_not_mark_are_not_compared():
    assert [len(m) for m in pool_members(prompts, pool(positions=None))] == [6, 6, 6, 3]


def test_a_prompt_is_never_its_own_donor():
    with_itself = pool([*POOL, SCORED[0]])
    assert [m.tolist() for m in pool_members(prompts, with_itself)] == [[*range(6)], [*range(6), 9], [*range(6), 9], [6, 7, 8]]
    own = pool_members(prompts[:3], prompts)
    assert [m.tolist() for m in own] == [[1, 2], [0, 2], [0, 1]]
    means = source("mean", prompts=prompts[:3], reference=prompts).draw(0, torch.arange(3))
    torch.testing.assert_close(real(means, 1), (real(clean, 0) + real(clean, 2)) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["resample", "mean", "noise"])
def test_an_empty_pool_names_the_prompt(kind):
    message = refusal(source, kind, reference=reference[:6])
    assert message.startswith("prompt p0003 has no other reference prompt of its variant, template, length and role positions (1 of 4 prompts")
    named = scored(labels={"prompt_id": list("wxyz"), "prompt": ["", "", "", "three one one"]})
    assert "prompt z ('three one one')" in refusal(source, kind, prompts=named, reference=reference[:6])
    assert "prompt p0000" in refusal(source, kind, prompts=prompts[:1], reference=prompts[[0, 3]]), "and its own only member is none"


def test_a_small_pool_says_how_many_draws_it_has():
    assert refusal(source, "resample", 4).startswith("prompt p0003 has 3 reference prompts, and 4 draws need as many: use --draws 3")


def test_what_an_ablation_needs():
    for kind in ("resample", "mean", "noise"): assert refusal(source, kind, reference=None).startswith(f"{kind} ablation needs reference prompts")
    message = refusal(source, "counterfactual", prompts=scored(counterfactual=None))
    assert message == "counterfactual ablation needs a counterfactual for every prompt, and these prompts have none"
    source("zero", prompts=scored(counterfactual=None), reference=None)


def test_prompts_that_the_model_cannot_read():
    assert "the longest prompt has 40 tokens; the model takes at most 32" in refusal(capture, model, torch.zeros(2, 40, dtype=torch.long))
    long = scored(clean=[[3] * 40], counterfactual=[[4] * 40], answers=[1], distractors=[2], positions=None)
    for kind in ("counterfactual", "zero"):
        assert "has 40 tokens" in refusal(source(kind, prompts=long, reference=None).draw, 0, torch.tensor([0])), kind
    assert "token ids from 3 to 30, but the model knows 0 to 29" in refusal(capture, model, torch.tensor([[3, 30]]))


# What is remembered

@pytest.fixture
def runs(monkeypatch):
    "The numbers of prompts that were run together."
    seen = []
    monkeypatch.setattr(module, "capture", lambda model, tokens, universe: seen.append(len(tokens)) or capture(model, tokens, universe))
    return seen


def test_a_donor_runs_once_for_all_prompts_and_draws(runs):
    drawn = source("resample", 3)
    for d in range(3): drawn.draw(d, torch.arange(4))
    assert runs == [len(drawn.donors.unique())] and runs[0] < drawn.donors.numel()


def test_settings_share_runs_and_their_replacements_are_the_same(runs):
    memory, every = Remembered(), torch.arange(4)
    def all_draws(**how): return [source(kind, 3, **how).draw(d, every, clean) for kind in ABLATIONS for d in (0, 0)]
    alone = all_draws()
    first, again = all_draws(memory=memory), len(runs)
    second = all_draws(memory=memory)
    assert len(runs) == again, "all was remembered"
    for a, b, c in zip(alone, first, second, strict=True): assert torch.equal(a.z, b.z) and torch.equal(b.z, c.z) and torch.equal(a.mlp, c.mlp)
    assert not torch.equal(source("resample", 3, seed=1, memory=memory).draw(0, every).z, first[0].z), "another seed, other donors"
    source("resample", 3, universe="heads", memory=memory).draw(0, every)
    assert len(runs) == again + 2, "another universe, another run"


def test_what_does_not_fit_is_run_draw_by_draw(runs):
    small = source("resample", 3, memory=Remembered(most=10))
    for d in range(3): assert torch.equal(small.draw(d, torch.arange(4)).z[:, :3], source("resample", 3).draw(d, torch.arange(4)).z[:, :3])
    assert runs.count(4) == 3 and not small.memory.kept
