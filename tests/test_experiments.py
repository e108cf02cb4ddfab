"""The experiments run from their configuration files, here with few prompts, and write what they say they write."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from scipy.stats import kstest

from circuit_generalization.measurement import PROCESSED, MeasureOptions, chosen_variants

FOLDER = Path(__file__).parents[1] / "experiments"
EXPERIMENTS = sorted(p.stem for p in FOLDER.glob("e0[0-4]*.ipynb"))  # measurements of a task; e05 has its own
QUICK = dict(n_prompts=18, n_random=1)


def options_of(name): return MeasureOptions.from_dict(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def test_one_experiment_an_axis_and_one_for_the_base():
    assert [options_of(name).axes for name in EXPERIMENTS] == [(), ("lexical",), ("syntactic",), ("domain",), ("adversarial",)]
    for name in EXPERIMENTS:
        assert options_of(name).n_prompts >= 100 and options_of(name).n_random >= 99 and options_of(name).variants is None


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs(name, tmp_path):
    import papermill

    raw, results = tmp_path / "raw", tmp_path / "results"
    papermill.execute_notebook(FOLDER / f"{name}.ipynb", tmp_path / "out.ipynb", dict(QUICK, raw=str(raw), results=str(results)), cwd=FOLDER,
                               progress_bar=False)
    assert json.loads((raw / "manifest.json").read_text())["options"]["n_prompts"] == 18
    assert {p.name for p in raw.iterdir()} == {"scores.csv", "sweep.csv", "manifest.json"}
    assert {*PROCESSED, "figures"} == {p.name for p in results.iterdir()} and len(list((results / "figures").glob("*.png"))) >= 4
    table = pd.read_csv(results / "generalization.csv")
    assert list(zip(table.axis, table.variant)) == chosen_variants(options_of(name)) and (table.n == 18).all()
    assert table.conclusion[1:].notna().all()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_published_is_of_the_whole_run(name):
    manifest, table = json.loads((FOLDER / name / "manifest.json").read_text()), pd.read_csv(FOLDER.parent / "results" / name / "generalization.csv")
    options = vars(options_of(name))
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["options"].items()} == options
    assert (table.n == options["n_prompts"]).all() and len(pd.read_csv(FOLDER / name / "scores.csv")) == table.n.sum()


# e05: known answers

KNOWN = "e05-known-answers"
TABLES = "separation thresholds thresholds_tested compiled compiled_auroc false_alarms p_values coverage power summary".split()


@pytest.mark.slow
def test_known_answers_run(tmp_path):
    import papermill

    raw, results = tmp_path / "raw", tmp_path / "results"
    papermill.execute_notebook(FOLDER / f"{KNOWN}.ipynb", tmp_path / "out.ipynb",
                               dict(n_prompts=72, effort=0.02, raw=str(raw), results=str(results)), cwd=FOLDER, progress_bar=False)
    assert {p.name for p in results.iterdir()} == {*(f"{t}.csv" for t in TABLES), "figures", "manifest.json"}
    assert {p.name for p in raw.iterdir()} == {"scores.csv", "compiled.csv", "p_values.csv"}
    apart = pd.read_csv(results / "separation.csv").query("measure == 'score'").set_index("model").auroc
    assert (apart.drop("organism-patchwork-1") >= 0.98).all() and apart.min() > 0.9


def test_known_answers_that_are_published_are_of_the_whole_run():
    results, options = FOLDER.parent / "results" / KNOWN, yaml.safe_load((FOLDER / f"{KNOWN}.yaml").read_text(encoding="utf-8"))
    manifest = json.loads((results / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["options"] == options and manifest["effort"] == 1
    scores = pd.read_csv(FOLDER / KNOWN / "scores.csv")
    assert set(scores.model) == {options["calibration"], *options["test"]} and not set(options["test"]) & {options["calibration"]}
    assert (scores.groupby(["model", "ablation"]).size() == options["n_prompts"]).all()


def test_the_promises_that_are_kept_say_so():
    """AUROC on the test patchworks, verdicts of compiled circuits and false alarms: what everything else leans on."""
    summary = pd.read_csv(FOLDER.parent / "results" / KNOWN / "summary.csv").set_index("what")
    for what in ("AUROC of the score, each test patchwork", "verdicts of compiled circuits"): assert summary.holds[what]
    assert summary.holds[summary.index.str.startswith("false alarms")].all()


# e06: the genetics lens

GENETICS = "e06-genetics"


@pytest.mark.slow
def test_the_genetics_lens_runs(tmp_path):
    import papermill

    raw, results = tmp_path / "raw", tmp_path / "results"
    given = dict(models=["organism-c", "compiled-ioi"], n_random=1, sweep=False, rediscover=False, raw=str(raw), results=str(results))
    papermill.execute_notebook(FOLDER / f"{GENETICS}.ipynb", tmp_path / "out.ipynb", given, cwd=FOLDER, progress_bar=False)
    assert {p.name for p in raw.iterdir()} == {"manifest.json", *(f"GN{k}.csv" for k in range(1, 6))}
    tables = {"findings.csv", "estimates.csv", "over_training.csv", "lens_and_verdicts.csv", "epistasis_by_role.csv"}
    assert {p.name for p in results.iterdir()} == tables | {"figures"} and len(list((results / "figures").iterdir())) == 5
    assert pd.read_csv(results / "findings.csv").groupby("metric").size().to_dict() == {"GN1": 6, "GN2": 5, "GN3": 5, "GN4": 6, "GN5": 5}


def test_the_genetics_lens_that_is_published_is_of_the_whole_run():
    results, options = FOLDER.parent / "results" / GENETICS, yaml.safe_load((FOLDER / f"{GENETICS}.yaml").read_text(encoding="utf-8"))
    manifest, findings = json.loads((FOLDER / GENETICS / "manifest.json").read_text()), pd.read_csv(results / "findings.csv")
    assert manifest["options"] == options
    of_each = findings[findings.metric == "GN2"].groupby(["model", "setting"]).tasks.apply(list)
    for model in options["models"]:
        for setting in options["settings"]: assert of_each[model, setting] == (["ioi"] if model == "compiled-ioi" else options["tasks"])
    assert all(m["passes"]["stated"] == m["passes"]["edited"] for m in manifest["measured"].values())
    pairs = findings[(findings.metric == "GN1") & (findings.setting == next(iter(options["settings"])))].groupby("model").size()
    assert (pairs == 6).all() and len(pairs) == len(options["models"]) - 1


# e07: the protocols

PROTOCOLS = "e07-protocols"


@pytest.mark.slow
def test_the_protocols_run(tmp_path):
    import papermill

    raw, results = tmp_path / "raw", tmp_path / "results"
    given = dict(models=["organism-b"], tasks=["sva"], n_random=1, calibrated=[], raw=str(raw), results=str(results))
    papermill.execute_notebook(FOLDER / f"{PROTOCOLS}.ipynb", tmp_path / "out.ipynb", given, cwd=FOLDER, progress_bar=False)
    verdicts = pd.read_csv(results / "verdicts.csv")
    assert verdicts.protocol.tolist() == ["MB_KH", "MB_RE", "MB_DR", "MB_MR"] and len(list((results / "figures").iterdir())) == 4
    assert {p.stem for p in raw.iterdir()} >= {"activation_patching", "role_ablation", "path_patching", "dose_response"}


def test_the_protocols_that_are_published_are_of_the_whole_run():
    options = yaml.safe_load((FOLDER / f"{PROTOCOLS}.yaml").read_text(encoding="utf-8"))
    results = FOLDER.parent / "results" / PROTOCOLS
    verdicts, estimates = (pd.read_csv(results / f"{name}.csv") for name in ("verdicts", "estimates"))
    assert verdicts.groupby(["protocol", "model"]).task.apply(list).apply(lambda x: x == options["tasks"]).all()
    assert len(verdicts) == 4 * len(options["models"]) * len(options["tasks"])
    assert set(estimates.n_null) == {0, options["n_random"]} and set(pd.read_csv(results / "calibrations.csv").model) == set(options["calibrated"])
    assert len(list((results / "figures").iterdir())) == 3 * len(options["models"]) + 1


# e08: what predicts failure, whether that can be believed, and whether failure follows

FORECAST, CHECKS, CAUSES = "e08-forecast", "e08b-forecast-checks", "e08c-changing-one-factor"
FEW_CASES = dict(tasks=["ioi"], n=18, variants=["passive", "third_name", "rare_names"])


def config(name): return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def csv(name, table): return pd.read_csv(FOLDER.parent / "results" / name / f"{table}.csv")


@pytest.mark.slow
def test_the_forecast_and_its_checks_run(tmp_path):
    """Cases are gathered once for both."""
    import papermill

    def run(name, **given):
        folders = dict(raw=str(tmp_path / "raw"), results=str(tmp_path / name))
        papermill.execute_notebook(FOLDER / f"{name}.ipynb", tmp_path / "out.ipynb", given | folders, cwd=FOLDER, progress_bar=False)
        return {p.stem for p in (tmp_path / name).glob("*.csv")}
    models = ["organism-a", "organism-c"]
    tables = run(FORECAST, models=models, permutations=9, **FEW_CASES)
    assert tables == set("performance by_model families importance dependence reliability held_out held_out_variants from_one_to_another verdicts "
                         "gap".split())
    assert {p.name for p in (tmp_path / FORECAST / "figures").iterdir()} >= {"performance-decided.png", "dependence.png", "reliability.png"}
    assert len(pd.read_csv(tmp_path / "raw" / "risks.csv")) == pd.read_csv(tmp_path / FORECAST / "performance.csv").n.max()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "raw" / "gathered").iterdir()}
    assert len(before) == 2
    tables = run(CHECKS, changes=FEW_CASES | dict(models=models, patchworks=["organism-patchwork-3"], patchwork_prompts=18, shuffles=2, p_values=3))
    assert tables >= {"planted", "shuffled", "with_checkpoints", "families_with_checkpoints"}
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "raw" / "gathered").iterdir()}.items()


@pytest.mark.slow
def test_changing_one_factor_runs(tmp_path):
    import papermill

    given = dict(models=["organism-a"], n=18, doses=dict(attention=[-4], others=[-1], ld=[3]))
    papermill.execute_notebook(FOLDER / f"{CAUSES}.ipynb", tmp_path / "out.ipynb", dict(changes=given, results=str(tmp_path / "results")),
                               cwd=FOLDER, progress_bar=False)
    said = pd.read_csv(tmp_path / "results" / "said.csv")
    assert said.groupby("target").size().tolist() == [7, 7] and (tmp_path / "results" / "figures" / "organism-a.png").is_file()


def test_the_forecast_that_is_published_is_of_the_whole_run_and_ahead_of_the_obvious():
    options, table = config(FORECAST), csv(FORECAST, "performance")
    first, others = table[table.who == "forecast"].set_index("target"), table[table.who != "forecast"]
    assert first.index.tolist() == options["targets"] and (first.p_value == 1 / (options["permutations"] + 1)).all()
    assert (others.ahead_auroc_low > 0).all() and (others.ahead_within_low > 0).all() and (others.ahead_brier_high < 0).all()
    risks = pd.read_csv(FOLDER / FORECAST / "risks.csv")
    assert len(risks) == first.n.max() and (risks.groupby("model").task.agg(set) == set(options["tasks"])).all()
    assert set(risks.model) == set(options["models"]) and risks.groupby(["model", "task", "variant"]).size().max() == options["n"]


def test_where_the_truth_is_known_it_is_found_and_nothing_else():
    planted, shuffled, options = csv(CHECKS, "planted"), csv(CHECKS, "shuffled"), config(CHECKS)
    unseen = planted[(planted.unseen == "variant and templates") & (planted.features == "all")]
    assert sorted(unseen.model) == options["patchworks"] and (unseen.auroc >= 0.95).all()
    freely, inside = (shuffled[shuffled.dealt == dealt] for dealt in ("among all", "within templates"))
    assert len(freely) == options["shuffles"] and abs(freely.auroc.mean() - 0.5) < 0.02
    assert len(inside) == options["p_values"] and kstest(inside.p_value, "uniform").pvalue > 0.01


def test_causes_that_are_published_are_of_every_model_and_ld_as_such_is_none():
    said, followed = csv(CAUSES, "said"), csv(CAUSES, "followed")
    assert set(said.model) == set(config(CAUSES)["models"]) and not said[said.factor == "LD"].says.str.contains("failure follows").any()
    ld = followed[(followed.factor == "LD") & (followed.group == "all")]
    assert ld.sufficiency_change.abs().max() < 1e-3 and ld.necessity_change.abs().max() < 1e-3


# e09: causal scrubbing

SCRUBBING = "e09-causal-scrubbing"


@pytest.mark.slow
def test_causal_scrubbing_runs(tmp_path):
    import papermill

    raw, results = tmp_path / "raw", tmp_path / "results"
    given = dict(names=["ioi-refined", "brackets-1b"], n=48, pool=240, raw=str(raw), results=str(results))
    papermill.execute_notebook(FOLDER / f"{SCRUBBING}.ipynb", tmp_path / "out.ipynb", given, cwd=FOLDER, progress_bar=False)
    assert pd.read_csv(results / "recovered.csv").hypothesis.tolist() == ["ioi-refined"] * 2 + ["brackets-1b"] * 2
    assert len(pd.read_csv(results / "variants.csv")) > 4 and len(pd.read_csv(results / "heads.csv")) == 21
    assert len(pd.read_csv(raw / "per_prompt.csv")) == 2 * 48


def test_the_hypotheses_that_are_published_are_those_of_the_package():
    from circuit_generalization.hypotheses import packaged_hypotheses

    options, results = yaml.safe_load((FOLDER / f"{SCRUBBING}.yaml").read_text(encoding="utf-8")), FOLDER.parent / "results" / SCRUBBING
    table = pd.read_csv(results / "recovered.csv")
    assert set(table.hypothesis) == set(packaged_hypotheses()) and set(table.target) == set(options["targets"]) and set(table.n) == {options["n"]}
    assert set(pd.read_csv(results / "adversary.csv").hypothesis) == set(options["attacked"])
