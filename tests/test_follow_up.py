"""One factor changed alone: what changes is that, exactly; the model is left as it was; what is said follows from the table."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import made
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization import follow_up
from circuit_generalization.ablation import Ablation, Activations, Mask
from circuit_generalization.attention import attention_pattern
from circuit_generalization.circuit import Circuit, CircuitError, load_circuit, without
from circuit_generalization.circuit_scorer import NO_BASELINE, CircuitScorer
from circuit_generalization.clean_signals import _to_stream, clean_pass, clean_signals
from circuit_generalization.errors import InputError
from circuit_generalization.follow_up import (
    COLUMNS_OF_FOLLOW,
    GROUPS,
    SAME_WITHIN,
    Factor,
    FollowUp,
    direct_factor,
    engaged,
    engagement_factor,
    follow,
    follow_wording,
    ld_factor,
    more_ld,
    outsiders,
    plot_follow_up,
    says,
    strangers,
)
from circuit_generalization.forward import Edit, engine_of, run_edits
from circuit_generalization.metrics import logit_difference
from circuit_generalization.models import final_logits, load_model
from circuit_generalization.prompts import PromptSet, concat_prompts
from circuit_generalization.stats import benjamini_hochberg, difference_p_value, paired_difference
from circuit_generalization.tasks import TaskError, make_prompts

NAMES = ("gpt2", "llama", "grouped", "pythia")
CIRCUIT = Circuit.from_components(["a0.h1", "a0.h2", "a1.h3"], roles=["x", "y", "y"], positions=["B", ["B", "END"], "END"],
                                  attends_to=["A", "A", "B"])


@pytest.fixture(scope="module")
def models(): return {name: made(name) for name in NAMES}


@pytest.fixture(scope="module")
def organism(): return load_model("organism-a")


def draw(lengths=(7, 5, 6, 7), n_vocab=97, seed=0, answers=2):
    "Prompts whose roles A and B stand somewhere else in each; B is missing in the last."
    rng, n = np.random.default_rng(seed), len(lengths)
    clean, other = ([(1 + rng.integers(0, n_vocab - 1, k)).tolist() for k in lengths] for _ in range(2))
    at = {"A": [1, 0, 2, 1][:n], "B": [3, 2, 4, -1][:n]}
    wanted = [rng.permutation(n_vocab)[:answers + 1].tolist() for _ in lengths]
    return PromptSet.from_tokens(clean, other, [w[1:] for w in wanted], [w[0] for w in wanted], at)


def logits_of(model, prompts): return final_logits(model, prompts.tokens, prompts.lengths)


def ld_of(model, prompts): return logit_difference(logits_of(model, prompts), prompts.answers, prompts.distractors)


def hooks_in(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def changes(model, prompts, circuit=CIRCUIT):
    "Every way to change a model."
    return {"engaged": lambda d: engaged(model, circuit, prompts, d), "own": lambda d: engaged(model, circuit, prompts, d, own=True),
            "outsiders": lambda d: outsiders(model, circuit, prompts, d), "beside": lambda d: outsiders(model, circuit, prompts, d, beside=True),
            "more_ld": lambda d: more_ld(model, prompts, d)}


# Where heads look


def patterns(model, prompts): return torch.stack(list(attention_pattern(model, prompts.tokens).values()), 1).unflatten(1, (-1, model.cfg.n_heads))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(dose=st.floats(-4, 4), own=st.booleans())
def test_log_odds_move_by_the_dose_and_nothing_else_in_the_layer_does(models, name, dose, own):
    model, prompts = models[name], draw()
    before = patterns(model, prompts)
    with engaged(model, CIRCUIT, prompts, dose, own=own): after = patterns(model, prompts)
    first, now, expected = before[:, 0], after[:, 0], before[:, 0].clone()
    for head, query, key in ((1, "B", "A"), (2, "B", "A"), (2, "END", "A")):
        for i, (q, k) in enumerate(zip(prompts.positions[query], prompts.positions[key])):
            if q < 0: continue
            row = first[i, head, q].double()
            row = row.log() + dose * (torch.arange(len(row)) == (row.argmax() if own else k))
            expected[i, head, q] = row.softmax(-1).float()
    assert torch.allclose(now, expected, atol=1e-5)
    untouched = torch.ones(4, dtype=torch.bool)
    untouched[[1, 2]] = False
    assert torch.equal(now[:, untouched], first[:, untouched])


def test_the_known_odds(models):
    model, prompts = models["gpt2"], draw()
    looks = lambda: attention_pattern(model, prompts.tokens, ["a0.h1"])["a0.h1"][0, 3, 1].item()  # noqa: E731
    p = looks()
    with engaged(model, CIRCUIT, prompts, float(np.log(9)), role="x"): assert looks() == pytest.approx(9 * p / (1 - p + 9 * p), rel=1e-4)
    with engaged(model, CIRCUIT, prompts, 5.0, role="y"): assert looks() == pytest.approx(p, rel=1e-5)


def test_only_the_heads_of_the_role(models):
    model, prompts = models["gpt2"], draw()
    before = patterns(model, prompts)
    with engaged(model, CIRCUIT, prompts, 3.0, role="y"): after = patterns(model, prompts)
    assert torch.equal(before[:, 0, 1], after[:, 0, 1]) and not torch.equal(before[:, 0, 2], after[:, 0, 2])


@pytest.mark.parametrize("how", ["engaged", "own", "outsiders", "beside", "more_ld"])
def test_rows_find_their_prompt_in_any_batch(models, how):
    model, prompts = models["gpt2"], draw()
    alter = changes(model, [prompts[[2, 0]], prompts[[3, 1]]])[how]
    with alter(2.0):
        whole = logits_of(model, prompts)
        alone = torch.cat([final_logits(model, prompts.tokens[i:i + 1, :n]) for i, n in enumerate(prompts.lengths)])
        wide = final_logits(model, torch.nn.functional.pad(prompts.tokens, (0, 5)), prompts.lengths)
    assert torch.allclose(whole, alone, atol=1e-4) and torch.allclose(whole, wide, atol=1e-4)
    assert not torch.allclose(whole, logits_of(model, prompts), atol=1e-2)


def test_donors_are_changed_too_and_strangers_refused(models):
    model, prompts = models["gpt2"], draw()
    said = lambda: clean_pass(model, replace(prompts, tokens=prompts.counterfactual)).z  # noqa: E731
    before = said()
    with engaged(model, CIRCUIT, prompts, 3.0):
        assert not torch.allclose(said()[:3], before[:3], atol=1e-3)
        with pytest.raises(InputError, match="none of the prompts that the change was made for"): logits_of(model, draw(seed=1))
    for how in ("outsiders", "beside", "more_ld"):
        with changes(model, prompts)[how](3.0): assert torch.equal(logits_of(model, draw(seed=1)), OTHERS(model))
    assert torch.equal(said(), before)


def OTHERS(model): return logits_of(model, draw(seed=1))


def test_equal_tokens_with_other_roles_or_answers_are_refused(models):
    model, prompts = models["gpt2"], replace(draw(), counterfactual=None)
    moved = replace(prompts, positions=prompts.positions | {"A": prompts.positions["A"] * 0}, labels=prompts.labels.assign(prompt_id=list("abcd")))
    asked = replace(prompts, answers=prompts.answers.flip(0), labels=moved.labels)
    with pytest.raises(InputError, match="prompt a .*|prompt a has the tokens of another"), engaged(model, CIRCUIT, [prompts, moved], 1.0): pass
    with pytest.raises(InputError, match="other role positions or answers: score the two apart"), more_ld(model, [prompts, asked], 1.0): pass
    with engaged(model, CIRCUIT, [prompts, asked], 1.0), more_ld(model, [prompts, moved], 1.0): pass
    shared = replace(draw(), counterfactual=draw().counterfactual[[0, 0, 0, 0]])  # two years, one counterfactual
    with more_ld(model, shared, 1.0), outsiders(model, CIRCUIT, shared, 1.0): pass


# What others write


def outside(circuit, model):
    return [(i, j) for i in range(model.cfg.n_layers) for j in range(model.cfg.n_heads) if f"a{i}.h{j}" not in circuit.components]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(dose=st.floats(-2, 5))
def test_the_last_stream_gets_dose_times_what_others_wrote(models, name, dose):
    model, prompts = models[name], draw()
    seen = clean_pass(model, prompts)
    with outsiders(model, CIRCUIT, prompts, dose): now, everywhere = clean_pass(model, prompts), model(prompts.tokens)
    wrote = sum(seen.z[:, i, j] @ model.blocks[i].attn.W_O[j].detach() for i, j in outside(CIRCUIT, model))
    assert torch.allclose(now.streams[:, -1], seen.streams[:, -1] + dose * wrote, atol=2e-5 * float(1 + seen.streams.abs().max()))
    assert torch.equal(now.streams[:, :-1], seen.streams[:, :-1]) and torch.equal(now.z, seen.z)
    before = model(prompts.tokens)
    for i, n in enumerate(prompts.lengths): assert torch.equal(everywhere[i, : n - 1], before[i, : n - 1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ld_follows_the_formula(models, name):
    model, prompts = models[name], draw(answers=1)
    seen, rms = clean_pass(model, prompts), name == "llama"
    def scale(x): return (x if rms else x - x.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    g = _to_stream(model, seen, prompts)
    direct = sum((seen.z[:, i, j] @ model.blocks[i].attn.W_O[j].detach() * g).sum(-1) for i, j in outside(CIRCUIT, model))
    bias = ld_of(model, prompts) - (g * seen.streams[:, -1]).sum(-1)
    for beside, more in ((False, 2 * direct), (True, 0 * direct)):
        with outsiders(model, CIRCUIT, prompts, 2.0, beside): now, ld = clean_pass(model, prompts), ld_of(model, prompts)
        expected = bias + scale(seen.streams[:, -1]) / scale(now.streams[:, -1]) * (ld_of(model, prompts) - bias + more)
        assert torch.allclose(ld, expected, atol=1e-3 * float(ld.abs().max()))
    assert direct.abs().min() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_outsiders_are_heard_as_the_edits_leave_them(models, name):
    "The hooks that listen hang before the scorer's in time, and must run behind them."
    model, prompts = models[name], draw()
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    mask = Mask(*(torch.zeros(*prompts.tokens.shape, *shape, dtype=torch.bool) for shape in ((n_layers, n_heads), (n_layers,))))
    mask.heads[..., -1, 0] = mask.heads[..., -1, 1] = True
    new = Activations(torch.ones(*mask.heads.shape, model.cfg.d_head))
    assert {(n_layers - 1, 0), (n_layers - 1, 1)} <= set(outside(CIRCUIT, model))
    with outsiders(model, CIRCUIT, prompts, 3.0): found = run_edits(model, prompts.tokens, prompts.lengths, [Edit(mask, new)])[0]

    kept = {}
    def keep(what): return lambda x, hook: kept.update({what: x[torch.arange(4), prompts.lengths - 1]})
    def put(z, hook): return torch.where(mask.heads[:, :, -1, :, None].expand_as(z), 1.0, z)
    spoken = [(f"blocks.{i}.attn.hook_z", keep(i)) for i in range(n_layers)]
    final_logits(model, prompts.tokens, prompts.lengths,
                 [(f"blocks.{n_layers - 1}.attn.hook_z", put), *spoken, (f"blocks.{n_layers - 1}.hook_resid_post", keep("stream"))])
    more = sum(kept[i].reshape(4, n_heads, -1)[:, j] @ model.blocks[i].attn.W_O[j].detach() for i, j in outside(CIRCUIT, model))
    with torch.no_grad(): expected = model.unembed(model.ln_final((kept["stream"] + 3 * more)[:, None]))[:, 0]
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


# LD itself


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(dose=st.floats(-30, 30))
def test_ld_moves_by_the_dose_and_other_logits_do_not(models, name, dose):
    model, prompts = models[name], draw()
    before = logits_of(model, prompts)
    with more_ld(model, prompts, dose): after = logits_of(model, prompts)
    expected = before.clone()
    for i, ids in enumerate(prompts.answers): expected[i, ids] += dose
    assert torch.allclose(after, expected, atol=1e-5 * float(before.abs().max() + 30))
    ld = [logit_difference(x, prompts.answers, prompts.distractors) for x in (before, after)]
    assert torch.allclose(ld[1] - ld[0], torch.full((4,), dose), atol=1e-3)


def test_ld_as_such_changes_no_verdict_but_that_of_the_model(organism):
    circuit, few = load_circuit("organism-a-ioi"), Ablation("resample", 3)
    prompts, base = (make_prompts("ioi", n=18, tokenizer=organism.tokenizer, split=split) for split in ("scored", "calibration"))
    scorer = CircuitScorer(organism, circuit)
    scale, pool = scorer.baseline_on(base, few, 0, False), scorer.pool(base, few, 0)
    def scored(dose):
        with more_ld(organism, [prompts, base], dose):
            return scorer.score(prompts, few, n_random=0, profile=False, baseline=scale), scorer.baseline_on(base, few, 0, False, pool)
    (plain, _), (higher, same) = scored(0.0), scored(7.0)
    dose = -float(plain.ld_model.median())
    lower, less = scored(dose)
    for table, by in ((higher, 7.0), (lower, dose)):
        for column in ("ld_model", "ld_circuit", "ld_complement", "ld_ablated"): assert np.allclose(table[column] - plain[column], by, atol=1e-4)
        for column in ("sufficiency", "necessity", "gap", "s_se", "n_se"): assert np.allclose(table[column], plain[column], atol=1e-4)
        wrong = plain.ld_model + by <= 0
        assert (table.verdict[wrong] == "model_fails").all() and (table.verdict[~wrong] == plain.verdict[~wrong]).all()
    assert same.scale == pytest.approx(scale.scale, abs=1e-4) and 4 < (lower.verdict == "model_fails").sum() < 14
    right = scorer.score(base, few, n_random=0, profile=False, baseline=scale).query(f"ld_model + {dose} > 0")
    assert less.n == len(right) < scale.n and less.scale == pytest.approx((right.ld_model - right.ld_ablated).mean(), abs=1e-3)


# The model is left as it was


@pytest.mark.parametrize("how", ["engaged", "own", "outsiders", "beside", "more_ld"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_model_is_left_as_it_was(models, name, how):
    model, prompts = models[name], draw()
    before, hung, alter = logits_of(model, prompts), hooks_in(model), changes(model, prompts)[how]
    assert engine_of(model) == "cone"
    with alter(0.0):
        assert engine_of(model) == "hooks"
        assert torch.allclose(logits_of(model, prompts), before, atol=1e-4)
    with pytest.raises(ZeroDivisionError), alter(2.0): raise ZeroDivisionError
    with pytest.raises(InputError), alter(2.0): final_logits(model, prompts.tokens + 10**6, prompts.lengths)
    assert hooks_in(model) == hung and engine_of(model) == "cone" and torch.equal(logits_of(model, prompts), before)


def test_hooks_that_hang_come_down_when_another_cannot_be_hung(models):
    model, hung = models["gpt2"], hooks_in(models["gpt2"])
    with pytest.raises(KeyError), follow_up._hung(model, [("embed.hook_in", print), ("no.such.hook", print)]): pass
    assert hooks_in(model) == hung


def test_an_error_in_a_hook_leaves_nothing_behind(models):
    model, prompts = models["gpt2"], draw()
    before, hung = logits_of(model, prompts), hooks_in(model)  # in this order: the first pass hangs the bridge's own
    with pytest.raises(InputError, match="none of the prompts"), engaged(model, CIRCUIT, prompts, 1.0): logits_of(model, draw(seed=2))
    assert hooks_in(model) == hung and torch.equal(logits_of(model, prompts), before)


# Placebos and factors


def test_strangers_make_the_same_claims():
    for seed in range(5):
        other = strangers(CIRCUIT, 4, seed)
        assert not set(other.components) & set(CIRCUIT.components) and len(set(other.components)) == 3
        assert sorted((n.component.layer, n.positions, n.attends_to, n.role) for n in other.nodes) == sorted(
            (n.component.layer, n.positions, n.attends_to, n.role) for n in CIRCUIT.nodes)
    assert len({strangers(CIRCUIT, 4, s).components for s in range(9)}) > 1 and strangers(CIRCUIT, 4, 3) == strangers(CIRCUIT, 4, 3)
    assert {strangers(CIRCUIT, 4, s, "x").components for s in range(20)} == {("a0.h0",), ("a0.h3",)}, "none of another role"
    with pytest.raises(CircuitError, match="2 heads of layer 0, and 1 others are no placebo"): strangers(CIRCUIT, 3)
    assert engagement_factor(CIRCUIT, 3, seed=None).placebo is None


def test_bad_circuits(models):
    model, prompts = models["gpt2"], draw()
    mute = Circuit.from_components(["a0.h1"], positions=["B"])
    with pytest.raises(CircuitError, match="does not say what its heads should read"), engaged(model, mute, prompts, 1.0): pass
    with pytest.raises(CircuitError, match=r"what 'z' should read, and from where: there is no engagement to change \(roles: x, y\)"):
        engagement_factor(CIRCUIT, 4, "z")
    with pytest.raises(CircuitError, match="a7.h1"), engaged(model, Circuit.from_components(["a7.h1"]), prompts, 1.0): pass
    with pytest.raises(CircuitError, match="a7.h1"), outsiders(model, Circuit.from_components(["a7.h1"]), prompts, 1.0): pass
    every = Circuit.from_components([f"a{i}.h{j}" for i in range(3) for j in range(4)])
    with outsiders(model, every, prompts, 1.0), pytest.raises(CircuitError, match="there are no outsiders"): logits_of(model, prompts)


def test_levels_are_those_of_the_forecast(organism):
    circuit, prompts = load_circuit("organism-a-ioi"), make_prompts("ioi", "adversarial", "third_name", 18, tokenizer=organism.tokenizer)
    table = clean_signals(organism, circuit, prompts)[0]
    for factor, expected in ((engagement_factor(circuit, 8), table["circuit"].engagement),
                             (engagement_factor(circuit, 8, "name mover"), table["circuit"]["engagement_name mover"]),
                             (direct_factor(circuit), table["circuit"].direct_others), (ld_factor(), table["behaviour"].ld)):
        assert np.allclose(factor.level(organism, prompts, 0.0), expected, atol=1e-4)
        dose = -0.5 if factor.name == "direct others" else 1.0
        for arm in filter(None, (factor, factor.placebo)):
            with arm.alter(organism, [prompts], [], dose): level = arm.level(organism, prompts, dose)
            assert np.isfinite(level).sum() > 15 and not np.allclose(level, arm.level(organism, prompts, 0.0), atol=1e-3, equal_nan=True)


def test_the_level_of_direct_others_counts_the_louder_part(organism):
    prompts, factor = make_prompts("ioi", n=18, tokenizer=organism.tokenizer), direct_factor(load_circuit("organism-a-ioi"))
    ld, direct = ld_of(organism, prompts).numpy(), factor.level(organism, prompts, 0.0)
    with factor.alter(organism, [prompts], [], 2.0): level, now = factor.level(organism, prompts, 2.0), clean_pass(organism, prompts)
    seen = clean_pass(organism, prompts)
    shrunk = (seen.streams[:, -1].std(-1) / now.streams[:, -1].std(-1)).numpy()
    louder = logit_difference(now.logits, prompts.answers, prompts.distractors).numpy()
    assert np.allclose(level, 3 * direct * ld * shrunk / louder, rtol=1e-3)
    with factor.alter(organism, [prompts], [], -1.0): assert np.allclose(factor.level(organism, prompts, -1.0), 0, atol=1e-5)


# Pairs, by hand


def frame(verdicts, ld=1.0, level=0.5, n_templates=9, changed=True):
    n = len(verdicts)
    return pd.DataFrame(dict(verdict=verdicts, ld_model=ld, level=level, sufficiency=1.0, necessity=1.0, changed=changed,
                             template=[f"t{i % n_templates}" for i in range(n)]))


BEFORE = frame(["active"] * 6 + ["shortfall"] * 2 + ["undecided"] + ["active"], ld=[1.0] * 9 + [-1.0], level=np.arange(10.0))
AFTER = frame(["shortfall"] * 2 + ["active"] * 5 + ["shortfall"] + ["active"] * 2, ld=[2.0] * 5 + [-2.0] + [3.0] * 4, level=np.arange(10) + 0.5)
CHOSEN = frame(["active"] * 3 + ["rerouted"] + ["active"] * 2 + ["shortfall"] * 2 + ["undecided", "active"])


def rows_of(before=BEFORE, after=AFTER, chosen=CHOSEN, placebo=None):
    arms = {"factor": (before, {1.0: after})} | ({} if placebo is None else {"placebo": (before, {1.0: placebo})})
    return follow_up._table("f", 1, chosen, arms).set_index(["arm", "group", "target"])


def test_pairs_by_hand():
    table = rows_of()
    every, decided = table.loc[("factor", "all", "not active")], table.loc[("factor", "all", "decided")]
    assert every[["pairs", "right_before", "right_after", "right_never"]].tolist() == [8, 1, 1, 0]
    assert every.failing_before == 3 / 8 and every.failing_after == 3 / 8 and every.difference == 0
    assert decided.pairs == 7 and decided.failing_before == 2 / 7 and decided.failing_after == 3 / 7
    assert every.level_before == np.mean([0, 1, 2, 3, 4, 6, 7, 8]) and every.level_change == 0.5 and every.ld_after == 19 / 8
    active, failing = table.loc[("factor", "active", "not active")], table.loc[("factor", "failing", "not active")]
    assert (active.pairs, active.failing_before, active.failing_after) == (4, 0, 0.5)  # prompts 0, 1, 2, 4; 5 and 9 are not right twice
    assert (failing.pairs, failing.failing_before, failing.failing_after) == (4, 0.75, 0.25)  # prompt 3 failed with the other donors only
    assert list(table.reset_index().columns.drop(["arm", "group", "target"])) == [c for c in COLUMNS_OF_FOLLOW if c not in ("arm", "group", "target")]


def test_prompts_that_did_not_change_are_no_pairs():
    table = rows_of(after=AFTER.assign(changed=[False] + [True] * 9))
    every = table.loc[("factor", "all", "not active")]
    assert (every.pairs, every.right_before, every.right_after) == (7, 1, 1) and every.failing_after == 2 / 7


def test_intervals_are_those_of_matched_pairs():
    rng, n = np.random.default_rng(0), 60
    before, after, placebo = (frame(np.where(rng.random(n) < p, "active", "shortfall"), n_templates=12) for p in (0.8, 0.3, 0.7))
    row = rows_of(before, after, before, placebo).loc[("factor", "all", "not active")]
    fails = [(t.verdict != "active").to_numpy() for t in (before, after, placebo)]
    d, e = paired_difference(fails[1], fails[0], before.template), paired_difference(fails[1], fails[2], before.template)
    assert (row.difference, row.low, row.high, row.p) == (d.estimate, d.low, d.high, difference_p_value(fails[1], fails[0], before.template))
    assert (row.beyond, row.beyond_low, row.beyond_high) == (e.estimate, e.low, e.high)
    assert row.beyond_p == difference_p_value(fails[1], fails[2], before.template) and SAME_WITHIN == 0.1


def test_the_placebo_is_compared_where_the_model_is_right_three_times():
    placebo = frame(["active"] * 10, ld=[-1.0, -1.0] + [1.0] * 8)
    table = rows_of(placebo=placebo)
    assert table.loc[("factor", "all", "not active")].beyond == 1 / 6  # prompt 7 of 2, 3, 4, 6, 7, 8
    assert np.isnan(table.loc[("placebo", "all", "not active")].beyond)


def test_no_pairs_give_no_numbers():
    row = rows_of(after=AFTER.assign(ld_model=-1.0)).loc[("factor", "all", "not active")]
    assert row.pairs == 0 and row.right_before == 9 and np.isnan(row.difference) and np.isnan(row.p)


# What is said


def table_of(before, after, placebo=None, moved=-0.3, dose=-2.0, risk=-1, factor="engagement"):
    arms = {"factor": (before, {dose: after.assign(level=before.level + moved)})}
    if placebo is not None: arms["placebo"] = before, {dose: placebo}
    return follow_up._table(factor, risk, before, arms)


ACTIVE, FAILING = frame(["active"] * 72, n_templates=36), frame(["shortfall"] * 72, n_templates=36)
HALF = frame(["active", "shortfall"] * 36, n_templates=36)
SPREAD = np.tile([0, 0, 1.349, 1.349], 18)  # quartiles 0 and 1.349: a standard deviation of 1


@pytest.mark.parametrize(("before", "after", "placebo", "moved", "expected"), [
    (ACTIVE, FAILING, ACTIVE, -0.3, "failure follows"),
    (ACTIVE, FAILING, None, -0.3, "failure follows"),
    (FAILING, ACTIVE, FAILING, 0.3, "failure follows"),
    (ACTIVE, FAILING, ACTIVE, 0.3, "the opposite follows"),
    (FAILING, ACTIVE, FAILING, -0.3, "the opposite follows"),
    (ACTIVE, FAILING, FAILING, -0.3, "not decided: not told from the placebo"),
    (ACTIVE, HALF, FAILING, -0.3, "not decided: not told from the placebo"),
    (ACTIVE, ACTIVE, ACTIVE, -0.3, "only correlates"),
    (ACTIVE.assign(level=SPREAD), ACTIVE, ACTIVE, -0.51, "only correlates"),
    (ACTIVE.assign(level=SPREAD), ACTIVE, ACTIVE, 0.49, "not decided: the level hardly changed"),
    (ACTIVE.assign(level=SPREAD), FAILING, ACTIVE, -0.01, "failure follows"),
    (ACTIVE[:18], ACTIVE[:18], None, -0.3, "not decided"),
    (ACTIVE, FAILING, ACTIVE, 0.0, "not decided: the level did not change"),
    (ACTIVE, FAILING.assign(ld_model=-1.0), ACTIVE, -0.3, "not decided: no pair right twice"),
    (ACTIVE[:7], FAILING[:7], ACTIVE[:7], -0.3, "not decided: too few templates"),
])
def test_what_is_said(before, after, placebo, moved, expected):
    row = says(table_of(before, after, placebo, moved)).iloc[0]
    assert row.says == expected and expected in row.sentence


def test_sentence():
    row = says(table_of(ACTIVE, HALF, ACTIVE)).iloc[0]
    assert row.sentence.startswith("engagement, lowered from 0.50 to 0.20: failure follows. Of 72 prompts 0% and 50% fail before and after (+50 [")
    assert "points; less the placebo +50 [" in row.sentence and row.sentence.endswith("; of those that were active 0% and 50%.")
    assert says(table_of(ACTIVE[:7], FAILING[:7])).sentence.item() == "engagement, lowered from 0.50 to 0.20: not decided: too few templates."


def test_the_largest_dose_in_each_direction_is_read():
    before, levels = ACTIVE, {-1.0: -0.1, -3.0: -0.3, 2.0: 0.2, 1.0: 0.1}
    arms = {"factor": (before, {dose: before.assign(level=before.level + moved) for dose, moved in levels.items()})}
    found = says(pd.concat([follow_up._table(name, -1, before, arms) for name in ("a", "b")], ignore_index=True))
    assert found.dose.tolist() == [-3.0, 2.0] * 2 and found.factor.tolist() == ["a", "a", "b", "b"] and found.expected.tolist() == [1, -1] * 2


def test_what_is_expected_is_where_the_level_went_not_the_dose():
    found = says(table_of(ACTIVE, FAILING, moved=0.3, dose=-1.0, risk=1))
    assert found.expected.item() == 1 and found.says.item() == "failure follows" and "raised from 0.50" in found.sentence.item()


def test_many_factors_are_adjusted_together():
    rng = np.random.default_rng(1)
    tables = [table_of(ACTIVE, frame(np.where(rng.random(72) < share, "shortfall", "active"), n_templates=36), ACTIVE, factor=str(share))
              for share in (0.0, 0.06, 0.1, 0.5)]
    together, p = says(pd.concat(tables)), [says(t).p_adjusted.item() for t in tables]
    assert together.p_adjusted.tolist() == benjamini_hochberg(np.array(p)).tolist() and together.p_adjusted.iloc[1] > p[1]
    same, beyond = ([says(t)[c].item() for t in tables] for c in ("same_p_adjusted", "beyond_p_adjusted"))
    assert together.same_p_adjusted.tolist() == benjamini_hochberg(np.array(same)).tolist()
    assert together.beyond_p_adjusted.tolist() == benjamini_hochberg(np.array(beyond)).tolist()


def test_natural_is_how_far_the_groups_are_apart():
    before = HALF.assign(level=[0.9, 0.4] * 36)
    assert says(table_of(before, before)).natural.item() == pytest.approx(0.5)


def test_bad_tables():
    with pytest.raises(InputError, match="no column 'same_p'"): says(table_of(ACTIVE, ACTIVE).drop(columns="same_p"))
    with pytest.raises(InputError, match="no target 'active'"): says(table_of(ACTIVE, ACTIVE), "active")


def test_figure():
    some = pd.concat([table_of(ACTIVE, HALF, ACTIVE, dose=d, factor=f) for f in ("a", "b") for d in (-2.0, 1.0)], ignore_index=True)
    figure = plot_follow_up(some, subtitle="a model")
    assert len(figure.axes) == 4 and [t.get_text() for t in figure.legends[0].get_texts()] == ["factor", "placebo"]
    assert figure.axes[0].get_title(loc="left") == "circuit was active: does it break? (≤ 72 pairs)"
    line = figure.axes[0].containers[0].lines[0]
    assert line.get_ydata().tolist() == [0.5, 0, 0.5] and [round(x) for x in line.get_xdata()] == [-2, 0, 1]


# Followed


def test_failure_follows_where_another_head_does_the_same(compiled):
    "Either of two S-inhibition heads would do: a circuit that lists one of them fails as soon as that one looks away."
    whole = load_circuit("compiled-ioi-ioi")
    prompts = make_prompts("ioi", n=12, tokenizer=compiled.tokenizer)
    asked = dict(doses=[-60], ablation=Ablation("resample", 2), n_base=8)
    one = without(whole, ["a1.h5"])
    table = follow(CircuitScorer(compiled, one), prompts, engagement_factor(one, 8, "S-inhibition"), **asked)
    row, placebo = (table[(table.arm == arm) & (table.group == "all") & (table.target == "decided")].iloc[0] for arm in ("factor", "placebo"))
    assert row.pairs > 9 and (row.failing_before, row.failing_after, row.beyond) == (0, 1, 1) and row.level_before > 0.99 and row.level_after < 1e-6
    assert (placebo.failing_before, placebo.failing_after) == (0, 0) and abs(row.ld_after - row.ld_before) < 0.1
    both = follow(CircuitScorer(compiled, whole), prompts, replace(engagement_factor(whole, 8, "S-inhibition"), placebo=None), **asked)
    row = both[(both.group == "all") & (both.target == "not active")].iloc[0]
    assert row.right_before > 6 and row.pairs + row.right_before == 12 and np.isnan(row.beyond) and set(both.arm) == {"factor"}


def test_groups_are_chosen_with_other_donors(monkeypatch):
    seen, said = [], []

    class Stage:
        def __init__(self, seed): self.seed = seed
        def level(self, scorer, arm, dose): return np.full(10, 7.0) if arm.name == "other" else np.arange(10.0)
        def scored(self, scorer, arm=None, dose=0.0):
            seen.append((self.seed, arm and arm.name, dose))
            return CHOSEN if self.seed == 8 else AFTER if dose else BEFORE

    monkeypatch.setattr(follow_up._Stage, "of", lambda scorer, prompts, ablation, seed, n_base: Stage(seed))
    factor = Factor("f", None, None, 1, Factor("other", None, None, 1))
    table = FollowUp(None, None, seed=7).follow(factor, [1, -2], said.append)
    assert sorted(seen[:2]) == [(7, None, 0.0), (8, None, 0.0)]
    assert seen[2:] == [(7, "f", 1.0), (7, "f", -2.0), (7, "other", 1.0), (7, "other", -2.0)]
    assert said == ["factor, dose 1", "factor, dose -2", "placebo, dose 1", "placebo, dose -2"]
    assert len(table) == 2 * 2 * len(GROUPS) * 2
    rows = table[(table.target == "not active") & (table.dose == 1)].set_index(["arm", "group"])
    assert rows.loc[("factor", "failing")].failing_before == 0.75 and rows.loc[("placebo", "all")].level_before == 7


@pytest.mark.parametrize("doses", [[], [0.0], [1, 1], [float("nan")], [float("inf")]])
def test_doses_are_checked(doses):
    with pytest.raises(InputError, match="give at least one, each once, finite and not 0"): follow(None, None, ld_factor(), doses)


def test_bare_tokens_without_a_task(random_model):
    "No pool, no scale: counterfactuals are donors, and half a logit is too little."
    prompts = draw(lengths=(6, 6), n_vocab=64, answers=1)
    table = follow(CircuitScorer(random_model, Circuit.from_components(["a0.h1"], positions=["B"], attends_to=["A"])), prompts,
                   replace(direct_factor(CIRCUIT), placebo=None), [1.0], ablation=Ablation("counterfactual"))
    assert len(table) == 6 and table.pairs.max() + table.right_never.max() + table.right_before.max() + table.right_after.max() == 2


def test_dose_zero_is_the_model_itself(organism):
    circuit, few = load_circuit("organism-a-ioi"), Ablation("resample", 2)
    prompts = make_prompts("ioi", n=8, tokenizer=organism.tokenizer)
    scorer = CircuitScorer(organism, circuit)
    stage = follow_up._Stage.of(scorer, prompts, few, 0, 8)
    fast = scorer.score(prompts, few, n_random=0, profile=False, baseline=scorer.calibrate(prompts, few, 0, False, 8))
    plain = stage.scored(scorer)
    assert set(plain.engine) == {"hooks"} and set(fast.engine) == {"cone"} and plain.level.isna().all() and (plain.verdict == fast.verdict).all()
    assert np.allclose(plain.gap, fast.gap, atol=1e-3) and np.allclose(plain.ld_circuit, fast.ld_circuit, atol=1e-3)
    for factor in (engagement_factor(circuit, 8), direct_factor(circuit), ld_factor()):
        for arm in filter(None, (factor, factor.placebo)):
            table = stage.scored(scorer, arm, 0.0)
            assert set(table.engine) == {"hooks"} and (table.verdict == plain.verdict).all()
            for column in ("ld_model", "ld_circuit", "ld_complement", "ld_ablated", "gap"):
                assert np.allclose(table[column], plain[column], atol=1e-3)


def test_donors_and_scale_are_those_of_the_altered_model(organism):
    "Everything is run again inside: by hand, with every set named."
    circuit, few = load_circuit("organism-a-ioi"), Ablation("resample", 2)
    prompts, base = (make_prompts("ioi", n=4, tokenizer=organism.tokenizer, split=s) for s in ("scored", "calibration"))
    scorer = CircuitScorer(organism, circuit)
    with scorer.sharing_runs():  # what was remembered of the model as it is must not be used
        scorer.score(prompts, few, n_random=0, profile=False, baseline=NO_BASELINE)
        found = follow_up._Stage.of(scorer, prompts, few, 0, 4).scored(scorer, engagement_factor(circuit, 8), 1.0)
    fresh = CircuitScorer(organism, circuit)
    pools = [fresh.pool(p, few, 0) for p in (prompts, base)]
    with engaged(organism, circuit, concat_prompts([prompts, base, *pools]), 1.0):
        scale = fresh.baseline_on(base, few, 0, False, pools[1])
        expected = fresh.score(prompts, few, n_random=0, profile=False, baseline=scale)
    plain = fresh.score(prompts, few, n_random=0, profile=False, baseline=NO_BASELINE)
    for column in ("ld_model", "ld_ablated", "ld_circuit", "gap"): assert np.allclose(found[column], expected[column], atol=1e-4)
    assert not np.allclose(found.ld_ablated, plain.ld_ablated, atol=0.05)


def test_wording(organism):
    scorer = CircuitScorer(organism, load_circuit("organism-a-ioi"))
    asked = dict(n=36, ablation=Ablation("counterfactual"))
    table = follow_wording(scorer, "length", {1: "adjunct_1", 4: "adjunct_4"}, "unseen_places", **asked)
    rows = table[(table.group == "all") & (table.target == "not active")].set_index(["arm", "dose"])
    changes = rows.level_change
    assert changes["factor", 4] > changes["factor", 1] > 0 == changes["placebo", 1]
    assert set(rows.index) == {(arm, dose) for arm in ("factor", "placebo") for dose in (1, 4)}
    assert rows.loc[("factor", 1)].pairs + rows.loc[("factor", 1)].right_before == 36 and set(table.risk) == {1}
    def last(prompts): return (prompts.positions["IO"] > prompts.positions["S1"]).numpy().astype(float)
    order = follow_wording(scorer, "order", {-1: "abba", 1: "baba"}, level=last, **asked)
    whole = order[(order.group == "all") & (order.target == "not active")].set_index("dose")
    assert whole.pairs.tolist() == [18, 18] and whole.level_change.tolist() == [-1, 1], "half of the prompts have the order already"


def test_unknown_wording(organism):
    scorer = CircuitScorer(organism, load_circuit("organism-a-ioi"))
    with pytest.raises(TaskError, match="'ioi' has no variant 'nonsense': there is base, rare_names"):
        follow_wording(scorer, "length", {1: "nonsense"})
    with pytest.raises(InputError, match="not 0"): follow_wording(scorer, "length", {0: "adjunct_1"})
