"""Balanced brackets: strings and features by hand and by enumeration, the trained classifier, and an independent forward of its weights."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy.special import erf, softmax

from circuit_generalization import bracket_training, brackets
from circuit_generalization.bracket_training import (
    SEED,
    BracketRecipe,
    bracket_accuracies,
    logit_difference,
    new_classifier,
    save_classifier,
    train_brackets,
    train_classifier,
)
from circuit_generalization.brackets import (
    BALANCED,
    KINDS,
    LENGTHS,
    SHARES,
    UNBALANCED,
    VOCABULARY,
    bracket_features,
    bracket_prompts,
    bracket_texts,
    elevations,
    encode_brackets,
    is_balanced,
    open_share,
    place_elevations,
    prompts_of_texts,
    split_of,
)
from circuit_generalization.cli import main
from circuit_generalization.errors import InputError
from circuit_generalization.models import ModelError, embedded_models, final_logits, list_models, load_model, model_hash
from circuit_generalization.prompts import PromptSet

NEAR_MISSES = [kind for kind in KINDS if kind not in ("balanced", "random")]
TINY = BracketRecipe(n_texts=300, steps=3, batch=16)
texts = st.text("()", min_size=1, max_size=40)


def reduced(text):
    "What is left when pairs are struck out: another way to tell balance."
    while "()" in text: text = text.replace("()", "")
    return text


# Strings

@given(texts)
def test_balance_is_what_striking_out_pairs_says(text):
    assert is_balanced(text) == (reduced(text) == "")


def test_balance_of_every_short_string():
    counts = [sum(is_balanced("".join(s)) for s in product("()", repeat=n)) for n in range(1, 11)]
    assert counts == [0, 1, 0, 2, 0, 5, 0, 14, 0, 42]  # Catalan's numbers


@given(texts)
def test_elevations_step_by_one_and_agree_with_counts(text):
    left, right = elevations(text), elevations(text, "right")
    for i in range(len(text)):
        assert left[i] == text[:i + 1].count("(") - text[:i + 1].count(")")
        assert right[i] == text[i:].count(")") - text[i:].count("(")


@given(texts)
def test_features_by_other_means(text):
    f = bracket_features(text)
    assert f["length"] == len(text) and f["n_open"] == text.count("(") and f["balanced"] == (reduced(text) == "")
    assert f["equal_counts"] == (2 * text.count("(") == len(text))
    assert f["never_negative"] == (")" not in reduced(text)) and f["never_negative_from_right"] == ("(" not in reduced(text))
    assert f["starts_open"] == (text[0] == "(") and f["ends_closed"] == (text[-1] == ")")


def test_tokens_by_hand():
    assert encode_brackets("())(") == [1, 2, 3, 3, 2, 4]
    assert VOCABULARY.index("balanced") == BALANCED and VOCABULARY.index("unbalanced") == UNBALANCED


@pytest.mark.parametrize("text", ["", "(a)", "[]", "()" * 20 + "(", "( )"])
def test_what_is_no_string_of_brackets_is_refused(text):
    with pytest.raises(InputError, match="round brackets, and nothing else"): encode_brackets(text)
    with pytest.raises(InputError, match="round brackets, and nothing else"): prompts_of_texts([text] if text else ["()", text])


def test_another_side_is_refused():
    with pytest.raises(InputError, match="use left or right"): elevations("()", "up")
    with pytest.raises(InputError, match="use left or right"): open_share(prompts_of_texts(["()"]), "up")


# Drawing

@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_balanced_strings_are_drawn_evenly(pairs):
    rng = np.random.default_rng(0)
    drawn, n = [brackets._text(brackets._balanced(rng, pairs)) for _ in range(1400)], {1: 1, 2: 2, 4: 14}[pairs]
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == n and all(map(is_balanced, drawn))
    assert ((counts - 1400 / n) ** 2 / (1400 / n)).sum() < 40  # chi-squared of 13 degrees: 1 in 10,000


@pytest.mark.parametrize("pairs", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_it_says(kind, pairs):
    rng = np.random.default_rng(pairs)
    for _ in range(30):
        text = brackets._text(KINDS[kind](rng, pairs))
        f = bracket_features(text)
        assert len(text) == 2 * pairs
        if kind != "random": assert f["balanced"] == (kind == "balanced")
        if kind in ("shuffled", "swap", "dip"): assert f["equal_counts"] and not f["never_negative"]
        if kind == "swap": assert elevations(text).min() >= -2
        if kind == "dip": assert elevations(text).min() == -1 and (elevations(text) == -1).sum() == 1
        if kind == "extra_open": assert f["never_negative"] and pairs < f["n_open"] <= pairs + 3
        if kind == "extra_close": assert f["never_negative_from_right"] and pairs - 3 <= f["n_open"] < pairs


def test_shares_lengths_and_classes_are_as_asked():
    drawn = bracket_texts(6000, seed=1, split="train")
    kinds = [kind for kind, _ in drawn]
    assert all(abs(kinds.count(kind) / 6000 - share) < 0.025 for kind, share in SHARES.items())
    lengths = np.array([len(text) for _, text in drawn])
    assert set(lengths) == set(LENGTHS) and all(abs((lengths == n).mean() - 0.05) < 0.02 for n in LENGTHS[4:])
    assert 0.46 < np.mean([is_balanced(text) for _, text in drawn]) < 0.55


def test_a_seed_is_a_draw_and_splits_do_not_meet():
    a, b = bracket_texts(300, seed=4), bracket_texts(300, seed=5)
    assert a == bracket_texts(300, seed=4) and a != b
    train = bracket_texts(3000, seed=4, split="train")
    assert {split_of(t) for _, t in a + b} == {"test"} and {split_of(t) for _, t in train} == {"train"}
    every = ["".join(s) for s in product("()", repeat=10)]
    assert 0.07 < np.mean([split_of(t) == "test" for t in every]) < 0.13


@pytest.mark.parametrize("options, complaint", [
    (dict(n=0), "at least one"), (dict(lengths=[3]), "even numbers"), (dict(lengths=[]), "even numbers"), (dict(lengths=[42]), "even numbers"),
    (dict(lengths=[0]), "even numbers"), (dict(shares={"odd": 1}), "among balanced, random"), (dict(shares={}), "not all of them 0"),
    (dict(shares={"dip": 0}), "not all of them 0"), (dict(shares={"dip": 2, "swap": -1}), "not all of them 0"),
    (dict(split="validation"), "use train or test"), (dict(lengths=[2], shares={"balanced": 1}), "allow other lengths")])
def test_what_cannot_be_drawn_is_refused(options, complaint):
    assert split_of("()") == "train"
    with pytest.raises(InputError, match=complaint): bracket_prompts(**(dict(n=5, seed=0) | options))


# Prompts

def test_prompts_by_hand():
    p = prompts_of_texts(["()", "(()("])
    assert p.tokens.tolist() == [[1, 2, 3, 4, 0, 0], [1, 2, 2, 3, 2, 4]] and p.lengths.tolist() == [4, 6]
    assert p.answers[:, 0].tolist() == [BALANCED, UNBALANCED] and p.distractors[:, 0].tolist() == [UNBALANCED, BALANCED]
    assert {role: at.tolist() for role, at in p.positions.items()} == {"END": [3, 5], "BEGIN": [0, 0], "FIRST": [1, 1], "LAST": [2, 4]}
    assert p.labels.answer.tolist() == ["balanced", "unbalanced"] and p.labels.kind.tolist() == ["given", "given"]


def test_places_by_hand():
    p, nan = prompts_of_texts(["(())", ")("]), np.nan
    assert np.array_equal(place_elevations(p), [[nan, 1, 2, 1, 0, 0], [nan, -1, 0, 0, nan, nan]], equal_nan=True)
    assert np.array_equal(place_elevations(p, "right"), [[0, 0, 1, 2, 1, nan], [0, 0, -1, nan, nan, nan]], equal_nan=True)
    assert np.allclose(open_share(p), [[nan, 1, 1, 2 / 3, 1 / 2, 1 / 2], [nan, 0, 1 / 2, 1 / 2, nan, nan]], equal_nan=True)
    assert np.allclose(open_share(p, "right"), [[1 / 2, 1 / 2, 1 / 3, 0, 0, nan], [1 / 2, 1 / 2, 1, nan, nan, nan]], equal_nan=True)


@given(st.lists(texts, min_size=1, max_size=4))
def test_shares_are_counts(many):
    p = prompts_of_texts(many)
    left, right = open_share(p), open_share(p, "right")
    for row, text in enumerate(many):
        for i in range(len(text)):
            assert np.isclose(left[row, i + 1], text[:i + 1].count("(") / (i + 1))
            assert np.isclose(right[row, i + 1], text[i:].count("(") / (len(text) - i))


def test_other_prompts_have_no_places():
    other = PromptSet.from_tokens([[1, 2]], answers=[3], distractors=[4])
    with pytest.raises(InputError, match="not brackets"): open_share(other)


# Training

def test_training_is_repeatable_and_resumes(tmp_path):
    whole = train_classifier(TINY, seed=1, checkpoint=tmp_path / "a", every=2)
    assert (tmp_path / "a").exists()  # after 2 of 3 steps
    resumed = train_classifier(TINY, seed=1, checkpoint=tmp_path / "a", every=2)
    assert model_hash(whole) == model_hash(resumed) != model_hash(train_classifier(TINY, seed=2))
    assert model_hash(whole) != model_hash(new_classifier(TINY, 1).eval())
    assert not whole.training and not any(p.requires_grad for p in whole.parameters())


@pytest.fixture
def few(monkeypatch):
    "Cards count few strings."
    monkeypatch.setattr(bracket_training, "bracket_accuracies", lambda model: bracket_accuracies(model, n=10))


def test_a_trained_folder_loads_and_is_replaced(tmp_path, few):
    seen = []
    card = train_brackets(seed=1, out=tmp_path / "deep" / "m", recipe=TINY, progress=lambda *a: seen.append(a))
    assert [a[:2] for a in seen] == [(1, 3), (2, 3), (3, 3)] and card["recipe"]["steps"] == 3 and "Nobody has looked" in card["algorithm"]
    assert model_hash(tmp_path / "deep" / "m") == model_hash(train_classifier(TINY, seed=1))
    train_brackets(seed=2, out=tmp_path / "deep" / "m", recipe=TINY)
    assert json.loads((tmp_path / "deep" / "m" / "card.json").read_text())["seed"] == 2
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["m"]


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="not a model's folder"): save_classifier(new_classifier(TINY, 0), tmp_path / "mine", {})
    with pytest.raises(InputError, match="at least one string"): train_classifier(BracketRecipe(steps=0))


# The shipped classifier

@pytest.fixture(scope="module")
def model(): return load_model("brackets")


@pytest.fixture(scope="module")
def card(): return json.loads((embedded_models()["brackets"] / "card.json").read_text(encoding="utf-8"))


def test_it_is_small_and_listed():
    folder = embedded_models()["brackets"]
    assert sum(p.stat().st_size for p in folder.iterdir()) < 10**6
    row = list_models().set_index("name").loc["brackets"]
    assert (row.layers, row.heads, row.d_model) == (3, 2, 56) and "balanced brackets" in row.what


def test_it_knows_brackets(model):
    right = bracket_accuracies(model, n=400, seed=77)
    assert right.pop("mixture") >= 0.995
    assert set(right) == set(KINDS) and min(right.values()) >= 0.98


def test_the_card_says_what_is_so(model, card):
    assert card["accuracy"] == pytest.approx(bracket_accuracies(model), abs=0.001)
    assert BracketRecipe(**card["recipe"]) == BracketRecipe() and card["seed"] == SEED
    assert "Nobody has looked" not in card["algorithm"]


def numpy_logits(folder: Path, tokens: list[int]):
    """The forward pass of one prompt without padding, from the file alone: float64, no library of models."""
    w = {k: v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()}
    c = json.loads((folder / "config.json").read_text())

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name): return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x, kept = w["embed.weight"][tokens] + w["pos_embed.weight"][:len(tokens)], {}
    for layer in range(c["n_layers"]):
        b, kept[f"blocks.{layer}.hook_resid_pre"] = f"blocks.{layer}", x
        q, k, v = (linear(norm(x, f"{b}.ln1"), f"{b}.attn.{i}").reshape(len(tokens), c["n_heads"], -1) for i in "qkv")
        kept |= {f"{b}.attn.hook_{i}": value for i, value in zip("qkv", (q, k, v))}
        z = np.einsum("hij,jhd->ihd", softmax(np.einsum("ihd,jhd->hij", q, k) / np.sqrt(c["d_head"]), axis=-1), v)
        x = kept[f"{b}.hook_resid_mid"] = x + linear(z.reshape(len(tokens), -1), f"{b}.attn.o")
        hidden = linear(norm(x, f"{b}.ln2"), f"{b}.mlp.in")
        mlp = linear(hidden * (1 + erf(hidden / 2**0.5)) / 2, f"{b}.mlp.out")
        kept |= {f"{b}.attn.hook_z": z, f"{b}.hook_mlp_out": mlp}
        x = x + mlp
    return norm(x, "ln_final")[-1] @ w["unembed.weight"].T, kept


def test_logits_and_activations_are_those_of_a_forward_in_numpy(model):
    for text in ("(())()", "())(", "(" * 20 + ")" * 20, ")"):
        tokens = encode_brackets(text)
        logits, expected = numpy_logits(embedded_models()["brackets"], tokens)
        with torch.no_grad(): found, cache = model.run_with_cache(torch.tensor([tokens]))
        assert np.abs(found[0, -1].numpy() - logits).max() < 1e-4
        assert all(np.abs(cache[name][0].numpy() - value).max() < 1e-4 for name, value in expected.items())
        assert len(expected) == 3 * 7


@pytest.mark.parametrize("hook", ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_mlp_out", "hook_resid_pre", "hook_resid_mid"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_hook_edits(model, hook, layer):
    "What another prompt has there changes the answer; what the prompt itself has there changes nothing."
    p, name = bracket_prompts(40, seed=3, lengths=[16], shares={"balanced": 1, "shuffled": 1}), f"blocks.{layer}.{hook}"
    with torch.no_grad(): _, cache = model.run_with_cache(p.tokens)
    def said(values): return final_logits(model, p.tokens, p.lengths, [(name, lambda value, hook: values)])
    clean = final_logits(model, p.tokens, p.lengths)
    assert (said(cache[name]) - clean).abs().max() < 1e-5
    assert (said(cache[name].roll(1, 0)) - clean).abs().max() > 1e-3


def test_padding_is_not_seen(model):
    "In whatever way the model is called."
    p = bracket_prompts(60, seed=9)
    together = logit_difference(model, p)
    for i in range(0, 60, 7):
        alone = p.tokens[i:i + 1, :int(p.lengths[i])]
        with torch.no_grad(): _, cache = model.run_with_cache(p.tokens)
        assert torch.allclose(logit_difference(model, p[[i]]), together[i], atol=1e-4)
        assert torch.allclose(final_logits(model, alone), final_logits(model, p.tokens[i:i + 1], p.lengths[i:i + 1]), atol=1e-4)
        with torch.no_grad(): _, own = model.run_with_cache(alone)
        assert torch.allclose(cache["blocks.2.attn.hook_z"][i, :alone.shape[1]], own["blocks.2.attn.hook_z"][0], atol=1e-4)


def test_other_padding_is_refused(model):
    p = prompts_of_texts(["()", "(())"])
    with pytest.raises(InputError, match=r"pad with its pad_token_id \(0\)"): final_logits(model, p.tokens.where(p.tokens != 0, 3), p.lengths)
    assert final_logits(model, p.tokens, p.lengths).shape == (2, 7)


def test_it_looks_both_ways(model):
    a, b = (torch.tensor([encode_brackets(t)]) for t in ("(())", "(()("))
    with torch.no_grad(): assert (model(a) - model(b))[0, 0].abs().max() > 1e-3


# Folders that TransformerLens cannot build

@pytest.fixture
def folder(tmp_path, few):
    train_brackets(seed=1, out=tmp_path / "m", recipe=TINY)
    return tmp_path / "m"


@pytest.mark.parametrize("change", [dict(d_mlp=57), dict(n_layers=4), dict(n_layers=2), dict(d_model="wide"), dict(act_fn="unheard-of")])
def test_a_config_that_is_not_of_these_weights_is_refused(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match="not a model that TransformerLens can build") as refused: load_model(folder)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_weights_that_are_damaged_are_refused(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged or incomplete"): load_model(folder)


# Commands

COMMANDS = [["measure", "--task", "ioi"], ["discover", "--task", "ioi"], ["score", "--circuit", "organism-a-ioi", "--prompts", "PROMPTS"],
            ["epistasis", "--tasks", "ioi", "sva"], ["protocol", "dose-response", "--tasks", "ioi"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_commands_say_that_it_reads_no_text(command, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("prompt,answer,distractor\na, b, c\n")
    command = [str(tmp_path / "p.csv") if word == "PROMPTS" else word for word in command]
    assert main([*command, "--model", "brackets", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--model brackets: it reads token ids, not text" in said
    assert not (tmp_path / "out").exists()
