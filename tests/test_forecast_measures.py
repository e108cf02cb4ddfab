"""Measures of a forecast: against loops, scikit-learn and statsmodels, at their degenerate ends, and by simulated coverage."""

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats as distributions
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from circuit_generalization.discrimination import auroc, auroc_difference
from circuit_generalization.errors import InputError
from circuit_generalization.forecast_measures import (
    _fewest,
    _jackknife,
    _pairing,
    _precision,
    _pseudo_values_inside,
    _without_each,
    average_precision,
    average_precision_difference,
    brier,
    brier_difference,
    brier_skill,
    calibration,
    draw_forecasts,
    permutation_p,
    reliability,
    stratified_auroc,
    stratified_auroc_difference,
)
from circuit_generalization.stats import MIN_CLUSTERS, _effective_n, clustered_mean, cr2_interval, ratio_interval, share_interval

values = st.integers(-3, 3).map(float)  # few values, so that there are ties


@st.composite
def scored(draw, columns=1, strata=3, low=MIN_CLUSTERS):
    "`columns` scores, truth, cluster and stratum labels: unequal clusters, each with both kinds, prompts in any order."
    sizes = draw(st.lists(st.integers(2, 5), min_size=low, max_size=low + 4))
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    truth = np.concatenate([[True, False] + draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2)) for n in sizes]).astype(bool)
    order, n = np.array(draw(st.permutations(range(len(truth))))), len(truth)
    lists = [np.array(draw(st.lists(values, min_size=n, max_size=n))) for _ in range(columns)]
    labels = np.array(draw(st.lists(st.integers(0, strata - 1), min_size=n, max_size=n)))
    return *lists, truth[order], clusters[order], labels


def made(areas=(0.8,), g=24, prevalence=0.3, seed=0, **options):
    scores, truth, clusters, strata = draw_forecasts(np.random.default_rng(seed), areas, prevalence, g, **options)
    return *scores, truth, clusters, strata


def inside_pairs(scores, truth, strata):
    "Wins of all pairs of one stratum, one by one."
    return [float(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i, j in itertools.product(range(len(truth)), repeat=2)
            if truth[i] and not truth[j] and strata[i] == strata[j]]


def has_pairs(truth, strata):
    return any({*truth[strata == k]} == {True, False} for k in set(strata))


def ends(interval):
    return interval.low, interval.high


# ---- the drawn world


def test_drawn_forecasts_have_the_areas_the_prevalence_and_the_correlations_asked_for():
    a, b, truth, clusters, strata = made((0.8, 0.6), g=3000, prevalence=0.2, n_strata=2)
    assert [roc_auc_score(truth[strata == 1], s[strata == 1]) for s in (a, b)] == pytest.approx([0.8, 0.6], abs=0.02)
    assert truth.mean() == pytest.approx(0.2, abs=0.01) and a[~truth].std() == pytest.approx(1, abs=0.02)
    assert np.corrcoef(a[~truth], b[~truth])[0, 1] == pytest.approx(0.6, abs=0.02)
    means = pd.DataFrame({"c": clusters[~truth], "s": strata[~truth], "x": a[~truth]}).groupby(["c", "s"]).x.mean().unstack()
    assert means.cov().iloc[0, 1] == pytest.approx(0.15, abs=0.03)  # what two models share on a template
    assert clusters.max() == 2999 and set(strata) == {0, 1} and (np.bincount(clusters[strata == 0]) == np.bincount(clusters[strata == 1])).all()


# ---- stratified AUROC: the estimate


@given(scored())
def test_stratified_auroc_counts_the_pairs_of_each_stratum(case):
    scores, truth, clusters, strata = case
    assume(has_pairs(truth, strata))
    found, wins = stratified_auroc(scores, truth, clusters, strata), inside_pairs(scores, truth, strata)
    assert found.estimate == pytest.approx(np.mean(wins)) and found.n_pairs == len(wins)
    usable = [k for k in set(strata) if len(set(truth[strata == k])) == 2]
    assert found.n_strata == len(usable) and found.n_strata + found.strata_left_out == len(set(strata))
    assert found.n == np.isin(strata, usable).sum() and found.n + found.prompts_left_out == len(truth)
    assert found.n_clusters == len(set(clusters[np.isin(strata, usable)]))


def test_strata_weigh_by_their_pairs():
    truth = np.array([1, 1, 0, 0, 1, 0], bool)
    scores, strata = np.array([4, 3, 2, 1, 0, 9.0]), list("aaaabb")  # AUROC 1 from four pairs, 0 from one
    found = stratified_auroc(scores, truth, range(6), strata)
    assert found.estimate == pytest.approx(0.8) and (found.n_pairs, found.n_strata, found.method) == (5, 2, "too few templates")


def test_a_stratum_of_one_kind_is_left_out_and_counted():
    scores, truth, clusters, strata = made()
    before = stratified_auroc(scores, truth, clusters, strata)
    more = np.append(scores, [9, -9]), np.append(truth, [True, True]), np.append(clusters, [0, 99]), np.append(strata, [7, 8])
    after = stratified_auroc(*more)
    assert (after.strata_left_out, after.prompts_left_out) == (2, 2) and (before.strata_left_out, before.prompts_left_out) == (0, 0)
    assert (after.estimate, *ends(after), after.n, after.n_clusters) == (before.estimate, *ends(before), before.n, before.n_clusters)


@given(scored(columns=2))
def test_one_stratum_is_the_plain_auroc_and_difference(case):
    a, b, truth, clusters, _ = case
    one = ["all"] * len(truth)
    for ours, plain in ((stratified_auroc(a, truth, clusters, one), auroc(a, truth, clusters)),
                        (stratified_auroc_difference(a, b, truth, clusters, one), auroc_difference(a, b, truth, clusters))):
        assert (ours.n, ours.n_clusters, ours.level) == (plain.n, plain.n_clusters, plain.level)
        assert ours.estimate == pytest.approx(plain.estimate, abs=1e-12)
        if math.isfinite(plain.low) and math.isfinite(ours.low):  # equal scores: rounding decides whether there is any variation
            assert ends(ours) == pytest.approx(ends(plain), abs=1e-6) and ours.method == plain.method


# ---- its interval


def pseudo_values(scores, truth, clusters, strata):
    "The formula of the notebook, prompt by prompt."
    held = {k: min(len({*clusters[(strata == k) & truth]}), len({*clusters[(strata == k) & ~truth]})) for k in set(strata)}
    kept = [i for i in range(len(truth)) if held[strata[i]]]
    rivals = {i: [j for j in kept if strata[j] == strata[i] and truth[j] != truth[i]] for i in kept}
    place = {i: np.mean([(scores[i] > scores[j]) == truth[i] if scores[i] != scores[j] else 0.5 for j in rivals[i]]) for i in kept}
    whole = min(len({clusters[i] for i in kept if truth[i]}), len({clusters[i] for i in kept if not truth[i]}))
    shared = [i for i in kept if held[strata[i]] < 3]
    total, out = sum(len(r) for r in rivals.values()), []
    area = sum(len(rivals[i]) * place[i] for i in kept) / total
    for i in kept:
        group = shared if held[strata[i]] < 3 else [j for j in kept if strata[j] == strata[i]]
        middle = sum(len(rivals[j]) * place[j] for j in group) / sum(len(rivals[j]) for j in group)
        f = held[strata[i]] if held[strata[i]] >= 3 else whole
        factor = math.sqrt(f / max(f - 1, 1) / (whole / (whole - 1)))
        out.append(area + 2 * len(kept) * len(rivals[i]) / total * factor * (place[i] - middle))
    return np.array(out)


@given(scored(strata=6))
def test_pseudo_values_are_those_of_the_formula(case):
    scores, truth, clusters, strata = case
    assume(has_pairs(truth, strata))
    who = _pairing(truth, clusters, strata)
    assume(min(len({*who.clusters[who.truth]}), len({*who.clusters[~who.truth]})) > 1)
    found = _pseudo_values_inside(scores, who)
    assert found == pytest.approx(pseudo_values(scores, truth, clusters, strata))
    assert found.mean() == pytest.approx(np.mean(inside_pairs(scores, truth, strata)))


def test_a_stratum_has_its_own_middle_where_three_templates_hold_both_kinds():
    # each template has one prompt of each kind; stratum a has 8 templates and AUROC 1, b has 3 and AUROC 0
    truth, clusters = np.tile([True, False], 11), np.repeat(np.arange(11), 2)
    strata = np.where(clusters < 8, "a", "b")
    scores = np.where(strata == "a", truth, ~truth).astype(float)
    assert np.ptp(_pseudo_values_inside(scores, _pairing(truth, clusters, strata))) == pytest.approx(0)  # that a and b differ is no variation
    strata = np.where(clusters < 9, "a", "b")  # two templates are too few for a middle, but alone in sharing it
    scores = np.where(strata == "a", truth, ~truth).astype(float)
    assert np.ptp(_pseudo_values_inside(scores, _pairing(truth, clusters, strata))) == pytest.approx(0)
    strata = np.select([clusters < 7, clusters < 9], ["a", "b"], "c")  # b and c share a middle of 1/2
    scores = np.where(strata != "c", truth, ~truth).astype(float)
    found = _pseudo_values_inside(scores, _pairing(truth, clusters, strata))
    area = (49 + 4) / (49 + 4 + 4)
    assert found[strata == "a"] == pytest.approx(area)
    assert found[strata == "b"] == pytest.approx(area + 22 * 2 / 57 * 0.5) and found[strata == "c"] == pytest.approx(area - 22 * 2 / 57 * 0.5)


def test_an_own_middle_is_paid_for_by_a_larger_deviation():
    _, truth, clusters, _ = made()
    scores = np.random.default_rng(0).normal(size=len(truth))
    strata = clusters // 6
    who = _pairing(truth, clusters, strata)
    fewest = _fewest(who.truth, who.clusters, who.strata)
    whole = _fewest(who.truth, who.clusters, 0 * who.strata)[0]
    assert (fewest >= 3).all()
    values = _pseudo_values_inside(scores, who)
    first = _pairing(truth[strata == 0], clusters[strata == 0], strata[strata == 0])
    alone = _pseudo_values_inside(scores[strata == 0], first)  # its factor is 1
    scale = len(truth) * first.pairs.sum() / who.pairs.sum() / len(alone)
    factor = math.sqrt(fewest[0] / (fewest[0] - 1) * (whole - 1) / whole)
    assert values[strata == 0] - values.mean() == pytest.approx(scale * factor * (alone - alone.mean()))


@given(scored(), st.sampled_from([np.exp, np.cbrt, lambda x: 7 * x - 100, lambda x: np.where(x == 3, np.inf, x)]))
def test_only_the_order_inside_a_stratum_counts(case, rising):
    scores, truth, clusters, strata = case
    assume(has_pairs(truth, strata))
    found = stratified_auroc(scores, truth, clusters, strata)
    np.testing.assert_equal(vars(stratified_auroc(rising(scores), truth, clusters, strata)), vars(found))
    np.testing.assert_equal(vars(stratified_auroc(scores + 100.0 * strata, truth, clusters, strata)), vars(found))


@given(scored())
def test_stratified_interval_mirrors_ignores_order_and_names_and_has_width(case):
    scores, truth, clusters, strata = case
    assume(has_pairs(truth, strata))
    found, order = stratified_auroc(scores, truth, clusters, strata), np.random.default_rng(0).permutation(len(truth))
    assume(math.isfinite(found.low))
    assert 0 <= found.low <= found.estimate <= found.high <= 1 and found.high - found.low > 0.05
    turned = stratified_auroc(-scores, truth, clusters, strata)
    assert (1 - turned.high, 1 - turned.low) == pytest.approx(ends(found), abs=1e-9)
    renamed = stratified_auroc(scores[order].tolist(), truth[order].astype(int).tolist(), [f"t{c}" for c in clusters[order]],
                               [("model", int(k)) for k in strata[order]])
    assert (renamed.estimate, *ends(renamed)) == pytest.approx((found.estimate, *ends(found)))
    narrower = stratified_auroc(scores, truth, clusters, strata, level=0.5)
    assert found.low <= narrower.low <= narrower.high <= found.high


def test_a_perfect_and_a_constant_score_have_an_interval():
    truth, clusters, strata = np.tile([True, False], 90), np.repeat(np.arange(15), 12), np.tile([0, 0, 1, 1], 45)
    perfect, constant = (stratified_auroc(s, truth, clusters, strata) for s in (truth, 0 * truth))
    assert (perfect.estimate, perfect.high) == (1, 1) and perfect.low == pytest.approx(0.8588, abs=1e-4)  # as one stratum of 15 templates
    assert constant.estimate == 0.5 and constant.low < 0.45 and constant.high > 0.55
    same = stratified_auroc_difference(truth, 3.0 * truth, truth, clusters, strata)
    assert same.estimate == 0 and same.high == -same.low == pytest.approx(distributions.t.ppf(0.975, 14) * math.sqrt(2) * 0.5 / 16)
    assert stratified_auroc_difference(0 * truth, 0 * truth, truth, clusters, strata).method == "no variation between templates"


def test_rounding_does_not_push_a_perfect_area_above_one():
    for seed in range(20):
        _, truth, clusters, strata = made(seed=seed)
        assert stratified_auroc(truth, truth, clusters, strata).high == 1
        assert stratified_auroc(~truth, truth, clusters, strata).low == 0


@given(scored(columns=2))
def test_stratified_difference_is_that_of_the_areas_and_turns_round(case):
    a, b, truth, clusters, strata = case
    assume(has_pairs(truth, strata))
    found, back = (stratified_auroc_difference(*pair, truth, clusters, strata) for pair in ((a, b), (b, a)))
    areas = [stratified_auroc(x, truth, clusters, strata) for x in (a, b)]
    assert found.estimate == pytest.approx(areas[0].estimate - areas[1].estimate, abs=1e-12)
    assert all(getattr(found, name) == getattr(areas[0], name) for name in ("n", "n_pairs", "n_strata", "strata_left_out", "prompts_left_out"))
    assert (back.estimate, back.low, back.high) == pytest.approx((-found.estimate, -found.high, -found.low), nan_ok=True)


def test_difference_of_strata_by_hand():
    a, b, truth, clusters, strata = made((0.85, 0.7))
    found = stratified_auroc_difference(a, b, truth, clusters, strata)
    psi = [pseudo_values(s, truth, clusters, strata) for s in (a, b)]
    summary = clustered_mean(psi[0] - psi[1], clusters)
    held = min(len({*clusters[truth]}), len({*clusters[~truth]}))
    se = math.sqrt(summary.se**2 + sum(((p.mean() - 0.5) / (held + 1)) ** 2 for p in psi))
    half = distributions.t.ppf(0.975, min(summary.dof, held - 1)) * se
    assert ends(found) == pytest.approx((found.estimate - half, found.estimate + half))


# ---- average precision


@given(scored(), st.booleans())
def test_average_precision_is_scikit_learns(case, infinite):
    scores, truth, clusters, _ = case
    found = average_precision(np.where(scores == 3, np.inf, scores) if infinite else scores, truth, clusters)
    assert found.estimate == pytest.approx(average_precision_score(truth, scores))
    assert found.base_rate == pytest.approx(truth.mean()) and (found.n, found.n_clusters) == (len(truth), len(set(clusters)))
    assert 0 <= found.low <= found.estimate <= found.high <= 1 and found.high - found.low > 0.05


def test_average_precision_by_hand():
    scores, truth = np.array([5, 4, 4, 3, 1.0]), np.array([1, 1, 0, 0, 1], bool)
    assert _precision(scores, truth, np.ones((1, 5), bool))[0] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert _precision(scores, truth, np.array([[False, True, True, True, True]]))[0] == pytest.approx((1 / 2 + 2 / 4) / 2)


@given(scored())
def test_leaving_out_a_cluster_is_scikit_learns_average_precision_of_the_others(case):
    scores, truth, clusters, _ = case
    order = pd.unique(clusters)
    left = [average_precision_score(truth[clusters != c], scores[clusters != c]) for c in order]
    found = _without_each(scores, truth, clusters)
    assert found == pytest.approx(left)
    g = len(left)
    assert _jackknife(found) == pytest.approx((g - 1) / g * sum((x - np.mean(left)) ** 2 for x in left))


def test_its_interval_is_wilsons_for_the_jackknife_variance_and_one_more_template():
    scores, truth, clusters, _ = made(g=30)
    found, g = average_precision(scores, truth, clusters), len(set(clusters))
    left = np.array([average_precision_score(truth[clusters != c], scores[clusters != c]) for c in range(g)])
    held = len({*clusters[truth]})
    more = (found.estimate - truth.mean()) / (held + 1)
    shifted = found.estimate - more
    n = shifted * (1 - shifted) / ((g - 1) / g * ((left - left.mean()) ** 2).sum() + more**2)
    t = distributions.t.ppf(0.975, min(held - 1, clustered_mean(truth, clusters).dof))
    assert ends(found) == pytest.approx(proportion_confint(found.estimate * n, n, 2 * distributions.norm.sf(t), method="wilson"))


def test_perfect_constant_and_rare_average_precision():
    truth, clusters = np.tile([True, False], 90), np.repeat(np.arange(15), 12)
    perfect, constant = average_precision(truth, truth, clusters), average_precision(0 * truth, truth, clusters)
    assert (perfect.estimate, perfect.high) == (1, pytest.approx(1)) and 0.7 < perfect.low < 0.95
    assert perfect.low < average_precision(np.tile(truth, 4), np.tile(truth, 4), np.repeat(np.arange(60), 12)).low
    assert constant.estimate == constant.base_rate == 0.5 and constant.high - constant.low > 0.1
    spread = clustered_mean(truth, clusters)
    n = _effective_n(0.25, spread)  # nothing varies between these templates, so the number of prompts bounds what they are worth
    assert n < 2 * len(truth)
    rare = average_precision(truth, truth & (clusters < 7), clusters)
    assert rare.method == "too few templates with one of the two kinds" and math.isnan(rare.low) and rare.base_rate == pytest.approx(42 / 180)
    few = average_precision(truth, truth, clusters % 7)
    assert few.method == "too few templates" and few.estimate == 1


@given(scored(columns=2))
def test_difference_of_average_precisions_turns_round(case):
    a, b, truth, clusters, _ = case
    found, back = (average_precision_difference(*pair, truth, clusters) for pair in ((a, b), (b, a)))
    assert found.estimate == pytest.approx(average_precision_score(truth, a) - average_precision_score(truth, b), abs=1e-12)
    assert (back.estimate, back.low, back.high) == pytest.approx((-found.estimate, -found.high, -found.low), nan_ok=True)
    assert found.base_rate == pytest.approx(truth.mean()) and (math.isnan(found.low) or -1 <= found.low < found.high <= 1)


def test_difference_of_average_precisions_by_hand():
    a, b, truth, clusters, _ = made((0.85, 0.7))
    found, g, held = average_precision_difference(a, b, truth, clusters), len(set(clusters)), len({*clusters[truth]})
    left = [average_precision_score(truth[clusters != c], a[clusters != c]) - average_precision_score(truth[clusters != c], b[clusters != c])
            for c in range(g)]
    more = [(average_precision_score(truth, s) - truth.mean()) / (held + 1) for s in (a, b)]
    se = math.sqrt((g - 1) / g * ((left - np.mean(left)) ** 2).sum() + more[0] ** 2 + more[1] ** 2)
    half = distributions.t.ppf(0.975, min(held - 1, clustered_mean(truth, clusters).dof)) * se
    assert ends(found) == pytest.approx((found.estimate - half, found.estimate + half))


def test_two_constant_scores_have_no_interval_of_their_difference():
    truth, clusters = np.tile([True, False], 12), np.repeat(np.arange(12), 2)
    found = average_precision_difference(np.zeros(24), np.ones(24), truth, clusters)
    assert found.estimate == 0 and found.method == "no variation between templates" and math.isnan(found.low)
    rare, clusters = np.tile([True] + 9 * [False], 12), np.repeat(np.arange(12), 10)
    widest, turned = (average_precision_difference(*pair, rare, clusters) for pair in ((rare, ~rare), (~rare, rare)))
    assert widest.estimate == pytest.approx(0.9) and widest.high == 1 and turned.low == -1


# ---- Brier score


def risky(area=0.8, g=24, seed=0, **options):
    scores, truth, clusters, strata = made((area,), g=g, seed=seed, **options)
    return expit(scores - 1), truth, clusters, strata


def test_brier_is_scikit_learns_and_its_interval_that_of_a_mean():
    risk, truth, clusters, _ = risky()
    found, plain = brier(risk, truth, clusters), cr2_interval((risk - truth) ** 2, clusters)
    assert found == plain and found.estimate == pytest.approx(brier_score_loss(truth, risk))
    other = expit(-logit(risk))
    difference, back = brier_difference(risk, other, truth, clusters), brier_difference(other, risk, truth, clusters)
    assert difference == cr2_interval((risk - truth) ** 2 - (other - truth) ** 2, clusters)
    assert difference.estimate == pytest.approx(brier_score_loss(truth, risk) - brier_score_loss(truth, other)) and difference.high < 0
    assert (back.low, back.high) == pytest.approx((-difference.high, -difference.low))


def test_brier_scores_stay_inside_their_bounds():
    truth, clusters = np.zeros(80, bool), np.repeat(np.arange(8), 10)
    risk = np.where(clusters == 0, 1.0, 0.0)  # wrong on one template of eight
    assert cr2_interval(risk, clusters).low < 0
    found, mirror = brier(risk, truth, clusters), brier(1 - risk, truth, clusters)
    assert found.low == 0 and found.estimate == 0.125 and mirror.high == 1
    assert brier_difference(risk, 1 - risk, truth, clusters).low == -1 and brier_difference(1 - risk, risk, truth, clusters).high == 1
    right = brier(truth, truth, clusters)
    assert right.estimate == 0 and right.method == "no variation between templates" and math.isnan(right.low)


def test_skill_is_one_minus_the_ratio_of_the_errors():
    risk, truth, clusters, _ = risky()
    base = np.full(len(truth), 0.3)
    found, ratio = brier_skill(risk, base, truth, clusters), ratio_interval((risk - truth) ** 2, (base - truth) ** 2, clusters)
    assert (found.estimate, found.low, found.high) == pytest.approx((1 - ratio.estimate, 1 - ratio.high, 1 - ratio.low))
    assert found.estimate == pytest.approx(1 - brier_score_loss(truth, risk) / brier_score_loss(truth, base))
    nearly = np.where(clusters == 0, 1 - truth, truth)  # wrong on one template only: the ratio's lower end is below 0
    assert ratio_interval((nearly - truth) ** 2, (base - truth) ** 2, clusters).low < 0 and brier_skill(nearly, base, truth, clusters).high == 1
    assert brier_skill(truth, base, truth, clusters).estimate == 1 and found.method == "Fieller, CR2 t"
    perfect = brier_skill(risk, truth, truth, clusters)
    assert math.isnan(perfect.estimate + perfect.low) and perfect.method == "the error of the reference is zero"


# ---- calibration


def newton(truth, columns, offset):
    "Logistic regression and its clusterable scores, by hand."
    beta = np.zeros(columns.shape[1])
    for _ in range(50):
        p = expit(columns @ beta + offset)
        hessian = (columns * (p * (1 - p))[:, None]).T @ columns
        beta = beta + np.linalg.solve(hessian, columns.T @ (truth - p))
    return beta, (truth - expit(columns @ beta + offset))[:, None] * columns, hessian


def test_calibration_is_a_logistic_regression_with_a_sandwich_over_clusters():
    risk, truth, clusters, _ = risky()
    found, x, one = calibration(risk, truth, clusters), logit(risk), np.ones((len(risk), 1))
    g, n, held = len(set(clusters)), len(risk), len({*clusters[truth]})
    t = distributions.t.ppf(0.975, min(held - 1, clustered_mean(truth, clusters).dof))
    for interval, columns, offset in ((found.in_the_large, one, x), (found.slope, np.column_stack([one, x]), 0 * x)):
        beta, scores, hessian = newton(truth, columns, offset)
        sums = np.array([scores[clusters == c].sum(0) for c in range(g)])
        bread, k = np.linalg.inv(hessian), columns.shape[1]
        se = math.sqrt((bread @ sums.T @ sums @ bread * g / (g - 1) * (n - 1) / (n - k))[-1, -1])
        assert interval.estimate == pytest.approx(beta[-1], abs=1e-6)
        assert ends(interval) == pytest.approx((beta[-1] - t * se, beta[-1] + t * se), abs=1e-6)
        assert (interval.n, interval.n_clusters) == (n, g)
    assert found.n_clipped == 0


@given(st.floats(-1, 1), st.floats(0.3, 3))
def test_calibration_follows_shifts_and_scales_of_the_log_odds(shift, scale):
    risk, truth, clusters, _ = risky(g=10)
    exact, moved, scaled = (calibration(expit(x), truth, clusters, least=1e-9) for x in (logit(risk), logit(risk) + shift, scale * logit(risk)))
    assert moved.in_the_large.estimate == pytest.approx(exact.in_the_large.estimate - shift, abs=1e-6)
    assert scaled.slope.estimate == pytest.approx(exact.slope.estimate / scale, rel=1e-5)
    assert scaled.slope.high - scaled.slope.low == pytest.approx((exact.slope.high - exact.slope.low) / scale, rel=1e-4)


def test_risks_of_zero_and_one_count_as_the_least():
    risk, truth, clusters, _ = risky()
    hard, soft = risk.copy(), risk.copy()
    hard[:4], soft[:4] = [0, 1, 0.0004, 0.9999], [0.001, 0.999, 0.001, 0.999]
    found, expected = calibration(hard, truth, clusters), calibration(soft, truth, clusters)
    assert found.n_clipped == 4 and expected.n_clipped == 0
    assert (found.slope, found.in_the_large) == (expected.slope, expected.in_the_large)
    bounded = calibration(hard, truth, clusters, least=0.1)
    assert bounded.slope == calibration(np.clip(hard, 0.1, 0.9), truth, clusters).slope
    assert bounded.n_clipped == ((hard < 0.1) | (hard > 0.9)).sum() > 4


@pytest.mark.parametrize("false, true, slope, why", [
    ((0.1, 0.2), (0.3, 0.4), math.inf, "higher risk"),
    ((0.1, 0.3), (0.3, 0.4), math.inf, "higher risk"),
    ((0.3, 0.4), (0.1, 0.2), -math.inf, "lower risk"),
    ((0.3, 0.3), (0.3, 0.2), -math.inf, "lower risk"),
    ((0.3, 0.3), (0.3, 0.3), math.nan, "alike")])
def test_where_no_slope_fits_it_says_why_and_warns_of_nothing(false, true, slope, why):
    truth, clusters = np.tile([False, False, True, True], 10), np.repeat(np.arange(10), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibration(np.tile([*false, *true], 10), truth, clusters)
    assert found.slope.estimate == slope or math.isnan(slope) and math.isnan(found.slope.estimate)
    assert why in found.slope.method and math.isnan(found.slope.low) and math.isfinite(found.in_the_large.estimate)
    overlap = calibration(np.tile([0.1, 0.3, 0.2, 0.4], 10), truth, clusters)
    assert math.isfinite(overlap.slope.estimate)


def test_constant_risks_are_right_in_the_large_at_the_base_rate():
    _, truth, clusters, _ = risky()
    found = calibration(np.full(len(truth), truth.mean()), truth, clusters)
    assert found.in_the_large.estimate == pytest.approx(0, abs=1e-9) and found.in_the_large.low < 0 < found.in_the_large.high
    assert found.slope.method == "all risks are alike"


def test_few_templates_leave_the_estimates_of_calibration():
    risk, truth, clusters, _ = risky()
    whole, few = calibration(risk, truth, clusters), calibration(risk, truth, clusters % 5)
    single = calibration(risk, truth, 0 * clusters)
    for found in (few, single):
        assert (found.slope.estimate, found.in_the_large.estimate) == pytest.approx((whole.slope.estimate, whole.in_the_large.estimate))
        assert math.isnan(found.slope.low) and found.slope.method == found.in_the_large.method == "too few templates"


# ---- reliability


def test_reliability_by_hand():
    risk = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6] * 10)
    truth, clusters = np.tile([0, 0, 1, 0, 1, 1], 10), np.repeat(np.arange(10), 6)
    table = reliability(risk, truth, clusters, 3)
    assert table.mean_risk.tolist() == pytest.approx([0.15, 0.35, 0.55]) and table.share.tolist() == [0, 0.5, 1]
    assert table.n.tolist() == [20] * 3 and table.n_clusters.tolist() == [10] * 3
    inside = (risk > 0.25) & (risk < 0.45)
    assert (table.low[1], table.high[1]) == ends(share_interval(truth[inside], clusters[inside]))
    assert reliability(risk, truth, clusters, 3, level=0.5).high[1] < table.high[1]
    assert list(table) == ["mean_risk", "share", "low", "high", "n", "n_clusters", "method"]


@given(scored(), st.integers(1, 12))
def test_reliability_keeps_equal_risks_together_and_loses_no_prompt(case, bins):
    scores, truth, clusters, _ = case
    risk = (scores + 3) / 6
    table = reliability(risk, truth, clusters, bins)
    assert table.n.sum() == len(truth) and 1 <= len(table) <= min(bins, len(set(risk)))
    assert (table.share * table.n).sum() == pytest.approx(truth.sum()) and (table.mean_risk * table.n).sum() == pytest.approx(risk.sum())
    assert table.mean_risk.is_monotonic_increasing and table.mean_risk.is_unique


@given(st.integers(1, 40), st.integers(20, 60))
def test_bins_of_different_risks_have_equal_counts(bins, n):
    table = reliability(np.random.default_rng(n).permutation(n) / n, np.arange(n) % 2, np.arange(n), bins)
    assert len(table) == min(bins, n) and table.n.max() - table.n.min() <= 1


def test_a_bin_of_few_templates_says_so():
    risk, truth, clusters, _ = risky()
    table = reliability(risk, truth, clusters, 60)
    assert (table.method == "too few templates").any() and table.low.isna().any() and table.share.notna().all()
    assert len(reliability(np.full(len(truth), 0.2), truth, clusters)) == 1


# ---- permutations


def test_permuted_labels_keep_the_counts_of_each_stratum():
    _, truth, _, strata = made()
    seen = []
    permutation_p(lambda t: seen.append(t.copy()) or 0.0, truth, strata, n=50)
    assert len(seen) == 51 and (seen[0] == truth).all() and any((t != truth).any() for t in seen)
    assert all((np.bincount(strata, t) == np.bincount(strata, truth)).all() for t in seen)


def test_permutation_p_approaches_the_enumerated_one():
    risk, truth, strata = np.array([3, 2, 1, 5, 4, 0.0]), np.array([1, 0, 0, 1, 0, 0], bool), list("aaabbb")
    def statistic(t): return risk[t].sum()
    deals = [statistic(np.isin(range(6), (i, 3 + j))) for i in range(3) for j in range(3)]
    exact = np.mean([d >= statistic(truth) for d in deals])
    assert exact == 1 / 9
    n = 20_000
    found = permutation_p(statistic, truth, strata, n=n, seed=1)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / n))
    whole = permutation_p(statistic, truth, ["all"] * 6, n=n, seed=1)  # 8 is reached by 5 + 3 and 5 + 4 of 15 pairs
    assert whole == pytest.approx(2 / 15, abs=4 * math.sqrt(2 / 15 * 13 / 15 / n))


def test_permutation_p_counts_ties_and_is_never_zero():
    _, truth, clusters, _ = made()
    assert permutation_p(lambda t: 1.0, truth, clusters, n=19) == 1
    assert permutation_p(lambda t: float((t == truth).all()), truth, clusters, n=19) == 1 / 20
    assert math.isnan(permutation_p(lambda t: math.nan, truth, clusters, n=19))
    risk = np.random.default_rng(0).normal(size=len(truth))
    by_seed = [permutation_p(lambda t: risk[t].mean(), truth, clusters, n=99, seed=s) for s in (0, 0, 1, 2, 3)]
    assert by_seed[0] == by_seed[1] and len(set(by_seed)) > 1


def test_labels_dealt_inside_templates_are_right_and_over_the_whole_set_are_not():
    p = {"inside": [], "whole": []}
    for seed in range(150):
        rng, clusters = np.random.default_rng(seed), np.repeat(np.arange(12), 6)
        risk, outcome = (1.5 * rng.normal(size=12)[clusters] + rng.normal(size=72) for _ in range(2))
        for how, labels in (("inside", clusters), ("whole", 0 * clusters)):
            p[how].append(permutation_p(lambda t: risk[t].mean(), outcome > 0.5, labels, n=59, seed=seed))  # noqa: B023
    rejected = {how: np.mean(np.array(x) <= 0.05) for how, x in p.items()}
    assert rejected["inside"] < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150) and rejected["whole"] > 0.12


# ---- bad input


def refused(match, function, *arguments, **options):
    with pytest.raises(InputError, match=match):
        function(*arguments, **options)


def test_bad_scores_and_truths_are_refused_with_their_reason():
    risk, truth, clusters, strata = risky()
    holes, n = risk.copy(), len(risk)
    holes[[4, 9]] = np.nan
    single = [(f, (clusters,)) for f in (average_precision, brier, calibration, reliability)] + [(stratified_auroc, (clusters, strata))]
    for function, rest in single:
        refused(rf"2 of {n} scores are NaN \(positions 4, 9\)", function, holes, truth, *rest)
        refused("truth must be True or False", function, risk, truth + 1, *rest)
        refused("two lists of the same length", function, risk[1:], truth, *rest)
        refused("1 cluster labels|cluster labels: pass", function, risk, truth, rest[0][1:], *rest[1:])
        refused("cluster label is missing", function, risk, truth, [None, *rest[0][1:]], *rest[1:])
        refused("confidence level", function, risk, truth, *rest, level=95)
    paired = [(f, (clusters,)) for f in (average_precision_difference, brier_difference)] + [(stratified_auroc_difference, (clusters, strata))]
    for function, rest in paired:
        refused("positions 4, 9", function, risk, holes, truth, *rest)
        refused("positions 4, 9", function, holes, risk, truth, *rest)
        refused("two lists of the same length", function, risk, risk[1:], truth, *rest)
    refused("two lists of the same length", brier_skill, risk, risk[1:], truth, clusters)
    refused("positions 4, 9", brier_skill, risk, holes, truth, clusters)


def test_one_kind_only_is_refused_where_kinds_are_compared():
    risk, truth, clusters, strata = risky()
    n = len(truth)
    for function in (average_precision, calibration):
        refused(f"{n} true and 0 false prompts", function, risk, truth | True, clusters)
    refused(f"0 true and {n} false prompts", average_precision_difference, risk, risk, truth & False, clusters)
    for function in (stratified_auroc, lambda *a: stratified_auroc_difference(a[0], *a)):
        refused("none of 3 strata holds true and false prompts", function, risk, truth & False, clusters, strata)
        refused(f"none of {n} strata", function, risk, truth, clusters, range(n))
    refused(f"none of {n} strata", permutation_p, np.mean, truth, range(n))
    assert brier(risk, truth & False, clusters).estimate == pytest.approx((risk**2).mean())
    assert reliability(risk, truth & False, clusters).share.max() == 0


def test_risks_strata_and_options_out_of_range_are_refused():
    risk, truth, clusters, strata = risky()
    wrong = risk.copy()
    wrong[[2, 5, 6]] = -0.1, 1.2, np.inf
    for function in (brier, calibration, reliability):
        refused(rf"3 of {len(risk)} risks are not between 0 and 1 \(positions 2, 5, 6\)", function, wrong, truth, clusters)
    refused("positions 0, 1, 2, 3, 4, ...", brier, risk + 2, truth, clusters)
    refused("positions 2, 5, 6", brier_difference, risk, wrong, truth, clusters)
    refused("positions 2, 5, 6", brier_skill, risk, wrong, truth, clusters)
    refused(f"{len(risk) - 1} stratum labels for {len(risk)} prompts", stratified_auroc, risk, truth, clusters, strata[1:])
    refused("stratum label is missing", stratified_auroc, risk, truth, clusters, [None, *strata[1:]])
    refused("stratum labels", permutation_p, np.mean, truth, strata[1:])
    refused("stratum label is missing", permutation_p, np.mean, truth, [math.nan, *strata[1:]])
    refused("truth must be", permutation_p, np.mean, truth + 1, strata)
    refused("0 permutations", permutation_p, np.mean, truth, strata, n=0)
    refused("0 bins", reliability, risk, truth, clusters, 0)
    for least in (0, 0.5, -1, math.nan):
        refused("least=", calibration, risk, truth, clusters, least=least)


def test_inputs_may_be_lists_or_columns_and_are_left_alone():
    risk, truth, clusters, strata = risky()
    before = [x.copy() for x in (risk, truth, clusters, strata)]
    table = pd.DataFrame(dict(risk=risk, truth=truth, template=clusters, stratum=strata), index=np.arange(len(risk))[::-1])
    columns = [table[name] for name in ("risk", "truth", "template", "stratum")]
    for arguments in (columns, [x.tolist() for x in before]):
        assert stratified_auroc(*arguments) == stratified_auroc(risk, truth, clusters, strata)
        for function in (average_precision, brier, calibration):
            assert function(*arguments[:3]) == function(risk, truth, clusters)
        pd.testing.assert_frame_equal(reliability(*arguments[:3]), reliability(risk, truth, clusters))
        assert brier_skill(arguments[0], arguments[0], *arguments[1:3]).estimate == 0
        by_each = [permutation_p(lambda t: risk[t].mean(), *each, n=9) for each in ((arguments[1], arguments[3]), (truth, strata))]
        assert by_each[0] == by_each[1]
    assert all(np.array_equal(x, y) for x, y in zip(before, (risk, truth, clusters, strata)))


# ---- coverage

R, GRID = 120, np.linspace(-8, 12, 4001)
ALLOWED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / R)


def true_values(area, prevalence, steep=1.2):
    "AP, Brier score, calibration in the large and slope of a normal score and of the risk made from it."
    higher = math.sqrt(2) * distributions.norm.ppf(area)
    fails, holds = prevalence * distributions.norm.pdf(GRID - higher), (1 - prevalence) * distributions.norm.pdf(GRID)
    above = prevalence * distributions.norm.sf(GRID - higher), (1 - prevalence) * distributions.norm.sf(GRID)
    risk = expit(logit(prevalence) + steep * (GRID - higher * prevalence))
    precise, squared = fails * above[0] / (above[0] + above[1]) / prevalence, fails * (1 - risk) ** 2 + holds * risk**2
    return np.trapezoid(precise, GRID), np.trapezoid(squared, GRID), higher / steep


def excluding(found, truth):
    "Which of the intervals given exclude the truth."
    return [not (i.low <= truth <= i.high) for i in found if math.isfinite(i.low)]


@pytest.mark.parametrize("g, prevalence, area", [(18, 0.4, 0.75), (18, 0.4, 0.5), pytest.param(72, 0.1, 0.95, marks=pytest.mark.slow)])
def test_intervals_cover(g, prevalence, area):
    wrong = misses(g, prevalence, area, lambda clusters: clusters)
    assert all(np.mean(w) < ALLOWED and len(w) > 0.9 * R for w in wrong.values()), {name: np.mean(w) for name, w in wrong.items()}


def test_intervals_do_not_cover_when_templates_are_ignored():
    wrong = misses(18, 0.4, 0.75, lambda clusters: np.arange(len(clusters)) % 72)
    assert all(np.mean(wrong[name]) > 0.1 for name in ("area", "precision", "brier", "slope"))


def misses(g, prevalence, area, labels_of):
    "For each interval and data set: does it exclude the truth?"
    precision, squared, slope = true_values(area, prevalence)
    out = {}
    for seed in range(R):
        score, equal, truth, clusters, strata = made((area, area), g=g, prevalence=prevalence, seed=seed)
        labels, higher = labels_of(clusters), math.sqrt(2) * distributions.norm.ppf(area)
        risk, same = (expit(logit(prevalence) + 1.2 * (s - higher * prevalence)) for s in (score, equal))
        for name, interval, value in (
            ("area", stratified_auroc(score + 2 * strata, truth, labels, strata), area),
            ("equal areas", stratified_auroc_difference(score, equal, truth, labels, strata), 0),
            ("precision", average_precision(score, truth, labels), precision),
            ("equal precision", average_precision_difference(score, equal, truth, labels), 0),
            ("brier", brier(risk, truth, labels), squared),
            ("equal brier", brier_difference(risk, same, truth, labels), 0),
            ("slope", calibration(risk, truth, labels).slope, slope)):
            out.setdefault(name, []).extend(excluding([interval], value))
    return out


def test_coverage_where_tasks_differ_and_failures_are_rare():
    wrong, widths = [], []
    for seed in range(R):
        parts = [made((area,), g=15, prevalence=0.1, seed=100 * seed + k, n_strata=4) for k, area in enumerate((0.6, 0.75, 0.9))]
        scores, truth = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        clusters, strata = (np.concatenate([p[i] + 100 * k for k, p in enumerate(parts)]) for i in (2, 3))
        who = _pairing(truth, clusters, strata)
        value = np.average(np.repeat((0.6, 0.75, 0.9), [len(p[1]) for p in parts])[who.kept], weights=who.pairs)
        interval = stratified_auroc(scores, truth, clusters, strata)
        wrong += excluding([interval], value)
        widths.append(interval.high - interval.low)
    assert np.mean(wrong) < ALLOWED and np.mean(widths) < 0.16  # with one middle for all strata it is 0.23


def test_average_precision_covers_where_a_forecast_fails_on_whole_templates():
    def draw(rng, g, area=0.97, within=0.999):
        clusters = np.repeat(np.arange(g), rng.integers(4, 21, g))
        truth, works = rng.random(len(clusters)) < 0.4, rng.random(g) >= (within - area) / (within - 0.5)
        return math.sqrt(2) * distributions.norm.ppf(within) * (truth & works[clusters]) + rng.normal(size=len(clusters)), truth, clusters

    scores, truth, _ = draw(np.random.default_rng(0), 20_000)
    value = average_precision_score(truth, scores)
    found, plain = [], []
    for seed in range(R):
        scores, truth, clusters = draw(np.random.default_rng(seed), 18)
        found += excluding([average_precision(scores, truth, clusters)], value)
        half = distributions.t.ppf(0.975, 17) * math.sqrt(_jackknife(_without_each(scores, truth, clusters)))
        plain.append(abs(average_precision_score(truth, scores) - value) > half)
    assert np.mean(found) < ALLOWED and np.mean(plain) > 0.2
