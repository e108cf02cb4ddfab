"""The genetics lens where every number is known: by hand, by construction, by an independent forward in NumPy, or by the null itself."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, made
from scipy import stats as distributions

from circuit_generalization import genetics
from circuit_generalization.ablation import Ablation, capture
from circuit_generalization.bench import Bench
from circuit_generalization.chimera import GN3, chimera, chimera_of, chimera_z, common_score, judge_chimera, patterns_and_values, random_choice
from circuit_generalization.circuit import Circuit, Component, load_circuit
from circuit_generalization.cone import no_cone
from circuit_generalization.constructions import FIRST, SECOND, carried, constructions, two_routes
from circuit_generalization.controls import random_circuit, random_twin, unbridged
from circuit_generalization.convergent_evolution import Owner, ancestor_of, convergence_of, convergent_evolution, lens_value, overlap_of
from circuit_generalization.epistasis import GN2, drops_of_sets, epistasis, epistasis_of, epsilons, judge_epistasis, pairs_of
from circuit_generalization.errors import InputError
from circuit_generalization.exact_scores import as_prompt_set, compiled_prompts, numpy_forward, numpy_weights
from circuit_generalization.genetics import (
    ESTIMATE_FIELDS,
    FIELDS,
    FINDING_FIELDS,
    Estimate,
    Finding,
    GeneticsResult,
    Options,
    Subject,
    adjusted,
    circuits_for,
    make_subject,
    make_subjects,
)
from circuit_generalization.knock_in import _weights, homologous, judge_knock_in, knock_in, knock_in_of, knocked_in, weight_cosines
from circuit_generalization.models import as_bridge, component_names, final_logits, load_model, model_hash, random_gpt2
from circuit_generalization.phylogenetic_tracking import (
    formation_lds,
    half_way,
    judge_tracking,
    phylogenetic_tracking,
    shapes,
    sigmoid_fit,
    tracking_of,
)
from circuit_generalization.prompts import PromptSet

ALL = [knock_in, epistasis, chimera, convergent_evolution, phylogenetic_tracking]
QUICK = Options(n_prompts=20, n_random=4)


def small(model, *tasks):
    "Four components of each packaged circuit: enough to see every path through a metric."
    return [replace(c, nodes=c.nodes[:2] + c.nodes[-2:], edges=None) for c in (load_circuit(f"{model}-{task}") for task in tasks)]


# models by hand

def flipping_model(loud):
    """Every head reads one feature and says it, as loud as `loud[layer][head]`, in a direction of its own.

    The feature is +1 in token 1 and -1 in token 2, so ablating by the other token only turns signs: no LayerNorm can tell, and all adds up."""
    n_layers, n_heads = len(loud), len(loud[0])
    width = 4 + 2 * n_layers * n_heads
    width += -width % n_heads
    model, size = random_gpt2(n_layers=n_layers, n_heads=n_heads, d_model=width, n_vocab=6), width // n_heads
    with torch.no_grad():
        for name, p in model.named_parameters(): p.fill_(float("ln_" in name and name.endswith("weight")))
        feature, anchor = torch.zeros(2, width)
        feature[:2], anchor[2:4] = torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])
        wte = model.transformer.wte.weight
        wte[1], wte[2] = anchor + feature, anchor - feature
        for layer, block in enumerate(model.transformer.h):
            for head in range(n_heads):
                at = 4 + 2 * (layer * n_heads + head)
                block.attn.c_attn.weight[:, 2 * width + head * size] = feature
                block.attn.c_proj.weight[head * size, at:at + 2] = loud[layer][head] * torch.tensor([1.0, -1.0])
                wte[3, at:at + 2] = torch.tensor([1.0, -1.0])  # the answer hears every head; the distractor, token 4, none
    return as_bridge(model)


def subject_of(model, prompts, circuit, ablation="counterfactual", positions=None):
    circuit = circuit if positions else replace(circuit, nodes=tuple(replace(n, positions=None) for n in circuit.nodes))
    return Subject("by hand", circuit, Bench(model, prompts, None, Ablation(ablation)))


def flipping_subject(loud, heads):
    lengths = [2 + i % 5 for i in range(20)]
    prompts = PromptSet.from_tokens([[1] * n for n in lengths], [[2] * n for n in lengths], [3] * 20, [4] * 20,
                                    labels=pd.DataFrame({"template": [f"t{i % 10}" for i in range(20)]}))
    return subject_of(flipping_model(loud), prompts, Circuit.from_components(heads))


LOUD = [[1.0, 0.5, 0.0, 0.25], [0.5, 2.0, 0.0, 0.0]]
HEADS = ["a0.h0", "a0.h1", "a0.h3", "a1.h0", "a1.h1"]


# GN2

def test_an_additive_circuit_has_no_epistasis():
    subject = flipping_subject(LOUD, HEADS)
    drops = drops_of_sets(subject, [subject.circuit])
    assert abs(epsilons(drops, subject.circuit)).max() <= 1e-5
    single = np.array([drops[(name, ()),].mean() for name in HEADS])
    assert np.allclose(single[:3] / single[0], [1, 0.5, 0.25], atol=1e-5) and np.isclose(single[4] / single[3], 4)  # as loud as they are
    assert np.isclose(single.sum(), 2 * subject.ld.mean(), atol=1e-4)  # each turns its own sign
    finding, _ = epistasis_of(subject, Options(n_random=3))
    assert finding.value <= 1e-5 and not finding.passed and finding.estimates["size"].high <= 1e-5
    assert judge_epistasis(replace(finding, estimates=adjusted([finding.estimates])[0])).startswith("additive")


@pytest.mark.parametrize("heads", [None, two_routes(5.0, 1.0).heads], ids=["compiled-ioi", "two routes"])
def test_epistasis_of_every_pair_is_that_of_a_forward_in_numpy(heads, compiled, compiled_numbers):
    construction = two_routes(5.0, 1.0)
    weights, model = (compiled_numbers, compiled) if heads is None else (numpy_weights(construction.model()), as_bridge(construction.model()))
    circuit = load_circuit("compiled-ioi-ioi") if heads is None else Circuit.from_components([*FIRST, *SECOND])
    exact = compiled_prompts(8)
    subject = subject_of(model, as_prompt_set(exact), circuit)
    got = epsilons(drops_of_sets(subject, [subject.circuit]), subject.circuit)

    def ld(prompt, nodes):
        z = numpy_forward(weights, prompt.counterfactual)[1]
        edits = {(n.component.layer, n.component.head): (range(len(prompt.clean)), z[n.component.layer, n.component.head]) for n in nodes}
        last = numpy_forward(weights, prompt.clean, edits)[0][-1]
        return last[prompt.answer] - last[prompt.distractor]

    for j, prompt in enumerate(exact):
        whole, alone = ld(prompt, []), {n.name: ld(prompt, [n]) for n in subject.circuit.nodes}
        for i, (a, b) in enumerate(pairs_of(subject.circuit)):
            drop = whole - ld(prompt, [a, b]) - (whole - alone[a.name]) - (whole - alone[b.name])
            assert got[i, j] == pytest.approx(drop, abs=2e-3)


def test_a_redundant_pair_has_the_epistasis_of_the_formula():
    loud = (5.0, 5.0)
    construction = two_routes(*loud)
    subject = subject_of(as_bridge(construction.model()), as_prompt_set(compiled_prompts(8)), Circuit.from_components(["a2.h0", "a2.h4"]))
    drops = drops_of_sets(subject, [subject.circuit])
    both = drops[(("a2.h0", ()), ("a2.h4", ()))].mean()  # everything: without a mover nothing is said
    one = construction.cases["first route"].sufficiency  # what one route alone gives, by the formula
    assert epsilons(drops, subject.circuit).mean() == pytest.approx((2 * one - 1) * both, rel=0.02)
    assert 0.6 < 2 * one - 1 < 1.0 and carried(1.0, 0.0) == 1.0  # nearly all of it, as backups are
    added = subject_of(as_bridge(constructions()["load added up"].model()), subject.bench.prompts, subject.circuit)
    epsilon, whole = epsilons(drops_of_sets(added, [added.circuit]), added.circuit).mean(), added.ld.mean()
    assert abs(epsilon) < 0.15 * whole  # little, where loudness adds up


def test_random_circuits_share_what_was_computed():
    subject = flipping_subject(LOUD, HEADS)
    nulls = subject.nulls(30, 0)
    drops = drops_of_sets(subject, [subject.circuit, *nulls])
    assert len(drops) <= 8 + 8 * 7 // 2  # singles and pairs of all eight heads
    assert set(map(len, drops)) == {1, 2}


# GN3

@pytest.fixture(scope="module")
def twins():
    "Heads 0 and 1 of layer 1 are one head twice."
    hf = random_gpt2(seed=3, n_layers=2, n_heads=4, d_model=32, n_vocab=40)
    attn, size = hf.transformer.h[1].attn, 8
    with torch.no_grad():
        for start in (0, 32, 64):
            attn.c_attn.weight[:, start + size:start + 2 * size] = attn.c_attn.weight[:, start:start + size]
            attn.c_attn.bias[start + size:start + 2 * size] = attn.c_attn.bias[start:start + size]
        attn.c_proj.weight[size:2 * size] = attn.c_proj.weight[:size]
    return as_bridge(hf)


def random_prompts(n=20, seed=0, vocab=40, tokens=7):
    rng = np.random.default_rng(seed)
    draw = [rng.integers(0, vocab, (n, tokens)).tolist() for _ in range(2)]
    draw[1] = [[*other[:-1], own[-1]] for own, other in zip(*draw)]
    answers, distractors = zip(*(rng.choice(vocab, 2, replace=False).tolist() for _ in range(n)))
    return PromptSet.from_tokens(*draw, answers, distractors, labels=pd.DataFrame({"template": [f"t{i % 10}" for i in range(n)]}))


def test_a_chimera_of_identical_heads_preserves_everything(twins):
    subject = subject_of(twins, random_prompts(), Circuit.from_components(["a0.h2", "a1.h0", "a1.h1"]))
    finding, _ = chimera_of(subject, Options(n_random=3))
    rows = {(r["kind"], r["a"], r["b"]): r for r in finding.rows}
    assert rows["swap", "a1.h0", "a1.h1"]["kept"] == pytest.approx(1, abs=1e-5)
    assert rows["swap", "a0.h2", "a1.h1"]["kept"] != pytest.approx(1, abs=1e-2)
    numbers = finding.per_prompt
    for a, b in (("a1.h0", "a1.h1"), ("a1.h1", "a1.h0")): assert np.allclose(numbers[f"chimera {a} {b}"], subject.ld, atol=1e-4)
    assert not np.allclose(numbers["chimera a0.h2 a1.h1"], subject.ld, atol=1e-2)
    assert len(finding.rows) == 3 + 6 and finding.metadata["n_swaps"] == 3 and finding.metadata["n_chimeras"] == 6


def test_the_score_of_a_chimera_is_what_came_back_over_what_was_lost(twins):
    subject = subject_of(twins, random_prompts(), Circuit.from_components(["a0.h2", "a1.h3"]))
    finding, _ = chimera_of(subject, Options(n_random=0))
    numbers = {k: np.array(v) for k, v in finding.per_prompt.items() if k not in ("prompt_id", "template")}
    for row in finding.rows[1:]:
        out = numbers[f"ablated {row['b']}"]
        expected = (numbers[f"chimera {row['a']} {row['b']}"] - out).mean() / (numbers["ld"] - out).mean()
        assert row["why_not"] or row["score"] == pytest.approx(expected)
        assert np.allclose(out, subject.bench.lacking(Circuit.from_components([row["b"]])), atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_heads_own_halves_make_the_head(name):
    model = made(name)
    prompts = random_prompts(vocab=97)
    subject = subject_of(model, prompts, Circuit.from_components(["a0.h0", "a0.h1"]))
    patterns, values = patterns_and_values(subject)
    said = capture(model, prompts.tokens)
    for head in component_names(model):
        at = Component.parse(head)
        assert torch.allclose(chimera_z(patterns[head], values[head]), said.z[:, :, at.layer, at.head], atol=1e-4)


def test_donors_are_of_the_same_layers_and_never_the_head_itself():
    choice = {"a0.h1": ["a0.h0", "a1.h3", "a1.h4"], "a1.h3": ["a0.h0", "a0.h1", "a1.h4"]}
    for seed in range(30):
        drawn = random_choice(choice, 8, np.random.default_rng(seed))
        for b, donors in drawn.items():
            assert b not in donors and len(set(donors)) == len(donors)
            assert sorted(d.split(".")[0] for d in donors) == sorted(d.split(".")[0] for d in choice[b])


def test_heads_that_work_against_the_answer_count_with_their_signs_turned():
    subject = flipping_subject(LOUD, HEADS)
    rng = np.random.default_rng(0)
    lost = {"a0.h0": 2 + 0.1 * rng.normal(size=20), "a1.h1": -3 + 0.1 * rng.normal(size=20)}
    gained = {("a0.h1", "a0.h0"): 0.5 * lost["a0.h0"], ("a0.h1", "a1.h1"): 0.5 * lost["a1.h1"]}
    score = common_score(subject, gained, lost, {b: ["a0.h1"] for b in lost}, Options(n_random=0), "")
    assert score.value == pytest.approx(0.5) and score.low == pytest.approx(0.5, abs=1e-6)
    empty = common_score(subject, gained, lost, {"a0.h0": []}, Options(n_random=0), "for no reason")
    assert np.isnan(empty.value) and empty.how == "for no reason"


# GN1

@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_in_its_own_place_changes_nothing(name):
    model = made(name)
    heads = [f"a{layer}.h{head}" for layer in range(model.cfg.n_layers) for head in (0, 1)]
    subject = subject_of(model, random_prompts(vocab=97), Circuit.from_components(heads))
    assert np.allclose(knocked_in(subject, [(h, h) for h in heads]), subject.ld, atol=1e-4)
    assert not np.allclose(knocked_in(subject, [("a0.h1", "a0.h0")]), subject.ld, atol=1e-3)


def test_a_knock_in_is_a_model_with_the_other_heads_weights():
    hf = random_gpt2(seed=5, n_layers=3, n_heads=4, d_model=32, n_vocab=40)
    with torch.no_grad(): hf.transformer.h[2].ln_1.weight.mul_(1.7)  # a norm of its own goes along
    model, prompts = as_bridge(hf), random_prompts()
    subject = subject_of(model, prompts, Circuit.from_components(["a0.h1", "a2.h3"]))
    for donor, place in (("a2.h0", "a0.h1"), ("a0.h2", "a2.h3"), ("a2.h1", "a2.h3")):
        other = unbridged(model)
        (ls, hs), (ld, hd) = ((Component.parse(n).layer, Component.parse(n).head) for n in (donor, place))
        source, target = other.transformer.h[ls], other.transformer.h[ld]
        reads = torch.cat([source.attn.c_attn.weight[:, s + 8 * hs:s + 8 * hs + 8] for s in (0, 32, 64)], 1)
        biases = torch.cat([source.attn.c_attn.bias[s + 8 * hs:s + 8 * hs + 8] for s in (0, 32, 64)]) + source.ln_1.bias @ reads
        ratio = (source.ln_1.weight / target.ln_1.weight)[:, None]
        biases = biases - target.ln_1.bias @ (ratio * reads)
        with torch.no_grad():
            out = source.attn.c_proj.weight[8 * hs:8 * hs + 8].clone()
            for k, s in enumerate((0, 32, 64)):
                target.attn.c_attn.weight[:, s + 8 * hd:s + 8 * hd + 8] = ratio * reads[:, 8 * k:8 * k + 8]
                target.attn.c_attn.bias[s + 8 * hd:s + 8 * hd + 8] = biases[8 * k:8 * k + 8]
            target.attn.c_proj.weight[8 * hd:8 * hd + 8] = out
        logits = final_logits(as_bridge(other), prompts.tokens, prompts.lengths)
        rows = torch.arange(len(prompts))
        expected = logits[rows, prompts.answers[:, 0]] - logits[rows, prompts.distractors[:, 0]]
        assert np.allclose(knocked_in(subject, [(donor, place)])[0], expected, atol=1e-4)


def test_a_knock_in_stands_only_where_the_head_was_taken_away(compiled):
    circuit = load_circuit("compiled-ioi-ioi")
    subject = make_subject(compiled, "ioi", circuit, Options(n_prompts=12, positions="listed"))
    rescued = knocked_in(subject, [("a0.h6", "a0.h1"), ("a2.h4", "a2.h0"), ("a2.h0", "a2.h0")])
    assert np.allclose(rescued[2], subject.ld, atol=1e-3)
    lost = subject.drops([[n] for n in subject.heads if n.name == "a2.h0"])[0]
    assert abs(rescued[1] - subject.ld).mean() < abs(lost).mean()  # its twin's weights do most of it


def test_products_of_weights_do_not_depend_on_a_basis_within_the_head(compiled):
    cosines = weight_cosines(compiled, ["a2.h0", "a2.h4", "a0.h1"])
    assert all(np.allclose(np.diag(c), 1) and np.allclose(c, c.T) for c in cosines.values())
    hf = unbridged(compiled)
    attn, size = hf.transformer.h[2].attn, compiled.cfg.d_head
    turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))[0]
    width = compiled.cfg.d_model
    with torch.no_grad():
        for start in (0, width): attn.c_attn.weight[:, start:start + size] = attn.c_attn.weight[:, start:start + size] @ turn
    turned = weight_cosines(as_bridge(hf), ["a2.h0", "a2.h4", "a0.h1"])
    assert np.allclose(turned["qk"], cosines["qk"], atol=1e-5) and np.allclose(turned["ov"], cosines["ov"], atol=1e-5)
    assert not np.allclose(turned["flat"], cosines["flat"], atol=1e-3)


def test_the_lens_averages_self_pairs_in_and_we_report_them_apart():
    result = knock_in("organism-a", ["ioi", "sva"], replace(QUICK, n_random=2))
    finding, = result.findings
    rows = pd.DataFrame(finding.rows)
    mine = rows[rows.into == "ioi"]
    shared = set(load_circuit("organism-a-ioi").components) & set(load_circuit("organism-a-sva").components)
    assert set(finding.metadata["shared_heads"]) == shared == set(mine.a[mine.same_head]) and np.allclose(mine.flat[mine.same_head], 1)
    assert finding.value == pytest.approx(mine.flat.mean())
    assert finding.metadata["mean_flat_without_self"] == pytest.approx(mine.flat[~mine.same_head].mean())
    both = mine[~mine.same_head]
    assert finding.estimates["weights"].value == pytest.approx(((both.qk + both.ov) / 2).mean())
    k, m = (len(load_circuit(f"organism-a-{task}")) for task in ("ioi", "sva"))
    assert len(rows) == 2 * k * m and (rows.why_not[rows.same_head] == "the same head").all()
    alike = rows[rows.homologous]
    assert (alike.role_a == alike.role_b).all() and not (alike.role_a == "unnamed").any() and not alike.same_head.any()
    assert len(finding.per_prompt["ld"]) == 40 and finding.per_prompt["ioi: a0.h0 in place of a0.h2"][20:] == [None] * 20


def test_a_model_without_a_cone_cannot_move_heads(twins):
    subject = subject_of(twins, random_prompts(), Circuit.from_components(["a0.h2"]))
    subject.bench.__dict__["run"] = None
    with pytest.raises(InputError, match="cannot be moved"): knocked_in(subject, [("a0.h1", "a0.h2")])
    assert no_cone(twins) is None


# GN4

def owner(heads, model="m", n_layers=4, n_heads=8, task="t"): return Owner(model, task, Circuit.from_components(heads), n_layers, n_heads)


def test_identical_circuits_are_one_and_disjoint_ones_what_the_formula_says():
    heads = ["a0.h0", "a0.h3", "a1.h2", "a3.h7"]
    finding = convergence_of(owner(heads), owner(heads, task="other"), Options())
    assert finding.value == 1 and finding.passed
    assert finding.estimates["heads"].p_value == pytest.approx(1 / (28 * 8 * 8))  # C(8,2) · 8 · 8 places
    other = convergence_of(owner(heads), owner(["a0.h1", "a2.h2"], task="other"), Options())
    assert other.value == pytest.approx((0 + 1 / 4 + 2 / np.sqrt(6 * 2) + 2 / 4) / 4) and other.estimates["heads"].p_value == 1
    assert other.rows[0]["common"] == [] and finding.rows[0]["common"] == heads


def test_heads_of_two_models_are_not_compared():
    a, b = owner(["a0.h0", "a1.h1"], "m"), owner(["a0.h0", "a1.h1"], "n")
    numbers = overlap_of(a, b)
    assert np.isnan(numbers["head_jaccard"]) and lens_value(numbers) == 1
    found = convergence_of(a, b, Options())
    assert np.isnan(found.estimates["heads"].value) and found.metadata["kind"] == "convergence" and found.rows[0]["common"] == []
    deep = overlap_of(a, owner(["a0.h0", "a2.h1"], "n", n_layers=8))  # layer 0 of 4 is layers 0 and 1 of 8
    assert deep["layer_jaccard"] == 1 / 2 * 1 and deep["density_cosine"] == pytest.approx((1 * 0.5 + 1 * 0.5) / (1 * np.sqrt(2)))


def test_models_of_one_line_have_one_numbering():
    a, b = owner(["a0.h0", "a1.h1"], "m"), replace(owner(["a0.h0", "a1.h2"], "n"), ancestor="m")
    found = convergence_of(a, b, Options())
    assert found.metadata["kind"] == "homology" and found.estimates["heads"].value == 1 / 3 and found.rows[0]["common"] == ["a0.h0"]
    kin = convergent_evolution(["organism-a", "organism-patchwork-1", "organism-b"], ["ioi"], QUICK)
    assert [f.metadata["kind"] for f in kin.findings] == ["homology", "convergence", "convergence"]
    assert ancestor_of("organism-b@1700") == "organism-b" == ancestor_of("organism-patchwork-2") and ancestor_of("organism-b") == ""


def test_leaving_out_a_head_gives_the_range():
    found = convergence_of(owner(["a0.h0", "a1.h0"]), owner(["a0.h0", "a1.h1"], task="u"), Options(n_random=0))
    assert found.metadata["left_out_one_head"]["head_jaccard"] == (0, 1 / 2)
    assert np.isnan(found.estimates["layers"].p_value)


def test_the_chance_of_common_heads_is_exact_and_conservative():
    rng, p_values = np.random.default_rng(0), []
    for _ in range(400):
        draw = [[f"a{layer}.h{h}" for layer in range(4) for h in rng.choice(8, 2 + layer % 2, replace=False)] for _ in range(2)]
        p_values.append(convergence_of(owner(draw[0]), owner(draw[1], task="u"), Options(n_random=0)).estimates["heads"].p_value)
    for alpha in (0.05, 0.1, 0.3): assert np.mean(np.array(p_values) <= alpha) <= alpha + 2.5 * np.sqrt(alpha * (1 - alpha) / 400)
    assert np.mean(np.array(p_values) <= 0.3) > 0.1  # and not idle


# GN5

def test_a_step_shaped_formation_finds_its_layer():
    loud = [[0.0] * 4 for _ in range(6)]
    loud[3] = [1.0, 1.0, 0.0, 0.0]
    heads = [f"a{layer}.h{head}" for layer in range(6) for head in range(4)]
    finding, _ = tracking_of(flipping_subject(loud, heads), Options(n_random=2))
    kept = [r["kept"] for r in finding.rows]
    assert np.allclose(kept, [-1, -1, -1, -1, 1, 1, 1], atol=1e-5)  # not clipped: ablated heads say the opposite
    assert finding.metadata["critical_layer"] == 3 and finding.estimates["midpoint"].value == pytest.approx(2.5)
    assert finding.metadata["cumulative_curve"] == kept[1:] and finding.estimates["rise"].value == pytest.approx(2, abs=1e-5)
    assert next(s["shape"] for s in finding.metadata["shapes"] if s["chosen"]) == "step"


def test_formation_of_an_additive_model_adds_up_layer_by_layer():
    loud = [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [-1.0, 3.0]]
    subject = flipping_subject(loud, [f"a{layer}.h{head}" for layer in range(4) for head in range(2)])
    (lds,), n_sets = formation_lds(subject, [subject.circuit])
    says = subject.drops([[n] for n in subject.heads]).mean(1).reshape(4, 2).sum(1) / 2  # an ablated head says the opposite
    there = np.cumsum([0, *says])
    assert np.allclose(lds.mean(1), 2 * there - there[-1], atol=1e-4) and n_sets == 5 and np.isclose(there[-1], subject.ld.mean(), atol=1e-4)
    part = flipping_subject(loud, ["a1.h1"])
    assert np.allclose(formation_lds(part, [part.circuit])[0][0].mean(1), part.ld.mean() - 2 * says[1] * np.array([1, 1, 0, 0, 0]), atol=1e-4)


def test_a_flat_curve_has_no_r_squared():
    assert all(np.isnan(x) for x in sigmoid_fit(np.full(4, 1.0)))
    silent = flipping_subject([[0.0, 1.0], [0.0, 1.0]], ["a0.h0", "a1.h0"])
    finding, _ = tracking_of(silent, Options(n_random=0))
    assert np.isnan(finding.value) and not finding.passed
    assert judge_tracking(finding).startswith("not decidable") or "nothing forms" in judge_tracking(finding)


def test_half_way_and_shapes_on_curves_that_fall():
    assert half_way(np.arange(3.0), np.array([3.0, 2, 1])) != half_way(np.arange(3.0), np.array([3.0, 2, 1]))  # NaN: nothing rises
    rows = shapes(np.arange(4.0), np.ones((4, 6)), [f"t{i}" for i in range(6)])
    assert rows == []  # too few templates to hold one out


def test_a_fall_is_said():
    def row(layer, step, p): return dict(layer=layer, step=step, step_p_adjusted=p, heads=[f"a{layer}.h0"], kept=0.5)
    finding = Finding(("t",), 0.9, True, "", {"rise": Estimate(0.9, 0.8, 1.0, p_adjusted=0.01, n_null=99)}, dict(shapes=[]),
                      [row(0, 0.5, 0.01), row(1, -0.3, 0.01), row(2, -0.01, 0.001)], {})
    assert judge_tracking(finding).startswith("falls at layer 1, so not in order") and "more than random" in judge_tracking(finding)


def test_training_is_followed_only_where_it_is_this_models():
    assert phylogenetic_tracking("organism-a", ["ioi"], QUICK).findings[0].metadata["over_training"] is None
    result = phylogenetic_tracking("organism-b", ["ioi"], QUICK)
    training = result.findings[0].metadata["over_training"]
    assert [p["step"] for p in training["points"]] == [1000, 1600, 1700, 1800, 2000, 3600, 5600]
    last = training["points"][-1]
    assert last["ld"] == pytest.approx(np.mean(result.findings[0].per_prompt["ld"]), rel=1e-5) and last["sufficiency"] > 0.9
    assert training["points"][0]["right"] < 0.9 and training["points"][0]["ld"] < 0.2 * last["ld"]
    assert 1600 < training["half_way"]["value"] < 2000
    twin = random_twin(load_model("organism-b"))
    twin.cfg.model_name = "organism-b"  # a namesake
    subject = make_subject(twin, "ioi", load_circuit("organism-b-ioi"), QUICK, least_right=0.0)
    assert tracking_of(subject, QUICK)[0].metadata["over_training"] is None


# what all have in common

@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("options", [QUICK, replace(QUICK, ablation="resample", n_draws=2, positions="listed", n_random=0)], ids=["mean", "resample"])
def test_stated_passes_are_those_that_the_engine_counts(metric, options):
    result = metric("organism-c", ["ioi", "induction"], options, small("organism-c", "ioi", "induction"))
    assert result.passes["stated"] == result.passes["edited"] and not result.refused
    assert (result.passes["edited"] > 0) != (metric is convergent_evolution)


@pytest.mark.parametrize("metric", ALL)
def test_the_json_has_the_fields_that_are_documented_and_the_same_bytes(metric):
    first, again = (metric("organism-a", ["ioi", "sva"], QUICK, small("organism-a", "ioi", "sva")).to_json() for _ in range(2))
    data = json.loads(first)
    assert first == again and list(data) == list(FIELDS)
    for finding in data["findings"]:
        assert list(finding) == list(FINDING_FIELDS)
        for estimate in finding["estimates"].values():
            assert list(estimate) == list(ESTIMATE_FIELDS)
            if estimate["low"] is not None: assert estimate["low"] <= estimate["value"] <= estimate["high"]
        for row in finding["rows"]: assert set(row) <= set(data["columns"])
    assert set().union(*(row for f in data["findings"] for row in f["rows"])) == set(data["columns"])
    assert data["used"]["seed"] == 0 and data["used"]["circuits"]["organism-a ioi"]["hash"] == small("organism-a", "ioi")[0].hash
    assert data["value"] == pytest.approx(np.mean([f["value"] for f in data["findings"]]), rel=1e-4)


@pytest.mark.parametrize("metric", [m for m in ALL if m is not convergent_evolution])
def test_the_model_is_left_as_it_was(metric):
    model = load_model("organism-c")
    before = model_hash(model)
    metric(model, ["ioi", "induction"], replace(QUICK, n_random=1), small("organism-c", "ioi", "induction"))
    assert model_hash(model) == before


@pytest.mark.parametrize("metric", [epistasis, chimera, phylogenetic_tracking])
def test_a_task_that_the_model_fails_is_refused_and_the_others_go_on(metric, monkeypatch):
    from circuit_generalization.tasks import make_prompts

    def exchanged(task, *arguments, **options):
        prompts = make_prompts(task, *arguments, **options)
        return replace(prompts, answers=prompts.distractors, distractors=prompts.answers) if task == "sva" else prompts

    monkeypatch.setattr("circuit_generalization.bench.make_prompts", exchanged)
    result = metric("organism-a", ["ioi", "sva"], QUICK)
    assert [f.tasks for f in result.findings] == [("ioi",)] and list(result.refused) == ["sva"] and "0% are right" in result.refused["sva"]
    alone = metric("organism-a", ["sva"], QUICK)
    assert not alone.findings and np.isnan(alone.value) and not alone.passed and json.loads(alone.to_json())["value"] is None


@pytest.mark.parametrize("arguments, said", [
    ((["ioi", "ioi"],), "tasks listed twice"), (([],), "no tasks"), ((["gendered"],), "no task 'gendered'"),
    ((["ioi"], ["organism-a-sva"]), "which is not among ioi"), ((["ioi"], ["organism-a-ioi", "organism-b-ioi"]), "a second circuit of task 'ioi'")])
def test_circuits_are_matched_with_tasks(arguments, said):
    with pytest.raises(InputError, match=said): circuits_for("organism-a", *arguments)


def test_circuits_may_be_given():
    own = replace(load_circuit("organism-a-ioi"), name="mine", nodes=load_circuit("organism-a-ioi").nodes[:2])
    result = epistasis("organism-a", ["ioi", "sva"], replace(QUICK, n_random=0), [own])
    k = len(load_circuit("organism-a-sva"))
    assert [len(f.rows) for f in result.findings] == [1, k * (k - 1) // 2] and result.used["circuits"]["organism-a ioi"]["name"] == "mine"
    with pytest.raises(InputError, match="no circuit comes with model 'compiled-ioi' and task 'sva'"):
        make_subjects("compiled-ioi", ["ioi", "sva"], QUICK)


@pytest.mark.parametrize("wrong, said", [
    (dict(n_prompts=0), "at least one"), (dict(n_random=-1), "give 0 for none"), (dict(positions="somewhere"), "no positions")])
def test_options_are_checked(wrong, said):
    with pytest.raises(InputError, match=said): Options(**wrong)


def test_positions_are_those_that_were_asked_for():
    given, model = load_circuit("organism-c-ioi"), load_model("organism-c")
    every, listed = (make_subject(model, "ioi", given, replace(QUICK, positions=p)) for p in ("all", "listed"))
    assert {n.positions for n in every.circuit.nodes} == {None} and listed.circuit == given == every.given == listed.given
    assert every.drops([every.heads]).mean() != pytest.approx(listed.drops([listed.heads]).mean(), rel=1e-3)
    nodes = [sorted((str(n.component.layer), n.positions) for n in c.nodes) for c in (given, listed.nulls(1, 0)[0])]
    assert nodes[0] == nodes[1] and listed.nulls(3, 0) != listed.nulls(3, 1) and listed.nulls(3, 1)[:2] == listed.nulls(2, 1)


def test_metrics_that_need_more_say_so():
    with pytest.raises(InputError, match="at least two, such as"): knock_in("organism-a", ["ioi"], QUICK)
    with pytest.raises(InputError, match="at least two tasks"): convergent_evolution("organism-a", ["ioi"], QUICK)
    two = ["organism-a", "organism-b"]
    with pytest.raises(InputError, match="goes with one model"): convergent_evolution(two, ["ioi"], QUICK, ["organism-a-ioi"])
    one = Circuit.from_components(["a0.h2"], task="ioi", name="one")
    for metric in (epistasis, chimera):
        with pytest.raises(InputError, match="needs two"): metric("organism-a", ["ioi"], QUICK, [one])
    with pytest.raises(InputError, match="no components"): epistasis("organism-a", ["ioi"], QUICK, [Circuit((), task="ioi", name="none")])


def test_few_templates_decide_nothing():
    few = replace(QUICK, n_prompts=6)
    assert epistasis("organism-a", ["ioi"], few).findings[0].verdict.startswith("not decidable: too few templates")
    assert chimera("organism-a", ["ioi"], few).findings[0].verdict.startswith("not decidable")
    assert phylogenetic_tracking("organism-a", ["ioi"], few).findings[0].verdict == "not decidable: too few templates"
    assert knock_in("organism-a", ["ioi", "induction"], few).findings[0].verdict.startswith("not decidable")


def test_p_values_are_adjusted_over_findings_of_one_kind():
    def some(p): return Estimate(1, p_value=p)
    a, b, c = adjusted([{"x:a": some(0.01), "y": some(0.5)}, {"x:b": some(0.04)}, {"x": some(0.9)}])
    assert [a["x:a"].p_adjusted, b["x:b"].p_adjusted, c["x"].p_adjusted, a["y"].p_adjusted] == pytest.approx([0.03, 0.06, 0.9, 0.5])


def e(low, high, p=0.01, n_null=99, value=0.5): return Estimate(value, low, high, p, p, 0.0, 0.1, n_null, "made up")


@pytest.mark.parametrize("judge, estimates, metadata, said", [
    (judge_epistasis, {"size": e(0.2, 0.4)}, {}, "coupled, more than random circuits"),
    (judge_epistasis, {"size": e(0.2, 0.4, p=0.2)}, {}, "coupled, but not shown"),
    (judge_epistasis, {"size": e(0.0, 0.4)}, {}, "not decidable: epsilon cannot be told"),
    (judge_epistasis, {"size": e(0.0, 0.04)}, {}, "additive"),
    (judge_epistasis, {"size": e(0.2, 0.4, n_null=0)}, {}, "coupled; no random circuits"),
    (judge_chimera, {"score": e(0.2, 0.4), "same_role": e(0.8, 1.1)}, {}, "modular"),
    (judge_chimera, {"score": e(-0.2, 0.2), "same_role": e(0.8, 1.1)}, {}, "entangled: with a foreign pattern"),
    (judge_chimera, {"score": e(-0.5, -0.2), "same_role": e(-0.8, 1.1)}, {}, "entangled: a foreign pattern is worse"),
    (judge_chimera, {"score": e(-0.5, 0.9), "same_role": e(-0.8, 1.1)}, {}, "not decidable"),
    (judge_chimera, {"score": e(0.2, 0.9, p=0.5), "same_role": e(-0.8, 1.1)}, {}, "foreign patterns give something back, but"),
    (judge_knock_in, {"rescue:a": e(0.3, 0.8), "rescue:b": e(0.1, 0.8, p=0.3)}, {}, "conserved: heads of one role rescue each other into a"),
    (judge_knock_in, {"rescue:a": e(-0.3, 0.8), "rescue:b": e(0.1, 0.8, p=0.3)}, {}, "rescued into b, but not shown"),
    (judge_knock_in, {"rescue:a": e(-0.3, 0.8), "rescue:b": e(np.nan, np.nan)}, {}, "not shown to be conserved"),
    (judge_knock_in, {"rescue:a": Estimate(np.nan, how="no role"), "rescue:b": Estimate(np.nan, how="no role")}, {}, "not decidable: no role"),
])
def test_verdicts_follow_from_the_estimates_alone(judge, estimates, metadata, said):
    passing = Finding(("t",), 99.0, True, "", estimates, metadata, [], {})
    assert judge(passing).startswith(said) and judge(replace(passing, value=-99.0, passed=False)) == judge(passing)


def test_homology_is_the_same_named_role_in_another_head():
    a, b, c = (Circuit.from_components(["a0.h1"], roles=[r]).nodes[0] for r in ("mover", "reader", "unnamed"))
    other = Circuit.from_components(["a0.h2"], roles=["mover"]).nodes[0]
    unnamed, no_role = (Circuit.from_components(["a0.h2"], roles=r).nodes[0] for r in (["unnamed"], None))
    assert homologous(a, other)
    for pair in ((a, a), (b, other), (c, unnamed), (no_role, no_role)): assert not homologous(*pair)


def test_a_result_has_one_table():
    result = epistasis("organism-a", ["ioi", "sva"], replace(QUICK, n_random=0))
    table = result.table()
    k = len(load_circuit("organism-a-sva"))
    assert isinstance(result, GeneticsResult) and len(table) == 28 + k * (k - 1) // 2 and set(table.tasks) == {"ioi", "sva"}
    assert set(table.columns) == set(GN2.columns) | {"tasks"} and GN3.code == "GN3" and genetics.FIELDS is FIELDS


# under the null every p-value is uniform

def blind(model, least_right):
    "Circuits that were drawn blindly, two at a time: what is true of one is true of all."
    shape = Circuit.from_components(["a0.h0", "a0.h1", "a1.h0", "a1.h1", "a2.h0"], roles=["r"] * 5, task="ioi")
    options = Options(n_prompts=18, n_random=19, ablation="counterfactual")
    subjects = [make_subject(model, task, replace(shape, task=task), options, least_right=least_right) for task in ("ioi", "sva")]
    rng = np.random.default_rng(11)

    def draw(i):
        circuits = [random_circuit(shape, 4, 8, rng) for _ in subjects]
        named = [replace(c, nodes=tuple(replace(n, role="r") for n in c.nodes)) for c in circuits]
        return *(replace(s, circuit=c) for s, c in zip(subjects, named)), replace(options, seed=1000 + i)

    return draw


def uniform(p_values):
    p = np.array([x for x in p_values if np.isfinite(x)])
    assert len(p) >= 30, f"only {len(p)} of {len(p_values)} are decided"
    jittered = p - np.random.default_rng(0).random(len(p)) / 20  # ranks of 20: spread each over its twentieth
    assert distributions.kstest(jittered, "uniform").pvalue > 0.005, p
    assert (p <= 0.1).mean() < 0.1 + 3 * np.sqrt(0.09 / len(p))


@pytest.mark.slow
@pytest.mark.parametrize("measure, name", [(epistasis_of, "size"), (tracking_of, "rise")])
def test_p_values_are_uniform_in_a_model_without_knowledge(measure, name):
    draw = blind(random_twin(load_model("organism-a"), seed=7, kind="shuffle"), least_right=0.0)
    found = []
    for i in range(40):
        first, _, options = draw(i)
        found.append(measure(first, options)[0].estimates[name].p_value)
    uniform(found)


@pytest.mark.slow
@pytest.mark.parametrize("measure, name, pair", [(chimera_of, "score", False), (knock_in_of, "rescue:ioi", True)], ids=["chimera", "knock-in"])
def test_p_values_are_uniform_where_circuits_are_drawn_blindly(measure, name, pair):
    "In a trained model: in one without knowledge hardly a head has an effect to give back, and nothing is decided (the next test)."
    draw, found = blind(load_model("organism-a"), least_right=0.9), []
    for i in range(40):
        first, second, options = draw(i)
        finding, _ = measure(first, second, options) if pair else measure(first, options)
        found.append(finding.estimates[name].p_value)
    uniform(found)


@pytest.mark.slow
def test_p_values_of_weights_and_of_profiles_are_not_too_small():
    "No model is run. Ranks of numbers with ties are above uniform, never below."
    draw, weights, profiles = blind(random_twin(load_model("organism-a"), seed=7, kind="shuffle"), least_right=0.0), [], {"layers": [], "density": []}
    for i in range(60):
        first, second, options = draw(i)
        rows = [dict(into=s.task, a=a.name, b=b.name, same_head=a.name == b.name) for s, t in ((first, second), (second, first))
                for a in s.heads for b in t.heads]
        weights.append(_weights(first, second, rows, replace(options, n_random=19))[1].p_value)
        pair = [Owner("m", s.task, Circuit.from_components([f"a{k // 8}.h{k % 8}" for k in np.random.default_rng([i, j]).choice(32, 6, False)]), 4, 8)
                for j, s in enumerate((first, second))]
        for name, found in profiles.items(): found.append(convergence_of(*pair, replace(options, n_random=99)).estimates[name].p_value)
    uniform(weights)
    for found in profiles.values():
        for alpha in (0.05, 0.1, 0.3): assert np.mean(np.array(found) <= alpha) <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / len(found))


@pytest.mark.slow
def test_without_knowledge_hardly_anything_is_decided():
    draw = blind(random_twin(load_model("organism-a"), seed=7, kind="shuffle"), least_right=0.0)
    rows = []
    for i in range(12):
        first, _, options = draw(i)
        rows += [r for r in chimera_of(first, replace(options, n_random=0))[0].rows if r["kind"] == "chimera"]
    assert np.mean([bool(r["why_not"]) for r in rows]) > 0.8


def test_pairs_are_all_there():
    circuit = load_circuit("organism-b-ioi")
    assert len(pairs_of(circuit)) == len(list(combinations(circuit.components, 2))) == 28


def test_what_a_metric_of_heads_leaves_out_is_said():
    mixed = Circuit.from_components(["a0.h2", "a1.h3", "m1"], task="ioi", universe="heads+mlps", name="mixed")
    heads = Circuit.from_components(["a0.h2", "a1.h3"], task="sva", name="heads")
    few = replace(QUICK, n_random=1)
    assert chimera("organism-a", ["ioi"], few, [mixed]).left_out == "MLPs: m1" == knock_in("organism-a", ["ioi", "sva"], few, [mixed, heads]).left_out
    assert convergent_evolution("organism-a", ["ioi", "sva"], few, [mixed, heads]).left_out == "MLPs: m1"
    whole = epistasis("organism-a", ["ioi"], few, [mixed])
    assert whole.left_out == "" and {r["b"] for r in whole.findings[0].rows} == {"a1.h3", "m1"}
    tracked = phylogenetic_tracking("organism-a", ["ioi"], few, [mixed]).findings[0].rows
    assert [r["heads"] for r in tracked] == [[], ["a0.h2"], ["a1.h3", "m1"], [], []]


def test_ties_are_no_victory():
    "A circuit of everything is every random circuit of its layers; single precision must not decide."
    whole = Circuit.from_components([f"a{layer}.h{h}" for layer in range(4) for h in range(8)], task="ioi", name="whole")
    few = replace(QUICK, n_random=8)
    for metric in (phylogenetic_tracking, epistasis):
        for e_ in metric("organism-a", ["ioi"], few, [whole]).findings[0].estimates.values(): assert np.isnan(e_.p_value) or e_.p_value == 1


def test_passes_of_refused_tasks_are_stated_too():
    given = ["organism-b-ioi", "organism-b-induction"]
    for metric in (epistasis, chimera):
        result = metric("organism-b@1000", ["ioi", "induction"], replace(QUICK, n_random=1), given)
        assert list(result.refused) == ["ioi"] and result.passes["stated"] == result.passes["edited"]
        assert result.notes == ("circuit organism-b-induction was found in other weights (organism-b) than those of organism-b@1000",)


@pytest.mark.parametrize("metric", [knock_in, epistasis, chimera, phylogenetic_tracking])
def test_noise_is_an_ablation_too(metric):
    options = Options(n_prompts=18, n_random=1, ablation="noise", n_draws=2)
    result = metric("organism-a", ["ioi", "induction"], options, small("organism-a", "ioi", "induction"))
    assert result.passes["stated"] == result.passes["edited"] and result.notes == ()


def test_the_same_model_twice_and_two_of_one_name(tmp_path):
    from circuit_generalization.models import embedded_models

    with pytest.raises(InputError, match="the same model"): convergent_evolution(["organism-a", "organism-a"], ["ioi"], QUICK)
    (tmp_path / "organism-a").symlink_to(embedded_models()["organism-b"])
    with pytest.raises(InputError, match="two models are called organism-a"):
        convergent_evolution(["organism-a", str(tmp_path / "organism-a")], ["ioi"], QUICK)
    note, = phylogenetic_tracking(str(tmp_path / "organism-a"), ["ioi"], replace(QUICK, n_random=0)).notes
    assert note == "circuit organism-a-ioi was found in other weights (organism-a) than those of organism-a"


def test_one_layer_has_no_order_and_roles_must_be_named():
    one = Circuit.from_components(["a0.h2", "a0.h7"], roles=["", ""], task="ioi", name="one layer")
    quick = replace(QUICK, n_random=2)
    assert phylogenetic_tracking("organism-a", ["ioi"], quick, [one]).findings[0].verdict == "no order: all of the circuit is in one layer"
    assert chimera("organism-a", ["ioi"], quick, [one]).findings[0].estimates["same_role"].how == "no two heads share a named role"
    other = Circuit.from_components(["a1.h3"], task="induction", name="other")
    assert knock_in("organism-a", ["ioi", "induction"], quick, [one, other]).findings[0].verdict == "not decidable: a circuit names no roles"


def test_few_templates_give_no_p_value_and_the_reason():
    few = replace(QUICK, n_prompts=6)
    for metric in (epistasis, phylogenetic_tracking, chimera, knock_in):
        for f in metric("organism-a", ["ioi", "induction"], few, small("organism-a", "ioi", "induction")).findings:
            for name, e_ in f.estimates.items(): assert np.isnan(e_.p_value) or name == "weights"
    assert chimera("organism-a", ["ioi"], few).findings[0].estimates["score"].how == "too few templates"
