"""Curves of scored graphs and their two areas: by hand, by the oracle, on models whose circuit is known, on the benchmark's own file."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization.attribution import edge_attribution
from circuit_generalization.circuit import Circuit
from circuit_generalization.compiled import compile_ioi, compiled_heads
from circuit_generalization.edges import capture_senders, edge_logits_with_hooks
from circuit_generalization.errors import InputError
from circuit_generalization.graph_curves import (
    SHARES,
    GraphCurve,
    area_weights,
    attributed_graph,
    cfg_of,
    cmd,
    cpr,
    exact_graph,
    graph_curve,
    mib_curves,
    mib_rows,
    nested_edges,
    plot_curves,
    random_graph,
    with_answers_swapped,
)
from circuit_generalization.metrics import logit_difference
from circuit_generalization.models import as_bridge, final_logits
from circuit_generalization.prompts import PromptSet
from circuit_generalization.scored_graphs import ScoredGraph, possible_edges, read_graph
from circuit_generalization.stats import ratio_interval
from circuit_generalization.tasks import make_prompts

SCORED = "circuits/mib-ioi-eap-ig-gpt2.json"
TINY = dict(n_layers=1, n_heads=1, d_model=4, parallel_attn_mlp=False)
LOSS = dict(zip(possible_edges(TINY), [-9, 0.1, 0.2, -4, 0.3, 5, -3, 2]))
CLEAN, DONOR = [[3, 1, 4, 1, 5, 9], [2, 6, 5], [3, 5, 8, 9]], [[2, 1, 4, 7, 5, 9], [7, 8, 5], [1, 15, 18, 19]]
PROMPTS = PromptSet.from_tokens(CLEAN, DONOR, [3, 9, 1], [1, 2, 4])


@pytest.fixture(scope="module")
def known(compiled): return make_prompts("ioi", n=12, seed=1, tokenizer=compiled.tokenizer)


@pytest.fixture(scope="module")
def scored(compiled): return make_prompts("ioi", n=36, seed=0, tokenizer=compiled.tokenizer)


@pytest.fixture(scope="module")
def attributed(compiled, known): return attributed_graph(compiled, known)


def curve_of(ld, model, ablated, shares, templates=None):
    labels = pd.DataFrame(dict(prompt_id=[f"p{i}" for i in range(len(model))], template=templates or [""] * len(model)))
    return GraphCurve(tuple(shares), np.arange(len(shares)), *(np.asarray(x, float) for x in (ld, model, ablated)), labels)


def ld_of(logits, prompts): return logit_difference(logits, prompts.answers, prompts.distractors).numpy()


# Which edges

def test_the_top_edges_that_lie_on_a_path_by_hand():
    one_path, by_size = ("input->a0.h0<q>", "a0.h0->logits"), tuple(sorted(LOSS, key=lambda e: -abs(LOSS[e])))
    graph = ScoredGraph(TINY, LOSS)
    assert nested_edges(graph, (0, 0.25, 0.5, 0.625, 1)) == [(), (), one_path, by_size[:5], by_size]
    assert nested_edges(graph, (0.4,), "helpful") == [one_path], "three of eight: of 3.2, rounded down"
    assert nested_edges(graph, (0.4,), "helpful", helpful=1) == [("input->logits",)], "of 5, 2 and 0.3 the first two lead nowhere"


def test_the_shares_are_the_benchmarks():
    assert SHARES == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(["absolute", "helpful"]))
def test_circuits_are_nested_and_end_at_the_model(seed, ranking):
    cfg = TINY | dict(n_layers=2, n_heads=2)
    nested = nested_edges(random_graph(cfg, seed), (0.1, 0.3, 0.6, 1), ranking)
    assert all(set(a) <= set(b) for a, b in zip(nested, nested[1:])) and set(nested[-1]) == set(possible_edges(cfg))


def test_random_scores_are_of_their_seed():
    assert random_graph(TINY, 1) == random_graph(TINY, 1) and random_graph(TINY, 1).edges != random_graph(TINY, 2).edges


@pytest.mark.parametrize("given, said", [
    (dict(ranking="signed"), "no ranking 'signed': there is absolute, helpful"), (dict(helpful=0), "helpful=0"), (dict(shares=()), "shares ()"),
    (dict(shares=(0.5, 0.5)), "each larger than the one before"), (dict(shares=(0.5, 1.5)), "from 0 to 1"),
    (dict(graph=ScoredGraph(TINY, {"input->m0": 1.0})), "scores 1 of 8 edges")])
def test_bad_choices(given, said):
    with pytest.raises(InputError) as error: nested_edges(**dict(graph=ScoredGraph(TINY, LOSS)) | given)
    assert said in str(error.value)


# The curve

def test_all_edges_are_the_model_and_none_the_counterfactual(random_model):
    curve = graph_curve(random_model, PROMPTS, random_graph(cfg_of(random_model)), shares=(0, 1))
    model, other = (ld_of(final_logits(random_model, t, PROMPTS.lengths), PROMPTS) for t in (PROMPTS.tokens, PROMPTS.counterfactual))
    np.testing.assert_allclose(curve.ld, [other, model], atol=1e-5)
    np.testing.assert_allclose([curve.ld_ablated, curve.ld_model], [other, model], atol=1e-5)
    np.testing.assert_allclose(curve.faithfulness, [0, 1], atol=1e-4)
    assert curve.n_edges.tolist() == [0, len(possible_edges(cfg_of(random_model)))]


@settings(max_examples=5)
@given(st.integers(0, 10**6))
def test_the_oracle_says_the_same(random_model, seed):
    graph, shares = random_graph(cfg_of(random_model), seed), (0.2, 0.5, 0.9)
    curve = graph_curve(random_model, PROMPTS, graph, "helpful", shares)
    told = [capture_senders(random_model, t, "heads+mlps") for t in (PROMPTS.tokens, PROMPTS.counterfactual)]
    for ld, edges in zip(curve.ld, nested_edges(graph, shares, "helpful")):
        slow = edge_logits_with_hooks(random_model, PROMPTS, Circuit((), "heads+mlps", edges=edges), *told)
        np.testing.assert_allclose(ld, ld_of(slow, PROMPTS), atol=1e-4)


def test_batches_change_nothing_and_are_told(random_model):
    graph, told = random_graph(cfg_of(random_model)), []
    one, many = (graph_curve(random_model, PROMPTS, graph, shares=(0.5, 1), batch_size=size, progress=lambda *x: told.append(x)) for size in (2, 64))
    np.testing.assert_allclose(one.ld, many.ld, atol=1e-5)
    assert told == [(2, 3), (3, 3), (3, 3)]


def test_every_prompts_own_curve_is_kept():
    curve = curve_of([[1, 2], [5, 3]], [5, 4], [1, 4], (0.5, 1), ["a", "b"])
    table = curve.per_prompt()
    assert table.prompt_id.tolist() == ["p0", "p1"] * 2 and table.share.tolist() == [0.5, 0.5, 1, 1] and table.n_edges.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(table.faithfulness, [0, np.nan, 1, np.nan], err_msg="the second prompt has nothing to lose")
    np.testing.assert_allclose(curve.faithfulness, [-0.5, 0.75], err_msg="(3/2 - 5/2) / (9/2 - 5/2), (8/2 - 5/2) / 2")


def test_a_curve_needs_the_models_graph_and_counterfactuals(random_model):
    with pytest.raises(InputError, match="scores 1 layers of 1 heads, but the model has 2 of 4"):
        graph_curve(random_model, PROMPTS, random_graph(TINY))
    with pytest.raises(InputError, match="side by side with MLPs"):
        graph_curve(random_model, PROMPTS, random_graph(cfg_of(random_model) | {"parallel_attn_mlp": True}))
    bare = replace(PROMPTS, counterfactual=None)
    for ask in (lambda: graph_curve(random_model, bare, random_graph(cfg_of(random_model))), lambda: exact_graph(random_model, bare),
                lambda: attributed_graph(random_model, bare)):
        with pytest.raises(InputError, match="these prompts have none"): ask()


# The areas

def test_the_areas_by_hand():
    curve = curve_of([[1, 1], [7, 9], [5, 5]], [5, 5], [1, 1], (0, 0.5, 1))  # faithfulness 0, 1.75, 1
    assert cpr(curve).estimate == pytest.approx(0.5 * 1.75 / 2 + 0.5 * 2.75 / 2)
    assert cmd(curve).estimate == pytest.approx(0.5 * 1.75 / 2 + 0.5 * 0.75 / 2), "|1 - f|: 1, 0.75, 0"
    crossing = curve_of([[3], [7], [5]], [5], [1], (0, 0.5, 1))  # 0.5, 1.5, 1
    assert cmd(crossing).estimate == pytest.approx(0.5 * 0.5 + 0.25 * 0.5), "a trapezoid of 0.5 and 0.5, though the curve crosses 1 between them"


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.integers(0, 10**6))
def test_the_areas_are_trapezoids_of_the_means(f, seed):
    rng, shares = np.random.default_rng(seed), np.linspace(0.1, 1, len(f))
    noise = rng.normal(size=(len(f), 4))
    curve = curve_of(1 + 2 * (np.array(f)[:, None] + noise - noise.mean(1, keepdims=True)), np.full(4, 3.0), np.ones(4), shares)
    np.testing.assert_allclose(curve.faithfulness, f, atol=1e-9)
    assert cpr(curve).estimate == pytest.approx(np.trapezoid(f, shares), abs=1e-9)
    assert cmd(curve).estimate == pytest.approx(np.trapezoid(np.abs(1 - np.array(f)), shares), abs=1e-9)


def test_what_a_perfect_curve_and_an_empty_one_get():
    perfect = curve_of([[5.0]] * 10, [5], [1], SHARES)
    assert cpr(perfect).estimate == pytest.approx(0.999) and cmd(perfect).estimate == 0
    nothing = curve_of([[1.0]] * 9 + [[5.0]], [5], [1], SHARES)
    assert cmd(nothing).estimate == pytest.approx(0.749) and cpr(nothing).estimate == pytest.approx(0.25)
    assert area_weights(SHARES).sum() == pytest.approx(0.999) and area_weights((0, 1)).tolist() == [0.5, 0.5]


def test_intervals_are_clustered_by_template_and_left_out_where_there_is_none():
    rng, templates = np.random.default_rng(0), [f"t{i % 10}" for i in range(60)]
    ld, model = rng.normal(1, 0.3, (2, 60)) + [[0], [3]], rng.normal(5, 0.3, 60)
    curve = curve_of(ld, model, np.zeros(60), (0, 1), templates)
    for found, part in ((cpr(curve), ld.mean(0)), (cmd(curve), (model - ld).mean(0))):  # two points: each counts one half
        assert found == ratio_interval(part, model, templates) and found.n_clusters == 10 and found.low < found.estimate < found.high
    bare = curve_of(ld, model, np.zeros(60), (0, 1), ["", *templates[1:]])
    for found, whole in ((cpr(bare), cpr(curve)), (cmd(bare), cmd(curve))):
        assert found.estimate == whole.estimate and np.isnan([found.low, found.high]).all() and found.method == "templates are not known"


def test_nothing_lost_is_no_number():
    curve = curve_of([[1, 2], [3, 4]], [2, 2], [2, 2], (0, 1))
    assert np.isnan(curve.faithfulness).all() and np.isnan(cpr(curve).estimate) and np.isnan(cmd(curve).estimate)


# Models whose circuit is known

@pytest.mark.slow
def test_exact_scores_find_a_circuit_in_which_every_head_stands_alone(known, scored):
    heads = compiled_heads()
    alone = as_bridge(compile_ioi(heads | {"a0.h6": heads["a0.h5"], "a1.h5": heads["a1.h6"], "a2.h4": heads["a2.h5"]}))
    exact = exact_graph(alone, known[:4])
    curve, first = graph_curve(alone, scored, exact), nested_edges(exact, (0.01,))[0]
    assert cmd(curve).estimate < 0.02 and abs(curve.faithfulness[3:] - 1).max() < 0.2
    assert {"a0.h1->a1.h2<k>", "a1.h2->a2.h0<q>", "a2.h0->logits"} <= {*first}, "one percent of the edges hold the route that was compiled"


@pytest.mark.slow
def test_exact_scores_miss_heads_that_stand_in_for_each_other(compiled, known, scored):
    assert 0.3 < cmd(graph_curve(compiled, scored, exact_graph(compiled, known[:2]))).estimate < 0.45


def test_integrated_gradients_find_them_and_plain_gradients_do_not(compiled, known, scored, attributed):
    found, missed = (graph_curve(compiled, scored, graph) for graph in (attributed, attributed_graph(compiled, known, 1)))
    assert cmd(found).estimate < 0.1 and abs(found.faithfulness[-4:] - 1).max() < 0.05
    assert cmd(missed).estimate > 0.7, "no better than random scores"


def test_attribution_is_the_mean_over_batches(compiled, known, attributed):
    whole = edge_attribution(compiled, known, capture_senders(compiled, known.counterfactual, "heads+mlps"), 5)
    parts = attributed_graph(compiled, known, 5, batch_size=5)
    for edge in ("a2.h0->logits", "input->a1.h2<v>", "a0.h1->a1.h5<k>"):
        assert parts.edges[edge] == pytest.approx(-float(whole.of(edge).double().mean()), abs=1e-5) == attributed.edges[edge]


def test_exact_scores_are_what_an_edges_ablation_costs(random_model):
    exact = exact_graph(random_model, PROMPTS)
    told = [capture_senders(random_model, t, "heads+mlps") for t in (PROMPTS.tokens, PROMPTS.counterfactual)]
    own = ld_of(final_logits(random_model, PROMPTS.tokens, PROMPTS.lengths), PROMPTS).mean()
    for edge in ("input->logits", "a0.h1->a1.h3<k>", "m1->logits"):
        without = edge_logits_with_hooks(random_model, PROMPTS, Circuit((), "heads+mlps", edges=(edge,)), *told, "complement")
        assert exact.edges[edge] == pytest.approx(ld_of(without, PROMPTS).mean() - own, abs=1e-5)


def test_random_scores_get_what_a_curve_of_zeros_gets(compiled, scored):
    assert cmd(graph_curve(compiled, scored, random_graph(cfg_of(compiled)))).estimate == pytest.approx(0.749, abs=0.06)


# The gate's rows

def test_the_rows_of_the_gate(compiled, scored, attributed):
    scored = scored[:18]
    curves = mib_curves(compiled, scored, attributed, seed=2, n_random=2)
    rows = mib_rows(curves).set_index("quantity")
    assert list(curves) == ["absolute", "helpful", "random 0", "random 1"]
    chance = [cmd(graph_curve(compiled, scored, random_graph(attributed.cfg, 2000 + k))).estimate for k in range(2)]
    assert rows.measured["random CMD"] == pytest.approx(np.mean(chance))
    assert rows.measured["CMD"] == pytest.approx(cmd(graph_curve(compiled, scored, attributed)).estimate)
    assert rows.measured["CPR"] == pytest.approx(cpr(graph_curve(compiled, scored, attributed, "helpful")).estimate)
    assert (rows.n == 18).all() and (rows.n_templates == scored.labels.template.nunique()).all() and (rows.low < rows.high).all()
    with pytest.raises(InputError, match="0 random graphs"): mib_curves(compiled, scored, attributed, n_random=0)


def test_the_benchmarks_counterfactual_turns_the_answer_round(compiled, scored):
    swapped = with_answers_swapped(scored)
    at = scored.positions["S2"]
    changed = swapped.counterfactual != scored.tokens
    assert (changed.sum(1) == 1).all() and changed[torch.arange(36), at].all()
    assert (swapped.counterfactual[torch.arange(36), at] == scored.answers[:, 0]).all() and (swapped.tokens == scored.tokens).all()
    curve = graph_curve(compiled, swapped, random_graph(cfg_of(compiled)), shares=(1,))
    assert curve.ld_ablated.mean() == pytest.approx(-curve.ld_model.mean(), rel=0.1)


def test_only_single_names_can_be_swapped(compiled, scored):
    with pytest.raises(InputError, match="a position S2"): with_answers_swapped(PROMPTS)
    several = replace(scored, distractors=torch.nn.functional.pad(scored.distractors, (0, 1), value=7))
    with pytest.raises(InputError, match="names of several tokens"): with_answers_swapped(several)
    moved = replace(scored, positions=scored.positions | {"S2": scored.positions["S2"] - 1})
    with pytest.raises(InputError, match="the token at S2 is not the distractor"): with_answers_swapped(moved)


def test_the_figure_has_a_line_a_curve():
    curve = curve_of([[1.0], [5.0]], [5], [1], (0.1, 1))
    ax = plot_curves({"one": curve, "two": curve}).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["one", "two"] and ax.get_xscale() == "log"
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0.1, 0], [1, 1]])


# GPT-2's shape, and the benchmark's file

@pytest.mark.slow
def test_the_benchmarks_graph_runs_on_a_model_of_gpt2s_shape(shared):
    import transformers

    graph = read_graph(shared(SCORED))
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=96, n_layer=12, n_head=12)
    model = as_bridge(transformers.GPT2LMHeadModel(config).eval())
    ids = torch.randint(0, 50, (2, 4, 12), generator=torch.Generator().manual_seed(0))
    prompts = PromptSet.from_tokens(ids[0].tolist(), ids[1].tolist(), [5] * 4, [7] * 4)
    curve = graph_curve(model, prompts, graph)
    assert curve.n_edges[-1] == len(graph.edges) == 32_491 and (np.diff(curve.n_edges) > 0).all()
    assert (curve.n_edges <= [int(s * 32_491) for s in SHARES]).all() and curve.faithfulness[-1] == pytest.approx(1, abs=1e-3)
    by_size, helpful = (nested_edges(graph, (0.005,), ranking)[0] for ranking in ("absolute", "helpful"))
    assert "a10.h7->logits" in by_size and "a10.h7->logits" not in helpful and "a9.h9->logits" in helpful, "a negative and a name mover"
