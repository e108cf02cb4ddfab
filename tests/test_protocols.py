"""Protocols and their metrics where the truth is known: by construction, by an independent forward in NumPy, by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from scipy.stats import t as t_distribution

from circuit_generalization import interchange_accuracy, knockouts, protocols, transfers
from circuit_generalization.ablation import Ablation, Activations, capture
from circuit_generalization.bench import Bench
from circuit_generalization.circuit import Circuit, load_circuit, without
from circuit_generalization.compiled import compiled_circuit
from circuit_generalization.constructions import FIRST, SAID, SECOND, carried, part, two_routes
from circuit_generalization.convergent_evidence import RULES, convergent_evidence, verdicts_in
from circuit_generalization.dose_curves import area
from circuit_generalization.dose_response import (
    DOSES,
    POTENT,
    curves_of,
    dose_response,
    dose_response_of,
    effect_size,
    effect_size_of,
    judge_dose_response,
)
from circuit_generalization.errors import InputError
from circuit_generalization.exact_scores import as_prompt_set, compiled_prompts, decoy_circuit, numpy_forward
from circuit_generalization.forward import INPUTS, Edit
from circuit_generalization.genetics import ESTIMATE_FIELDS, FIELDS, FINDING_FIELDS, UNSPECIFIC, Estimate, Finding, Options, Subject, make_subject
from circuit_generalization.knockouts import (
    activation_patching,
    activation_patching_of,
    agreement_of_ablations,
    by_role,
    noise_of,
    role_ablation,
    sigma_ablation,
)
from circuit_generalization.mediation import (
    counted,
    direct_effects,
    edge_rows,
    expression,
    instruments_of,
    mediated,
    null_of_mediation,
    path_patching,
    random_readers,
    readers_of,
)
from circuit_generalization.models import as_bridge, load_model
from circuit_generalization.protocol_figures import plot_protocol
from circuit_generalization.protocols import (
    ASSAYS,
    CALIBRATIONS,
    PROTOCOL_FIELDS,
    PROTOCOLS,
    agreement_on_heads,
    conclude_doses,
    conclude_knockouts,
    conclude_mendelian,
    conclude_rescue,
    headline,
    kendall_w,
    reread,
    run_protocol,
)
from circuit_generalization.rescues import (
    corrupt_restore,
    corrupt_restore_behavioral,
    corrupt_restore_behavioral_of,
    corrupt_restore_of,
    judge_behaviour,
    recovery,
    restored,
)
from circuit_generalization.transfers import (
    common_part,
    cross_model_invariance,
    cross_task_transfer,
    cross_task_transfer_of,
    engagements,
    judge_transfer,
    matched,
    score_interval,
)

EXACT = Options(n_prompts=24, positions="listed", ablation="counterfactual", n_random=19)
QUICK = Options(n_prompts=12, n_random=4, n_draws=4)
PER_TASK = [activation_patching, sigma_ablation, role_ablation, corrupt_restore, corrupt_restore_behavioral, path_patching, dose_response,
            effect_size]


@pytest.fixture(scope="module")
def organism(): return load_model("organism-b")


@pytest.fixture(scope="module")
def small(organism):
    "A trained model's subject, for what needs uninformative prompts and enough templates."
    return make_subject(organism, "sva", load_circuit("organism-b-sva"), QUICK)


@pytest.fixture
def short_search(monkeypatch):
    "The subspace of a rescue is looked for among a quarter of the pairs and in one size: for claims that do not rest on it."
    for name, value in dict(N_TRAIN=16, N_VALIDATION=8, DIMS=(4,)).items(): monkeypatch.setattr(interchange_accuracy, name, value)


@pytest.fixture
def few_noises(monkeypatch):
    "For claims that do not rest on how much noise costs."
    monkeypatch.setattr(knockouts, "LEAST_NOISES", 2)


@pytest.fixture(scope="module")
def exact_prompts(): return compiled_prompts(6, seed=3)


@pytest.fixture(scope="module")
def subject(compiled, exact_prompts):
    return Subject("ioi", compiled_circuit(), Bench(compiled, as_prompt_set(exact_prompts), None, Ablation("counterfactual")))


def built(construction, compiled):
    "A construction as a model that reads text."
    bridge = as_bridge(construction.model())
    bridge.tokenizer, bridge.cfg.tokenizer_prepends_bos = compiled.tokenizer, compiled.cfg.tokenizer_prepends_bos
    return bridge


def numpy_ld(compiled_numbers, prompt, tokens, edits=()):
    last = numpy_forward(compiled_numbers, tokens, dict(edits))[0][-1]
    return float(last[prompt.answer] - last[prompt.distractor])


def edits_of(circuit, prompt, z, listed=True):
    return {(n.component.layer, n.component.head): (at := [prompt.positions[p] for p in n.positions] if listed else range(z.shape[2]),
                                                   z[n.component.layer, n.component.head][list(at)]) for n in circuit.nodes}


# against NumPy

def test_patching_in_both_directions_is_what_numpy_computes(subject, exact_prompts, compiled_numbers):
    bench, circuit = subject.bench, subject.circuit
    there, back = bench.lds([bench.mask(circuit)])[0], bench.exchanged()
    restored_ld, corrupt_ld = back.lds([back.mask(circuit)])[0], back.model_ld
    for i, p in enumerate(exact_prompts):
        clean, other = (numpy_forward(compiled_numbers, tokens)[1] for tokens in (p.clean, p.counterfactual))
        assert there[i] == pytest.approx(numpy_ld(compiled_numbers, p, p.clean, edits_of(circuit, p, other)), abs=2e-3)
        assert corrupt_ld[i] == pytest.approx(numpy_ld(compiled_numbers, p, p.counterfactual), abs=2e-3)
        assert restored_ld[i] == pytest.approx(numpy_ld(compiled_numbers, p, p.counterfactual, edits_of(circuit, p, clean)), abs=2e-3)


def test_rescue_lets_the_circuit_compute_from_what_is_broken(subject, exact_prompts, compiled_numbers):
    "Everything else is replaced; a name mover without S-inhibition says what it then says, not what it said."
    hole = without(subject.circuit, ["a1.h2", "a1.h5"])
    found = restored(subject, [subject.circuit, hole])
    for i, p in enumerate(exact_prompts):
        other, n = numpy_forward(compiled_numbers, p.counterfactual)[1], len(p.clean)
        for circuit, got in zip((subject.circuit, hole), found[:, i]):
            kept = {(x.component.layer, x.component.head): {p.positions[q] for q in x.positions} for x in circuit.nodes}
            edits = {key: (rest := [q for q in range(n) if q not in kept.get(key, ())], other[key][rest]) for key in np.ndindex(*other.shape[:2])}
            assert got == pytest.approx(numpy_ld(compiled_numbers, p, p.clean, edits), abs=2e-3)


def test_dose_curves_are_what_numpy_computes(subject, exact_prompts, compiled_numbers):
    "Heads of one layer, so a dose is a mixture of two known outputs."
    for layer in (0, 1, 2):
        circuit = replace(subject.circuit, nodes=tuple(n for n in subject.circuit.nodes if n.component.layer == layer), edges=None)
        got = curves_of(subject, [circuit])[0]
        assert np.array_equal(got[0], np.zeros(len(exact_prompts)))
        for i, p in enumerate(exact_prompts[:3]):
            clean, other = (numpy_forward(compiled_numbers, tokens)[1] for tokens in (p.clean, p.counterfactual))
            for dose, value in zip(DOSES, got[:, i]):
                mixed = edits_of(circuit, p, (1 - dose) * clean + dose * other)
                assert value == pytest.approx(numpy_ld(compiled_numbers, p, p.clean) - numpy_ld(compiled_numbers, p, p.clean, mixed), abs=5e-3)


def test_behaviour_is_that_of_all_tokens(subject, exact_prompts, compiled_numbers):
    bench = subject.bench
    first, probability = bench.behaviour([bench.mask(replace(subject.circuit, nodes=())), bench.universe])
    for i, p in enumerate(exact_prompts):
        last = numpy_forward(compiled_numbers, p.clean)[0][-1]
        assert first[0, i] == (last.argmax() == p.answer)
        assert probability[0, i] == pytest.approx(np.exp(last[p.answer] - np.logaddexp.reduce(last)), abs=1e-3)


def test_patching_is_reported_in_both_directions(subject):
    bench, back, whole = subject.bench, subject.bench.exchanged(), subject.ld - subject.bench.exchanged().model_ld
    found = activation_patching_of(subject, Options(n_random=2))[0]
    assert found.estimates["knockout"].value == pytest.approx((subject.ld - bench.ld(bench.mask(subject.circuit))).mean() / whole.mean())
    assert found.estimates["restoration"].value == pytest.approx((back.ld(back.mask(subject.circuit)) - back.model_ld).mean() / whole.mean())
    one = Circuit.from_components(["a2.h0"])
    row = next(r for r in found.rows if r["head"] == "a2.h0")
    assert row["share"] == pytest.approx((subject.ld - bench.ld(bench.mask(one))).mean() / whole.mean())
    assert row["restored"] == pytest.approx((back.ld(back.mask(one)) - back.model_ld).mean() / whole.mean())


def test_a_role_is_left_out_and_left_alone(subject):
    rows = corrupt_restore_of(subject, Options(n_random=2))[0].rows
    whole = subject.ld - subject.bench.ablated_ld
    for row, (role, nodes) in zip(rows, by_role(subject.circuit).items(), strict=True):
        lacking, alone = restored(subject, [without(subject.circuit, row["heads"]), replace(subject.circuit, nodes=nodes, edges=None)])
        assert row["role"] == role and row["heads"] == [n.name for n in nodes]
        for name, ld in (("share", lacking), ("alone", alone)):
            assert row[name] == pytest.approx((ld - subject.bench.ablated_ld).mean() / whole.mean())


def test_noise_in_a_head_costs_what_it_costs_among_others(subject):
    silent, names = subject.bench.donors[0], ("a2.h0", "a1.h2", "a0.h1")
    clean = Activations(torch.zeros_like(silent.z) + 1, silent.mlp)
    noises = [noise_of(clean, silent, np.random.default_rng(d)) for d in range(2)]
    def cost(*names):
        circuit = Circuit.from_components(list(names))
        return knockouts._titration(replace(subject, circuit=circuit), noises, [circuit])[2]
    assert cost(*names) == pytest.approx(np.concatenate([cost(n) for n in sorted(names)]), abs=1e-4)


def test_the_null_beside_a_level_of_noise(small, few_noises):
    options = replace(QUICK, n_random=3)
    found = knockouts.sigma_ablation_of(small, options)[0]
    clean = capture(small.model, small.bench.prompts.tokens, small.circuit.universe)
    noise = noise_of(clean, small.bench.with_ablation(Ablation("mean")).donors[0], np.random.default_rng([options.seed, 0]))
    random = [small.bench.mask(c) for c in knockouts.heads_with_nulls(small, options)[1:]]
    for row in found.rows[:len(knockouts.SIGMAS)]:
        lds = small.bench.lds_under([Edit(mask, noise, dose=row["sigma"], adds=True) for mask in random])
        lost = (small.ld - lds).mean(1) / small.ld.mean()
        assert (row["null_mean"], row["null_95"]) == pytest.approx((lost.mean(), np.quantile(lost, 0.95)), abs=1e-5)


def test_a_whole_layer_has_no_null(organism):
    names = [f"a0.h{h}" for h in range(8)]
    circuit = Circuit.from_components([*names, "a1.h0"], roles=dict.fromkeys(names, "all") | {"a1.h0": "one"}, name="layer", task="sva")
    rows = role_ablation(organism, ["sva"], QUICK, [circuit]).findings[0].rows
    assert {r["role"]: np.isfinite(r["null_p"]) for r in rows if r["kind"] == "role"} == {"all": False, "one": True}


def test_behaviour_of_random_circuits_is_counted_from_what_is_broken(small):
    found = corrupt_restore_behavioral_of(small, replace(QUICK, n_random=2))[0].estimates["probability"]
    bench, nulls = small.bench, small.nulls(2, QUICK.seed)
    nothing = bench.universe & ~bench.universe
    _, (intact, broken, *others) = bench.behaviour([nothing, bench.universe, *(bench.universe & ~bench.mask(c) for c in nulls)])
    assert found.n_null == 2 and found.null_mean == pytest.approx(np.mean([(o - broken).mean() for o in others]) / (intact - broken).mean())


def test_sizes_and_doses_are_those_of_the_circuit_and_of_random_ones(small):
    size = effect_size_of(small, replace(QUICK, n_random=0))[0]
    lost, = small.drops([small.circuit.nodes])
    scatter = np.sqrt((small.ld.var(ddof=1) + (small.ld - lost).var(ddof=1)) / 2)
    assert size.value == pytest.approx(lost.mean() / scatter) and size.value > 0
    curve = dose_response_of(small, replace(QUICK, n_random=2))[0]
    lost = small.drops([c.nodes for c in small.nulls(2, QUICK.seed)]).mean() / small.ld.mean()
    assert curve.rows[-1]["null_mean"] == pytest.approx(lost, abs=1e-5) == curve.estimates["full_dose"].null_mean and lost > 0.01
    assert curve.estimates["area"].null_mean == pytest.approx(area(DOSES, [r["null_mean"] for r in curve.rows]))


def test_uninformative_prompts_are_made_once(organism):
    bench = make_subject(organism, "sva", load_circuit("organism-b-sva"), replace(QUICK, ablation="zero")).bench
    mean, resample = (bench.with_ablation(Ablation(kind, 2)) for kind in ("mean", "resample"))
    assert bench.reference is None and mean.reference is resample.reference is bench.pool
    assert mean.with_ablation(Ablation("resample", 2)).reference is mean.reference


def test_what_comes_before_a_reader_is_in_an_earlier_layer(subject):
    direct = np.array([np.full(6, 9.0 * (n.name == "a1.h2")) for n in subject.heads])
    readers, upstream = readers_of(subject, direct)
    assert [n.name for n in readers] == ["a1.h2"] and {n.name for n in upstream} == {"a0.h1", "a0.h6"}
    same_layer = tuple(n for n in subject.heads if n.name in ("a0.h1", "a1.h5"))
    rows, passes = edge_rows(subject, readers, same_layer, direct)
    assert [(r["instrument"], r["receiver"]) for r in rows[:-len(direct)]] == [("a0.h1", f"a1.h2.{x}") for x in INPUTS] and passes == len(INPUTS) * 6


def test_freezing_what_has_no_part_stops_nothing(subject):
    readers, upstream = readers_of(subject, direct_effects(subject))
    found, options = instruments_of(subject, readers, upstream)[0], Options(n_random=8)
    null, _ = null_of_mediation(subject, readers, upstream, found, options)
    frozen = [{n.name for n in random_readers(readers, upstream, 8, np.random.default_rng([options.seed, i]))} for i in range(8)]
    idle = [share for share, names in zip(null, frozen) if not names & set(subject.circuit.components)]
    assert idle and idle == pytest.approx([0] * len(idle), abs=0.05)


# by hand

def test_noise_is_as_strong_as_the_signal_and_none_where_there_is_none():
    clean, silent = torch.zeros(2, 3, 1, 2, 64), torch.zeros(2, 3, 1, 2, 64)
    clean[..., 0, :], silent[..., 0, :] = 5.0, 2.0  # a signal of 3; the other head has none
    noise = noise_of(Activations(clean), Activations(silent), np.random.default_rng(0)).z
    assert noise[..., 1, :].abs().max() == 0 and noise[..., 0, :].std() == pytest.approx(3, rel=0.1)


def test_expression_is_one_clean_and_zero_ablated_and_linear_between():
    clean, ablated = torch.tensor([[3.0, 5.0], [2.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    direction = torch.tensor([[1.0, 0.0], [2.0, 0.0]])  # the second feature does not bear on the answer
    for share in (0.0, 0.25, 1.0, 2.0):
        found = expression(torch.lerp(ablated, clean, share), clean, ablated, direction)
        assert found == pytest.approx(np.full(2, share))
    other = expression(ablated + torch.tensor([[0.0, 9.0], [0.0, 9.0]]), clean, ablated, direction)
    assert np.allclose(other, 0)
    with pytest.raises(InputError, match="does not bear on the answer"): expression(clean, clean, ablated, 0 * direction)


def test_leaks_of_opposite_signs_do_not_make_up_for_each_other():
    rng, templates = np.random.default_rng(0), [str(i % 10) for i in range(40)]
    outcomes = np.array([-2 + 0.1 * rng.normal(size=40), -4 + 0.1 * rng.normal(size=40)])
    sizes = outcomes.mean(1, keepdims=True)
    for signs in ((1, 1), (1, -1), (-1, -1)):
        leaks = np.array(signs)[:, None] * np.array([[0.5], [0.25]]) * outcomes / outcomes.mean(1, keepdims=True) * sizes
        found = mediated(outcomes, leaks, templates)
        assert found.estimate == pytest.approx(1 - (0.5 + 0.25) / 2, abs=1e-6) and found.low <= found.estimate <= found.high
    assert counted(np.array([[0.05, 0.05], [-1.0, 0.0]]), np.array([1.0, 1.0])) == [1]


def test_a_recovery_of_all_prompts_has_an_interval():
    found = recovery(np.ones(40), np.ones(40), [str(i % 10) for i in range(40)])
    assert found.estimate == 1 and 0.6 < found.low < 0.85 and found.high == pytest.approx(2 - found.low)


def test_the_score_of_a_set_of_prompts():
    ld, none = np.array([4.0, 8.0]), np.array([0.0, 2.0])
    assert common_part(ld, none, np.array([4.0, 5.0]), np.array([1.0, 1.0])) == pytest.approx((0.7, 1.0, 0.7))
    assert common_part(ld, none, np.array([6.0, 8.0]), np.array([1.0, 1.0])) == pytest.approx((1.2, 1.0, 0.8))
    few = score_interval(ld, none, ld, none, ["a", "b"])
    assert few.estimate == 1 and np.isnan(few.low) and few.method == "too few templates"


def test_the_interval_of_a_score_written_out():
    rng, templates = np.random.default_rng(0), np.repeat(np.arange(10), np.arange(1, 11))
    ld, ablated, alone, lacking = (level + rng.normal(size=55) for level in (6, 0, 4, 1))
    found, scores = score_interval(ld, ablated, alone, lacking, templates.tolist(), seed=2, n_boot=50), []
    for drawn in np.random.default_rng(2).integers(0, 10, (50, 10)):
        rows = np.concatenate([np.flatnonzero(templates == t) for t in drawn])
        scores.append(common_part(ld[rows], ablated[rows], alone[rows], lacking[rows])[2])
    tail = norm.cdf(-np.sqrt(10 / 9) * t_distribution.ppf(0.975, 9))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(scores, [tail, 1 - tail])))
    sunk = np.where(templates == 9, ld + 20, ablated)  # in one template ablation helps a lot
    lost = score_interval(ld + 5, sunk, alone, lacking, templates.tolist())
    assert np.isnan(lost.low) and "in some draws" in lost.method


def test_agreement_of_rankings_by_hand():
    assert kendall_w(np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3]])) == pytest.approx(1)
    assert kendall_w(np.array([[1.0, 2, 3], [3, 2, 1]])) == pytest.approx(0)
    assert kendall_w(np.array([[1.0, 1, 2], [1, 1, 2]])) == pytest.approx(1)  # ties
    assert np.isnan(kendall_w(np.array([[1.0, 1, 1], [2, 2, 2]])))


# the truth by construction

def test_the_whole_circuit_is_necessary_and_restores(compiled, short_search):
    kh, re = (run_protocol(p, compiled, ["ioi"], EXACT, calibrate=False).verdicts[0] for p in ("knockout-hierarchy", "rescue-experiment"))
    assert kh["said"]["activation_patching"].startswith("passes") and kh["said"]["role_ablation"] == "passes"
    assert kh["said"]["sigma_ablation"] == "fails" and kh["verdict"].startswith("partial: necessary only at full removal")  # its heads come in twos
    assert kh["criteria"] == {"I1": "met, not specific", "E7": "not met"}
    assert "the deficit is specifically reversible" in re["verdict"] and not re["verdict"].startswith("fails") and re["criteria"]["I2"] == "met"


def test_a_circuit_with_a_hole_is_necessary_and_does_not_rescue(compiled, short_search):
    hole = replace(compiled_circuit(["duplicate token", "name mover"]), name="hole")
    results = [run_protocol(p, compiled, ["ioi"], EXACT, [hole], calibrate=False) for p in ("knockout-hierarchy", "rescue-experiment")]
    kh, re = (r.verdicts[0] for r in results)
    assert kh["criteria"]["I1"].startswith("met") and re["verdict"].startswith("fails") and re["criteria"]["I2"] == "not met"
    pasted = results[1].constituents["corrupt_restore"].findings[0]
    assert pasted.value > 1 and pasted.passed and pasted.verdict == "fails"  # the lens's value cannot see the hole
    rule = convergent_evidence([r.to_dict() for r in results])[0]
    assert rule["rule"] == "necessary but not reversible" and rule["holds"] and "cascading disruption" in rule["says"]


def test_one_of_each_pair_is_redundant(compiled, short_search):
    spare = replace(without(compiled_circuit(), ["a0.h6", "a1.h5", "a2.h4", "a3.h3"]), name="spare")
    kh, re = (run_protocol(p, compiled, ["ioi"], EXACT, [spare], calibrate=False).verdicts[0] for p in ("knockout-hierarchy", "rescue-experiment"))
    assert kh["verdict"].startswith("fails: knocked out as a whole") and kh["criteria"]["I1"] == "not met"
    assert re["criteria"]["I2"].startswith("met")  # it restores what it is not needed for


def test_decoys_are_neither(compiled, short_search):
    kh, re = (run_protocol(p, compiled, ["ioi"], EXACT, [replace(decoy_circuit(), name="decoys")], calibrate=False).verdicts[0]
              for p in ("knockout-hierarchy", "rescue-experiment"))
    assert kh["verdict"].startswith("fails") and re["verdict"].startswith("fails")


def test_an_instrument_that_reaches_the_answer_by_another_route_is_caught(compiled):
    "Of two routes one is claimed: the share that the formula gives the other goes around it."
    construction = two_routes(1.0, 1.0, lengthens=0.0)
    half, both = (replace(part(construction.heads, *names), task="ioi", name="claim") for names in (FIRST, FIRST + SECOND))
    caught, passed = (path_patching(built(construction, compiled), ["ioi"], EXACT, [c]) for c in (half, both))
    rows = {r["instrument"]: r for r in caught.findings[0].rows if r["kind"] == "instrument"}
    share = carried(SAID) / carried(2 * SAID)  # of LD that the claimed route gives by itself
    assert rows["counterfactual prompt"]["leak"] == pytest.approx(1 - share, abs=0.06)
    assert caught.findings[0].verdict.endswith("the exclusion restriction is violated by counterfactual prompt")
    assert passed.findings[0].verdict.startswith("passes") and passed.value > 0.9 and "violated" not in passed.findings[0].verdict
    quiet_route = two_routes(0.8, 2.0, lengthens=0.0)
    claim = replace(part(quiet_route.heads, *FIRST), task="ioi", name="claim")
    verdict = run_protocol("mendelian-randomization", built(quiet_route, compiled), ["ioi"], EXACT, [claim], calibrate=False).verdicts[0]
    assert verdict["verdict"].startswith("fails: the exclusion restriction is violated") and verdict["criteria"]["I9"] == "not met"
    some = run_protocol("mendelian-randomization", built(construction, compiled), ["ioi"], EXACT, [half], calibrate=False).verdicts[0]
    assert some["verdict"].startswith("partial") and "the exclusion restriction is violated by" in some["verdict"]
    assert some["criteria"]["I9"] == "not met"
    reading = {r["instrument"]: r["exclusion"] for r in caught.findings[0].metadata["mendelian"]["rows"]}
    assert reading["counterfactual prompt"] == "leaks"


def test_a_transfer_that_exists_and_one_that_does_not(compiled):
    "The same prompts under two names: the true circuit serves both, decoys neither."
    true = make_subject(compiled, "ioi", compiled_circuit(), EXACT)
    other = Subject("other", decoy_circuit(), true.bench)
    finding, _ = cross_task_transfer_of(true, other, EXACT)
    finding = replace(finding, estimates={k: replace(e, p_adjusted=e.p_value) for k, e in finding.estimates.items()})
    assert finding.estimates["transfer:other"].value > 0.8 and finding.estimates["transfer:ioi"].value < 0.1
    assert judge_transfer(finding).startswith("passes one way (onto ioi: fails; onto other: passes")
    assert {e.n_null for e in finding.estimates.values()} == {19}


def test_a_graded_response_and_a_switch(compiled):
    "Movers fade by the formula as they are diluted; S-inhibition heads turn the movers' attention over at once."
    construction = two_routes(1.0, 1.0, lengthens=0.0)
    model = built(construction, compiled)
    claims = [replace(part(construction.heads, *names), task="ioi", name="claim") for names in (("a2.h0", "a2.h4"), ("a1.h2", "a1.h5"))]
    graded, switch = (dose_response(model, ["ioi"], replace(EXACT, n_prompts=40), [c]).findings[0] for c in claims)
    left = [carried(2 * SAID * (1 - dose)) / carried(2 * SAID) for dose in DOSES]
    assert np.allclose([r["share"] for r in graded.rows], 1 - np.array(left), atol=0.05)
    doses = np.linspace(0, 1, 1001)
    half = float(np.interp(0.5, 1 - carried(2 * SAID * (1 - doses)) / carried(2 * SAID), doses))
    assert graded.verdict.startswith("potent") and graded.estimates["half_dose"].value == pytest.approx(half, abs=0.04)
    assert switch.verdict.startswith("potent") and switch.metadata["fit"]["slope"] > 4 * graded.metadata["fit"]["slope"]
    assert "between the doses around it" in switch.verdict and switch.metadata["fit"]["ec50"] > 0.8
    assert switch.metadata["harmless_up_to"] >= 0.7 > graded.metadata["harmless_up_to"]


def test_a_response_that_falls_is_called_non_monotone(compiled):
    negative = replace(compiled_circuit(["negative mover"]), name="negative")
    result = run_protocol("dose-response", compiled, ["ioi"], EXACT, [negative], calibrate=False)
    assert result.verdicts[0]["verdict"].startswith("non-monotonic") and result.verdicts[0]["criteria"]["E2"] == "not met"


def test_a_description_finds_its_own_heads(compiled):
    prompts = make_subject(compiled, "ioi", compiled_circuit(), EXACT).bench.prompts
    found, rows = matched(compiled_circuit(["duplicate token", "name mover"]), 4, compiled, prompts)
    assert {r["guest"] for r in rows if r["role"] == "duplicate token"} == {r["host"] for r in rows if r["role"] == "duplicate token"}
    assert all(not r["why_not"] for r in rows) and len(found) == 4
    silent = Circuit.from_components(["a0.h1"], roles={"a0.h1": "mystery"})
    nothing, rows = matched(silent, 4, compiled, prompts)
    assert not len(nothing) and "does not say" in rows[0]["why_not"]
    assert np.isnan(engagements(compiled, silent.nodes, prompts)).all()


def test_of_heads_that_read_alike_the_one_at_the_same_depth_fits(compiled, monkeypatch):
    monkeypatch.setattr(transfers, "engagements", lambda model, nodes, prompts: np.full((len(nodes), 4, 8), 0.5))
    described = Circuit.from_components(["a0.h1", "a1.h2", "a2.h3"])  # in a model of three layers
    rows = matched(described, 3, compiled, as_prompt_set(compiled_prompts(2)))[1]
    assert [r["depth_guest"] for r in rows] == [0, 0.5, 1] and [r["depth_host"] for r in rows][::2] == [0, 1]
    assert rows[1]["depth_host"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_frozen_random_heads_are_never_the_instruments(subject):
    readers, upstream = readers_of(subject, direct_effects(subject))
    assert {n.name for n in readers} == {"a2.h0", "a2.h4", "a3.h3"} and {n.name for n in upstream} == {"a0.h1", "a0.h6", "a1.h2", "a1.h5"}
    crowd = tuple(n for n in upstream if n.component.layer == 1)
    for seed in range(20):
        drawn = random_readers(crowd, crowd, 8, np.random.default_rng(seed))
        assert len(drawn) == 2 and not {n.name for n in drawn} & {n.name for n in crowd}


def test_freezing_the_readers_stops_every_instrument(subject):
    readers, upstream = readers_of(subject, direct_effects(subject))
    found, _ = instruments_of(subject, readers, upstream)
    whole = list(found.names).index("all of them")
    assert found.exposures[whole].mean() == pytest.approx(-1, abs=0.05) and found.outcomes[whole].mean() < -3
    assert np.abs(found.leaks[whole]).max() < 0.2 * np.abs(found.outcomes[whole]).min()


# rules

STATES = ("passes", UNSPECIFIC, "fails", "not decidable: few")


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda p: p.code)
def test_rules_have_a_word_for_every_pattern(protocol):
    for words in np.array(np.meshgrid(*[STATES] * 3)).reshape(3, -1).T:
        verdict = protocol.conclude(dict(zip(protocol.assays, map(str, words))))
        assert verdict.split(":")[0].split(",")[0] in ("passes", "partial", "fails", "not decidable", "monotonic", "non-monotonic"), (words, verdict)


def test_the_patterns_of_the_lens():
    kh = dict(activation_patching="passes", sigma_ablation="passes", role_ablation="passes")
    assert conclude_knockouts(kh).startswith("passes: necessary at every strength")
    assert conclude_knockouts(kh | dict(sigma_ablation="fails")).startswith("partial: necessary only at full removal")
    assert conclude_knockouts(kh | dict(activation_patching="fails")).startswith("fails")
    assert "Open: role_ablation" in conclude_knockouts(kh | dict(sigma_ablation="fails", role_ablation="not decidable: few"))
    assert conclude_rescue(dict(corrupt_restore=UNSPECIFIC, corrupt_restore_behavioral="passes",
                                das_iia="passes")).startswith("passes: the deficit is rev")
    assert conclude_knockouts(kh | dict(role_ablation="not decidable: few")) == "not decidable: role_ablation not decidable: few"
    assert conclude_knockouts(kh | dict(role_ablation=UNSPECIFIC)).endswith("which would single the circuit out: role_ablation")
    re = dict(corrupt_restore="passes", corrupt_restore_behavioral="passes", das_iia="passes; found: x")
    assert conclude_rescue(re).startswith("passes: the deficit is specifically reversible; and a subspace")
    assert conclude_rescue(re | dict(corrupt_restore_behavioral="fails")).startswith("partial: LD comes back, but the behaviour does not")
    assert conclude_rescue(re | dict(das_iia="fails: illusion")).startswith("partial")
    assert conclude_rescue(re | dict(corrupt_restore="fails")).startswith("fails")
    assert conclude_rescue(re | dict(corrupt_restore="not decidable: few", corrupt_restore_behavioral="fails")).startswith("not decidable: corrupt")
    mr = dict(path_patching="passes", cross_task_transfer="passes", cross_model_invariance="passes")
    assert conclude_mendelian(mr).startswith("passes: strong causal mediation evidence")
    assert "task-specific" in conclude_mendelian(mr | dict(cross_task_transfer="fails"))
    assert conclude_mendelian(mr | dict(path_patching="fails")).startswith("fails: the exclusion restriction is violated")
    assert conclude_mendelian(mr | dict(path_patching="not decidable: few")) == "not decidable: path_patching not decidable: few"
    assert "Open: cross_model_invariance" in conclude_mendelian(mr | dict(cross_model_invariance="not decidable: one model"))
    dr = dict(dose_response="potent and selective; half of the effect at dose 0.30", sigma_ablation="passes", effect_size="passes")
    assert conclude_doses(dr).startswith("monotonic: potent and selective")
    assert conclude_doses(dr | dict(dose_response="non-monotone: it falls")).startswith("non-monotonic: complex dynamics")


@pytest.mark.parametrize("full, fall, area, said", [
    ((0.9, 0.8, 1.0), 0.5, 0.01, "potent and selective"), ((0.9, 0.8, 1.0), 0.5, 0.5, "potent, not shown to be selective"),
    ((0.3, 0.2, 0.4), 0.5, 0.01, "weak target"), ((0.5, 0.4, 0.6), 0.5, 0.01, "not decidable: the interval of the full dose holds"),
    ((0.9, 0.8, 1.0), 0.01, 0.01, "non-monotone"), ((0.9, 0.8, 1.0), 0.05, 0.01, "non-monotone"),
    ((0.9, 0.8, 1.0), 0.5, 0.05, "potent and selective")])
def test_readings_of_a_dose_response(full, fall, area, said):
    estimates = dict(full_dose=Estimate(*full), monotonicity=Estimate(1.0, p_adjusted=fall), area=Estimate(0.5, p_adjusted=area, n_null=99),
                     ec50=Estimate(0.4, 0.3, 0.5), half_dose=Estimate(0.4, 0.3, 0.5))
    finding = Finding(("t",), 1.0, True, "", estimates, dict(fall=0.1, fall_from=0.2), [], {})
    assert judge_dose_response(finding).startswith(said) and POTENT == 0.5
    if said != "potent and selective": return
    for n, few in ((19, False), (18, True)):
        drawn = replace(finding, estimates=estimates | dict(area=replace(estimates["area"], n_null=n)))
        assert ("too few random circuits" in judge_dose_response(drawn)) is few


def between(low, high, p=0.01): return Estimate((low + high) / 2, low, high, p, p, n_null=99)


HIGH, MIDDLE, LOW, COMMON = between(0.8, 1.0), between(0.5, 0.7), between(0.1, 0.3), between(0.8, 1.0, p=0.5)


@pytest.mark.parametrize("accuracy, probability, said", [
    (HIGH, HIGH, "passes"), (HIGH, LOW, "fails"), (LOW, HIGH, "fails"), (MIDDLE, HIGH, "not decidable"), (MIDDLE, LOW, "fails"),
    (HIGH, COMMON, UNSPECIFIC), (COMMON, HIGH, UNSPECIFIC)])
def test_behaviour_is_as_good_as_the_worse_of_two(accuracy, probability, said):
    verdict = judge_behaviour(Finding(("t",), 1.0, True, "", dict(accuracy=accuracy, probability=probability), {}, [], {}))
    assert verdict == said or (said == "not decidable" and verdict.startswith(said))


def found(verdict="", tasks=("a",), metadata=None, **estimates): return Finding(tasks, 1.0, True, verdict, estimates, metadata or {}, [], {})


@pytest.mark.parametrize("a, b, said", [
    (HIGH, HIGH, "passes ("), (HIGH, LOW, "passes one way ("), (MIDDLE, HIGH, "passes ("), (COMMON, LOW, "fails ("), (COMMON, COMMON, "fails ("),
    (between(0.3, 0.5), LOW, "fails ("), (between(0.3, 0.5), between(0.3, 0.5), "not decidable ("), (between(0.3, 0.5), HIGH, "passes one way (")])
def test_a_transfer_is_judged_in_both_directions(a, b, said):
    assert judge_transfer(found(tasks=("a", "b"), **{"transfer:a": a, "transfer:b": b})).startswith(said)


def test_a_task_is_told_what_its_own_circuit_does_elsewhere():
    pairs = [found("x", ("a", "b"), **{"transfer:a": LOW, "transfer:b": HIGH}), found("y", ("c", "a"), **{"transfer:a": LOW, "transfer:c": LOW})]
    def said(task, some=pairs): return protocols._said("cross_task_transfer", some, task)
    assert said("a") == "passes: a and b: x; c and a: y"  # one is enough, and what others do on its prompts is not asked
    assert said("b", pairs[:1]).startswith("fails") and said("a", []).startswith("not decidable: it needs a second task")
    models = [found(v, metadata=dict(models=["m", n])) for v, n in (("passes", "n"), ("fails", "o"))]
    assert protocols._said("cross_model_invariance", models, "a") == "fails: m in n: passes; m in o: fails"  # all are needed


def test_another_training_is_not_another_architecture():
    def said(*findings): return protocols._other_architecture([found(v, metadata=dict(cross_architecture=other)) for v, other in findings])
    assert said(("passes", False)) == said() == "not decidable" and said(("fails", False), ("passes", True)) == "met"
    assert said(("passes", True), ("fails", True)) == said((UNSPECIFIC, True)) == "not met"
    assert said(("passes", True), ("not decidable: few", True)) == "not decidable"


@pytest.mark.parametrize("iia, gain, check, said", [
    (HIGH, HIGH, "read where it moves", "passes; found: which answer"), (HIGH, HIGH, "illusion", "fails: illusion"),
    (HIGH, between(-0.1, 0.2), "mixed", "not decidable: not found"), (LOW, HIGH, "read where it moves", "fails; found"),
    (between(0.6, 0.8), HIGH, "read where it moves", "not decidable: the interval holds 0.7; found")])
def test_an_interchange_passes_if_it_is_no_illusion(iia, gain, check, said):
    metadata = dict(site="a0.h1", k=2, dormancy=dict(verdict=check))
    assert protocols.judge_interchange(found(metadata=metadata, iia=iia, gain=gain, over_random_weights=HIGH)).startswith(said)


def test_heads_ranked_alike_by_all_are_not_so_by_chance():
    shares = dict(zip("abcdef", (0.1, 0.5, 0.2, 0.9, 0.3, 0.0)))
    rows = {"activation_patching": [dict(head=h, share=s, in_circuit=True) for h, s in shares.items()],
            "sigma_ablation": [dict(kind="head", head=h, share=2 * s) for h, s in shares.items()],
            "role_ablation": [dict(kind="head", heads=[h], share=s**2) for h, s in shares.items()]}
    agreement = agreement_on_heads({name: replace(found(), rows=r) for name, r in rows.items()})
    assert agreement["w"] == pytest.approx(1) and agreement["p_value"] == 1 / 1000 and agreement["heads"] == list("abcdef")
    few = agreement_on_heads({name: replace(found(), rows=r[:2]) for name, r in rows.items()})
    assert np.isnan(few["w"]) and few["how"] == "fewer than three heads to rank"


# every metric, every protocol

@pytest.mark.parametrize("metric", PER_TASK, ids=lambda m: m.__name__)
def test_a_metric_states_its_passes_and_documents_its_rows(metric, organism, few_noises):
    result = metric(organism, ["sva"], QUICK)
    data = json.loads(result.to_json())
    assert result.passes["stated"] == result.passes["edited"] and list(data) == list(FIELDS)
    first = data["findings"][0]
    assert list(first) == list(FINDING_FIELDS) and all(list(e) == list(ESTIMATE_FIELDS) for e in first["estimates"].values())
    assert first["rows"] and all(set(r) == set(data["columns"]) for r in first["rows"])
    assert all(len(v) == 12 for v in first["per_prompt"].values())
    assert metric(organism, ["sva"], QUICK).to_json() == result.to_json()
    none = metric(organism, ["sva"], replace(QUICK, n_random=0))
    assert all(e.n_null == 0 for e in none.findings[0].estimates.values())


@pytest.mark.parametrize("positions, ablation", [("listed", "resample"), ("listed", "zero"), ("all", "noise")])
@pytest.mark.parametrize("metric", PER_TASK, ids=lambda m: m.__name__)
def test_a_metric_takes_every_option(metric, positions, ablation, organism, few_noises):
    options = replace(QUICK, positions=positions, ablation=ablation, n_draws=2)
    result = metric(organism, ["sva"], options)
    assert result.passes["stated"] == result.passes["edited"] and result.used["ablation"] == ablation


def test_metrics_that_compare_state_their_passes(organism):
    transfer, models = cross_task_transfer(organism, ["sva", "ioi"], QUICK), cross_model_invariance(["organism-a", organism], ["sva"], QUICK)
    for result in (transfer, models):
        assert result.passes["stated"] == result.passes["edited"]
        data = json.loads(result.to_json())
        assert all(set(r) == set(data["columns"]) for f in data["findings"] for r in f["rows"])
    assert [f.metadata["models"] for f in models.findings] == [["organism-a", "organism-b"], ["organism-b", "organism-a"]]
    assert not models.findings[0].metadata["cross_architecture"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_verdicts_can_be_read_again_from_the_file(name):
    models = ["organism-a", "organism-c"] if name == "mendelian-randomization" else "organism-b"
    result = run_protocol(name, models, ["ioi", "sva"], replace(QUICK, n_random=19), calibrate=name == "dose-response")
    data = json.loads(result.to_json())
    assert list(data) == list(PROTOCOL_FIELDS) and len(data["verdicts"]) == 2 * (1 + (name == "mendelian-randomization"))
    for again, first in zip(reread(data), data["verdicts"]):
        assert all(again[k] == first[k] for k in ("model", "task", "said", "verdict", "criteria"))
    assert set(data["constituents"]) == set(PROTOCOLS[name].assays)
    plot_protocol(data)
    if name == "dose-response":
        done = {(r["metric"], r["calibration"]) for r in data["calibrations"] if r["task"] == "sva"}
        assert done == {(m, c) for m in PROTOCOLS[name].assays for c in CALIBRATIONS}
        seeds = next(r for r in data["calibrations"] if r["calibration"] == "seed" and r["metric"] == "effect_size")
        assert seeds["n"] == protocols.SEEDS and seeds["low"] <= seeds["mean"] <= seeds["high"] and seeds["sd"] > 0
    if name == "mendelian-randomization": assert data["verdicts"][0]["criteria"]["E6"] in ("met", "not met")


def test_a_verdict_follows_its_numbers(organism, few_noises):
    "A number in the file is changed, and the verdict that is read again changes."
    data = json.loads(run_protocol("knockout-hierarchy", organism, ["sva"], QUICK, calibrate=False).to_json())
    before = reread(data)[0]
    data["constituents"]["activation_patching"]["findings"][0]["estimates"]["knockout"] |= dict(value=0.1, low=0.05, high=0.2)
    assert before["said"]["activation_patching"].startswith("passes") and reread(data)[0]["verdict"].startswith("fails: knocked out as a whole")


def test_what_cannot_be_run_is_named(organism):
    verdict = run_protocol("mendelian-randomization", organism, ["sva"], QUICK, calibrate=False).verdicts[0]
    assert "needs a second task" in verdict["said"]["cross_task_transfer"] and "needs a second model" in verdict["said"]["cross_model_invariance"]
    assert verdict["criteria"]["E5"] == verdict["criteria"]["E6"] == "not decidable"


def test_a_task_that_the_model_fails_is_refused():
    result = run_protocol("dose-response", "organism-b@1000", ["ioi"], QUICK, ["organism-b-ioi"])
    assert not result.verdicts and not result.constituents and "must be" in result.refused["ioi"]


def test_the_headline_of_several_directions_is_the_lowest():
    finding = Finding(("a", "b"), 0.0, False, "", {"transfer:a": Estimate(0.5), "transfer:b": Estimate(0.1), "other": Estimate(0.0)}, {}, [], {})
    assert headline(ASSAYS["cross_task_transfer"], finding).value == 0.1


def test_agreement_of_ablations_leaves_nothing_out(organism):
    one = make_subject(organism, "sva", load_circuit("organism-b-sva"), QUICK)
    lost, variation, passes = agreement_of_ablations(one, 2)
    assert set(lost) == {"resample", "mean", "counterfactual", "zero"} and passes == (2 + 3) * 12
    shares = np.array(list(lost.values()))
    assert variation == pytest.approx(shares.std(ddof=1) / shares.mean())
    assert set(by_role(one.circuit)) == {n.role for n in one.circuit.nodes}


@pytest.mark.parametrize("call, words", [
    (lambda: run_protocol("knock-out", "organism-b", ["ioi"]), "no protocol 'knock-out'"),
    (lambda: run_protocol("dose-response", ["organism-a", "organism-b"], ["ioi"], circuits=["organism-a-ioi"]), "goes with one model"),
    (lambda: run_protocol("dose-response", ["organism-a", "organism-a"], ["ioi"]), "the same model"),
    (lambda: cross_model_invariance(["organism-a"], ["ioi"]), "at least two"),
    (lambda: reread({"metric": "GN2"}), "not a protocol's result"), (lambda: plot_protocol({}), "not a protocol's result"),
    (lambda: convergent_evidence([{}]), "neither a metric's nor a protocol's"), (lambda: convergent_evidence(["x"]), "not a result")])
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError, match=words): call()


# several results together

def result_of(code, verdict, task="ioi"):
    if code.startswith("MB"): return dict(protocol=code, verdicts=[dict(model="m", task=task, verdict=verdict)])
    return dict(metric=code, models=["m"], findings=[dict(tasks=[task, "sva"], metadata={}, verdict=verdict)])


@pytest.mark.parametrize("verdicts, rule, holds", [
    ({"MB_KH": "passes: x", "MB_RE": "fails: y"}, 0, True), ({"MB_KH": "fails: x", "MB_RE": "fails: y"}, 0, False),
    ({"MB_KH": "partial: necessary only at x", "MB_RE": "passes: the deficit is reversible"}, 1, True),
    ({"MB_KH": "partial: necessary as a whole, but on average its roles are not", "MB_RE": "passes: the deficit is reversible"}, 1, False),
    ({"MB_KH": "partial: necessary only at x", "MB_RE": "fails: y"}, 0, True),
    ({"MB_KH": "partial: necessary only at x", "MB_RE": "fails: the deficit is not specifically reversible"}, 1, False),
    ({"GN1": "conserved: x", "GN4": "homology: y"}, 2, True), ({"GN1": "not shown", "GN4": "homology: y"}, 2, False),
    ({"GN2": "coupled, more than random", "GN3": "modular: z"}, 3, True), ({"GN5": "forms in order, as a step; more", "MB_KH": "passes: x"}, 4,
                                                                           True),
    ({"MB_RE": "passes: x", "MB_MR": "passes: y"}, 5, True), ({"MB_RE": "passes: x"}, 5, None),
    ({"MB_RE": "not decidable: x", "MB_MR": "passes: y"}, 5, None)])
def test_rules_over_results(verdicts, rule, holds):
    rows = convergent_evidence([result_of(code, verdict) for code, verdict in verdicts.items()])
    of_task = [r for r in rows if r["task"] == "ioi"]
    assert [r["rule"] for r in of_task] == [r.name for r in RULES] and of_task[rule]["holds"] is holds


def pair(code, verdict, other, metadata=None): return dict(metric=code, models=["m"], findings=[dict(
    tasks=["ioi", other], metadata=metadata or {}, verdict=verdict)])


def test_a_rule_is_open_only_where_all_results_are():
    few, no, yes = pair("GN1", "not decidable: few", "sva"), pair("GN1", "not shown", "induction"), pair("GN4", "homology: y", "sva")
    def shared(*results): return next(r["holds"] for r in convergent_evidence(results) if r["task"] == "ioi" and r["rule"] == "shared computation")
    assert shared(few, yes) is None and shared(few, no, yes) is False and shared(pair("GN1", "conserved", "sva"), no, yes) is True


def test_a_comparison_of_models_is_about_them_and_one_model_is_not():
    one, two = (pair("GN1", "x", "sva", dict(models=models)) for models in (["m"], ["m", "n"]))
    assert [v[4] for v in verdicts_in(one)] == [("ioi", "sva")] * 2 and {v[4] for v in verdicts_in(two)} == {("ioi", "sva", "m", "n")}
    assert [v[:2] for v in verdicts_in(two)] == [("m", "ioi"), ("m", "sva"), ("n", "ioi"), ("n", "sva")]


def test_a_pair_of_tasks_speaks_of_both():
    assert verdicts_in(result_of("GN1", "x")) == [("m", "ioi", "GN1", "x", ("ioi", "sva")), ("m", "sva", "GN1", "x", ("ioi", "sva"))]
    other_pair = dict(metric="GN4", models=["m"], findings=[dict(tasks=["ioi", "induction"], metadata={}, verdict="homology: y")])
    rows = convergent_evidence([result_of("GN1", "conserved: x"), other_pair])
    assert not any(r["holds"] for r in rows if r["rule"] == "shared computation")  # two different pairs say nothing together
    with pytest.raises(InputError, match="two results of MB_RE"): convergent_evidence([result_of("MB_RE", "passes: x"), result_of("MB_RE",
                                                                                                                                  "fails: y")])
