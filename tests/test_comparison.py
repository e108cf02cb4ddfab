"""Two runs paired prompt by prompt: by hand, under swapping and shuffling, and refused where they cannot be paired."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization.comparison import (
    COMPARISON_COLUMNS,
    PRINTED,
    cohens_kappa,
    compare,
    compare_runs,
    comparison_table,
    pair_runs,
    printed_rows,
    read_run,
    verdict_crosstab,
    what_differs,
)
from circuit_generalization.errors import InputError
from circuit_generalization.evidence import equivalence_p_value
from circuit_generalization.stats import difference_p_value, paired_difference

VERDICT = {"A": "active", "s": "shortfall", "o": "overshoot", "u": "undecided", "x": "model_fails"}


def scored(cells, variant="base", seed=0, ablation="resample", **changed):
    "One row a letter; ten templates."
    rows = [dict(prompt_id=f"{variant}-{seed}-{i}", base_id=f"base-{seed}-{i}", task="ioi", axis="base" if variant == "base" else "lexical",
                 variant=variant, template=str(i % 10), prompt=f"{variant} {i}", ablation=ablation, level="node", positions="listed",
                 ld_model=-1.0 if c == "x" else 2.0, score=i / 10 + (c == "A"), verdict=VERDICT[c], active=c == "A") | changed
            for i, c in enumerate(cells)]
    return pd.DataFrame(rows)


def write(folder, *parts, sweep=(), model="m", **options):
    folder.mkdir()
    pd.concat(parts).to_csv(folder / "scores.csv", index=False)
    if sweep: pd.concat(sweep).to_csv(folder / "sweep.csv", index=False)
    manifest = dict(options=dict(model=model, seed=0) | options, hashes=dict(model=f"hash of {model}", circuit="c"), seconds=12.5, n_scored=9)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


ONE = "AAAAAAAAAAAAsssooxxuA"
TWO = "AAAAAsssssAAAssoxAxAA"


@pytest.fixture
def two(tmp_path):
    return write(tmp_path / "one", scored(ONE), scored(ONE, "v")), write(tmp_path / "two", scored(TWO), scored(ONE, "v"))


def test_a_row_by_hand(two):
    row = compare_runs(*two).table.iloc[0]
    right = [i for i in range(21) if ONE[i] != "x" and TWO[i] != "x"]
    (a, b), templates = (np.array([c[i] == "A" for i in right]) for c in (ONE, TWO)), np.array([i % 10 for i in right])
    d = paired_difference(a, b, templates)
    assert (row.n_prompts, row.n_pairs, row.a_only, row.b_only, row.neither_right) == (21, 18, 1, 1, 1)
    assert (row.active_a, row.active_b, row.difference) == pytest.approx((a.mean(), b.mean(), a.mean() - b.mean())) and row.difference > 0
    assert (row.difference_low, row.difference_high, row.interval) == (pytest.approx(d.low), pytest.approx(d.high), d.method)
    assert row.p_value == pytest.approx(difference_p_value(a, b, templates))
    assert row.equivalence_p == pytest.approx(equivalence_p_value(a, b, templates))
    same = [x == y for x, y in zip(ONE, TWO)]
    chance = sum(ONE.count(v) * TWO.count(v) for v in VERDICT) / 21**2
    assert row.same_verdict == pytest.approx(np.mean(same)) and row.kappa == pytest.approx((np.mean(same) - chance) / (1 - chance))
    ours, theirs = ([i / 10 + (c == "A") for i, c in enumerate(cells)] for cells in (ONE, TWO))
    assert row.pearson == pytest.approx(np.corrcoef(ours, theirs)[0, 1])
    assert row.spearman == pytest.approx(np.corrcoef(pd.Series(ours).rank(), pd.Series(theirs).rank())[0, 1])


def test_p_values_are_adjusted_over_the_variants(two):
    table = compare_runs(*two).table
    assert list(table.columns) == COMPARISON_COLUMNS and table.variant.tolist() == ["base", "v"]
    assert table.p_value[1] == 1 and table.p_adjusted[0] == pytest.approx(min(2 * table.p_value[0], 1))
    assert table.equivalence_p_adjusted.max() == pytest.approx(table.equivalence_p.max()) and table.equivalence_p.nunique() == 2
    assert table.kappa[1] == 1 and table.difference[1] == 0 and table.conclusion[1] == "no difference found", "ten templates cannot show sameness"


def test_crosstab_counts_every_pair(two):
    crossed = verdict_crosstab(compare_runs(*two).pairs.query("variant == 'base'"))
    assert crossed.to_numpy().sum() == 21 and crossed.loc["active", "shortfall"] == 5 and crossed.loc["overshoot", "model_fails"] == 1
    assert crossed.index.tolist() == crossed.columns.tolist() == ["model_fails", "undecided", "overshoot", "active", "shortfall"]


def test_swapping_the_runs_flips_the_sign(two):
    here, back = compare_runs(*two).table, compare_runs(*two[::-1]).table
    for c in ("difference", "difference_low"): assert here[c].tolist() == pytest.approx((-back[c.replace("low", "high")]).tolist())
    for c in ("p_value", "equivalence_p", "kappa", "pearson", "spearman", "n_pairs", "same_verdict"):
        assert here[c].tolist() == pytest.approx(back[c].tolist())
    assert here.active_a.tolist() == back.active_b.tolist() and here.a_only.tolist() == back.b_only.tolist()


@settings(max_examples=15)
@given(st.permutations(range(21)), st.permutations(range(21)))
def test_the_order_of_prompts_is_irrelevant(tmp_path_factory, p, q):
    place = tmp_path_factory.mktemp("runs")
    plain = compare_runs(write(place / "a", scored(ONE)), write(place / "b", scored(TWO))).table
    mixed = compare_runs(write(place / "c", scored(ONE).iloc[list(p)]), write(place / "d", scored(TWO).iloc[list(q)])).table
    pd.testing.assert_frame_equal(plain, mixed)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30))
def test_kappa_is_symmetric_and_at_most_one(pairs):
    a, b = map(list, zip(*pairs))
    kappa = cohens_kappa(a, b)
    assert math.isnan(kappa) == (set(a) == set(b) and len(set(a)) == 1)
    assert math.isnan(kappa) or (kappa == pytest.approx(cohens_kappa(b, a)) and kappa <= 1 and (kappa == 1) == (a == b))


def test_kappa_of_a_textbook_table():
    a, b = list("y" * 25 + "n" * 25), list("y" * 20 + "n" * 5 + "y" * 10 + "n" * 15)  # 20, 5, 10, 15: agree 0.7, by chance 0.5
    assert cohens_kappa(a, b) == pytest.approx(0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(cohens_kappa(["y"], ["y"]))


# ---- settings of one run


def test_settings_of_one_run_are_told_by_a_colon(tmp_path):
    sweep = [scored(TWO, ablation="mean"), scored(TWO.replace("A", "s"), ablation="mean", positions="all")]
    run = write(tmp_path / "one", scored(ONE), sweep=sweep)
    found = compare_runs(run, f"{run}:mean")
    assert found.differs.what.tolist() == ["setting"] and (found.a.setting, found.b.setting) == ("resample", "mean")
    assert found.table.active_b[0] == pytest.approx(10 / 18)
    assert compare_runs(f"{run}:resample", f"{run}:mean, all positions").table.active_b[0] == 0
    with pytest.raises(InputError, match="measured without 'zero'; there is mean; mean, all positions; resample"): read_run(f"{run}:zero")


def test_the_headline_is_the_one_in_scores(tmp_path):
    run = write(tmp_path / "one", scored(ONE), sweep=[scored(ONE.replace("A", "s"))])
    assert read_run(run).scores.active.any() and read_run(f"{run}:resample").scores.active.any()


def test_a_folder_may_have_a_colon_in_its_name(tmp_path):
    run = write(tmp_path / "at 12:30", scored(ONE))
    assert read_run(run).setting == "resample" and read_run(f"{run}:resample").folder == run


def test_what_differs(tmp_path):
    a, b = write(tmp_path / "a", scored(ONE)), write(tmp_path / "b", scored(ONE), model="n", axes=["lexical"])
    timed = json.loads((b / "manifest.json").read_text()) | dict(seconds=99.0, n_scored=1)
    (b / "manifest.json").write_text(json.dumps(timed))
    found = what_differs(read_run(a), read_run(b)).set_index("what")
    assert found.index.tolist() == ["options.model", "hashes.model", "options.axes"] and found.loc["options.model"].tolist() == ["m", "n"]
    assert found.loc["options.axes"].tolist() == [None, ["lexical"]] and what_differs(read_run(a), read_run(a)).empty


# ---- pairs


def test_names_that_look_like_numbers_are_names(tmp_path):
    a = write(tmp_path / "a", scored("AAAA").assign(prompt_id=["01", "2", "3", "4"], template=["1", "1.0", "2", "02"]))
    b = write(tmp_path / "b", scored("AAAA").assign(prompt_id=["01", "1", "3", "x"]))
    found = compare_runs(a, b)
    assert found.pairs.id.tolist() == ["01", "3"] and read_run(a).scores.template.nunique() == 4


def test_prompts_without_a_partner_are_named(tmp_path):
    a = write(tmp_path / "a", scored(ONE), scored(ONE, "v"), scored(ONE, "w"))
    b = write(tmp_path / "b", scored(ONE), scored(ONE, "v")[4:], scored("AA", "z"))
    found = compare_runs(a, b)
    assert found.notes == [f"v: 4 of 21 prompts are not in {b}: v-0-0, v-0-1, v-0-2, ...", f"w: not in {b} (21 prompts)",
                           f"z: not in {a} (2 prompts)"]
    assert found.table.n_prompts.tolist() == [21, 17]


def test_two_models_are_paired_by_base_prompt_and_other_texts_are_counted(tmp_path):
    other = scored(ONE, "v").assign(prompt_id=lambda d: "n-" + d.prompt_id, prompt=lambda d: d.prompt.where(d.index > 2, "other"))
    a, b = write(tmp_path / "a", scored(ONE, "v")), write(tmp_path / "b", other, model="n")
    found = compare_runs(a, b)
    assert found.table.n_prompts.tolist() == [21] and found.table.same_text[0] == pytest.approx(18 / 21)
    assert len(found.notes) == 1 and found.notes[0].startswith("3 of 21 pairs are not the same text")
    with pytest.raises(InputError, match="no prompt in common"): compare_runs(a, write(tmp_path / "c", other))


def test_an_answer_that_is_never_right_twice_has_no_difference(tmp_path):
    a, b = write(tmp_path / "a", scored("xA" * 10)), write(tmp_path / "b", scored("Ax" * 10))
    row = compare_runs(a, b).table.iloc[0]
    assert row.n_pairs == 0 and row.conclusion == "no pair right twice" and math.isnan(row.difference) and math.isnan(row.p_adjusted)
    assert (row.a_only, row.b_only, row.neither_right) == (10, 10, 0)


def test_scores_that_are_missing_or_alike_have_no_correlation(tmp_path):
    a = write(tmp_path / "a", scored(ONE, score=0.5))
    assert compare_runs(a, a).table[["pearson", "spearman"]].isna().all(axis=None)
    few = write(tmp_path / "few", scored("AA"))
    assert compare_runs(few, few).table[["pearson", "spearman"]].isna().all(axis=None), "two points are always on a line"
    holes = scored(ONE)
    holes.loc[:4, "score"] = np.nan
    b = write(tmp_path / "b", holes)
    found = compare_runs(b, b).table
    assert found.n_scores[0] == 16 and found.pearson[0] == pytest.approx(1)


# ---- output


def test_the_table_is_written_and_printed(two, tmp_path):
    out = tmp_path / "deep" / "compared.csv"
    found = compare(*two, out)
    written = pd.read_csv(out)
    assert list(written.columns) == COMPARISON_COLUMNS and written.difference.tolist() == pytest.approx(found.table.difference.tolist())
    rows = printed_rows(found)
    ends = paired_difference(np.ones(19), np.ones(19), [i % 10 for i in range(21) if i not in (16, 17)])
    assert [len(r) for r in rows] == [len(PRINTED)] * 2
    assert rows[1][:5] == ["v", "19/21", "68", "68", f"+0 [{100 * ends.low:+.0f}, {100 * ends.high:+.0f}]"]
    assert compare(*two).table.equals(found.table) and sorted(p.name for p in out.parent.iterdir()) == ["compared.csv"]


def test_nothing_to_print_is_a_dash(tmp_path):
    a, b = write(tmp_path / "a", scored("xA" * 10)), write(tmp_path / "b", scored("Ax" * 10))
    assert printed_rows(compare(a, b))[0][2:7] == ["–", "–", "–", "–", "no pair right twice"]


def test_where_nothing_can_be_written(two, tmp_path):
    with pytest.raises(InputError, match="cannot write"): compare(*two, tmp_path)
    with pytest.raises(InputError, match="cannot write"): compare(*two, two[0] / "scores.csv" / "x.csv")


# ---- bad input


def drop(column): return lambda folder: pd.read_csv(folder / "scores.csv").drop(columns=column).to_csv(folder / "scores.csv", index=False)


def put(column, value):
    def change(folder):
        table = pd.read_csv(folder / "scores.csv").astype({column: object})
        table.loc[3, column] = value
        table.to_csv(folder / "scores.csv", index=False)
    return change


def text(name, content): return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "scores.csv").unlink(), "not a measurement, it has no scores.csv; give"),
    (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    (drop("verdict"), "scores.csv: no column verdict"), (drop(["axis", "level"]), "no column axis, level"),
    (put("active", "perhaps"), "column active must hold True or False"), (put("ld_model", "much"), "column ld_model must hold numbers"),
    (put("score", "much"), "column score must hold numbers"), (put("verdict", "fine"), "no verdict is called 'fine'"),
    (put("template", None), "row 5 has no template"), (put("ld_model", None), "row 5 has no ld_model"),
    (put("prompt_id", "base-0-2"), "base-0-2 is there twice"), (put("task", "sva"), "of ioi, sva: two tasks"),
    (text("scores.csv", b""), "cannot be read as CSV"), (text("scores.csv", b"\xff\xfe\x00,\x81"), "cannot be read as CSV"),
    (text("manifest.json", b"{"), "cannot be read as JSON"), (text("manifest.json", b"[1]"), "not the manifest"),
    (text("sweep.csv", b"a,b\n1,2\n"), "sweep.csv: no column")])
def test_what_is_wrong_with_a_folder_is_said(two, spoil, message):
    spoil(two[1])
    with pytest.raises(InputError, match=message) as e: compare_runs(*two)
    assert "\n" not in str(e.value)


def test_runs_that_cannot_be_paired(two, tmp_path):
    with pytest.raises(InputError, match="no such folder"): compare_runs(two[0], tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such folder"): compare_runs(two[0] / "scores.csv", two[1])
    with pytest.raises(InputError, match="base-0-0 against base-1-0: measure both with the same --seed"):
        compare_runs(two[0], write(tmp_path / "seed", scored(ONE, seed=1)))
    with pytest.raises(InputError, match="of task ioi and .* of sva"): compare_runs(two[0], write(tmp_path / "task", scored(ONE, task="sva")))
    with pytest.raises(InputError, match="no rows"): read_run(write(tmp_path / "empty", scored(ONE)[:0]))


def test_an_empty_sweep_is_no_obstacle(two):
    scored(ONE)[:0].to_csv(two[0] / "sweep.csv", index=False)
    assert len(compare_runs(*two).pairs) == 42


@pytest.mark.slow
def test_two_measurements(tmp_path):
    from circuit_generalization.measurement import MeasureOptions, measure

    options = dict(axes=("lexical",), n_prompts=18, ablations=("resample", "counterfactual"), n_draws=2, n_random=2)
    measure(MeasureOptions("compiled-ioi", variants=("rare_names",), **options), tmp_path / "a")
    found = compare(tmp_path / "a", f"{tmp_path / 'a'}:counterfactual")
    assert found.table.n_prompts.tolist() == [18, 18] and found.notes == [] and found.table.same_text.eq(1).all()
    assert compare(tmp_path / "a", tmp_path / "a").table.same_verdict.eq(1).all()
    pd.testing.assert_frame_equal(comparison_table(pair_runs(found.a, found.b)), found.table)
