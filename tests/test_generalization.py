"""From scores to statements about an axis: shares, pairs and words counted by hand."""

import numpy as np
import pandas as pd
import pytest

from circuit_generalization.evidence import equivalence_p_value, smallest_difference
from circuit_generalization.generalization import TABLE_COLUMNS, ablations_table, generalises, generalization_table, setting_name
from circuit_generalization.stats import benjamini_hochberg, cluster_interval, difference_p_value, paired_difference

VERDICT = {"A": "active", "n": "shortfall", "x": "model_fails"}


# The table, from scores made by hand: A the circuit is active, n it is not, x the model is wrong

def scored(cells, axis="base", variant="base", n_templates=10, ablation="resample", level="node", positions="listed"):
    "One row a letter. A variant has fewer templates than its base prompts. The circuit alone gives 0 where it is not active."
    group = 20 if axis == "base" else n_templates
    rows = []
    for i, c in enumerate(cells):
        ld, s = (-1.0 if c == "x" else 2.0), float(c == "A")
        rows.append(dict(prompt_id=f"{variant}-{i}", base_id=f"base-{i}", axis=axis, variant=variant, prompt=f"{variant} {i}",
                         template=f"{variant}-{i % group}", ld_model=ld, ld_ablated=0.0, ld_circuit=s * ld, sufficiency=s, necessity=0.9, s_se=0.0,
                         n_se=0.0, gap_raw=(s - 1) * ld, gap=(s - 1) * ld / 2, gap_restored=(s - 1) * ld / 4, active=c == "A",
                         verdict=VERDICT[c], p_value=i / 100, ablation=ablation, level=level, positions=positions))
    return pd.DataFrame(rows)


#       0    5    10   15
BASE = "AAAAAAAAAAAAAAAAnxxA"
LESS = "AAAAAAAAnnnnnnnxAAxA"  # in pairs where both are right: 10 of 17 active, 16 of 17 in the base
SAME = "AAAAAAAAAAAAAAAAnAAA"


def row_of(*variants, sweep=None, **options):
    "The line of the first variant."
    scores = pd.concat([scored(BASE, **options), *(scored(cells, "lexical", f"v{k}", **options) for k, cells in enumerate(variants))])
    table = generalization_table(scores, sweep)
    assert list(table.columns) == TABLE_COLUMNS and table.variant.tolist() == ["base", *(f"v{k}" for k in range(len(variants)))]
    return table.set_index("variant").loc["v0"]


def test_shares_are_of_prompts_that_the_model_gets_right():
    base, less = (generalization_table(pd.concat([scored(BASE), scored(LESS, "lexical", "v0")])).iloc[k] for k in (0, 1))
    assert (base.n, base.n_right, base.n_templates) == (20, 18, 20) and (less.n, less.n_right, less.n_templates) == (20, 18, 10)
    assert base.active_share == pytest.approx(17 / 18) and less.active_share == pytest.approx(11 / 18)
    assert 0 < less.active_low < 11 / 18 < less.active_high < 1
    assert base.median_p_value == pytest.approx(0.095) and less.median_p_value == pytest.approx(0.095)


def test_verdicts_are_shares_of_all_prompts():
    row = row_of(LESS)
    shares = {v: row[f"share_{v}"] for v in ("active", "shortfall", "model_fails", "undecided", "overshoot", "redundant", "rerouted")}
    assert shares == pytest.approx(dict(active=11 / 20, shortfall=7 / 20, model_fails=2 / 20, undecided=0, overshoot=0, redundant=0, rerouted=0))


def test_pairs_and_cells_by_hand():
    row = row_of(LESS)
    assert (row.both_right, row.variant_only, row.base_only, row.neither_right) == (17, 1, 1, 1) and row.n_pairs == 17
    assert row.base_active_share == pytest.approx(16 / 17) and row.difference == pytest.approx(-6 / 17)


def test_pairs_are_clustered_by_the_template_of_the_variant():
    row, both = row_of(LESS), [i for i in range(20) if i not in (15, 17, 18)]
    a, b, clusters = [LESS[i] == "A" for i in both], [BASE[i] == "A" for i in both], [i % 10 for i in both]
    expected = paired_difference(np.array(a), np.array(b), clusters)
    assert (row.difference_low, row.difference_high) == pytest.approx((expected.low, expected.high)) and row.interval == expected.method
    assert row.p_value == pytest.approx(difference_p_value(np.array(a), np.array(b), clusters)) and row.p_value < 0.05
    alone = paired_difference(np.array(a), np.array(b), range(17))
    assert abs(alone.low - expected.low) > 1e-3, "another clustering would be seen"


def test_rows_may_come_in_any_order():
    scores = pd.concat([scored(BASE), scored(LESS, "lexical", "v0")])
    mixed = scores.sample(frac=1, random_state=3)
    mixed = pd.concat([mixed[mixed.axis == "base"], mixed[mixed.axis != "base"]])
    pd.testing.assert_frame_equal(generalization_table(mixed), generalization_table(scores))


def test_conclusions_follow_from_adjusted_p_values():
    assert row_of(LESS).conclusion == "lower" and row_of(SAME).conclusion == "no difference found"
    row = row_of(LESS, *[SAME] * 9)
    assert row.difference_high < 0 and row.p_value < 0.05 < row.p_adjusted and row.conclusion == "no difference found", "one of ten that were tried"
    scores = pd.concat([scored(LESS), scored(BASE, "lexical", "v0")])
    assert generalization_table(scores).conclusion[1] == "higher"


def test_seven_templates_are_too_few_and_eight_are_not():
    few, enough = row_of(LESS, n_templates=7), row_of(LESS, n_templates=8)
    assert few.n_templates == 7 and few.conclusion == "too few templates" and enough.n_templates == 8 and enough.conclusion != few.conclusion
    assert few.difference == pytest.approx(-6 / 17), "the estimate stays"
    assert np.isnan([few.difference_low, few.difference_high, few.p_value, few.p_adjusted, few.active_low, few.active_high]).all()


def test_without_a_pair_there_is_no_difference():
    row = row_of("x" * 20)
    assert row.n_pairs == 0 and row.n_right == 0 and np.isnan([row.active_share, row.difference, row.base_active_share, row.p_value]).all()
    assert (row.both_right, row.variant_only, row.base_only, row.neither_right) == (0, 0, 18, 2) and "right twice" in row.interval
    assert row.conclusion == "no pair right twice" and row.generalises == "not shown"


def test_a_prompt_that_did_not_change_is_no_pair():
    scores = pd.concat([scored(BASE), scored(LESS, "lexical", "v0").assign(prompt=[f"{'base' if i < 4 else 'v0'} {i}" for i in range(20)])])
    row = generalization_table(scores).iloc[1]
    assert row.n == 20 and row.n_pairs == 13 and row.difference == pytest.approx(-6 / 13)


def test_sameness_and_power_are_those_of_the_pairs():
    row, both = row_of(LESS), [i for i in range(20) if i not in (15, 17, 18)]
    given = np.array([LESS[i] == "A" for i in both]), np.array([BASE[i] == "A" for i in both]), [i % 10 for i in both]
    assert row.equivalence_p == equivalence_p_value(*given) == row.equivalence_p_adjusted and row.smallest_difference == smallest_difference(*given)


def test_the_six_cells_by_hand():
    row = row_of(LESS)
    assert (row.right_active, row.right_not_active, row.right_undecided) == (11, 7, 0)
    assert row.wrong_active + row.wrong_not_active + row.wrong_undecided == 2
    assert row.another_reason == pytest.approx(7 / 18) and row.another_reason_low < 7 / 18 < row.another_reason_high


def test_both_ratios_under_their_names():
    row, lds = row_of(LESS), [2.0] * 18 + [-1.0] * 2
    assert row.ratio_of_means == pytest.approx(11 * 2 / sum(lds)) and row.mean_of_ratios == pytest.approx(11 / 20)


def test_gaps_before_and_after_restoration():
    scores = scored(LESS, "lexical", "v0")
    row, expected = row_of(LESS), cluster_interval(scores.gap.to_numpy(), scores.template.to_numpy(), kind="mean")
    assert (row.gap, row.gap_low, row.gap_high) == (expected.estimate, expected.low, expected.high) and row.gap == pytest.approx((-7 + 1) / 20)
    assert row.gap_restored == pytest.approx(row.gap / 2)
    without = generalization_table(pd.concat([scored(BASE), scores]).assign(gap_restored=np.nan)).iloc[1]
    assert np.isnan(without.gap_restored) and without.gap == row.gap


def test_p_values_are_adjusted_over_the_variants():
    variants = [LESS, SAME, "AAAAAAAAAAAAnnAAAAAn", "x" * 20]
    table = generalization_table(pd.concat([scored(BASE), *(scored(c, "lexical", f"v{k}") for k, c in enumerate(variants))]))
    p = sorted(table.p_value.dropna())
    assert len(p) == 3, "neither the base nor a variant without pairs is a test"
    step_up = {p[k]: min(1.0, *(3 / (j + 1) * p[j] for j in range(k, 3)), 1.0) for k in range(3)}
    adjusted = table.p_adjusted.dropna()
    assert adjusted.tolist() == pytest.approx([step_up[x] for x in table.p_value.dropna()]) and (adjusted > table.p_value.dropna()).any()


def swept(**by_setting):
    "Scores in other settings: mean, mean__all, mean__edge."
    parts = []
    for name, cells in by_setting.items():
        kind, _, how = name.partition("__")
        setting = dict(ablation=kind, positions="all" if how == "all" else "listed", level="edge" if how == "edge" else "node")
        parts += [scored(BASE, **setting), scored(cells, "lexical", "v0", **setting)]
    return pd.concat(parts)


def test_the_other_ablations_agree_or_do_not():
    assert row_of(LESS, sweep=swept(mean=LESS, counterfactual=LESS)).same_across_ablations is True
    row = row_of(LESS, sweep=swept(mean=LESS, counterfactual=SAME))
    assert row.same_across_ablations is False and row.disagreements == "counterfactual: no difference found"
    assert row_of(SAME, sweep=swept(mean=SAME)).same_across_ablations is True
    assert pd.isna(row_of(LESS).same_across_ablations), "nobody asked"
    table = generalization_table(pd.concat([scored(BASE), scored(LESS, "lexical", "v0")]), swept(mean=LESS))
    assert pd.isna(table.same_across_ablations[0]), "the base is compared with nothing"


@pytest.mark.parametrize("setting, name", [("zero", "zero"), ("mean__all", "mean, all positions"), ("resample__all", "resample, all positions"),
                                           ("mean__edge", "mean of edges")])
def test_what_has_no_veto_is_shown(setting, name):
    row = row_of(LESS, sweep=swept(mean=LESS, counterfactual=LESS, **{setting: SAME}))
    assert row.same_across_ablations is True and row.generalises == "no" and row.disagreements == f"{name}: no difference found"


@pytest.mark.parametrize("said, answer", [
    (["lower"] * 3, "no"), (["lower"] * 2, "not shown"), (["lower", "lower", "lower, by less than 15 points"], "not shown"),
    (["the same within 15 points"] * 3, "yes"), (["the same within 15 points", "higher", "lower, by less than 15 points"], "yes"),
    (["the same within 15 points"] * 2 + ["no difference found"], "not shown"), (["higher, by less than 15 points"] * 3, "yes"),
    (["no pair right twice"] * 3, "not shown"), (["too few templates"] * 3, "not shown"), ([], "not shown")])
def test_what_generalises(said, answer): assert generalises(said) == answer


def test_the_table_of_every_setting():
    scores, sweep = pd.concat([scored(BASE), scored(LESS, "lexical", "v0")]), swept(mean=SAME, mean__all=LESS)
    table = ablations_table(scores, sweep)
    assert table.setting.tolist() == ["resample"] * 2 + ["mean"] * 2 + ["mean, all positions"] * 2
    assert table.positions.tolist() == ["listed"] * 4 + ["all"] * 2 and table.variant.tolist() == ["base", "v0"] * 3
    one = generalization_table(sweep[sweep.positions == "all"]).iloc[1]
    assert table.difference[5] == one.difference == table.difference[1] != table.difference[3] and table.conclusion[5] == "lower"
    assert benjamini_hochberg(np.array([table.p_value[5]]))[0] == table.p_adjusted[5], "adjusted within its setting"
    assert setting_name("zero", "edge", "all") == "zero of edges, all positions"
