"""How often the scorer is right: every measure of it against values that are known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from circuit_generalization.circuit import Circuit, load_circuit
from circuit_generalization.circuit_scorer import CircuitScorer
from circuit_generalization.errors import InputError
from circuit_generalization.known_answers import (
    blind_scores,
    calibrate,
    false_alarms,
    null_p_values,
    power,
    separation,
    super_uniform,
    text_only,
    text_transfer,
    threshold_table,
    token_counts,
    usual_measures,
)
from circuit_generalization.metrics import THRESHOLDS, verdicts
from circuit_generalization.models import load_model, random_gpt2
from circuit_generalization.planting import double_dissociation
from circuit_generalization.prompts import PromptSet
from circuit_generalization.tasks import make_prompts


def table(**columns):
    "Scores of a few prompts, ratios in order with their LDs."
    n = len(next(iter(columns.values())))
    given = dict(variant=["base"] * n, ld_model=[10.0] * n, ld_ablated=[0.0] * n, s_se=[0.0] * n, n_se=[0.0] * n) | columns
    out = pd.DataFrame(given)
    out["sufficiency"], out["necessity"] = out.ld_circuit / out.ld_model, 1 - out.ld_complement / out.ld_model
    out["score"] = np.minimum(1 - (1 - out.sufficiency).abs(), out.necessity)
    return out.assign(gap_raw=out.ld_circuit - out.ld_model)


# measures

def test_usual_measures_have_the_values_computed_by_hand():
    scores = table(ld_model=[10.0, 10.0, 4.0], ld_circuit=[8.0, 15.0, 2.0], ld_complement=[1.0, 2.0, 4.0], variant=["x", "x", "y"])
    scores["ld_ablated"] = [1.0, 3.0, 0.0]
    found = usual_measures(scores)
    assert found["faithfulness ratio"].tolist() == [0.8, 1.5, 0.5]
    assert found["closeness of the ratio"].tolist() == pytest.approx([-0.2, -0.5, -0.5])
    assert found["data-set faithfulness"].tolist() == pytest.approx([9.5 / 8, 9.5 / 8, 0.5])
    assert found["minus |gap|"].tolist() == [-2, -5, -2] and found["|LD_M|"].tolist() == [10, 10, 4]
    assert found["score"].tolist() == pytest.approx([0.8, 0.5, 0.0])
    one_set = usual_measures(scores, ["all"] * 3)["data-set faithfulness"]
    assert one_set.nunique() == 1 and one_set[0] == pytest.approx((25 - 4) / (24 - 4))


def test_separation_is_the_auroc_and_counts_what_is_undefined():
    rng = np.random.default_rng(0)
    used, clusters = rng.random(120) < 0.5, np.arange(120) % 12
    measures = pd.DataFrame({"score": used + rng.normal(size=120), "other": rng.normal(size=120)})
    measures.loc[3, "other"] = np.nan
    found = separation(measures, used, clusters).set_index("measure")
    assert found.auroc["score"] == pytest.approx(roc_auc_score(used, measures.score))
    filled = measures.other.fillna(measures.other.min() - 1)
    assert found.auroc["other"] == pytest.approx(roc_auc_score(used, filled)) and found.undefined.to_dict() == {"score": 0, "other": 1}
    assert found.ahead["other"] == pytest.approx(found.auroc["score"] - found.auroc["other"]) and found.ahead["score"] == 0
    assert (found.auroc_low <= found.auroc).all() and (found.auroc <= found.auroc_high).all()


# text only

def tokens(rows): return PromptSet.from_tokens(rows, None, [1] * len(rows), [2] * len(rows))


def cells(n=240, seed=0):
    "Rows of token ids with domain bit (token 10 or 11), construction bit (20 or 21) and noise; clusters of 20."
    rng = np.random.default_rng(seed)
    domain, built = rng.random(n) < 0.5, rng.random(n) < 0.5
    noise = rng.integers(30, 39, (n, 3)).tolist()
    rows = [[a, 10 + int(d), b, 20 + int(k), c] for d, k, (a, b, c) in zip(domain, built, noise)]
    return tokens(rows), domain, built, np.arange(n) % 20


def test_words_are_token_ids_without_padding(): assert token_counts(tokens([[5, 6, 7], [8]])) == ["t5 t6 t7", "t8"]


def test_the_classifier_finds_what_a_word_tells_and_only_that():
    prompts, domain, built, clusters = cells()
    by_word = text_only(prompts, domain, clusters)
    assert all(roc_auc_score(domain, p) == 1 for p in by_word.values())
    nothing = np.random.default_rng(1).random(len(prompts)) < 0.5
    assert all(roc_auc_score(nothing, p) < 0.65 for p in text_only(prompts, nothing, clusters).values())
    both = text_only(prompts, domain != built, clusters)
    assert roc_auc_score(domain != built, both["logistic regression"]) < 0.65 < roc_auc_score(domain != built, both["random forest"])


def test_no_template_is_in_training_and_test():
    rows = [[100 + k, 5] for k in range(24)]
    used = np.arange(24) < 12
    own_word = [[100 + k, 50 + int(used[k])] for k in range(24)]
    clusters = np.repeat(np.arange(12), 2)
    assert roc_auc_score(used, text_only(tokens(own_word), used, clusters)["logistic regression"]) == 1
    assert len(set(text_only(tokens(rows), used, clusters)["logistic regression"].round(6))) <= 12, "words of unseen templates say nothing"


def test_a_classifier_of_one_data_set_knows_nothing_of_others_words():
    train, domain, *_ = cells()
    rows = [[60, 12 + int(d), 61] for d in domain]
    found = text_transfer(train, domain, tokens(rows))
    assert all(len(set(p.round(6))) == 1 for p in found.values())
    assert all(roc_auc_score(domain, p) == 1 for p in text_transfer(train, domain, train).values())


# thresholds

def test_the_threshold_table_says_what_verdicts_say():
    rng = np.random.default_rng(0)
    n = 160
    used = np.arange(n) % 2 == 0
    scores = table(ld_circuit=list(10 * np.where(used, rng.normal(1, 0.2, n), rng.normal(0.3, 0.3, n))),
                   ld_complement=list(10 * np.where(used, rng.normal(0, 0.2, n), rng.normal(0.8, 0.3, n))))
    found = threshold_table(scores, used, np.arange(n) % 16, taus=(0.1, 0.3, 0.5), nus=(0.4, 0.6))
    row = found[(found.tau == 0.3) & (found.nu == 0.6)].iloc[0]
    said = verdicts(scores, None, type(THRESHOLDS)(tau=0.3, nu=0.6)).verdict.to_numpy()
    assert row.found == (said[used] == "active").mean() and row.alarms == (said[~used] == "active").mean() and (row.n_used, row.n_not) == (80, 80)
    assert found.groupby("nu").found.apply(lambda f: f.is_monotonic_increasing).all(), "a wider tau finds more"


def test_undecided_prompts_and_wrong_answers_count_nowhere():
    scores = table(ld_circuit=[10.0] * 20, ld_complement=[0.0] * 20, ld_model=[10.0] * 10 + [-1.0] * 4 + [10.0] * 6)
    scores.loc[14:15, "s_se"] = 1.0
    row = threshold_table(scores, np.arange(20) < 18, np.arange(20) % 10, taus=(0.3,), nus=(0.5,)).iloc[0]
    assert (row.n_used, row.n_not) == (12, 2)


def rows(*cells): return pd.DataFrame(cells, columns=["tau", "nu", "found", "alarms"])


def test_calibration_takes_the_strictest_of_the_nearly_best_that_are_safe():
    found = calibrate(rows((0.2, 0.5, 0.80, 0.01), (0.3, 0.5, 0.895, 0.02), (0.4, 0.5, 0.90, 0.03), (0.5, 0.5, 0.99, 0.06)))
    assert (found.tau, found.nu) == (0.3, 0.5) and found.max_se == THRESHOLDS.max_se
    found = calibrate(rows((0.3, 0.4, 0.9, 0.0), (0.3, 0.6, 0.9, 0.0)))
    assert found.nu == 0.6


def test_calibration_refuses_when_nothing_is_safe():
    with pytest.raises(InputError, match="more than 5% false alarms"): calibrate(rows((0.3, 0.5, 1.0, 0.2)))


# nothing to find

@pytest.fixture(scope="module")
def compiled():
    model = load_model("compiled-ioi")
    return CircuitScorer(model, load_circuit("compiled-ioi-ioi")), make_prompts("ioi", n=36, seed=0, tokenizer=model.tokenizer)


def test_blind_circuits_are_scored_on_all_prompts_and_never_active(compiled):
    found = blind_scores(*compiled, n_circuits=8, ablation="counterfactual")
    assert found.drawn.nunique() == 8 and found.prompt_id.nunique() == 36 and len(found) == 8 * 18
    far = found[found.overlap < 0.5]
    assert len(far) and not far.active.any()
    again = blind_scores(*compiled, n_circuits=8, ablation="counterfactual")
    assert again.score.equals(found.score)


def test_false_alarms_count_only_what_was_judged():
    said = ["active"] * 3 + ["rerouted"] * 17 + ["undecided"] * 5 + ["model_fails"] * 5
    scores = pd.DataFrame(dict(verdict=said, active=[v == "active" for v in said]))
    found = false_alarms(scores, np.arange(30) % 10)
    assert (found["prompts"], found["decided"], found["active"], found["share"]) == (30, 20, 3, 0.15) and found["low"] < 0.15 < found["high"]
    nothing = false_alarms(scores[20:], np.arange(10))
    assert nothing["decided"] == 0 and np.isnan(nothing["share"])


@pytest.mark.slow
def test_p_values_of_circuits_drawn_at_random_are_super_uniform(compiled):
    p = null_p_values(*compiled, n=200, n_random=9, ablation="counterfactual")
    assert len(p) == 200 and set(np.round(p * 10, 6)) <= set(range(1, 11))
    assert super_uniform(p).holds.all()
    assert np.array_equal(null_p_values(*compiled, n=12, n_random=9, ablation="counterfactual"), p[:12])


def test_super_uniformity_is_judged_by_the_lower_end():
    assert super_uniform(np.arange(1, 101) / 100).holds.all()
    bad = super_uniform(np.full(100, 0.04)).set_index("alpha")
    assert not bad.holds[0.05] and bad.share[0.05] == 1 and bad.n[0.05] == 100
    assert super_uniform(np.array([0.04, np.nan])).n.eq(1).all()


# power

@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_power_without_failures_is_the_error_rate(seed):
    used = np.arange(200) % 2 == 0
    found = power(used, used, np.arange(200) // 2 % 20, n=40, failing=0.0, n_sets=20, seed=seed)
    assert found == 0, "perfect verdicts and no failures: nothing to find"


def test_power_needs_templates_with_both_kinds():
    used = np.arange(40) % 2 == 0
    with pytest.raises(InputError, match="no template has prompts of both kinds"): power(used, used, np.arange(40) % 2, n=10)


def test_power_grows_with_the_number_of_pairs_and_with_the_failures():
    rng = np.random.default_rng(0)
    used, clusters = np.arange(400) % 2 == 0, np.arange(400) // 2 % 20
    active = np.where(used, rng.random(400) < 0.85, rng.random(400) < 0.02)
    few, many = (power(active, used, clusters, n, n_sets=100) for n in (20, 120))
    assert few < many and many > 0.9
    assert power(active, used, clusters, 60, failing=0.1, n_sets=100) < power(active, used, clusters, 60, failing=0.5, n_sets=100)
    assert power(active, used, clusters, 60, failing=0.0, n_sets=200) <= 0.1


# any model, no text

def test_everything_works_on_a_folder_without_a_tokenizer_and_token_ids(tmp_path):
    """How outside models will be tried: a GPT-2-format folder, prompts as token ids, nothing else."""
    random_gpt2(seed=3, n_layers=2, n_heads=4, d_model=32).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    clean, other = rng.integers(0, 60, (64, 6)).tolist(), rng.integers(0, 60, (64, 6)).tolist()
    prompts = PromptSet.from_tokens(clean, other, [61] * 64, [62] * 64, labels=pd.DataFrame({"template": np.arange(64) % 16}))
    scorer = CircuitScorer(tmp_path / "model", Circuit.from_components(["a0.h1", "a1.h2"]))
    scores, used = scorer.score(prompts, "counterfactual", n_random=0), np.arange(64) % 32 < 16
    clusters = prompts.labels.template
    assert set(separation(usual_measures(scores), used, clusters).measure) == set(usual_measures(scores))
    assert set(text_only(prompts, used, clusters)) == set(text_transfer(prompts, used, prompts))
    assert len(threshold_table(scores, used, clusters, taus=(0.3,), nus=(0.5,))) == 1
    blind = blind_scores(scorer, prompts, n_circuits=4, ablation="counterfactual")
    assert false_alarms(blind, blind.drawn)["prompts"] == len(blind) == 4 * 64
    assert len(null_p_values(scorer, prompts, n=4, n_random=3, ablation="counterfactual")) == 4
    assert len(double_dissociation(tmp_path / "model", prompts, used, ["a0.h1"], ["a1.h2"], ablation="counterfactual")) == 4
    assert 0 <= power(scores.score > 0.5, used, clusters, n=20, n_sets=5) <= 1
