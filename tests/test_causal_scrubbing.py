"""Scores of hypotheses: exact on constructed logits, at their extremes, repeatable, documented, and in the right order on an organism."""

import json
from dataclasses import replace
from itertools import permutations
from math import isnan

import numpy as np
import pandas as pd
import pytest
import torch
from families import made

from circuit_generalization import causal_scrubbing
from circuit_generalization.causal_scrubbing import (
    OWN_PROMPTS,
    SCRUB_FIELDS,
    SHUFFLES,
    TARGETS,
    TOLERANCE,
    check_rewrite,
    recovered_interval,
    scrub,
    scrub_prompts,
    shuffled,
)
from circuit_generalization.errors import InputError
from circuit_generalization.hypotheses import describe, hypothesis_from_dict, hypothesis_to_dict, save_hypothesis
from circuit_generalization.models import final_logits, load_model, model_hash, quiet
from circuit_generalization.prompts import PromptSet, prompts_hash
from circuit_generalization.scrubbing_engine import Part, Scrubber
from circuit_generalization.stats import MIN_CLUSTERS, cr2_interval, ratio_interval, share_interval

TEMPLATES = np.array([f"t{i % 9}" for i in range(40)])


@pytest.fixture(scope="module")
def model(): return made("gpt2")


@pytest.fixture(scope="module")
def prompts(model):
    "What the model says most is the answer, what it says least the distractor."
    rng = np.random.default_rng(0)
    tokens = torch.as_tensor(rng.integers(0, 97, (40, 6)))
    with torch.no_grad(): order = final_logits(model, tokens, torch.full((40,), 6)).argsort(-1)
    labels = pd.DataFrame(dict(template=TEMPLATES, x=np.arange(40) % 2))
    return PromptSet.from_tokens(tokens.tolist(), None, order[:, -1].tolist(), order[:, 0].tolist(), {"S": [2] * 40}, labels)


@pytest.fixture(scope="module")
def clean(model, prompts):
    with torch.no_grad(): return final_logits(model, prompts.tokens, prompts.lengths)


def h_of(claims, *output, **more):
    return hypothesis_from_dict(dict(output=list(output or claims), claims=claims, **more))


HEAD = h_of({"a": dict(nodes="a2.h1", feature="x", reads=dict(k="b", q="own")), "b": dict(nodes="a0.h0", feature="x", positions="S")}, "a", name="h")
ITSELF = h_of({"r": dict(nodes="rest")})


def ld(logits, prompts, i, j): return float(logits[i, prompts.answers[j, 0]] - logits[i, prompts.distractors[j, 0]])


# Targets and the baseline


def test_targets_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    two = PromptSet.from_tokens([[0], [0]], None, [[0], [0, 1]], [[1], [2]])
    assert np.allclose(TARGETS["probability"](logits, two), [0.5, 0.3]) and np.allclose(TARGETS["loss"](logits, two), -np.log([0.5, 0.3]))
    assert np.allclose(TARGETS["ld"](logits, two), np.log([2, 0.3 / 0.7])) and TARGETS["accuracy"](logits, two).tolist() == [1, 0]
    assert torch.isfinite(TARGETS["loss"](torch.tensor([[-1e4, 0, 0]]), two[:1])).all()


def test_shuffled_is_the_mean_over_all_permutations(prompts, clean):
    some, logits = prompts[:3], clean[:3]
    every = [[ld(logits, some, i, p[i]) for i in range(3)] for p in permutations(range(3))]
    many = shuffled(logits, some, TARGETS["ld"], n=6000)
    assert np.allclose(many, np.mean(every, 0), atol=0.05) and (np.ptp(every, 0) > 1).all()
    one = shuffled(logits, some, TARGETS["ld"], seed=5, n=1)
    assert any(np.allclose(one, e, atol=1e-5) for e in every)
    assert (shuffled(logits, some, TARGETS["ld"], 5, 1) == one).all()
    assert (shuffled(logits, some, TARGETS["ld"]) == shuffled(logits, some, TARGETS["ld"], 0, SHUFFLES)).all()
    assert len({tuple(shuffled(logits, some, TARGETS["ld"], seed, 1)) for seed in range(20)}) > 3


def test_shuffles_are_permutations(prompts, clean):
    seen = []
    shuffled(clean, prompts, lambda logits, p: (seen.append(p.labels.prompt_id.tolist()), torch.zeros(len(p)))[1], n=7)
    assert len(seen) == 7 and all(sorted(s) == prompts.labels.prompt_id.tolist() for s in seen)


# The recovered share


def test_recovered_by_hand():
    told = recovered_interval(np.full(9, 3.0), np.full(9, 5.0), np.full(9, 1.0), TEMPLATES[:9])
    assert told.estimate == 0.5 and told.n == told.n_clusters == 9
    above = recovered_interval(np.arange(27) + 50.0, np.arange(27) + 5.0, np.zeros(27), TEMPLATES[:27])
    assert np.isclose(above.estimate, (13 + 50) / (13 + 5)) and above.low > 1 and above.high > above.estimate > above.low
    below = recovered_interval(-np.arange(27) - 5.0, np.arange(27) + 5.0, np.zeros(27), TEMPLATES[:27])
    assert np.isclose(below.estimate, -1) and below.high < 0


def test_the_interval_is_of_the_linearised_ratio():
    rng = np.random.default_rng(1)
    whole, part, base = rng.normal(4, 1, 90), rng.normal(3, 1, 90), rng.normal(0, 0.1, 90)
    templates = np.arange(90) % 10
    told, fieller = recovered_interval(part, whole, base, templates, 3), ratio_interval(part - base, whole - base, templates)
    assert told.method == "cluster bootstrap-t" and told.estimate == fieller.estimate
    assert abs(told.low - fieller.low) < 0.03 and abs(told.high - fieller.high) < 0.03  # to first order the same
    assert recovered_interval(part, whole, base, templates, 3) == told != recovered_interval(part, whole, base, templates, 4)


def test_where_there_is_no_interval():
    few = recovered_interval(np.ones(7), np.arange(7) + 1.0, np.zeros(7), range(MIN_CLUSTERS - 1))
    assert few.estimate == 0.25 and isnan(few.low) and isnan(few.high) and few.method == "too few templates"
    nothing = recovered_interval(np.ones(9), np.zeros(9), np.zeros(9), range(9))
    assert isnan(nothing.estimate) and isnan(nothing.low) and nothing.method == "the whole is zero"
    exact = recovered_interval(np.arange(9) + 1.0, np.arange(9) + 1.0, np.zeros(9), range(9))
    assert exact.estimate == 1 and np.allclose([exact.low, exact.high], 1, atol=1e-6)
    assert exact.method == "Fieller, CR2 t (too little variation for a bootstrap)"


# A result, number by number


@pytest.mark.parametrize("factor", [3, -1, 0.9, 0.5])
def test_numbers_of_constructed_logits(model, prompts, clean, monkeypatch, factor):
    monkeypatch.setattr(causal_scrubbing, "check_rewrite", lambda s: 0)
    monkeypatch.setattr(Scrubber, "logits", lambda self, drawn: factor * clean[drawn.datum])
    got = scrub(model, HEAD, prompts, n=27, target="ld", seed=4)
    m = np.array([ld(clean, prompts, i, i) for i in range(27)])
    base = shuffled(clean[:27], prompts[:27], TARGETS["ld"], 4)
    scale = (m - base).mean()
    assert np.isclose(got.recovered.estimate, (factor * m - base).mean() / scale, atol=1e-5)
    assert (got.recovered.estimate > 1) == (factor > 1) and (got.recovered.estimate < 0) == (factor < 0)
    assert np.allclose([got.means[k] for k in ("scrubbed", "model", "shuffled")], [(factor * m).mean(), m.mean(), base.mean()], atol=1e-4)
    rows, gap = got.per_prompt, (factor - 1) * m / scale
    assert np.allclose(rows.gap, gap, atol=1e-5) and np.allclose(rows.model, m, atol=1e-4) and np.allclose(rows.scrubbed, factor * m, atol=1e-4)
    assert np.allclose(rows.shuffled, base, atol=1e-5)
    assert np.allclose(rows.ld_model, m, atol=1e-4) and np.allclose(rows.ld_scrubbed, factor * m, atol=1e-4)
    assert (rows.explained == ((np.abs(gap) <= TOLERANCE) & (factor > 0))).all() and rows.prompt_id.tolist() == prompts.labels.prompt_id[:27].tolist()
    p, q = torch.log_softmax(clean[:27].double(), -1), torch.log_softmax(factor * clean[:27].double(), -1)
    assert np.allclose(rows.kl, (p.exp() * (p - q)).sum(-1), atol=1e-4)
    d = got.distances
    assert np.isclose(d["ld_change"].estimate, np.abs((factor - 1) * m).mean(), atol=1e-4) and d["same_sign"].estimate == (factor > 0)
    assert np.isclose(d["kl"].estimate, rows.kl.mean()) and d["explained"].estimate == rows.explained.mean()
    assert d["same_sign"] == share_interval((np.full(27, factor > 0)), TEMPLATES[:27])


def test_the_mean_over_draws(model, prompts, clean, monkeypatch):
    factors = iter([1, 3, -2])
    monkeypatch.setattr(causal_scrubbing, "check_rewrite", lambda s: 0)
    monkeypatch.setattr(Scrubber, "logits", lambda self, drawn: next(factors) * clean[drawn.datum])
    got = scrub(model, HEAD, prompts, n=27, target="ld", n_draws=3)
    m = np.array([ld(clean, prompts, i, i) for i in range(27)])
    assert np.isclose(got.means["scrubbed"], 2 / 3 * m.mean(), atol=1e-4) and np.isclose(got.distances["same_sign"].estimate, 2 / 3)
    assert np.isclose(got.distances["explained"].estimate, 1 / 3)
    assert np.isclose(got.distances["ld_change"].estimate, (0 + 2 + 3) / 3 * m.mean(), atol=1e-4)
    assert np.allclose(got.per_prompt.ld_scrubbed, 2 / 3 * m, atol=1e-4)


def test_accuracy_and_a_function(model, prompts):
    right = scrub(model, HEAD, prompts, n=27, target="accuracy")
    assert right.settings["target"] == "accuracy" and right.means["model"] == 1
    def last_logit(logits, p): return logits[:, -1] + torch.tensor(p.labels.x.tolist())
    mine = scrub(model, ITSELF, prompts, n=27, target=last_logit)
    assert mine.settings["target"] == "last_logit" and mine.means["scrubbed"] == pytest.approx(mine.means["model"], abs=1e-5)
    assert mine.means["shuffled"] == pytest.approx(mine.means["model"], abs=1e-5)  # its mean does not depend on which label goes with which output
    with pytest.raises(InputError, match=r"the target gave \(\) numbers for 27 prompts: one each"):
        scrub(model, ITSELF, prompts, n=27, target=lambda logits, p: logits.mean())


def test_nothing_exchanged_recovers_all(model, prompts):
    got = scrub(model, ITSELF, prompts, target="ld")
    assert got.recovered.estimate == pytest.approx(1, abs=1e-5) and got.distances["explained"].estimate == got.distances["same_sign"].estimate == 1
    assert got.distances["kl"].estimate == pytest.approx(0, abs=1e-6)
    assert got.entropy == dict(drawn=np.log2(40), references=np.log2(40)) and got.classes.empty


def test_a_mean_of_zeros_is_no_share(model, prompts, clean, monkeypatch):
    monkeypatch.setattr(Scrubber, "logits", lambda self, drawn: clean[drawn.datum])
    monkeypatch.setattr(causal_scrubbing, "check_rewrite", lambda s: 0)
    monkeypatch.setattr(causal_scrubbing, "kl_divergence", lambda a, b: torch.zeros(len(a)))
    assert scrub(model, ITSELF, prompts).distances["kl"].method == cr2_interval(np.zeros(40), TEMPLATES).method


# Runs


def test_same_inputs_same_bytes(model, prompts):
    def of(**more): return scrub(model, HEAD, prompts, **(dict(n=27, n_draws=2) | more)).to_json()
    assert of() == of() and len({of(), of(seed=1), of(n_draws=1), of(n=26), of(target="ld")}) == 5


def test_draws_have_seeds_of_their_own(model, prompts, monkeypatch):
    seen, true = [], Scrubber.logits
    monkeypatch.setattr(Scrubber, "logits", lambda self, drawn: (seen.append(drawn), true(self, drawn))[1])
    told = []
    scrub(model, HEAD, prompts, n=27, n_draws=3, seed=5, progress=lambda *x: told.append(x))
    assert told == [(d, 3, "scrubbing h") for d in range(3)]
    expected = [Scrubber(model, prompts, HEAD).resampler.draw(np.arange(27), seed) for seed in (5, 6, 7)]
    assert all((a.children["a"].datum == b.children["a"].datum).all() for a, b in zip(seen[1:], expected, strict=True))
    assert len({tuple(d.children["a"].datum) for d in seen[1:]}) == 3


def test_what_a_result_says(model, prompts):
    got = scrub(model, HEAD, prompts, n=27, n_draws=2, seed=3)
    data = json.loads(got.to_json())
    assert set(data) == set(SCRUB_FIELDS)
    assert data["hypothesis"] == hypothesis_to_dict(HEAD) and data["described"] == describe(HEAD) and data["unimportant"] == "per parent"
    assert (data["n"], data["n_pool"], data["n_draws"], data["seed"], data["target"], data["task"]) == (27, 40, 2, 3, "loss", "")
    assert data["prompts"] == prompts_hash(prompts)[:12] and data["model"]["hash"] == model_hash(model)[:12]
    assert all(name in SCRUB_FIELDS["per_prompt"] for name in data["per_prompt"]) and {len(v) for v in data["per_prompt"].values()} == {27}
    assert set(data["distances"]) == {"kl", "ld_change", "same_sign", "explained"} and set(data["means"]) == {"scrubbed", "model", "shuffled"}
    assert data["entropy"]["drawn"] == pytest.approx(np.log2(40) * 3 + 2 * np.log2(20), abs=1e-4)
    assert [c["claim"] for c in data["classes"]] == ["a", "b"]
    assert set(data["recovered"]) == {"estimate", "low", "high", "n", "n_clusters", "method"}
    assert data["passes"] == dict(whole=40, edited=2 * 27 * 2)  # the clean run; then outputs and one head, twice


def test_one_prompt_has_no_interval_and_is_json(model, prompts):
    data = json.loads(scrub(model, HEAD, prompts, n=1).to_json())
    assert data["n"] == 1 and data["recovered"]["low"] is None


def test_references(model, prompts):
    told = replace(prompts, labels=prompts.labels.assign(informative=[True] * 30 + [False] * 10))
    assert scrub(model, ITSELF, told).settings["n"] == 30 and scrub(model, ITSELF, told, n=12).settings["n"] == 12
    assert scrub(model, ITSELF, prompts, n=1000).settings["n"] == 40
    mixed = replace(prompts, labels=prompts.labels.assign(informative=["True"] * 9 + ["False"] + ["True"] * 30))  # as from a table
    assert scrub(model, ITSELF, mixed).settings["n"] == 9
    with pytest.raises(InputError, match="in the very first nothing tells the answer: put informative ones first"):
        scrub(model, ITSELF, replace(prompts, labels=prompts.labels.assign(informative=False)))


def test_parts_are_found_on_prompts_that_are_not_scored(model, prompts, monkeypatch):
    seen, true = [], causal_scrubbing.Scrubber
    monkeypatch.setattr(causal_scrubbing, "Scrubber", lambda *a: (seen.append(a[4]), true(*a))[1])
    scrub(model, HEAD, prompts, n=27)
    scrub(model, HEAD, prompts, n=40)
    assert seen[0].tolist() == list(range(27, 40)) and seen[1] is None


def test_files_and_prompts_of_ones_own(model, prompts, tmp_path, monkeypatch):
    save_hypothesis(replace(HEAD, task="mine"), tmp_path / "h.yaml")
    asked = []
    monkeypatch.setitem(OWN_PROMPTS, "mine", lambda n, seed: (asked.append((n, seed)), prompts)[1])
    got = scrub(model, tmp_path / "h.yaml", n=9, seed=2)
    assert asked == [(4000, 2)] and got.settings["task"] == "mine" and got.hypothesis.claims == HEAD.claims
    scrub(model, str(tmp_path / "h.yaml"), n=5000)
    assert asked[1] == (10000, 0)
    scrub(model, tmp_path / "h.yaml", n=9, pool=20)
    assert asked[2] == (20, 0)


@pytest.mark.parametrize(("options", "message"), [
    (dict(n=0), "0 prompts and 1 draws: at least one of each is needed"),
    (dict(n_draws=0), "500 prompts and 0 draws: at least one of each is needed"),
    (dict(target="los"), "no target 'los': there is loss, ld, probability, accuracy"),
    (dict(prompts=None), "hypothesis 'h' names no task: give prompts"),
    (dict(prompts=None, hypothesis=replace(HEAD, task="ioi")), "has no tokenizer, and prompts are text: give prompts"),
    (dict(hypothesis="nowhere"), "nowhere: no such file, and no packaged hypothesis"),
    (dict(features={"token": lambda p: p.tokens.numpy()}, hypothesis=h_of({"a": dict(nodes="a0.h0", feature="z")})), "no feature 'z'"),
    (dict(hypothesis=h_of({"a": dict(nodes="a7.h0")})), "the model has no a7.h0"),
])
def test_bad_options(model, prompts, options, message):
    with pytest.raises(InputError, match=message): scrub(model, **(dict(hypothesis=HEAD, prompts=prompts) | options))


def test_features_of_ones_own(model, prompts):
    h = h_of({"r": dict(nodes="rest", feature="alone")})
    got = scrub(model, h, prompts, features={"alone": lambda p: range(len(p))})
    assert got.recovered.estimate == pytest.approx(1, abs=1e-5) and got.classes.itself.tolist() == [1]


# The rewritten model must be the model


PARTS = h_of({"a": dict(nodes="a2.h1", feature="x", part="subspace 1", reads=dict(k="b")), "b": dict(nodes="a0.h0", feature="x", part="fitted")}, "a")


def test_the_rewrite_is_the_model(model, prompts):
    for h in (HEAD, PARTS, ITSELF, h_of({"e": dict(nodes="a1.h0", positions="each", feature="token")}, unimportant="separately")):
        scrubber = Scrubber(model, prompts, h)
        assert check_rewrite(scrubber) < 1e-6 and check_rewrite(scrubber, 1) < 1e-6 and check_rewrite(scrubber, 1000) < 1e-6


def test_a_broken_part_is_caught(model, prompts, monkeypatch):
    true = Part.difference
    monkeypatch.setattr(Part, "difference", lambda self, *a: true(self, *a) + 0.01 * torch.arange(32))
    with pytest.raises(InputError, match="the rewritten model is not the model: with nothing exchanged its logits differ by .* of their size"):
        scrub(model, PARTS, prompts, n=9)
    scrub(model, HEAD, prompts, n=9)  # no part in it


def test_a_broken_head_is_caught(model, prompts):
    scrubber = Scrubber(model, prompts, HEAD)
    true = scrubber._computed
    scrubber._computed = lambda *a: 1.01 * true(*a)
    with pytest.raises(InputError, match="the rewritten model is not the model"): check_rewrite(scrubber)


# Prompts


@pytest.fixture(scope="module")
def organism():
    with quiet(): return load_model("organism-a")


@pytest.fixture(scope="module")
def pool(organism): return scrub_prompts("ioi", 1200, organism.tokenizer)


def test_generated_prompts(organism, pool):
    assert len(pool) == 1200 and pool.labels.informative.tolist() == [True] * 600 + [False] * 600
    names = [set(p.split()) for p in pool.labels.answer]
    assert len(set.union(*names)) <= 5  # words are shared
    once = scrub_prompts("ioi", 31, organism.tokenizer, untold=False)
    assert len(once) == 31 and once.labels.informative.all()
    assert prompts_hash(once) == prompts_hash(scrub_prompts("ioi", 31, organism.tokenizer, untold=False))
    odd = scrub_prompts("ioi", 31, organism.tokenizer, seed=1)
    assert odd.labels.informative.sum() == 16 and prompts_hash(odd[:16]) != prompts_hash(once[:16])
    subjects = [pool.tokens[torch.arange(1200), pool.positions[role]] for role in ("S1", "S2")]
    assert (subjects[0] == subjects[1]).tolist() == pool.labels.informative.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("node", "feature", "low", "high"), [
    ("a3.h5", ["informative"], 0.97, 1.1), ("a3.h5", [], 0.3, 0.85),
    ("a2.h0", ["distractor", "informative"], 0.95, 1.1), ("a2.h0", ["answer", "informative"], 0.3, 0.75)])
def test_what_heads_of_the_organism_carry(organism, pool, node, feature, low, high):
    got = scrub(organism, h_of({"a": dict(nodes=node, feature=feature), "rest": dict(nodes="rest")}), pool, n=150, target="ld")
    assert low < got.recovered.estimate < high, str(got.recovered)
    assert got.settings["n"] == 150 and got.settings["n_pool"] == 1200


@pytest.mark.slow
def test_prompts_are_made_for_the_task(organism):
    got = scrub(organism, h_of({"r": dict(nodes="rest", feature=["answer", "distractor"])}, task="ioi"), n=50, target="ld", pool=200)
    assert (got.settings["n"], got.settings["n_pool"]) == (50, 200) and got.settings["task"] == "ioi"
    assert got.settings["prompts"] == prompts_hash(scrub_prompts("ioi", 200, organism.tokenizer))
