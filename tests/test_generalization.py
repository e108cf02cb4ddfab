"""From scores to statements about an axis: shares, pairs and words counted by hand, and measurements that a kill cannot change."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from circuit_generalization import generalization
from circuit_generalization.circuit import Circuit, load_circuit, save_circuit
from circuit_generalization.circuit_scorer import COLUMNS, CircuitScorer
from circuit_generalization.errors import InputError
from circuit_generalization.generalization import TABLE_COLUMNS, MeasureOptions, conclusion, generalization_table, measure, plan
from circuit_generalization.models import model_hash
from circuit_generalization.prompts import prompts_hash
from circuit_generalization.stats import difference_p_value, paired_difference
from circuit_generalization.tasks import make_prompts, name_hand

PROGRAM = Path(sys.executable).with_name("circuit-gen")
VERDICT = {"A": "active", "n": "shortfall", "x": "model_fails"}


# The table, from scores made by hand: A the circuit is active, n it is not, x the model is wrong

def scored(cells, axis="base", variant="base", n_templates=10, ablation="resample"):
    "One row a letter. A variant has fewer templates than its base prompts."
    group = 20 if axis == "base" else n_templates
    return pd.DataFrame([dict(prompt_id=f"{variant}-{i}", base_id=f"base-{i}", axis=axis, variant=variant, template=f"{variant}-{i % group}",
                              ld_model=-1.0 if c == "x" else 2.0, active=c == "A", verdict=VERDICT[c], p_value=i / 100, ablation=ablation)
                         for i, c in enumerate(cells)])


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


@pytest.mark.parametrize("low, high, word", [
    (-0.3, -0.1, "lower"), (0.1, 0.3, "higher"), (-0.1, 0.1, "no difference found"), (0.0, 0.2, "no difference found"),
    (-0.2, 0.0, "no difference found"), (np.nan, np.nan, "too few templates"), (np.nan, 0.3, "too few templates")])
def test_words(low, high, word): assert conclusion(low, high) == word


def test_conclusions_follow_from_the_intervals():
    assert row_of(LESS).conclusion == "lower" and row_of(SAME).conclusion == "no difference found"
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


def test_p_values_are_adjusted_over_the_variants():
    variants = [LESS, SAME, "AAAAAAAAAAAAnnAAAAAn", "x" * 20]
    table = generalization_table(pd.concat([scored(BASE), *(scored(c, "lexical", f"v{k}") for k, c in enumerate(variants))]))
    p = sorted(table.p_value.dropna())
    assert len(p) == 3, "neither the base nor a variant without pairs is a test"
    step_up = {p[k]: min(1.0, *(3 / (j + 1) * p[j] for j in range(k, 3)), 1.0) for k in range(3)}
    adjusted = table.p_adjusted.dropna()
    assert adjusted.tolist() == pytest.approx([step_up[x] for x in table.p_value.dropna()]) and (adjusted > table.p_value.dropna()).any()


def test_the_other_ablations_agree_or_do_not():
    def sweep(**by_ablation):
        return pd.concat([part for kind, cells in by_ablation.items()
                          for part in (scored(BASE, ablation=kind), scored(cells, "lexical", "v0", ablation=kind))])
    assert row_of(LESS, sweep=sweep(mean=LESS, counterfactual=LESS)).same_across_ablations is True
    assert row_of(LESS, sweep=sweep(mean=LESS, counterfactual=SAME)).same_across_ablations is False
    assert row_of(SAME, sweep=sweep(mean=SAME)).same_across_ablations is True
    assert pd.isna(row_of(LESS).same_across_ablations), "nobody asked"
    table = generalization_table(pd.concat([scored(BASE), scored(LESS, "lexical", "v0")]), sweep(mean=LESS))
    assert table.same_across_ablations[0] is None, "the base is compared with nothing"


# Measurements

OPTIONS = MeasureOptions("compiled-ioi", axes=("syntactic",), variants=("adjunct",), n_prompts=18, ablations=("resample", "counterfactual"),
                         n_draws=2, n_random=2)
TABLES = ("scores.csv", "sweep.csv", "generalization.csv")
SHARDS = 4  # two ablations of two variants


def bytes_of(folder): return {name: (folder / name).read_bytes() for name in TABLES}


def files_in(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) if folder.exists() else []


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "A measurement that nobody interrupts."
    out = tmp_path_factory.mktemp("measured") / "out"
    return measure(OPTIONS, out), out


@pytest.fixture
def counted(monkeypatch):
    "The (variant, ablation) of every shard that is computed rather than read."
    done, original = [], generalization._score_shard

    def score(job, pair, ablation, *rest):
        table = original(job, pair, ablation, *rest)
        done.append((pair[1], ablation.kind))
        return table

    monkeypatch.setattr(generalization, "_score_shard", score)
    return done


def test_what_is_written_is_what_is_returned(measured):
    found, out = measured
    assert files_in(out) == sorted([*TABLES, "manifest.json"])
    for name, table in (("scores", found.scores), ("sweep", found.sweep), ("generalization", found.table)):
        pd.testing.assert_frame_equal(pd.read_csv(out / f"{name}.csv"), table.replace({None: np.nan}), check_dtype=False, rtol=1e-8)
    assert list(found.scores.columns[: len(COLUMNS)]) == COLUMNS and len(found.scores) == len(found.sweep) == 36
    assert found.scores.prompt_id.is_unique and found.scores.base_id.tolist() == 2 * found.scores.prompt_id[:18].tolist()


def test_the_compiled_circuit_is_active_on_its_own_prompts(measured):
    table = measured[0].table.set_index("variant")
    assert (table.n_right == 18).all() and (table.active_share > 0.9).all() and table.n_pairs["adjunct"] == 18
    assert table.conclusion["adjunct"] == "no difference found"
    scores = measured[0].scores
    assert scores.p_value.between(0.333, 1).all() and (scores.n_random == 2).all() and (measured[0].sweep.p_value.isna()).all()


def test_the_manifest_says_what_was_done(measured, compiled):
    found, out = measured
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["options"] | {k: tuple(manifest["options"][k]) for k in ("axes", "variants", "ablations")} == vars(OPTIONS)
    assert manifest["hashes"]["model"] == model_hash(compiled) and manifest["hashes"]["circuit"] == load_circuit("compiled-ioi-ioi").hash
    assert manifest["hashes"]["prompts"] == {v: prompts_hash(make_prompts("ioi", a, v, 18, 0, compiled.tokenizer))
                                             for a, v in (("base", "base"), ("syntactic", "adjunct"))}
    assert manifest["n_scored"] == 36 and manifest["seconds"] >= 0 and manifest["prepended_bos"] is False
    assert manifest["thresholds"]["tau"] == 0.3 and "2 layer-matched" in manifest["p_values"]
    assert set(manifest["versions"]) >= {"circuit-generalization", "torch", "transformers", "transformer-lens"} and "python" in manifest


def test_the_same_seed_gives_the_same_bytes(measured, tmp_path):
    measure(OPTIONS, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(measured[1])


def test_another_seed_gives_other_prompts(measured, tmp_path):
    other = measure(replace(OPTIONS, seed=1, ablations=("counterfactual",), n_random=0), tmp_path)
    assert not set(other.scores.prompt) & set(measured[0].scores.prompt) and not set(other.scores.prompt_id) & set(measured[0].scores.prompt_id)
    assert other.manifest["hashes"]["prompts"] != measured[0].manifest["hashes"]["prompts"]


@pytest.mark.parametrize("kill_at", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3, SHARDS))])
def test_a_killed_measurement_resumes(kill_at, measured, counted, tmp_path):
    calls = []

    def impatient(done, total, what):
        calls.append(done)
        if len(calls) == kill_at: raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): measure(OPTIONS, tmp_path, impatient)
    finished = list(counted)
    assert len(finished) == kill_at - 1 == len(list(tmp_path.glob(".shards/*.csv"))), "shards that were finished are kept"
    assert not any(f.endswith((".csv", ".json")) for f in files_in(tmp_path) if not f.startswith(".shards/")), "and nothing else is there"
    counted.clear()
    resumed = measure(OPTIONS, tmp_path, lambda *_: None)
    assert not set(counted) & set(finished) and len(counted) == SHARDS - len(finished)
    assert bytes_of(tmp_path) == bytes_of(measured[1]) and files_in(tmp_path) == files_in(measured[1])
    assert resumed.manifest | {"seconds": 0} == measured[0].manifest | {"seconds": 0}


def test_progress_counts_every_prompt_once_also_when_it_resumes(measured, tmp_path):
    calls = []
    measure(OPTIONS, tmp_path, lambda *call: calls.append(call))
    assert [done for done, *_ in calls] == [18, 36, 54, 72] and {total for _, total, _ in calls} == {72}
    assert [what for *_, what in calls] == ["base, resample", "adjunct, resample", "base, counterfactual", "adjunct, counterfactual"]


@pytest.mark.slow
def test_what_another_measurement_left_is_not_taken_for_ones_own(measured, counted, tmp_path):
    def at_the_second(done, total, what):
        if done > 18: raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): measure(replace(OPTIONS, seed=1), tmp_path, at_the_second)
    counted.clear()
    measure(OPTIONS, tmp_path)
    assert len(counted) == SHARDS and bytes_of(tmp_path) == bytes_of(measured[1]) and files_in(tmp_path) == files_in(measured[1])


@pytest.mark.slow
def test_a_process_killed_outright_resumes(measured, tmp_path):
    command = [PROGRAM, "measure", "--model", "compiled-ioi", "--axes", "syntactic", "--variants", "adjunct", "--n-prompts", "18", "--ablation",
               "resample", "counterfactual", "--draws", "2", "--n-random", "2", "--out", tmp_path]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not list(tmp_path.glob(".shards/*.csv")): time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL) if running.poll() is None else None
    assert running.wait() == -signal.SIGKILL, "it was killed while it was at work"
    assert not (tmp_path / "scores.csv").exists()
    measure(OPTIONS, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(measured[1]) and files_in(tmp_path) == files_in(measured[1])


def test_half_a_shard_that_a_kill_left_is_cleared_away(measured, tmp_path):
    (tmp_path / ".shards").mkdir()
    (tmp_path / ".shards" / ".base-resample-0123456789ab.csv.4711").write_text("prompt_id,ba")  # as atomic writing names it
    measure(OPTIONS, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(measured[1]) and files_in(tmp_path) == files_in(measured[1])


@pytest.mark.parametrize("change, circuit, complaint", [
    ({}, dict(components=["a1.h2"], positions=["S2a"]), "S2a"),
    ({}, dict(components=["a1.h2"], positions=["S9"]), "a1.h2 is listed at S9"),
    ({}, dict(components=["a1.h2", "a9.h9"]), "a9.h9"),
    (dict(n_prompts=0), None, "at least one"),
    (dict(ablations=("resample", "resample")), None, "twice"),
    (dict(ablations=()), None, "no ablation"),
    (dict(axes=("sideways",)), None, "sideways"),
    (dict(variants=("rare_names",)), None, "rare_names"),
    (dict(circuit="no-such"), None, "no-such"),
    (dict(model="organism-a", circuit=None, task="chess"), None, "chess"),
], ids=["position of another variant", "position of no variant", "head", "no prompts", "ablation twice", "no ablation", "axis",
        "variant of another axis", "circuit", "task"])
def test_a_refusal_leaves_nothing_behind(change, circuit, complaint, tmp_path):
    if circuit:
        save_circuit(Circuit.from_components(**circuit), tmp_path / "circuit.json")
        change = change | dict(circuit=str(tmp_path / "circuit.json"))
    with pytest.raises(InputError, match=complaint): measure(replace(OPTIONS, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_writes_nothing_and_counts_the_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cost = plan(OPTIONS)
    # 2 clean, 3 donors, 3 edits a draw, 2 a random circuit, a profile of 32 heads; 2 clean, 2 donors, 3 edits
    assert cost["prompts"] == 36 and cost["passes"] == 36 * (2 + 3 + 6 + 4 + 32) + 36 * (2 + 2 + 3)
    assert cost["seconds"] > 0 and cost["memory_mb"] > 0 and files_in(tmp_path) == []


# What is scored has no name in common with what calibrates, what is drawn from, and what circuits are discovered on

def test_scored_reference_calibration_and_discovery_prompts_share_no_name(monkeypatch, compiled, tmp_path):
    discovery = make_prompts("ioi", n=18, tokenizer=compiled.tokenizer, split="discovery")
    used = {"scored": [], "calibration": [], "reference": [], "discovery": [discovery]}
    score, baseline, pool = CircuitScorer.score, CircuitScorer.baseline_on, CircuitScorer.generated_pool

    def watched_score(self, prompts, *rest, **more):
        used["scored"].append(prompts)
        return score(self, prompts, *rest, **more)

    def watched_baseline(self, base, *rest):
        used["calibration"].append(base)
        return baseline(self, base, *rest)

    def watched_pool(self, *rest):
        made = pool(self, *rest)
        used["reference"] += [made] if made is not None else []
        return made

    for name, watched in (("score", watched_score), ("baseline_on", watched_baseline), ("generated_pool", watched_pool)):
        monkeypatch.setattr(CircuitScorer, name, watched)
    measure(replace(OPTIONS, n_random=0), tmp_path)
    every = {n for split in used for n in name_hand(compiled.tokenizer, "task", split)}
    names = {split: {compiled.tokenizer.decode(i).strip() for p in sets for i in p.tokens.unique().tolist()} & every for split, sets in used.items()}
    for split, own in names.items():
        assert len(own) > 10, f"{split} prompts were seen"
        assert not own & set().union(*(v for k, v in names.items() if k != split)), split


def test_batches_change_nothing_where_lengths_differ(measured, tmp_path):
    whole, parts = measured[0], measure(replace(OPTIONS, batch_size=7), tmp_path)
    for a, b in ((whole.scores, parts.scores), (whole.sweep, parts.sweep), (whole.table, parts.table)):
        numbers = a.select_dtypes("number").columns
        assert len(numbers) > 5 and b[a.columns.difference(numbers)].equals(a[a.columns.difference(numbers)]), "words, names and verdicts"
        np.testing.assert_allclose(b[numbers].to_numpy(float), a[numbers].to_numpy(float), atol=1e-5, rtol=0)
    lengths = {len(p.split()) for p in whole.scores.prompt[whole.scores.variant == "adjunct"]}
    assert len(lengths) > 3
