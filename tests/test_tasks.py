"""Generated prompts: each variant changes what it says it changes, and nothing else."""

import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch

from circuit_generalization.language import build_tokenizer
from circuit_generalization.prompts import PromptError, PromptSet, bos_ids, concat_prompts, prompts_hash
from circuit_generalization.tasks import (
    ORDERS,
    SLOT,
    SPLITS,
    TaskError,
    cell_of,
    fill,
    list_variants,
    make_prompts,
    name_hand,
    reference_pool,
    task_data,
    variant_spec,
)

VARIANTS = [(row.axis, row.variant) for row in list_variants("ioi").itertuples()]
VARIED = VARIANTS[1:]
IOI = task_data("ioi.json")
N = 2 * len(IOI["templates"]["base"]) + 3
every_variant, every_change = pytest.mark.parametrize("axis, variant", VARIANTS), pytest.mark.parametrize("axis, variant", VARIED)


@cache
def tokenizer(): return build_tokenizer()


@cache
def made(axis="base", variant="base", n=N, seed=0, split="scored"):
    return make_prompts("ioi", axis, variant, n, seed, tokenizer(), split)


def words(text): return re.findall(r"[A-Za-z']+", text)


def word_at(p, role, i): return tokenizer().decode(p.tokens[i, p.positions[role][i]]).strip()


def names_in(p): return [row.split() for row in p.labels["names"]]


def nouns_of(group, kind):
    vocabulary = task_data("vocabulary.json")
    return vocabulary[kind][group] if group in vocabulary[kind] else vocabulary["domains"][group][kind]


def is_subsequence(short, long):
    rest = iter(long)
    return all(word in rest for word in short)


# Data

def test_there_is_enough_of_everything():
    table = list_variants("ioi")
    assert table.variant.is_unique and table.variant[0] == "base" and table.templates[0] >= 15 and (table.templates >= 8).all()
    counts = table[table.axis != "base"].groupby("axis").size()
    assert set(counts.index) == {"lexical", "syntactic", "domain", "adversarial"} and (counts >= 2).all() and table.what.is_unique
    for row in table.itertuples(): assert variant_spec("ioi", row.axis, row.variant)["what"] == row.what


@pytest.mark.parametrize("group", IOI["templates"])
def test_templates_are_well_formed(group):
    templates = IOI["templates"][group]
    assert len(set(templates)) == len(templates)
    for template in templates:
        slots = SLOT.findall(template)
        assert slots.count("A") == slots.count("B") == 1 and slots.index("A") < slots.index("B") < slots.index("S"), template
        assert {"PLACE", "OBJECT"} <= set(slots) <= {"A", "B", "S", "C", "PLACE", "OBJECT", "+"} and template.endswith(" to"), template
        assert ("[S][+]" in template) == (group in ("base", "held_out")), template
        assert not SLOT.sub("", template).count("["), f"a slot that is none in {template!r}"


def test_template_groups_share_no_sentence():
    every = [t for group in IOI["templates"].values() for t in group]
    assert len(set(every)) == len(every)


# Filling

@pytest.mark.parametrize("template, slots, text, ends", [
    ("[A] met [B]", {"A": "Mary", "B": "Al"}, "Mary met Al", [("A", 3), ("B", 10)]),
    ("a [OBJECT], a [PLACE]", {"OBJECT": "apple", "PLACE": "store"}, "an apple, a store", [("OBJECT", 7), ("PLACE", 16)]),
    ("A [OBJECT] of data [PLACE]", {"OBJECT": "owl", "PLACE": "inn"}, "An owl of data inn", [("OBJECT", 5), ("PLACE", 17)]),
    ("[S], [S] and [S]", {"S": ["X", "Yo", "Z"]}, "X, Yo and Z", [("S", 0), ("S", 4), ("S", 10)]),
    ("[S][+] gave", {"S": "Al", "+": ""}, "Al gave", [("S", 1), ("+", 1)])])
def test_fill(template, slots, text, ends):
    assert fill(template, slots) == (text, ends)


# Determinism

@every_variant
def test_a_seed_decides_everything(axis, variant):
    p = made(axis, variant)
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state().clone()
    again = make_prompts("ioi", axis, variant, N, 0, tokenizer())
    assert prompts_hash(again) == prompts_hash(p) and again.labels.equals(p.labels)
    assert (np.random.get_state()[1] == before[0]).all() and random.getstate() == before[1] and torch.equal(torch.get_rng_state(), before[2])
    other = make_prompts("ioi", axis, variant, N, 1, tokenizer())
    assert not set(other.labels.prompt) & set(p.labels.prompt) and not set(other.labels.base_id) & set(p.labels.base_id)
    assert prompts_hash(make_prompts("ioi", axis, variant, 5, 0, tokenizer())) == prompts_hash(p[:5]), "the first n are the same for every n"


@every_variant
def test_templates_and_orders_are_balanced(axis, variant):
    n_base, p = len(IOI["templates"]["base"]), made(axis, variant)
    full = p.labels.iloc[: 2 * n_base]
    assert full.order.value_counts().to_dict() == dict.fromkeys(ORDERS, n_base)
    assert full.groupby("base_template").order.apply(set).map(len).eq(2).all()
    group = variant_spec("ioi", axis, variant).get("templates", "base")
    assert set(full.template) == {f"{group}-{k:02d}" for k in range(len(IOI["templates"][group]))}, "every template is used"


# Matched pairs: exactly the claimed factor differs

@every_change
def test_pairs_have_one_base_prompt(axis, variant):
    p, base = made(axis, variant), made()
    assert p.labels.base_id.tolist() == base.labels.prompt_id.tolist() == base.labels.base_id.tolist()
    assert not set(p.labels.prompt_id) & set(base.labels.prompt_id) and (p.labels.axis == axis).all() and (p.labels.variant == variant).all()
    assert p.labels.order.tolist() == base.labels.order.tolist() and p.labels.base_template.tolist() == base.labels.template.tolist()
    assert (p.labels.prompt != base.labels.prompt).all(), "every prompt was changed"
    changed = set(variant_spec("ioi", axis, variant)) - {"axis", "what"}
    assert len(changed) == 1, "one factor at a time"


def same_but_for_articles(a, b): return re.sub(r"\b([Aa])n\b", r"\1", a) == re.sub(r"\b([Aa])n\b", r"\1", b)


def without_words(text, marks):
    "The text with some words replaced by marks."
    return re.sub(r"[A-Za-z]+", lambda m: marks.get(m.group(), m.group()), text)


def spoken(text): return [w.lower() for w in words(text) if w not in ("and", "but", "so", "then", "Then")]


CHANGES = {"names": "names", "nouns": "nouns", "domain": "nouns", "insert": "insert", "templates": "templates"}


@every_change
def test_only_the_claimed_factor_differs(axis, variant):
    p, base, spec = made(axis, variant), made(), variant_spec("ioi", axis, variant)
    (key,) = set(spec) - {"axis", "what"}
    for i, (new, old) in enumerate(zip(p.labels.itertuples(), base.labels.itertuples())):
        if key != "names": assert new.names == old.names and (new.answer, new.distractor) == (old.answer, old.distractor)
        if key != "templates": assert new.template == old.template
        globals()[f"check_{CHANGES[key]}"](new, old, spec[key])
        for role in ("IO", "S1", "S2"): assert key == "names" or word_at(p, role, i) == word_at(base, role, i)


def check_names(new, old, group):
    mine, theirs = new.names.split(), old.names.split()
    known = {row["name"] for row in task_data("names.csv") if row["split"] == group}
    assert set(mine) <= known and not set(mine) & set(theirs)
    assert without_words(new.prompt, {n: str(k) for k, n in enumerate(mine)}) == without_words(old.prompt, {n: str(k) for k, n in enumerate(theirs)})


def check_nouns(new, old, group):
    marks = [{w: kind for kind in ("places", "objects") for w in nouns_of(g, kind)} for g in (group, "base")]
    a, b = (without_words(row.prompt, m) for row, m in zip((new, old), marks))
    assert same_but_for_articles(a, b) and a.count("places") == a.count("objects") == 1
    assert not set(words(new.prompt)) - set(words(old.prompt)) <= set(marks[1]), "and the new nouns are none of the base's"


def check_insert(new, old, group):
    assert new.insert in IOI["inserts"][group] and old.insert == "" and new.prompt.count(new.insert) == 1
    assert new.prompt.replace(new.insert, "") == old.prompt and f"{new.distractor.strip()}{new.insert}" in new.prompt


def check_templates(new, old, group):
    io, s, third, *unused = new.names.split()
    said, count = words(new.prompt), Counter(words(new.prompt))
    assert new.template.startswith(f"{group}-") and old.template.startswith("base-") and count[io] == 1 and not set(unused) & set(said)
    nouns = [w for kind in ("places", "objects") for w in nouns_of("base", kind)]
    assert Counter(w for w in words(old.prompt) if w in nouns) <= count, "the same place and object"
    assert count[third] == (1 if group == "third_name" else 0) and count[s] == (3 if group == "extra_s" else 2)
    if group != "held_out":
        assert new.template[-2:] == old.template[-2:]
        assert is_subsequence(spoken(old.prompt), spoken(new.prompt)), f"something was taken away in {new.prompt!r}"


@every_variant
def test_only_listed_names_are_said(axis, variant):
    known = {row["name"] for row in task_data("names.csv") if row["split"] in ("task", "rare")}
    for row, listed in zip(made(axis, variant).labels.itertuples(), names_in(made(axis, variant))):
        fixed = set(words(" ".join(t for g in IOI["templates"].values() for t in g)))
        assert len(set(listed)) == len(listed) == 5 and set(words(row.prompt)) & known - fixed <= set(listed)


# Roles

@every_variant
def test_role_positions_point_at_the_right_tokens(axis, variant):
    p = made(axis, variant)
    for i, row in enumerate(p.labels.itertuples()):
        io, s = row.answer.strip(), row.distractor.strip()
        text = [tokenizer().decode(t).strip() for t in p.tokens[i, : p.lengths[i]]]
        mentions, at = [k for k, w in enumerate(text) if w == s], {r: int(v[i]) for r, v in p.positions.items()}
        assert [k for k, w in enumerate(text) if w == io] == [at["IO"]] and (mentions[0], mentions[-1]) == (at["S1"], at["S2"])
        assert [at["S2a"]] == mentions[1:-1] if "S2a" in at else len(mentions) == 2
        assert (at["IO"] < at["S1"]) == (row.order == "ABBA") and max(at["IO"], at["S1"]) < at["S2"] < at["END"] == len(text) - 1
        assert text[-1] == "to" and all(at[r] == at[r.removesuffix("+1")] + 1 for r in at if r.endswith("+1")) and "S1+1" in at
        assert p.answers[i].tolist() == [int(p.tokens[i, at["IO"]])] and p.distractors[i].tolist() == [int(p.tokens[i, at["S1"]])]


@every_variant
def test_a_beginning_of_sequence_token_moves_every_role(axis, variant):
    p, plain = make_prompts("ioi", axis, variant, 9, 0, tokenizer(), bos=True), made(axis, variant)[:9]
    assert p.tokens[:, 0].tolist() == p.counterfactual[:, 0].tolist() == bos_ids(tokenizer()) * 9 and p.labels.bos.all()
    assert p.lengths.tolist() == (plain.lengths + 1).tolist() and p.answers.tolist() == plain.answers.tolist()
    assert {r: v.tolist() for r, v in p.positions.items()} == {r: (v + 1).tolist() for r, v in plain.positions.items()}
    assert cell_of(p) != cell_of(plain) and len(reference_pool(p[:1], tokenizer(), n=32)) == 32


# Counterfactuals

@every_variant
def test_counterfactuals_replace_repeated_mentions_only(axis, variant):
    p = made(axis, variant)
    repeated = [r for r in ("S2a", "S2") if r in p.positions]
    for i, listed in enumerate(names_in(p)):
        changed = (p.tokens[i] != p.counterfactual[i]).nonzero()[:, 0].tolist()
        assert changed == sorted(int(p.positions[r][i]) for r in repeated), "first mentions and everything else are kept"
        new = [tokenizer().decode(p.counterfactual[i, k]).strip() for k in changed]
        assert len(set(new)) == len(new) and set(new) <= set(listed[3:]), "distinct, unrelated names"
        told = Counter(tokenizer().decode(t).strip() for t in p.counterfactual[i, : p.lengths[i]])
        assert all(told[n] <= 1 for n in listed), "so nobody is named twice"


# Splits and pools

@pytest.mark.parametrize("group", ["task", "rare"])
def test_splits_share_no_name(group):
    hands = {split: set(name_hand(tokenizer(), group, split)) for split in SPLITS}
    assert set(hands) == {"scored", "reference", "discovery", "calibration"} and all(len(h) >= 20 for h in hands.values())
    for a, b in combinations(hands, 2): assert not hands[a] & hands[b], (a, b)
    assert not set().union(*hands.values()) & {r["name"] for r in task_data("names.csv") if r["split"] != group}


@every_variant
def test_prompts_of_two_splits_share_no_name(axis, variant):
    used = {split: {n for row in names_in(made(axis, variant, split=split)) for n in row} for split in SPLITS}
    for a, b in combinations(used, 2): assert not used[a] & used[b], (a, b)
    pool = reference_pool(made(axis, variant)[:4], tokenizer(), n=32)
    known = {row["name"] for row in task_data("names.csv")}
    said = {w for text in pool.labels.prompt for w in words(text)} & known
    fixed = set(words(" ".join(t for g in IOI["templates"].values() for t in g)))
    for split in ("scored", "discovery", "calibration"): assert not (said - fixed) & used[split], split


@every_variant
def test_reference_pools_are_uninformative_and_fit(axis, variant):
    p = made(axis, variant)[[0, 1, len(IOI["templates"]["base"]) + 1]]
    pool = reference_pool(p, tokenizer())
    cells, mine = Counter(cell_of(pool)), cell_of(p)
    assert len(set(mine)) == 3 and set(cells) == set(mine) and all(cells[c] == 32 for c in mine), "32 of each prompt's cell: length and positions too"
    repeated = [r for r in ("S2a", "S2") if r in pool.positions]
    for i in range(len(pool)):
        said = [word_at(pool, r, i) for r in ("IO", "S1", *repeated)]
        told = Counter(tokenizer().decode(t).strip() for t in pool.tokens[i, : pool.lengths[i]])
        assert len(set(said)) == len(said) and all(told[n] == 1 for n in said), "three unrelated names, each mentioned once"
    assert pool.labels.prompt.nunique() > 0.95 * len(pool) and pool.labels.prompt_id.is_unique and not set(pool.labels.prompt) & set(p.labels.prompt)
    assert prompts_hash(reference_pool(p, tokenizer())) == prompts_hash(pool) != prompts_hash(reference_pool(p, tokenizer(), seed=1))
    assert prompts_hash(reference_pool(p[[1]], tokenizer())) in {prompts_hash(pool[k : k + 32]) for k in (0, 32, 64)}, "whatever else is in the set"


def test_a_pool_keeps_the_vocabulary_of_its_variant():
    pool = reference_pool(made("domain", "hospital")[:2], tokenizer())
    places = [w for text in pool.labels.prompt for w in words(text) if w in nouns_of("hospital", "places")]
    assert len(places) >= len(pool) and not set(places) & set(nouns_of("base", "places"))


def test_cells_tell_prompts_apart():
    p = made()
    assert len(set(cell_of(p[:1]) + cell_of(p[1:2]))) == 2, "templates"
    half = len(IOI["templates"]["base"])
    a, b = cell_of(p[[0]])[0], cell_of(p[[half]])[0]
    assert a[:2] == b[:2] and {a[2], b[2]} == set(ORDERS), "and orders"
    mixed = cell_of(concat_prompts([p[[0]], made("adversarial", "extra_subject")[[0]]]))
    assert "S2a" not in dict(mixed[0][4:]) and "S2a" in dict(mixed[1][4:]), "a role that a prompt lacks is no part of its cell"


# Refusals

@pytest.mark.parametrize("change, message", [
    (dict(task="poetry"), "no task 'poetry': there is ioi"), (dict(axis="moral"), "no axis 'moral': there is base, lexical"),
    (dict(axis="lexical", variant="space"), "axis 'lexical' of task 'ioi' has no variant 'space': there is rare_names"),
    (dict(split="test"), "no split 'test': there is scored"), (dict(n=0), "n is 0: at least one"), (dict(tokenizer=None), "needs the tokenizer")])
def test_what_does_not_exist_is_refused_with_what_does(change, message):
    with pytest.raises(TaskError) as caught: make_prompts(**dict(task="ioi", n=2, tokenizer=tokenizer()) | change)
    assert message in str(caught.value) and isinstance(caught.value, ValueError)


def test_a_tokenizer_without_names_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(TaskError, match="this tokenizer has only 0 one-token task names for scored prompts; 5 are needed"):
        make_prompts("ioi", n=1, tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner))


def test_other_prompts_have_no_pool():
    bare = PromptSet.from_tokens([[1, 2]], answers=[3], distractors=[4], labels={"prompt_id": ["mine"], "prompt": ["a b"]})
    with pytest.raises(PromptError, match=r"prompt mine \('a b'\) was not generated by a task.*reference="): reference_pool(bare, tokenizer())


def test_a_pool_that_cannot_fit_is_refused():
    p = made(n=2)
    moved = replace(p, positions=p.positions | {"S2": p.positions["S2"] - 1})
    with pytest.raises(PromptError, match=r"prompt ioi-base-scored-0-0000. \('.*only 0 of 32 reference prompts of its length and role"):
        reference_pool(moved, tokenizer())
