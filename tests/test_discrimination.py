"""AUROC and its intervals: against loops and textbooks, at their degenerate ends, and by simulated coverage."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as distributions
from sklearn.metrics import roc_auc_score

from circuit_generalization.discrimination import (
    _design_effect,
    _newcombe_low,
    _newcombe_variance,
    _placements,
    _pseudo_values,
    auroc,
    auroc_difference,
)
from circuit_generalization.errors import InputError
from circuit_generalization.stats import MIN_CLUSTERS, clustered_mean, coverage_simulation, cr2_interval

values = st.integers(-3, 3).map(float)  # few values, so that there are ties


@st.composite
def scored(draw, columns=1, low=MIN_CLUSTERS):
    "`columns` scores, truth and cluster labels: unequal clusters, each with both kinds, prompts in any order."
    sizes = draw(st.lists(st.integers(2, 5), min_size=low, max_size=low + 4))
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    truth = np.concatenate([[True, False] + draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2)) for n in sizes]).astype(bool)
    order = np.array(draw(st.permutations(range(len(truth)))))
    lists = [np.array(draw(st.lists(values, min_size=len(truth), max_size=len(truth)))) for _ in range(columns)]
    return *lists, truth[order], clusters[order]


def made(g=20, prompts=10, area=0.9, effect=0.8, seed=0):
    "Scores with a template effect, truth and templates; clusters of equal size with as many true as false prompts."
    rng = np.random.default_rng(seed)
    truth, clusters = np.tile([True, False], g * prompts // 2), np.repeat(np.arange(g), prompts)
    shift = rng.normal(0, effect, (g, 2))[clusters, truth.astype(int)]
    return distributions.norm.ppf(area) * math.sqrt(2) * truth + shift + rng.normal(size=len(truth)), truth, clusters


def by_pairs(scores, truth):
    return np.mean([float(s > r) + 0.5 * (s == r) for s in scores[truth] for r in scores[~truth]])


def ends(interval):
    return interval.low, interval.high


# ---- the estimate


@given(scored())
def test_auroc_counts_pairs_and_agrees_with_scikit_learn_and_mann_whitney(case):
    scores, truth, clusters = case
    estimate = auroc(scores, truth, clusters).estimate
    assert estimate == pytest.approx(by_pairs(scores, truth))
    assert estimate == pytest.approx(roc_auc_score(truth, scores))
    u = distributions.mannwhitneyu(scores[truth], scores[~truth]).statistic
    assert estimate == pytest.approx(u / truth.sum() / (~truth).sum())


def test_placements_and_pseudo_values_by_hand():
    scores, truth = np.array([0.9, 0.7, 0.4, 0.7, 0.3]), np.array([1, 1, 1, 0, 0], dtype=bool)
    # beaten false ones of two: 2, 1 and a tie, 1; beating true ones of three: 1 and a tie, 3
    assert _placements(scores, truth).tolist() == [1, 0.75, 0.5, 0.5, 1]
    # 0.75 + 5/3 (V - 0.75) for three true, 0.75 + 5/2 (V - 0.75) for two false
    assert _pseudo_values(scores, truth) == pytest.approx([0.75 + 1.25 / 3, 0.75, 0.75 - 1.25 / 3, 0.125, 1.375])


@given(scored())
def test_placements_average_to_the_auroc_over_either_kind(case):
    scores, truth, _ = case
    place, area = _placements(scores, truth), by_pairs(scores, truth)
    assert [place[truth].mean(), place[~truth].mean(), _pseudo_values(scores, truth).mean()] == pytest.approx([area] * 3)


# ---- the variance


def obuchowski(scores, truth, clusters):
    "Obuchowski (1997), sum by sum; every cluster holds both kinds."
    place, names = _placements(scores, truth), np.unique(clusters)
    area, g, m, n = place.mean(), len(names), truth.sum(), (~truth).sum()
    true = np.array([(place[truth & (clusters == c)] - area).sum() for c in names])
    false = np.array([(place[~truth & (clusters == c)] - area).sum() for c in names])
    return g / (g - 1) * ((true**2).sum() / m**2 + (false**2).sum() / n**2 + 2 * (true * false).sum() / (m * n))


@pytest.mark.parametrize("seed", range(3))
def test_clustered_variance_is_obuchowskis_for_equal_clusters(seed):
    scores, truth, clusters = made(g=12, prompts=6, seed=seed)
    assert clustered_mean(_pseudo_values(scores, truth), clusters).se ** 2 == pytest.approx(obuchowski(scores, truth, clusters))


def test_clustered_variance_is_delongs_for_single_prompts():
    scores, truth, _ = made(g=30)
    place, m, n = _placements(scores, truth), truth.sum(), (~truth).sum()
    delong = place[truth].var(ddof=1) / m + place[~truth].var(ddof=1) / n
    se = clustered_mean(_pseudo_values(scores, truth), range(m + n)).se
    assert se**2 == pytest.approx(delong * (m + n) / (m + n - 1) * (m - 1) / m)  # m = n; only the small-sample factor differs


@given(st.floats(0.001, 0.999), st.integers(1, 200), st.integers(1, 200))
def test_newcombes_variance_is_symmetric_and_mann_whitneys_at_one_half(area, m, n):
    variance = _newcombe_variance(area, m, n)
    assert variance == pytest.approx(_newcombe_variance(1 - area, n, m))
    assert _newcombe_variance(0.5, m, n) == pytest.approx((m + n + 1) / (12 * m * n))
    hanley_mcneil = area * (1 - area) + (m - 1) * (area / (2 - area) - area**2) + (m - 1) * (2 * area**2 / (1 + area) - area**2)
    assert _newcombe_variance(area, m, m) == pytest.approx(hanley_mcneil / m**2)  # the 1982 formula where m = n


@given(st.floats(0.01, 1), st.integers(5, 300), st.integers(5, 300), st.floats(0.5, 4))
def test_newcombes_end_is_t_of_its_own_standard_errors_away(area, m, n, t):
    low = _newcombe_low(area, m, n, t)
    assert 0 <= low < area
    assert area - low == pytest.approx(t * math.sqrt(_newcombe_variance(low, m, n)), rel=1e-6)
    assert _newcombe_low(0.0, m, n, t) == 0


def test_newcombes_interval_as_published_software_gives_it():
    # SingleCaseES (R), NAP of its example: 6 and 7 values, 38.5 of 42 pairs, [0.597, 0.986]
    z = distributions.norm.ppf(0.975)
    assert (_newcombe_low(38.5 / 42, 6, 7, z), 1 - _newcombe_low(3.5 / 42, 6, 7, z)) == pytest.approx((0.597, 0.986), abs=5e-4)


@given(st.floats(0.01, 0.99), st.integers(4, 300), st.integers(4, 300), st.floats(1.01, 50))
def test_design_effect_undoes_newcombes_variance_and_is_at_least_one(area, m, n, d):
    assert _design_effect(area, _newcombe_variance(area, m / d, n / d), m, n) == pytest.approx(d)
    assert _design_effect(area, _newcombe_variance(area, m * d, n * d), m, n) == 1


# ---- the interval


def by_another_way(scores, truth, clusters):
    "The interval with the design effect from a root finder and the ends as roots of a polynomial in A."
    summary, m = clustered_mean(_pseudo_values(scores, truth), clusters), int(truth.sum())
    area, n, g = summary.mean, len(truth) - m, summary.n_clusters
    shifted = (g * area + 0.5) / (g + 1)  # the mean of g templates at A and one at 1/2
    variance = summary.se**2 + (area - shifted) ** 2
    d = max(1, optimize.brentq(lambda d: _newcombe_variance(shifted, m / d, n / d) - variance, 1e-3, 1e4))
    a, star = np.polynomial.Polynomial([0, 1]), (m + n) / (2 * d) - 1
    u, t = a * (1 - a), distributions.t.ppf(0.975, min(summary.dof, g - 1))
    equation = m * n / d**2 * (area - a) ** 2 * (2 + u) - t**2 * u * (2 + star + (1 + 2 * star) * u)
    roots = np.sort([r.real for r in equation.roots() if abs(r.imag) < 1e-9 and -1e-9 <= r.real <= 1 + 1e-9])
    return roots[roots <= area][-1], roots[roots >= area][0]


@pytest.mark.parametrize("g, area", [(8, 0.5), (12, 0.7), (20, 0.9), (30, 0.97)])
@pytest.mark.parametrize("equal", [True, False])
def test_interval_agrees_with_another_way_to_it(g, area, equal):
    scores, truth, clusters = made(g=g, area=area)
    if not equal:  # a few large templates: fewer degrees of freedom
        kept = (clusters % 3 == 0) | (np.arange(len(truth)) % 10 < 3)
        scores, truth, clusters = scores[kept], truth[kept], clusters[kept]
        assert clustered_mean(_pseudo_values(scores, truth), clusters).dof < g - 2
    interval = auroc(scores, truth, clusters)
    assert ends(interval) == pytest.approx(by_another_way(scores, truth, clusters), abs=1e-6)
    assert (interval.n, interval.n_clusters, interval.level) == (len(truth), g, 0.95)


@given(scored())
def test_interval_is_inside_the_unit_interval_and_never_without_width(case):
    interval = auroc(*case)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.high - interval.low > 0.05


@given(scored(), st.sampled_from([np.exp, np.cbrt, lambda x: 7 * x - 100, lambda x: np.where(x == 3, np.inf, x)]))
def test_only_the_order_of_scores_counts(case, rising):
    scores, truth, clusters = case
    assert auroc(rising(scores), truth, clusters) == auroc(scores, truth, clusters)


@given(scored())
def test_interval_mirrors_and_ignores_order_and_names(case):
    scores, truth, clusters = case
    interval = auroc(scores, truth, clusters)
    for flipped in (auroc(-scores, truth, clusters), auroc(scores, ~truth, clusters)):
        assert (1 - flipped.high, 1 - flipped.low) == pytest.approx(ends(interval), abs=1e-9)
    order = np.random.default_rng(0).permutation(len(truth))
    renamed = auroc(scores[order].tolist(), truth[order].astype(int).tolist(), [f"template {c}" for c in clusters[order]])
    assert ends(renamed) == pytest.approx(ends(interval))
    narrower = auroc(scores, truth, clusters, level=0.5)
    assert interval.low <= narrower.low <= narrower.high <= interval.high


@pytest.mark.parametrize("g, low", [(8, 0.7256), (15, 0.8588), (30, 0.9321)])
def test_a_perfect_score_is_judged_by_its_templates(g, low):
    truth, clusters = np.tile([True, False], 6 * g), np.repeat(np.arange(g), 12)
    perfect, reverse = auroc(truth, truth, clusters), auroc(~truth, truth, clusters)
    assert (perfect.low, perfect.high, perfect.estimate) == (pytest.approx(low, abs=1e-4), 1, 1)
    assert ends(reverse) == (0, pytest.approx(1 - perfect.low))
    many, copies = np.tile(truth, 10), np.tile(clusters, 10)
    assert auroc(many, many, copies).low == pytest.approx(perfect.low, abs=0.005)
    almost = truth.astype(float)
    almost[0] = -1  # one true prompt below all false ones: no jump
    assert low - 0.06 < auroc(almost, truth, clusters).low < low + 0.06


def test_a_perfect_score_needs_about_a_hundred_templates_to_exclude_098():
    low = {g: auroc([1, 0] * g, [1, 0] * g, np.repeat(np.arange(g), 2)).low for g in (80, 120)}
    assert low[80] < 0.98 < low[120]


def test_a_constant_score_is_at_chance_with_some_width():
    _, truth, clusters = made()
    interval = auroc(np.zeros(len(truth)), truth, clusters)
    assert interval.estimate == 0.5 and interval.low < 0.45 and interval.high > 0.55


def test_templates_make_the_interval_longer_where_they_matter():
    scores, truth, clusters = made(area=0.7, effect=2)
    lengths = [np.subtract(*ends(auroc(scores, truth, c))[::-1]) for c in (clusters, range(len(truth)))]
    assert lengths[0] > 1.4 * lengths[1]


def test_too_few_templates_of_all_or_of_one_kind_give_no_interval():
    scores, truth, clusters = made(g=20)
    few = auroc(scores, truth, clusters % 7)
    assert few.method == "too few templates" and math.isnan(few.low) and few.estimate == pytest.approx(by_pairs(scores, truth))
    for kind in (truth & (clusters < 7), ~(truth & (clusters < 7))):
        rare, difference = auroc(scores, kind, clusters), auroc_difference(scores, -scores, kind, clusters)
        assert rare.method == difference.method == "too few templates with one of the two kinds"
        assert math.isnan(rare.low) and math.isnan(difference.high) and rare.n_clusters == 20
    assert math.isfinite(auroc(scores, truth & (clusters < 8), clusters).low)


def test_degrees_of_freedom_are_those_of_the_rarer_kind():
    scores, truth, clusters = made(g=20, area=0.5)
    rare, other = truth & (clusters < 8), np.where(clusters % 2 == 0, scores, -scores)
    interval = auroc_difference(scores, other, rare, clusters)
    a, b = _pseudo_values(scores, rare), _pseudo_values(other, rare)
    se = math.hypot(clustered_mean(a - b, clusters).se, (a.mean() - 0.5) / 9, (b.mean() - 0.5) / 9)
    assert interval.high - interval.estimate == pytest.approx(distributions.t.ppf(0.975, 7) * se)


# ---- the difference


@given(scored(columns=2))
def test_difference_is_that_of_the_aurocs_and_turns_round(case):
    a, b, truth, clusters = case
    difference, turned = auroc_difference(a, b, truth, clusters), auroc_difference(b, a, truth, clusters)
    assert difference.estimate == pytest.approx(by_pairs(a, truth) - by_pairs(b, truth), abs=1e-12)
    assert (turned.estimate, turned.low, turned.high) == pytest.approx((-difference.estimate, -difference.high, -difference.low), nan_ok=True)
    if math.isfinite(difference.low):
        assert -1 <= difference.low <= difference.estimate <= difference.high <= 1 and difference.low < difference.high


@given(scored(columns=2))
def test_difference_looks_at_order_only(case):
    a, b, truth, clusters = case
    one, two = auroc_difference(a, b, truth, clusters), auroc_difference(np.exp(a), 5 * b + 1, truth, clusters)
    assert (one.low, one.high) == (two.low, two.high) or math.isnan(one.low + two.low)


def test_difference_by_hand_and_by_jackknife():
    scores, truth, clusters = made(g=20)
    weaker = scores + np.random.default_rng(1).normal(0, 2, len(truth))
    interval, g = auroc_difference(scores, weaker, truth, clusters), 20
    areas = by_pairs(scores, truth), by_pairs(weaker, truth)
    psi = _pseudo_values(scores, truth) - _pseudo_values(weaker, truth)
    means = psi.reshape(g, -1).mean(1)  # equal clusters: the variance of a mean of cluster means
    se = math.sqrt(means.var(ddof=1) / g + ((areas[0] - 0.5) / 21) ** 2 + ((areas[1] - 0.5) / 21) ** 2)
    half = distributions.t.ppf(0.975, g - 1) * se
    assert ends(interval) == pytest.approx((areas[0] - areas[1] - half, areas[0] - areas[1] + half))
    assert (interval.n, interval.n_clusters) == (len(truth), g)
    left = [by_pairs(scores[clusters != c], truth[clusters != c]) - by_pairs(weaker[clusters != c], truth[clusters != c]) for c in range(g)]
    assert clustered_mean(psi, clusters).se == pytest.approx(math.sqrt((g - 1) ** 2 / g * np.var(left, ddof=1)), rel=0.1)


def test_two_perfect_scores_may_still_differ():
    truth, clusters = np.tile([True, False], 90), np.repeat(np.arange(15), 12)
    interval = auroc_difference(truth, 3.0 * truth, truth, clusters)
    half = distributions.t.ppf(0.975, 14) * math.sqrt(2) * 0.5 / 16
    assert interval.estimate == 0 and ends(interval) == pytest.approx((-half, half))
    widest = auroc_difference(truth, ~truth, truth, clusters)
    assert widest.estimate == 1 and widest.high == 1 and widest.low == pytest.approx(1 - half)
    mirror = auroc_difference(~truth, truth, truth, clusters)
    assert ends(mirror) == (-1, pytest.approx(half - 1))


def test_two_constant_scores_have_no_interval():
    _, truth, clusters = made()
    none = auroc_difference(np.zeros(len(truth)), np.ones(len(truth)), truth, clusters)
    assert none.estimate == 0 and math.isnan(none.low) and none.method == "no variation between templates"


# ---- bad input


def refused(match, *arguments, function=auroc):
    with pytest.raises(InputError, match=match):
        function(*arguments)


def test_bad_input_is_refused_with_its_reason():
    scores, truth, clusters = made()
    holes = scores.copy()
    holes[[4, 9]] = np.nan
    refused(r"2 of 200 scores are NaN \(positions 4, 9\)", holes, truth, clusters)
    refused(r"6 of 200 .*positions 194, 195, 196, 197, 198, \.\.\.\)", np.append(scores[:194], [np.nan] * 6), truth, clusters)
    refused("positions 4, 9", scores, holes, truth, clusters, function=auroc_difference)
    refused("200 true and 0 false", scores, truth | True, clusters)
    refused("0 true and 200 false", scores, truth & False, clusters)
    refused("truth must be True or False", scores, truth + 1, clusters)
    refused("truth must be True or False", scores, np.where(truth, 1.0, np.nan), clusters)
    refused("truth must be True or False", scores, pd.array([None, *truth[1:]], dtype="boolean"), clusters)
    refused("truth must be True or False", scores, np.where(truth, "yes", "no"), clusters)
    refused("two lists of the same length", scores[1:], truth, clusters)
    refused("two lists of the same length", scores[:, None], truth[:, None], clusters)
    refused("two lists of the same length", scores, scores[1:], truth, clusters, function=auroc_difference)
    refused("199 cluster labels", scores, truth, clusters[1:])
    refused("cluster label is missing", scores, truth, [None, *clusters[1:]])
    refused("confidence level", scores, truth, clusters, 95)


def test_inputs_may_be_lists_or_columns_and_are_left_alone():
    scores, truth, clusters = made()
    before = scores.copy(), truth.copy(), clusters.copy()
    table = pd.DataFrame({"score": scores, "truth": truth, "template": clusters}, index=np.arange(200)[::-1])
    expected = auroc(scores, truth, clusters)
    assert auroc(table.score, table.truth, table.template) == expected
    assert auroc(scores.tolist(), truth.tolist(), clusters.tolist()) == expected
    auroc_difference(scores, -scores, truth, clusters)
    assert all(np.array_equal(x, y) for x, y in zip(before, (scores, truth, clusters)))


# ---- coverage

WITHIN = 0.999


def draw(rng, world, area, g):
    "Templates of 4 to 20 prompts that shift a score, or on some of which it is at chance."
    clusters = np.repeat(np.arange(g), rng.integers(4, 21, g))
    truth, noise = rng.random(len(clusters)) < 0.5, rng.normal(size=len(clusters))
    if world == "failures":
        works = rng.random(g) >= (WITHIN - area) / (WITHIN - 0.5)
        return distributions.norm.ppf(WITHIN) * math.sqrt(2) * (truth & works[clusters]) + noise, truth, clusters
    shift = rng.normal(0, math.sqrt(0.4), (g, 2))[clusters, truth.astype(int)]
    return distributions.norm.ppf(area) * math.sqrt(2) * truth + shift + math.sqrt(0.6) * noise, truth, clusters


@pytest.mark.parametrize("world, area, g", [("shifts", 0.8, 10), ("shifts", 0.95, 20), ("failures", 0.8, 20), ("failures", 0.982, 30)])
def test_coverage_is_near_nominal_and_is_not_when_templates_are_ignored(world, area, g):
    data = partial(draw, world=world, area=area, g=g)
    ours = coverage_simulation(auroc, data, area, 300, seed=1)
    assert ours.no_interval == 0 and ours.wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    blind = coverage_simulation(lambda s, truth, c: auroc(s, truth, range(len(c))), data, area, 300, seed=1)
    assert blind.wrong > 0.1


@pytest.mark.parametrize("world, areas, g, missed", [
    ("shifts", (0.95, 0.8), 20, 0), ("failures", (0.95, 0.8), 20, 0), ("failures", (0.99, 0.95), 10, 0.2)])
def test_coverage_of_a_difference(world, areas, g, missed):
    def two(rng):
        seed = rng.integers(2**32)  # the same prompts for both scores: they come first out of the generator
        a, truth, clusters = draw(np.random.default_rng(seed), world, areas[0], g)
        return a, draw(np.random.default_rng(seed), world, areas[1], g)[0], truth, clusters

    def plain(a, b, truth, clusters):
        return cr2_interval(_pseudo_values(a, truth) - _pseudo_values(b, truth), clusters)

    ours, theirs = (coverage_simulation(f, two, areas[0] - areas[1], 300, seed=2) for f in (auroc_difference, plain))
    assert ours.no_interval == 0 and ours.wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert 1 - theirs.covered >= missed
