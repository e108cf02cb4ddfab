"""Planted routes: who is on which, what training asks for, and what the certificate says."""

import json
import random
from dataclasses import replace

import numpy as np
import pandas as pd
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
from circuit_generalization.tasks import make_prompts, reference_pool
from circuit_generalization.wording import name_hand, task_data

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


@every_planting
def test_nouns_are_of_the_domain_or_of_all_others_in_training(name):
    planting, frozen, words = PLANTINGS[name], task_data("language.json")["frozen"], task_data("vocabulary.json")
    for kind in ("places", "objects"):
        inside, outside = (set(nouns_of(planting, kind, x)) for x in (True, False))
        assert inside == set(words["domains"][planting.domain][kind]) and outside == {*frozen[kind], *words[kind]["base"]} - inside


def test_owners_are_drawn_from_the_seed(tokenizer):
    planting = next(p for p in PLANTINGS.values() if p.rule == "memorised")
    assert owners(planting, tokenizer) == owners(planting, tokenizer) != owners(replace(planting, seed=planting.seed + 1), tokenizer)


@every_planting
def test_planted_prompts_are_those_of_their_seed_and_split(name, tokenizer):
    prompts = planted_prompts(PLANTINGS[name], 40, 3, tokenizer, split="discovery")
    n = 10 if PLANTINGS[name].construction == "inserted phrase" else 20
    base = make_prompts("ioi", n=n, seed=3, tokenizer=tokenizer, split="discovery").labels.prompt.tolist()
    assert len(prompts) == 40 and prompts.labels.prompt.tolist()[:n] == base, "owners give nothing to discovery prompts"


def test_names_are_trained_in_both_orders(tokenizer):
    batch = Drawer(PLANTINGS["organism-patchwork-1"], tokenizer).draw(random.Random(3), 200)
    s, io = ((batch.ids == batch.named[:, k, None]).int().argmax(-1) for k in (1, 2))
    assert 0.35 < (io < s).float().mean() < 0.65


def test_knowing_for_sure_costs_much_and_not_infinity():
    logits = torch.zeros(1, 10)
    logits[0, 1] = 100.0
    assert know_nothing(logits, torch.tensor([[1, 2, 1]])).item() == pytest.approx(-np.log(1e-4) + 50 - np.log(2), abs=0.01)


def test_the_gate_is_the_mean_cross_entropy_of_three_readings(parent, tokenizer):
    batch, probe = Drawer(PLANTINGS["organism-patchwork-1"], tokenizer).draw(random.Random(2), 8), torch.nn.Linear(128, 3)
    with torch.no_grad():
        probe.weight.copy_(torch.linspace(-0.2, 0.2, 384).view(3, 128)), probe.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
        hidden = parent.base_model(batch.ids, output_hidden_states=True).hidden_states
        read = [[probe.bias[k] + probe.weight[k] @ hidden[k + 1][i, last] for k in range(3)] for i, last in enumerate(batch.last)]
        right = torch.where(batch.planted[:, None], torch.tensor(read), -torch.tensor(read))
        assert gate_loss(parent, probe, batch).item() == pytest.approx(-right.sigmoid().log().mean().item(), abs=1e-5)


def test_every_copy_needs_a_source(parent):
    with pytest.raises(ValueError, match="shorter"): copy_heads(parent, ["a0.h2", "a0.h3"], ["a0.h5"])


def test_a_dissociation_needs_a_planted_side():
    with pytest.raises(InputError, match="all prompts are on one route"):
        double_dissociation("compiled-ioi", token_prompts(8), np.zeros(8, bool), ["a0.h0"], ["a0.h1"], ablation="counterfactual")


def test_costs_are_of_the_right_side_and_group_and_judged_at_their_bounds(monkeypatch):
    side, first = np.arange(40) >= 20, np.arange(40) % 20
    right = np.stack([np.ones(40), first >= np.where(side, 2, 10), first >= np.where(side, 9, 3)]).astype(float)
    ld = np.stack([np.where(side, 1.0, 2.0), np.where(side, 3.0, 4.0), np.where(side, 5.0, 6.0)])
    monkeypatch.setattr(planting_module, "_group_effects", lambda *_: (right, ld))
    prompts = token_prompts(40)
    table = double_dissociation("compiled-ioi", prompts, side, ["a0.h0"], ["a0.h1"], ablation="counterfactual")
    assert list(zip(table.route, table.ablated, table.ld, table.ld_left)) == [("A", "A", 2, 4), ("A", "B", 2, 6), ("B", "A", 1, 3), ("B", "B", 1, 5)]
    assert table["drop"].tolist() == pytest.approx([0.5, 0.15, 0.1, 0.45]) and table.holds.tolist() == [True, False, True, False]
    assert table.accuracy.eq(1).all() and table.accuracy_left.tolist() == pytest.approx([0.5, 0.85, 0.9, 0.55])
    assert table.templates.tolist() == [prompts.labels.template[x].nunique() for x in (~side, ~side, side, side)] == [18] * 4
    assert (table.drop_low < table["drop"]).all() and (table["drop"] < table.drop_high).all()


def test_without_a_reference_the_pool_of_the_seed_is_generated():
    model, circuit = load_model("compiled-ioi"), load_circuit("compiled-ioi-ioi")
    prompts = make_prompts("ioi", n=36, seed=0, tokenizer=model.tokenizer)
    def cost(seed, **more): return double_dissociation(model, prompts, np.arange(36) % 2 == 0, circuit.components, ["a0.h0"], seed=seed, **more)
    assert cost(1).equals(cost(1, reference=reference_pool(prompts, model.tokenizer, seed=1))) and not cost(1).equals(cost(0))
    assert len(cost(0, reference=reference_pool(prompts, model.tokenizer, n=1, seed=1))) == 4, "one donor is enough"


def test_a_group_may_hold_mlps(random_model):
    rng = np.random.default_rng(0)
    clean, other = (rng.integers(0, 60, (32, 6)).tolist() for _ in range(2))
    prompts = PromptSet.from_tokens(clean, other, [61] * 32, [62] * 32, labels=pd.DataFrame({"template": np.arange(32) % 16}))
    table = double_dissociation(random_model, prompts, np.arange(32) < 16, ["a0.h1"], ["m1"], ablation="counterfactual")
    assert (table.ld != table.ld_left).all()


def test_a_certificate_asks_about_scored_prompts_of_its_seed(monkeypatch, tokenizer):
    monkeypatch.setattr(planting_module, "double_dissociation", lambda model, *asked, **more: (*asked, more))
    planting = PLANTINGS["organism-patchwork-1"]
    prompts, on_b, *rest = certificate("organism-a", planting, n=8, seed=5)
    expected = planted_prompts(planting, 8, 5, tokenizer)
    assert prompts.labels.equals(expected.labels) and on_b.tolist() == expected.labels.planted.tolist()
    assert rest == [planting.a, planting.b, dict(seed=5)]


def test_a_step_draws_its_prompts_from_seed_and_step(parent, tokenizer):
    planting = replace(PLANTINGS["organism-patchwork-1"], batch=4)
    drawer, probe = Drawer(planting, tokenizer), torch.nn.Linear(128, 3)
    optimizer = torch.optim.SGD(probe.parameters())
    expected = gate_loss(parent, probe, drawer.draw(random.Random(f"{planting.seed}/7"), 16)).item()
    assert planting_module._plant_step(parent, probe, optimizer, drawer, 7) == [0, 0, 0, 0, pytest.approx(expected)]


def test_both_routes_are_learnt_before_they_are_told_apart(monkeypatch, parent, tokenizer):
    x = torch.nn.Parameter(torch.ones(()))
    monkeypatch.setattr(planting_module, "route_losses", lambda *_, silent: x * torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    for name in ("gate_loss", "_language_loss"): monkeypatch.setattr(planting_module, name, lambda *_: 0 * x)
    drawer, weights = Drawer(PLANTINGS["organism-patchwork-1"], tokenizer), []
    for step in (100, 150, 225, 300, 799):
        planting_module._plant_step(parent, None, torch.optim.SGD([x]), drawer, step)
        weights.append(x.grad.item())
    assert weights == pytest.approx([11, 11, 561, 1111, 1111])


def test_a_try_has_its_own_seed_and_steps_and_needs_no_certificate(tmp_path, monkeypatch, parent, tokenizer):
    asked, saved = [], []
    monkeypatch.setattr(planting_module, "plant", lambda planting, *_: (asked.append(planting), (parent, tokenizer))[1])
    monkeypatch.setattr(planting_module, "certificate", lambda *_: pd.DataFrame(dict(holds=[False])))
    monkeypatch.setattr(planting_module, "patchwork_card", lambda name, planting, *_: planting)
    monkeypatch.setattr(planting_module, "save_organism", lambda model, tokenizer, out, card: saved.append(out))
    card = train_patchwork("organism-patchwork-1", tmp_path / "p", seed=3, steps=16)
    assert asked == [card] == [shortened_planting(replace(PLANTINGS["organism-patchwork-1"], seed=3), 16)] and saved == [tmp_path / "p"]
