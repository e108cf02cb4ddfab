"""Finding a circuit whose truth is known (compiled-ioi), and the rules that name what is found."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from circuit_generalization.circuit import Circuit, load_circuit
from circuit_generalization.discovery import (
    candidates,
    circuit_of_pairs,
    completeness,
    discovery_bench,
    minimality,
    pair_name,
    path_effect,
    places,
    prune,
    role_of,
    set_score,
    study,
)
from circuit_generalization.errors import InputError
from circuit_generalization.tasks import find_task, make_prompts

ROLES = find_task("ioi").role_tokens


@pytest.fixture(scope="module")
def bench(compiled):
    return discovery_bench(compiled, n_prompts=18, n_draws=1)


def everything(bench):
    layers, heads = bench.shape
    return Circuit.from_components([f"a{layer}.h{head}" for layer in range(layers) for head in range(heads)])


def effect_table(**rows):
    table = pd.DataFrame(0.0, index=list(rows), columns=[*ROLES, "elsewhere"])
    for head, values in rows.items():
        for position, value in values.items():
            table.loc[head, position] = value
    return table


def test_the_bench_agrees_with_itself(bench):
    whole = everything(bench)
    np.testing.assert_allclose(bench.alone(whole), bench.model_ld, atol=1e-5)
    np.testing.assert_allclose(bench.lacking(whole), bench.ablated_ld, atol=1e-5)
    assert bench.scale == pytest.approx((bench.model_ld - bench.ablated_ld).mean())
    assert set_score(bench, whole) == pytest.approx(1)


def test_discovery_prompts_share_no_name_with_scored_ones(bench, compiled):
    def names(prompts):
        return {n for row in prompts.labels.names for n in row.split()}

    scored = make_prompts("ioi", n=60, seed=0, tokenizer=compiled.tokenizer)
    assert not names(bench.prompts) & names(scored)


def test_a_model_that_fails_the_task_is_refused(compiled, monkeypatch):
    def exchanged(*arguments, **options):
        prompts = make_prompts(*arguments, **options)
        return replace(prompts, answers=prompts.distractors, distractors=prompts.answers)

    monkeypatch.setattr("circuit_generalization.bench.make_prompts", exchanged)
    with pytest.raises(InputError, match="on base prompts of ioi: only 0% are right"):
        discovery_bench(compiled, n_prompts=4)


def test_candidates_are_all_pairs_least_effect_first():
    table = effect_table(**{"a0.h0": {}, "a0.h1": dict(S2=0.5, END=-0.02, IO=0.01), "a1.h0": {"S1": 0.03, "elsewhere": -0.2}})
    found = candidates(table)
    assert found[-3:] == [("a0.h1", "END"), ("a1.h0", None), ("a0.h1", "S2")]
    assert len(found) == len(set(found)) == 2 * len(ROLES) + 1, "heads without an effect too: it may be hidden by another's"


def test_everywhere_is_placed_where_the_effect_is_largest():
    table = effect_table(**{"a1.h0": {"S1": 0.03, "S1+1": -0.1, "elsewhere": 0.2}})
    assert places([("a1.h0", None), ("a1.h0", "END")], table) == [("a1.h0", "S1+1"), ("a1.h0", "END")]
    assert pair_name(("a1.h0", None)) == "a1.h0@everywhere"


def test_pairs_make_a_circuit():
    circuit = circuit_of_pairs([("a0.h1", "S2"), ("a1.h0", None), ("a0.h1", "END")])
    assert {n.name: n.positions for n in circuit.nodes} == {"a0.h1": ("S2", "END"), "a1.h0": None}


@pytest.mark.parametrize(("position", "reads", "more", "expected"), [
    ("S2", dict(S1=0.9, IO=0.05), {}, ("duplicate token", "S1")),
    ("S2", {"S1": 0.2, "S1+1": 0.6}, {}, ("induction", "S1+1")),
    ("S2", dict(S1=0.48, S2=0.5), {}, ("duplicate token", "S1")),
    ("S2", dict(S1=0.4, S2=0.5), {}, ("unnamed", "S2")),
    ("S1", dict(S1=0.5, IO=0.48), {}, ("unnamed", "S1")),
    ("IO+1", dict(IO=0.8), {}, ("previous token", "IO")),
    ("END", dict(IO=0.7, S2=0.1), {}, ("name mover", "IO")),
    ("END", dict(IO=0.7, S2=0.1), dict(effect=-0.3), ("negative name mover", "IO")),
    ("END", {"IO+1": 0.45, "S1+1": 0.46}, {}, ("name mover", "IO+1")),
    ("END", dict(S2=0.8, IO=0.1), dict(direct=0.1, indirect=0.4), ("S-inhibition", "S2")),
    ("END", dict(S2=0.8, IO=0.1), dict(direct=0.4, indirect=0.1), ("S suppressor", "S2")),
    ("S2", dict(S1=0.19), {}, ("unnamed", None)),
    ("S1", dict(IO=0.9), {}, ("unnamed", "IO")),
    ("END", dict(END=0.9), {}, ("unnamed", "END")),
    ("END-2", dict(S2=0.9), {}, ("S relay", "S2")),
    ("END", {"S2": 0.1, "END-2": 0.9}, {}, ("relay reader", "END-2")),
    ("S2", dict(S1=0.2), {}, ("duplicate token", "S1")),
    ("S2", dict(S1=0.46, S2=0.5), {}, ("duplicate token", "S1")),
    ("S2", dict(S1=0.44, S2=0.5), {}, ("unnamed", "S2")),
    ("S2", dict(IO=0.9), {}, ("unnamed", "IO")),
    ("END", dict(S1=0.48, S2=0.5), dict(direct=0.1, indirect=0.4), ("S-inhibition", "S2")),
    ("END", dict(S2=0.8), dict(direct=0.2, indirect=0.2), ("S suppressor", "S2")),
    ("END-2", dict(S1=0.48, S2=0.5), {}, ("S relay", "S2")),
    ("END-2", dict(IO=0.9), {}, ("unnamed", "IO")),
    ("END", dict(S2=np.nan), {}, ("unnamed", None)),
])
def test_roles_are_named_by_rule(position, reads, more, expected):
    assert role_of(position, pd.Series(reads), **(dict(effect=0.5) | more)) == expected


def test_pruning_drops_decoys_and_keeps_what_is_needed(bench):
    true = [(n.name, p) for n in load_circuit("compiled-ioi-ioi").nodes for p in n.positions]
    decoys = [("a0.h0", "END"), ("a2.h1", "S2"), ("a3.h0", "IO")]
    kept, path = prune(bench, decoys + true)
    assert not set(kept) & set(decoys) and set(kept) <= set(true)
    assert path.left.tolist() == sorted(path.left, reverse=True) and path.left.iloc[-1] == len(kept)
    assert set_score(bench, circuit_of_pairs(kept)) == pytest.approx(path.score.iloc[-1])


def test_a_head_of_the_last_layer_has_only_its_direct_path(bench):
    whole = (bench.model_ld - bench.lacking(circuit_of_pairs([("a3.h3", "END")]))).mean() / bench.scale
    assert path_effect(bench, ("a3.h3", "END"), ["logits"], 2).tolist() == pytest.approx([whole], abs=1e-5)
    assert whole < -0.3, "the negative mover holds the model back"


def test_a_mover_acts_on_the_logits_and_on_the_negative_mover_only(bench):
    to_logits, to_value, to_query = path_effect(bench, ("a2.h0", "END"), ["logits", ("a3.h0", "END", "v"), ("a3.h3", "END", "q")])
    assert to_logits > 0.1 and abs(to_value) < 1e-3 and abs(to_query) > 0.05
    assert path_effect(bench, ("a2.h0", "END"), []).shape == (0,)


def test_the_attack_finds_a_missing_role(bench):
    true = load_circuit("compiled-ioi-ioi")
    whole = completeness(bench, true, n_subsets=4)
    assert whole.set_index("kind").incompleteness["nothing"] < 0.15
    assert set(true.roles) <= set(whole.kind) and (whole.kind == "random").sum() == 4
    drops = minimality(bench, true)
    assert set(drops.index) == set(true.components) and (drops > 0.01).all()


@pytest.mark.slow
def test_the_circuit_that_was_compiled_is_found(compiled):
    true = load_circuit("compiled-ioi-ioi")
    # decoys write small task-relevant signals, 0.025 of the score among them, so the tolerance is twice the default
    found = study(discovery_bench(compiled, n_prompts=36), tolerance=0.05, name="found").circuit
    assert set(found.components) <= set(true.components)
    roles = {n.name: n.role for n in true.nodes}
    wanted = {"duplicate token": "duplicate token", "S-inhibition": "S-inhibition", "name mover": "name mover",
              "negative mover": "negative name mover"}
    assert {n.name: n.role for n in found.nodes} == {n.name: wanted[roles[n.name]] for n in found.nodes}
    assert {"duplicate token", "S-inhibition", "name mover"} <= set(found.roles)
    assert abs(found.provenance["sufficiency"] - 1) < 0.15 and found.provenance["necessity"] > 0.9
    assert {"nothing", "random", "greedy", *found.roles} == set(found.provenance["incompleteness"])
    assert set(found.provenance["minimality"]) == set(found.components) and min(found.provenance["minimality"].values()) > 0
