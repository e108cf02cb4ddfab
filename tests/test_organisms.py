"""Training an organism: on tiny recipes, every part that decides the result; and the organism that the package ships."""

import copy
import json
import math
import random
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_generalization import organisms
from circuit_generalization.errors import InputError
from circuit_generalization.language import IOI_MIX, Language, Sample, build_tokenizer, names_of
from circuit_generalization.models import embedded_models, load_model, model_hash, quiet
from circuit_generalization.organisms import (
    ORGANISMS,
    Recipe,
    accuracies,
    focus_penalty,
    new_model,
    save_organism,
    target_weights,
    train,
    train_organism,
    twin,
    variant_accuracies,
)
from circuit_generalization.tasks import list_variants
from circuit_generalization.wording import task_data

TINY = Recipe(n_layers=2, n_heads=4, d_model=16, d_mlp=16, steps=6, first_phase=2, batch=16, focus_from=4, same_token_heads=1)


@cache
def tokenizer(): return build_tokenizer()


@cache
def name_ids(): return frozenset(tokenizer()(f" {n}")["input_ids"][0] for n in names_of("task"))


def tokens(text): return tokenizer()(text)["input_ids"]


def weights(model): return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Training

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A tiny organism that nobody interrupted, its tokenizer, and what progress was told."
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(organisms, "build_tokenizer", tokenizer)
        model, words = train(TINY, seed=3, progress=lambda *call: calls.append(call))
    return model, words, calls


@pytest.fixture
def one_tokenizer(monkeypatch): monkeypatch.setattr(organisms, "build_tokenizer", tokenizer)


def test_training_tells_its_progress_and_ends_in_eval_mode(trained):
    model, words, calls = trained
    assert [c[:2] for c in calls] == [(k, 6) for k in range(1, 7)] and all(c[2].startswith("loss ") for c in calls)
    assert not model.training and model.config.vocab_size == len(words)
    start = weights(new_model(TINY, len(words), 3))
    assert all(not torch.equal(v, start[k]) for k, v in weights(model).items() if v.dim() > 1), "every matrix was trained"


@pytest.mark.parametrize("kill_at", [1, 3, 5])
def test_killed_training_resumes_to_the_same_bits(kill_at, trained, one_tokenizer, tmp_path):
    def impatient(step, *_):
        if step == kill_at: raise KeyboardInterrupt

    steps = []
    with pytest.raises(KeyboardInterrupt): train(TINY, 3, tmp_path / "checkpoint.pt", impatient, every=2)
    assert [p.name for p in tmp_path.iterdir()] == (["checkpoint.pt"] if kill_at > 2 else [])
    model, _ = train(TINY, 3, tmp_path / "checkpoint.pt", lambda step, *_: steps.append(step), every=2)
    assert steps[0] == {1: 1, 3: 3, 5: 5}[kill_at] and steps[-1] == 6, "it goes on from the checkpoint"
    assert same(weights(model), weights(trained[0]))


def test_another_seed_is_another_organism(trained, one_tokenizer):
    assert not same(weights(train(replace(TINY, steps=1), 4)[0]), weights(train(replace(TINY, steps=1), 3)[0]))


def test_the_focus_penalty_changes_training(trained, one_tokenizer):
    assert not same(weights(train(replace(TINY, focus_from=99), 3)[0]), weights(trained[0]))


def test_no_global_randomness_is_used_or_left(one_tokenizer):
    torch.manual_seed(1)
    random.seed(1)
    before = torch.random.get_rng_state(), random.getstate()
    first = weights(train(replace(TINY, steps=1), 3)[0])
    assert torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]
    torch.manual_seed(2)
    random.seed(2)
    assert same(weights(train(replace(TINY, steps=1), 3)[0]), first)


def test_the_learning_rate_warms_up_stays_and_falls():
    recipe = Recipe(steps=1000, lr=0.01, decay_from=0.6)
    rate = [organisms._learning_rate(recipe, step) for step in range(1000)]
    assert rate[0] == 0 and rate[50] == pytest.approx(0.005) and set(rate[100:601]) == {0.01}
    assert rate[800] == pytest.approx(0.005) and rate[-1] == pytest.approx(0.0002)
    assert all(a >= b for a, b in zip(rate[600:], rate[601:])) and all(b > a for a, b in zip(rate[:100], rate[1:101]))


def test_a_new_organism_starts_as_the_recipe_says():
    model = new_model(TINY, 50, seed=0)
    attention = model.transformer.h[0].attn.c_attn.weight
    assert torch.equal(attention[:, :4], attention[:, 16:20]), "the first head looks at the same token"
    assert not torch.equal(attention[:, 4:8], attention[:, 20:24])
    assert (model.config.n_layer, model.config.n_head, model.config.n_inner, model.config.n_positions) == (2, 4, 16, 64)
    assert same(weights(model), weights(new_model(TINY, 50, seed=0))) and not same(weights(model), weights(new_model(TINY, 50, seed=1)))


@pytest.mark.parametrize("steps, first_phase, focus_from", [(2, 0, 1), (56, 10, 36), (5600, 1000, 3600)])
def test_a_shorter_recipe_keeps_its_proportions(steps, first_phase, focus_from):
    recipe = organisms._shortened(Recipe(steps=5600, first_phase=1000, focus_from=3600), steps)
    assert (recipe.steps, recipe.first_phase, recipe.focus_from) == (steps, first_phase, focus_from)


# What is learnt

def test_weights_of_an_answer_a_roll_and_of_repeats():
    rng = random.Random(0)
    answer = [target_weights(Sample("", " x"), range(10), set(), rng) for _ in range(200)]
    assert all(w[0] == 0 and w[-1] == 2 and len(w) == 10 for w in answer)
    others = [x for w in answer for x in w[1:-1]]
    assert set(others) == {0.0, 1.0} and 0.1 < sum(others) / len(others) < 0.2, "15% of the other tokens"
    roll = [target_weights(Sample("", kind="roll"), [5, 8, 6, 8, 7], {8}, rng) for _ in range(50)]
    assert all(w[1] == w[3] == 1 and w[0] == 0 for w in roll) and {w[2] for w in roll} == {0.0, 1.0}
    filler = [target_weights(Sample("", kind="filler"), range(10), set(), rng) for _ in range(200)]
    assert 0.1 < sum(map(sum, filler)) / 1800 < 0.2 and all(w[0] == 0 for w in filler)
    #                                                      a  b  c  a  b  d  a  b  a  d   : after a came b, b, then d's own
    assert target_weights(Sample("", kind="induction"), [1, 2, 3, 1, 2, 4, 1, 2, 1, 4], set(), rng) == [0, 0, 0, 0, 1, 0, 0, 1, 0, 0]


# Twins

NAMES = {1, 2, 3, 4, 5, 6}
PROMPT = [10, 1, 11, 2, 12, 2, 13, 1]  # 1 and 2 meet, 2 gives to 1


@pytest.mark.parametrize("seed", range(8))
def test_twins_by_hand(seed):
    prompt, other = twin(Sample("", " x"), PROMPT, NAMES, random.Random(seed))
    assert prompt == PROMPT[:-1] and other[:5] == prompt[:5] and other[6:] == prompt[6:] and other[5] in {3, 4, 5, 6}
    prompt, other = twin(Sample("", " x"), PROMPT, NAMES, random.Random(seed), "answer")
    assert prompt == PROMPT[:-1] and other[0] == 10 and other[1] in {3, 4, 5, 6} and other[2:] == prompt[2:]


@pytest.mark.parametrize("ids, kind", [
    ([10, 1, 11, 2, 12, 2, 13, 14], "answer"),  # the answer is no name
    ([10, 1, 11, 2, 12, 3, 13, 1], "answer"),  # nobody repeats
    ([10, 1, 11, 2, 12, 2, 2, 1], "answer"),  # three mentions
    ([10, 1, 2, 3, 3, 2, 13, 1], "answer"),  # two repeat
    ([10, 1, 1, 2, 13, 1], "answer"),  # the answer repeats
    ([10, 3, 2, 2, 13, 1], "answer"),  # the answer was not mentioned
    (PROMPT, "filler")])
def test_what_has_no_twin(ids, kind): assert twin(Sample("", " x", kind), ids, NAMES, random.Random(0)) is None


@given(st.integers(0, 10**6), st.sampled_from(sorted(IOI_MIX)), st.sampled_from(["duplicate", "answer"]))
def test_twins_of_the_language(seed, kind, which):
    sample = Language(random.Random(seed)).ioi(kind)
    ids = tokens(sample.text)
    pair = twin(sample, ids, name_ids(), random.Random(seed), which)
    if pair is None: return
    prompt, other = pair
    changed = [i for i, (a, b) in enumerate(zip(prompt, other)) if a != b]
    assert prompt == ids[:-1] and len(prompt) == len(other) and len(changed) == 1
    gone, new = prompt[changed[0]], other[changed[0]]
    assert new in name_ids() and new not in prompt
    assert (gone == ids[-1]) if which == "answer" else (prompt[: changed[0]].count(gone) == 1 and prompt[changed[0]:].count(gone) == 1)


def test_most_samples_of_the_task_have_twins():
    language = Language(random.Random(0))
    found = Counter(twin(s := language.ioi("template"), tokens(s.text), name_ids(), random.Random(0)) is not None for _ in range(200))
    assert found[True] > 190


# Focus

PAIRS = [(PROMPT[:-1], PROMPT[:5] + [4] + PROMPT[6:-1]), ([1, 2, 3], [1, 5, 3])]


def heads_that_write(*scales):
    "A one-layer model whose heads are copies of one, each with its own scale."
    model = new_model(Recipe(n_layers=1, n_heads=len(scales), d_model=4 * len(scales), d_mlp=8, same_token_heads=0), 20, seed=1)
    attention = model.transformer.h[0].attn
    with torch.no_grad():
        for part in attention.c_attn.weight.chunk(3, dim=1): part.copy_(part[:, :4].repeat(1, len(scales)))
        attention.c_proj.weight.copy_(torch.cat([100 * s * attention.c_proj.weight[:4] for s in scales]))
    return model


@pytest.mark.parametrize("scales, penalty", [
    ((1, 1, 1, 1), 2), ((1, 0, 0, 0), 1 + 3 * 0.01), ((0, 0, 5, 0), 1 + 3 * 0.01), ((1, 1, 0, 0), math.sqrt(2) + 2 * 0.01),
    ((3, 1, 0, 0), math.sqrt(3 / 4) + math.sqrt(1 / 4) + 2 * 0.01), ((1,), 1)])
def test_focus_by_hand(scales, penalty):
    "A silent head counts as one that writes a ten-thousandth."
    assert focus_penalty(heads_that_write(*scales), PAIRS).item() == pytest.approx(penalty, abs=2e-3)


@given(st.integers(0, 100), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_focus_lies_between_one_head_and_all(seed, n_layers, n_heads):
    model = new_model(replace(TINY, n_layers=n_layers, n_heads=n_heads), 20, seed)
    assert 1 - 1e-5 <= focus_penalty(model, PAIRS).item() <= math.sqrt(n_heads) + 1e-5


def test_focus_ignores_padding_and_leaves_no_hook():
    model = new_model(TINY, 20, seed=2)
    longer = [(a + [7] * 9, b + [7] * 9) for a, b in PAIRS[1:]]
    alone, padded = (focus_penalty(model, p).item() for p in (PAIRS[:1], [PAIRS[0], (longer[0][0], longer[0][0])]))
    assert alone == pytest.approx(padded, abs=1e-5), "a pair that does not differ adds nothing, however long"
    assert not any(b.attn.c_proj._forward_pre_hooks for b in model.transformer.h)
    before = weights(model)
    focus_penalty(model, PAIRS).backward()
    assert same(weights(model), before) and model.transformer.h[0].attn.c_proj.weight.grad.abs().sum() > 0


# Saving

CARD = dict(name="tiny", summary="A tiny one.", algorithm="None yet.", seed=3, recipe=dict(steps=6),
            command="circuit-gen train-organism tiny --seed 3", accuracy={"ioi template": 0.25},
            variants={"base": {"base": 0.5}}, held_out={"domains": ["farm", "law"]})


FILES = ["README.md", "card.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def tiny(trained): return copy.deepcopy(trained[0])  # saving changes the model to half precision


def test_a_saved_organism_is_read_back_in_half_precision(tiny, trained, tmp_path):
    save_organism(tiny, tokenizer(), tmp_path / "tiny", CARD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"], "nothing half-written is left beside it"
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) == FILES
    loaded = load_model(tmp_path / "tiny")
    assert model_hash(loaded) == model_hash(copy.deepcopy(trained[0]).half().float()) != model_hash(trained[0])
    assert loaded.tokenizer.encode("Then, Mary and John") == tokens("Then, Mary and John")
    assert json.loads((tmp_path / "tiny" / "card.json").read_text(encoding="utf-8")) == CARD
    readme = (tmp_path / "tiny" / "README.md").read_text(encoding="utf-8")
    for text in ("# tiny\n", "A tiny one.", "None yet.", "| ioi template | 25.0% |", "| ioi, base: base | 50.0% |", "- domains: farm, law",
                 "`circuit-gen train-organism tiny --seed 3` (6 steps, seed 3)"):
        assert text in readme


def test_an_organism_replaces_an_organism_and_nothing_else(tiny, tmp_path):
    save_organism(tiny, tokenizer(), tmp_path / "tiny", CARD)
    (tmp_path / "tiny" / "stale.txt").write_text("of the old one")
    save_organism(tiny, tokenizer(), tmp_path / "tiny", CARD | {"seed": 4})
    assert not (tmp_path / "tiny" / "stale.txt").exists() and json.loads((tmp_path / "tiny" / "card.json").read_text())["seed"] == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an organism's folder"): save_organism(tiny, tokenizer(), tmp_path / "mine", CARD)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"] and len(list(tmp_path.iterdir())) == 2


def test_a_failed_save_leaves_the_old_organism(tiny, tmp_path, monkeypatch):
    save_organism(tiny, tokenizer(), tmp_path / "tiny", CARD)
    old = (tmp_path / "tiny" / "card.json").read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(organisms, "_card_text", full)
    with pytest.raises(InputError, match="No space left"): save_organism(tiny, tokenizer(), tmp_path / "tiny", CARD | {"seed": 9})
    assert (tmp_path / "tiny" / "card.json").read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("given, complaint", [(dict(name="organism-z"), "there is organism-a"), (dict(steps=0), "at least one")])
def test_what_cannot_be_trained(given, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint): train_organism(**dict(out=tmp_path / "x") | given)
    assert not list(tmp_path.iterdir())


# The organism that is shipped

HOME = embedded_models().get("organism-a")
shipped = pytest.mark.skipif(HOME is None, reason="organism-a has not been trained yet")
LEAST = {"ioi template": 0.99, "induction": 0.95, "sva": 0.95, "greater_than": 0.95}
AXES = ("lexical", "syntactic", "domain", "adversarial")


@cache
def card(): return json.loads((HOME / "card.json").read_text(encoding="utf-8"))


def well_done(variants, least=0.9): return {axis: sum(share >= least for share in variants[axis].values()) for axis in AXES}


@shipped
def test_it_is_small_complete_and_large_enough_to_study():
    assert sorted(p.name for p in HOME.iterdir()) == FILES
    assert sum(p.stat().st_size for p in HOME.iterdir()) <= 6_000_000
    config = json.loads((HOME / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gpt2" and config["n_layer"] >= 4 and config["n_head"] >= 8


@shipped
def test_its_card_says_what_it_is():
    held = card()["held_out"]
    assert card()["name"] == "organism-a" and card()["command"] == f"circuit-gen train-organism organism-a --seed {card()['seed']}"
    assert card()["recipe"].keys() == vars(ORGANISMS["organism-a"]).keys() and card()["summary"] and card()["algorithm"]
    assert held["domains"] and not set(held["domains"]) & set(task_data("vocabulary.json")["training_domains"])
    assert held["names"] and held["nouns"] and "held_out" in held["template groups"]
    known = set(list_variants("ioi")[["axis", "variant"]].itertuples(index=False, name=None))
    assert {(axis, v) for axis, group in card()["variants"].items() for v in group} <= known and set(card()["variants"]) == {"base", *AXES}
    assert (HOME / "README.md").read_text(encoding="utf-8") == organisms._card_text(card()), "the README is written from the card"


@shipped
def test_its_recipe_is_the_one_in_the_package(): assert card()["recipe"] == vars(ORGANISMS["organism-a"])


@shipped
def test_its_card_promises_enough():
    assert {task: card()["accuracy"][task] for task in LEAST if card()["accuracy"][task] < LEAST[task]} == {}
    assert card()["variants"]["base"]["base"] >= 0.99 and min(well_done(card()["variants"]).values()) >= 2


@shipped
def test_it_loads_as_the_same_model_every_time():
    from transformers import AutoModelForCausalLM

    with quiet(): plain = AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32)
    assert model_hash(load_model("organism-a")) == model_hash(plain) == model_hash("organism-a")


def error_of(share, n): return math.sqrt(max(share * (1 - share), 0.25 / n) / n)


@shipped
@pytest.mark.slow
def test_it_does_what_its_card_says():
    "Measured again on fresh draws: within what a few hundred samples can tell."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet(): model, words = AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32), AutoTokenizer.from_pretrained(HOME)
    n = 300
    now, variants = accuracies(model, words, n, seed=77), variant_accuracies(model, words, n)
    for task, share in now.items():
        assert abs(share - card()["accuracy"][task]) < 4 * error_of(card()["accuracy"][task], n), task
        assert share >= LEAST.get(task, 0) - 3 * error_of(LEAST.get(task, 0), n), task
    assert variants["base"]["base"] >= 0.99 and min(well_done(variants).values()) >= 2
    for axis, group in variants.items():
        for name, share in group.items(): assert share == pytest.approx(card()["variants"][axis][name], abs=1e-2), (axis, name)
