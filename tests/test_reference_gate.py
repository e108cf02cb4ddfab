"""The reference gate and the protocols under it: against hooks, against enumeration, by hand, and whole, on a model that has to fail."""

import json
from dataclasses import replace
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cli import leftovers, refused, write_csv  # noqa: F401 (a fixture)

from circuit_generalization import reference_gate
from circuit_generalization.ablation import Ablation
from circuit_generalization.circuit import Circuit, CircuitError, load_circuit, without
from circuit_generalization.circuit_scorer import CircuitScorer
from circuit_generalization.cli import main
from circuit_generalization.errors import InputError
from circuit_generalization.gate_marks import GATE, gate_mark
from circuit_generalization.language import build_tokenizer
from circuit_generalization.measurement import MeasureOptions, measure
from circuit_generalization.models import as_bridge, model_hash, random_gpt2
from circuit_generalization.prompts import PromptSet, concat_prompts
from circuit_generalization.published_prompts import read_folder, uninformative
from circuit_generalization.published_protocols import (
    MODEL,
    Alone,
    Knockouts,
    Without,
    change_without,
    chosen_sets,
    everywhere,
    faithfulness,
    first_of_each,
    greedy_set,
    incompleteness_of,
    minimality_of,
    minimality_sets,
    only,
    random_sets,
)
from circuit_generalization.reference_gate import (
    ROWS,
    Gate,
    GatePrompts,
    NotRun,
    Row,
    empty_circuit_change,
    full_circuit_change,
    padding_change,
    run_gate,
    with_text_after,
)
from circuit_generalization.tasks import make_prompts, reference_pool

NAMES = [row.name for row in ROWS]


# Knocking out, against plain hooks

CLAIM = Circuit.from_components(["a0.h1", "a0.h3", "a1.h0", "a1.h2"], roles=["early", "early", "late", "late"],
                                positions=["S", ("S", "END"), "END", "END"])


def ids(seed, n, length): return torch.randint(1, 64, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


def tokens_of_two_lengths(seed, n=4, **more):
    "Prompts of two templates, which differ in length."
    sets = [PromptSet.from_tokens(ids(seed + k, n, k), answers=[[1]] * n, distractors=[[2]] * n, positions={"S": [k - 3] * n},
                                  labels=pd.DataFrame(dict(template=[f"t{k}"] * n, prompt_id=[f"{seed}-{k}-{i}" for i in range(n)])))
            for k in (6, 9)]
    return concat_prompts(sets)


@pytest.fixture(scope="module")
def tiny(random_model):
    prompts = tokens_of_two_lengths(0)
    return Knockouts(random_model, prompts[[0, 4, 1, 5, 2, 6, 3, 7]], tokens_of_two_lengths(50, 6), batch_size=3)


def mean_of(model, tokens, name):
    "Of what a hook shows, over prompts."
    seen = {}
    with torch.no_grad(): model.run_with_hooks(tokens, fwd_hooks=[(name, lambda z, hook: seen.update({name: z.mean(0)}))])
    return seen


def by_hooks(runs, circuit, keep):
    "LD of each prompt by itself: z replaced by the mean over reference prompts of its template, circuit kept or knocked out."
    model, out = runs.model, []
    for i, n in enumerate(runs.prompts.lengths.tolist()):
        same = runs.reference.labels.template == runs.prompts.labels.template[i]
        pool = runs.reference.tokens[torch.tensor(same.to_numpy()), :n]
        means, hooks = {}, []
        for layer in range(2):
            name = f"blocks.{layer}.attn.hook_z"
            means.update(mean_of(model, pool, name))
            listed = torch.zeros(n, 4, dtype=torch.bool)
            for node in circuit.nodes:
                if node.component.layer == layer:
                    for role in node.positions or (): listed[runs.prompts.positions[role][i], node.component.head] = True
                    if node.positions is None: listed[:, node.component.head] = True
            change = ~listed if keep else listed
            hooks.append((name, lambda z, hook, new=means[name], change=change: torch.where(change[None, ..., None], new, z)))
        with torch.no_grad(): logits = model.run_with_hooks(runs.prompts.tokens[i:i + 1, :n], fwd_hooks=hooks)[0, -1]
        out.append(float(logits[1] - logits[2]))
    return np.array(out)


@pytest.mark.parametrize("circuit", [CLAIM, only(CLAIM, ["a0.h1"]), everywhere(CLAIM), Circuit(())], ids=["all", "one", "everywhere", "none"])
def test_knockouts_are_those_of_plain_hooks(tiny, circuit):
    alone, out = tiny.ld([Alone(circuit), Without(circuit)])
    assert np.allclose(alone, by_hooks(tiny, circuit, True), atol=1e-4) and np.allclose(out, by_hooks(tiny, circuit, False), atol=1e-4)


def test_batches_and_order_are_irrelevant(tiny):
    whole = Knockouts(tiny.model, tiny.prompts, tiny.reference)
    cases = [MODEL, Alone(CLAIM), Without(CLAIM)]
    assert np.allclose(whole.ld(cases), tiny.ld(cases), atol=1e-5)
    assert np.allclose(whole.ld(cases[1:]), tiny.ld(cases)[1:], atol=1e-5)  # a second call, on what was kept
    assert np.array_equal(whole.ld_model, whole.ld([MODEL])[0])


def test_draws_are_averaged(tiny):
    four, one = (Knockouts(tiny.model, tiny.prompts, tiny.reference, Ablation("resample", k)) for k in (4, 1))
    each = CircuitScorer(tiny.model, CLAIM, tiny.reference).score(tiny.prompts, Ablation("resample", 4), n_random=0)
    assert np.allclose(four.ld([Alone(CLAIM)])[0], each.ld_circuit, atol=1e-4) and not np.allclose(one.ld([Alone(CLAIM)]), each.ld_circuit, atol=1e-2)


def test_what_is_read_from_all_logits(tiny):
    def read(logits, prompts): return logits[..., 1] - logits[..., 2]
    assert np.allclose(tiny.of_logits([MODEL, Alone(CLAIM)], read), tiny.ld([MODEL, Alone(CLAIM)]), atol=1e-4)


def test_faithfulness_is_what_it_says(tiny):
    model, alone = tiny.ld([MODEL, Alone(CLAIM)])
    found = faithfulness(tiny, CLAIM)
    assert found.gap == pytest.approx(abs(model.mean() - alone.mean())) and found.ratio_of_means == pytest.approx(alone.mean() / model.mean())
    assert found.mean_of_ratios == pytest.approx((alone / model).mean()) and found.f_circuit == pytest.approx(alone.mean())


def test_incompleteness_and_change_by_hooks(tiny):
    ks = [(), ("a0.h3", "a1.h0"), CLAIM.components]
    wanted = [abs(by_hooks(tiny, without(CLAIM, k), True).mean() - by_hooks(tiny, only(CLAIM, k), False).mean()) for k in ks]
    assert np.allclose(incompleteness_of(tiny, CLAIM, ks), wanted, atol=1e-4) and max(wanted) > 0.05
    changed = by_hooks(tiny, only(CLAIM, ks[1]), False).mean() / tiny.ld_model.mean() - 1
    assert change_without(tiny, CLAIM, ks[1]) == pytest.approx(changed, abs=1e-3)


def test_minimality_by_hooks(tiny):
    pairs = [("a0.h1", ()), ("a0.h1", ("a0.h3",)), ("a1.h2", ("a1.h0", "a0.h1"))]
    f = {k: by_hooks(tiny, without(CLAIM, k), True).mean() for v, ks in pairs for k in (ks, (v, *ks))}
    assert np.allclose(minimality_of(tiny, CLAIM, pairs), [abs(f[(v, *k)] - f[k]) for v, k in pairs], atol=1e-4)


@pytest.mark.parametrize("call", [lambda r: incompleteness_of(r, CLAIM, [["a0.h0"]]), lambda r: change_without(r, CLAIM, ["a1.h1"]),
                                  lambda r: minimality_of(r, CLAIM, [("a0.h0", ())])])
def test_components_that_the_circuit_lacks_are_refused(tiny, call):
    with pytest.raises(CircuitError, match="circuit 'circuit' has no a"): call(tiny)


def test_other_bad_input(tiny):
    with pytest.raises(InputError, match="no components"): greedy_set(tiny, Circuit(()))
    with pytest.raises(InputError, match="batch size 0"): Knockouts(tiny.model, tiny.prompts, tiny.reference, batch_size=0)
    with pytest.raises(InputError, match="needs reference prompts"): Knockouts(tiny.model, tiny.prompts).ld([MODEL])
    with pytest.raises(InputError, match="listed at IO"): tiny.ld([Alone(Circuit.from_components(["a0.h1"], positions=["IO"]))])


# Searches

def subsets(circuit, most): return [k for r in range(1, most + 1) for k in combinations(circuit.components, r)]


def test_greedy_search_against_all_subsets(tiny):
    every = dict(zip(map(frozenset, subsets(CLAIM, 4)), incompleteness_of(tiny, CLAIM, subsets(CLAIM, 4))))
    singles = {k: x for k, x in every.items() if len(k) == 1}
    k, found = greedy_set(tiny, CLAIM, candidates=None, steps=1)
    assert frozenset(k) == max(singles, key=singles.get) and found == pytest.approx(max(singles.values()), abs=1e-5)
    chosen, path = (), [0.0]  # by hand, from the table
    for _ in range(4):
        chosen = max(((*chosen, c) for c in CLAIM.components if c not in chosen), key=lambda k: every[frozenset(k)])
        path.append(every[frozenset(chosen)])
    k, found = greedy_set(tiny, CLAIM, candidates=None)
    assert found == pytest.approx(max(path), abs=1e-5) == pytest.approx(every[frozenset(k)], abs=1e-5) and found <= max(every.values()) + 1e-5


def test_candidates_are_drawn(tiny):
    found = [greedy_set(tiny, CLAIM, 1, 1, seed) for seed in range(12)]
    assert len({k for k, _ in found}) > 1 and found == [greedy_set(tiny, CLAIM, 1, 1, seed) for seed in range(12)]
    assert all(len(k) <= 1 for k, _ in found)


def test_random_sets_are_halves():
    sets = random_sets(CLAIM, 400, seed=3)
    assert all(set(k) <= set(CLAIM.components) for k in sets) and sets == random_sets(CLAIM, 400, seed=3) != random_sets(CLAIM, 400, seed=4)
    assert abs(np.mean([len(k) for k in sets]) - 2) < 0.2 and {len(k) for k in sets} == {0, 1, 2, 3, 4}


def test_sets_that_may_show_a_component():
    assert minimality_sets(CLAIM, "a0.h1") == [(), ("a0.h3",), ("a0.h3", "a1.h0", "a1.h2")]
    assert minimality_sets(only(CLAIM, ["a0.h1", "a1.h0"]), "a1.h0") == [(), ("a0.h1",)]
    assert minimality_sets(Circuit.from_components(["a0.h1", "a1.h0"]), "a1.h0") == [()]


def test_the_set_that_shows_most_is_chosen(tiny):
    chosen = chosen_sets(tiny, CLAIM)
    assert set(chosen) == set(CLAIM.components)
    for v, k in chosen.items():
        shown = minimality_of(tiny, CLAIM, [(v, other) for other in minimality_sets(CLAIM, v)])
        assert minimality_of(tiny, CLAIM, [(v, k)])[0] == pytest.approx(shown.max(), abs=1e-6)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4), st.integers(0, 3))
def test_first_of_each(groups, n, start):
    taken = first_of_each(groups, n, start)
    assert taken == sorted(taken)
    for g in set(groups): assert [i for i in taken if groups[i] == g] == [i for i, x in enumerate(groups) if x == g][start:start + n]


# The compiled model, whose circuit is known

@pytest.fixture(scope="module")
def known(compiled):
    prompts = make_prompts("ioi", n=36, tokenizer=compiled.tokenizer)
    return Knockouts(compiled, prompts, reference_pool(prompts, compiled.tokenizer, n=9))


def test_the_known_circuit_is_faithful_complete_and_minimal(known):
    circuit = load_circuit("compiled-ioi-ioi")
    everything = Circuit.from_components([f"a{layer}.h{head}" for layer in range(4) for head in range(8)])
    assert faithfulness(known, everything).gap < 1e-4 and abs(faithfulness(known, circuit).ratio_of_means - 1) < 0.1
    assert abs(faithfulness(known, without(circuit, ["a1.h2", "a1.h5"])).ratio_of_means) < 0.1  # no S-inhibition, nothing
    assert incompleteness_of(known, everything, random_sets(everything, 3)).max() < 1e-4
    f = known.ld_model.mean()
    assert incompleteness_of(known, circuit, [["a1.h2"]])[0] < 0.1 * f
    assert incompleteness_of(known, without(circuit, ["a1.h5"]), [["a1.h2"]])[0] > 0.9 * f  # the other one, overlooked
    shown = minimality_of(known, circuit, [("a2.h0", ("a2.h4", "a3.h3")), ("a2.h4", ("a2.h0", "a3.h3"))])
    assert shown[0] / shown[1] == pytest.approx(1.05 / 0.95, rel=0.03)  # what they were compiled to write
    assert change_without(known, circuit, ["a2.h0", "a2.h4"]) < -0.9


def test_the_gate_on_the_known_circuit(compiled, monkeypatch):
    monkeypatch.setattr(reference_gate, "reference_pool", partial(reference_pool, n=9))
    circuit = load_circuit("compiled-ioi-ioi")
    gate = Gate(compiled, n=72, circuits=dict(ioi=circuit, naive=without(circuit, ["a1.h2", "a1.h5"])))
    found = run_gate(gate, [r for r in ROWS if not r.name.startswith(("DoubleIO", "TripleIO"))]).set_index("row")
    f = found.measured["F(M)"]
    assert found.measured["IO above S, %"] == 100 and abs(found.measured["F(C)/F(M)"] - 1) < 0.1
    assert found.measured["naive circuit: gap"] == pytest.approx(f, rel=0.1)  # without S-inhibition nothing is left
    assert found.measured["name movers out: change of F(M), %"] < -90 and found.measured["minimality: heads at 1% of F(M)"] == len(circuit)
    assert found.measured["trailing space: F(M)"] < 0.1 * f
    assert found.result["greater-than: model, %"] == "not run" and "greater_than" in found.reason["greater-than: model, %"]
    assert found.measured["MIB: CMD of random edges"] > 0.6 and found.measured["MIB: CMD of EAP-IG"] < 0.15  # the known circuit is found
    assert (found.result[found.kind == "exact"] == "pass").all()


# Rows, from numbers made by hand

def by_hand():
    "A gate whose numbers are known."
    labels = pd.DataFrame(dict(order=["ABBA", "ABBA", "BABA", "BABA"]))
    a = np.array
    held = SimpleNamespace(ld_model=a([2.0, 4]))
    double = SimpleNamespace(labels=labels), a([[3.0, 5, 1, 3], [4.0, 4, 4, 4]])
    ld = {"model": a([4.0, 2, 2, -1]), "circuit": a([2.0, 1, 3, -1]), "everywhere": a([1.0, 1, 1, 1]), "naive": a([1.0, 1, 1, 0]),
          "no name movers": a([3.0, 2, 2, -1])}
    return SimpleNamespace(
        ld=ld, case=ld.__getitem__, p_io=0.25, spaced=a([1.0, -1, 2, -3]), ioi=SimpleNamespace(labels=labels), parts=(None, held),
        greedy=[dict(held=1.0, searched=9), dict(held=2.0, searched=3)], minimality=[dict(share=0.01), dict(share=0.009), dict(share=0.5)],
        otherwise=dict(mean=a([3.0, 3]), few=a([2.0, 2]), resample=a([1.0, 1.5])), double_io=double, triple_io=double,
        eap_ig=(3.5, 0.5), greater_than=(80.0, 70.0), mib={"random CMD": 0.7, "CMD": 0.1, "CPR": 1.5})


EXPECTED = {
    "F(M)": 7 / 4, "IO above S, %": 75, "P(IO), %": 25, "trailing space: IO above S, %": 50, "trailing space: F(M)": -0.25, "F(C)/F(M)": 5 / 7,
    "naive circuit: gap": 1, "name movers out: change of F(M), %": -100 / 7, "greedy incompleteness, maximum": 2,
    "minimality: heads at 1% of F(M)": 2, "DoubleIO: F(M)": 3, "DoubleIO: F(C)": 4, "DoubleIO: F(C)/F(M)": 4 / 3,
    "DoubleIO: F(M), IO first - S first": 2, "TripleIO: F(M)": 3, "TripleIO: F(C)": 4, "TripleIO: F(C)/F(M)": 4 / 3, "EAP-IG data: F(M)": 3.5,
    "EAP-IG data: F(M) of corrupted": 0.5, "greater-than: model, %": 80, "greater-than: circuit, %": 70,
    "MIB: CMD of random edges": 0.7, "MIB: CMD of EAP-IG": 0.1, "MIB: CPR of EAP-IG": 1.5, "BABA > ABBA": 2 - 0.5,
    "mean > resample": 3.5 / 6, "listed > all positions": 1 / 7, "many ABC prompts > few": 2 / 6, "mean of ratios > ratio of means": 3.5 / 4 - 5 / 7}


@pytest.mark.parametrize("row", [r for r in ROWS if r.kind != "exact"], ids=lambda r: r.name)
def test_each_row_by_hand(row): assert row.measure(by_hand()) == pytest.approx(EXPECTED[row.name])


def test_rows_are_those_of_the_references():
    assert len(set(NAMES)) == len(NAMES) and {r.name for r in ROWS if r.kind != "exact"} == set(EXPECTED)
    accepted = {r.name: (r.target, r.low, r.high) for r in ROWS if r.kind == "figure"}
    inf = float("inf")
    assert accepted == {
        "F(M)": (3.56, 3.40, 3.75), "IO above S, %": (99.3, 98.5, 100), "P(IO), %": (49, 45, 53), "trailing space: IO above S, %": (52, 45, 60),
        "trailing space: F(M)": (0, -0.3, 0.3), "F(C)/F(M)": (0.87, 0.80, 0.96), "naive circuit: gap": (0.1, 0, 0.4),
        "name movers out: change of F(M), %": (-5, -12, -2), "greedy incompleteness, maximum": (3.09, 2.3, inf),
        "minimality: heads at 1% of F(M)": (26, 24, 26), "DoubleIO: F(M)": (2.118, 1.768, 2.468), "DoubleIO: F(C)": (2.722, 2.372, 3.072),
        "DoubleIO: F(C)/F(M)": (1.285, 1.1, inf), "DoubleIO: F(M), IO first - S first": (1.63, 0.8, inf), "TripleIO: F(M)": (1.227, 0.877, 1.577),
        "TripleIO: F(C)": (3.174, 2.774, 3.574), "TripleIO: F(C)/F(M)": (2.586, 1.8, inf), "EAP-IG data: F(M)": (3.8, 3.65, 3.95),
        "EAP-IG data: F(M) of corrupted": (0.03, -0.12, 0.18), "greater-than: model, %": (81.7, 78.7, 84.7),
        "greater-than: circuit, %": (72.7, 68.7, 76.7), "MIB: CMD of random edges": (0.75, 0.69, 0.81), "MIB: CMD of EAP-IG": (0.03, 0, 0.06),
        "MIB: CPR of EAP-IG": (1.85, 1.65, 2.05)}


def test_borders():
    figure, sign, exact = (Row("x", None, 0, 1, "", "ioi", None, kind) for kind in ("figure", "sign", "exact"))
    assert figure.accepts(0) and figure.accepts(1) and not figure.accepts(1.01) and not sign.accepts(0) and exact.accepts(0)
    assert not any(row.accepts(float("nan")) or row.accepts(float("inf")) for row in (figure, sign, exact))
    assert [figure.range, sign.range, exact.range] == ["0 to 1", "> 0", "<= 1"]


def test_a_row_that_gives_no_number_fails_and_one_that_does_not_apply_is_not_run():
    def raising(error):
        def measure(gate): raise error
        return measure
    gate = SimpleNamespace(given=GatePrompts(), ioi=SimpleNamespace(labels=pd.DataFrame(dict(template=["t"]))))
    rows = [Row(str(i), None, 0, 1, "", "ioi", m) for i, m in enumerate(
        [raising(NotRun("no file")), raising(InputError("logits are NaN")), lambda g: float("nan"), lambda g: 0.5, lambda g: 2])]
    seen = []
    found = run_gate(gate, rows, lambda *step: seen.append(step))
    assert found.result.tolist() == ["not run", "fail", "fail", "pass", "fail"]
    assert found.reason.tolist() == ["no file", "logits are NaN", "not a number", "", ""] and seen[1] == (1, 5, "1") and len(seen) == 5


# Exact checks

@pytest.fixture(scope="module")
def small(): return build_tokenizer()


@pytest.fixture(scope="module")
def shaped(small): return random_gpt2(seed=0, n_layers=12, n_heads=12, d_model=24, n_vocab=len(small), n_positions=64)


@pytest.fixture(scope="module")
def gate(shaped, small): return Gate(as_bridge(shaped, small), n=72)


def test_exact_checks_hold_for_any_weights(gate):
    assert max(full_circuit_change(gate), empty_circuit_change(gate), padding_change(gate)) < 1e-5


def test_a_plain_pass_that_differs_is_seen(gate, monkeypatch):
    logits = reference_gate.final_logits
    monkeypatch.setattr(reference_gate, "final_logits", lambda model, tokens, lengths: logits(model, tokens, lengths - 1))
    assert full_circuit_change(gate) > 0.01


def test_a_patch_from_other_prompts_is_seen(gate, monkeypatch):
    capture = reference_gate.capture
    monkeypatch.setattr(reference_gate, "capture", lambda model, tokens, universe: capture(model, tokens.roll(1, 0), universe))
    assert empty_circuit_change(gate) > 0.01


def test_padding_that_is_read_is_seen(gate, monkeypatch):
    "As if the score read the last column."
    run = reference_gate.run_edits
    def to_the_last_column(model, tokens, lengths, edits): return run(model, tokens, torch.full_like(lengths, tokens.shape[1]), edits)
    monkeypatch.setattr(reference_gate, "run_edits", to_the_last_column)
    assert padding_change(gate) > 0.01


# Prompts

def test_text_is_added_at_the_end(small):
    for bos in (False, True):
        prompts = make_prompts("ioi", n=4, tokenizer=small, bos=bos)
        more = with_text_after(prompts, small, " ")
        space = small(" ", add_special_tokens=False)["input_ids"]
        for i, n in enumerate(prompts.lengths.tolist()): assert more.tokens[i, :n + 1].tolist() == prompts.tokens[i, :n].tolist() + space
        assert torch.equal(more.answers, prompts.answers) and torch.equal(more.distractors, prompts.distractors)


def write_published(folder, tokenizer, templates=2):
    "Own prompts in AutoCircuit's format: five of each template and order."
    folder.mkdir()
    made = make_prompts("ioi", n=180, tokenizer=tokenizer)
    for t in range(templates):
        for order in ("ABBA", "BABA"):
            index = [i for i, row in enumerate(made.labels.itertuples()) if row.template == f"base-{t:02d}" and row.order == order]
            some = made[index]
            words = {("end" if r == "END" else r): int(at[0]) for r, at in some.positions.items() if len(set(at.tolist())) == 1}
            text = tokenizer.decode
            corrupt = [text(ids[:n]) for ids, n in zip(some.counterfactual, some.lengths)]
            entries = [dict(clean=row.prompt, corrupt=other, answers=[row.answer], wrong_answers=[row.distractor])
                       for row, other in zip(some.labels.itertuples(), corrupt)]
            (folder / f"ioi-{order}-{t:02d}.json").write_text(json.dumps(dict(word_idxs=words, prompts=entries)))
    return folder


def test_published_prompts_are_used_and_named(shaped, small, tmp_path):
    published = read_folder(write_published(tmp_path / "p", small), small)
    gate = Gate(as_bridge(shaped, small), GatePrompts(published), n=14)
    assert len(gate.ioi) == 16 and gate.ioi.labels.template.value_counts().tolist() == [4] * 4  # as many of each, 14 rounded up
    assert torch.equal(gate.pool.tokens, uninformative(published).tokens) and len(gate.pool) == len(published) == 20
    found = run_gate(gate, [r for r in ROWS if r.name in ("F(M)", "F(C)/F(M)", "BABA > ABBA")])
    assert set(found.prompts) == {"given, 4 templates"} and found.measured.notna().all()
    runs = Knockouts(gate.model, gate.ioi, gate.pool)
    assert found.measured[1] == pytest.approx(faithfulness(runs, gate.circuits["ioi"]).ratio_of_means, rel=1e-3)
    searched, held = (set(part.prompts.labels.prompt_id) for part in gate.parts)
    assert len(searched) == 8 and len(held) == 8 and not searched & held


@pytest.mark.parametrize("change, said", [
    (lambda p: replace(p, positions={"END": p.lengths - 1}), "no position S1"),
    (lambda p: replace(p, positions=dict(p.positions) | {"S2": torch.full_like(p.lengths, -1)}), "position S2 is not known"),
    (lambda p: replace(p, labels=p.labels.assign(order="")), "order of the IOI"),
    (lambda p: replace(p, counterfactual=None), "no counterfactuals")])
def test_prompts_that_cannot_be_used(shaped, small, change, said):
    prompts = change(make_prompts("ioi", n=72, tokenizer=small))
    with pytest.raises(InputError, match=said): Gate(as_bridge(shaped, small), GatePrompts(prompts))


# The whole gate, by its command

@pytest.fixture(scope="module")
def folder(shaped, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "shaped"
    for part in (shaped, small): part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def failed(folder, tmp_path_factory):
    "A gate that failed: exit code and folder. Pools and searches are smaller than they should be, and no K is looked for."
    out = tmp_path_factory.mktemp("gates") / "gate"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_gate, "reference_pool", partial(reference_pool, n=8))
        patch.setattr(reference_gate, "chosen_sets", lambda runs, circuit: dict.fromkeys(circuit.components, ()))
        for name, value in dict(RUNS=1, CANDIDATES=2, STEPS=2, SEARCHED=1, HELD=1).items(): patch.setattr(reference_gate, name, value)
        return main(["reference-gate", "--model", str(folder), "--n", "72", "--out", str(out)]), out


def test_a_random_model_fails_row_by_row(failed, folder, capfd):
    code, out = failed
    table, data = pd.read_csv(out / "gate.csv", keep_default_na=False, na_values=[""]), json.loads((out / "gate.json").read_text())
    assert code == 1 and leftovers(out) == ["gate.csv", "gate.json"] and table.row.tolist() == NAMES
    assert (table.result[table.kind == "exact"] == "pass").all() and "fail" in set(table.result)
    not_run = table.result == "not run"
    assert table.row[not_run].tolist() == ["EAP-IG data: F(M)", "EAP-IG data: F(M) of corrupted"] == data["not_run"]
    assert table.measured[~not_run].notna().all() and (table.reason.notna() == not_run).all()
    assert data["failed"] == table.row[table.result == "fail"].tolist() and not data["passed"]
    assert {"F(M)", "IO above S, %", "P(IO), %", "greedy incompleteness, maximum", "greater-than: model, %"} <= set(data["failed"])
    assert data["weights"] == model_hash(folder) and data["prompts"]["ioi"] | {"hash": ""} == dict(n=72, hash="", templates=18, bos=False)
    assert data["prompts"]["greater_than"]["bos"] and set(data["prompts"]) == {"ioi", "trailing space", "double_io", "triple_io", "greater_than",
                                                                                "MIB"}
    assert len(data["rows"]) == len(ROWS) and len(data["searches"]["minimality"]) == 26 and data["circuits"]["ioi"] == load_circuit("gpt2-ioi").hash


SCORE = ["score", "--circuit", "gpt2-ioi", "--ablation", "counterfactual", "--n-random", "0"]
ENTRY = {"prompt": "Then, Kathleen and Walter went to the library. Walter gave a cup to", "answer": " Kathleen", "distractor": " Walter",
         "counterfactual": "Then, Kathleen and Walter went to the library. Raymond gave a cup to", "pos_S2": "10", "pos_S1+1": "5"}


def test_scores_of_a_failed_gate_are_marked(failed, folder, tmp_path):
    prompts, out = write_csv(tmp_path / "prompts.csv", ENTRY), tmp_path / "scores.csv"
    for gate in (failed[1], failed[1] / "gate.json"):
        assert main([*SCORE, "--model", str(folder), "--prompts", prompts, "--gate", str(gate), "--out", str(out)]) == 0
        assert pd.read_csv(out).gate.tolist() == [gate_mark(failed[1], model_hash(folder))]
    assert main([*SCORE, "--model", str(folder), "--prompts", prompts, "--out", str(out)]) == 0
    assert "gate" not in pd.read_csv(out)


def test_measurements_are_marked(compiled, tmp_path, refused):  # noqa: F811
    gate = tmp_path / "gate.json"
    gate.write_text(json.dumps(dict(format=GATE, weights=model_hash(compiled), failed=[], not_run=[])))
    options = MeasureOptions("compiled-ioi", axes=("lexical",), variants=("unseen_objects",), n_prompts=36, ablations=("zero", "counterfactual"),
                             positions=("listed",), levels=("node",), n_draws=2, n_random=1)
    measure(options, tmp_path / "m", workers=1, gate=gate)
    for name in ("scores", "sweep"): assert set(pd.read_csv(tmp_path / "m" / f"{name}.csv").gate) == {"passed"}
    assert json.loads((tmp_path / "m" / "manifest.json").read_text())["gate"] == "passed"
    gate.write_text(json.dumps(dict(format=GATE, weights="0" * 64, failed=[], not_run=[])))
    argv = ["measure", "--model", "compiled-ioi", "--axes", "lexical", "--n-prompts", "18", "--gate", gate]
    assert "other weights" in refused(*argv) and "other weights" in refused(*argv, "--dry-run")


@pytest.mark.parametrize("text, said", [
    (None, "cannot be read"), ("[", "not JSON"), ("[]", "not the result"), ('{"format": "other"}', "not the result"),
    (json.dumps(dict(format=GATE, weights="a", failed=[1], not_run=[])), "is missing"),
    (json.dumps(dict(format=GATE, failed=[], not_run=[])), "is missing"),
    (json.dumps(dict(format=GATE, weights="a", passed=False, failed=[], not_run=[])), "different things"),
    (json.dumps(dict(format=GATE, weights="a", failed=[], not_run=[], rows=[dict(row="F(M)", result="fail")])), "different things"),
    (json.dumps(dict(format=GATE, weights="b", failed=[], not_run=[])), "other weights")])
def test_files_that_are_no_gate(tmp_path, text, said):
    if text is not None: (tmp_path / "gate.json").write_text(text)
    with pytest.raises(InputError, match=said): gate_mark(tmp_path / "gate.json", "a")


@pytest.mark.parametrize("failed, not_run, mark", [([], [], "passed"), (["x", "y"], ["z"], "failed: x, y"), ([], ["z"], "passed, not run: z")])
def test_what_a_mark_says(tmp_path, failed, not_run, mark):
    (tmp_path / "gate.json").write_text(json.dumps(dict(format=GATE, weights="a", failed=failed, not_run=not_run)))
    assert gate_mark(tmp_path, "a") == mark == gate_mark(tmp_path / "gate.json", "a")


def test_bad_input(folder, refused, tmp_path):  # noqa: F811
    def says(*argv, model=folder): return refused("reference-gate", "--model", model, *argv)
    assert "give --n 72" in says("--n", "40") and "give --n 72" in says("--n", "2")
    assert "12 layers of 12 heads; this model has 4 of 8" in says(model="organism-a")
    assert "did you mean organism-a" in says(model="organism-aa")
    assert "not a folder" in says("--prompts", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no .json file" in says("--prompts", tmp_path / "empty")
    years = write_csv(tmp_path / "years.csv", dict(clean="The war lasted from the year 1741 to the year 17", label="41",
                                                   corrupted="The war lasted from the year 1701 to the year 17"))
    pairs = write_csv(tmp_path / "pairs.csv", dict(clean="a", corrupted="b", correct_idx="1", incorrect_idx="2"))
    assert f"--eap-ig {years}: prompts of another task" in says("--eap-ig", years)
    assert f"--greater-than {pairs}: prompts of another task" in says("--greater-than", pairs)
    assert "no such file" in says("--eap-ig", tmp_path / "none.csv")
    assert "too small" in says("--n", "0") and "not available" in says("--device", "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("reference-gate", "--model", folder, "--out", tmp_path / "file")
    published = write_published(tmp_path / "p", build_tokenizer())
    assert "that is --prompts" in refused("reference-gate", "--model", folder, "--prompts", published, "--out", published)


@pytest.mark.slow
def test_the_whole_gate_in_gpt2s_true_shape(gpt2, shared, tmp_path, capsys, monkeypatch):
    "With its tokenizer, the published prompts (of each file the first ones) and pairs: it fails, and says where."
    monkeypatch.setattr(reference_gate, "chosen_sets", lambda runs, circuit: dict.fromkeys(circuit.components, ()))  # searches are tested above
    for name, value in dict(RUNS=1, CANDIDATES=2, STEPS=2).items(): monkeypatch.setattr(reference_gate, name, value)
    (tmp_path / "published").mkdir()
    for file in shared("prompts/ioi-ABBA-00.json").parent.glob("ioi-*.json"):
        data = json.loads(file.read_text())
        (tmp_path / "published" / file.name).write_text(json.dumps(data | dict(prompts=data["prompts"][:10])))
    model = random_gpt2(seed=0, n_layers=12, n_heads=12, d_model=768, n_vocab=len(gpt2), n_positions=128)
    for part in (model, gpt2): part.save_pretrained(tmp_path / "model")
    argv = ["reference-gate", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "published"), "--n", "60",
            "--greater-than", str(shared("prompts/greater-than-eap-ig.csv")), "--out", str(tmp_path / "gate")]
    assert main(argv) == 1
    table, said = pd.read_csv(tmp_path / "gate" / "gate.csv"), capsys.readouterr().out
    assert (table.prompts == "given, 30 templates").sum() == sum(r.on == "ioi" for r in ROWS) and set(table.result) == {"pass", "fail", "not run"}
    assert (table.result[table.kind == "exact"] == "pass").all() and table.measured.isna().sum() == 2
    assert "the gate is failed" in said and all(f"\n{name} " in said for name in NAMES)
