"""Metrics: values worked out by hand, properties over drawn inputs, and the order of the verdict's rules."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from circuit_generalization.errors import InputError
from circuit_generalization.metrics import (
    THRESHOLDS,
    VERDICTS,
    Thresholds,
    accuracy_of,
    bounded_score,
    effect_scale,
    gap,
    incompleteness,
    kl_divergence,
    least_effect,
    logit_difference,
    mean_of_ratios,
    necessity,
    probability_difference,
    ratio_of_means,
    sign_agrees,
    sufficiency,
    verdict,
    verdicts,
    wanted_tokens,
)

finite = st.floats(-1e3, 1e3)
anything = st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def scored_prompts(draw):
    "Logits [draw, prompt, vocab] and padded id sets, answers and distractors apart."
    n_prompts, vocab = draw(st.integers(1, 4)), draw(st.integers(4, 9))
    logits = draw(st.lists(st.floats(-20, 20), min_size=2 * n_prompts * vocab, max_size=2 * n_prompts * vocab))
    sets = []
    for _ in range(n_prompts):
        ids = draw(st.permutations(range(vocab)))
        n_answers, n_distractors = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        sets.append((list(ids[:n_answers]), list(ids[2:2 + n_distractors])))
    pad = lambda rows, width: torch.tensor([row + [-1] * (width - len(row)) for row in rows])  # noqa: E731
    return (torch.tensor(logits, dtype=torch.float64).view(2, n_prompts, vocab),
            pad([a for a, _ in sets], 3), pad([d for _, d in sets], 2), sets)


# ---- logits to numbers


def test_logit_difference_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0, 50.0], [0.0, 0.0, 0.0, 50.0]])
    ld = logit_difference(logits, torch.tensor([[2, -1], [0, 1]]), torch.tensor([[0], [2]]))
    assert ld[0].item() == 2.0  # exact for single ids, and the last token is never read through -1
    assert ld[1].item() == pytest.approx(math.log(2))


@given(scored_prompts())
def test_logit_difference_is_the_log_odds_of_the_sets(case):
    logits, answers, distractors, sets = case
    ld, p = logit_difference(logits, answers, distractors), logits.softmax(-1)
    for i, (a, d) in enumerate(sets):
        torch.testing.assert_close(ld[:, i], p[:, i, a].sum(-1).log() - p[:, i, d].sum(-1).log())
    torch.testing.assert_close(ld, -logit_difference(logits, distractors, answers))


@given(scored_prompts())
def test_wanted_tokens_give_the_same_logit_difference(case):
    logits, answers, distractors, sets = case
    ids, answer_columns, distractor_columns = wanted_tokens(answers, distractors)
    assert ids.tolist() == sorted({token for pair in sets for part in pair for token in part})
    assert torch.equal((answer_columns < 0), (answers < 0))
    few = logit_difference(logits[..., ids], answer_columns, distractor_columns)
    assert torch.equal(few, logit_difference(logits, answers, distractors))


@given(scored_prompts(), st.integers(1, 3))
def test_more_padding_changes_nothing(case, width):
    logits, answers, distractors, _ = case
    padded = torch.nn.functional.pad(answers, (0, width), value=-1)
    assert torch.equal(logit_difference(logits, padded, distractors), logit_difference(logits, answers, distractors))


@pytest.mark.parametrize("answers, distractors, says", [
    ([[0], [-1]], [[1], [1]], "answers of prompt 1 are empty"),
    ([[0], [0]], [[1], [4]], "distractors of prompt 1 name token 4"),
    ([[0]], [[1], [1]], "the logits hold 2 prompts"),
])
def test_unusable_ids_are_refused_by_name(answers, distractors, says):
    logits = torch.zeros(2, 4)
    for metric in (logit_difference, probability_difference):
        with pytest.raises(InputError, match=says):
            metric(logits, torch.tensor(answers), torch.tensor(distractors))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_are_refused_by_prompt(bad):
    logits = torch.zeros(3, 2, 4)
    logits[1, 1, 0] = bad
    with pytest.raises(InputError, match="wanted logits of prompt 1"):
        logit_difference(logits, torch.tensor([[0], [0]]), torch.tensor([[1], [1]]))
    with pytest.raises(InputError, match="prompt, vocab"):
        logit_difference(torch.zeros(4), torch.tensor([[0]]), torch.tensor([[1]]))


def test_nothing_is_mutated():
    logits, answers, distractors = torch.randn(2, 5), torch.tensor([[0, -1], [1, 2]]), torch.tensor([[3], [4]])
    before = [x.clone() for x in (logits, answers, distractors)]
    logit_difference(logits, answers, distractors), probability_difference(logits, answers, distractors)
    wanted_tokens(answers, distractors), kl_divergence(logits, logits + 1)
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, answers, distractors), strict=True))


def test_probability_difference_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert probability_difference(logits, torch.tensor([[0, 2]]), torch.tensor([[1, -1]])).item() == pytest.approx(0.375)
    assert probability_difference(logits, torch.tensor([[0, 1]]), torch.tensor([[2, 3]])).item() == pytest.approx(0.5)


def test_accuracy_counts_ties_as_wrong_and_keeps_nan():
    assert accuracy_of(np.array([1.0, 0.0, -1.0, 2.0])).item() == 0.5
    assert accuracy_of(torch.tensor([[1.0, 2.0], [1.0, math.nan]]))[0] == 1
    assert accuracy_of(torch.tensor([[1.0, 2.0], [1.0, math.nan]]))[1].isnan()
    with pytest.raises(InputError, match="no prompts"):
        accuracy_of(torch.zeros(0))


def test_kl_by_hand_and_direction():
    p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    assert kl_divergence(p, q).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert kl_divergence(q, p).item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2), abs=1e-6)


@given(scored_prompts(), st.floats(-50, 50))
def test_kl_properties(case, shift):
    logits = case[0]
    p, q = logits[0], logits[1]
    assert (kl_divergence(p, q) >= 0).all()
    assert (kl_divergence(p, p + shift) < 1e-12).all()
    torch.testing.assert_close(kl_divergence(p, q + shift), kl_divergence(p, q), atol=1e-10, rtol=1e-8)


def test_kl_keeps_small_differences_in_float32_and_shows_broken_logits():
    base = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 3
    base[7] = 12.0
    nudged = base.clone()
    nudged[7] += 2**-10  # exact in float32
    p = base.double().softmax(-1)[7].item()
    assert kl_divergence(base, nudged).item() == pytest.approx(0.5 * p * (1 - p) * 2**-20, rel=0.005)
    assert kl_divergence(base, nudged).dtype == torch.float32
    rows = torch.randn(200, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (kl_divergence(rows, rows + 1e-9 * rows.flip(0)) >= 0).all()  # rounding alone would go below 0
    broken = base.clone()
    broken[0] = math.nan
    assert kl_divergence(broken, base).isnan() and kl_divergence(base, broken).isnan()
    impossible = torch.tensor([0.0, -math.inf])
    assert kl_divergence(impossible, torch.zeros(2)).item() == pytest.approx(math.log(2))
    assert kl_divergence(torch.zeros(2), impossible).item() == math.inf
    with pytest.raises(InputError, match="same prompts"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(3))


# ---- ratios


def test_ratios_by_hand():
    assert sufficiency(3.0, 5.0, 1.0) == 0.5 and necessity(2.0, 5.0, 1.0) == 0.75
    assert sufficiency(np.array([9.0, -3.0]), 5.0, 1.0).tolist() == [2.0, -1.0]  # clipped on neither side
    assert sufficiency(torch.tensor([3.0]), torch.tensor([5.0]), torch.tensor([1.0])).tolist() == [0.5]
    assert isinstance(sufficiency(3.0, 5.0, 1.0), float)


@given(finite, finite, st.floats(0.1, 100))
def test_full_and_empty_circuit(ablated, other, effect):
    model = ablated + effect
    assert sufficiency(model, model, ablated) == 1 and sufficiency(ablated, model, ablated) == 0
    assert necessity(ablated, model, ablated) == 1 and necessity(model, model, ablated) == 0


@given(finite, finite, st.floats(-1e-7, 1e-7))
def test_ratios_to_nothing_are_nan_never_infinite(a, b, tiny):
    assert math.isnan(sufficiency(a, tiny, 0.0)) and math.isnan(necessity(a, tiny, 0.0))
    assert math.isnan(ratio_of_means([a], [tiny])) and math.isnan(gap(a, b, scale=tiny))
    assert math.isnan(mean_of_ratios([a, a], [tiny, 1.0]))


@given(anything, anything, anything)
def test_sufficiency_is_never_infinite_for_finite_differences(c, m, e):
    if all(map(math.isfinite, (c, m, e))) and math.isfinite(c - e) and math.isfinite(m - e):
        value = sufficiency(c, m, e)
        assert math.isnan(value) or abs(value) <= abs(c - e) / 1e-6


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_bounded_score_is_symmetric_around_one(distance, n):
    over, under = bounded_score(1 + distance, n), bounded_score(1 - distance, n)
    assert over == pytest.approx(under) and over <= 1 and over <= n
    assert over == pytest.approx(min(1 - abs(distance), n))


def test_published_overshoots_score_badly():
    double, triple = ratio_of_means([2.722], [2.118]), ratio_of_means([3.174], [1.227])
    assert (round(double, 3), round(triple, 3)) == (1.285, 2.587)
    assert bounded_score(double, 1.0) == pytest.approx(2 - double) and bounded_score(triple, 1.0) < 0


def test_the_two_data_set_estimands_differ_and_are_not_swapped():
    circuit, model = [3.6, 3.6, 1.5], [4.0, 4.0, 0.5]
    assert ratio_of_means(circuit, model) == pytest.approx(8.7 / 8.5)
    assert mean_of_ratios(circuit, model) == pytest.approx(1.6)


@given(st.lists(st.floats(0.5, 10), min_size=1, max_size=8), st.floats(-3, 3))
def test_both_estimands_agree_for_a_constant_ratio(model, ratio):
    circuit = [ratio * m for m in model]
    assert ratio_of_means(circuit, model) == pytest.approx(ratio, abs=1e-9)
    assert mean_of_ratios(circuit, model) == pytest.approx(ratio, abs=1e-9)


def test_gap_scale_sign_and_incompleteness():
    assert effect_scale([4.0, 6.0], [1.0, 1.0]) == 4.0
    assert gap(2.0, 4.0) == -2.0 and gap(6.0, 4.0, scale=4.0) == 0.5
    assert sign_agrees(np.array([1.0, -1.0, 0.0]), np.array([2.0, 2.0, -2.0])).tolist() == [True, False, True]
    assert not sign_agrees(math.nan, -1.0) and not sign_agrees(-1.0, math.nan) and not sign_agrees(math.nan, 1.0)
    assert incompleteness([1.0, 3.0], [4.0, 6.0]) == incompleteness([4.0, 6.0], [1.0, 3.0]) == 3.0
    for empty in (lambda: effect_scale([], []), lambda: ratio_of_means([], []), lambda: incompleteness([], [])):
        with pytest.raises(InputError, match="no prompts"):
            empty()


# ---- verdict


def expected_verdict(ld_model, ld_ablated, s, n, s_se, n_se, scale, t):
    "The rules once more, as independent statements: every one that holds, first of which is the verdict."
    floor = t.min_effect * scale if scale is not None and scale > 0 else t.min_effect_logits
    unclear = (not all(map(math.isfinite, (ld_model, ld_ablated, s, n, s_se, n_se)))
               or ld_model - ld_ablated < floor or max(s_se, n_se) > t.max_se)
    over, under = s > 1 + t.tau, s < 1 - t.tau
    rules = {"model_fails": ld_model <= 0, "undecided": unclear, "overshoot": over,
             "active": not over and not under and n >= t.nu, "redundant": not over and not under and n < t.nu,
             "shortfall": under and n >= t.nu, "rerouted": under and n < t.nu}
    assert tuple(rules) == VERDICTS
    decided = [word for word in VERDICTS[2:] if rules[word]]
    assert rules["undecided"] or len(decided) == 1  # the last five rules neither overlap nor leave a hole
    return next(word for word in VERDICTS if rules[word])


# Numbers on and around every border, and anything at all
near = st.one_of(st.sampled_from([0.0, 0.15, 0.3, 0.5, 0.7, 1.0, 1.3, 2.0, -0.0, 1.0 + 0.3, 1.0 - 0.3]),
                 st.sampled_from([0.15, 0.5, 0.7, 1.3]).map(lambda x: math.nextafter(x, 9)),
                 st.sampled_from([0.15, 0.5, 0.7, 1.3]).map(lambda x: math.nextafter(x, -9)), st.floats(-3, 3))
se = st.one_of(st.just(0.0), st.just(0.15), st.floats(0, 0.3))


@given(near, near, near, near, se, se, st.one_of(st.none(), near))
@example(4.0, 0.0, 1.3, 0.5, 0.15, 0.15, None)
def test_exactly_one_verdict_for_any_finite_numbers(ld_model, ld_ablated, s, n, s_se, n_se, scale):
    word, reason = verdict(ld_model, ld_ablated, s, n, s_se, n_se, scale)
    assert word == expected_verdict(ld_model, ld_ablated, s, n, s_se, n_se, scale, THRESHOLDS)
    assert reason and "nan" not in reason


@given(st.lists(anything, min_size=6, max_size=6), st.one_of(st.none(), anything))
def test_any_input_at_all_gets_a_verdict_and_nan_is_never_a_finding(numbers, scale):
    word, reason = verdict(*numbers, scale)
    assert word in VERDICTS and reason
    if not all(map(math.isfinite, numbers)):
        assert word in ("model_fails", "undecided")
    if math.isnan(numbers[0]):
        assert word == "undecided"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(6))
def test_what_is_not_finite_is_undecided(place, bad):
    numbers = [4.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    numbers[place] = bad
    word, reason = verdict(*numbers)
    assert word == ("model_fails" if place == 0 and bad == -math.inf else "undecided")
    assert word == "model_fails" or f"is {bad}: not a number" in reason


@pytest.mark.parametrize("s, n, word", [
    (1.3, 0.5, "active"), (0.7, 0.5, "active"), (math.nextafter(1.3, 2), 0.5, "overshoot"),
    (math.nextafter(0.7, 0), 0.5, "shortfall"), (1.0, math.nextafter(0.5, 0), "redundant"),
    (math.nextafter(0.7, 0), math.nextafter(0.5, 0), "rerouted"), (1.31, -5.0, "overshoot"), (-4.0, 3.0, "shortfall"),
])
def test_borders_of_s_and_n_are_exact(s, n, word):
    assert verdict(4.0, 0.0, s, n, 0.0, 0.0)[0] == word


@pytest.mark.parametrize("ld_model, ld_ablated, error, scale, word", [
    (1.0, 0.0, 0.15, 4.0, "active"),  # exactly a quarter of D, exactly the largest error
    (math.nextafter(1.0, 0), 0.0, 0.0, 4.0, "undecided"), (1.0, 0.0, 0.151, 4.0, "undecided"),
    (0.5, 0.0, 0.0, None, "active"), (0.49, 0.0, 0.0, None, "undecided"),
    (0.6, 0.0, 0.0, -3.0, "active"), (0.4, 0.0, 0.0, -3.0, "undecided"),  # a D that is not positive is no D
    (0.4, 0.0, 0.0, math.nan, "undecided"), (0.0, -9.0, 0.0, None, "model_fails"), (-1.0, 5.0, 1.0, None, "model_fails"),
])
def test_borders_of_effect_and_error_are_exact(ld_model, ld_ablated, error, scale, word):
    assert verdict(ld_model, ld_ablated, 1.0, 1.0, error, 0.0, scale)[0] == word
    assert verdict(ld_model, ld_ablated, 1.0, 1.0, 0.0, error, scale)[0] == word


def test_reasons_carry_the_numbers():
    assert verdict(-0.31, 0, 1, 1, 0, 0)[1] == "LD of the model is -0.31: the model itself gets this prompt wrong"
    assert "0.2 logits, less than 1" in verdict(0.9, 0.7, 1, 1, 0, 0, scale=4.0)[1]
    assert "necessity 0.4, more than 0.15" in verdict(4, 0, 1, 1, 0, 0.4)[1]
    assert "sufficiency is nan" in verdict(4, 0, math.nan, 1, 0, 0)[1]
    assert "1.62" in verdict(4, 0, 1.62, 1, 0, 0)[1]


def test_thresholds_move_the_borders_and_are_checked():
    wide = Thresholds(tau=0.5, nu=0.2)
    assert verdict(4, 0, 1.4, 0.3, 0, 0)[0] == "overshoot" and verdict(4, 0, 1.4, 0.3, 0, 0, thresholds=wide)[0] == "active"
    assert least_effect(8.0) == 2.0 and least_effect(8.0, Thresholds(min_effect=0.5)) == 4.0
    for wrong in (dict(tau=0.0), dict(nu=-1.0), dict(max_se=math.nan)):
        with pytest.raises(InputError, match="positive"):
            Thresholds(**wrong)


@given(st.lists(st.tuples(near, near, near, near, se, se), min_size=1, max_size=6), st.one_of(st.none(), st.floats(0.1, 9)))
def test_the_table_is_judged_as_its_rows(rows, scale):
    columns = ["ld_model", "ld_ablated", "sufficiency", "necessity", "s_se", "n_se"]
    table = pd.DataFrame(rows, columns=columns, index=range(10, 10 + len(rows)))
    before, judged = table.copy(), verdicts(table, scale)
    assert list(judged.columns) == ["verdict", "reason"] and judged.index.equals(table.index)
    assert [tuple(row) for row in judged.to_numpy()] == [verdict(*row, scale=scale) for row in rows]
    pd.testing.assert_frame_equal(table, before)


def test_a_table_without_its_columns_is_refused_and_an_empty_one_is_not():
    with pytest.raises(InputError, match="necessity, s_se, n_se"):
        verdicts(pd.DataFrame({"ld_model": [1.0], "ld_ablated": [0.0], "sufficiency": [1.0]}))
    empty = verdicts(pd.DataFrame(columns=["ld_model", "ld_ablated", "sufficiency", "necessity", "s_se", "n_se"]))
    assert list(empty.columns) == ["verdict", "reason"] and len(empty) == 0
