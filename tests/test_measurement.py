"""The main job: what is written, what a manifest says, and runs that a kill cannot change."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from circuit_generalization import measurement
from circuit_generalization.circuit import Circuit, load_circuit, save_circuit
from circuit_generalization.circuit_scorer import COLUMNS, CircuitScorer
from circuit_generalization.errors import InputError
from circuit_generalization.measurement import PROCESSED, SWEPT, MeasureOptions, measure, plan, publish, settings_of
from circuit_generalization.models import model_hash
from circuit_generalization.prompts import prompts_hash
from circuit_generalization.tasks import make_prompts
from circuit_generalization.wording import name_hand

PROGRAM = Path(sys.executable).with_name("circuit-gen")
OPTIONS = MeasureOptions("compiled-ioi", axes=("syntactic",), variants=("adjunct_1",), n_prompts=18, ablations=("resample", "counterfactual"),
                         positions=("listed",), levels=("node",), n_draws=2, n_random=2)
TABLES = ("scores.csv", "sweep.csv", *PROCESSED)
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
    done, original = [], measurement._score_shard

    def score(job, pair, setting, *rest):
        table = original(job, pair, setting, *rest)
        done.append((pair[1], setting.name))
        return table

    monkeypatch.setattr(measurement, "_score_shard", score)
    return done


def test_what_is_written_is_what_is_returned(measured):
    found, out = measured
    assert files_in(out) == sorted([*TABLES, "manifest.json"])
    for name, table in (("scores", found.scores), ("sweep", found.sweep), ("generalization", found.table), ("ablations", found.ablations),
                        ("variance", found.variance)):
        pd.testing.assert_frame_equal(pd.read_csv(out / f"{name}.csv"), table.replace({None: np.nan, "": np.nan}), check_dtype=False, rtol=1e-8)
    assert list(found.scores.columns[: len(COLUMNS)]) == COLUMNS and len(found.scores) == len(found.sweep) == 36
    assert found.scores.prompt_id.is_unique and found.scores.base_id.tolist() == 2 * found.scores.prompt_id[:18].tolist()


def test_the_compiled_circuit_is_active_on_its_own_prompts(measured):
    table = measured[0].table.set_index("variant")
    assert (table.n_right == 18).all() and (table.active_share > 0.9).all() and table.n_pairs["adjunct_1"] == 18
    assert table.conclusion["adjunct_1"] == "no difference found"
    scores = measured[0].scores
    assert scores.p_value.between(0.333, 1).all() and (scores.n_random == 2).all() and list(measured[0].sweep.columns) == SWEPT


def test_the_manifest_says_what_was_done(measured, compiled):
    found, out = measured
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["options"] | {k: tuple(manifest["options"][k]) for k in ("axes", "variants", "ablations", "positions", "levels")} == vars(OPTIONS)
    assert manifest["hashes"]["model"] == model_hash(compiled) and manifest["hashes"]["circuit"] == load_circuit("compiled-ioi-ioi").hash
    assert manifest["hashes"]["prompts"] == {v: prompts_hash(make_prompts("ioi", a, v, 18, 0, compiled.tokenizer))
                                             for a, v in (("base", "base"), ("syntactic", "adjunct_1"))}
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
    assert [what for *_, what in calls] == ["base, resample", "base, counterfactual", "adjunct_1, resample", "adjunct_1, counterfactual"]


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
    command = [PROGRAM, "measure", "--model", "compiled-ioi", "--axes", "syntactic", "--variants", "adjunct_1", "--n-prompts", "18", "--ablation",
               "resample", "counterfactual", "--positions", "listed", "--levels", "node", "--draws", "2", "--n-random", "2", "--out", tmp_path]
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
    (dict(ablations=("fire",)), None, "no ablation 'fire'"),
    (dict(positions=("here",)), None, "no positions 'here': there is listed, all"),
    (dict(levels=("atom",)), None, "no level 'atom': there is node, edge"),
    (dict(levels=("edge",), model="organism-a", circuit="organism-a-ioi"), None, "edge"),
    (dict(variants=("same_initial",), axes=("lexical",)), None, "variant same_initial: this tokenizer has only 0"),
    (dict(axes=("sideways",)), None, "sideways"),
    (dict(variants=("rare_names",)), None, "rare_names"),
    (dict(circuit="no-such"), None, "no-such"),
    (dict(model="organism-a", circuit=None, task="chess"), None, "chess"),
], ids=["position of another variant", "position of no variant", "head", "no prompts", "ablation twice", "no ablation", "ablation",
        "positions", "level", "no edges", "names that the tokenizer lacks", "axis",
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
    # 2 clean, 3 donors, 4 edits a draw with the restored one, 2 a random circuit, a profile of 32 heads; 2 clean, 2 donors, 3 edits
    assert cost["prompts"] == 36 and cost["passes"] == 36 * (2 + 3 + 8 + 4 + 32) + 36 * (2 + 2 + 3)
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
    lengths = {len(p.split()) for p in whole.scores.prompt[whole.scores.variant == "adjunct_1"]}
    assert len(lengths) > 3


def test_every_setting_once_the_headline_first():
    every = settings_of(MeasureOptions("compiled-ioi"), load_circuit("compiled-ioi-ioi"))
    kinds = ("resample", "mean", "counterfactual", "zero")
    assert [s.name for s in every] == [k + e + p for e in ("", " of edges") for p in ("", ", all positions") for k in kinds]
    everywhere = Circuit.from_components(["a1.h2"])
    assert [s.name for s in settings_of(MeasureOptions("m"), everywhere)] == list(kinds), "no edges, and no position listed"


def test_variants_that_a_tokenizer_cannot_have_are_left_out_with_the_reason(tmp_path):
    found = measure(replace(OPTIONS, axes=("lexical",), variants=None, n_prompts=9, ablations=("zero",), n_random=0), tmp_path)
    assert set(found.table.variant) == {"base", "rare_names", "role_nouns", "unseen_places", "unseen_objects"}
    assert set(found.manifest["left_out"]) == {"same_initial", "multi_token_names"} and "names" in found.manifest["left_out"]["same_initial"]


@pytest.mark.slow
def test_edges_and_all_positions_come_out_in_the_sweep(tmp_path):
    options = replace(OPTIONS, ablations=("counterfactual",), positions=("listed", "all"), levels=("node", "edge"), n_random=0)
    found = measure(options, tmp_path)
    assert found.ablations.setting.unique().tolist() == ["counterfactual", "counterfactual, all positions", "counterfactual of edges",
                                                         "counterfactual of edges, all positions"]
    assert (found.ablations.active_share > 0.9).all(), "the exact circuit, with its exact edges"


def test_tables_are_published_and_the_rest_stays(measured, tmp_path):
    import shutil

    shutil.copytree(measured[1], tmp_path / "raw")
    publish(tmp_path / "raw", tmp_path / "results")
    assert files_in(tmp_path / "results") == sorted(PROCESSED) and files_in(tmp_path / "raw") == ["manifest.json", "scores.csv", "sweep.csv"]


def test_a_configuration_names_options_that_exist():
    assert MeasureOptions.from_dict(vars(OPTIONS) | dict(axes=["syntactic"])) == OPTIONS
    for given, complaint in ((dict(model="m", prompts=3), "no option 'prompts'"), (dict(seed=3), "needs a model")):
        with pytest.raises(InputError, match=complaint): MeasureOptions.from_dict(given)


# processes

@pytest.mark.slow
def test_processes_write_what_one_process_writes(measured, tmp_path):
    calls = []
    measure(OPTIONS, tmp_path / "two", lambda *call: calls.append(call), workers=2)
    assert [done for done, *_ in calls] == [36, 72] and {what for *_, what in calls} == {"base", "adjunct_1"}
    for name in TABLES: assert (tmp_path / "two" / name).read_bytes() == (measured[1] / name).read_bytes(), name


def test_a_small_measurement_and_one_off_the_cpu_stay_in_one_process(monkeypatch):
    job = measurement._prepare(OPTIONS)
    assert measurement._useful_workers(job) == 1
    monkeypatch.setattr(measurement, "_WORTH", 0)
    monkeypatch.setattr(measurement.os, "sched_getaffinity", lambda pid: range(8))
    assert measurement._useful_workers(job) == 2, "there are two variants"
    assert measurement._useful_workers(replace(job, options=replace(OPTIONS, device="cuda"))) == 1


def test_a_worker_that_dies_is_explained(tmp_path, monkeypatch):
    class Pool:
        def __init__(self, *_): pass
        def __enter__(self): return self
        def __exit__(self, *_): return False
        def shutdown(self, **_): pass
        def submit(self, *_):
            future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(measurement, "ProcessPoolExecutor", Pool)
    with pytest.raises(InputError, match="want of memory: the same command with --workers 1 goes on from here"): measure(OPTIONS, tmp_path, workers=2)
