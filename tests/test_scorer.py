"""The scorer: numbers known by hand or from an independent forward pass, and what must not change a score."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization import circuit_scorer, edges, exact_scores
from circuit_generalization.ablation import ABLATIONS, STOCHASTIC, Ablation, Replacements
from circuit_generalization.attention import attention_pattern
from circuit_generalization.circuit import Circuit
from circuit_generalization.circuit_scorer import COLUMNS, NO_BASELINE, Baseline, CircuitScorer, _logit_differences, engagement, head_reads
from circuit_generalization.compiled import compiled_circuit
from circuit_generalization.controls import random_circuits
from circuit_generalization.errors import InputError
from circuit_generalization.metrics import effect_scale, kl_divergence, logit_difference
from circuit_generalization.models import as_bridge, component_names, final_logits, model_hash, random_gpt2
from circuit_generalization.prompts import PromptSet
from circuit_generalization.tasks import make_prompts, reference_pool

LDS = ["ld_model", "ld_circuit", "ld_complement", "ld_ablated"]
RATIOS = ["sufficiency", "necessity", "score"]
QUICK = dict(n_random=0, profile=False)


def random_prompts(lengths, seed=0, n_vocab=64):
    """Random tokens of random-weight models, with a counterfactual that ends on the same token."""
    rng = np.random.default_rng([seed, *lengths])
    clean = [rng.integers(0, n_vocab, n).tolist() for n in lengths]
    other = [rng.integers(0, n_vocab, n - 1).tolist() + c[-1:] for n, c in zip(lengths, clean)]
    wanted = [rng.permutation(n_vocab)[:4].tolist() for _ in lengths]
    labels = pd.DataFrame({"prompt_id": [f"q{i}" for i in range(len(lengths))]})
    return PromptSet.from_tokens(clean, other, [w[:2] for w in wanted], [w[2:] for w in wanted],
                                 {"START": [0] * len(lengths)}, labels)


def pool_of(prompts, size=4, seed=100):
    """Reference prompts of the same lengths."""
    return random_prompts(sorted(set(prompts.lengths.tolist())) * size, seed)


def exact_set(exact, donor="counterfactual"):
    """Prompts of the compiled model; what the hand-made scores call the donor is their counterfactual."""
    roles = {role: [p.positions[role] for p in exact] for role in exact[0].positions}
    return PromptSet.from_tokens([p.clean for p in exact], [getattr(p, donor) for p in exact],
                                 [p.answer for p in exact], [p.distractor for p in exact], roles)


def every_component(model, universe="heads"):
    return Circuit.from_components(component_names(model, universe), universe=universe)


def nothing(universe="heads"):
    return Circuit((), universe=universe)


def score(model, circuit, prompts, ablation="counterfactual", **options):
    reference = options.pop("reference", None)
    scorer = CircuitScorer(model, circuit, reference, batch_size=options.pop("batch_size", 128))
    return scorer.score(prompts, ablation, **QUICK | options)


def close(a, b, columns=LDS, atol=1e-5):
    np.testing.assert_allclose(a[columns].to_numpy(float), b[columns].to_numpy(float), rtol=0, atol=atol)


HALF = Circuit.from_components(["a0.h1", "a0.h3", "a1.h0"], roles=["reader", "reader", "mover"],
                               positions={"a0.h1": "START", "a1.h0": "END"},
                               attends_to={"a0.h1": "START", "a1.h0": ("START", "END")})
lengths = st.lists(st.integers(2, 7), min_size=1, max_size=4)
kinds = st.sampled_from(ABLATIONS)
universes = st.sampled_from(["heads", "heads+mlps"])


def sample_of(names):
    return st.lists(st.sampled_from(names), unique=True)


# numbers computed by hand: tokens x, y, -x; one head that moves x from the token before

@pytest.mark.parametrize("ablation, ablated", [("counterfactual", -2 / 2.125**0.5), ("zero", 0.0), ("mean", -1 / 2.03125**0.5)])
def test_micro_model_by_hand(micro, ablation, ablated):
    prompts = PromptSet.from_tokens([[0, 1]], [[2, 1]], [0], [2], {"IO": [0]})
    pool = PromptSet.from_tokens([[1, 1], [2, 1]], None, [0, 0], [2, 2], {"IO": [0, 0]})  # head outputs 0 and -1/4
    head = Circuit.from_components(["a0.h0"], roles=["mover"], positions=["END"], attends_to=["IO"])
    row = score(micro, head, prompts, ablation, reference=pool).iloc[0]
    by_hand = dict(ld_model=6 / 3.125**0.5, ld_circuit=6 / 3.125**0.5, ld_complement=ablated, ld_ablated=ablated, gap_raw=0,
                   kl=0, sufficiency=1, necessity=1, score=1, s_se=0, n_se=0, engagement=0.75, engagement_mover=0.75)
    assert row[list(by_hand)].astype(float).to_dict() == pytest.approx(by_hand, abs=1e-5)
    assert row.verdict == "active" and row.sign_agrees


def test_no_effect_is_undecided_and_not_infinite(micro):
    same = PromptSet.from_tokens([[0, 1]], [[0, 1]], [0], [2])
    row = score(micro, Circuit.from_components(["a0.h0"]), same).iloc[0]
    assert row.verdict == "undecided" and np.isnan([row.sufficiency, row.necessity, row.score]).all()


# the ten cases of the compiled model, from a forward pass that shares no code with the scorer

@pytest.fixture(scope="module")
def exact():
    return exact_scores.compiled_prompts(8, seed=5)


@pytest.mark.parametrize("donor", ["counterfactual", "donor"])
@pytest.mark.parametrize("case", list(exact_scores.case_circuits()))
def test_compiled_case(compiled, compiled_numbers, exact, case, donor):
    circuit, verdict = exact_scores.case_circuits()[case]
    expected = exact_scores.expected_scores(compiled_numbers, circuit, exact, donor)
    scale = effect_scale(expected.ld_model, expected.ld_ablated)
    found = score(compiled, circuit, exact_set(exact, donor), baseline=Baseline(scale, None, len(exact)))
    close(found, expected, LDS + RATIOS, atol=1e-4)
    assert found.verdict.tolist() == expected.verdict.tolist()
    assert (found.active == (found.verdict == "active")).all()
    if donor == "counterfactual":
        assert set(found.verdict) == {verdict}
    np.testing.assert_allclose(found.gap, (found.ld_circuit - found.ld_model) / scale)


# everything, nothing, and a circuit's other half

@settings(max_examples=25)
@given(lengths, kinds, universes, st.integers(0, 99))
def test_everything_is_the_model_and_nothing_is_the_ablated_baseline(random_model, lengths, kind, universe, seed):
    prompts = random_prompts(lengths, seed)
    options = dict(ablation=Ablation(kind, n_draws=2), reference=pool_of(prompts), seed=seed)
    full = score(random_model, every_component(random_model, universe), prompts, **options)
    none = score(random_model, nothing(universe), prompts, **options)
    close(full, full.assign(ld_circuit=full.ld_model, ld_complement=full.ld_ablated))
    close(none, none.assign(ld_circuit=none.ld_ablated, ld_complement=none.ld_model))
    close(full, none, ["ld_model", "ld_ablated"])
    assert (full.kl < 1e-6).all()


@settings(max_examples=15)
@given(lengths, st.integers(0, 99))
def test_everything_replaced_is_the_counterfactual_itself(random_model, lengths, seed):
    prompts = random_prompts(lengths, seed)
    table = score(random_model, nothing("heads+mlps"), prompts)
    own, other = (final_logits(random_model, tokens, prompts.lengths) for tokens in (prompts.tokens, prompts.counterfactual))
    for ld, logits in (("ld_model", own), ("ld_ablated", other), ("ld_circuit", other)):
        np.testing.assert_allclose(table[ld], logit_difference(logits, prompts.answers, prompts.distractors), atol=1e-5)
    np.testing.assert_allclose(table.kl, kl_divergence(own, other), atol=1e-5)


@settings(max_examples=20)
@given(st.data(), universes, st.integers(0, 99))
def test_what_a_circuit_keeps_its_complement_loses(random_model, data, universe, seed):
    names = component_names(random_model, universe)
    chosen = data.draw(sample_of(names))
    rest = [name for name in names if name not in chosen]
    prompts = random_prompts([3, 6], seed)
    one, other = (score(random_model, Circuit.from_components(c, universe=universe), prompts) for c in (chosen, rest))
    close(one, other.rename(columns={"ld_circuit": "ld_complement", "ld_complement": "ld_circuit"}))


def test_only_the_listed_positions_are_kept(random_model):
    prompts = random_prompts([5, 5, 5])
    names = component_names(random_model)
    everywhere = score(random_model, Circuit.from_components(names), prompts)
    at_end = score(random_model, Circuit.from_components(names, positions=["END"] * len(names)), prompts)
    at_all = score(random_model, Circuit.from_components(names, positions=[("START", "END")] * len(names)), prompts)
    assert (at_end.ld_circuit - everywhere.ld_circuit).abs().max() > 1e-3
    assert (at_all.ld_circuit - at_end.ld_circuit).abs().max() > 1e-3


# what must not change a score

@settings(max_examples=15)
@given(st.data(), kinds, st.integers(1, 5))
def test_order_and_batch_size_change_nothing(random_model, data, kind, batch_size):
    prompts = random_prompts([3, 5, 3, 4, 5], seed=7)
    order = data.draw(st.permutations(range(5)))
    options = dict(ablation=Ablation(kind, n_draws=2), reference=pool_of(prompts))
    plain = score(random_model, HALF, prompts, **options)
    other = score(random_model, HALF, prompts[order], **options, batch_size=batch_size)
    assert other.prompt_id.tolist() == plain.prompt_id[order].tolist()
    back = other.set_index("prompt_id").loc[plain.prompt_id].reset_index()
    close(plain, back, [*LDS, "kl", "engagement", "engagement_reader", "engagement_mover"])
    assert back.verdict.tolist() == plain.verdict.tolist()


def test_order_and_batch_size_change_no_rank_and_no_profile(compiled, exact):
    prompts, options = exact_set(exact), dict(n_random=4, profile=True)
    base = CircuitScorer(compiled, nothing()).baseline_on(prompts, Ablation("counterfactual"))
    plain = score(compiled, compiled_circuit(), prompts, baseline=base, **options)
    other = score(compiled, compiled_circuit(), prompts[list(range(7, -1, -1))], baseline=base, **options, batch_size=3)
    columns = [*LDS, *RATIOS, "gap", "kl", "p_value", "profile_similarity", "engagement"]
    close(plain, other[::-1].reset_index(drop=True), columns, atol=5e-5)
    assert plain[columns].notna().all(axis=None) and plain.p_value.max() < 1


@settings(max_examples=12)
@given(kinds, st.integers(1, 9), st.integers(0, 63), universes)
def test_padding_changes_nothing(random_model, kind, columns, junk, universe):
    prompts = random_prompts([3, 5, 6], seed=3)
    def widen(x): return torch.nn.functional.pad(x, (0, columns), value=junk)
    wide = replace(prompts, tokens=widen(prompts.tokens), counterfactual=widen(prompts.counterfactual))
    options = dict(ablation=Ablation(kind, n_draws=2), reference=pool_of(prompts))
    circuit = replace(HALF, universe=universe)
    close(score(random_model, circuit, prompts, **options), score(random_model, circuit, wide, **options),
          [*LDS, "kl", "engagement"])


def test_a_role_that_some_prompts_lack_leaves_the_others_alone(random_model):
    prompts = random_prompts([5, 5, 5])
    some = replace(prompts, positions=prompts.positions | {"S2": torch.tensor([2, -1, 1])})
    reader = Circuit.from_components(["a0.h1", "a1.h2"], roles=["first", "second"], positions=["END", "END"],
                                     attends_to=["S2", "START"])
    def engaged(prompts): return engagement(reader, head_reads(random_model, reader, prompts))
    together = engaged(some)
    assert together["first"].isna().tolist() == [False, True, False] and together["second"].notna().all()
    one_by_one = pd.concat([engaged(some[[i]]) for i in range(3)], ignore_index=True)
    pd.testing.assert_frame_equal(together, one_by_one, atol=1e-6)
    table = score(random_model, reader, some)
    assert table.engagement.notna().all() and table.engagement[1] == table.engagement_second[1]


def test_a_circuit_that_does_not_say_what_it_reads_has_no_engagement(random_model):
    table = score(random_model, Circuit.from_components(["a0.h1"]), random_prompts([4]))
    assert list(table) == COLUMNS and table.engagement.isna().all()


def test_what_each_head_reads_is_its_attention(random_model):
    prompts = random_prompts([4, 6])
    table, pattern = score(random_model, HALF, prompts), attention_pattern(random_model, prompts.tokens, ["a0.h1", "a1.h0"])
    ends = prompts.lengths - 1
    np.testing.assert_allclose(table["reads_a0.h1"], pattern["a0.h1"][:, 0, 0], atol=1e-6)
    mover = (pattern["a1.h0"][[0, 1], ends, 0] + pattern["a1.h0"][[0, 1], ends, ends]) / 2
    np.testing.assert_allclose(table["reads_a1.h0"], mover, atol=1e-6)
    assert list(table)[len(COLUMNS):] == ["engagement_reader", "engagement_mover", "reads_a0.h1", "reads_a1.h0"], "a0.h3 does not say what it reads"
    np.testing.assert_allclose(table.engagement, (table["reads_a0.h1"] + table["reads_a1.h0"]) / 2, atol=1e-6)


def test_engagement_is_the_mean_over_roles_of_the_mean_over_heads():
    reads = pd.DataFrame({"a0.h1": [1.0, np.nan], "a0.h2": [0.5, 0.25], "a1.h0": [0.0, 1.0]})
    circuit = Circuit.from_components(list(reads), roles={"a0.h1": "reader", "a0.h2": "reader"})
    by_role = engagement(circuit, reads)
    assert by_role.to_dict("list") == {"reader": [0.75, 0.25], "a1.h0": [0.0, 1.0]}
    assert engagement(circuit, reads[[]]).shape == (2, 0)


def hooks_of(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "fwd_hooks", "bwd_hooks")
    return {(name, kind): len(getattr(module, kind)) for name, module in model.named_modules() for kind in kinds
            if hasattr(module, kind)}


@pytest.mark.parametrize("kind", ABLATIONS)
def test_scoring_leaves_the_model_and_the_prompts_as_they_were(random_model, kind):
    prompts = random_prompts([3, 5])
    final_logits(random_model, prompts.tokens)  # the library registers its own hooks on the first run
    before, hooks = {n: p.clone() for n, p in random_model.state_dict().items()}, hooks_of(random_model)
    tokens, labels, state = prompts.tokens.clone(), prompts.labels.copy(), torch.get_rng_state()
    score(random_model, HALF, prompts, Ablation(kind, 2), reference=pool_of(prompts), n_random=2, profile=True)
    after = random_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(p, after[n]) for n, p in before.items())
    assert hooks_of(random_model) == hooks
    assert torch.equal(tokens, prompts.tokens) and labels.equals(prompts.labels) and torch.equal(state, torch.get_rng_state())


# seeds and draws

def test_same_seed_same_bytes_other_seed_other_donors(random_model):
    prompts = random_prompts([3, 5, 5])
    def csv(seed, kind): return score(random_model, HALF, prompts, Ablation(kind, 2), reference=pool_of(prompts, 8), seed=seed,
                                      n_random=3, profile=True).to_csv(index=False)
    for kind in STOCHASTIC:
        first, again, other = csv(0, kind), csv(0, kind), csv(1, kind)
        assert first == again
        def ablated(text): return [row.split(",")[COLUMNS.index("ld_ablated")] for row in text.splitlines()[1:]]
        assert all(a != b for a, b in zip(ablated(first), ablated(other)))
    donors = [Replacements(random_model, prompts, Ablation("resample", 2), pool_of(prompts, 8), seed=s).donors for s in (0, 1)]
    assert not torch.equal(*donors)


@pytest.mark.parametrize("kind", ABLATIONS)
def test_every_ablation_runs_and_only_chance_has_a_spread(random_model, kind):
    prompts = random_prompts([3, 5])
    table = score(random_model, HALF, prompts, Ablation(kind, n_draws=3), reference=pool_of(prompts))
    assert table[LDS].notna().all(axis=None) and set(table.ablation) == {kind}
    if kind in STOCHASTIC:
        assert set(table.n_draws) == {3} and (table[["s_se", "n_se"]] > 0).all(axis=None)
    else:
        assert set(table.n_draws) == {1} and (table[["s_se", "n_se"]] == 0).all(axis=None)


def test_one_draw_has_an_unknown_spread_and_so_no_verdict(compiled):
    prompts = make_prompts("ioi", n=2, tokenizer=compiled.tokenizer)
    table = score(compiled, compiled_circuit(), prompts, Ablation("resample", 1), baseline=Baseline(4.0, None, 1))
    assert table.s_se.isna().all() and set(table.verdict) == {"undecided"}


def test_the_estimate_is_the_mean_of_the_donors(random_model):
    """Each donor of a pool, in turn, as a counterfactual."""
    prompts, pool = random_prompts([5, 5]), random_prompts([5] * 3, seed=9)
    table = score(random_model, HALF, prompts, Ablation("resample", 3), reference=pool)
    by_donor = [score(random_model, HALF, replace(prompts, counterfactual=pool.tokens[[d, d]])) for d in range(3)]
    for column in [*LDS, "kl"]:
        np.testing.assert_allclose(table[column], np.mean([t[column] for t in by_donor], axis=0), atol=1e-5)
    s = (table.ld_circuit - table.ld_ablated) / (table.ld_model - table.ld_ablated)
    np.testing.assert_allclose(table.sufficiency, s)
    left_out = []
    for d in range(3):
        c, e = (np.mean([t[x] for i, t in enumerate(by_donor) if i != d], axis=0) for x in ("ld_circuit", "ld_ablated"))
        left_out.append((c - e) / (table.ld_model - e))
    np.testing.assert_allclose(table.s_se, np.sqrt(2 / 3 * np.square(left_out - np.mean(left_out, 0)).sum(0)), rtol=1e-3)


# random circuits

def test_p_value_is_the_rank_among_circuits_scored_alone(random_model):
    prompts = random_prompts([4, 4, 6], seed=2)
    table = score(random_model, HALF, prompts, n_random=7, seed=3)
    nulls = random_circuits(HALF, 2, 4, 7, seed=3)
    scores = np.stack([score(random_model, c, prompts).score for c in nulls])
    own = table.score.to_numpy()
    clear = (np.abs(scores - own) > 1e-4) | (np.abs(scores - own) < 1e-9)
    assert clear.all() and set(table.n_random) == {7}
    np.testing.assert_allclose(table.p_value, (1 + (scores >= own).sum(0)) / 8)
    assert score(random_model, HALF, prompts).p_value.isna().all()


@settings(max_examples=30)
@given(sample_of([f"a{layer}.h{head}" for layer in (0, 1) for head in range(4)] + ["m0", "m1"]), st.integers(0, 99))
def test_random_circuits_keep_the_count_of_every_layer(names, seed):
    circuit = Circuit.from_components(names, positions=["END"] * len(names), universe="heads+mlps")
    def shape(c): return Counter((n.component.layer, n.component.head is None, n.positions) for n in c.nodes)
    assert all(shape(c) == shape(circuit) for c in random_circuits(circuit, 2, 4, 3, seed))


def test_the_true_circuit_beats_chance_and_decoys_do_not(compiled, exact):
    rank = {name: score(compiled, exact_scores.case_circuits()[name][0], exact_set(exact), n_random=19).p_value
            for name in ("true", "decoys")}
    assert (rank["true"] == 1 / 20).all() and (rank["decoys"] > 0.25).all()


# nodes or edges, listed or all positions

EDGES = replace(HALF, edges=("a0.h1->a1.h0<q>", "a0.h3->a1.h0", "a0.h1->logits", "a1.h0->logits", "input->a0.h1", "input->logits", "m0->logits"))


@pytest.mark.parametrize("universe", ["heads", "heads+mlps"])
@pytest.mark.parametrize("positions", ["listed", "all"])
def test_edge_level_is_what_edge_logits_say(random_model, universe, positions):
    prompts, circuit = random_prompts([5, 3, 5]), replace(EDGES, universe=universe)
    table = score(random_model, circuit, prompts, level="edge", positions=positions)
    claim = circuit if positions == "listed" else replace(circuit, nodes=tuple(replace(n, positions=None) for n in circuit.nodes))
    clean, new = (edges.capture_senders(random_model, t, universe) for t in (prompts.tokens, prompts.counterfactual))
    runs = dict(ld_circuit=(claim, "circuit"), ld_complement=(claim, "complement"), ld_ablated=(replace(claim, edges=None), "circuit"))
    for column, (c, keep) in runs.items():
        logits = edges.edge_logits_with_hooks(random_model, prompts, c, clean, new, keep)
        np.testing.assert_allclose(table[column], logit_difference(logits, prompts.answers, prompts.distractors), atol=1e-5)
    assert all(set(table[c]) == {v} for c, v in dict(level="edge", engine="cone", positions=positions, universe=universe).items())
    node = score(random_model, circuit, prompts, positions=positions)
    assert (table.ld_circuit - node.ld_circuit).abs().max() > 1e-3 and set(node.level) == {"node"}
    close(table, node, ["ld_model", "engagement", "reads_a0.h1", "reads_a1.h0", *(["ld_ablated"] if universe == "heads" else [])])
    if universe == "heads+mlps":  # the embedding is ablated too: the donor itself
        donors = final_logits(random_model, prompts.counterfactual, prompts.lengths)
        np.testing.assert_allclose(table.ld_ablated, logit_difference(donors, prompts.answers, prompts.distractors), atol=1e-5)


def test_edges_of_all_ablations_and_draws(random_model):
    prompts = random_prompts([5, 5])
    for kind in ABLATIONS:
        for universe in ("heads", "heads+mlps"):
            table = score(random_model, replace(EDGES, universe=universe), prompts, Ablation(kind, 2), reference=pool_of(prompts), level="edge")
            assert table[LDS].notna().all(axis=None) and (table[["s_se", "n_se"]] > 0).all(axis=None) == (kind in STOCHASTIC)


def test_edge_level_has_no_random_circuits_but_a_profile(random_model):
    prompts = random_prompts([4, 6])
    base = CircuitScorer(random_model, HALF).baseline_on(prompts, Ablation("counterfactual"))
    node, edge = (score(random_model, EDGES, prompts, n_random=3, profile=True, baseline=base, level=level) for level in ("node", "edge"))
    assert set(node.n_random) == {3} and node.p_value.notna().all() and set(edge.n_random) == {0} and edge.p_value.isna().all()
    close(node, edge, ["profile_similarity"])


def test_the_scale_of_edges_includes_the_embedding(random_model):
    prompts = random_prompts([4, 6, 6, 5, 3], seed=11)
    prompts = replace(prompts, counterfactual=(prompts.counterfactual + 1) % 64)  # other last tokens
    for universe in ("heads", "heads+mlps"):
        circuit = replace(EDGES, universe=universe)
        scorer, table = CircuitScorer(random_model, circuit), score(random_model, circuit, prompts, level="edge")
        node, edge = (scorer.baseline_on(prompts, Ablation("counterfactual"), level=level) for level in ("node", "edge"))
        assert edge.scale == pytest.approx((table.ld_model - table.ld_ablated)[table.ld_model > 0].mean(), abs=1e-5)
        assert (abs(edge.scale - node.scale) < 1e-5) == (universe == "heads")
        np.testing.assert_allclose(edge.profile, node.profile, atol=1e-5)


def test_edges_are_calibrated_as_edges(compiled, monkeypatch):
    def told(self, base, ablation, seed, profile, reference, level): return Baseline({"node": 2.0, "edge": 5.0}[level], None, 1)
    monkeypatch.setattr(CircuitScorer, "baseline_on", told)
    prompts = make_prompts("ioi", n=2, tokenizer=compiled.tokenizer)
    for level, scale in (("node", 2.0), ("edge", 5.0)):
        table = score(compiled, compiled_circuit(), prompts, level=level)
        np.testing.assert_allclose(table.gap_raw / table.gap, scale)


def test_all_positions_are_those_of_a_circuit_that_lists_none(random_model):
    prompts = random_prompts([5, 3, 5])
    free = replace(HALF, nodes=tuple(replace(n, positions=None) for n in HALF.nodes))
    everywhere, plain = (score(random_model, c, prompts, n_random=5, **how) for c, how in ((HALF, dict(positions="all")), (free, {})))
    close(everywhere, plain, [*LDS, *RATIOS, "kl", "p_value"], atol=0)
    listed = score(random_model, HALF, prompts)
    assert (everywhere.ld_circuit - listed.ld_circuit).abs().max() > 1e-3
    close(everywhere, listed, ["engagement", "reads_a0.h1", "reads_a1.h0"])
    assert set(everywhere.positions) == {"all"} and set(listed.positions) == {"listed"}
    elsewhere = Circuit.from_components(["a0.h1"], positions=["S2"])  # which these prompts lack
    assert score(random_model, elsewhere, prompts, positions="all")[LDS].notna().all(axis=None)


def test_the_true_edges_are_active(compiled, exact):
    table = score(compiled, compiled_circuit(), exact_set(exact), level="edge", baseline=Baseline(4.0, None, 1))
    assert set(table.verdict) == {"active"} and table.sufficiency.between(0.9, 1.2).all()


def test_options_that_make_no_sense_are_refused(compiled, exact):
    prompts, true = exact_set(exact)[:1], compiled_circuit()
    refused(lambda: score(compiled, true, prompts, level="edges"), "level 'edges'", "node, edge")
    refused(lambda: score(compiled, true, prompts, positions="END"), "positions 'END'", "listed, all")
    refused(lambda: score(compiled, replace(true, edges=None), prompts, level="edge"), "compiled-ioi-ioi", "no edges", "node")
    refused(lambda: score(compiled, replace(true, edges=("input->a0.h1<q>", "m0->logits")), prompts, level="edge"), "no edges", "heads to heads")
    refused(lambda: CircuitScorer(compiled, replace(true, edges=("a3.h3->a0.h1",))).claim("edge"), "backwards")
    refused(lambda: score(compiled, true, prompts, level="edge", restore=True), "restore", "node")


# tokens that no node lists

def test_restored_is_ablated_at_listed_tokens_only(compiled, compiled_numbers, exact):
    "Against the NumPy forward pass."
    circuit = exact_scores.case_circuits()["without negative mover"][0]
    table = score(compiled, circuit, exact_set(exact, "donor"), restore=True, baseline=Baseline(2.0, None, 1))
    for row, p in zip(table.itertuples(), exact):
        z, own = exact_scores.numpy_forward(compiled_numbers, p.donor)[1], {n.name: p.positions[n.positions[0]] for n in circuit.nodes}
        listed = {p.positions["S2"], p.positions["END"]}
        places = {(layer, h): sorted(listed - {own.get(f"a{layer}.h{h}")}) for layer, h in np.ndindex(*z.shape[:2])}
        edits = {head: (at, z[head][at]) for head, at in places.items()}
        last = exact_scores.numpy_forward(compiled_numbers, p.clean, edits)[0][-1]
        assert row.ld_restored == pytest.approx(last[p.answer] - last[p.distractor], abs=1e-4)
        assert row.gap_restored == pytest.approx((row.ld_restored - row.ld_model) / 2, abs=1e-5)
    assert (table.ld_restored - table.ld_circuit).abs().max() > 1e-3


@pytest.mark.parametrize("universe", ["heads", "heads+mlps"])
def test_with_everything_at_the_listed_tokens_restoring_is_the_model(random_model, universe):
    names, prompts = component_names(random_model, universe), random_prompts([5, 3, 6])
    circuit = Circuit.from_components(names, positions=[("START", "END")] * len(names), universe=universe)
    table = score(random_model, circuit, prompts, restore=True)
    close(table, table.assign(ld_restored=table.ld_model), ["ld_restored"])
    assert (table.ld_circuit - table.ld_model).abs().max() > 1e-3
    ablated = score(random_model, replace(circuit, nodes=circuit.nodes[-1:]), prompts, restore=True)
    assert (ablated.ld_restored - ablated.ld_model).abs().max() > 1e-3


def test_restored_is_empty_where_not_asked_or_nothing_is_unlisted(random_model):
    prompts, some = random_prompts([5, 3]), dict(baseline=Baseline(1.0, None, 1))
    listed = replace(HALF, nodes=tuple(n for n in HALF.nodes if n.positions))
    columns = ["ld_restored", "gap_restored"]
    assert score(random_model, listed, prompts, restore=True, **some)[columns].notna().all(axis=None)
    for circuit, how in ((listed, {}), (listed, dict(restore=True, positions="all")), (HALF, dict(restore=True))):
        table = score(random_model, circuit, prompts, **how, **some)
        assert table[columns].isna().all(axis=None) and table.gap.notna().all()
    close(score(random_model, listed, prompts, restore=True), score(random_model, listed, prompts), [*LDS, *RATIOS, "kl"], atol=1e-5)


def test_the_cost_of_the_options(random_model, monkeypatch):
    prompts, listed = random_prompts([5, 5]), replace(EDGES, nodes=tuple(n for n in HALF.nodes if n.positions))
    calls, cost, run, passes = [], {}, circuit_scorer.run_edits, edges.final_logits
    monkeypatch.setattr(circuit_scorer, "run_edits", lambda *a, **how: calls.extend(a[3]) or run(*a, **how))
    monkeypatch.setattr(edges, "final_logits", lambda *a, **how: calls.append(1) or passes(*a, **how))
    monkeypatch.setattr(circuit_scorer, "edge_logits", edges.edge_logits_with_hooks)
    for name, how in (("node", {}), ("restored", dict(restore=True)), ("all", dict(positions="all")), ("edge", dict(level="edge"))):
        calls.clear()
        score(random_model, listed, prompts, Ablation("resample", 3), reference=pool_of(prompts), **how)
        cost[name] = len(calls)
    per_draw = 1 + sum(edges.edge_passes(listed, 2, 4, keep) for keep in ("circuit", "complement"))
    assert cost == dict(node=1 + 3 * 3, restored=1 + 3 * 4, all=1 + 3 * 3, edge=1 + 3 * per_draw)


def test_settings_may_share_their_donors_runs(compiled, monkeypatch):
    prompts, scorer, runs = make_prompts("ioi", n=4, tokenizer=compiled.tokenizer), CircuitScorer(compiled, compiled_circuit()), []
    own = Replacements._run
    monkeypatch.setattr(Replacements, "_run", lambda self, tokens: runs.append(len(tokens)) or own(self, tokens))
    def sweep(): return [scorer.score(prompts, Ablation("resample", 3), baseline=NO_BASELINE, positions=at, **QUICK) for at in ("listed", "all")]
    apart, cost = sweep(), len(runs)
    with scorer.sharing_runs(): together = sweep()
    for a, b in zip(apart, together, strict=True): pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert cost == 2 and len(runs) == cost + 1 and scorer._memory is None


# calibration

def test_without_a_task_there_is_no_scale_and_a_reason(random_model, compiled, exact):
    for model, prompts in ((random_model, random_prompts([4])), (compiled, exact_set(exact))):
        base = CircuitScorer(model, nothing()).calibrate(prompts, Ablation("counterfactual"))
        assert base == NO_BASELINE and base.scale is None and "no base prompts" in base.reason
    table = score(random_model, HALF, random_prompts([4]), profile=True)
    assert table.gap.isna().all() and table.profile_similarity.isna().all() and table.gap_raw.notna().all()


def test_prompts_that_the_model_gets_wrong_do_not_make_a_scale(compiled, exact):
    scorer, prompts = CircuitScorer(compiled, compiled_circuit()), exact_set(exact)
    swapped = replace(prompts, answers=prompts.distractors, distractors=prompts.answers)
    none = scorer.baseline_on(swapped, Ablation("counterfactual"))
    assert none.scale is None and none.n == 0 and "right" in none.reason
    mixed = replace(prompts, answers=torch.cat([prompts.answers[:5], prompts.distractors[5:]]),
                    distractors=torch.cat([prompts.distractors[:5], prompts.answers[5:]]))
    right, some = (scorer.baseline_on(p, Ablation("counterfactual")) for p in (prompts[:5], mixed))
    assert some.n == right.n == 5 and some.scale == pytest.approx(right.scale, abs=1e-5)
    np.testing.assert_allclose(some.profile, right.profile, atol=1e-5)


@pytest.mark.parametrize("universe", ["heads", "heads+mlps"])
def test_scale_and_profile_are_what_single_scores_say(random_model, universe):
    prompts = random_prompts([4, 6, 6, 5, 3], seed=11)
    scorer = CircuitScorer(random_model, nothing(universe))
    base = scorer.baseline_on(prompts, Ablation("counterfactual"))
    table = score(random_model, nothing(universe), prompts)
    right = table.ld_model > 0
    assert base.n == right.sum() > 0
    assert base.scale == pytest.approx((table.ld_model - table.ld_ablated)[right].mean(), abs=1e-5)
    for k, name in enumerate(component_names(random_model)):
        alone = score(random_model, Circuit.from_components([name]), prompts)
        assert base.profile[k] == pytest.approx((alone.ld_model - alone.ld_complement)[right].mean(), abs=1e-5)
    one = prompts[[int(np.argmax(right))]]
    row = scorer.score(one, "counterfactual", n_random=0, baseline=scorer.baseline_on(one, Ablation("counterfactual"))).iloc[0]
    assert row.profile_similarity == pytest.approx(1, abs=1e-5)


def test_a_users_reference_need_not_cover_the_calibration_prompts(compiled):
    prompts = make_prompts("ioi", n=2, tokenizer=compiled.tokenizer)
    scorer = CircuitScorer(compiled, compiled_circuit(), reference=reference_pool(prompts, compiled.tokenizer, n=8))
    table = scorer.score(prompts, "mean", **QUICK)
    assert table.gap.notna().all() and set(table.verdict) == {"active"}


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["resample", "mean", "counterfactual"])
def test_generated_prompts_of_a_task_need_nothing_else(compiled, ablation):
    prompts = make_prompts("ioi", n=6, tokenizer=compiled.tokenizer)
    seen = []
    table = CircuitScorer("compiled-ioi", "compiled-ioi-ioi", batch_size=4).score(prompts, ablation, n_random=3, progress=seen.append)
    assert list(table)[:len(COLUMNS)] == COLUMNS and len(table) == sum(seen) == 6
    assert set(table.verdict) == {"active"} and (table.engagement > 0.9).all() and (table.profile_similarity > 0.8).all()
    assert table.p_value.between(1 / 4, 1).all() and (table.gap * table.gap_raw > 0).all()
    assert table.model.unique() == ["compiled-ioi"] and table.prompt_id.tolist() == prompts.labels.prompt_id.tolist()


# what is refused

def refused(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert all(w in text for w in words), text
    assert "\n" not in text


def test_a_head_that_the_model_lacks_is_refused_before_scoring(random_model):
    refused(lambda: CircuitScorer(random_model, Circuit.from_components(["a0.h0", "a2.h1"])), "a2.h1", "2 layers of 4 heads")
    refused(lambda: CircuitScorer(random_model, Circuit.from_components(["a0.h4"])), "a0.h4")
    refused(lambda: CircuitScorer(random_model, Circuit.from_components(["m2"])), "m2")
    refused(lambda: CircuitScorer(random_model, "no-such-circuit"), "no-such-circuit")
    refused(lambda: CircuitScorer(random_model, HALF, batch_size=0), "batch size 0")


@pytest.mark.parametrize("kind", ["resample", "mean", "noise"])
def test_bare_tokens_without_a_reference_are_refused_where_one_is_needed(random_model, kind):
    prompts = random_prompts([4, 5])
    refused(lambda: score(random_model, HALF, prompts, kind), kind, "reference", "counterfactual")
    assert score(random_model, HALF, prompts, "counterfactual")[LDS].notna().all(axis=None)
    assert score(random_model, HALF, replace(prompts, counterfactual=None), "zero")[LDS].notna().all(axis=None)
    named_ioi = replace(prompts, labels=prompts.labels.assign(task="ioi"))  # but there is no tokenizer to make more
    refused(lambda: score(random_model, HALF, named_ioi, kind), "reference")


def test_prompts_that_only_claim_to_be_of_a_task_get_no_generated_pool(compiled, exact):
    prompts = exact_set(exact)
    claimed = replace(prompts, labels=prompts.labels.assign(task="ioi"))
    refused(lambda: score(compiled, compiled_circuit(), claimed, "mean", baseline=NO_BASELINE), "reference")


@pytest.mark.parametrize("kind", ["resample", "mean", "noise"])
def test_a_prompt_without_a_pool_is_named(random_model, kind):
    prompts = random_prompts([4, 6])
    refused(lambda: score(random_model, HALF, prompts, kind, reference=random_prompts([4] * 9)), "q1", "reference prompt", "length")


def test_other_bad_input(random_model):
    prompts = random_prompts([4, 5, 5])
    refused(lambda: score(random_model, HALF, replace(prompts, counterfactual=None)), "counterfactual")
    refused(lambda: score(random_model, HALF, prompts, "knockout"), "knockout")
    refused(lambda: score(random_model, HALF, prompts, n_random=-1), "-1")
    refused(lambda: score(random_model, HALF, prompts, Ablation("resample", 5), reference=pool_of(prompts)), "q0", "4", "5 draws")
    elsewhere = Circuit.from_components(["a0.h1"], positions=["S2"])
    refused(lambda: score(random_model, elsewhere, prompts), "a0.h1", "S2")
    some = replace(prompts, positions=prompts.positions | {"S2": torch.tensor([2, -1, 1])})
    refused(lambda: score(random_model, elsewhere, some), "a0.h1", "S2", "q1")


@pytest.mark.parametrize("what", ["tokens", "counterfactual", "answers", "distractors"])
def test_an_id_outside_the_vocabulary_is_named(random_model, what):
    prompts = random_prompts([4, 4, 4])
    ids = getattr(prompts, what).clone()
    ids[1, 0] = 64
    refused(lambda: score(random_model, HALF, replace(prompts, **{what: ids}), batch_size=1), "q1", what, "64", "0 to 63")


def test_nan_logits_name_the_prompt_and_leave_no_hooks():
    broken = random_gpt2(n_layers=2, n_heads=4, d_model=32)
    with torch.no_grad():
        broken.transformer.wte.weight[9, 0] = torch.nan
    model = as_bridge(broken)
    tokens = [[1, 2, 3], [4, 9, 3], [5, 6, 3]]
    prompts = PromptSet.from_tokens(tokens, [[7, 8, 3]] * 3, [1] * 3, [2] * 3, labels=pd.DataFrame({"prompt_id": ["a", "bad one", "c"]}))
    circuit = Circuit.from_components(["a0.h1"])
    assert score(model, circuit, prompts[[0, 2]])[LDS].notna().all(axis=None)
    hooks = hooks_of(model)  # some are the library's own, and appear with the first run
    for size in (1, 3):
        refused(lambda: score(model, circuit, prompts, batch_size=size), "prompt bad one", "NaN")  # noqa: B023
    assert hooks_of(model) == hooks
    donors = replace(prompts[[0, 2]], counterfactual=torch.tensor([[7, 8, 3], [7, 9, 3]]))
    refused(lambda: score(model, circuit, donors), "prompt c", "NaN")  # the donor is broken, not the prompt


def test_nan_in_any_run_is_refused_and_padding_is_not_read():
    prompts = PromptSet.from_tokens([[1, 2], [3, 4]], None, [[0, 1], 0], [2, 2])
    logits = torch.arange(12.0).reshape(2, 2, 3)
    assert _logit_differences(logits, prompts).shape == (2, 2)
    logits[1, 1, 0] = -torch.inf
    refused(lambda: _logit_differences(logits, prompts), "p0001", "NaN or infinite")


# what comes in, what goes out

def test_a_hugging_face_model_is_scored_as_its_bridge_and_left_alone(random_model):
    plain = random_gpt2(seed=1, n_layers=2, n_heads=4, d_model=32)
    before, prompts = {n: p.clone() for n, p in plain.state_dict().items()}, random_prompts([3, 4])
    close(score(plain, HALF, prompts), score(random_model, HALF, prompts), atol=0)
    assert all(torch.equal(p, before[n]) for n, p in plain.state_dict().items()) and model_hash(plain) == model_hash(random_model)


def test_labels_of_the_prompts_never_replace_what_was_measured(random_model):
    prompts = random_prompts([3, 4])
    labels = prompts.labels.assign(model="mine", seed=77, ld_model=-5.0, verdict="active", p_value=0.0, answer="A", variant="v", level="word",
                                   positions="1 2", ld_restored=3.0, gap_restored=1.0, engagement_reader=9.0, engagement_of="x", reads_it="y")
    table = score(random_model, HALF, replace(prompts, labels=labels), seed=2)
    plain = score(random_model, HALF, prompts, seed=2)
    pd.testing.assert_frame_equal(table.drop(columns=["answer", "variant"]), plain.drop(columns=["answer", "variant"]))
    assert set(table.answer) == {"A"} and set(table.seed) == {2}


# memory

MEASURED = """
import resource, sys
import numpy as np
from circuit_generalization.circuit import Circuit
from circuit_generalization.circuit_scorer import CircuitScorer
from circuit_generalization.models import as_bridge, random_gpt2
from circuit_generalization.prompts import PromptSet
n, rng = int(sys.argv[1]), np.random.default_rng(0)
clean, other = (rng.integers(0, 60, (n, 12)).tolist() for _ in range(2))
prompts = PromptSet.from_tokens(clean, other, [61] * n, [62] * n)
scorer = CircuitScorer(as_bridge(random_gpt2(seed=0, n_layers=2, n_heads=4, d_model=64, n_vocab=64)), Circuit.from_components(["a0.h1"]))
assert len(scorer.score(prompts, "counterfactual", n_random=2)) == n
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux gives it")
def test_twenty_times_the_prompts_need_no_more_memory():
    peaks = [int(subprocess.run([sys.executable, "-c", MEASURED, str(n)], capture_output=True, text=True, check=True).stdout) for n in (1000, 20_000)]
    assert peaks[1] < 1.15 * peaks[0]
