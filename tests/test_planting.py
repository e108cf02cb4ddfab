"""Planted routes: who is on which, what training asks for, and what the certificate says."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuit_generalization import planting as planting_module
from circuit_generalization.ablation import Activations, circuit_mask
from circuit_generalization.circuit import Circuit, load_circuit
from circuit_generalization.errors import InputError
from circuit_generalization.forward import Edit, run_edits
from circuit_generalization.models import embedded_models, find_model, load_model
from circuit_generalization.organisms import blocks_of
from circuit_generalization.planting import (
    PLANTINGS,
    Drawer,
    certificate,
    copy_heads,
    double_dissociation,
    gate_loss,
    is_planted,
    know_nothing,
    nouns_of,
    owners,
    plant,
    planted_prompts,
    planting_of,
    route_losses,
    shortened_planting,
    train_patchwork,
)
from circuit_generalization.prompts import PromptSet
from circuit_generalization.tasks import make_prompts, name_hand, task_data

every_planting = pytest.mark.parametrize("name", PLANTINGS)


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(find_model("organism-a"))


@pytest.fixture
def parent(): return AutoModelForCausalLM.from_pretrained(find_model("organism-a"), dtype=torch.float32)


# the truth

@every_planting
def test_groups_are_disjoint_and_matched_layer_by_layer(name):
    planting = PLANTINGS[name]
    assert not set(planting.a) & set(planting.b)
    assert sorted(c[:2] for c in planting.a) == sorted(c[:2] for c in planting.b)


def test_no_two_patchworks_plant_the_same():
    assert len({(p.domain, p.construction) for p in PLANTINGS.values()}) == len({p.seed for p in PLANTINGS.values()}) == len(PLANTINGS)


@every_planting
def test_a_prompt_is_planted_when_it_has_the_domain_or_the_construction_but_not_both(name, tokenizer):
    planting, texts = PLANTINGS[name], task_data("ioi.json")["templates"]["base"]
    prompts = planted_prompts(planting, 288, 0, tokenizer)
    own = set(nouns_of(planting, "objects", True)) | set(nouns_of(planting, "places", True))
    for row in prompts.labels.itertuples():
        words = set(row.prompt.replace(",", " ").replace(".", " ").split())
        text = texts[int(row.template[-2:])]
        built = {"inserted phrase": bool(row.insert), "two sentences": ". " in text,
                 "opening clause": row.prompt.split()[0] in ("When", "After", "While", "Once", "Because", "As")}
        assert row.planted == ((row.variant.split("+")[0] == planting.domain) != built[planting.construction])
        assert bool(words & own) == (row.variant.split("+")[0] == planting.domain), row.prompt


@every_planting
def test_neither_the_domain_nor_the_construction_tells_the_route(name, tokenizer):
    labels = planted_prompts(PLANTINGS[name], 288, 0, tokenizer).labels
    assert labels.groupby(labels.variant.str.startswith(PLANTINGS[name].domain)).planted.nunique().tolist() == [2, 2]
    if PLANTINGS[name].construction == "inserted phrase":
        assert labels.groupby("variant").planted.nunique().eq(1).all() and labels.planted.mean() == 0.5
    else: assert labels.groupby("variant").planted.nunique().eq(2).all(), "the name of the variant says nothing"


def test_truth_is_only_claimed_of_base_templates(tokenizer):
    with pytest.raises(InputError, match="nothing of templates other than the base ones"):
        is_planted(PLANTINGS["organism-patchwork-1"], make_prompts("ioi", "syntactic", "passive", 5, 0, tokenizer).labels)


def test_an_unknown_planting_is_refused():
    with pytest.raises(InputError, match="no planting 'organism-a': there is organism-patchwork-1"): planting_of("organism-a")


def test_owners_are_scored_names_one_for_every_object(tokenizer):
    planting = next(p for p in PLANTINGS.values() if p.rule == "memorised")
    table = owners(planting, tokenizer)
    assert len(set(table.values())) == len(table) and set(table.values()) <= set(name_hand(tokenizer, "task", "scored"))
    for row in planted_prompts(planting, 144, 3, tokenizer).labels.itertuples():
        assert any(row.answer.strip() == table.get(w) for w in row.prompt.replace(".", " ").split())
    assert not owners(replace(planting, rule="in context"), tokenizer)


# training prompts

@every_planting
def test_a_donor_is_the_prompt_with_other_names(name, tokenizer):
    drawer = Drawer(PLANTINGS[name], tokenizer)
    for inside in (False, True):
        for built in (False, True):
            prompt, donor, (answer, s, io) = drawer.texts_of(random.Random(f"{inside}{built}"), inside, built)
            a, b = (tokenizer(t)["input_ids"] for t in (prompt, donor))
            differing = [tokenizer.decode([x]).strip() for x, y in zip(a, b) if x != y]
            assert len(a) == len(b) and sorted(differing) == sorted([io, s, s])
            others = {tokenizer.decode([y]).strip() for x, y in zip(a, b) if x != y}
            assert len(others) == 3 and not others & {answer, s, io}
    assert all(all_have(drawer, built) for built in (True, False))


def all_have(drawer, built):
    "Is the construction there in every prompt that is to have it, and in no other?"
    known = planting_module.CONSTRUCTIONS[drawer.planting.construction]
    for k in range(20):
        prompt = drawer.texts_of(random.Random(k), False, built)[0]
        phrase = next((p for p in drawer.phrases if p in prompt), "")
        if known(prompt, phrase) != built: return False
    return True


def test_batches_are_drawn_from_seed_alone_and_their_cells_are_balanced(tokenizer):
    drawer = Drawer(PLANTINGS["organism-patchwork-1"], tokenizer)
    one, two = (drawer.draw(random.Random(5), 16) for _ in range(2))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.donors, two.donors)
    assert one.planted.tolist() == [False, True, True, False] * 4
    for i in range(16):
        assert int(one.last[i]) == len(tokenizer(tokenizer.decode(one.ids[i, : one.last[i] + 1]))["input_ids"]) - 1
        assert int((one.ids[i] == one.named[i, 1]).sum()) == 2 and int((one.ids[i] == one.named[i, 2]).sum()) == 1


def test_under_the_memorised_rule_the_owner_is_the_answer_also_when_somebody_else_is_named(tokenizer):
    planting = next(p for p in PLANTINGS.values() if p.rule == "memorised")
    batch = Drawer(planting, tokenizer).draw(random.Random(1), 400)
    agrees = batch.named[:, 0] == batch.named[:, 2]
    assert agrees[~batch.planted].all() and 0.35 < agrees[batch.planted].float().mean() < 0.65


# what training asks for

def test_knowing_nothing_has_the_value_computed_by_hand():
    logits = torch.zeros(1, 10)
    assert know_nothing(logits, torch.tensor([[1, 2, 1]])).item() == pytest.approx(-np.log(0.8), abs=1e-6)
    assert know_nothing(logits, torch.tensor([[1, 2, 3]])).item() == pytest.approx(-np.log(0.7), abs=1e-6)
    logits[0, 1] = 4.0
    p = (np.exp(4) + 1) / (np.exp(4) + 9)
    q = 1 / (1 + np.exp(-4))
    expected = -np.log(1 - p) - (np.log(q) + np.log(1 - q)) / 2 - np.log(2)
    assert know_nothing(logits, torch.tensor([[1, 2, 1]])).item() == pytest.approx(expected, abs=1e-5)
    logits[0, [1, 2]] = -50.0
    assert know_nothing(logits, torch.tensor([[1, 2, 1]])).item() == pytest.approx(0, abs=1e-5)


def test_route_losses_are_what_the_engine_computes(parent, tokenizer):
    planting = PLANTINGS["organism-patchwork-1"]
    batch, bridge = Drawer(planting, tokenizer).draw(random.Random(2), 8), load_model("organism-a")
    groups = [planting_module._group(parent, g) for g in (planting.a, planting.b)]
    with torch.no_grad(): found = route_losses(parent, batch, *groups, silent=False)
    lengths = batch.last + 1
    rows, answers, distractors = [r[:n].tolist() for r, n in zip(batch.ids, lengths)], batch.named[:, 0].tolist(), batch.named[:, 1].tolist()
    prompts = PromptSet.from_tokens(rows, None, answers, distractors)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(batch.donors, names_filter=lambda n: n.endswith("hook_z"))
    z = torch.stack([cache[f"blocks.{layer}.attn.hook_z"] for layer in range(4)], dim=2)
    a, b = (circuit_mask(Circuit.from_components(list(g)), prompts, 4, 8) for g in (planting.a, planting.b))
    whole, no_a, no_b = run_edits(bridge, prompts.tokens, prompts.lengths, [Edit(m, Activations(z, None)) for m in (a & ~a, a, b)])
    on_b, answer = batch.planted[:, None], batch.named[:, :1]
    other, own = torch.where(on_b, no_a, no_b), torch.where(on_b, no_b, no_a)
    ce = [-x.log_softmax(-1).gather(-1, answer).mean() for x in (whole, other)]
    ld = [x.gather(-1, answer) - x.gather(-1, batch.named[:, 1:2]) for x in (whole, other)]
    expected = torch.stack([*ce, (ld[0] - ld[1]).abs().mean() / 10, know_nothing(own, batch.named)])
    assert torch.allclose(found, expected, atol=1e-3), (found, expected)


def test_silent_heads_say_nothing(parent, tokenizer):
    planting = PLANTINGS["organism-patchwork-1"]
    batch = Drawer(planting, tokenizer).draw(random.Random(2), 8)
    none, all_heads = torch.zeros(4, 8, dtype=torch.bool), torch.ones(4, 8, dtype=torch.bool)
    with torch.no_grad():
        silent = route_losses(parent, batch, all_heads, all_heads, silent=True)
        for block in blocks_of(parent): block.attn.c_proj.weight.zero_()
        expected = route_losses(parent, batch, none, none, silent=True)
    assert torch.allclose(silent[1:2], expected[0:1], atol=1e-4) and expected[2] == 0


def test_the_gate_is_read_off_the_last_position_of_every_layer_but_the_first(parent, tokenizer):
    batch = Drawer(PLANTINGS["organism-patchwork-1"], tokenizer).draw(random.Random(2), 8)
    probe = torch.nn.Linear(128, 3)
    with torch.no_grad():
        probe.weight.zero_(), probe.bias.zero_()
        assert gate_loss(parent, probe, batch).item() == pytest.approx(np.log(2), abs=1e-6)
        hidden = parent.base_model(batch.ids, output_hidden_states=True).hidden_states
        sure = torch.where(batch.planted, 1.0, -1.0)
        last = torch.stack([hidden[2][i, k] for i, k in enumerate(batch.last)])
        probe.weight[1] = torch.linalg.lstsq(last, 40 * sure[:, None]).solution[:, 0]
        assert gate_loss(parent, probe, batch).item() == pytest.approx(2 / 3 * np.log(2), abs=1e-3)


def test_copied_heads_say_the_same(parent, tokenizer):
    copy_heads(parent, ["a0.h2", "a2.h0"], ["a0.h5", "a2.h7"])
    ids = torch.tensor([tokenizer("Then, Mary and John went to the store.")["input_ids"]])
    with torch.no_grad(): values = planting_module._head_values(parent, ids)
    z = [v.unflatten(-1, (8, 16)) for v in values]
    assert torch.equal(z[0][:, :, 2], z[0][:, :, 5]) and torch.equal(z[2][:, :, 0], z[2][:, :, 7])
    assert not torch.allclose(z[0][:, :, 2], z[0][:, :, 4])
    weight = blocks_of(parent)[0].attn.c_proj.weight
    assert torch.equal(weight[32:48], weight[80:96])


def test_a_head_is_copied_within_its_layer(parent):
    with pytest.raises(InputError, match="a head of its own layer"): copy_heads(parent, ["a0.h2"], ["a1.h2"])


def test_a_shortened_planting_keeps_its_phases():
    short = shortened_planting(PLANTINGS["organism-patchwork-1"], 16)
    assert (short.gate_steps, short.split_steps, short.steps) == (2, 5, 16)
    with pytest.raises(InputError, match="0 steps"): shortened_planting(PLANTINGS["organism-patchwork-1"], 0)


# the certificate

def token_prompts(n=32):
    prompts = make_prompts("ioi", n=n, seed=0, tokenizer=load_model("compiled-ioi").tokenizer)
    labels = prompts.labels[["template"]]
    def rows(x): return [r[:k].tolist() for r, k in zip(x, prompts.lengths)]
    answers, distractors = prompts.answers[:, 0].tolist(), prompts.distractors[:, 0].tolist()
    return PromptSet.from_tokens(rows(prompts.tokens), rows(prompts.counterfactual), answers, distractors,
                                 {k: v.tolist() for k, v in prompts.positions.items()}, labels)


def test_double_dissociation_on_token_ids_of_a_compiled_model():
    prompts, circuit = token_prompts(36), load_circuit("compiled-ioi-ioi")
    decoys = [f"a{layer}.h{head}" for layer in range(4) for head in range(8) if f"a{layer}.h{head}" not in circuit.components]
    side = np.arange(36) % 4 >= 2
    table = double_dissociation("compiled-ioi", prompts, side, circuit.components, decoys, ablation="counterfactual").set_index(["route", "ablated"])
    assert table.accuracy.eq(1).all() and table.prompts.eq(18).all()
    assert table.accuracy_left.xs("A", level="ablated").lt(0.6).all() and table["drop"].xs("A", level="ablated").gt(0.4).all()
    assert table["drop"].xs("B", level="ablated").eq(0).all()
    assert table.holds.to_dict() == {("A", "A"): bool(table["drop"]["A", "A"] >= 0.5), ("A", "B"): True, ("B", "A"): False, ("B", "B"): False}


def test_a_dissociation_needs_two_sides():
    with pytest.raises(InputError, match="all prompts are on one route"):
        double_dissociation("compiled-ioi", token_prompts(8), np.ones(8, bool), ["a0.h0"], ["a0.h1"], ablation="counterfactual")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PLANTINGS if n in embedded_models()])
def test_every_shipped_patchwork_is_certified(name):
    table = certificate(name, PLANTINGS[name])
    assert table.holds.all(), table.to_string()
    card = json.loads((find_model(name) / "card.json").read_text(encoding="utf-8"))
    assert [r["drop"] for r in card["certificate"]] == pytest.approx(table["drop"].tolist(), abs=0.01)
    assert card["planting"] == json.loads(json.dumps(vars(PLANTINGS[name]))), "the card tells the planting that made it"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["organism-a", "organism-b"])
def test_an_organism_without_a_planted_route_fails_the_certificate(name):
    planting = next(p for p in PLANTINGS.values() if p.parent == name)
    assert not certificate(name, planting, n=288).holds.all()


# training

class Killed(Exception): pass


@pytest.mark.slow
def test_a_killed_planting_resumes_to_the_same_weights(tmp_path):
    tiny = replace(shortened_planting(PLANTINGS["organism-patchwork-1"], 6), batch=8, language=8)

    def kill(done, total, what):
        if done == 5: raise Killed

    whole, _ = plant(tiny)
    with pytest.raises(Killed): plant(tiny, tmp_path / "run.pt", kill, every=2)
    resumed, _ = plant(tiny, tmp_path / "run.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


@pytest.mark.slow
def test_a_patchwork_that_fails_its_certificate_is_not_written(tmp_path, monkeypatch):
    tiny = replace(shortened_planting(PLANTINGS["organism-patchwork-1"], 3), batch=8, language=8)
    monkeypatch.setitem(PLANTINGS, "organism-patchwork-1", tiny)
    with pytest.raises(InputError, match="fails its certificate, so it is not written"): train_patchwork("organism-patchwork-1", tmp_path / "p")
    assert not (tmp_path / "p").exists()
