"""Mendelian randomisation: formulas written out, statsmodels as oracle, bad input, and simulations where the truth is known."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as distributions
from statsmodels.regression.linear_model import OLS, WLS
from statsmodels.sandbox.regression.gmm import IV2SLS

from circuit_generalization.errors import InputError
from circuit_generalization.instruments import (
    FEW,
    WEAK_F,
    changes,
    draw_changes,
    egger,
    egger_line,
    first_stage_f,
    instrument_rows,
    ivw,
    ivw_slope,
    median_slope,
    two_stage,
    two_stage_slope,
    weighted_median,
    why_left_out,
)
from circuit_generalization.mendelian import (
    LEAK_TOLERANCE,
    POOLED,
    balanced_halves,
    e_of_ratio,
    e_value,
    exclusion,
    hansen_j,
    heterogeneity,
    leak_reading,
    leak_rows,
    mendelian,
    sargan,
    split_sample,
    stacked_rows,
    textbook,
    two_sample,
)
from circuit_generalization.stats import clustered_mean, cr2_standard_error, ratio_interval, satterthwaite_dof, share_interval

X, Y, SE = np.array([1.0, 2, 4]), np.array([1.0, 6, 8]), np.array([1.0, 0.5, 2])  # weights 1, 4, 1/4


@pytest.fixture(scope="module")
def data():
    return draw_changes(np.random.default_rng(0), n_templates=12)


def pooled_dof(c):
    "Degrees of freedom of the mean of what the IVW line leaves: those that an ordinary clustered mean has."
    (x, y), w = c.effects, c.errors[1] ** -2
    return clustered_mean((w * x) @ (c.outcomes - (w * x * y).sum() / (w * x * x).sum() * c.exposures), c.templates).dof


def without(c, template):
    "The same data without one template, computed anew."
    keep = c.templates != template
    return changes(c.exposures[:, keep], c.outcomes[:, keep], c.templates[keep], c.names)


# ---- formulas


def test_lines_and_median_by_hand():
    assert ivw_slope(X, Y, SE) == pytest.approx((1 * 1 * 1 + 4 * 2 * 6 + 0.25 * 4 * 8) / (1 + 16 + 4))
    w, mean_x, mean_y = np.array([1, 4, 0.25]), (1 + 8 + 1) / 5.25, (1 + 24 + 2) / 5.25
    slope = (w * (X - mean_x) * (Y - mean_y)).sum() / (w * (X - mean_x) ** 2).sum()
    assert egger_line(X, Y, SE) == pytest.approx([mean_y - slope * mean_x, slope])
    # ratios 1, 3, 2 with weights 1, 16, 4: sorted 1, 2, 3 with middles 0.5, 3, 13 of 21; half is 10.5
    assert weighted_median(X, Y, SE) == pytest.approx(2 + (10.5 - 3) / (13 - 3))
    # clean run at (0, 0): means 7/4 and 15/4
    assert two_stage_slope(X, Y) == pytest.approx((45 - 4 * 7 / 4 * 15 / 4) / (21 - 4 * (7 / 4) ** 2))


@given(st.integers(0, 10**6), st.integers(3, 7))
def test_many_data_sets_at_once_are_each_alone(seed, j):
    rng = np.random.default_rng(seed)
    x, y, se = rng.uniform(0.1, 1, (4, j)), rng.normal(size=(4, j)), rng.uniform(0.5, 2, j)
    for f in (ivw_slope, egger_line, weighted_median):
        assert f(x, y, se) == pytest.approx(np.array([f(a, b, se) for a, b in zip(x, y)]))
    assert two_stage_slope(x, y) == pytest.approx(np.array([two_stage_slope(a, b) for a, b in zip(x, y)]))
    line = WLS(y[0], np.stack([np.ones(j), x[0]], 1), se**-2).fit().params
    assert egger_line(x[0], y[0], se) == pytest.approx(line, rel=1e-6, abs=1e-8)
    assert ivw_slope(x[0], y[0], se) == pytest.approx(WLS(y[0], x[0], se**-2).fit().params[0])
    assert min(y[0] / x[0]) - 1e-9 <= weighted_median(x[0], y[0], se) <= max(y[0] / x[0]) + 1e-9


def test_two_stages_are_the_regressions_row_by_row(data):
    x, y, runs = stacked_rows(data)
    assert len(x) == 7 * data.exposures.shape[1] and runs.sum(0)[1:] == pytest.approx(data.exposures.shape[1])
    oracle = IV2SLS(y, np.stack([np.ones(len(x)), x], 1), runs).fit()
    assert two_stage(data).value == pytest.approx(oracle.params[1])
    left = y - np.stack([np.ones(len(x)), x], 1) @ oracle.params
    projected = runs @ np.linalg.lstsq(runs, left, rcond=None)[0]
    assert sargan(data).value == pytest.approx(len(left) * (projected @ projected) / (left @ left))
    assert sargan(data).p == pytest.approx(distributions.chi2.sf(sargan(data).value, 5))


def test_effects_errors_and_f_are_those_of_each_instrument(data):
    for j, f in enumerate(first_stage_f(data)):
        assert data.errors[0, j] == pytest.approx(cr2_standard_error(data.exposures[j], data.templates))
        assert data.errors[1, j] == pytest.approx(cr2_standard_error(data.outcomes[j], data.templates))
        assert f == pytest.approx((data.exposures[j].mean() / data.errors[0, j]) ** 2)
    assert data.effects == pytest.approx(np.stack([data.exposures.mean(1), data.outcomes.mean(1)]))
    row = instrument_rows(data)[2]
    wald = ratio_interval(data.outcomes[2], data.exposures[2], data.templates)
    assert (row["wald"], row["wald_low"], row["wald_high"]) == (wald.estimate, wald.low, wald.high)
    assert row["wald"] == pytest.approx(data.outcomes[2].mean() / data.exposures[2].mean())


def test_q_and_the_textbook_written_out(data):
    (bx, by), se = data.effects, data.errors[1]
    slope = (bx * by / se**2).sum() / (bx**2 / se**2).sum()
    q = (((by - slope * bx) / se) ** 2).sum()
    book = textbook(data)
    assert heterogeneity(data, 19)["q"].value == pytest.approx(q) == book["textbook_q"].value
    assert book["textbook_q"].p == pytest.approx(distributions.chi2.sf(q, 5))
    error = math.sqrt(max(1, q / 5) / (bx**2 / se**2).sum())
    half = distributions.t.ppf(0.975, 5) * error
    assert (book["textbook_ivw"].low, book["textbook_ivw"].high) == pytest.approx((slope - half, slope + half))
    spread = changes(data.exposures, data.outcomes + 10 * np.arange(6)[:, None], data.templates, data.names).oriented()  # scale above 1
    fit = WLS(spread.effects[1], np.stack([np.ones(6), spread.effects[0]], 1), spread.errors[1] ** -2).fit()
    intercept = textbook(spread)["textbook_egger_intercept"]
    assert fit.scale > 1 and (intercept.value, intercept.p) == pytest.approx((fit.params[0], fit.pvalues[0]))


# ---- intervals


def test_jackknife_leaves_out_templates_one_by_one(data):
    g, se = len(data.sizes), data.errors[1]
    left = [without(data, t) for t in range(g)]
    dof = pooled_dof(data)
    slopes = np.array([two_stage_slope(*c.effects) for c in left])
    error = math.sqrt((g - 1) / g * ((slopes - slopes.mean()) ** 2).sum())
    found = two_stage(data)
    assert (found.high - found.low) / 2 == pytest.approx(error * distributions.t.ppf(0.975, dof))
    assert found.p == pytest.approx(2 * distributions.t.sf(found.value / error, dof))
    slopes = np.array([ivw_slope(*c.effects, se) for c in left])  # the weights of the full data
    error = math.sqrt((g - 1) / g * ((slopes - slopes.mean()) ** 2).sum())
    assert (ivw(data).high - ivw(data).low) / 2 >= error * distributions.t.ppf(0.975, dof) * (1 - 1e-9)  # plus what instruments add


def test_the_median_is_bootstrapped_over_whole_templates(data):
    rng, g = np.random.default_rng(5), len(data.sizes)
    medians = []
    for chosen in rng.integers(0, g, (50, g - 1)):
        prompts = np.concatenate([np.flatnonzero(data.templates == t) for t in chosen])
        medians.append(weighted_median(data.exposures[:, prompts].mean(1), data.outcomes[:, prompts].mean(1), data.errors[1]))
    found = median_slope(data, n_boot=50, seed=5)
    assert (found.high - found.low) / 2 == pytest.approx(np.std(medians, ddof=1) * distributions.t.ppf(0.975, pooled_dof(data)))


def test_variance_between_instruments_written_out(data):
    direct = np.array([0.5, -0.5, 0.3, -0.3, 0.6, -0.6])[:, None]
    c = changes(data.exposures, data.outcomes + direct, data.templates, data.names)
    (x, y), w, n, slope = c.effects, c.errors[1] ** -2, len(c.templates), ivw(c).value
    hat = np.outer(x, w * x) / (w * x * x).sum()
    leave, omega = np.eye(6) - hat, np.zeros((6, 6))
    for t, size in enumerate(c.sizes):  # CR2 covariance of the mean residuals
        here = (c.outcomes - slope * c.exposures - (y - slope * x)[:, None])[:, c.templates == t].sum(1)
        omega += np.outer(here, here) / (1 - size / n) / n**2
    q, expected = (w * (y - slope * x) ** 2).sum(), np.trace(np.diag(w) @ leave @ omega @ leave.T)
    tau2 = (q - expected) / np.trace(np.diag(w) @ leave)
    between = tau2 * (w**2 * x**2).sum() / (w * x * x).sum() ** 2
    slopes = np.array([ivw_slope(*without(c, t).effects, c.errors[1]) for t in range(12)])
    over = 11 / 12 * ((slopes - slopes.mean()) ** 2).sum()
    dof = (over + between) ** 2 / (over**2 / pooled_dof(c) + between**2 / 5)
    assert tau2 > 0.05 and heterogeneity(c, 19)["i_squared"].value == pytest.approx(1 - expected / q)
    assert ivw(c).high - slope == pytest.approx(distributions.t.ppf(0.975, dof) * math.sqrt(over + between))
    # and Hansen's J, from the same covariance
    inverse = np.linalg.inv(omega)
    best = (x @ inverse @ y) / (x @ inverse @ x)
    j, nu = (y - best * x) @ inverse @ (y - best * x), satterthwaite_dof(c.sizes)
    assert hansen_j(c).value == pytest.approx(j)
    assert hansen_j(c).p == pytest.approx(distributions.f.sf(j * (nu - 4) / (5 * nu), 5, nu - 4))


def test_the_interval_of_eggers_line_written_out(data):
    direct = np.array([0.5, -0.5, 0.3, -0.3, 0.6, -0.6])[:, None]
    c = changes(data.exposures, data.outcomes + direct, data.templates, data.names).oriented()
    (x, y), w, n, g = c.effects, c.errors[1] ** -2, len(c.templates), len(c.sizes)
    design = np.stack([np.ones(6), x], 1)
    solve = np.linalg.inv(design.T @ np.diag(w) @ design) @ design.T @ np.diag(w)
    line, leave = solve @ y, np.eye(6) - design @ solve
    left = c.outcomes - line[1] * c.exposures
    sums = np.stack([(left - left.mean(1, keepdims=True))[:, c.templates == t].sum(1) / np.sqrt(1 - c.sizes[t] / n) / n for t in range(g)], 1)
    expected = np.trace(np.diag(w) @ leave @ sums @ sums.T @ leave.T)
    tau2 = ((w * (leave @ y) ** 2).sum() - expected) / np.trace(np.diag(w) @ leave)
    lines = np.array([egger_line(*without(c, t).effects, c.errors[1]) for t in range(g)])
    over, between = (g - 1) / g * ((lines - lines.mean(0)) ** 2).sum(0), tau2 * (solve**2).sum(1)
    dof = (over + between) ** 2 / (over**2 / pooled_dof(c) + between**2 / 4)  # six instruments, two coefficients
    found = egger(c)
    assert tau2 > 0.05 and [e.value for e in found.values()] == pytest.approx(line)
    assert [e.high - e.value for e in found.values()] == pytest.approx(distributions.t.ppf(0.975, dof) * np.sqrt(over + between))


def test_p_and_i_squared_at_their_ends(data):
    far = changes(data.exposures, data.outcomes + np.array([9, 0, 0, 0, 0, 0])[:, None], data.templates, data.names)
    assert heterogeneity(far, 99)["q"].p == 1 / 100  # no draw is as large, and the data are one of the draws
    shares = [heterogeneity(draw_changes(np.random.default_rng(seed)), 1)["i_squared"].value for seed in range(10)]
    assert min(shares) == 0 and 0 < max(shares) < 1


def test_what_does_not_matter(data):
    n = data.exposures.shape[1]
    order, rows = np.random.default_rng(1).permutation(n), [3, 0, 5, 1, 4, 2]
    shuffled = changes(data.exposures[rows][:, order], data.outcomes[rows][:, order], [f"t{t}" for t in data.templates[order]], list("abcdef"))
    turned = changes(data.exposures * [[1], [-1], [1], [-1], [1], [1]], data.outcomes * [[1], [-1], [1], [-1], [1], [1]], data.templates, data.names)
    for other in (shuffled, turned):
        for f in (ivw, hansen_j, lambda c: egger(c)["egger_slope"], lambda c: egger(c)["egger_intercept"]):
            assert (f(other).value, f(other).p) == pytest.approx((f(data).value, f(data).p))
    assert two_stage(shuffled).high == pytest.approx(two_stage(data).high)
    tenfold = changes(data.exposures, 10 * data.outcomes, data.templates, data.names)  # another unit of the outcome
    assert ivw(tenfold).high == pytest.approx(10 * ivw(data).high) and hansen_j(tenfold).p == pytest.approx(hansen_j(data).p)
    assert heterogeneity(tenfold, 99)["q"].p == pytest.approx(heterogeneity(data, 99)["q"].p)


def test_seeds_are_the_only_randomness(data):
    state = np.random.get_state()[1].copy()
    def call(seed): return mendelian(data.exposures, data.outcomes, data.templates, data.names, seed=seed).to_dict()
    first = call(3)
    assert len({heterogeneity(data, 99, seed)["q"].p for seed in range(5)}) > 1
    assert first == call(3) != call(4) and (np.random.get_state()[1] == state).all()


# ---- what is left out, and why


def test_weak_instruments_are_named_and_left_out():
    c = draw_changes(np.random.default_rng(8), strengths=(0.01, 0.4, 0.5, 0.6))
    found = mendelian(c.exposures, c.outcomes, c.templates, c.names)
    assert list(found.left_out) == ["z0"] and "weak" in found.left_out["z0"] and first_stage_f(c)[0] < WEAK_F
    assert [r["used"] for r in found.rows] == [False, True, True, True] and not found.rows[0]["strong"]
    strong = mendelian(c.exposures[1:], c.outcomes[1:], c.templates, c.names[1:])
    assert found.estimates == strong.estimates
    leaks = np.array([[1], [0], [0], [0]]) * c.outcomes[3] + 0.01 * c.exposures  # only the weak one leaks
    assert mendelian(c.exposures, c.outcomes, c.templates, c.names, leaks).estimates["exclusion"].value > 0.98
    kept = mendelian(c.exposures, c.outcomes, c.templates, c.names, keep_weak=True)
    assert not kept.left_out and kept.rows[0]["used"] and not kept.rows[0]["strong"] and kept.estimates["ivw"] == ivw(c)


def test_an_instrument_that_does_nothing_or_never_varies_has_a_reason(data):
    x, y = data.exposures.copy(), data.outcomes.copy()
    x[0], y[0], y[1] = 0, 0, 0
    found = mendelian(x, y, data.templates, data.names)
    assert "does not move" in found.left_out["z0"] and "no weight" in found.left_out["z1"]
    none = mendelian(0 * x, y, data.templates, data.names, leaks=y)
    assert {*POOLED, "exclusion", "leak_share"} == set(none.estimates)
    assert all(math.isnan(e.value) and "no strong instrument" in e.how for e in none.estimates.values())
    assert set(none.estimates) == set(mendelian(data.exposures, y, data.templates, data.names, leaks=y).estimates)


def test_few_instruments_make_no_claim_of_agreement(data):
    two = data.take(np.array([False] * 4 + [True] * 2))
    for e in (*egger(two).values(), *heterogeneity(two).values(), hansen_j(two), median_slope(two), *textbook(two).values()):
        assert math.isnan(e.value) and math.isnan(e.p) and e.how == FEW
    one = data.take(np.array([False] * 5 + [True]))
    ratio = data.outcomes[5].mean() / data.exposures[5].mean()
    with np.errstate(all="raise"):  # a line through one point leaves nothing to divide by
        assert ivw(one).value == pytest.approx(ratio) == two_stage(one).value and math.isfinite(ivw(one).low)


def test_few_templates_give_estimates_without_intervals(data):
    keep = data.templates < 5
    found = mendelian(data.exposures[:, keep], data.outcomes[:, keep], data.templates[keep], data.names, keep_weak=True)
    for name in ("ivw", "egger_slope", "weighted_median", "two_stage", "q"):
        e = found.estimates[name]
        assert math.isfinite(e.value) and math.isnan(e.low) and math.isnan(e.p) and e.how == "too few templates"
    assert "too few templates" in found.estimates["hansen_j"].how and "too few templates" in found.estimates["split_sample"].how
    many = draw_changes(np.random.default_rng(1), strengths=np.linspace(0.4, 0.9, 12), n_templates=10)
    assert math.isnan(hansen_j(many).p) and "too few templates for 12" in hansen_j(many).how and math.isfinite(heterogeneity(many, 99)["q"].p)


def test_hansens_j_needs_two_degrees_of_freedom_in_the_denominator():
    rng, templates = np.random.default_rng(0), np.repeat(np.arange(10), 2)
    def found(n): return hansen_j(changes(1 + 0.1 * rng.normal(size=(n, 20)), 1 + 0.1 * rng.normal(size=(n, 20)), templates, list("abcdefghij")[:n]))
    assert found(10).how == "too few templates for 10 instruments" and "F(7, 3.0)" in found(8).how  # 10 templates of one size: 9 degrees


def test_data_without_noise(data):
    exact = changes(data.exposures, 2 * data.exposures, data.templates, data.names)
    assert ivw(exact).value == pytest.approx(2) and ivw(exact).how == "no variation between templates"
    assert math.isnan(hansen_j(exact).p) and heterogeneity(exact, 99)["q"].p == 1
    copies = changes(data.exposures[[0, 1, 1]], data.outcomes[[0, 1, 1]], data.templates, list("abc"))
    assert "repeat" in hansen_j(copies).how
    alike = changes(data.exposures[[1, 1, 1]], data.outcomes[[0, 1, 2]], data.templates, list("abc"))
    assert all("equally strong" in e.how for e in egger(alike).values())


@pytest.mark.parametrize("change, message", [
    (dict(exposures=lambda x: np.where(x == x[2, 5], np.nan, x)), "exposures of instrument 'z2' on prompt 5"),
    (dict(outcomes=lambda y: np.where(y == y[1, 3], np.inf, y)), "outcomes of instrument 'z1' on prompt 3"),
    (dict(outcomes=lambda y: y[:, :-1]), "outcomes of shape"), (dict(exposures=lambda x: x[:-1]), "exposures of shape"),
    (dict(exposures=lambda x: x[0]), "exposures of shape"), (dict(templates=lambda t: t[:-1]), "shape"),
    (dict(names=lambda n: ("z0", "z0", *n[2:])), "'z0'.* more than once"), (dict(names=lambda n: ()), "no instruments"),
    (dict(templates=lambda t: 0 * t), "one template"), (dict(templates=lambda t: [None, *t[1:]]), "label is missing"),
    (dict(leaks=lambda y: y[:, 1:]), "leaks of shape"), (dict(leaks=lambda y: y * np.nan), "leaks of instrument 'z0' on prompt 0"),
    (dict(leaks=lambda y: y, tolerance=lambda _: -1), "tolerance")])
def test_bad_input_says_what_and_where(data, change, message):
    given = dict(exposures=data.exposures, outcomes=data.outcomes, templates=data.templates, names=data.names)
    given |= {k: f(given.get(k, data.outcomes)) for k, f in change.items()}
    with pytest.raises(InputError, match=message): mendelian(**given)


# ---- exclusion


def test_exclusion_is_a_ratio_of_sums_with_turned_signs(data):
    sign = np.array([1, -1, 1, -1, 1, 1.0])[:, None]
    c = changes(sign * data.exposures, sign * data.outcomes, data.templates, data.names)
    leaks = 0.25 * data.outcomes + 0.01 * np.random.default_rng(0).normal(size=data.outcomes.shape)
    found, plain = exclusion(c, sign * leaks), exclusion(data, leaks)
    assert found["leak_share"].value == pytest.approx(leaks.sum() / data.outcomes.sum()) == plain["leak_share"].value
    assert found["exclusion"].value == pytest.approx(1 - found["leak_share"].value)
    assert (found["exclusion"].low, found["exclusion"].high) == pytest.approx((1 - found["leak_share"].high, 1 - found["leak_share"].low))
    against = exclusion(data, -leaks)  # a leak against the effect is no less a leak
    assert (against["exclusion"].value, against["exclusion"].low) == pytest.approx((plain["exclusion"].value, plain["exclusion"].low))
    assert against["leak_share"].value < 0
    nothing = exclusion(data, 0.01 * np.random.default_rng(0).normal(size=data.outcomes.shape))
    assert nothing["exclusion"].high == 1 and 0.9 < nothing["exclusion"].low < 1


def test_readings_of_leaks(data):
    y, t = data.outcomes[5], data.templates
    noise = 0.01 * np.random.default_rng(0).normal(size=len(y))
    assert leak_reading(noise, y, t) == leak_reading(0 * y, y, t) == "excluded"
    assert leak_reading(0.3 * y + noise, y, t) == leak_reading(-0.3 * y + noise, y, t) == "leaks"
    assert leak_reading(0.3 * y + noise, y, t, tolerance=0.5) == "excluded"
    assert leak_reading(LEAK_TOLERANCE * y + noise, y, t).startswith("not decidable: shares within")
    assert leak_reading(0.3 * y + noise, y, np.minimum(t, 5)) == "not decidable: too few templates"
    centred = y - y.mean()
    assert math.isnan(ratio_interval(1 + noise, centred, t).low) and leak_reading(1 + noise, centred, t) == "leaks"  # share without ends
    assert leak_reading(0 * y, centred, t) == "excluded"  # exactly nothing arrives, whatever the whole is
    assert leak_reading(0 * y, 0 * y, t).startswith("not decidable")  # of nothing, nothing arrives
    rows = leak_rows(data, np.stack([0.3 * v for v in data.outcomes]))
    assert rows[0]["leak"] == pytest.approx(0.3 * data.outcomes[0].mean()) and rows[0]["leak_share_high"] == pytest.approx(0.3)


# ---- two samples


@given(st.lists(st.integers(1, 30), min_size=2, max_size=15), st.integers(0, 1000))
def test_halves_are_balanced(sizes, seed):
    halves = balanced_halves(np.array(sizes), 8, seed)
    assert (np.abs(halves.sum(1) - len(sizes) / 2) <= 0.5).all()
    assert (np.abs(halves @ sizes - sum(sizes) / 2) <= max(sizes) / 2 + 1e-9).all()  # neighbours in size: differences telescope
    assert (halves == balanced_halves(np.array(sizes), 8, seed)).all()


def test_halves_are_random():
    halves = balanced_halves(np.arange(1, 11), 400)
    assert (abs(halves.mean(0) - 0.5) < 0.1).all() and len({tuple(half) for half in halves}) > 30


def test_split_sample_written_out(data):
    halves, se = balanced_halves(data.sizes, 3, seed=7), data.errors[1]
    def literal(kept):
        top = bottom = both = 0.0
        for half in halves:
            inside = half[data.templates]
            parts = [[v[:, m & kept].mean(1) for v in (data.exposures, data.outcomes)] for m in (inside, ~inside)]
            for (x, _), (other, y) in (parts, parts[::-1]):
                top, bottom, both = top + (x * y / se**2).sum(), bottom + (x * x / se**2).sum(), both + (x * other / se**2).sum()
        return top / bottom, both / bottom, top / both
    found, g = split_sample(data, 3, 7), len(data.sizes)
    assert [e.value for e in found.values()] == pytest.approx(literal(data.templates >= 0))
    left = np.array([literal(data.templates != t) for t in range(g)])
    errors = np.sqrt((g - 1) / g * ((left - left.mean(0)) ** 2).sum(0))
    assert [e.high - e.value for e in found.values()] == pytest.approx(errors * distributions.t.ppf(0.975, pooled_dof(data)))


def test_two_data_sets_are_matched_by_name(data):
    other = draw_changes(np.random.default_rng(5), n_templates=10)
    found = two_sample(data, other)
    order = [4, 2, 0, 1, 5, 3]
    moved = changes(other.exposures[order], other.outcomes[order], other.templates, [other.names[i] for i in order])
    assert two_sample(data, moved)["two_sample"].low == pytest.approx(found["two_sample"].low)
    x, y, w = data.effects[0], other.effects[1], other.errors[1] ** -2
    assert found["two_sample"].value == pytest.approx((w * x * y).sum() / (w * x * x).sum())
    rho = 1 - (w * data.errors[0] ** 2).sum() / (w * x * x).sum()
    assert found["reliability"].value == pytest.approx(rho)
    assert found["two_sample_corrected"].value == pytest.approx(found["two_sample"].value / rho)
    a = w * x  # each end is a slope that a test of two independent means just does not reject
    top, bottom = clustered_mean(a @ other.outcomes, other.templates), clustered_mean(a @ data.exposures, data.templates)
    v = np.array([top.se**2, (found["two_sample"].value * bottom.se) ** 2])
    t = v @ [top.t(0.95), bottom.t(0.95)] / v.sum()
    for end in (found["two_sample"].low, found["two_sample"].high):
        assert abs(top.mean - end * bottom.mean) == pytest.approx(t * math.hypot(top.se, end * bottom.se))
    assert found["two_sample"].p == pytest.approx(2 * distributions.t.sf(abs(top.mean) / top.se, top.dof))
    fewer = changes(other.exposures[:4], other.outcomes[:4], other.templates, ["z5", "z1", "new", "z3"])
    assert "3 of 7" in two_sample(data, fewer)["two_sample"].how
    with pytest.raises(InputError, match="no instrument is in both"):
        two_sample(data, changes(other.exposures[:1], other.outcomes[:1], other.templates, ["new"]))
    nothing = changes(0 * data.exposures, data.outcomes, data.templates, data.names)
    assert all(math.isnan(e.value) for e in two_sample(nothing, other).values())


def test_two_data_sets_that_do_not_say_enough(data):
    other = draw_changes(np.random.default_rng(5), n_templates=10)
    still = changes(other.exposures, other.outcomes * [[0], [1], [1], [1], [1], [1]], other.templates, other.names)  # no error, so no weight
    rest = changes(other.exposures[1:], other.outcomes[1:], other.templates, other.names[1:])
    assert two_sample(data, still)["two_sample"].high == pytest.approx(two_sample(data, rest)["two_sample"].high)
    weak = draw_changes(np.random.default_rng(3), strengths=[0.001] * 6)
    found = two_sample(weak, other, keep_weak=True)
    assert math.isnan(found["two_sample"].low) and found["two_sample"].how.startswith("the effect on the exposure may be zero")
    assert found["reliability"].value < 0 and math.isnan(found["two_sample_corrected"].value) and "mostly noise" in found["two_sample_corrected"].how


# ---- E-values


def test_e_value_by_hand():
    assert e_of_ratio(2) == pytest.approx(2 + math.sqrt(2)) == pytest.approx(e_of_ratio(0.5))
    assert e_of_ratio(1) == 1 and e_of_ratio(math.inf) == e_of_ratio(0) == math.inf
    for bad in (-1, math.nan):
        with pytest.raises(InputError): e_of_ratio(bad)


def test_risk_ratio_without_correlation_is_the_published_formula():
    templates = np.repeat(np.arange(20), 2)
    a, b = np.tile([1.0, 1, 1, 0], 10), np.tile([1.0, 0, 0, 0, 0, 0, 0, 0], 5)
    found, one, zero = e_value(a, b, templates), share_interval(a, templates), share_interval(b, templates)
    rho = np.clip((cr2_standard_error(a + b, templates) ** 2 - cr2_standard_error(a, templates) ** 2 - cr2_standard_error(b, templates) ** 2)
                  / (2 * cr2_standard_error(a, templates) * cr2_standard_error(b, templates)), -1, 1)
    p, q, l1, u1, l0, u0 = one.estimate, zero.estimate, one.low, one.high, zero.low, zero.high
    low, high = p * q - rho * (p - l1) * (u0 - q), p * q - rho * (u1 - p) * (q - l0)
    low = (low - math.sqrt(low**2 - l1 * u0 * (2 * p - l1) * (2 * q - u0))) / (u0 * (2 * q - u0))
    high = (high + math.sqrt(high**2 - u1 * l0 * (2 * p - u1) * (2 * q - l0))) / (l0 * (2 * q - l0))
    assert (found.risk_ratio, found.risk_low, found.risk_high) == pytest.approx((6, low, high))
    assert found.value == pytest.approx(6 + math.sqrt(30)) and found.low == pytest.approx(e_of_ratio(low))
    turned = e_value(b, a, templates)  # the other way round: the same evidence
    assert (turned.value, turned.low) == pytest.approx((found.value, found.low))


def test_e_value_with_zero_events():
    templates = np.repeat(np.arange(10), 3)
    half, none = np.tile([1, 0], 15), np.zeros(30)
    some = e_value(half, none, templates)
    assert some.risk_ratio == pytest.approx(15.5 / 0.5) and some.risk_high == math.inf and 1 < some.low < some.value and "half an event" in some.how
    nothing = e_value(none, none, templates)
    assert math.isnan(nothing.value) and "no answer flipped" in nothing.how
    few = e_value(half, none, np.minimum(templates, 3))
    assert few.value == some.value and math.isnan(few.low) and "too few templates" in few.how
    assert e_value(half, half, templates).low == 1
    for bad, message in ((half[:-1], "the same prompts in both"), (half * 0.3, "0 or 1"), (half * np.nan, "0 or 1")):
        with pytest.raises(InputError, match=message): e_value(half, bad, templates)


# ---- the whole


def test_results_are_plain_and_strict_json(data):
    leaks = 0.05 * data.outcomes
    found = mendelian(data.exposures.tolist(), data.outcomes.tolist(), [f"t{t}" for t in data.templates], list(data.names), leaks.tolist())
    text = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(text["estimates"]) == {*POOLED, "leak_share", "exclusion"} and len(text["rows"]) == 6
    assert text["estimates"]["i_squared"]["p"] is None and found.estimates["exclusion"].value == pytest.approx(0.95)
    assert found.table().loc["z3", "exclusion"] == "excluded" and found.summary().loc["ivw", "value"] == ivw(data).value
    bare = mendelian(data.exposures, data.outcomes, data.templates, data.names)
    assert set(bare.estimates) == set(POOLED) and "leak" not in bare.rows[0]


# ---- simulations


def repeat(f, n, seed, **how):
    rng = np.random.default_rng(seed)
    return [f(draw_changes(rng, **how)) for _ in range(n)]


def covered(estimates, truth):
    "Share of the intervals given that contain the truth; nearly all must be given."
    there = [e for e in estimates if math.isfinite(e.low)]
    assert len(there) > 0.9 * len(estimates)
    return np.mean([e.low < truth < e.high for e in there])


def test_q_does_not_cry_wolf_and_sees_a_direct_path():
    p = np.array(repeat(lambda c: heterogeneity(c, 199)["q"].p, 300, 0, n_templates=12))
    assert (p < 0.05).mean() <= 0.07 and (p < 0.2).mean() <= 0.24
    assert np.mean(repeat(lambda c: heterogeneity(c, 199)["q"].p < 0.05, 100, 1, direct=[0.4, 0, 0, 0, 0, 0])) > 0.7
    assert np.mean(repeat(lambda c: textbook(c)["textbook_q"].p < 0.05, 100, 1, direct=[0.4, 0, 0, 0, 0, 0])) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("how", [dict(), dict(n_templates=9), dict(strengths=np.linspace(0.2, 0.9, 12)), dict(strengths=(0.4, 0.5, 0.6)),
                                 dict(slope=0.0, confounding=2.0, n_templates=20)],
                         ids=["six", "nine templates", "twelve", "three", "no effect, confounded"])
def test_intervals_cover_with_shared_prompts(how):
    truth = how.get("slope", 2.0)
    def slopes(c):
        c = c.take(np.array([not why for why in why_left_out(c)]))  # as `mendelian` does
        return ivw(c), two_stage(c), median_slope(c, 199), split_sample(c)["split_sample_corrected"], *egger(c).values()
    found = repeat(slopes, 400, 2, **how)
    for name, target, estimates in zip(("ivw", "two-stage", "median", "split", "intercept", "egger"), (*[truth] * 4, 0, truth), zip(*found)):
        assert covered(estimates, target) >= 0.92, name


@pytest.mark.slow
def test_textbook_intervals_do_not_cover():
    found = repeat(lambda c: textbook(c), 300, 3, strengths=np.linspace(0.2, 0.9, 12))
    assert covered([f["textbook_ivw"] for f in found], 2) < 0.87
    assert np.mean([f["textbook_sargan"].p < 0.05 for f in found]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("how", [dict(n_templates=10, strengths=(0.4, 0.5, 0.6)), dict(n_templates=24)], ids=str)
def test_hansen_and_the_egger_intercept_keep_their_level(how):
    found = repeat(lambda c: (hansen_j(c).p, egger(c)["egger_intercept"].p), 500, 4, **how)
    for p in map(np.array, zip(*found)):
        assert (p < 0.05).mean() <= 0.07 and (p < 0.2).mean() <= 0.24


@pytest.mark.slow
def test_hansen_and_the_egger_intercept_have_power():
    assert np.mean(repeat(lambda c: hansen_j(c).p < 0.05, 100, 5, direct=[0.4, 0, 0, 0, 0, 0], n_templates=24)) > 0.8
    assert np.mean(repeat(lambda c: egger(c)["egger_intercept"].p < 0.05, 100, 5, direct=-0.4)) > 0.7


@pytest.mark.slow
def test_balanced_direct_effects_are_in_the_interval():
    "Direct effects that average to zero over instruments widen the interval; the jackknife alone would be far too short."
    rng, found = np.random.default_rng(6), []
    for _ in range(300):
        c = draw_changes(rng, strengths=np.linspace(0.3, 0.9, 10), direct=0.3 * rng.normal(size=10), n_templates=20)
        found.append((ivw(c), *egger(c).values()))
    for target, estimates in zip((2, 0, 2), zip(*found)): assert covered(estimates, target) >= 0.91


@pytest.mark.slow
def test_one_direct_path_moves_ivw_and_not_the_median():
    how = dict(direct=[0, 0, 0, 0, 0, 0, 0, -1.2], strengths=np.linspace(0.2, 0.9, 8))
    found = repeat(lambda c: (ivw(c).value, median_slope(c, 99).value), 150, 7, **how)
    bias = np.mean(found, 0) - 2
    assert bias[0] > 0.2 and bias[0] > 4 * abs(bias[1])


@pytest.mark.slow
def test_two_samples_cover_and_weak_ones_lean_to_zero():
    rng = np.random.default_rng(8)
    found = [two_sample(draw_changes(rng), draw_changes(rng, n_templates=20)) for _ in range(400)]
    assert covered([f["two_sample_corrected"] for f in found], 2) >= 0.93
    weak = dict(strengths=[0.06] * 8, confounding=4.0, n_templates=16)
    pairs = [(draw_changes(rng, **weak), draw_changes(rng, **weak)) for _ in range(250)]
    one = np.median([ivw(a).value for a, _ in pairs])
    two, _, corrected = np.nanmedian([[e.value for e in two_sample(a, b, keep_weak=True).values()] for a, b in pairs], 0)
    assert two < 1.75 < corrected < 2.4 < one


@pytest.mark.slow
def test_readings_of_leaks_keep_their_level():
    rng, said = np.random.default_rng(9), []
    for _ in range(500):
        c = draw_changes(rng, strengths=(0.6,))
        said.append(leak_reading(0.1 * c.outcomes[0] + 0.05 * rng.normal(size=14)[c.templates], c.outcomes[0], c.templates))
    assert said.count("excluded") / 500 < 0.05 and said.count("leaks") / 500 < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("ratio, rate", [(1, 0.2), (3, 0.15), (3, 0.03)])
def test_risk_ratios_cover(ratio, rate):
    rng, found = np.random.default_rng(10), []
    for _ in range(400):
        templates = np.repeat(np.arange(14), rng.integers(1, 10, 14))
        touchy = 2 * rng.beta(4, 4, 14)[templates]
        found.append(e_value(*(rng.random(len(templates)) < np.minimum(1, touchy * r) for r in (ratio * rate, rate)), templates))
    there = [e for e in found if not math.isnan(e.risk_low)]
    assert np.mean([e.risk_low <= ratio <= e.risk_high for e in there]) >= 0.93 and len(there) > 380
    assert ratio > 1 or np.mean([e.low > 1 for e in there]) <= 0.07  # an E-value that cries wolf


def test_clustered_first_stage_is_the_regression_on_a_constant(data):
    "With as many prompts in every template, F is the squared cluster-robust t of statsmodels up to its small-sample factors."
    templates = np.repeat(np.arange(10), 3)
    x = data.exposures[0][:30]
    c = changes(x[None], x[None], templates, ["z"])
    fit = OLS(x, np.ones(30)).fit(cov_type="cluster", cov_kwds=dict(groups=templates, use_correction=False))
    assert first_stage_f(c)[0] == pytest.approx(fit.tvalues[0] ** 2 * 9 / 10)
