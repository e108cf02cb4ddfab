"""The fast engine against the oracle of plain hooks, on every architecture that it claims; and what it must not claim."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, made
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization import cone, forward
from circuit_generalization.ablation import Activations, Mask, _captured, capture
from circuit_generalization.cone import CleanRun, cone_flops, cone_logits, no_cone
from circuit_generalization.forward import Addition, Edit, clean_run, engine_of, run_edits, run_with_hooks
from circuit_generalization.models import as_bridge, final_logits, load_model
from circuit_generalization.passes import counted_passes


@pytest.fixture(scope="module")
def models(): return {name: made(name) for name in FAMILIES}


def draw(seed, model, lengths, shares, spots=None):
    "Prompts, and an edit for every share of components; with `spots`, only these positions are edited."
    g, width, cfg = torch.Generator().manual_seed(seed), max(lengths), model.cfg
    shape = (len(lengths), width, cfg.n_layers)
    tokens = torch.randint(0, cfg.d_vocab, shape[:2], generator=g)
    new = [Activations(torch.randn(*shape, cfg.n_heads, cfg.d_head, generator=g), torch.randn(*shape, cfg.d_model, generator=g)) for _ in range(2)]
    edits = []
    for i, share in enumerate(shares):
        heads, mlps = torch.rand(*shape, cfg.n_heads, generator=g) < share, torch.rand(*shape, generator=g) < share
        if spots is not None: heads[:, [p for p in range(width) if p not in spots]] = False
        added = Addition(i % cfg.n_layers, torch.randn(*shape[:2], cfg.d_model, generator=g) * (torch.rand(*shape[:2], 1, generator=g) < share))
        edits.append(Edit(Mask(heads, mlps & (i % 2 == 1) & (spots is None)), new[i % 3 == 0], added if i % 4 > 1 and spots is None else None))
    return tokens, torch.tensor(lengths), edits


def worst(model, tokens, lengths, edits, **how):
    return (cone_logits(CleanRun(model, tokens, lengths, **how), edits) - run_with_hooks(model, tokens, lengths, edits)).abs().max().item()


# The oracle agrees

@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=1, max_size=5),
       st.lists(st.sampled_from([0, 0.01, 0.1, 0.5, 1]), min_size=1, max_size=6), st.sampled_from([1, 3000, None]))
def test_the_cone_says_what_hooks_say(models, name, seed, lengths, shares, budget):
    assert worst(models[name], *draw(seed, models[name], lengths, shares), budget=budget) <= 1e-4


@pytest.mark.parametrize("name", ["organism-a", "organism-c", "compiled-ioi", "organism-patchwork-3"])
def test_the_cone_says_what_hooks_say_of_shipped_models(name):
    model = load_model(name)
    assert engine_of(model) == "cone"
    tokens, lengths, edits = draw(0, model, [12, 9, 12, 5], [0.02, 0.3, 1])
    edits = [Edit(e.mask, Activations(*(0.1 * x for x in (e.replacement.z, e.replacement.mlp)))) for e in edits]
    slow = run_with_hooks(model, tokens, lengths, edits)
    fast = cone_logits(CleanRun(model, tokens, lengths), edits)
    assert ((fast - slow).abs().max() / slow.abs().max()).item() <= 1e-4


@pytest.mark.parametrize("spots", [[0], [3], [8], [5, 8]])
def test_edits_at_single_positions(models, spots):
    for model in models.values(): assert worst(model, *draw(1, model, [9, 9, 9], [0.1, 0.5, 1], spots)) <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_what_is_added_to_the_heads_is_added_once_and_where_it_is_said(models, name, share):
    model, (tokens, lengths, edits) = models[name], draw(7, models[name], [6, 4], [share])
    values = torch.zeros(*tokens.shape, model.cfg.d_model)
    values[0, 3, 0], values[1, 5, 0] = 3.0, 3.0  # the second is padding
    own, = run_edits(model, tokens, lengths, edits)
    for layer in range(model.cfg.n_layers):
        edit = Edit(edits[0].mask, edits[0].replacement, Addition(layer, values))
        fast, slow = run_edits(model, tokens, lengths, [edit])[0], run_with_hooks(model, tokens, lengths, [edit])[0]
        assert torch.allclose(fast, slow, atol=1e-4) and torch.allclose(slow[1], own[1], atol=1e-4)
        reaches = layer < model.cfg.n_layers - 1  # position 3 is not the last: in the last layer nobody reads it any more
        if not share: assert torch.allclose(slow[0], own[0], atol=1e-4) != reaches  # with most heads replaced, perhaps nobody reads it
    last = torch.zeros_like(values)
    last[:, 3, 0] = 3.0  # the second prompt's last token
    edit = Edit(edits[0].mask, edits[0].replacement, Addition(model.cfg.n_layers - 1, last))
    assert torch.allclose(run_edits(model, tokens, lengths, [edit]), run_with_hooks(model, tokens, lengths, [edit]), atol=1e-4)
    assert not torch.allclose(run_edits(model, tokens, lengths, [edit])[0, 1], own[1], atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=1, max_size=4),
       st.lists(st.tuples(st.sampled_from([0.1, 0.5, 1]), st.sampled_from([0, 0.1, 0.7, 1, 1.5])), min_size=1, max_size=6))
def test_doses_of_the_cone_are_those_of_hooks(models, name, seed, lengths, given_doses):
    tokens, lengths, edits = draw(seed, models[name], lengths, [share for share, _ in given_doses])
    edits = [replace(e, dose=dose, adds=bool(i % 2 and seed % 2)) for i, (e, (_, dose)) in enumerate(zip(edits, given_doses))]
    assert worst(models[name], tokens, lengths, edits) <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dose_is_taken_of_what_earlier_doses_left(models, name):
    model, (tokens, lengths, edits) = models[name], draw(3, models[name], [7, 7], [1.0])
    clean, new, n_layers = capture(model, tokens), edits[0].replacement, model.cfg.n_layers
    def only(layers):
        heads = torch.zeros_like(edits[0].mask.heads)
        heads[:, :, layers] = True
        return Mask(heads, torch.zeros_like(edits[0].mask.mlps))
    def logits(mask, z, dose=1.0): return run_edits(model, tokens, lengths, [Edit(mask, Activations(z), dose=dose)])[0]
    half = torch.lerp(clean.z, new.z, 0.5)
    for layer in range(n_layers): assert torch.allclose(logits(only([layer]), new.z, 0.5), logits(only([layer]), half), atol=1e-4)
    every = list(range(n_layers))
    assert torch.allclose(logits(only(every), new.z, 0.5), logits(only(every), half), atol=1e-3) == (n_layers == 1)
    assert torch.equal(logits(only(every), new.z, 1.0), logits(only(every), new.z))
    assert torch.allclose(logits(only(every), new.z, 0.0), final_logits(model, tokens, lengths), atol=1e-4)
    added = run_edits(model, tokens, lengths, [Edit(only([0]), Activations(new.z - clean.z), dose=0.5, adds=True)])[0]
    assert torch.allclose(added, logits(only([0]), half), atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_that_are_not_moved_write_what_they_write(models, name):
    model, (tokens, lengths, _) = models[name], draw(9, models[name], [6, 4], [])
    run, wrote = clean_run(model, tokens, lengths), {}
    hooks = [(f"blocks.{i}.hook_attn_out", lambda value, hook, i=i: wrote.update({i: value})) for i in range(model.cfg.n_layers)]
    with torch.no_grad(): model.run_with_hooks(tokens, fwd_hooks=hooks)
    for layer in range(model.cfg.n_layers):
        each, core = run.moved(layer, layer), cone._core(model.blocks[layer].attn.o)
        whole = each.sum(2) + (0 if core.bias is None else core.bias)
        assert each.shape == (*tokens.shape, model.cfg.n_heads, model.cfg.d_model) and not each[1, 4:].any()
        for i, n in enumerate(lengths): assert torch.allclose(whole[i, :n], wrote[layer][i, :n], atol=1e-4)
    if model.cfg.n_layers > 1: assert not torch.allclose(run.moved(1, 0), run.moved(1, 1), atol=1e-3)


def test_passes_are_counted(models):
    model, (tokens, lengths, edits) = models["llama"], draw(8, models["llama"], [6, 4, 6], [0.2, 0.9, 0.1, 0.3])
    with counted_passes() as outer:
        with counted_passes() as inner: capture(model, tokens[:2])
        run = clean_run(model, tokens, lengths)
        assert outer.whole == inner.whole == 2 and outer.edited == 0
        run_edits(model, tokens, lengths, edits, clean=run)
        assert (outer.whole, outer.edited) == (2 + 3 + 3, 4 * 3)  # the clean run, and one with everything replaced, for the second edit
        run_edits(model, tokens, lengths, edits[:1], clean=run)
        assert (outer.whole, outer.edited, inner.edited) == (8, 5 * 3, 0)
        run_with_hooks(model, tokens, lengths, edits[:2])
        _captured(model, tokens, ("z",))
    assert (outer.whole, outer.edited) == (8 + 3, 7 * 3)
    run_edits(model, tokens, lengths, edits)
    assert outer.edited == 7 * 3


def test_edits_beyond_a_prompts_end_change_nothing(models):
    model = models["gpt2"]
    tokens, lengths, edits = draw(2, model, [4, 9], [1.0], spots=[6, 7, 8])
    own, edited = final_logits(model, tokens, lengths), run_edits(model, tokens, lengths, edits)[0]
    assert torch.allclose(edited[0], own[0], atol=1e-5) and not torch.allclose(edited[1], own[1], atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_values_are_those_of_hooks(models, name):
    model, (tokens, *_) = models[name], draw(3, models[name], [7, 7], [])
    got = capture(model, tokens, "heads+mlps")
    for fast, slow in zip((got.z, got.mlp), _captured(model, tokens, ("z", "mlp")), strict=True): assert torch.allclose(fast, slow, atol=1e-5)
    assert capture(model, tokens).mlp is None


def test_what_was_said_is_right_padded_and_zero_in_the_padding(models):
    tokens, lengths, _ = draw(4, models["llama"], [3, 7], [])
    said, plain = CleanRun(models["llama"], tokens, lengths).said("z"), _captured(models["llama"], tokens, ("z",))[0]
    assert torch.allclose(said[0, :3], plain[0, :3], atol=1e-5) and not said[0, 3:].any() and torch.allclose(said[1], plain[1], atol=1e-5)


def test_one_run_serves_many_calls(models):
    model = models["pythia"]
    tokens, lengths, edits = draw(5, model, [6, 4, 6], [0.2, 0.4, 0.6])
    run = clean_run(model, tokens, lengths)
    before = [x.clone() for x in (*run.kept.stream, *run.kept.k, *run.kept.v, *run.kept.z)]
    calls = torch.cat([run_edits(model, tokens, lengths, [e], clean=run) for e in edits])
    assert torch.allclose(calls, run_edits(model, tokens, lengths, edits), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (*run.kept.stream, *run.kept.k, *run.kept.v, *run.kept.z), strict=True))


def test_marks_are_stacked_a_part_at_a_time(models, monkeypatch):
    tokens, lengths, edits = draw(6, models["gpt2"], [6, 4], [0.1, 0.2, 0.3, 0.5, 0.9])
    whole = run_edits(models["gpt2"], tokens, lengths, edits)
    monkeypatch.setattr(cone, "_STACKED", 1)
    assert torch.allclose(run_edits(models["gpt2"], tokens, lengths, edits), whole, atol=1e-5)


def test_many_prompts_are_run_a_part_at_a_time(models, monkeypatch):
    model = models["grouped"]
    tokens, lengths, edits = draw(6, model, [6, 4, 5, 6, 1], [0.1, 0.5, 1])
    whole, said = run_edits(model, tokens, lengths, edits), capture(model, tokens, "heads+mlps")
    assert cone.prompts_at_once(model, 6) == 2**28 // (6 * 3 * (2 * 32 + 3 * 4 * 8) * 4)
    monkeypatch.setattr(cone, "_KEPT", 2 * 6 * 3 * (2 * 32 + 3 * 4 * 8) * 4)
    runs, own = [], cone.CleanRun._run
    monkeypatch.setattr(cone.CleanRun, "_run", lambda self, *replaced: runs.append((len(self.stream), bool(replaced))) or own(self, *replaced))
    assert torch.allclose(run_edits(model, tokens, lengths, edits), whole, atol=1e-5)
    assert [n for n, replaced in runs if not replaced] == [2, 2, 1]
    again = capture(model, tokens, "heads+mlps")
    assert torch.allclose(again.z, said.z, atol=1e-5) and torch.allclose(again.mlp, said.mlp, atol=1e-5)


@pytest.mark.parametrize("sizes, tokens, expected", [
    ([8, 8, 8, 4, 4, 1], 10**6, [(0, 3), (3, 5), (5, 6)]),  # a row of 8 columns: one of slack
    ([8, 7, 7, 6], 10**6, [(0, 3), (3, 4)]),
    ([8] * 5, 16, [(0, 2), (2, 4), (4, 5)]),
    ([8, 8], 1, [(0, 1), (1, 2)]),
    ([], 10, []),
])
def test_chunks_are_of_nearly_one_size_and_fit(sizes, tokens, expected):
    assert cone._chunks(torch.tensor(sizes, dtype=torch.long), tokens) == expected


def test_columns_are_filled_up_with_the_last():
    wanted = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [1, 1, 0, 0, 1]]).bool()
    assert cone._first(wanted, 3).tolist() == [[1, 3, 4], [4, 4, 4], [0, 1, 4]]


# What is not computed

def test_layers_before_and_columns_left_of_an_edit_are_not_computed(models):
    model = models["gpt2"]
    tokens, lengths, _ = draw(7, model, [8, 8], [])
    run, seen = CleanRun(model, tokens, lengths), []
    assert run.kept.final is not None  # the clean pass is made when it is first asked for
    for i, layer in enumerate(run.layers):
        for part in ("q", "k", "mlp"):
            own = getattr(layer, part)
            def counted(x, own=own, what=(i, part)): return seen.append((*what, *x.shape[:2])) or own(x)
            setattr(layer, part, counted)
    heads = torch.zeros(2, 8, 3, 4, dtype=torch.bool)
    heads[:, 5, 1, 2] = True
    cone_logits(run, [Edit(Mask(heads, torch.zeros(2, 8, 3, dtype=torch.bool)), Activations(torch.zeros(2, 8, 3, 4, 8)))])
    assert seen == [(1, "mlp", 2, 3), (2, "q", 2, 1), (2, "k", 2, 3), (2, "mlp", 2, 1)]


def test_the_circuit_alone_is_computed_where_it_is_listed(models):
    model = models["gpt2"]
    tokens, lengths, _ = draw(8, model, [8, 8], [])
    run, seen = CleanRun(model, tokens, lengths), []
    kept = torch.zeros(2, 8, 3, 4, dtype=torch.bool)
    kept[:, 2, 0, 1] = kept[:, 7, 1, 3] = True
    new = Activations(torch.randn(2, 8, 3, 4, 8, generator=torch.Generator().manual_seed(0)))
    edit = Edit(Mask(~kept, torch.zeros(2, 8, 3, dtype=torch.bool)), new)
    assert run.kept and run.ablated(new)
    for i, layer in enumerate(run.layers):
        def counted(x, own=layer.mlp, i=i): return seen.append((i, *x.shape[:2])) or own(x)
        layer.mlp = counted
    fast = cone_logits(run, [edit])
    assert seen == [(0, 2, 2), (1, 2, 2), (2, 2, 1)] and torch.allclose(fast, run_with_hooks(model, tokens, lengths, [edit]), atol=1e-5)


def test_a_kept_mlp_is_computed_where_it_is_kept(models):
    model = models["gpt2"]
    tokens, lengths, _ = draw(11, model, [8, 8], [])
    heads, mlps = torch.ones(2, 8, 3, 4, dtype=torch.bool), torch.ones(2, 8, 3, dtype=torch.bool)
    mlps[:, 7, 1] = mlps[:, 4, 0] = False
    new, seen, run = capture(model, tokens.flip(1), "heads+mlps"), [], CleanRun(model, tokens, lengths)
    assert run.kept and run.ablated(new, True)
    for i, layer in enumerate(run.layers):
        def counted(x, own=layer.mlp, i=i): return seen.append((i, *x.shape[:2])) or own(x)
        layer.mlp = counted
    edit = Edit(Mask(heads, mlps), new)
    fast = cone_logits(run, [edit])
    assert seen == [(0, 2, 2), (1, 2, 2), (2, 2, 1)] and torch.allclose(fast, run_with_hooks(model, tokens, lengths, [edit]), atol=1e-4)


def test_what_is_kept_but_never_reaches_the_end_changes_nothing(models):
    model = models["llama"]
    tokens, lengths, _ = draw(9, model, [6, 6], [])
    kept = torch.zeros(2, 6, 3, 4, dtype=torch.bool)
    kept[:, 2:4] = True
    new = capture(model, tokens.flip(0), "heads+mlps")
    edits = [Edit(Mask(marks, torch.ones(2, 6, 3, dtype=torch.bool)), new) for marks in (~kept, torch.ones_like(kept))]
    some, everything = cone_logits(CleanRun(model, tokens, lengths), edits)
    assert torch.equal(some, everything) and torch.allclose(some, run_with_hooks(model, tokens, lengths, edits[:1])[0], atol=1e-4)


def test_the_run_with_everything_replaced_is_remembered_for_its_replacement_only(models):
    model = models["gpt2"]
    tokens, lengths, edits = draw(10, model, [5, 5], [0.9, 0.9, 0.9, 0.9])
    run = CleanRun(model, tokens, lengths)
    one, two = edits[1].replacement, edits[0].replacement
    assert one is not two and run.ablated(one) is run.ablated(one)
    first = run.ablated(one)
    assert run.ablated(one, True) is not first and run.ablated(two) is not first
    again = torch.cat([cone_logits(run, [e]) for e in edits])
    assert torch.allclose(again, run_with_hooks(model, tokens, lengths, edits), atol=1e-4)


@pytest.mark.parametrize("start, window, by_hand", [
    (2, 7, 32 * 32 + 2 * 32 * 128 + 2 * 32),  # a head of the last layer at END: output matrix, MLP, two tokens
    (2, 0, 32 * 32 + 2 * 32 * 128 + 2 * 32),  # everywhere: of the last layer still one row
    (1, 6, (32 * 32 + 2 * 32 * 128) * 2 + 32 * 32 + 2 * 32 * 128 + 32 * 32 + 2 * 2 * 32 * 32 + 2 * 8 * 32 + 2 * 32),
])
def test_the_operations_of_a_cone_by_hand(models, start, window, by_hand):
    assert cone_flops(models["gpt2"].cfg, start, window, 8, 2) == 2 * by_hand


# What has no cone

def test_hooks_that_somebody_hung_in_are_not_ignored():
    model = made("gpt2")
    assert engine_of(model) == "cone"
    tokens, lengths, edits = draw(8, model, [5, 5], [0.0])
    own = run_edits(model, tokens, lengths, edits)
    model.add_hook("blocks.1.attn.hook_z", lambda value, hook: value * 0)
    assert engine_of(model) == "hooks" and clean_run(model, tokens, lengths) is None
    silenced = run_edits(model, tokens, lengths, edits)
    assert not torch.allclose(silenced, own, atol=1e-3) and torch.equal(silenced, run_with_hooks(model, tokens, lengths, edits))
    model.reset_hooks()
    assert engine_of(model) == "cone" and torch.allclose(run_edits(model, tokens, lengths, edits), own, atol=1e-6)


@pytest.mark.parametrize("name, value", [("attention_dir", "bidirectional"), ("attn_scores_soft_cap", 30.0), ("output_logits_soft_cap", 30.0),
                                         ("use_local_attn", True), ("window_size", 4)])
def test_declared_arithmetic_that_it_does_not_know(name, value):
    model = made("llama")
    setattr(model.cfg, name, value)
    assert no_cone(model) and engine_of(model) == "hooks"


def test_arithmetic_that_nobody_declared_is_found_by_trial(monkeypatch):
    model = made("gpt2")
    model.blocks[1].attn.original_component.scaling = 1.0
    assert no_cone(model) == "a trial gave other logits"
    monkeypatch.setattr(cone, "_mlp", lambda module: lambda x: x.no_such_part)
    assert no_cone(made("gpt2")) == "its parts do not fit (AttributeError)"


def test_a_model_is_tried_once_and_not_kept_alive(monkeypatch):
    model, tries = made("one_layer"), []
    monkeypatch.setattr(cone, "_tried", lambda m: tries.append(1))
    assert no_cone(model) is None and no_cone(model) is None and tries == [1]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_weights_that_change_later_are_used():
    model = made("gpt2")
    tokens, lengths, edits = draw(9, model, [5, 3], [0.2])
    run_edits(model, tokens, lengths, edits)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1.1)
    assert worst(model, tokens, lengths, edits) <= 1e-4


def test_half_precision_runs_in_its_own_type():
    model = as_bridge(FAMILIES["llama"]().to(torch.bfloat16).eval())
    tokens, lengths, edits = draw(10, model, [6, 6], [0.2])
    got = forward.run_edits(model, tokens, lengths, edits)
    assert got.dtype == torch.bfloat16 and torch.allclose(got.float(), run_with_hooks(model, tokens, lengths, edits).float(), atol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_same_code_runs_on_a_gpu():
    model = as_bridge(FAMILIES["gpt2"]().to("cuda"), device="cuda")
    tokens, lengths, edits = draw(11, model, [6, 4], [0.2, 1])
    assert worst(model, tokens, lengths, edits) <= 1e-4
