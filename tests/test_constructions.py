"""Hand-written models with truth in shades: partial redundancy, a backup by suppression, and overshoot."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_generalization import constructions as made
from circuit_generalization.circuit import without
from circuit_generalization.circuit_scorer import Baseline, CircuitScorer
from circuit_generalization.compiled import compile_ioi, compiled_heads, compiled_tokenizer
from circuit_generalization.exact_scores import as_prompt_set, compiled_prompts, edits_for, expected_lds, numpy_forward, numpy_weights
from circuit_generalization.metrics import Thresholds, incompleteness, verdicts
from circuit_generalization.models import as_bridge, load_model
from circuit_generalization.tasks import make_prompts

LDS = ["ld_model", "ld_circuit", "ld_complement", "ld_ablated", "ld_restored"]
DONORS, N = ("counterfactual", "donor"), 4
VERDICTS = {
    "load added up": ["active", "rerouted", "active"],
    "load shared 5 : 0.25": ["active", "rerouted", "active"],
    "load shared 5 : 1": ["redundant", "rerouted", "active"],
    "load shared 5 : 5": ["redundant", "redundant", "active"],
    "backup of 0.25": ["active", "rerouted", "active", "active", "shortfall"],
    "backup of 0.9": ["redundant", "redundant", "active", "active", "rerouted"],
    "overshoot": ["active", "active", "overshoot", "overshoot", "active", "active"],
}
ALL = {name: made.constructions()[name] for name in VERDICTS}


@pytest.fixture(scope="module")
def table():
    return made.construction_cases(n=N)


@pytest.fixture(scope="module")
def backup():
    return numpy_weights(ALL["backup of 0.9"].model())


# what the formulas say

def test_every_verdict_is_dictated_by_the_formula():
    assert {name: [case.verdict for case in c.cases.values()] for name, c in made.constructions().items()} == VERDICTS


def test_formulas_by_hand():
    assert made.carried(3.0, 4.0) == pytest.approx(0.6)
    shared, f = ALL["load shared 5 : 1"].cases, {5: 5 / 13, 1: 1 / 17**0.5, 6: 6 / 232**0.5}  # f(y) = y / sqrt(4 (1 + y)^2 + y^2)
    assert shared["first route"][1:3] == pytest.approx((f[5] / f[6], 1 - f[1] / f[6]))
    assert shared["second route"][1:3] == pytest.approx((f[1] / f[6], 1 - f[5] / f[6]))
    added = ALL["load added up"].cases["first route"]  # says 6.8 of 8, and lengthens nothing: f(y) = 8 y / sqrt(256 + 64 y^2)
    assert added[1:3] == pytest.approx((6.8 / 302.24**0.5 * 5**0.5, 1 - 1.2 / 257.44**0.5 * 5**0.5))
    back = (4 / 1040**0.5) / (16 / 1280**0.5)  # in a stream of length 32
    assert [case[1:3] for case in ALL["backup of 0.25"].cases.values()] == [
        pytest.approx(x) for x in ((1, 1 - back), (back, 0), (1, 1), (1, 1), (0, 1 - back))]
    base, twice, thrice = 40 / 4928**0.5, 24 / (4096 + 256 + 64) ** 0.5, (56 / 3) / (4096 + (40 / 3) ** 2 + (16 / 3) ** 2) ** 0.5
    assert [case[1:3] for case in ALL["overshoot"].cases.values()] == [
        pytest.approx(x) for x in ((1, 1), (1, 1), (base / twice, 1), (base / thrice, 1), (1, 1), (1, 1))]


@given(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(1.1, 3))
def test_a_louder_second_route_costs_necessity_first(first, second, louder):
    def one(y): return made.two_routes(first, y).cases["first route"]
    before, after, share = one(second), one(second * louder), first / (first + second)
    assert before.sufficiency > share > before.necessity > after.necessity > 0 and before.sufficiency > after.sufficiency
    assert made.two_routes(second, first).cases["second route"][1:3] == before[1:3]


# what the models do

@pytest.mark.parametrize("name", VERDICTS)
def test_each_case_gets_its_verdict_on_every_prompt(table, name):
    for case, rows in table[table.construction == name].groupby("case"):
        assert set(rows.verdict) == set(rows.expected) == {ALL[name].cases[case].verdict}, case
        assert len(rows) == 2 * N and set(rows.ablation) == set(DONORS)


@pytest.mark.parametrize("tau, nu", [(0.25, 0.45), (0.25, 0.55), (0.35, 0.45), (0.35, 0.55)])
def test_verdicts_do_not_hang_on_the_exact_thresholds(table, tau, nu):
    for _, rows in table.assign(s_se=0.0, n_se=0.0).groupby(["construction", "case", "ablation"]):
        judged = verdicts(rows, rows.scale.iloc[0], Thresholds(tau=tau, nu=nu))
        assert judged.verdict.tolist() == rows.expected.tolist(), rows.iloc[0, :3].tolist()


@pytest.mark.parametrize("name, tolerance", [("load shared", 0.06), ("load added", 0.08), ("backup", 0.06), ("overshoot", 0.08)])
def test_formulas_hold_on_average(table, name, tolerance):
    means = table[table.construction.str.startswith(name)].groupby(["construction", "case"])[
        ["formula_s", "sufficiency", "formula_n", "necessity"]].mean()
    assert len(means) >= 3
    assert (means.formula_s - means.sufficiency).abs().max() < tolerance and (means.formula_n - means.necessity).abs().max() < tolerance


def test_the_model_answers_right_whatever_is_named_again():
    for construction in ALL.values():
        weights = numpy_weights(construction.model())
        for more in {case.more for case in construction.cases.values()}:
            lasts = [(p, numpy_forward(weights, p.clean)[0][-1]) for p in compiled_prompts(12, seed=3, more=more)]
            assert all(last.argmax() == p.answer for p, last in lasts)


@pytest.mark.parametrize("name", VERDICTS)
def test_scorer_says_what_the_numpy_forward_says(table, name):
    model = as_bridge(ALL[name].model())
    for (label, donor), rows in table[table.construction == name].groupby(["case", "ablation"]):
        case, base = ALL[name].cases[label], Baseline(rows.scale.iloc[0], None, N)
        prompts = as_prompt_set(compiled_prompts(N, more=case.more), donor)
        found = CircuitScorer(model, case.circuit).score(prompts, "counterfactual", n_random=0, profile=False, restore=True, baseline=base)
        np.testing.assert_allclose(found[LDS].to_numpy(float), rows[LDS].to_numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(found[["gap", "gap_restored"]].to_numpy(float), rows[["gap", "gap_restored"]].to_numpy(), rtol=0, atol=1e-4)
        assert found.verdict.tolist() == rows.expected.tolist() and rows.prompt.tolist() == list(range(N))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["load shared 5 : 5", "backup of 0.9", "overshoot"])
def test_the_edges_of_the_whole_circuit_are_active(table, name):
    """Edges follow from what heads read and write; the backup's is that the primary mover sets its query."""
    circuit, scale = made.part(ALL[name].heads), table[table.construction == name].scale.iloc[0]
    found = CircuitScorer(as_bridge(ALL[name].model()), circuit).score(
        as_prompt_set(compiled_prompts(N)), "counterfactual", n_random=0, profile=False, level="edge", baseline=Baseline(scale, None, N))
    assert set(found.verdict) == {"active"} and found.sufficiency.between(0.9, 1.15).all()
    assert ("a2.h0->a3.h3<q>" in circuit.edges) == (name == "backup of 0.9")


def test_only_the_named_heads_differ_from_compiled_ioi():
    changed = {name: {h for h, head in c.heads.items() if repr(head) != repr(compiled_heads()[h])} for name, c in ALL.items()}
    movers, more = {"a2.h0", "a2.h4", "a3.h3"}, {"a1.h0", "a1.h2", "a1.h5"}
    assert changed == {name: movers | (more if name == "overshoot" else set()) for name in ALL}
    assert all(list(c.heads) == list(compiled_heads()) for c in ALL.values())


def test_heads_of_every_circuit_read_what_it_says():
    for name, construction in ALL.items():
        model, p = construction.model(), compiled_prompts(1, seed=6)[0]
        with torch.no_grad(): attentions = model(torch.tensor([p.clean]), output_attentions=True).attentions
        for node in made.part(construction.heads).nodes:
            at, to = (p.positions[role] for role in (*node.positions, *node.attends_to))
            silent = node.role == "backup mover"
            assert (attentions[node.component.layer][0, node.component.head, at, to] > 0.95) != silent, (name, node.name)


# a backup

def writes(weights, prompt, case):
    """How much primary and backup movers say at END, with the heads of a case replaced."""
    circuit, donor_z = ALL["backup of 0.9"].cases[case or "both routes"].circuit, numpy_forward(weights, prompt.counterfactual)[1]
    z = numpy_forward(weights, prompt.clean, edits_for("complement" if case else "model", circuit, prompt, donor_z))[1]
    return tuple(float(np.linalg.norm(z[key][prompt.positions["END"], :12])) for key in ((2, 0), (3, 3)))


def test_the_backup_speaks_only_when_the_primary_mover_is_replaced(backup):
    speaks = {None: (True, False), "primary mover": (False, True), "primary route": (False, True), "backup route": (True, False),
              "both routes": (False, False)}
    for p in compiled_prompts(6, seed=4):
        for case, both in speaks.items():
            assert [x > 12 for x in writes(backup, p, case)] == [x > 0.2 for x in writes(backup, p, case)] == list(both), case


def test_what_silences_the_backup_is_what_the_primary_mover_takes_back():
    heads = ALL["backup of 0.9"].heads
    primary = heads["a2.h0"]
    kept = replace(primary, writes=tuple(link for link in primary.writes if link.target != "go"))
    weights = numpy_weights(compile_ioi(dict(heads) | {"a2.h0": kept}))
    assert primary.writes != kept.writes and all(writes(weights, p, None)[1] > 12 for p in compiled_prompts(6, seed=4))


def test_completeness_sees_the_backup_mover_that_necessity_does_not(backup, table):
    cases, prompts = ALL["backup of 0.9"].cases, compiled_prompts(N)
    without_k = [expected_lds(backup, cases["primary mover"].circuit, p)["ld_complement"] for p in prompts]
    def found(case):
        alone = [expected_lds(backup, without(cases[case].circuit, ["a2.h0"]), p)["ld_circuit"] for p in prompts]
        return incompleteness(np.array(alone), np.array(without_k))
    rows = table[(table.construction == "backup of 0.9") & (table.case == "all but the backup mover")]
    assert rows.necessity.min() > 0.95
    assert found("all but the backup mover") > 0.85 * rows.scale.iloc[0] > 16 * found("both routes")


# overshoot

def test_overshoot_goes_away_with_unlisted_tokens_restored_or_listed(table):
    rows = table[table.construction == "overshoot"].set_index("case")
    hacked = rows.loc[["IO twice", "IO three times"]]
    assert hacked.gap.min() > 0.15 and hacked.ld_model.mean() < 0.7 * rows.loc["base prompts"].ld_model.mean()
    assert rows.gap_restored.abs().max() < 0.02 and rows.drop(hacked.index).gap.abs().max() < 0.02
    assert (rows.loc["IO three times"].gap.mean() - rows.loc["IO twice"].gap.mean()) > 0.1


def test_the_knockout_hides_the_repeat_of_the_answer_and_restoring_shows_it():
    weights, case = numpy_weights(ALL["overshoot"].model()), ALL["overshoot"].cases["IO twice"]
    for p in compiled_prompts(4, more=case.more):
        donor_z = numpy_forward(weights, p.counterfactual)[1]
        for run, at_io2 in (("model", 2), ("circuit", 0), ("restored", 2)):
            z = numpy_forward(weights, p.clean, edits_for(run, case.circuit, p, donor_z))[1]
            assert [z[0, [1, 6], p.positions[role], 0].sum() for role in ("IO2", "S2")] == pytest.approx([at_io2, 2], abs=0.05), run


def test_listing_the_further_mentions_lists_nothing_else():
    for name, mentions in (("IO twice", ("IO2",)), ("IO three times", ("IO2", "IO3"))):
        base, listed = (ALL["overshoot"].cases[case].circuit for case in (name, f"{name}, listed"))
        at = {n.name: n.positions for n in listed.nodes}
        assert at == {n.name: n.positions + (mentions if n.role == "duplicate token" else ()) for n in base.nodes}
        assert [n.name for n in listed.nodes if len(n.positions) > 1] == ["a0.h1", "a0.h6"]


@pytest.mark.slow
@pytest.mark.parametrize("axis, variant, share", [("base", "base", 0.0), ("syntactic", "double_io", 0.9), ("syntactic", "triple_io", 0.9)])
def test_generated_prompts_of_every_template_overshoot_too(tmp_path, axis, variant, share):
    """Under resample ablation, with the task's own templates and reference pools."""
    ALL["overshoot"].model().save_pretrained(tmp_path)
    compiled_tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    prompts = make_prompts("ioi", axis, variant, n=36, tokenizer=model.tokenizer)
    found = CircuitScorer(model, made.part(ALL["overshoot"].heads)).score(prompts, n_random=0, profile=False, restore=True)
    right = found[found.verdict != "model_fails"]
    assert len(right) >= 30 and (share <= (right.verdict == "overshoot").mean() <= share + 0.1) and found.gap_restored.abs().max() < 0.05


# the table

def test_table_is_repeatable_and_names_what_it_holds(table):
    assert len(table) == 2 * N * sum(map(len, VERDICTS.values()))
    one = made.construction_cases(n=1)
    first = table[table.prompt == 0].reset_index(drop=True)
    columns = ["construction", "case", "circuit", "ablation", "expected", "formula_s", "formula_n", *LDS]
    pd.testing.assert_frame_equal(one[columns], first[columns])
    assert table.circuit[0] == "a0.h1@S2 a1.h2@END a2.h0@END" and table.circuit.str.contains("a0.h6@S2+IO2+IO3 ", regex=False).any()
    np.testing.assert_allclose(table.gap, (table.ld_circuit - table.ld_model) / table.scale)
    base = table[(table.case == "both routes") | (table.case == "base prompts")].groupby(["construction", "ablation"])
    np.testing.assert_allclose(base.scale.first(), base.ld_model.mean() - base.ld_ablated.mean())
