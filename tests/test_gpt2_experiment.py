"""The study on GPT-2 small: what it will cost, and the whole notebook, run on models that are here."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from circuit_generalization.ablation import Ablation
from circuit_generalization.circuit import load_circuit
from circuit_generalization.cone import CleanRun
from circuit_generalization.errors import InputError
from circuit_generalization.measurement import MeasureOptions, passes_per_prompt
from circuit_generalization.models import as_bridge, random_gpt2
from circuit_generalization.run_time import benchmark_speed, hours, measurement_work, pass_flops

ROOT = Path(__file__).parents[1]
FOLDER, NAME = ROOT / "experiments", "e10-gpt2-small"
GPT2 = SimpleNamespace(n_layers=12, n_heads=12, d_model=768, d_head=64, d_mlp=3072, d_vocab=50257)


# Hours

def test_a_pass_by_hand():
    tiny = SimpleNamespace(n_layers=1, n_heads=1, d_model=2, d_head=2, d_mlp=3, d_vocab=5)
    inputs, attention = 3 * 4 * 2 * 2, 2 * 4 * 4 * 2  # three tokens more than one would do, so four: q, k, v of each; scores and values
    last = 2 * 2 + 2 * 2 * 3 + 2 * 5  # of the last position: output matrix, MLP, unembedding
    assert pass_flops(tiny, 4) == 2 * (inputs + attention + last)
    assert pass_flops(tiny, 4, whole_vocabulary=False) == 2 * (inputs + attention + last - 2 * 3)


def test_a_pass_is_what_the_engine_multiplies():
    """PyTorch counts; the engine asks all positions of the last layer, the estimate only the last."""
    model, tokens = as_bridge(random_gpt2(n_layers=3, n_heads=2, d_model=32)), torch.arange(24).reshape(2, 12)
    run = CleanRun(model, tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): run.unembed(run.kept.final)
    cfg = model.cfg
    spared = 2 * 11 * (cfg.d_model * cfg.d_model * 2 + 2 * cfg.d_model * cfg.d_mlp) + 2 * 11 * 2 * 12 * cfg.d_model
    assert counter.get_total_flops() == 2 * (pass_flops(cfg, 12) + spared)


def test_the_work_of_a_measurement_is_its_passes():
    circuit = load_circuit("gpt2-ioi")
    options = MeasureOptions("gpt2", n_prompts=10, n_random=3, n_draws=4, ablations=("resample", "zero"), positions=("listed",))
    work = measurement_work(GPT2, circuit, options, {"base": 16, "passive": 20})
    assert work.setting.tolist() == ["resample", "zero"] and (work.prompts == 20).all()
    assert work.passes.tolist() == [passes_per_prompt(Ablation("resample", 4), 3, 144, True), passes_per_prompt(Ablation("zero", 4))]
    assert work.gflop[1] == pytest.approx(10 * work.passes[1] * (pass_flops(GPT2, 16) + pass_flops(GPT2, 20)) / 1e9)
    with pytest.raises(InputError, match="no variants"): measurement_work(GPT2, circuit, options, {})


def test_a_measurement_says_as_many_passes_as_it_plans():
    from circuit_generalization.measurement import plan

    options = MeasureOptions("compiled-ioi", axes=(), n_prompts=4, n_random=2, n_draws=2)
    circuit = load_circuit("compiled-ioi-ioi")
    work = measurement_work(SimpleNamespace(n_layers=4, n_heads=8, d_model=8, d_head=1, d_mlp=8, d_vocab=9), circuit, options, {"base": 16})
    assert circuit.edges and any("edge" in s for s in work.setting) and 4 * work.passes.sum() == plan(options)["passes"]


def test_speed_is_the_least_that_was_measured(tmp_path):
    table = pd.DataFrame(dict(model=["gpt2-shaped"] * 3 + ["organism-a"], peak_gflops=[200, 200, None, 100], share_of_peak=[0.8, 0.5, None, 0.1]))
    table.to_csv(tmp_path / "engine.csv", index=False)
    assert benchmark_speed(tmp_path / "engine.csv") == (200, 0.5) and benchmark_speed(tmp_path / "engine.csv", "organism-a") == (100, 0.1)
    assert hours(3600 * 50, 100, 0.5) == 1
    with pytest.raises(InputError, match="no measured speed of 'other'"): benchmark_speed(tmp_path / "engine.csv", "other")
    with pytest.raises(InputError, match="No such file"): benchmark_speed(tmp_path / "none.csv")
    (tmp_path / "engine.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="no measured speed"): benchmark_speed(tmp_path / "engine.csv")


def test_the_benchmarks_are_there():
    peak, share = benchmark_speed(ROOT / "results" / "benchmarks" / "engine.csv")
    assert peak > 10 and 0.2 < share < 1 and (pd.read_csv(ROOT / "results" / "benchmarks" / "curves.csv").cpu_seconds > 0).all()


# The notebook

def cells(kind): return [c for c in json.loads((FOLDER / f"{NAME}.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def test_it_is_committed_without_results_and_says_so():
    prose = "".join("".join(c["source"]) for c in cells("markdown"))
    assert "committed without results" in prose
    assert not (FOLDER / NAME).exists() and not (ROOT / "results" / NAME).exists(), "results are there: the notebook and this test must say so"
    printed = "".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", "")) for c in cells("code") for o in c["outputs"])
    assert "nothing will be measured" in printed and "hours" in printed and "not done" in printed


def test_the_circuits_and_variants_that_it_names_are_there():
    options = yaml.safe_load((FOLDER / f"{NAME}.yaml").read_text(encoding="utf-8"))
    for task in options["tasks"]: assert load_circuit(f"{options['circuits']}-{task}").task == task
    assert options["n_prompts"] >= 100 and options["n_random"] >= 99 and options["gate_n"] >= 1000


def run(tmp_path, **given):
    import papermill

    folders = {name: str(tmp_path / name) for name in ("raw", "results")}
    papermill.execute_notebook(FOLDER / f"{NAME}.ipynb", tmp_path / "out.ipynb", given | folders, cwd=FOLDER, progress_bar=False)
    return pd.read_csv(tmp_path / "results" / "stages.csv").set_index("stage").what


FEW = dict(n_prompts=18, n_random=1, n_draws=2, curve_prompts=18, attribution_prompts=18, random_graphs=1, permutations=0)


@pytest.mark.slow
def test_the_whole_study_runs_on_an_organism_and_goes_on_where_it_was(tmp_path):
    variants = ["passive", "hospital"]
    given = dict(model="organism-a", circuits="organism-a", gate=False, variants=variants, changes=FEW | dict(tasks=["ioi"]))
    assert run(tmp_path, **given).to_dict() == dict(ioi="done", forecast="done", curves="done")
    results, raw = tmp_path / "results", tmp_path / "raw"
    table = pd.read_csv(results / "ioi" / "generalization.csv")
    assert set(table.variant) == {"base", *variants} and (table.n == 18).all() and len(list((results / "ioi" / "figures").glob("*.png"))) >= 4
    assert pd.read_csv(results / "mib.csv").quantity.tolist() == ["random CMD", "CMD", "CPR"] and (results / "figures" / "curves.png").is_file()
    assert len(pd.read_csv(raw / "curves.csv")) == 3 * 10 * 18 and "forecast" in set(pd.read_csv(results / "forecast.csv").who)
    (results / "forecast.csv").unlink()
    kept = (results / "mib.csv").read_bytes()
    assert run(tmp_path, **given).to_dict() == dict(ioi="done before", forecast="done", curves="done before")
    assert (results / "mib.csv").read_bytes() == kept
    other = run(tmp_path, **given | dict(changes=given["changes"] | dict(seed=1)))
    assert other.str.contains("is of another run|nothing to forecast").all()


@pytest.mark.slow
def test_a_model_of_gpt2s_shape_that_cannot_do_the_tasks_is_told_so(tmp_path, gpt2):
    config = dict(n_layers=12, n_heads=12, d_model=24, n_vocab=50257, n_positions=128)
    random_gpt2(**config).save_pretrained(tmp_path / "gpt2")
    gpt2.save_pretrained(tmp_path / "gpt2")
    stages = run(tmp_path, model=str(tmp_path / "gpt2"), changes=FEW | dict(gate_n=72))
    gate = json.loads((tmp_path / "results" / "gate" / "gate.json").read_text())
    assert stages["gate"] == "done" and "F(M)" in gate["failed"] and "full circuit = model" not in gate["failed"]
    for task in ("ioi", "greater_than", "induction"): assert "are right, and at least 75% must be" in stages[task]
    assert "nothing to forecast" in stages["forecast"] and stages["curves"] == "done"
    assert pd.read_csv(tmp_path / "results" / "mib.csv").quantity.tolist() == ["random CMD", "CMD", "CPR"]
