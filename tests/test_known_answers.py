"""How often the scorer is right: every measure of it against values that are known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from circuit_generalization import known_answers
from circuit_generalization.circuit import Circuit, load_circuit
from circuit_generalization.circuit_scorer import Baseline, CircuitScorer
from circuit_generalization.discrimination import auroc, auroc_difference
from circuit_generalization.errors import InputError
from circuit_generalization.known_answers import (
    blind_scores,
    calibrate,
    false_alarms,
    null_p_values,
    power,
    route_study,
    separation,
    super_uniform,
    text_only,
    text_transfer,
    threshold_table,
    token_counts,
    usual_measures,
)
from circuit_generalization.metrics import THRESHOLDS, Thresholds, verdicts
from circuit_generalization.models import load_model, random_gpt2
from circuit_generalization.planting import double_dissociation, planted_prompts, planting_of
from circuit_generalization.prompts import PromptSet
from circuit_generalization.stats import share_interval
from circuit_generalization.tasks import make_prompts, reference_pool


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


def test_the_size_of_the_models_own_effect_has_no_sign():
    assert usual_measures(table(ld_model=[-3.0], ld_circuit=[1.0], ld_complement=[1.0]))["|LD_M|"].tolist() == [3]


def test_separation_has_the_intervals_of_auroc_by_template_against_the_given_measure():
    rng = np.random.default_rng(0)
    used, clusters = rng.random(120) < 0.5, np.arange(120) // 10
    measures = pd.DataFrame({"score": used + rng.normal(size=12)[clusters], "other": rng.normal(size=120)})
    row = separation(measures, used, clusters, against="other").set_index("measure").loc["score"]
    own, ahead = auroc(measures.score, used, clusters), auroc_difference(measures.other, measures.score, used, clusters)
    assert [row.auroc, row.auroc_low, row.auroc_high] == [own.estimate, own.low, own.high]
    assert [row.ahead, row.ahead_low, row.ahead_high] == [ahead.estimate, ahead.low, ahead.high]


def test_the_classifier_reads_pairs_of_words():
    used, clusters = np.arange(48) % 2 == 0, np.arange(48) // 4
    found = text_only(tokens([[5, 6] if u else [6, 5] for u in used]), used, clusters)
    assert all(roc_auc_score(used, p) == 1 for p in found.values())


def test_words_that_occur_once_are_not_read():
    used = np.arange(24) < 12
    prompts = tokens([[100 + k, 5] for k in range(24)])
    assert all(len(set(p.round(6))) == 1 for p in text_transfer(prompts, used, prompts).values())


def test_a_word_that_one_template_has_tells_nothing_of_it():
    template = np.arange(24) // 2
    found = text_only(tokens([[100 + k, 5] for k in template]), template < 6, template)
    assert all(roc_auc_score(template < 6, p) <= 0.5 for p in found.values())


def test_folds_and_forests_are_drawn_from_the_seed():
    prompts, domain, built, clusters = cells(60)
    def read(seed, templates, n_folds=6): return text_only(prompts, domain != built, templates, seed, n_folds)
    one, two = (read(seed, clusters, 2)["logistic regression"] for seed in (0, 1))
    assert not np.array_equal(one, two)
    one, again, two = (read(seed, clusters % 3) for seed in (0, 0, 1))  # with three templates, the folds are always the same
    assert np.allclose(one["logistic regression"], two["logistic regression"])
    assert np.array_equal(one["random forest"], again["random forest"]) and not np.array_equal(one["random forest"], two["random forest"])
    one, again, two = (text_transfer(prompts, domain != built, prompts, seed)["random forest"] for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, two)


def test_the_threshold_table_is_told_the_scale():
    scores = table(ld_model=[10.0] * 20 + [40.0] * 20, ld_circuit=[10.0] * 20 + [40.0] * 20, ld_complement=[0.0] * 40)
    row = threshold_table(scores, np.arange(40) % 2 == 0, np.arange(40) // 2 % 10, scale=100.0, taus=(0.3,), nus=(0.5,)).iloc[0]
    assert (row.n_used, row.n_not) == (10, 10), "effects of 10 logits are too small to be judged"


def test_false_alarms_have_the_interval_of_their_templates():
    active, template = np.arange(60) // 6 < 3, np.arange(60) // 6
    expected = share_interval(active, template)
    found = false_alarms(pd.DataFrame(dict(verdict=np.where(active, "active", "rerouted"), active=active)), template)
    assert (found["share"], found["low"], found["high"]) == (expected.estimate, expected.low, expected.high)
    scores = table(ld_circuit=[10.0] * 120, ld_complement=list(np.where(np.repeat(active, 2), 0.0, 10.0)))
    row = threshold_table(scores, np.arange(120) % 2 == 0, np.repeat(template, 2), taus=(0.3,), nus=(0.5,)).iloc[0]
    assert (row.alarms, row.alarms_high) == (expected.estimate, expected.high)


def test_five_percent_of_false_alarms_are_safe(): assert calibrate(rows((0.2, 0.5, 0.5, 0.01), (0.3, 0.5, 0.9, 0.05))).tau == 0.3


def test_blind_circuits_are_drawn_from_the_seed(compiled):
    one, two = (blind_scores(*compiled, n_circuits=4, seed=seed, ablation="counterfactual") for seed in (0, 1))
    assert one.prompt_id.equals(two.prompt_id) and not one.overlap.equals(two.overlap)


def test_blind_circuits_are_judged_by_the_given_baseline_and_the_scorers_thresholds(compiled):
    scorer, prompts = compiled
    found = blind_scores(scorer, prompts, n_circuits=4, ablation="counterfactual", baseline=Baseline(1e6, None, 1))
    assert found.verdict.eq("undecided").all()
    strict = CircuitScorer(scorer.model, scorer.circuit, thresholds=Thresholds(min_effect=1e3))
    assert blind_scores(strict, prompts, n_circuits=4, ablation="counterfactual").verdict.eq("undecided").all()


def test_every_p_value_has_circuits_of_its_own_from_the_seed(compiled):
    scorer, prompts = compiled
    one, again, two = (null_p_values(scorer, prompts[[0]], n=12, n_random=3, seed=seed, ablation="counterfactual") for seed in (0, 0, 1))
    assert len(set(one)) > 1 and set(one) <= {0.25, 0.5, 0.75, 1.0} and np.array_equal(one, again) and not np.array_equal(one, two)


def test_p_values_take_every_prompt_in_turn_in_random_order(compiled, monkeypatch):
    asked, real = [], CircuitScorer.replacements

    def replacements(self, some, *more):
        asked.append(some.labels.prompt_id.iloc[0])
        return real(self, some, *more)

    monkeypatch.setattr(CircuitScorer, "replacements", replacements)
    null_p_values(*compiled, n=40, n_random=1, ablation="counterfactual")
    assert len(asked) == 40 and len(set(asked[:36])) == 36 and asked[:36] != sorted(asked[:36])


def test_one_donor_is_enough_for_a_p_value(compiled):
    scorer, prompts = compiled
    scorer = CircuitScorer(scorer.model, scorer.circuit, reference_pool(prompts, scorer.model.tokenizer, n=1, seed=1))
    assert len(null_p_values(scorer, prompts, n=2, n_random=1)) == 2


def test_levels_share_the_error_and_a_p_value_at_a_level_counts():
    p = np.where(np.arange(100) < 17, 0.1, 0.9)
    alone, among = super_uniform(p, (0.1,)), super_uniform(p).set_index("alpha")
    assert alone.share[0] == 0.17 and not alone.holds[0] and among.share[0.1] == 0.17 and among.holds[0.1]


def test_power_is_drawn_from_the_seed():
    rng = np.random.default_rng(0)
    used = np.arange(400) % 2 == 0
    active = np.where(used, rng.random(400) < 0.85, rng.random(400) < 0.02)
    one, again, *others = (power(active, used, np.arange(400) // 2 % 20, 40, n_sets=50, seed=seed) for seed in (0, 0, 1, 2, 3))
    assert one == again and set(others) != {one}


def test_a_variant_that_is_higher_is_no_failure():
    used = np.arange(200) % 2 == 0
    assert power(~used, used, np.arange(200) // 2 % 20, n=40, failing=1.0, n_sets=5) == 0


def test_pairs_of_fewer_than_eight_templates_have_no_power():
    used = np.arange(160) % 2 == 0
    few, enough = (power(used, used, np.arange(160) // 2 % k, n=70, failing=0.8, n_sets=5) for k in (7, 8))
    assert (few, enough) == (0, 1)


@pytest.mark.parametrize("planted", [False, True])
def test_a_route_is_studied_on_its_own_discovery_prompts(planted, monkeypatch):
    monkeypatch.setattr(known_answers, "study", lambda bench, progress, **claim: (bench, claim))
    planting = planting_of("organism-patchwork-1")
    bench, claim = route_study("organism-patchwork-1", planting, planted, n_prompts=16, seed=1)
    labels = planted_prompts(planting, 16, 1, bench.model.tokenizer, split="discovery").labels
    assert bench.prompts.labels.prompt.tolist() == labels.prompt[labels.planted == planted].tolist()
    assert claim["provenance"]["prompts"] == f"{'planted' if planted else 'unplanted'} prompts of the patchwork"
