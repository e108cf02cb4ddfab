"""Sameness, power, right for another reason, variance components: by hand, against brute force, and where the truth is known."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as distributions

from circuit_generalization.circuit_scorer import CircuitScorer
from circuit_generalization.errors import InputError
from circuit_generalization.evidence import (
    ANOTHER_REASON,
    MARGIN,
    conclusion,
    equivalence_p_value,
    right_and_active,
    right_for_another_reason,
    smallest_difference,
    variance_components,
)
from circuit_generalization.metrics import VERDICTS
from circuit_generalization.stats import cluster_interval, difference_p_value, draw_pairs, paired_difference
from circuit_generalization.tasks import make_prompts

EIGHTEEN = np.arange(90) % 18


@st.composite
def matched(draw, low=8, high=12):
    "Two lists of 0 and 1, and template labels of unequal clusters in any order."
    sizes = draw(st.lists(st.integers(1, 5), min_size=low, max_size=high))
    labels = draw(st.permutations(np.repeat(np.arange(len(sizes)), sizes).tolist()))
    a, b = (np.array(draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(labels), max_size=len(labels)))) for _ in range(2))
    return a, b, np.array(labels)


def draw_apart(rng, shares, icc, n_clusters, mean_size=5.5):
    "Pairs whose templates move the two members independently."
    labels = np.repeat(np.arange(n_clusters), np.maximum(1, np.rint(rng.lognormal(np.log(mean_size) - 0.3, 0.75, n_clusters))).astype(int))
    a, b = (rng.random(len(labels)) < rng.beta(s * (1 - icc) / icc, (1 - s) * (1 - icc) / icc, n_clusters)[labels] for s in shares)
    return a.astype(float), b.astype(float), labels


# ---- equivalence


@given(matched(), st.floats(0.05, 0.9))
def test_equivalence_and_the_interval_cannot_disagree(case, margin):
    p = equivalence_p_value(*case, margin)
    assert 0 <= p <= 1
    assume(1e-6 < p < 0.499)
    touching = paired_difference(*case, level=1 - 2 * p)
    assert max(-touching.low, touching.high) == pytest.approx(margin, abs=1e-6)


@given(matched())
def test_swapping_the_members_and_the_order_of_prompts_change_nothing(case):
    a, b, labels = case
    p, order = equivalence_p_value(a, b, labels), np.random.default_rng(0).permutation(len(labels))
    assert equivalence_p_value(b, a, labels) == pytest.approx(p)
    assert equivalence_p_value(a[order], b[order], [f"t{k}" for k in labels[order]]) == pytest.approx(p)
    assert smallest_difference(b, a, labels) == pytest.approx(smallest_difference(a[order], b[order], labels[order]), nan_ok=True)


@given(matched(), st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_a_wider_margin_is_easier_to_keep(case, m, n):
    narrow, wide = sorted((m, n))
    assert equivalence_p_value(*case, wide) <= equivalence_p_value(*case, narrow) + 1e-9


def test_pairs_that_are_all_alike_by_hand():
    # no discordant pair: n = 18 templates, Wilson's upper end for 0 of 18 is t^2 / (18 + t^2); it is 0.15 at t^2 = 18 * 0.15 / 0.85
    t = math.sqrt(18 * MARGIN / (1 - MARGIN))
    assert equivalence_p_value(np.ones(90), np.ones(90), EIGHTEEN) == pytest.approx(distributions.t.sf(t, 17)) == pytest.approx(0.0463, abs=1e-4)
    assert equivalence_p_value(np.ones(90), np.ones(90), np.arange(90) % 10) > 0.05, "ten templates cannot show it"


def test_outside_the_margin_the_p_value_is_above_one_half():
    lost = np.where(np.arange(90) % 5 == 0, 0.0, 1.0)  # a fifth
    assert equivalence_p_value(lost, np.ones(90), EIGHTEEN) > 0.5 > equivalence_p_value(lost, np.ones(90), EIGHTEEN, 0.25)
    assert equivalence_p_value(lost, np.ones(90), EIGHTEEN, 0.2) == pytest.approx(0.5, abs=1e-3)


def test_two_one_sided_t_tests_of_a_mean_by_hand():
    d = np.random.default_rng(0).normal(0.1, 1.0, 30)  # thirty clusters of one
    se, n = d.std(ddof=1) / math.sqrt(30), 30
    book = max(distributions.t.sf((d.mean() + 0.5) / se, n - 1), distributions.t.cdf((d.mean() - 0.5) / se, n - 1))
    assert equivalence_p_value(d, np.zeros(n), range(n), 0.5, kind="mean") == pytest.approx(book)


def test_too_few_templates_have_no_p_value_and_bad_margins_are_refused():
    ones = np.ones(90)
    assert math.isnan(equivalence_p_value(ones, ones, np.arange(90) % 7)) and math.isnan(smallest_difference(ones, ones, np.arange(90) % 7))
    assert math.isnan(equivalence_p_value(ones, ones, EIGHTEEN, kind="mean")), "no variation, no interval, no p-value"
    for margin in (0, -0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="positive"): equivalence_p_value(ones, ones, EIGHTEEN, margin)
    for power in (0.5, 1, math.nan):
        with pytest.raises(InputError, match="power"): smallest_difference(ones, ones, EIGHTEEN, power)
    with pytest.raises(InputError, match="one length"): equivalence_p_value(ones, ones[:5], EIGHTEEN)


@pytest.mark.slow
@pytest.mark.parametrize("n_templates", [8, 10, 18, 30])
@pytest.mark.parametrize("draw", [draw_apart, draw_pairs])
def test_the_same_is_seldom_said_falsely(draw, n_templates):
    shares, iccs = [(0.6, 0.75), (0.75, 0.6), (0.83, 0.98)], (0.1, 0.5)
    rng = np.random.default_rng(n_templates)
    wrong = [[equivalence_p_value(*draw(rng, s, icc, n_templates, mean_size=5.5)) < 0.05 for _ in range(250)] for s in shares for icc in iccs]
    assert np.mean(wrong) < 0.08 and np.mean(wrong, axis=1).max() < 0.11


@pytest.mark.slow
def test_sameness_can_be_shown():
    rng = np.random.default_rng(0)
    power = {g: np.mean([equivalence_p_value(*draw_pairs(rng, (0.95, 0.95), 0.1, g, mean_size=5.5)) < 0.05 for _ in range(200)]) for g in (8, 18, 30)}
    assert power[8] < 0.5 < 0.8 < power[18] < power[30]


# ---- power


def test_smallest_difference_of_a_mean_is_the_textbook_one():
    d = np.random.default_rng(1).normal(0, 1, 20)
    se = d.std(ddof=1) / math.sqrt(20)
    found = smallest_difference(d, np.zeros(20), range(20), kind="mean")
    assert found == pytest.approx((distributions.t.ppf(0.975, 19) + distributions.t.ppf(0.8, 19)) * se)


def test_smallest_difference_solves_its_equation():
    # all alike: no churn, 18 effective pairs; `lost` alone is discordant
    d = smallest_difference(np.ones(90), np.ones(90), EIGHTEEN)
    t, t_power = distributions.t.ppf([0.975, 0.8], 17)
    low = (d + t**2 / 36 - t * math.sqrt(d * (1 - d) / 18 + t**2 / (4 * 18**2))) / (1 + t**2 / 18)  # Wilson, d of 18 lost
    none = t**2 / (18 + t**2)  # Wilson's upper end, 0 of 18 gained
    assert math.hypot(none, d - low) + t_power * math.sqrt(d * (1 - d) / 18) == pytest.approx(d)
    assert 0.3 < d < 0.5


@given(matched())
def test_more_power_and_a_higher_level_need_a_larger_difference(case):
    usual, strong, sure = (smallest_difference(*case, **how) for how in ({}, dict(power=0.9), dict(level=0.99)))
    assert math.isnan(usual) or 0 < usual <= 1
    for other in (strong, sure): assert math.isnan(other) or other > usual


def test_repeating_the_design_makes_smaller_differences_visible():
    a, b = (np.random.default_rng(k).integers(0, 2, 90).astype(float) for k in (0, 1))
    once = smallest_difference(a, b, EIGHTEEN)
    thrice = smallest_difference(np.tile(a, 3), np.tile(b, 3), np.concatenate([EIGHTEEN + 18 * k for k in range(3)]))
    assert thrice < once


def test_outcomes_that_templates_decide_hide_larger_differences():
    d = np.where(np.arange(90) < 18, np.where(EIGHTEEN < 9, -1, 1), 0)  # the same pairs change, one a template
    by_template, scattered = (EIGHTEEN < 9).astype(float), np.where(d != 0, d < 0, np.arange(90) // 18 % 2).astype(float)
    clustered, mixed = (smallest_difference(x + d, x, EIGHTEEN) for x in (by_template, scattered))
    assert clustered > 1.3 * mixed


@pytest.mark.slow
@pytest.mark.parametrize("draw", [draw_apart, draw_pairs])
@pytest.mark.parametrize("share, icc", [(0.75, 0.1), (0.75, 0.5), (0.95, 0.1), (0.95, 0.5)])
def test_a_difference_of_the_stated_size_is_found(draw, share, icc):
    for g in (18, 30):
        rng = np.random.default_rng(g)
        answers = [smallest_difference(*draw(rng, (share, share), icc, g, mean_size=5.5)) for _ in range(100)]
        d = np.median(np.nan_to_num(answers, nan=1.0))
        found = np.mean([difference_p_value(*draw(rng, (share - d, share), icc, g, mean_size=5.5)) < 0.05 for _ in range(200)])
        assert found > 0.7, f"{g} templates: {d:.2f} is found in {found:.0%}"


# ---- words


@pytest.mark.parametrize("given, words", [
    ((-0.3, 90, 0.01, 0.9), "lower"), ((0.3, 90, 0.01, 0.9), "higher"), ((-0.1, 90, 0.01, 0.01), "lower, by less than 15 points"),
    ((0.1, 90, 0.01, 0.01), "higher, by less than 15 points"), ((0.0, 90, 1.0, 0.01), "the same within 15 points"),
    ((0.1, 90, 0.2, 0.2), "no difference found"), ((0.1, 90, 0.05, 0.05), "no difference found"), ((0.1, 90, 0.2), "no difference found"),
    ((-0.3, 90, math.nan, math.nan), "too few templates"), ((math.nan, 0, math.nan, math.nan), "no pair right twice"),
    ((-0.1, 90, 0.01, 0.01, 0.2), "lower, by less than 20 points"), ((-0.3, 90, 0.04, 0.9, 0.15, 0.01), "no difference found")])
def test_words(given, words): assert conclusion(*given) == words


@given(matched())
def test_words_follow_the_intervals(case):
    p, same = difference_p_value(*case), equivalence_p_value(*case)
    wide, narrow = paired_difference(*case), paired_difference(*case, level=0.9)
    assume(abs(p - 0.05) > 1e-6 and abs(same - 0.05) > 1e-6)
    words = conclusion(wide.estimate, wide.n, p, same)
    assert words.startswith("lower") == (wide.high < 0) and words.startswith("higher") == (wide.low > 0)
    assert ("15 points" in words) == (-MARGIN < narrow.low and narrow.high < MARGIN)


# ---- right for another reason


def row(verdict, ld_model=2.0, s=1.0, n=0.9, template="t0", **numbers):
    return dict(verdict=verdict, ld_model=ld_model, ld_ablated=0.0, sufficiency=s, necessity=n, s_se=0.0, n_se=0.0, template=template, gap=0.5,
                gap_raw=0.5, **numbers)


def test_every_verdict_has_its_cell():
    counts = right_and_active(pd.DataFrame([row(v) for v in VERDICTS if v != "model_fails"]))
    assert counts.loc["right"].to_dict() == {"active": 1, "not active": 4, "undecided": 1} and counts.loc["wrong"].sum() == 0
    assert {*ANOTHER_REASON, "active", "undecided", "model_fails"} == set(VERDICTS)


@pytest.mark.parametrize("wrong, cell", [
    (dict(s=1.0, n=0.9), "active"), (dict(s=0.3, n=0.9), "not active"), (dict(s=1.0, n=0.1), "not active"), (dict(s=1.6, n=0.9), "not active"),
    (dict(ld_model=-0.2), "undecided"), (dict(ld_model=0.0), "undecided"), (dict(s=math.nan), "undecided")])
def test_wrong_prompts_are_judged_by_the_same_borders(wrong, cell):
    counts = right_and_active(pd.DataFrame([row("model_fails", **dict(ld_model=-2.0) | wrong)]))
    assert counts.loc["wrong", cell] == 1 and counts.to_numpy().sum() == 1


def test_the_least_effect_is_read_in_units_of_d():
    wrong = pd.DataFrame([row("model_fails", -2.0)])
    assert right_and_active(wrong).loc["wrong", "active"] == 1  # D = 1: 0.25 logits are enough
    assert right_and_active(wrong.assign(gap=0.05)).loc["wrong", "undecided"] == 1  # D = 10: 2.5 are needed
    assert right_and_active(wrong.assign(gap=math.nan)).loc["wrong", "active"] == 1  # no D: 0.5 logits


def test_share_for_another_reason_by_hand():
    verdicts = ["active"] * 12 + ["shortfall", "overshoot", "redundant", "rerouted"] * 2 + ["undecided"] * 5 + ["model_fails"] * 5
    scores = pd.DataFrame([row(v, -2.0 if v == "model_fails" else 2.0, template=f"t{i % 10}") for i, v in enumerate(verdicts)])
    interval, judged = right_for_another_reason(scores), scores[:20]
    assert (interval.estimate, interval.n, interval.n_clusters) == (8 / 20, 20, 10)
    assert interval == cluster_interval(judged.verdict != "active", judged.template)
    mixed = scores.sample(frac=1, random_state=0)
    assert right_and_active(mixed).equals(right_and_active(scores)) and right_for_another_reason(mixed).low == pytest.approx(interval.low)


def test_nothing_judged_and_missing_columns():
    nobody = right_for_another_reason(pd.DataFrame([row("undecided"), row("model_fails", -1.0)]))
    assert math.isnan(nobody.estimate) and nobody.n == 0 and "judged" in nobody.method
    for f in (right_and_active, right_for_another_reason):
        with pytest.raises(InputError, match="no column verdict"): f(pd.DataFrame([row("active")]).drop(columns="verdict"))
        with pytest.raises(InputError, match="no rows"): f(pd.DataFrame([row("active")])[:0])


def test_cells_of_a_scored_set(compiled):
    scores = CircuitScorer(compiled, "compiled-ioi-ioi").score(make_prompts("ioi", n=36, tokenizer=compiled.tokenizer), n_random=0, profile=False)
    counts = right_and_active(scores)
    assert counts.loc["right"].sum() == (scores.ld_model > 0).sum() and counts.loc["right", "active"] == scores.active.sum() > 0


# ---- variance components


def balanced(n_templates=8, n_pairs=12, seed=0, spread=(1.0, 0.7, 0.5)):
    rng = np.random.default_rng(seed)
    grid = rng.normal(0, spread[0], (n_templates, 1)) + rng.normal(0, spread[1], (1, n_pairs)) + rng.normal(0, spread[2], (n_templates, n_pairs))
    t, p = np.indices(grid.shape)
    table = pd.DataFrame(dict(variant="base", template=t.ravel().astype(str), answer=p.ravel().astype(str), distractor="x", score=grid.ravel()))
    return grid, table


def draw_scores(rng, template=0.3, pair=0.4, residual=0.5, n_variants=9, n=60, n_templates=12):
    "In the shape of a measurement: templates inside variants, name pairs that come back in two variants of three."
    v, i = (x.ravel() for x in np.indices((n_variants, n)))
    names, t = np.where(v % 3 == 2, i + n * (v // 3 + 1), i), v * n_templates + i % n_templates
    y = v / 10 + rng.normal(0, template, t.max() + 1)[t] + rng.normal(0, pair, names.max() + 1)[names] + rng.normal(0, residual, len(v))
    return pd.DataFrame(dict(variant=v.astype(str), template=t.astype(str), answer=names.astype(str), distractor="x", score=y))


def restricted_likelihood(table, variances):
    "REML log-likelihood, up to a constant, with every matrix written out."
    x, zs = (pd.get_dummies(c).to_numpy(float) for c in (table.variant, table.template)), pd.get_dummies(table.answer).to_numpy(float)
    x, zt = x
    v = variances[0] * zt @ zt.T + variances[1] * zs @ zs.T + variances[2] * np.eye(len(table))
    inverse = np.linalg.inv(v)
    information = x.T @ inverse @ x
    y = table.score.to_numpy()
    left = y - x @ np.linalg.solve(information, x.T @ inverse @ y)
    return -0.5 * (np.linalg.slogdet(v)[1] + np.linalg.slogdet(information)[1] + left @ inverse @ left)


@pytest.mark.parametrize("seed", range(3))
def test_balanced_components_are_the_textbook_mean_squares(seed):
    grid, table = balanced(seed=seed)
    left = grid - grid.mean(0) - grid.mean(1, keepdims=True) + grid.mean()
    ms_t, ms_p, ms_e = 12 * grid.mean(1).var(ddof=1), 8 * grid.mean(0).var(ddof=1), (left**2).sum() / (7 * 11)
    found = variance_components(table)
    assert found.component.tolist() == ["template", "name pair", "residual"] and found.n_levels.tolist() == [8, 12, 96]
    assert found.variance.tolist() == pytest.approx([(ms_t - ms_e) / 12, (ms_p - ms_e) / 8, ms_e], rel=0.01)
    assert found.share.sum() == pytest.approx(1) and (found.note == "").all()


@pytest.mark.parametrize("spread", [dict(), dict(pair=0.0), dict(template=0.0), dict(template=0.0, pair=0.0)])
def test_unbalanced_components_are_the_best_that_brute_force_finds(spread):
    table = draw_scores(np.random.default_rng(5), **spread, n_variants=4, n=24, n_templates=6)
    found = variance_components(table).variance.to_numpy()
    best = optimize.minimize(lambda x: -restricted_likelihood(table, np.exp(x)), np.log([0.1, 0.1, 0.2]), method="Nelder-Mead",
                             options=dict(xatol=1e-4, fatol=1e-8, maxiter=2000))
    assert restricted_likelihood(table, np.maximum(found, 1e-9)) >= -best.fun - 1e-3
    assert found == pytest.approx(np.exp(best.x), abs=0.01)


def test_a_component_at_zero_is_an_answer():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(variant="0", template=(np.arange(60) % 12).astype(str), answer=np.arange(60).astype(str), distractor="x",
                              score=np.repeat(rng.normal(size=5), 12)))  # every template has the same five values
    found = variance_components(table)
    assert found.variance[0] == pytest.approx(0, abs=1e-4) and found.note[0] == "" and found.variance[2] == pytest.approx(table.score.var(), rel=0.01)


def test_order_scale_and_shift():
    table = draw_scores(np.random.default_rng(0), n_variants=3)
    found = variance_components(table)
    mixed = variance_components(table.sample(frac=1, random_state=1))
    scaled = variance_components(table.assign(gap=1000 * table.score + 5), "gap")
    assert mixed.variance.tolist() == pytest.approx(found.variance.tolist(), rel=0.01)
    assert scaled.variance.tolist() == pytest.approx((1e6 * found.variance).tolist(), rel=0.01)


def test_what_cannot_be_told_apart_is_said():
    table = draw_scores(np.random.default_rng(0), n_variants=3)
    once = variance_components(table[table.variant == "0"])
    assert once.variance.isna().tolist() == [False, True, False] and "comes twice" in once.note[1]
    single = variance_components(table.assign(template=table.variant))
    assert single.variance.isna().tolist() == [True, False, False] and "one level a variant" in single.note[0]
    same = variance_components(table.assign(template=table.answer))
    assert same.variance.isna().tolist() == [True, True, False] and same.note.str.contains("same groups").tolist() == [True, True, False]
    within = table.score - table.groupby("variant").score.transform("mean")
    assert same.variance[2] == pytest.approx((within**2).sum() / (len(table) - 3))


def test_rows_without_a_value_are_left_out_and_degenerate_tables_are_explained():
    table = draw_scores(np.random.default_rng(0), n_variants=3)
    holes = variance_components(pd.concat([table, table.assign(score=math.nan), table.assign(score=math.inf)]))
    assert holes.n_levels[2] == len(table) and holes.variance.tolist() == pytest.approx(variance_components(table).variance.tolist())
    flat = variance_components(table.assign(score=table.variant.astype(float)))
    assert flat.variance.isna().all() and (flat.note == "no variance within the variants").all()
    exact = variance_components(table.assign(score=table.template.astype(float) % 7))
    assert exact.variance.isna().all() and exact.note.str.contains("failed").all()
    assert variance_components(table.assign(score=math.nan)).variance.isna().all()
    with pytest.raises(InputError, match="no column template"): variance_components(table.drop(columns="template"))
    with pytest.raises(InputError, match="no column gap"): variance_components(table, "gap")


@pytest.mark.slow
@pytest.mark.parametrize("template, pair", [(0.3, 0.4), (0.0, 0.4), (0.3, 0.0)])
def test_known_components_are_recovered(template, pair):
    rng = np.random.default_rng(0)
    found = np.mean([variance_components(draw_scores(rng, template, pair)).variance for _ in range(25)], axis=0)
    assert found == pytest.approx([template**2, pair**2, 0.25], rel=0.12, abs=0.008)


@pytest.mark.slow
def test_a_full_measurement_is_decomposed_within_a_minute():
    from time import process_time

    start = process_time()
    found = variance_components(draw_scores(np.random.default_rng(0), n_variants=34, n=100))
    assert found.n_levels.tolist() == [408, 1200, 3400] and process_time() - start < 60
    assert found.variance.tolist() == pytest.approx([0.09, 0.16, 0.25], rel=0.2)
