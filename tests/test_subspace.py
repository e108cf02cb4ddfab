"""Distributed alignment search where the truth is known: by hand, by construction, and by the slower way."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import made
from hypothesis import given
from hypothesis import strategies as st

from circuit_generalization import subspace
from circuit_generalization.circuit import Circuit, Node, load_circuit
from circuit_generalization.controls import random_twin
from circuit_generalization.errors import InputError
from circuit_generalization.genetics import Estimate, Finding, Options
from circuit_generalization.interchange_accuracy import (
    DAS_IIA,
    _dormancy_verdict,
    best_of,
    candidates,
    das_iia,
    das_splits,
    difference_of,
    dormancy,
    judge_das,
    reading_weights,
    split_by_reading,
)
from circuit_generalization.models import as_bridge, load_model
from circuit_generalization.passes import counted_passes
from circuit_generalization.prompts import PromptError, PromptSet, concat_prompts
from circuit_generalization.stats import Interval, coverage_simulation, draw_pairs, paired_difference
from circuit_generalization.subspace import (
    AYE,
    MINUS,
    NAY,
    PLUS,
    Exchange,
    Site,
    Subspace,
    iia,
    illusion_gpt2,
    illusion_pairs,
    interchanged,
    interchanges,
    measured,
    principal_angle,
    random_bases,
    site_at,
    train_das,
    whole,
)
from circuit_generalization.tasks import make_prompts

TASKS = ("ioi", "sva", "greater_than", "induction")


@pytest.fixture(scope="module")
def organism(): return load_model("organism-a")


@pytest.fixture(scope="module")
def tiny(): return as_bridge(illusion_gpt2())


@pytest.fixture(scope="module")
def three(tiny):
    "Training, validation and test pairs of the model by hand."
    data = illusion_pairs()
    return [Exchange(tiny, data[data.lengths == n]) for n in (3, 2, 4)]


def words(tokenizer, ids): return tokenizer.decode(ids).split()


# pairs

def test_ioi_source_repeats_the_other_name(organism):
    base = make_prompts("ioi", n=6, tokenizer=organism.tokenizer)
    pairs = interchanges(base)
    for i in range(len(pairs)):
        io, s = base.labels.names[i].split()[:2]
        before, after = (words(organism.tokenizer, t[i, :base.lengths[i]]) for t in (base.tokens, pairs.counterfactual))
        changed = [(a, b) for a, b in zip(before, after) if a != b]
        assert [(a.strip(".,"), b.strip(".,")) for a, b in changed] == [(s, io)]
        assert (pairs.tokens[i] != pairs.counterfactual[i]).nonzero().flatten().tolist() == [int(base.positions["S2"][i])]
    assert pairs.answers.equal(base.distractors) and pairs.distractors.equal(base.answers) and pairs.tokens.equal(base.tokens)


@pytest.mark.parametrize("axis, variant", [("base", "base"), ("syntactic", "double_io"), ("adversarial", "extra_subject"),
                                           ("adversarial", "repeated_io")])
def test_ioi_interchange_undoes_itself(organism, axis, variant):
    base = make_prompts("ioi", axis, variant, n=36, tokenizer=organism.tokenizer)[15:21]  # in both orders of the names
    pairs = interchanges(base)
    back = interchanges(replace(pairs, tokens=pairs.counterfactual, answers=base.answers, distractors=base.distractors))
    assert back.counterfactual.equal(base.tokens) and not pairs.counterfactual.equal(base.tokens)
    last = torch.maximum(base.positions["IO"], base.positions["S1"])
    first_mentions = torch.arange(base.tokens.shape[1]) <= last[:, None]
    assert pairs.counterfactual[first_mentions].equal(base.tokens[first_mentions])


def test_packaged_counterfactuals_are_sources(organism):
    for task in ("sva", "induction"):
        base = make_prompts(task, n=5, tokenizer=organism.tokenizer)
        pairs = interchanges(base)
        assert pairs.counterfactual.equal(base.counterfactual) and pairs.answers.equal(base.distractors) and pairs.distractors.equal(base.answers)


def test_greater_than_answers_are_after_the_source(organism):
    tokenizer, n = organism.tokenizer, 30
    base = make_prompts("greater_than", n=n, tokenizer=tokenizer)
    pairs, other = interchanges(base, tokenizer), interchanges(base, tokenizer, seed=1)
    rows, at = torch.arange(n), base.positions["YY"]
    assert ((pairs.counterfactual != pairs.tokens).sum(1) == 1).all() and not pairs.counterfactual.equal(other.counterfactual)
    for i in range(n):
        year, new = int(base.labels.year[i]), int(tokenizer.decode([pairs.counterfactual[rows, at][i]]))
        said, wrong = ({int(tokenizer.decode([t])) for t in ids[i].tolist() if t >= 0} for ids in (pairs.answers, pairs.distractors))
        assert said == set(range(new + 1, 100)) and wrong == set(range(year + 1, new + 1)) and new >= (year + 99) / 2


def test_every_task_has_pairs_that_the_model_answers(organism):
    for task in TASKS:
        pairs = Exchange(organism, interchanges(make_prompts(task, n=40, tokenizer=organism.tokenizer), organism.tokenizer))
        assert (pairs.source > 0).double().mean() >= 0.85 and (pairs.none > 0).double().mean() <= 0.3


def test_prompts_without_a_source_are_refused(organism):
    tokenizer = organism.tokenizer
    ioi, years = (make_prompts(task, n=3, tokenizer=tokenizer) for task in ("ioi", "greater_than"))
    bare = PromptSet.from_tokens([[1, 2]], [[2, 2]], [3], [4])
    late = replace(years, labels=years.labels.assign(century=12))
    cases = [(bare, None, "no way is known"), (concat_prompts([ioi, years]), None, "no way is known"), (years, None, "tokenizer"),
             (replace(ioi, positions={"END": ioi.positions["END"]}), None, "role position IO and S1"),
             (replace(years, labels=years.labels.drop(columns="century")), tokenizer, "label century"), (late, tokenizer, "no later year 12xx"),
             (replace(years, positions=years.positions | {"YY": years.positions["EVENT"]}), tokenizer, "year is not known"),
             (replace(make_prompts("sva", n=2, tokenizer=tokenizer), counterfactual=None), None, "no counterfactuals"),
             (make_prompts("ioi", "lexical", "multi_token_names", n=2, tokenizer=tokenizer), None, "not one token each")]
    for prompts, reader, said in cases:
        with pytest.raises(PromptError, match=said): interchanges(prompts, reader)


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_neither_names_nor_templates(organism, task):
    splits = das_splits(task, organism.tokenizer, 20, 10, 16, seed=3)
    assert [len(p) for p in splits] == [20, 10, 16, 16] and splits.asked.tokens.equal(splits.test.tokens)
    key = {"ioi": "names", "sva": "nouns", "greater_than": "event", "induction": "words"}[task]
    for what in ("template", key):
        held = [{w for label in p.labels[what] for w in label.split()} for p in splits[:3]]
        assert all(not held[i] & held[j] for i, j in ((0, 1), (0, 2), (1, 2))), what
    again, other = (das_splits(task, organism.tokenizer, 20, 10, 16, seed=s) for s in (3, 4))
    assert again.train.counterfactual.equal(splits.train.counterfactual) and not set(other.test.labels.template) == set(splits.test.labels.template)
    assert splits.test.labels.template.nunique() >= 8
    with pytest.raises(InputError, match="at least one pair"): das_splits(task, organism.tokenizer, 0)


# sites and the interchange

def test_sites_that_make_no_sense_are_refused(tiny, three):
    for make, said in [(lambda: Site(()), "at least one place"), (lambda: site_at("m0"), "no place"),
                       (lambda: site_at("a0.h0", kind="stream"), "no place"),
                       (lambda: site_at("a0.h0", kind="neuron"), "no kind of site"), (lambda: site_at("zero"), "not a component"),
                       (lambda: three[0].lds(site_at("a0.h7"), random_bases(1, (1, 4, 1))), "a0.h7"),
                       (lambda: three[0].lds(site_at("a0.h0", positions=("S2",)), random_bases(1, (1, 4, 1))), "S2"),
                       (lambda: three[0].lds(site_at("a0.h0"), random_bases(1, (2, 4, 1))), "bases of shape"),
                       (lambda: three[0].lds(site_at("a0.h0"), random_bases(1, (1, 8, 1))), "bases of shape"),
                       (lambda: random_bases(1, (1, 4, 5)), "5 dimensions"), (lambda: random_bases(-1, (1, 4, 1)), "random subspaces"),
                       (lambda: Exchange(tiny, three[0].pairs, "magic"), "no engine"),
                       (lambda: Exchange(tiny, replace(three[0].pairs, counterfactual=None)), "need sources"),
                       (lambda: best_of([], 32), "no subspaces")]:
        with pytest.raises(InputError, match=said): make()
    assert site_at("a1.h0", "a0.h1").name == "a0.h1 a1.h0" and site_at("m1", kind="stream").name == "stream before layer 1"


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 99))
def test_interchange_is_a_projection(d, k, seed):
    k = min(k, d)
    rng = torch.Generator().manual_seed(seed)
    v, s = torch.randn(3, d, generator=rng), torch.randn(3, d, generator=rng)
    basis = random_bases(1, (1, d, k), seed)[0] if k else torch.zeros(1, d, 1)
    new = interchanged(v[None], s, basis)
    assert torch.allclose(interchanged(new, s, basis), new, atol=1e-5)  # twice is once
    assert torch.allclose(new[0] @ basis[0], s @ basis[0] if k else v @ basis[0], atol=1e-5)  # along it: the source
    assert torch.allclose((new[0] - v) - (new[0] - v) @ basis[0] @ basis[0].T, torch.zeros(3, d), atol=1e-5)  # across it: nothing
    turned = basis @ torch.linalg.qr(torch.randn(1, basis.shape[2], basis.shape[2], generator=rng))[0]
    assert torch.allclose(interchanged(v[None], s, turned), new, atol=1e-5)  # any basis of the subspace


def test_random_bases_are_orthonormal_and_begin_alike():
    bases = random_bases(5, (3, 7, 2), 4)
    assert torch.allclose(bases.mT @ bases, torch.eye(2).expand(5, 3, 2, 2), atol=1e-5)
    assert bases[:2].equal(random_bases(2, (3, 7, 2), 4)) and not bases.equal(random_bases(5, (3, 7, 2), 5))
    assert len(random_bases(0, (3, 7, 2))) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "grouped", "pythia"])
def test_cone_and_hooks_agree(family):
    model, rng = made(family), torch.Generator().manual_seed(1)
    lengths, base = [7, 5, 9, 6], [torch.randint(0, 97, (n,), generator=rng).tolist() for n in (7, 5, 9, 6)]
    source = [[*b[:2], (b[2] + 5) % 97, *b[3:]] for b in base]
    pairs = PromptSet.from_tokens(base, source, [1, 2, 3, 4], [[5, 6], [7], [8], [9]], {"X": [3] * len(lengths)})
    fast, slow = Exchange(model, pairs, "cone"), Exchange(model, pairs, "hooks")
    assert torch.allclose(fast.none, slow.none, atol=1e-4) and torch.allclose(fast.source, slow.source, atol=1e-4)
    nodes = site_at("a0.h1", "a1.h0", "a1.h3").nodes
    sites = [Site(nodes), Site((replace(nodes[0], positions=("X",)), nodes[1], replace(nodes[2], positions=("END", "X")))), site_at("a2.h2")]
    for site in sites:
        bases = [random_bases(3, (len(site.nodes), 8, 3)).requires_grad_() for _ in range(2)]
        both = [e.lds(site, b) for e, b in zip((fast, slow), bases)]
        for found in both: found.square().sum().backward()
        assert torch.allclose(*both, atol=1e-4) and torch.allclose(*(b.grad for b in bases), atol=1e-3)
        assert (both[0] - fast.none).abs().max() > 1e-3  # it does something
        some, shuffled = torch.tensor([2, 0]), torch.tensor([3, 1, 0, 2])
        assert torch.allclose(fast.lds(site, bases[0], some), both[0][:, some], atol=1e-4)
        assert torch.allclose(Exchange(model, pairs[shuffled]).lds(site, bases[0]), both[0][:, shuffled], atol=1e-4)
        assert torch.allclose(slow.lds(site, bases[0], some), both[1][:, some], atol=1e-4)


def test_everything_exchanged_is_the_source(organism):
    pairs = Exchange(organism, interchanges(make_prompts("sva", n=4, tokenizer=organism.tokenizer)))
    every = site_at(*(f"a{layer}.h{head}" for layer in range(4) for head in range(8)))
    for site in (every, site_at("m0", kind="stream"), site_at("m3", kind="stream")):
        assert torch.allclose(pairs.lds(site, whole(site, organism))[0], pairs.source, atol=1e-3), site.name
        nothing = torch.zeros(1, len(site.nodes), site.width(organism), 2)
        assert torch.allclose(pairs.lds(site, nothing)[0], pairs.none, atol=1e-3)


def test_before_the_difference_nothing_is_exchanged(organism):
    pairs = Exchange(organism, interchanges(make_prompts("ioi", n=4, tokenizer=organism.tokenizer)))
    site, bases = site_at("a0.h7", positions=("IO+1",)), random_bases(2, (1, 16, 3)).requires_grad_()
    found = pairs.lds(site, bases)
    slow = Exchange(organism, pairs.pairs, "hooks").lds(site, bases)
    assert torch.allclose(found, pairs.none.expand(2, -1)) and torch.allclose(found, slow, atol=1e-3)
    found.sum().backward()
    assert (bases.grad == 0).all()


def test_passes_are_counted(tiny, three):
    data = three[0].pairs
    for engine in ("cone", "hooks"):
        with counted_passes() as passes:
            pairs = Exchange(tiny, data, engine)
            found, stated = train_das(pairs, pairs, site_at("a0.h0"), [1, 2], epochs=3, patience=9)
        looks = 3 * 2 * len(data)  # before, after two epochs, and at the end
        assert stated == passes.edited == 3 * 2 * len(data) + looks and len(found) == 2


# training

def test_training_finds_the_axis_that_is_read(three):
    train, validation, test = three
    (found,), _ = train_das(train, validation, site_at("a0.h0"), [1], epochs=60, patience=60)
    assert principal_angle(found.basis[0], torch.eye(4)[:, :1]) < 4
    assert iia(test, found.site, found.basis).interval.estimate == 1 and not (test.none > 0).any()
    nobody = torch.eye(4)[None, :, 1:]  # all that is orthogonal to the truth
    assert torch.allclose(test.lds(found.site, nobody[None])[0], test.none, atol=1e-5)


def test_training_goes_on_while_it_helps_and_no_longer(three):
    (found,), passes = train_das(*three[:2], site_at("a0.h0"), [1], epochs=200, patience=4)
    assert found.epochs > 4 and passes < 200 * len(three[0]) / 2


def test_nothing_is_found_where_nothing_is(tiny, three):
    silent = Exchange(as_bridge(illusion_gpt2(dormant=0.0)), three[0].pairs)
    (found,), _ = train_das(silent, silent, site_at("a0.h1"), [2])
    assert iia(silent, found.site, found.basis).interval.estimate == 0


def test_training_is_repeatable_and_touches_no_global_state(three):
    before = torch.random.get_rng_state()
    first, again, other = (train_das(*three[:2], site_at("a0.h0"), [1, 2], seed=s)[0] for s in (0, 0, 1))
    assert torch.random.get_rng_state().equal(before)
    assert all(a.basis.equal(b.basis) and a.validation_loss == b.validation_loss for a, b in zip(first, again))
    assert not first[0].basis.equal(other[0].basis)
    assert [s.k for s in first] == [1, 2] and all(torch.allclose(s.basis.mT @ s.basis, torch.eye(s.k)[None], atol=1e-5) for s in first)


def test_sizes_are_trained_as_they_would_be_alone(three):
    alone, among = (train_das(*three[:2], site_at("a0.h0", "a0.h1"), dims, patience=99)[0][0] for dims in ([1], [1, 3, 4]))
    assert torch.allclose(alone.basis, among.basis, atol=1e-3) and alone.epochs == among.epochs


def test_every_size_keeps_its_best_look(three, monkeypatch):
    looks, plain = [], subspace._kept
    def noted(*numbers): return looks.append(plain(*numbers)) or looks[-1]
    monkeypatch.setattr(subspace, "_kept", noted)
    found, _ = train_das(*three[:2], site_at("a0.h0", "a0.h1"), [1, 3], rate=1.5, epochs=6, patience=99, every=1)
    losses = np.array([[s.validation_loss for s in look] for look in looks])
    assert [s.validation_loss for s in found] == losses.min(0).tolist() and [s.epochs for s in found] == losses.argmin(0).tolist()
    assert (losses.min(0) < losses[-1]).any()  # such steps overshoot, so that the last look is not the best


def test_training_stops_after_so_many_epochs_without_gain(three):
    "It stops where it looks: what was trained and not looked at has not failed to gain."
    silent = Exchange(as_bridge(illusion_gpt2(dormant=0.0)), three[0].pairs)  # head 1 says nothing, so nothing is ever gained
    for patience, trained, looks in ((4, 4, 3), (3, 4, 3), (1, 2, 2)):
        assert train_das(silent, silent, site_at("a0.h1"), [2], patience=patience)[1] == (trained + looks) * len(silent)


def test_steps_become_shorter(three, monkeypatch):
    rates = []
    class Noted(torch.optim.Adam):
        def step(self, *given):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*given)
    monkeypatch.setattr(torch.optim, "Adam", Noted)
    train_das(*three[:2], site_at("a0.h0"), [1], epochs=4, rate=0.2, batch_size=99, patience=99)
    assert np.allclose(rates, [0.2, 0.15, 0.1, 0.05])


def test_an_epoch_is_every_pair_once_in_a_new_order(three):
    seen = []
    class Noted(Exchange):
        def lds(self, site, bases, index=None):
            seen.append(index.tolist())
            return three[0].lds(site, bases, index)
    train_das(Noted(three[0].model, three[0].pairs), three[1], site_at("a0.h0"), [1], epochs=3, batch_size=5, patience=99)
    epochs = [a + b for a, b in zip(seen[::2], seen[1::2], strict=True)]
    assert [len(s) for s in seen] == [5, 3] * 3 and all(sorted(e) == list(range(8)) for e in epochs) and len(set(map(tuple, epochs))) == 3


def test_an_answer_that_is_as_likely_as_the_other_is_not_right():
    found = measured(torch.tensor([0.0, 1.0, -1.0]), ["a", "b", "c"])
    assert found.interval.estimate == pytest.approx(1 / 3) and found.right.tolist() == [False, True, False]


def test_bad_training_is_refused(three):
    for more, said in [(dict(dims=[5]), "5"), (dict(dims=[]), "dimensions"), (dict(dims=[0]), "dimensions"), (dict(epochs=0), "at least 1"),
                       (dict(batch_size=0), "at least 1"), (dict(patience=0), "at least 1"), (dict(every=0), "at least 1")]:
        with pytest.raises(InputError, match=said): train_das(*three[:2], site_at("a0.h0"), **({"dims": [1]} | more))


def test_angle_by_hand():
    plane, line = torch.eye(3)[:, :2], torch.tensor([[1.0], [0.0], [1.0]]) / 2**0.5
    assert abs(principal_angle(plane, line) - 45) < 1e-4 and principal_angle(plane, torch.eye(3)[:, 1:2]) < 1e-4
    assert abs(principal_angle(plane, torch.eye(3)[:, 2:]) - 90) < 1e-4
    assert abs(principal_angle(plane, torch.eye(3)[:, 1:]) - 90) < 1e-4  # they share an axis, and not the other


# illusions

def test_illusion_is_caught_and_the_truth_passes(three):
    train, validation, test = three
    axes = torch.eye(4)
    by_hand = {"true": ("a0.h0", axes[:, :1]), "illusion": ("a0.h1", (axes[:, :1] + axes[:, 1:2]) / 2**0.5)}
    found = {name: dormancy(test, site_at(head), basis[None]) for name, (head, basis) in by_hand.items()}
    true, false = found["true"], found["illusion"]
    assert true.iia == false.iia == 1 and true.none == false.none == 0
    assert (true.verdict, true.iia_row, true.null_share, true.read_in_null, true.null_moves) == ("read where it moves", 1, 0, 0, 0)
    assert (false.verdict, false.iia_row, false.iia_null, false.row_moves, false.read_in_null) == ("illusion", 0, 0, 0, 1)
    assert abs(false.null_share - 0.5) < 1e-6 and abs(false.null_moves - 4) < 1e-3  # one of four axes moves, so it moves four times the average
    (learned,), _ = train_das(train, validation, site_at("a0.h1"), [1], epochs=60, patience=60)
    assert dormancy(test, learned.site, learned.basis).verdict == "illusion" and iia(test, learned.site, learned.basis).interval.estimate == 1
    assert dormancy(test, site_at("a0.h1"), axes[None, :, 2:3]).verdict == "no effect to explain"


def test_the_check_counts_from_what_is_right_anyway(tiny, three):
    "Pairs whose source is the base itself are right without an interchange, and with any."
    data, basis = three[2].pairs, torch.tensor([1.0, 1.0, 0.0, 0.0])[None, :, None] / 2**0.5
    labels = data.labels.assign(prompt_id=[f"same {name}" for name in data.labels.prompt_id])
    same = replace(data, counterfactual=data.tokens, answers=data.distractors, distractors=data.answers, labels=labels)
    alone, mixed = (dormancy(Exchange(tiny, pairs), site_at("a0.h1"), basis) for pairs in (same, concat_prompts([data, same])))
    assert (alone.none, alone.iia, alone.verdict) == (1, 1, "no effect to explain")
    assert (mixed.none, mixed.iia, mixed.iia_row, mixed.verdict) == (0.5, 1, 0.5, "illusion")


def test_the_share_in_the_null_space_is_of_all_dimensions(three):
    basis = torch.stack([torch.tensor([1.0, 1.0, 0.0, 0.0]) / 2**0.5, torch.tensor([0.0, 0.0, 1.0, 0.0])], 1)
    assert dormancy(three[2], site_at("a0.h1"), basis[None]).null_share == pytest.approx((0.5 + 1) / 2)  # only the second axis is read


def test_illusion_by_the_arithmetic_of_the_model(three):
    "Along (cos t, sin t) head 1 writes 3 sin t cos t of the difference, and head 0 says the sign."
    test, site = three[2], site_at("a0.h1")
    for degrees in (10, 30, 45, 70):
        t = torch.deg2rad(torch.tensor(float(degrees)))
        ld = test.lds(site, torch.stack([t.cos(), t.sin(), 0 * t, 0 * t])[None, None, :, None])[0]
        gain = -1 + 3 * 2 * t.sin() * t.cos()  # of the sign's contribution; the difference is twice the sign
        assert (torch.sign(ld) == torch.sign(gain)).all()


def test_split_by_hand():
    weights = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [0.0, 1e-3]]])  # reads the first axis; hardly the third
    u = torch.tensor([[[0.6], [0.8], [0.0]]])
    read, row, null = split_by_reading(u, weights)
    assert torch.allclose(read[0], torch.diag(torch.tensor([1.0, 0, 0])), atol=1e-6)
    assert torch.allclose(row.abs()[0], torch.eye(3)[:, :1], atol=1e-6) and torch.allclose(null.abs()[0], torch.eye(3)[:, 1:2], atol=1e-6)
    assert torch.allclose(split_by_reading(u, weights, least=1e-4)[0][0], torch.diag(torch.tensor([1.0, 0, 1])), atol=1e-6)
    assert torch.allclose(split_by_reading(u, 1e-4 * weights)[0], read, atol=1e-6)  # small weights are read as well: it is their share that counts
    assert (split_by_reading(torch.eye(3)[None, :, 1:2], weights)[1] == 0).all()  # nothing of it is read


def test_verdicts_of_the_check():
    assert _dormancy_verdict(0.05, 0, 0, 1) == "no effect to explain"
    assert _dormancy_verdict(1, 0.5, 0, 1) == "read where it moves"
    assert _dormancy_verdict(1, 0.49, 0.09, 0.51) == "illusion"
    assert _dormancy_verdict(1, 0.49, 0.11, 0.51) == _dormancy_verdict(1, 0.49, 0.09, 0.5) == "mixed"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nobody_reads_the_null_space_of_an_mlp(family):
    model = made(family)
    pairs = PromptSet.from_tokens([[1, 2, 3], [4, 5, 6]], [[1, 7, 3], [4, 8, 6]], [9, 9], [10, 10])
    exchange, site = Exchange(model, pairs), site_at("m1", kind="mlp")
    d = site.width(model)
    read, row, null = split_by_reading(random_bases(1, (1, d, 3))[0], reading_weights(site, model))
    assert abs(float(read.diagonal(dim1=1, dim2=2).sum()) - 32) < 1e-3 and d > 32  # as many dimensions as the stream has
    assert torch.allclose(exchange.lds(site, null[None])[0], exchange.none, atol=1e-4)
    assert (exchange.lds(site, row[None])[0] - exchange.none).abs().max() > 1e-3
    assert dormancy(exchange, site, row).null_share < 1e-6 and dormancy(exchange, site, null).null_share > 1 - 1e-6
    with pytest.raises(InputError, match="no null space"): dormancy(exchange, site_at("m1", kind="stream"), row)


def test_the_model_by_hand_is_what_it_says(tiny):
    data = illusion_pairs()
    assert data.labels.template.nunique() == 14 and len(data) == 28 and set(data.tokens[:, 0].tolist()) == {PLUS, MINUS}
    assert (data.answers[data.tokens[:, 0] == PLUS] == NAY).all() and (data.answers[data.tokens[:, 0] == MINUS] == AYE).all()
    pairs = Exchange(tiny, data)
    assert (pairs.none < 0).all() and torch.allclose(pairs.none, -pairs.source, atol=1e-5)


# choice, metric, verdict

def test_candidates_and_choice():
    nodes = Circuit.from_components(["a0.h1", "a0.h2", "a1.h0", "a1.h1"], roles=["x", "x", "unnamed", "y"]).nodes
    assert {name: site.name for name, site in candidates(nodes).items()} == {
        "a0.h1": "a0.h1", "a0.h2": "a0.h2", "a1.h0": "a1.h0", "a1.h1": "a1.h1", "x": "a0.h1 a0.h2", "circuit": "a0.h1 a0.h2 a1.h0 a1.h1"}
    assert list(candidates(nodes[:1])) == ["a0.h1"] and list(candidates(nodes[:2])) == ["a0.h1", "a0.h2", "circuit"]

    def one(right, heads, k, ld): return Subspace(Site(nodes[:heads]), torch.zeros(heads, 4, k), 1, right, ld, 0.0)
    assert best_of([one(0.8, 1, 1, 9), a := one(0.9, 1, 4, 1), one(0.9, 3, 2, 9)], 10**6) is a
    assert best_of([one(0.9, 1, 2, 1), b := one(0.9, 2, 1, 2)], 10**6) is b
    assert best_of([one(1.0, 8, 1, 1), c := one(31 / 32, 1, 1, 1)], 32) is c and best_of([d := one(1.0, 8, 1, 1), one(0.9, 1, 1, 1)], 32) is d


def finding(null=99, p=0.01, check="read where it moves", **given):
    ends = {"gain": (0.5, 0.3, 0.7), "over_random_weights": (0.5, 0.3, 0.7)} | given
    estimates = {name: Estimate(*e) for name, e in ends.items()} | {"iia": Estimate(0.9, 0.8, 1.0, p, p, n_null=null)}
    return Finding(("ioi",), 0.9, True, "", estimates, dict(site="a0.h1", k=2, dimensions=2, dormancy=dict(verdict=check)), [], {})


def test_verdicts():
    nan = float("nan")
    cases = {"found: which answer is right, in 2 dimensions of a0.h1": finding(), "not decidable": finding(gain=(0.5, nan, nan)),
             "not found": finding(gain=(0.1, -0.1, 0.3)),
             "not shown: the same search": finding(over_random_weights=(0.1, -0.1, 0.3)), "illusion": finding(check="illusion"),
             "works": finding(null=0, p=nan), "not shown to be these": finding(p=0.06)}
    assert judge_das(finding(p=0.05)).startswith("found")  # as low as 19 random subspaces allow
    for said, f in cases.items(): assert judge_das(f).startswith(said), said
    assert judge_das(finding(check="mixed")).endswith("(reading: mixed)")


def test_difference_of_two_intervals_by_hand():
    a, b = Interval(0.8, 0.6, 0.9, 40, 9, "x"), Interval(0.3, 0.2, 0.7, 40, 9, "x")
    d = difference_of(a, b)
    assert np.isclose([d.estimate, d.low, d.high], [0.5, 0.5 - np.hypot(0.2, 0.4), 0.5 + np.hypot(0.1, 0.1)]).all()
    few = difference_of(a, Interval(0.3, float("nan"), float("nan"), 4, 2, "too few templates"))
    assert np.isnan(few.low) and few.method == "too few templates" and np.isclose(few.estimate, 0.5)


def test_metric_on_the_compiled_model(compiled):
    heads = load_circuit("compiled-ioi-ioi")
    small = replace(heads, nodes=tuple(n for n in heads.nodes if n.role == "name mover"), edges=None)
    options = Options(n_prompts=16, n_random=19)
    result = das_iia(compiled, ["ioi"], options, [small])
    assert result.passes["stated"] == result.passes["edited"] and json.loads(result.to_json())["metric"] == "das_iia"
    f = result.findings[0]
    assert len(f.rows) == 3 * 5 and sum(r["chosen"] for r in f.rows) == 1 and set(f.rows[0]) == set(DAS_IIA.columns)
    assert f.metadata["site"] == "a2.h0 a2.h4" and f.estimates["whole_site"].value == 1 and f.estimates["gain"].value == f.value > 0.3
    assert f.estimates["iia"].null_mean > 0.3 and f.metadata["k"] == 8 and f.metadata["dormancy"]["verdict"] == "read where it moves"
    assert np.isclose(np.mean(np.array(f.per_prompt["ld' das"]) > 0), f.value) and len(f.per_prompt["ld"]) == 16 and min(f.per_prompt["ld"]) > 0


def test_metric_finds_nothing_in_decoys(compiled):
    decoys = Circuit((Node(site_at("a1.h0").nodes[0].component),), task="ioi", name="decoys")
    f = das_iia(compiled, ["ioi"], Options(n_prompts=16, n_random=4), [decoys]).findings[0]
    assert f.value == 0 and not f.passed and f.verdict.startswith("not found")


def test_circuit_without_heads_is_refused(compiled):
    with pytest.raises(InputError, match="no heads"): das_iia(compiled, ["ioi"], Options(n_prompts=8), [Circuit.from_components(["m1"], task="ioi")])


# slow

@pytest.mark.slow
def test_metric_on_a_trained_model(organism):
    result = das_iia(organism, ["sva"], Options(n_random=19))
    f = result.findings[0]
    assert result.passes["stated"] == result.passes["edited"] and f.verdict.startswith("found") and f.passed
    assert f.estimates["over_random_weights"].low > 0 and abs(f.estimates["random_weights_gain"].value) < 0.15


@pytest.mark.slow
def test_metric_is_repeatable(compiled):
    one = replace(load_circuit("compiled-ioi-ioi"), nodes=site_at("a2.h0").nodes, edges=None)
    first, again, other = (das_iia(compiled, ["ioi"], Options(n_prompts=12, n_random=4, seed=s), [one]).to_json() for s in (0, 0, 1))
    assert first == again != other


@pytest.mark.slow
def test_random_weights_gain_nothing(organism):
    for seed, task in enumerate(("ioi", "sva", "induction")):
        twin, splits = random_twin(organism, seed), das_splits(task, organism.tokenizer, 32, 16, 40, seed)
        sets = [Exchange(twin, p) for p in splits[:3]]
        found, _ = train_das(*sets[:2], site_at("a0.h3", "a1.h5"), [1, 8], seed=seed)
        for s in found: assert abs(iia(sets[2], s.site, s.basis).interval.estimate - float((sets[2].none > 0).double().mean())) <= 0.1


@pytest.mark.slow
def test_difference_of_gains_covers():
    def draw(rng): return tuple(draw_pairs(rng, shares, 0.2, 9, 5.0) for shares in ((0.8, 0.1), (0.55, 0.5)))
    def interval(a, b): return difference_of(*(paired_difference(*x) for x in (a, b)))
    found = coverage_simulation(interval, draw, 0.7 - 0.05, 400)
    assert 0.925 <= found.covered <= 0.99 and found.no_interval == 0


@pytest.mark.slow
def test_rank_among_random_subspaces_keeps_its_level(three):
    "A subspace that is itself random is among the best twentieth no more often than that."
    test, site = three[2], site_at("a0.h1")
    shares = (test.lds(site, random_bases(4000, (1, 4, 2), 9)) > 0).double().mean(1).numpy().reshape(200, 20)
    p = (1 + (shares[:, 1:] >= shares[:, :1]).sum(1)) / 20
    assert (p <= 0.05).mean() <= 0.09 and (p <= 0.5).mean() <= 0.6
