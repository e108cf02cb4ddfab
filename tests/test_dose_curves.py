"""Doses and sizes: by hand, against slow literal versions, at their degenerate ends, and where the truth is known by construction."""

import time
from dataclasses import FrozenInstanceError, astuple
from math import gamma, inf, isnan, nan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as distributions
from sklearn.isotonic import isotonic_regression

from circuit_generalization import dose_curves
from circuit_generalization.dose_curves import (
    HillFit,
    area,
    dose_curve,
    draw_curves,
    effect_levels,
    fit_hill,
    hill,
    monotone_test,
    paired_size,
    slope_difference,
)
from circuit_generalization.errors import InputError
from circuit_generalization.stats import MIN_CLUSTERS, coverage_simulation, cr2_interval, difference_p_value, ratio_interval

DOSES = np.linspace(0, 1, 11)
NO_NOISE_AT_ZERO = np.minimum(1, 5 * DOSES)  # nothing is ablated there
DIP = hill(DOSES, 0, 1, 0.6, 6) - 0.3 * np.exp(-(((DOSES - 0.25) / 0.12) ** 2))
numbers = st.floats(-100, 100).map(lambda x: round(x, 3))
curves_of_five = st.lists(numbers, min_size=5, max_size=5).map(np.array)
five_weights = st.lists(st.floats(0.1, 10), min_size=5, max_size=5).map(np.array)


def made(curve, seed=0, noise=0.1, **options):
    return draw_curves(np.random.default_rng(seed), np.asarray(curve), noise=noise * NO_NOISE_AT_ZERO, **options)


def limit(n, share=0.05, sigmas=2.5):
    "What a share may reach by the luck of n data sets."
    return share + sigmas * sqrt(share * (1 - share) / n)


# The area


def test_area_by_hand():
    assert area([0, 1, 2, 4], [0, 1, 1, 3]) == (0.5 + 1 + 4) / 4
    assert area([1, 2, 3, 5], [2, 2, 2, 2]) == 2
    assert area([0, 1, 2, 4], np.outer([0, 1, 1, 3], [1, -2])).tolist() == [1.375, -2.75]


@given(curves_of_five, curves_of_five, numbers)
def test_area_is_linear_and_has_no_unit_of_dose(a, b, k):
    doses = np.array([0, 1, 3, 4, 9.0])
    assert np.isclose(area(doses, a + k * b), area(doses, a) + k * area(doses, b), atol=1e-6)
    assert np.isclose(area(7 * doses, a), area(doses, a))


# Hill's curve


def test_hill_by_hand():
    assert np.allclose(hill([0, 1, 2, 4, inf], 1, 5, 2, 2), [1, 1 + 4 / 5, 3, 1 + 4 * 16 / 20, 5])
    assert hill(3, 1, -1, 3, 7) == 0
    assert np.isnan(hill([0, 1], nan, nan, nan, nan)).all()


@given(st.floats(0, 1e300), st.floats(1e-300, 1e300), st.floats(0.01, 1e3))
def test_hill_never_overflows(dose, ec50, slope):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert 0 <= hill(dose, 0, 1, ec50, slope) <= 1


@pytest.mark.parametrize(("dose", "ec50", "slope"), [([0, -1], 1, 1), ([0, 1], 0, 1), ([0, 1], 1, 0), ([0, 1], -1, 1)])
def test_hill_refuses(dose, ec50, slope):
    with pytest.raises(InputError, match="must be above 0, and no dose below it"):
        hill(dose, 0, 1, ec50, slope)


TRUTHS = [(0, 1, 0.4, 2), (0, 1, 0.5, 8), (0, 1, 0.3, 1), (0.2, -1, 0.3, 3), (5, 4, 0.7, 4), (0, 1, 2, 2), (0, 1, 0.15, 0.7)]


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("scale", [1, 1e-6, 1e200])
def test_the_fit_finds_the_truth(truth, scale):
    bottom, top, ec50, slope = truth
    if scale < 1 and abs(top) > 1:
        return
    fit = fit_hill(DOSES, scale * hill(DOSES, *truth))
    assert np.allclose([fit.bottom / scale, fit.top / scale, fit.ec50, fit.slope, fit.r2], [bottom, top, ec50, slope, 1], rtol=1e-4, atol=1e-5)
    assert not fit.reason


def test_r2_and_the_line_of_a_fit():
    curve = DIP + 0.02 * np.sin(40 * DOSES)
    fit = fit_hill(DOSES, curve)
    assert np.isclose(fit.r2, 1 - ((fit.at(DOSES) - curve) ** 2).sum() / ((curve - curve.mean()) ** 2).sum(), atol=1e-9)


@pytest.mark.parametrize("height", [0.0, 0.3, -7, 1e9])
def test_a_flat_curve_has_no_fit(height):
    fit = fit_hill(DOSES, np.full(11, height))
    assert all(isnan(x) for x in astuple(fit)[:5]) and fit.reason == "the curve is flat"
    assert np.isnan(fit.at(DOSES)).all()
    assert fit_hill(DOSES, height * (1 + 1e-15 * (-1) ** np.arange(11))).reason == "the curve is flat"


@given(curves_of_five.filter(lambda c: np.ptp(c) > 1), st.floats(0.01, 100), numbers)
def test_a_fit_has_no_unit(curve, k, shift):
    doses = np.array([0, 0.5, 1, 3, 4.0])
    here, moved = dose_curves._fits(doses, curve[None])[0], dose_curves._fits(k * doses, k * curve[None] + shift)[0]
    assert np.isclose(here[4], moved[4], atol=1e-5)


def best_r2(doses, curve, seed=1):
    "By differential evolution, a fit inside for each EC50 and slope by `lstsq`."
    spread = ((curve - curve.mean()) ** 2).sum()

    def error(point):
        x = hill(doses, 0, 1, *np.exp(point))
        if np.ptp(x) < 1e-8: return spread
        x = x / np.ptp(x)
        design = np.stack([np.ones(len(x)), x], -1)
        return float(((design @ np.linalg.lstsq(design, curve)[0] - curve) ** 2).sum())

    low, high = np.log([doses[doses > 0][0] / 10, 0.2]), np.log([doses[-1] * 10, 50])
    return 1 - optimize.differential_evolution(error, list(zip(low, high)), rng=seed, tol=1e-9).fun / spread


@pytest.mark.parametrize("seed", range(6))
def test_no_other_fit_is_better(seed):
    rng = np.random.default_rng(seed)
    curve = hill(DOSES, 0, rng.choice([-1, 1]), rng.uniform(0.1, 1), rng.uniform(0.5, 10)) + 0.15 * rng.normal(size=11)
    assert fit_hill(DOSES, curve).r2 >= best_r2(DOSES, curve) - 1e-4


def test_the_quick_search_finds_what_the_slow_one_finds_and_is_quick():
    rng = np.random.default_rng(0)
    curves = hill(DOSES, 0, 1, 0.4, 3) + 0.1 * rng.normal(size=(499, 11))
    curves[7] = 0.25
    start = time.perf_counter()
    quick = dose_curves._fits(DOSES, curves)
    assert time.perf_counter() - start < 3
    assert np.isnan(quick[7]).all()
    for found, curve in zip(quick[:60:3], curves[:60:3]):
        slow = fit_hill(DOSES, curve)
        assert abs(found[4] - slow.r2) < 1e-4 and abs(found[2] - slow.ec50) < 1e-2 * slow.ec50


# A curve from prompts


def test_means_and_area_are_clustered_means():
    effects, templates = made(hill(DOSES, 0, 1, 0.4, 2))
    found = dose_curve(DOSES, effects, templates)
    assert found.means == tuple(cr2_interval(e, templates) for e in effects)
    assert found.area == cr2_interval(area(DOSES, effects), templates)
    assert np.isclose(found.area.estimate, area(DOSES, effects.mean(1)))
    assert found.fit == fit_hill(DOSES, effects.mean(1))
    assert found == dose_curve(DOSES, effects, templates) != dose_curve(DOSES, effects, templates, seed=1)
    with pytest.raises(FrozenInstanceError):
        found.identified = "no"


def test_draws_are_draws_of_whole_templates():
    effects, templates = made(DIP, n_clusters=9)
    codes, sizes = templates, np.bincount(templates)
    quick = dose_curves._mean_curves(effects, codes, sizes, 3, 20)
    for times, curve in zip(np.random.default_rng(3).multinomial(9, np.full(9, 1 / 9), 20), quick):
        drawn = np.concatenate([effects[:, templates == t] for t in range(9) for _ in range(times[t])], 1)
        assert np.allclose(curve, drawn.mean(1))


def test_percentiles_are_hesterbergs_for_equal_templates():
    draws = np.random.default_rng(0).normal(size=(5000, 2))
    ends = dose_curves._expanded_percentiles(draws, np.full(12, 4), 0.95)
    tail = distributions.norm.cdf(-sqrt(12 / 11) * distributions.t.ppf(0.975, 11))
    assert np.allclose(ends, np.quantile(draws, [tail, 1 - tail], axis=0))


@pytest.mark.parametrize("truth", [(0, 1, 0.4, 2), (0, 1, 0.5, 8), (0, -2, 0.3, 4)])
def test_what_is_known_is_found(truth):
    found = dose_curve(DOSES, *made(hill(DOSES, *truth), noise=0.05, n_clusters=20))
    assert found.identified == ""
    for interval, true in zip((found.top, found.ec50, found.slope), truth[1:]):
        assert interval.low < true < interval.high and interval.low <= interval.estimate <= interval.high
    assert found.ec50.estimate == found.fit.ec50 and found.top.estimate == found.fit.top and found.slope.estimate == found.fit.slope
    wider = dose_curve(DOSES, *made(hill(DOSES, *truth), noise=0.05, n_clusters=20), level=0.99)
    assert wider.ec50.low < found.ec50.low and found.ec50.high < wider.ec50.high


REASONS = {
    "too few templates: 7": dict(truth=(0, 1, 0.4, 2), n_clusters=7),
    "no effect shown": dict(truth=(0, 0, 0.4, 2), noise=0.2),
    "half of the effect is reached before the lowest positive dose, 0.1": dict(truth=(0, 1, 0.04, 2)),
    "half of the fitted effect would be reached only after the highest dose, 1": dict(truth=(0, 1, 2, 2), noise=0.01),
    "the plateau is not reached: the fit goes": dict(truth=(0, 1, 0.9, 1), noise=0.01),
    "fewer than two doses lie on the rise: EC50 is only known to lie near 0.4": dict(truth=(0, 1, 0.45, 50), noise=0.01),
    "the 95% interval of EC50": dict(truth=(0, 1, 0.3, 1), noise=0.5, seed=1),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_not_known_is_said(reason):
    options = dict(REASONS[reason])
    found = dose_curve(DOSES, *made(hill(DOSES, *options.pop("truth")), **options))
    assert found.identified.startswith(reason)
    for interval in (found.ec50, found.slope, found.top):
        assert isnan(interval.estimate) and isnan(interval.low) and isnan(interval.high) and interval.method == found.identified
    assert isinstance(found.fit, HillFit) and found.fit.ec50 > 0


def test_one_dose_on_the_rise_is_not_enough():
    for slope, doses in ((30, 1), (12, 2)):
        way = hill(DOSES, 0, 1, 0.4, slope)
        assert ((way > 0.05) & (way < 0.95)).sum() == doses
        found = dose_curve(DOSES, *made(hill(DOSES, 0, 1, 0.4, slope), noise=0.01, n_clusters=20))
        assert found.identified.startswith("fewer than two doses lie on the rise") is (doses < 2)


def test_prompts_that_are_all_alike_have_no_interval():
    found = dose_curve(DOSES, np.outer(hill(DOSES, 0, 1, 0.4, 2), np.ones(20)), np.arange(20) // 2)
    assert "no variation between templates" in found.identified and isnan(found.ec50.estimate)


def test_draws_that_are_flat_are_said():
    effects = np.zeros((11, 9))
    effects[:, :3] = hill(DOSES, 0, 1, 0.4, 3)[:, None] * [1, 1.1, 0.9]
    effects[:, 3:] += 1e-13
    found = dose_curve(DOSES, effects, np.arange(9), n_boot=999)
    assert found.identified == "no effect shown: the change from the first to the last dose may be zero"
    assert dose_curves._outside(DOSES, nan, nan, 0.95) == "the curve is flat in some draws of templates"


def test_an_interval_may_not_leave_the_doses_on_either_side():
    assert dose_curves._outside(DOSES, 0.1, 1.0, 0.95) == ""
    for low, high in ((0.05, 0.5), (0.5, 1.2), (0.05, 1.2)):
        assert dose_curves._outside(DOSES, low, high, 0.95).endswith("reaches outside the doses 0.1 to 1")


# From which dose on


def shown(*doses, n=12, seed=0):
    "Effects that are clear at these doses of 0, 1, … 5, and balanced around 0 elsewhere; one prompt a template."
    half = np.abs(np.random.default_rng(seed).normal(size=(6, n // 2)))
    effects = np.concatenate([half, -half], 1)
    effects[0] = 0
    effects[list(doses)] += 10
    return np.arange(6), effects, list(range(n))


@pytest.mark.parametrize(("doses", "noael", "loael"), [((3, 4, 5), 2, 3), ((5,), 4, 5), ((1, 2, 3, 4, 5), 0, 1), ((), 5, nan), ((1, 3, 5), 4, 5),
                                                       ((1, 2, 3, 4), 5, nan)])
def test_levels_step_down_and_stop(doses, noael, loael):
    found = effect_levels(*shown(*doses))
    assert np.array_equal([found.noael, found.loael], [noael, loael], equal_nan=True)


def test_no_dose_below_the_lowest():
    _, effects, templates = shown(1, 2, 3, 4, 5)
    found = effect_levels(np.arange(1, 6), effects[1:], templates)
    assert isnan(found.noael) and found.loael == 1


def test_levels_rest_on_one_sided_tests_and_fieller():
    effects, templates = made(hill(DOSES, 0, 1, 0.5, 6), noise=0.3)
    found = effect_levels(DOSES, effects, templates, least=0.2)
    for p, upper, e in list(zip(found.p_values, found.upper, effects))[1:-1]:
        two_sided = difference_p_value(e, 0 * e, templates, kind="mean")
        assert np.isclose(p, two_sided / 2 if e.mean() > 0 else 1 - two_sided / 2)
        assert upper == ratio_interval(e, effects[-1], templates, level=0.9).high
    assert isnan(found.p_values[0]) and found.upper[0] == 0 and found.upper[-1] == 1
    below = [u < 0.2 for u in found.upper]
    assert found.harmless_up_to == DOSES[below.index(False) - 1] and found.reason == ""


def test_harmlessness_stops_at_the_first_dose_where_it_is_not_shown():
    doses, effects, templates = shown(2, 5, n=40)
    effects[1:5] /= 20
    effects[2] *= 5
    found = effect_levels(doses, effects, templates, least=0.1)
    assert np.array(found.upper[3:5]).max() < 0.1 <= found.upper[2]
    assert found.harmless_up_to == 1


def test_nothing_is_harmless_where_nothing_is_shown():
    found = effect_levels(*shown())
    assert isnan(found.harmless_up_to) and found.reason == "no effect shown at the highest dose"
    doses, effects, templates = shown(1, 2, 3, 4, 5)
    found = effect_levels(doses[1:], effects[1:], templates)
    assert isnan(found.harmless_up_to) and found.reason == "not shown at the lowest dose"
    few = effect_levels(doses, effects[:, :7], templates[:7])
    assert few.reason == "too few templates" and isnan(few.noael) and isnan(few.loael) and np.isnan(few.p_values).all()


def test_dose_zero_is_not_tested():
    doses, effects, templates = shown(1, 2, 3, 4, 5)
    effects[0] = effects[1]
    found = effect_levels(doses, effects, templates)
    assert isnan(found.p_values[0]) and (found.noael, found.loael) == (0, 1)


def test_a_highest_dose_that_helps_makes_nothing_harmless():
    doses, effects, templates = shown(5)
    found = effect_levels(doses, -effects, templates)
    assert found.upper[1] < 0.1 and isnan(found.harmless_up_to) and found.reason == "no effect shown at the highest dose"


@pytest.mark.parametrize("option", [dict(least=0), dict(least=1), dict(alpha=0), dict(alpha=0.5), dict(least=nan)])
def test_levels_refuse(option):
    with pytest.raises(InputError, match="give a share below 1 and a level below"):
        effect_levels(*shown(5), **option)


# Does it fall?


@given(st.lists(curves_of_five, min_size=1, max_size=4).map(np.array), five_weights)
def test_isotonic_regression_of_many_curves(curves, weights):
    found = dose_curves._isotonic(curves, weights)
    assert np.allclose(found, [isotonic_regression(c, sample_weight=weights) for c in curves], atol=1e-8)


@given(curves_of_five, st.lists(st.floats(0, 100), min_size=5, max_size=5).map(np.cumsum), five_weights)
def test_adding_a_curve_that_never_falls_brings_no_violation(curve, rising, weights):
    assert dose_curves._violation(curve + rising, weights) <= dose_curves._violation(curve, weights) + 1e-7


@given(curves_of_five)
def test_monotonicity_is_1_just_when_nothing_falls(curve):
    found = monotone_test(np.arange(5), np.outer(curve, np.ones(3)), "abc")
    if np.ptp(curve) == 0:
        assert isnan(found.monotonicity) and found.fall == 0
        return
    assert -1 <= found.monotonicity <= 1
    assert (found.monotonicity > 1 - 1e-9) == (found.fall < 1e-9) == (found.violation < 1e-9)
    assert np.isclose(found.fall, max(curve[i] - curve[j] for i in range(5) for j in range(i, 5)))


def test_monotonicity_by_hand():
    effects = np.outer([0, 2, 1, 3], np.ones(9))
    found = monotone_test([0, 1, 2, 4], effects, range(9))
    assert found.monotonicity == 3 / 5 and (found.fall, found.fall_from, found.fall_to) == (1, 1, 2)
    assert found.isotonic == (0, 1.5, 1.5, 3) and np.isclose(found.violation, sqrt(0.5 / 4))
    weighted = monotone_test([0, 1, 2, 4], effects, range(9), weights=[1, 3, 1, 1])
    assert np.allclose(weighted.isotonic, [0, 1.75, 1.75, 3]) and np.isclose(weighted.violation, sqrt((3 * 0.25**2 + 0.75**2) / 6))
    rising = monotone_test([0, 1, 2, 4], np.outer([0, 1, 1, 3], np.ones(9)), range(9))
    assert rising.monotonicity == 1 and rising.p_value == 1 and rising.fall == 0 and isnan(rising.fall_from) and isnan(rising.fall_to)
    assert monotone_test([0, 1, 2, 4], -effects, range(9)).monotonicity == -3 / 5


def literal_p(effects, templates, seed, n_boot):
    "The same test, template by template and draw by draw."
    n, mean = effects.shape[1], effects.mean(1)
    closest, groups = isotonic_regression(mean), [np.flatnonzero(templates == t) for t in np.unique(templates)]
    weight = np.array([len(g) / n for g in groups])
    variance = sum(np.diff((effects[:, g] - mean[:, None]).sum(1) / n) ** 2 / (1 - w) for g, w in zip(groups, weight))
    centred = np.eye(n) - 1 / n
    blocks = [centred[g].sum(0) / n / sqrt(1 - w) for g, w in zip(groups, weight)]  # CR2 as a quadratic form, for its degrees of freedom
    matrix = sum(np.outer(b, b) for b in blocks)
    dof = np.trace(matrix) ** 2 / (matrix**2).sum()
    t = distributions.t.ppf(1 - 0.005 / (len(mean) - 1), dof)
    steps = [max(0.0, step - t * sqrt(v)) for step, v in zip(np.diff(mean), variance)]
    centre = np.cumsum([0.0, *steps])

    def violation(curve): return sqrt(((curve - isotonic_regression(curve)) ** 2).mean())

    count = 0
    for flips in np.random.default_rng(seed).choice([-1.0, 1.0], (n_boot, len(groups))):
        noise = sum(f * (effects[:, g] - closest[:, None]).sum(1) for f, g in zip(flips, groups)) / n
        count += violation(noise + centre) >= violation(mean) - 1e-12
    return min(1.0, 0.005 + (1 + count) / (n_boot + 1))


@pytest.mark.parametrize("seed", range(3))
def test_the_test_is_its_literal_version(seed):
    effects, templates = made(DIP, seed=seed, noise=0.25, n_clusters=10)
    assert np.isclose(monotone_test(DOSES, effects, templates, seed=5, n_boot=199).p_value, literal_p(effects, templates, 5, 199))


def test_a_fall_is_found_and_few_templates_are_said():
    effects, templates = made(DIP, noise=0.05, n_clusters=20, mean_size=6)
    found = monotone_test(DOSES, effects, templates)
    assert found.p_value == 0.005 + 1 / 1000 and found.fall > 0.2
    assert found == monotone_test(DOSES, effects, templates)
    few = monotone_test(DOSES, effects[:, templates < MIN_CLUSTERS - 1], templates[templates < MIN_CLUSTERS - 1])
    assert isnan(few.p_value) and few.method == "too few templates" and few.fall > 0


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 1, 1, 0], [1, 1, 1, -1], [1, 1, 1, inf], [1, 1, 1, nan]])
def test_weights_are_checked(weights):
    with pytest.raises(InputError, match="give a number above 0 per dose"):
        monotone_test(range(4), np.ones((4, 9)), range(9), weights=weights)


# More than random sets


def test_selectivity_by_hand():
    rng = np.random.default_rng(0)
    effects, templates = made(hill(DOSES, 0, 1, 0.4, 2))
    others = 0.3 * effects + 0.1 * rng.normal(size=(9, *effects.shape))
    found = slope_difference(DOSES, effects, others, templates)
    difference = effects - others.mean(0)
    assert [i.estimate for i in found.effects] == pytest.approx(difference.mean(1))
    assert found.effects[4].low == pytest.approx(cr2_interval(difference[4], templates).low)
    per_prompt, height = np.array([np.polyfit(DOSES, d, 1)[0] for d in difference.T]), cr2_interval(area(DOSES, difference), templates)
    assert [found.slope.estimate, found.slope.low] == pytest.approx([per_prompt.mean(), cr2_interval(per_prompt, templates).low])
    assert [found.area.estimate, found.area.high] == pytest.approx([area(DOSES, difference.mean(1)), height.high])
    assert found.area_p == found.slope_p == 1 / 10 and found.n_sets == 9


def test_ranks_count_random_sets_that_do_as_much():
    effects, templates = np.outer(DOSES, np.linspace(1, 2, 12)), range(12)
    others = effects * np.array([0.5, 2, 1, 0.9])[:, None, None]
    found = slope_difference(DOSES, effects, others, templates)
    assert found.area_p == found.slope_p == (1 + 2) / (4 + 1) and found.p_adjusted[0] == 1
    assert found.p_adjusted[1:] == pytest.approx([0.66] * 10)  # 0.6 at ten of eleven doses


def test_equal_sets_are_ties():
    effects, templates = made(DIP)
    found = slope_difference(DOSES, effects, np.stack([effects] * 7), templates)
    assert found.area_p == found.slope_p == 1 and set(found.p_adjusted) == {1.0}


@pytest.mark.parametrize("others", [np.zeros((0, 11, 9)), np.zeros((3, 11, 8)), np.zeros((11, 9)), np.full((1, 11, 9), nan)])
def test_random_sets_are_checked(others):
    with pytest.raises(InputError, match="pass finite .set, dose, prompt., a set at least"):
        slope_difference(DOSES, np.ones((11, 9)), others, range(9))


# How large


def test_sizes_by_hand():
    found = paired_size([1.0, 2, 3, 6], [0.0, 2, 1, 1], "abcd")
    assert found.difference.estimate == 2
    assert np.isclose(found.d_z.estimate, 2 / sqrt(14 / 3)) and np.isclose(found.cohen_d.estimate, 2 / sqrt((14 / 3 + 2 / 3) / 2))
    assert np.isclose(found.hedges_g.estimate / found.cohen_d.estimate, gamma(3) / (sqrt(3) * gamma(2.5)))
    assert isnan(found.d_z.low) and found.d_z.method == found.hedges_g.method == "too few templates"


@given(st.lists(st.tuples(numbers, numbers), min_size=24, max_size=24), st.floats(0.1, 10), numbers)
def test_sizes_are_literal_have_no_unit_and_change_sign(pairs, k, shift):
    a, b = np.array(pairs).T + np.random.default_rng(0).normal(size=(2, 24))
    templates = np.repeat(range(9), [1, 2, 3, 4, 5, 1, 2, 3, 3])
    found, scaled, swapped = paired_size(a, b, templates), paired_size(k * a + shift, k * b + shift, templates), paired_size(b, a, templates)

    def sizes(a, b): return (a - b).mean() / (a - b).std(ddof=1), (a - b).mean() / sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)

    left = np.array([sizes(a[templates != t], b[templates != t]) for t in range(9)])
    errors = np.sqrt(8 / 9 * ((left - left.mean(0)) ** 2).sum(0))
    for i, name in enumerate(("d_z", "cohen_d")):
        interval, other = getattr(found, name), getattr(scaled, name)
        assert np.isclose(interval.estimate, sizes(a, b)[i]) and np.isclose(interval.low + interval.high, 2 * interval.estimate)
        assert np.isclose(getattr(swapped, name).low, -interval.high) and np.allclose([other.low, other.high], [interval.low, interval.high])
        t = (interval.high - interval.estimate) / errors[i]
        assert distributions.t.ppf(0.975, 8) < t < distributions.t.ppf(0.975, 4)  # templates of unequal sizes


def test_the_quantile_is_that_of_equal_templates():
    rng = np.random.default_rng(0)
    a, b, templates = rng.normal(size=24), rng.normal(size=24), np.repeat(range(12), 2)
    left = [(a - b)[templates != t].mean() / (a - b)[templates != t].std(ddof=1) for t in range(12)]
    found = paired_size(a, b, templates).d_z
    assert np.isclose((found.high - found.estimate) / np.sqrt(11 * np.var(left)), distributions.t.ppf(0.975, 11))


def test_hedges_interval_is_cohens_corrected_at_both_ends():
    rng = np.random.default_rng(0)
    found = paired_size(rng.normal(size=12) + 1, rng.normal(size=12), range(12))
    j = gamma(11) / (sqrt(11) * gamma(10.5))
    ends = [(getattr(found.hedges_g, end), getattr(found.cohen_d, end)) for end in ("low", "estimate", "high")]
    assert [g for g, _ in ends] == pytest.approx([j * d for _, d in ends])


def test_one_side_that_does_not_vary_leaves_a_size():
    values = np.random.default_rng(0).normal(size=20) + 1
    found = paired_size(values, np.zeros(20), range(20)).cohen_d
    assert found.estimate == pytest.approx(values.mean() / sqrt(values.var(ddof=1) / 2)) and found.low < found.estimate < found.high


def test_sizes_of_what_does_not_vary():
    values = np.random.default_rng(0).normal(size=20)
    shifted = paired_size(values + 0.1, values, range(20))
    assert isnan(shifted.d_z.estimate) and shifted.d_z.method == "the differences do not vary"
    assert np.isclose(shifted.cohen_d.estimate, 0.1 / values.std(ddof=1)) and shifted.cohen_d.low > 0
    still = paired_size(np.ones(20), np.zeros(20), range(20))
    assert isnan(still.cohen_d.estimate) and still.hedges_g.method == "the values do not vary" and still.difference.estimate == 1
    one = paired_size([1.0], [0.0], "a")
    assert all(isnan(getattr(one, name).estimate) for name in ("d_z", "cohen_d", "hedges_g"))
    outlier = paired_size(np.r_[np.ones(19), 5], np.zeros(20), range(20))
    assert outlier.d_z.estimate > 0 and isnan(outlier.d_z.low) and outlier.d_z.method == "without one of the templates nothing varies"


NO_PAIRS = [([1.0, 2], [1.0], "ab"), ([1.0, nan], [1.0, 1], "ab"), ([1.0, 2], [1.0, inf], "ab"), ([1.0, 2], [1.0, 2], "a"), ([], [], "")]


@pytest.mark.parametrize(("a", "b", "templates"), NO_PAIRS)
def test_pairs_are_checked(a, b, templates):
    with pytest.raises(InputError):
        paired_size(a, b, templates)


# What comes in

FINE = np.ones((4, 9))
WRONG = {
    "a curve needs a list of at least 4": ([0, 1, 2], FINE[:3], range(9)),
    "each larger than the one before": ([0, 1, 1, 2], FINE, range(9)),
    "none below 0": ([-1, 0, 1, 2], FINE, range(9)),
    "give finite numbers": ([0, 1, 2, inf], FINE, range(9)),
    "a row per dose and a column per prompt": (range(4), FINE.T, range(4)),
    "1 of 9 prompts have an effect that is not finite": (range(4), np.where(np.arange(36).reshape(4, 9) == 20, nan, 1), range(9)),
    "two lists of the same length": (range(4), FINE, range(8)),
    "a cluster label is missing": (range(4), FINE, [None, *range(8)]),
}


def selectivity(doses, effects, templates):
    return slope_difference(doses, effects, np.asarray(effects)[None], templates)


@pytest.mark.parametrize("function", [dose_curve, effect_levels, monotone_test, selectivity])
@pytest.mark.parametrize("message", WRONG)
def test_bad_input(function, message):
    with pytest.raises(InputError, match=message):
        function(*WRONG[message])


@pytest.mark.parametrize("function", [dose_curve, monotone_test])
def test_too_few_draws(function):
    with pytest.raises(InputError, match="give at least 99"):
        function(range(4), FINE, range(9), n_boot=98)


def test_bad_curves():
    for function in (fit_hill, area):
        with pytest.raises(InputError, match="per dose"):
            function(DOSES, [1, 2, 3])
    with pytest.raises(InputError, match="one finite number per dose"):
        fit_hill(DOSES, [inf, *range(10)])


def test_nothing_is_changed_and_no_global_randomness_is_used():
    effects, templates = made(DIP)
    before, state = effects.copy(), str(np.random.get_state())
    dose_curve(DOSES, effects, templates, n_boot=99), monotone_test(DOSES, effects, templates, n_boot=99), effect_levels(DOSES, effects, templates)
    slope_difference(DOSES, effects, effects[None], templates), paired_size(effects[0] + 1, effects[5], templates)
    assert (effects == before).all() and str(np.random.get_state()) == state


# Where the truth is known


@pytest.mark.slow
@pytest.mark.parametrize(("truth", "n_clusters", "noise"), [((0, 1, 0.4, 2), 14, 0.1), ((0, 1, 0.5, 8), 14, 0.15), ((0, -1, 0.3, 3), 8, 0.1)])
def test_intervals_of_the_fit_cover(truth, n_clusters, noise, n=150):
    rng, curve = np.random.default_rng(1), hill(DOSES, *truth)
    found = [dose_curve(DOSES, *draw_curves(rng, curve, n_clusters, noise=noise * NO_NOISE_AT_ZERO), seed=i, n_boot=299) for i in range(n)]
    for name, true in zip(("top", "ec50", "slope"), truth[1:]):
        results = iter(found)
        row = coverage_simulation(lambda c: getattr(c, name), lambda rng: (next(results),), true, n)  # noqa: B023
        assert row.wrong <= limit(n), (name, row)
        assert row.covered / (1 - row.no_interval) >= 1 - limit(n), (name, row)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat", "graded", "switch"])
def test_curves_that_never_fall_are_seldom_accused(name, n=500):
    curve = {"flat": 0 * DOSES, "graded": hill(DOSES, 0, 1, 0.4, 2), "switch": hill(DOSES, 0, 1, 0.5, 40)}[name]
    rng = np.random.default_rng(1)
    p = np.array([monotone_test(DOSES, *draw_curves(rng, curve, noise=0.3 * NO_NOISE_AT_ZERO), seed=i, n_boot=199).p_value for i in range(n)])
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() <= limit(n, level)


@pytest.mark.slow
def test_false_levels_are_seldom_claimed(n=200):
    rng, six = np.random.default_rng(1), np.array([0, 0.2, 0.4, 0.6, 0.8, 1])
    false = {"loael": 0, "harmless": 0}
    for _ in range(n):
        effects, templates = draw_curves(rng, np.array([0, 0, 0, 0.6, 0.8, 1]), noise=0.3)
        false["loael"] += effect_levels(six, effects, templates).loael <= 0.4
        effects, templates = draw_curves(rng, np.array([0, 0.1, 0.3, 0.6, 0.8, 1]), noise=0.2)
        false["harmless"] += effect_levels(six, effects, templates).harmless_up_to >= 0.2
    assert max(false.values()) / n <= limit(n)
