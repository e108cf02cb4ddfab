"""Features, cases, splits and the forecast: exact values, no leak from the test side, nothing found where nothing is."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization.cases import cases_of, feature_columns, half_split, held_out_splits, target_of, template_splits, units_of
from circuit_generalization.circuit import Circuit, load_circuit
from circuit_generalization.clean_signals import clean_pass, clean_signals, direct_effects, direct_shape, lens, lens_shape
from circuit_generalization.errors import InputError
from circuit_generalization.features import FAMILIES, base_prompts, features_of, features_of_scores, prompts_of
from circuit_generalization.forecast import _OTHERS, Forecast, contributions, failed_before, fit_forecast, load_forecast, save_forecast
from circuit_generalization.forecast_study import (
    FORECAST,
    ask_everybody,
    families_table,
    from_one_to_another,
    gap_table,
    importance,
    performance,
    shuffled,
    shuffled_labels,
    transfers,
    verdict_table,
)
from circuit_generalization.learners import BASELINES, CANDIDATES, boosting, fit_chosen, logistic, out_of_fold, with_baselines
from circuit_generalization.metrics import logit_difference
from circuit_generalization.models import as_bridge, load_model, micro_gpt2
from circuit_generalization.prompt_features import counts, mentions, novelty, prompt_features, role_distances
from circuit_generalization.prompts import PromptSet, concat_prompts
from circuit_generalization.tasks import make_prompts

LOGISTIC = {"logistic, C 0.1": partial(logistic, 0.1)}


@pytest.fixture(scope="module")
def organism(): return load_model("organism-a")


@pytest.fixture(scope="module")
def prompts(organism):
    return concat_prompts([make_prompts("ioi", *v, n=18, tokenizer=organism.tokenizer) for v in (("base", "base"), ("domain", "hospital"))])


# What the words say

ids = st.lists(st.integers(0, 6), min_size=1, max_size=9)


@given(ids, st.integers(0, 6), st.integers(0, 6))
def test_mentions_are_those_of_a_list(row, answer, distractor):
    if answer == distractor: return
    found = mentions(PromptSet.from_tokens([row, [0] * 12], answers=[answer, 1], distractors=[distractor, 2])).iloc[0]
    for what, token in (("answer", answer), ("distractor", distractor)):
        assert found[f"{what}_mentions"] == row.count(token)
        age = len(row) - 1 - max((i for i, t in enumerate(row) if t == token), default=-1)
        assert found[f"{what}_age"] == age if token in row else np.isnan(found[f"{what}_age"])
    both = answer in row and distractor in row
    assert found.answer_first == (row.index(answer) < row.index(distractor)) if both else np.isnan(found.answer_first)


def test_padding_is_no_mention():
    p = PromptSet.from_tokens([[5, 6], [1, 2, 3, 4]], answers=[0, 9], distractors=[7, 8])  # padding holds id 0
    assert mentions(p).answer_mentions.tolist() == [0, 0]


def test_distances_are_signed_and_missing_roles_are_gaps():
    p = PromptSet.from_tokens([[1, 2, 3], [1, 2, 3]], answers=[4, 4], distractors=[5, 5], positions={"S2": [1, -1], "S2+1": [2, 2]})
    assert role_distances(p).columns.tolist() == ["distance_END_S2"]
    assert role_distances(p).distance_END_S2.iloc[0] == -1 and np.isnan(role_distances(p).distance_END_S2.iloc[1])


@pytest.mark.parametrize("text,names", [("When Mary and John went out, John gave it to", 2), ("The nurse met the doctor. She left", 0),
                                        ("On Monday Xorbl spoke. Then Xorbl left Quux", 3), ("", 0)])
def test_names_are_counted(text, names):
    p = PromptSet.from_tokens([[1, 2]], answers=[3], distractors=[4], labels=pd.DataFrame(dict(prompt=[text])))
    found = counts(p, None).iloc[0]
    assert found.names == names if text else np.isnan(found.names)


def test_new_tokens_are_those_that_no_base_prompt_has():
    base, new = (PromptSet.from_tokens(rows, answers=[8, 8], distractors=[9, 9]) for rows in ([[1, 2, 3], [4, 5, 0]], [[1, 2, 7], [1, 2, 3]]))
    assert novelty(new, base).new_tokens.tolist() == [1 / 3, 0] and novelty(new, base).new_pairs.tolist() == [0.5, 0]


# What a clean pass shows

def test_direct_effects_add_up_in_every_family_of_architectures(prompts):
    for name in ("organism-a", "organism-c", "compiled-ioi"):
        model = load_model(name)
        own = make_prompts("ioi", n=6, tokenizer=model.tokenizer)
        seen = clean_pass(model, own)
        heads, mlps, rest = direct_effects(model, seen, own)
        norm = model.ln_final.original_component
        bias = getattr(norm, "bias", None)
        unembed = model.W_U.detach()
        extra = 0 if bias is None else (bias.detach() @ unembed)[own.answers[:, 0]] - (bias.detach() @ unembed)[own.distractors[:, 0]]
        ld = logit_difference(seen.logits, own.answers, own.distractors)
        assert (heads.sum((1, 2)) + mlps.sum(1) + rest + extra).allclose(ld, atol=2e-3), name


def test_the_lens_ends_at_the_model_and_depth_is_by_hand(organism, prompts):
    seen = clean_pass(organism, prompts)
    assert lens(organism, seen, prompts)[:, -1].allclose(logit_difference(seen.logits, prompts.answers, prompts.distractors), atol=1e-4)
    shape = lens_shape(torch.tensor([[0.0, 3, 1, 4, 4], [0, 0, 0, 0, 2], [3, 3, 3, 3, 3], [1, 1, 1, 1, 0]]))
    assert shape.lens_depth.tolist()[:3] == [0.75, 1.0, 0.0] and shape.loc[3].isna().all()
    assert shape.lens_falls.tolist()[:3] == [0.5, 0, 0] and shape.lens_peak.tolist()[:3] == [1, 1, 1]


def test_shares_are_of_the_circuits_heads():
    heads = torch.tensor([[[3.0, -1], [0, 2]]])
    found = direct_shape(Circuit.from_components(["a0.h0"]), heads, torch.tensor([[1.0, -1]]), torch.tensor([4.0])).loc[0]
    assert found.direct_circuit == 0.75 and found.direct_others == 0.25 and found.direct_mlps == 0
    assert found.direct_opposed == 2 / 8 and found.direct_depth == 3 / 8 and found.direct_number == pytest.approx(36 / 14)


def test_signals_do_not_depend_on_company(organism, prompts):
    circuit = load_circuit("organism-a-ioi")
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    one, _ = clean_signals(organism, circuit, prompts, batch_size=64)
    other, _ = clean_signals(organism, circuit, prompts[order], batch_size=5)
    for family in ("behaviour", "circuit"):
        a, b = one[family].iloc[order].to_numpy(float), other[family].to_numpy(float)
        assert np.allclose(a, b, atol=2e-3, equal_nan=True), family


def test_surprisal_is_that_of_the_logits():

    model = as_bridge(micro_gpt2())
    p = PromptSet.from_tokens([[0, 1, 2], [1, 2]], answers=[0, 0], distractors=[1, 1])
    found = clean_pass(model, p).surprisal
    with torch.no_grad(): log = model(torch.tensor([[0, 1, 2]])).log_softmax(-1)[0]
    assert found[0, 1:].allclose(-torch.stack([log[0, 1], log[1, 2]]), atol=1e-5)
    assert found[:, 0].isnan().all() and found[1, 2].isnan() and not found[1, 1].isnan()


# All families

def test_every_family_is_there_and_named(organism, prompts):
    found = features_of(organism, load_circuit("organism-a-ioi"), prompts)
    assert {c.split(".")[0] for c in found.table} == set(FAMILIES) and found.left_out == {} and len(found.table) == len(prompts)
    assert (found.table["model.task"] == "ioi").all() and found.table["model.step"].isna().all()
    numbers = found.table.select_dtypes("number")
    assert set(map(str, numbers.dtypes)) == {"float64"} and not np.isinf(numbers).any(axis=None)


def test_what_cannot_be_had_is_left_out_with_its_reason():

    model = as_bridge(micro_gpt2())
    bare = PromptSet.from_tokens([[0, 1, 2]], answers=[0], distractors=[1])
    found = features_of(model, Circuit.from_components(["a0.h0"]), bare)
    assert set(found.left_out) >= {"geometry", "graph"} and all(found.left_out.values())
    with pytest.raises(InputError, match="no family of features 'wrods'"): features_of(model, Circuit(()), bare, families=["wrods"])
    with pytest.raises(InputError, match="no features are left"): features_of(model, Circuit.from_components(["a0.h0"]), bare, families=["graph"])


def test_base_prompts_share_no_name_with_scored_ones(organism, prompts):
    theirs = set(" ".join(base_prompts(prompts, organism.tokenizer).labels.names).split())
    assert theirs and not theirs & set(" ".join(prompts.labels.names).split())


def test_prompts_are_found_again_in_any_order(organism, prompts):
    order = np.random.default_rng(1).permutation(len(prompts)).tolist()
    table = prompts.labels.iloc[order][["prompt_id", "task", "axis", "variant", "prompt"]].reset_index(drop=True)
    again = prompts_of(table, organism.tokenizer)
    assert again.labels.prompt_id.tolist() == table.prompt_id.tolist() and again.tokens.equal(prompts[order].tokens)
    given = prompts_of(table, organism.tokenizer, given=prompts)
    assert given.tokens.equal(prompts[order].tokens)
    described = features_of_scores(table, organism, load_circuit("organism-a-ioi"), ["prompt"]).table
    whole = prompt_features(prompts[order], organism.tokenizer, base_prompts(prompts, organism.tokenizer)).add_prefix("prompt.")
    pd.testing.assert_frame_equal(described, whole, check_dtype=False)


@pytest.mark.parametrize("change,message", [(dict(prompt="x"), "was scored as 'x'"), (dict(prompt_id="row3"), "was not generated by a task")])
def test_scores_of_other_prompts_are_refused(organism, prompts, change, message):
    table = prompts.labels[["prompt_id", "task", "axis", "variant", "prompt"]].head(1).assign(**change)
    with pytest.raises(InputError, match=message): prompts_of(table, organism.tokenizer)
    with pytest.raises(InputError, match="was scored as|is not among"): prompts_of(table, organism.tokenizer, given=prompts)


# Cases and splits

def world(n=720, strength=2.0, seed=0, groups=18):
    rng = np.random.default_rng(seed)
    variant, unit, model = rng.choice(["base", "passive", "hospital"], n), rng.integers(groups, size=n), rng.choice(["m1", "m2"], n)
    hidden, ld = rng.normal(size=n), rng.normal(size=n)
    fails = rng.random(n) < 1 / (1 + np.exp(1.2 - strength * hidden + 0.5 * strength * ld))
    return pd.DataFrame({"prompt_id": range(n), "task": "ioi", "model": model, "variant": variant, "axis": variant, "ld_model": ld + 5,
                         "prompt": "a b", "unit": [f"ioi:base-{u:02d}" for u in unit],
                         "template": [f"{v}-{u % 8:02d}" for v, u in zip(variant, unit)], "gap": hidden + rng.normal(size=n),
                         "verdict": np.where(fails, "rerouted", "active"), "behaviour.ld": ld + 5,
                         "circuit.hidden": hidden, "prompt.noise": rng.normal(size=n), "prompt.order": rng.choice(["ABBA", "BABA"], n),
                         "model.name": model})


def test_units_follow_the_base_prompt():
    scores = pd.DataFrame(dict(prompt_id=["b", "v", "alone", "bare"], base_id=["b", "b", "gone", "bare"], task="ioi",
                               template=["base-03", "passive-01", "passive-02", ""]))
    assert units_of(scores).tolist() == ["ioi:base-03", "ioi:base-03", "ioi:passive-02", "ioi:bare"]


def test_cases_are_prompts_that_the_model_gets_right():
    scores = pd.DataFrame(dict(prompt_id=["a", "b"], base_id=["a", "b"], model="m", circuit="c", task="t", axis="base", variant="base", template="x",
                               prompt="", ld_model=[1.0, -1], gap=0.0, verdict=["undecided", "model_fails"]))
    cases = cases_of(scores, pd.DataFrame({"prompt.x": [1.0, 2]}))
    assert cases.prompt_id.tolist() == ["a"] and target_of(cases).tolist() == [1] and np.isnan(target_of(cases, "decided")).all()
    with pytest.raises(InputError, match="gets none"): cases_of(scores.tail(1), pd.DataFrame({"prompt.x": [1.0]}))
    with pytest.raises(InputError, match="no column 'gap'"): cases_of(scores.drop(columns="gap"), pd.DataFrame({"prompt.x": [1.0, 2]}))
    with pytest.raises(InputError, match="no target 'failure'"): target_of(cases, "failure")


@given(st.integers(0, 1000), st.integers(2, 8), st.sampled_from(["variant", "axis", "model"]))
@settings(max_examples=25, deadline=None)
def test_no_split_leaks(seed, k, by):
    cases = world(150, seed=seed)
    splits = template_splits(cases, k, seed)
    assert sorted(np.concatenate([s.test for s in splits])) == list(range(150))
    for s in splits + held_out_splits(cases, by, 3, seed):
        assert not set(s.train) & set(s.test)
        for column in ("unit", "template"): assert not set(cases[column].iloc[s.train]) & set(cases[column].iloc[s.test])
    held = held_out_splits(cases, by, 3, seed)
    for s in held: assert set(cases[by].iloc[s.test]) == {s.name} and s.name not in set(cases[by].iloc[s.train])
    asked = np.concatenate([s.test for s in held])
    assert len(set(asked)) == len(asked) == ((cases[by] != "base").sum() if by != "model" else 150)


def test_too_few_templates_are_refused():
    with pytest.raises(InputError, match="7 templates: at least 8"): template_splits(world(100, groups=7))
    with pytest.raises(InputError, match="only one task"): held_out_splits(world(100), "task")


# Learners

def test_a_risk_out_of_fold_does_not_know_its_own_labels():
    cases = world(300)
    y, splits = target_of(cases), template_splits(cases)
    before = out_of_fold(cases, y, feature_columns(cases), splits, LOGISTIC)
    changed = y.copy()
    changed[splits[2].test] = 1 - changed[splits[2].test]
    after = out_of_fold(cases, changed, feature_columns(cases), splits, LOGISTIC)
    same = before.fold == 2
    assert np.array_equal(before.risk[same], after.risk[same]) and not np.array_equal(before.risk[~same], after.risk[~same])


def test_risks_are_those_of_scikit_learn_by_hand():
    cases = world(300)
    y, split = target_of(cases), template_splits(cases)[0]
    found = out_of_fold(cases, y, ["circuit.hidden"], [split], {"boosting": partial(boosting, 4)})
    by_hand = boosting(4).fit(cases[["circuit.hidden"]].iloc[split.train], y[split.train]).predict_proba(cases[["circuit.hidden"]].iloc[split.test])
    assert np.array_equal(found.risk, by_hand[np.argsort(split.test), 1]) and found.case.tolist() == sorted(split.test)


def test_gaps_and_unknown_words_are_no_error():
    cases = world(300)
    cases.loc[::3, "circuit.hidden"] = np.nan
    cases["prompt.all_gaps"] = np.nan
    y = target_of(cases)
    for candidates in (LOGISTIC, {"boosting": partial(boosting, 4)}):
        fitted, _ = fit_chosen(cases, y, feature_columns(cases), candidates)
        odd = cases.head(4).assign(**{"prompt.order": "BAAB", "model.name": "m9", "circuit.hidden": [1e9, -1e9, np.nan, 0]})
        assert np.isfinite(fitted.predict_proba(odd[feature_columns(cases)])).all()


def test_one_kind_of_label_is_a_constant():
    cases = world(300)
    asked = out_of_fold(cases, np.ones(300), feature_columns(cases), template_splits(cases), LOGISTIC)
    assert (asked.risk == 1).all() and set(asked.chosen) == {"base rate"}


def test_cases_that_do_not_count_are_neither_learnt_from_nor_asked():
    cases = world(300)
    y = target_of(cases)
    y[::2] = np.nan
    asked = out_of_fold(cases, y, feature_columns(cases), template_splits(cases), LOGISTIC)
    assert set(asked.case) == set(range(1, 300, 2)) and (asked.n_train <= 150).all()


def test_baselines_know_what_they_say_and_no_more():
    cases = with_baselines(world(100))
    for name, (columns, _) in BASELINES.items():
        assert set(columns) <= set(cases), name
        assert not any("." in c for c in columns), "no baseline sees a feature"
    assert cases.group_of.str.endswith(("base", "passive", "hospital")).all() and cases.variant_of.str.count(r"\|").eq(2).all()


# The forecast

@pytest.fixture(scope="module")
def forecast(): return fit_forecast(world())


def test_a_forecast_that_was_kept_says_the_same(forecast, tmp_path):
    save_forecast(forecast, tmp_path / "f")
    back, cases = load_forecast(tmp_path / "f"), world(50, seed=3)
    assert np.array_equal(back.risks(cases), forecast.risks(cases)) and back.columns == forecast.columns
    kept = {p: p.read_text() for p in (tmp_path / "f").iterdir()}
    assert {p.name for p in kept} == {"forecast.json", "cases.csv", "asked.csv"}
    changed = {"cases.csv": [lambda t: "prompt_id\n1\n", lambda t: t.replace("rerouted", "active", 1)], "asked.csv": [lambda t: t[:-20]],
               "forecast.json": [lambda t: t.replace('"seed": 0', '"seed": 1'), lambda t: "[]", lambda t: "3", lambda t: "[" * 10**5]}
    for name, changes in changed.items():
        for change in changes:
            (tmp_path / "f" / name).write_text(change(kept[tmp_path / "f" / name]))
            with pytest.raises(InputError, match="not as they were written|cannot be read as"): load_forecast(tmp_path / "f")
        (tmp_path / "f" / name).write_text(kept[tmp_path / "f" / name])
    assert load_forecast(tmp_path / "f").columns == forecast.columns
    with pytest.raises(InputError, match="no forecast.json"): load_forecast(tmp_path)


def test_contributions_are_the_risk_minus_the_mean_over_others(forecast):
    cases = world(40, seed=4)
    added, others = contributions(forecast, cases), forecast.cases.iloc[np.random.default_rng(0).permutation(720)[:_OTHERS]]
    swapped = [forecast.risks(cases.assign(**{"circuit.hidden": v})) for v in others["circuit.hidden"]]
    assert np.allclose(added["circuit.hidden"], forecast.risks(cases) - np.mean(swapped, axis=0))
    assert added["circuit.hidden"].abs().mean() > 3 * added["prompt.noise"].abs().mean()


def test_what_failed_before_is_the_share_of_neighbours(forecast):
    table = failed_before(forecast, np.array([0.0, 1.0]))
    order = np.argsort(forecast.asked.risk.to_numpy(), kind="stable")
    y = target_of(forecast.cases)[forecast.asked.case.to_numpy()[order]]
    assert table.failed_before.tolist() == [y[:72].mean(), y[-72:].mean()]
    assert (table.low <= table.failed_before).all() and (table.failed_before <= table.high).all()


def test_features_beyond_the_cases_are_counted(forecast):
    from circuit_generalization.forecast import _outside

    inside = forecast.cases.head(2)
    assert _outside(forecast, inside) == [0, 0] and _outside(forecast, inside.assign(**{"circuit.hidden": 99.0, "behaviour.ld": -99.0})) == [2, 2]


def test_a_forecast_of_several_models_must_be_told_which(forecast, prompts):
    cases = forecast.cases.assign(circuit="c")
    with pytest.raises(InputError, match="several models"): Forecast(**vars(forecast) | dict(cases=cases)).predict(prompts)


def test_features_that_a_prompt_lacks_are_counted(forecast):
    from circuit_generalization.forecast import _missing

    inside = forecast.cases.head(2)
    less = inside.drop(columns="circuit.hidden").assign(**{"behaviour.ld": np.nan})
    assert _missing(forecast, inside) == [0, 0] and _missing(forecast, less) == [2, 2]


def test_nothing_to_forecast_from_is_said():
    cases = world(200)
    with pytest.raises(InputError, match="the same for all cases"): fit_forecast(cases[cases.model == "m1"], families=["model"])
    with pytest.raises(InputError, match="no features of these families"): fit_forecast(cases, families=["geometry"])
    with pytest.raises(InputError, match="all are undecided"): fit_forecast(cases.assign(verdict="undecided"), "decided")


# Is it worth anything?

def test_the_forecast_finds_what_was_hidden_and_is_ahead():
    cases = world()
    y, splits = target_of(cases), template_splits(cases)
    asked, halves = (ask_everybody(cases, y, some, candidates=LOGISTIC) for some in (splits, half_split(cases)))
    table = performance(cases, y, asked, halves, 99).set_index("who")
    assert table.auroc[FORECAST] > 0.85 and (table.ahead_auroc_low.drop(FORECAST) > 0).all() and table.p_value[FORECAST] == 0.01
    assert table.auroc["base rate"] == table.within["base rate"] == table.within["variant"] == 0.5
    assert table.ahead_auroc["LD(M)"] == pytest.approx(table.auroc[FORECAST] - table.auroc["LD(M)"])
    assert table.brier_low[FORECAST] < table.brier[FORECAST] < table.brier["base rate"]


def test_nothing_is_found_in_shuffled_labels():
    cases = world(seed=1)
    y, splits = target_of(cases), template_splits(cases)
    areas = []
    for k in range(30):
        wrong = shuffled(y, cases.unit, k)
        assert np.array_equal(pd.Series(wrong).groupby(cases.unit).sum(), pd.Series(y).groupby(cases.unit).sum())
        asked = out_of_fold(cases, wrong, feature_columns(cases), splits, LOGISTIC)
        half = out_of_fold(cases, wrong, feature_columns(cases), half_split(cases), LOGISTIC)
        areas.append(performance(cases, wrong, {FORECAST: asked}, {FORECAST: half}, 99, k).iloc[0])
    assert abs(np.mean([a.auroc for a in areas]) - 0.5) < 0.02 and np.mean([a.p_value <= 0.1 for a in areas]) <= 0.25


def test_labels_dealt_within_units_still_tell_which_units_fail():
    cases = world(seed=1)
    odd = cases.unit.str[-2:].astype(int).to_numpy() % 2
    cases = cases.assign(**{"circuit.hidden": odd + 0.1 * cases["circuit.hidden"]})
    y, splits = np.where(np.arange(len(cases)) % 20 == 0, 1.0 - odd, odd), template_splits(cases)
    inside, among = (shuffled_labels(cases, y, splits, 2, candidates=LOGISTIC, inside=x) for x in ("unit", None))
    assert (inside.auroc > 0.85).all() and (among.auroc < 0.6).all()


def test_the_family_and_the_feature_that_decide_are_named():
    cases = world()
    y, splits = target_of(cases), template_splits(cases)
    families = families_table(cases, y, splits).set_index("family")
    assert families.lost["circuit"] == families.lost.max() and families.lost_low["circuit"] > 0 and families.features["all"] == 5
    found = importance(cases, y, splits)
    assert found.feature[0] == "circuit.hidden" and found.lost_within_low[0] > 0 and found.direction[0] > 0.3


def test_what_was_held_out_is_asked_without_it():
    cases = world()
    held, variants = transfers(cases, target_of(cases), ("variant", "task", "model"), baselines=("base rate", "LD(M)"))
    assert set(held.held_out) == {"variant", "model"}, "one task only, so none is held out"
    assert len(variants) == 4 and set(variants.variant) == {"passive", "hospital"}
    pairs = from_one_to_another(cases, target_of(cases))
    assert len(pairs) == 4 and (pairs.auroc > 0.7).all()


def test_verdict_and_gap():
    cases = world()
    splits = template_splits(cases)
    assert verdict_table(cases, splits).auroc.min() > 0.75
    gaps = gap_table(cases, splits).set_index("who")
    assert gaps.explained[FORECAST] > 0.3 and gaps.ahead_high["mean"] < 0 and gaps.explained["mean"] == 0
    assert gap_table(cases.assign(gap=np.nan), splits).empty


def test_where_nothing_fails_there_is_nothing_to_try():
    cases = world(200).assign(verdict="active")
    y = target_of(cases)
    with pytest.raises(InputError, match="0 of 200 cases fail"): performance(cases, y, {FORECAST: out_of_fold(cases, y, [], template_splits(cases))})


def test_candidates_are_reproducible():
    cases = world(300)
    y = target_of(cases)
    for make in CANDIDATES.values():
        a, b = (make(seed=1).fit(cases[feature_columns(cases)], y).predict_proba(cases[feature_columns(cases)]) for _ in range(2))
        assert np.array_equal(a, b)
