"""What nobody here wrote: a GPT-2-shaped model in a folder, GPT-2's tokens, published prompts, circuits in the field's format.

The files in `shared/data` are not part of the repository; the tests that need them are skipped where they are absent.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from circuit_generalization.ablation import Ablation
from circuit_generalization.circuit import load_circuit
from circuit_generalization.circuit_scorer import COLUMNS, CircuitScorer
from circuit_generalization.cli import main
from circuit_generalization.errors import InputError
from circuit_generalization.models import load_model, quiet, random_gpt2
from circuit_generalization.prompts import PromptSet

QUICK = ["--draws", "3", "--n-random", "2", "--seed", "5"]
NUMBERS = ["ld_model", "ld_circuit", "ld_complement", "ld_ablated", "gap_raw", "sufficiency", "necessity", "score", "kl"]
ROLES = {"IO": "IO", "S1": "S1", "S1+1": "S1+1", "S2": "S2"}  # our role position -> the name in the published files
FILES = ("ioi-ABBA-00", "ioi-BABA-07", "ioi-ABBA-12")
N, POOL = 3, 8  # prompts and reference prompts of each file


@pytest.fixture(scope="module")
def folder(gpt2, tmp_path_factory):
    """GPT-2 small with random weights, as a Hugging Face folder: its layers, heads, vocabulary and tokenizer, but 8 numbers a head instead of 64.

    At full width one run takes minutes, since every prompt is run hundreds of times, and nothing in the package depends on the width.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("gpt2-shaped") / "my-gpt2"
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=12, n_head=12, n_embd=96, n_positions=64, vocab_size=len(gpt2), initializer_range=0.2)
        GPT2LMHeadModel(config).save_pretrained(path)
        gpt2.save_pretrained(path)
    assert (path / "model.safetensors").is_file()
    return path


def published(shared, name, rows):
    "Rows of a CSV file from a file of published IOI prompts."
    data = json.loads(shared(f"prompts/{name}.json").read_text(encoding="utf-8"))
    at = {f"pos_{ours}": data["word_idxs"][theirs] for ours, theirs in ROLES.items()}
    for i in rows:
        p = data["prompts"][i]
        yield dict(prompt=p["clean"], counterfactual=p["corrupt"], answer=p["answers"][0], distractor=p["wrong_answers"][0], template=name, **at)


@pytest.fixture(scope="module")
def prompts(shared, gpt2, tmp_path_factory):
    "A CSV file of published prompts, and one of uninformative prompts: the published ones with three other names."
    home = tmp_path_factory.mktemp("prompts")
    rows = [row for name in FILES for row in published(shared, name, range(N))]
    pool = [row | {"prompt": row["counterfactual"]} for name in FILES for row in published(shared, name, range(N, N + POOL))]
    assert all(len(gpt2(r["prompt"])["input_ids"]) == len(gpt2(r["counterfactual"])["input_ids"]) for r in rows + pool)
    pd.DataFrame(rows).to_csv(home / "mine.csv", index=False)
    pd.DataFrame(pool).drop(columns="counterfactual").to_csv(home / "pool.csv", index=False)
    return home / "mine.csv", home / "pool.csv"


def score(folder, circuit, prompts, out, *more):
    "Run the command; the table, once it wrote that and nothing else."
    command = ["score", "--model", folder, "--circuit", circuit, "--prompts", prompts, *QUICK, *more]
    assert main([str(a) for a in [*command, "--out", out / "scores.csv"]]) == 0
    assert [p.name for p in out.iterdir()] == ["scores.csv"]
    return pd.read_csv(out / "scores.csv", keep_default_na=False, na_values=[""])


def checked(table, prompts, ablation, n_draws):
    "What every table of scores must be."
    given = pd.read_csv(prompts)
    assert list(table.columns[: len(COLUMNS)]) == COLUMNS and all(c.startswith(("engagement_", "reads_")) for c in table.columns[len(COLUMNS):])
    assert table.prompt.tolist() == given.prompt.tolist() and table.answer.tolist() == given.answer.tolist()
    finite = np.isfinite(table[NUMBERS])
    assert finite[["ld_model", "ld_circuit", "ld_complement", "ld_ablated", "gap_raw", "kl"]].all(axis=None)
    assert finite.all(axis=1).any(), "ratios exist wherever ablation changes anything"
    assert set((3 * table.p_value).dropna().round(6)) <= {1, 2, 3} and table.p_value.notna().any() and (table.n_random == 2).all(), "ranks"
    assert (table.model == "my-gpt2").all() and (table.ablation == ablation).all() and (table.n_draws == n_draws).all() and (table.seed == 5).all()
    assert table.gap.isna().all() and table.profile_similarity.isna().all(), "no task, so no baseline"
    return table


@pytest.mark.slow
def test_the_model_that_is_scored_is_the_one_in_the_folder(shared, folder, prompts, gpt2, tmp_path):
    "LD computed with transformers alone, prompt by prompt; all components kept is the model, and none is all ablated."
    from transformers import AutoModelForCausalLM

    eap = json.loads(shared("circuits/eap-ig-ioi-canonical-gpt2.json").read_text(encoding="utf-8"))
    every = {n: {"in_graph": True} for n in eap["nodes"]}
    (tmp_path / "all.json").write_text(json.dumps(eap | {"nodes": every, "edges": {}}))
    out = tmp_path / "out"
    out.mkdir()
    table = score(folder, tmp_path / "all.json", prompts[0], out, "--ablation", "counterfactual")
    with quiet(): model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for row in table.itertuples():
        other = pd.read_csv(prompts[0]).counterfactual[row.Index]
        good, bad = (gpt2(x)["input_ids"][0] for x in (row.answer, row.distractor))
        with torch.no_grad(): clean, changed = (model(torch.tensor([gpt2(t)["input_ids"]])).logits[0, -1] for t in (row.prompt, other))
        assert row.ld_model == pytest.approx(float(clean[good] - clean[bad]), abs=1e-3)
        assert row.ld_complement == row.ld_ablated == pytest.approx(float(changed[good] - changed[bad]), abs=1e-3)
        assert row.ld_circuit == pytest.approx(row.ld_model, abs=1e-4)
    assert table.ld_model.abs().mean() > 0.5, "differences this large cannot agree by chance"


@pytest.mark.parametrize("ablation, n_draws", [("resample", 3), *(pytest.param(k, 1, marks=pytest.mark.slow) for k in ("mean", "counterfactual"))])
def test_published_prompts_and_the_canonical_circuit(shared, ablation, n_draws, folder, prompts, tmp_path):
    more = [] if ablation == "counterfactual" else ["--reference", prompts[1]]
    circuit = shared("circuits/eap-ig-ioi-canonical-gpt2.json")
    table = checked(score(folder, circuit, prompts[0], tmp_path, "--ablation", ablation, *more), prompts[0], ablation, n_draws)
    assert len(load_circuit(circuit)) == 38 and (table.universe == "heads+mlps").all() and (table.circuit == circuit.stem).all()
    assert (table.ld_circuit - table.ld_model).abs().min() > 1e-4 and (table.ld_ablated - table.ld_model).abs().min() > 1e-4
    assert table.template.tolist() == [name for name in FILES for _ in range(N)]
    assert table.engagement.isna().all(), "this format does not say what a head reads"
    first = (tmp_path / "scores.csv").read_bytes()
    score(folder, circuit, prompts[0], tmp_path, "--ablation", ablation, *more)
    assert (tmp_path / "scores.csv").read_bytes() == first, "the same command writes the same bytes"


@pytest.mark.slow
def test_a_circuit_in_the_format_of_a_benchmark(shared, folder, prompts, tmp_path):
    circuit = shared("circuits/mib-ioi-eap-ig-gpt2.json")
    table = checked(score(folder, circuit, prompts[0], tmp_path, "--ablation", "counterfactual"), prompts[0], "counterfactual", 1)
    assert (table.circuit == circuit.stem).all() and table.engagement.isna().all()


@pytest.mark.slow
def test_own_circuit_with_roles_and_positions(shared, folder, prompts, tmp_path):
    "Some of Wang et al.'s heads, where they act and what they read."
    def node(role, position, attends_to): return dict(role=role, position=position, attends_to=attends_to)

    nodes = {"a9.h9": node("name mover", "END", "IO"), "a9.h6": node("name mover", "END", "IO"), "a7.h3": node("S-inhibition", "END", "S2"),
             "a5.h5": node("induction", "S2", "S1+1"), "a0.h1": node("duplicate token", "S2", "S1")}
    (tmp_path / "mine.json").write_text(json.dumps(dict(name="mine", nodes=nodes)))
    out = tmp_path / "out"
    out.mkdir()
    table = score(folder, tmp_path / "mine.json", prompts[0], out, "--ablation", "resample", "--reference", prompts[1])
    checked(table, prompts[0], "resample", 3)
    roles, heads = ("duplicate token", "induction", "S-inhibition", "name mover"), ("a0.h1", "a5.h5", "a7.h3", "a9.h6", "a9.h9")
    assert list(table.columns[len(COLUMNS):]) == [*(f"engagement_{r}" for r in roles), *(f"reads_{h}" for h in heads)]
    model, at = load_model(folder), json.loads(shared(f"prompts/{FILES[0]}.json").read_text(encoding="utf-8"))["word_idxs"]
    pattern = model.run_with_cache(torch.tensor([model.tokenizer(table.prompt[0])["input_ids"]]))[1]["blocks.7.attn.hook_pattern"]
    assert table["engagement_S-inhibition"][0] == pytest.approx(float(pattern[0, 3, at["end"], at["S2"]]), abs=1e-6)
    assert (table.universe == "heads").all() and (table.circuit == "mine").all()


@pytest.mark.slow
def test_answers_that_are_sets_of_tokens(shared, folder, gpt2, tmp_path):
    "EAP-IG's greater-than prompts: any later year of the century is right, that year and all earlier ones are wrong."
    pairs = pd.read_csv(shared("prompts/greater-than-eap-ig.csv"), dtype=str).head(6)
    years = [f"{y:02d}" for y in range(2, 100) if len(gpt2(f"{y:02d}")["input_ids"]) == 1]
    mine = pd.DataFrame(dict(prompt=pairs.clean, counterfactual=pairs.corrupted, answer=["|".join(y for y in years if y > x) for x in pairs.label],
                             distractor=["|".join(y for y in years if y <= x) for x in pairs.label]))
    mine.to_csv(tmp_path / "years.csv", index=False)
    out = tmp_path / "out"
    out.mkdir()
    table = score(folder, shared("circuits/eap-ig-ioi-canonical-gpt2.json"), tmp_path / "years.csv", out, "--ablation", "counterfactual")
    table = checked(table, tmp_path / "years.csv", "counterfactual", 1)
    model, label = load_model(folder), pairs.label[0]
    logits = model(torch.tensor([gpt2(pairs.clean[0])["input_ids"]]))[0, -1]
    later, rest = ([gpt2(y)["input_ids"][0] for y in years if (y > label) is wanted] for wanted in (True, False))
    assert table.ld_model[0] == pytest.approx(float(logits[later].logsumexp(-1) - logits[rest].logsumexp(-1)), abs=1e-3)


@pytest.mark.slow
def test_published_files_go_in_as_they_are(shared, folder, tmp_path):
    "Wang et al.'s circuit on two of the thirty files, with their own p_ABC prompts as the pool; Hanna et al.'s on EAP-IG's table."
    home = tmp_path / "prompts"
    home.mkdir()
    for name in ("ioi-ABBA-00", "ioi-BABA-07"):
        data = json.loads(shared(f"prompts/{name}.json").read_text(encoding="utf-8"))
        (home / f"{name}.json").write_text(json.dumps(data | {"prompts": data["prompts"][:9]}), encoding="utf-8")
    (tmp_path / "out").mkdir()
    table = score(folder, "gpt2-ioi", home, tmp_path / "out", "--ablation", "mean", "--reference", "counterfactuals")
    assert table.template.tolist() == ["ABBA-00"] * 9 + ["BABA-07"] * 9 and (table.circuit == "gpt2-ioi").all() and (table.universe == "heads").all()
    assert np.isfinite(table[["ld_model", "ld_circuit", "ld_complement", "ld_ablated", "kl"]]).all(axis=None)
    assert {"engagement_name mover", "engagement_previous token", "reads_a9.h9"} <= set(table)
    lines = shared("prompts/greater-than-eap-ig.csv").read_text(encoding="utf-8").splitlines()[:7]
    (tmp_path / "years.csv").write_text("\n".join(lines) + "\n")
    table = score(folder, "gpt2-greater_than", tmp_path / "years.csv", tmp_path / "out", "--ablation", "counterfactual")
    assert (table.task == "greater_than").all() and table[["prob_diff_model", "prob_diff_circuit"]].abs().le(1).all(axis=None)
    assert (table.universe == "heads+mlps").all() and (table.ld_circuit - table.ld_model).abs().min() > 1e-4


def test_a_pool_that_lacks_a_template_is_refused_in_one_line(shared, folder, prompts, tmp_path, capfd):
    pool = pd.read_csv(prompts[1])
    pool[pool.template != FILES[1]].to_csv(tmp_path / "pool.csv", index=False)
    argv = ["score", "--model", folder, "--circuit", shared("circuits/eap-ig-ioi-canonical-gpt2.json"), "--prompts", prompts[0], *QUICK,
            "--reference", tmp_path / "pool.csv", "--out", tmp_path / "out" / "scores.csv"]
    assert main([str(a) for a in argv]) == 2
    said = capfd.readouterr()
    assert said.err.count("\n") == 1 and f"({N} of {N * len(FILES)} prompts have none)" in said.err and said.out == ""
    assert not (tmp_path / "out").exists()


# Token ids, and no tokenizer anywhere

def ids(seed, n=6, length=7): return torch.randint(0, 64, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


def bare():
    "Prompts that are nothing but token ids, and prompts of the same length to draw from."
    marks = dict(answers=[1, 2, 3, 4, 5, 6], distractors=[7, 8, 9, 10, 11, 12], positions={"S2": [2] * 6})
    return PromptSet.from_tokens(ids(0), ids(1), **marks), PromptSet.from_tokens(ids(2), **marks)


CIRCUIT = {"nodes": {"a0.h1": {"role": "duplicate token", "position": "S2"}, "a1.h0": {"role": "mover", "position": "END", "attends_to": "S2"}}}


@pytest.mark.parametrize("kind", ["counterfactual", "resample", "mean"])
def test_token_ids_without_a_tokenizer(kind, tmp_path):
    model, (prompts, reference) = random_gpt2(seed=2), bare()
    (tmp_path / "circuit.json").write_text(json.dumps(CIRCUIT))
    with quiet(): model.save_pretrained(tmp_path / "model")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tables = [CircuitScorer(m, tmp_path / "circuit.json", reference).score(prompts, Ablation(kind, 3), seed=1, n_random=2).drop(columns="model")
              for m in (model, tmp_path / "model")]
    assert load_model(tmp_path / "model").tokenizer is None
    pd.testing.assert_frame_equal(*tables, rtol=0, atol=1e-5)
    table = tables[0]
    assert len(table) == 6 and np.isfinite(table[NUMBERS]).all(axis=None) and table.p_value.between(0.333, 1).all()
    assert (table.prompt == "").all() and table.prompt_id.is_unique and table["engagement_mover"].between(0, 1).all()
    with torch.no_grad(): logits = model(prompts.tokens).logits[:, -1]
    expected = logits.gather(1, prompts.answers) - logits.gather(1, prompts.distractors)
    np.testing.assert_allclose(table.ld_model, expected[:, 0], atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model is left alone"


def test_token_ids_of_another_tokenizer_are_refused(tmp_path):
    prompts = PromptSet.from_tokens([[1, 2, 50256]], [[1, 2, 3]], answers=[4], distractors=[5])
    (tmp_path / "circuit.json").write_text(json.dumps({"nodes": {"a0.h1": {}}}))
    scorer = CircuitScorer(random_gpt2(), tmp_path / "circuit.json")
    with pytest.raises(InputError, match="another tokenizer"): scorer.score(prompts, "counterfactual")
