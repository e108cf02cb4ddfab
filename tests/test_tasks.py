"""Generated prompts: each variant changes what it says it changes, and nothing else."""

import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

from circuit_generalization.ioi import ORDERS
from circuit_generalization.language import build_tokenizer
from circuit_generalization.prompts import PromptError, PromptSet, bos_ids, concat_prompts, prompts_hash
from circuit_generalization.tasks import cell_of, list_variants, make_prompts, reference_pool, variant_spec
from circuit_generalization.wording import SLOT, SPLITS, TaskError, fill, name_hand, task_data

VARIANTS = [(row.axis, row.variant) for row in list_variants("ioi").itertuples()]
VARIED = VARIANTS[1:]
IOI, NAMES = task_data("ioi.json"), {row["name"] for row in task_data("names.csv")}
N = 2 * len(IOI["templates"]["base"]) + 3
every_variant, every_change = pytest.mark.parametrize("axis, variant", VARIANTS), pytest.mark.parametrize("axis, variant", VARIED)


@cache
def tokenizer(): return build_tokenizer()


@cache
def made(axis="base", variant="base", n=N, seed=0, split="scored"):
    return make_prompts("ioi", axis, variant, n, seed, tokenizer(), split)


def words(text): return re.findall(r"[A-Za-z']+", text)


def said_until(p, role, i): return tokenizer().decode(p.tokens[i, : p.positions[role][i] + 1])


def word_at(p, role, i): return words(said_until(p, role, i))[-1]


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
    counts = table[table.axis != "base"].groupby("axis").size().to_dict()
    assert counts == {"lexical": 6, "syntactic": 10, "domain": 9, "adversarial": 8} and table.what.is_unique
    for row in table.itertuples(): assert variant_spec("ioi", row.axis, row.variant)["what"] == row.what


TAIL = {"trailing_space": " to "}  # of templates; otherwise " to"
REPEATS = {"double_io": ("IO", "S"), "triple_io": ("IO", "IO", "S"), "repeated_io": ("S", "IO"), "extra_s": ("S", "S"), "misleading": ("S", "S")}
ADVERSARIAL = [v["templates"] for v in IOI["variants"].values() if v["axis"] == "adversarial"]


@pytest.mark.parametrize("group", IOI["templates"])
def test_templates_are_well_formed(group):
    templates = IOI["templates"][group]
    assert len(set(templates)) == len(templates)
    for template in templates:
        slots = SLOT.findall(template)
        assert slots.count("A") == slots.count("B") == 1 and slots.index("A") < slots.index("B") < slots.index("S"), template
        assert {"PLACE", "OBJECT"} <= set(slots) <= {"A", "B", "S", "IO", "C", "PLACE", "OBJECT", "+"}, template
        assert template.endswith(TAIL.get(group, " to")) and (template.endswith("to") or group in TAIL), template
        assert tuple(s for s in slots if s in ("S", "IO")) == REPEATS.get(group, ("S",)) and ("C" in slots) == (group == "third_name"), template
        assert ("[S][+]" in template) == (group in ("base", "held_out")), template
        assert not SLOT.sub("", template).count("[") and "  " not in template and " ," not in template and " ." not in template, template


@pytest.mark.parametrize("group", ADVERSARIAL)
def test_it_is_said_why_the_receiver_remains_the_answer(group):
    why = IOI["why"][group]
    assert isinstance(why, str) and len(why) > 20 or len(why) == len(IOI["templates"][group]) and all(len(w) > 10 for w in why)


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
    fixed = variant_spec("ioi", axis, variant).get("order")
    assert full.order.value_counts().to_dict() == ({fixed: 2 * n_base} if fixed else dict.fromkeys(ORDERS, n_base))
    assert fixed or full.groupby("base_template").order.apply(set).map(len).eq(2).all()
    group = variant_spec("ioi", axis, variant).get("templates", "base")
    assert set(full.template) == {f"{group}-{k:02d}" for k in range(len(IOI["templates"][group]))}, "every template is used"


# Matched pairs: exactly the claimed factor differs

@every_change
def test_pairs_have_one_base_prompt(axis, variant):
    p, base = made(axis, variant), made()
    assert p.labels.base_id.tolist() == base.labels.prompt_id.tolist() == base.labels.base_id.tolist()
    assert not set(p.labels.prompt_id) & set(base.labels.prompt_id) and (p.labels.axis == axis).all() and (p.labels.variant == variant).all()
    assert p.labels.base_template.tolist() == base.labels.template.tolist()
    changed = set(variant_spec("ioi", axis, variant)) - {"axis", "what", "article"}
    kept = base.labels.order if changed == {"order"} else pd.Series("none of the others", index=base.labels.index)
    assert ((p.labels.prompt != base.labels.prompt) == (kept != variant.upper())).all(), "every prompt was changed, but those of that order already"
    assert len(changed) == 1, "one factor at a time"


def same_but_for_articles(a, b): return re.sub(r"\b([Aa])n\b", r"\1", a) == re.sub(r"\b([Aa])n\b", r"\1", b)


def without_words(text, marks):
    "The text with some words replaced by marks."
    return re.sub(r"[A-Za-z]+", lambda m: marks.get(m.group(), m.group()), text)


def spoken(text): return [w.lower() for w in words(text) if w not in ("and", "but", "so", "then", "Then", "where")]


CHANGES = {"names": "names", "places": "nouns", "objects": "nouns", "domain": "nouns", "insert": "insert", "templates": "templates", "order": "order"}


@every_change
def test_only_the_claimed_factor_differs(axis, variant):
    p, base, spec = made(axis, variant), made(), variant_spec("ioi", axis, variant)
    (key,) = set(spec) - {"axis", "what", "article"}
    for i, (new, old) in enumerate(zip(p.labels.itertuples(), base.labels.itertuples())):
        if key != "names": assert new.names.startswith(old.names) and (new.answer, new.distractor) == (old.answer, old.distractor)
        if key != "templates": assert new.template == old.template
        if key != "order": assert new.order == old.order
        globals()[f"check_{CHANGES[key]}"](new, old, spec)
        for role in ("IO", "S1", "S2"): assert key == "names" or word_at(p, role, i) == word_at(base, role, i)


def check_names(new, old, spec):
    mine, theirs, group = new.names.split(), old.names.split()[: len(new.names.split())], spec["names"]
    known = {row["name"] for row in task_data("names.csv") if row["split"] == {"same_initial": "task"}.get(group, group)}
    assert set(mine) <= known | set(task_data("vocabulary.json").get(group, ())) and (group == "same_initial" or not set(mine) & set(theirs))
    text = re.sub(rf"\b[Tt]he (?={'|'.join(mine)})", "", new.prompt).removesuffix(" the") if group == "role_nouns" else new.prompt
    assert without_words(text, {n: str(k) for k, n in enumerate(mine)}) == without_words(old.prompt, {n: str(k) for k, n in enumerate(theirs)})
    sizes = [len(ids) for ids in tokenizer()([f" {n}" for n in mine], add_special_tokens=False)["input_ids"]]
    assert len({n[0] for n in mine}) == 1 or group != "same_initial"
    assert set(sizes) == {1} if group != "multi" else set(sizes) <= {2, 3} and set(sizes[3:]) == {sizes[1]}


def check_nouns(new, old, spec):
    group = spec.get("domain", "unseen")
    changed = [kind for kind in ("places", "objects") if kind in spec or "domain" in spec]
    marks = [{w: kind for kind in changed for w in nouns_of(g, kind)} for g in (group, "base")]
    a, b = (without_words(row.prompt, m) for row, m in zip((new, old), marks))
    assert same_but_for_articles(a, b) and all(a.count(kind) == 1 for kind in changed)
    assert not set(words(new.prompt)) - set(words(old.prompt)) <= set(marks[1]), "and the new nouns are none of the base's"


def check_insert(new, old, spec):
    k = IOI["inserts"][spec["insert"]].index(new.insert)
    assert old.insert == "" and new.prompt.count(new.insert) == 1
    assert new.prompt.replace(new.insert, "") == old.prompt and f"{new.distractor.strip()}{new.insert}" in new.prompt
    assert new.insert.startswith(IOI["inserts"]["adjunct_1"][k].rstrip(",")) and new.insert.count(",") == int(spec["insert"][-1]) + 1


def check_order(new, old, spec):
    assert new.order == spec["order"] and (new.prompt == old.prompt) == (new.order == old.order)
    io, s = new.answer.strip(), new.distractor.strip()
    assert (words(new.prompt).index(io) < words(new.prompt).index(s)) == (spec["order"] == "ABBA")
    swapped = without_words(new.prompt, {io: s, s: io}).rsplit(io, 1)
    assert new.prompt == old.prompt or s.join(swapped) == old.prompt, "the first mentions have changed places"


def check_templates(new, old, spec):
    group, (io, s, third, *unused) = spec["templates"], new.names.split()
    said, count = words(new.prompt), Counter(words(new.prompt))
    assert new.template.startswith(f"{group}-") and old.template.startswith("base-") and not set(unused) & set(said)
    repeats = Counter(REPEATS.get(group, ("S",)))
    assert (count[io], count[s], count[third]) == (1 + repeats["IO"], 1 + repeats["S"], int(group == "third_name"))
    nouns = [w for kind in ("places", "objects") for w in nouns_of("base", kind)]
    assert Counter(w for w in words(old.prompt) if w in nouns) <= count, "the same place and object"
    if group == "held_out": return
    assert new.template[-2:] == old.template[-2:]
    globals().get(f"check_{group}", check_longer)(new.prompt, old.prompt, s)


def check_longer(new, old, s): assert is_subsequence(spoken(old), spoken(new)), f"something was taken away in {new!r}"


def until_giving(text, s):
    "The context: what comes before the second mention of S, without what only joins the clauses."
    return text[: [m.start() for m in re.finditer(rf"\b{s}\b", text)][1]]


def check_passive(new, old, s):
    assert re.search(rf" (was|to be) (slowly )?\w+ (with a smile )?by {s} to$", new)
    check_reordered(new, old)


def check_relative(new, old, s):
    assert re.search(rf"(there|it) was (a|an|the) (\w+ )?\w+ that {s} (slowly |decided to )?\w+ (with a smile )?to$", new, re.IGNORECASE)
    check_reordered(new, old)


PARTICIPLES = {"given": "gave", "give": "gave", "shown": "showed", "thrown": "threw"}
JOINING = {"was", "be", "to", "by", "that", "there", "it", "when", "and", "leaving", "they", "left", "before", "decided"}


def check_reordered(new, old):
    "The same words in another order, but for those that make the construction."
    a, b = (Counter(PARTICIPLES.get(w, w) for w in spoken(text) if w not in JOINING) for text in (new, old))
    assert a == b, (new, old)


def check_negation(new, old, s):
    assert re.search(rf"{s} did not ", new) and " not " not in old
    assert new.startswith(until_giving(old, s)), "the same words until the subject gives"


def check_lower_case(new, old, s):
    assert new != old and new.lower() == old.lower() and all(w in old for w in words(new) if w[0].isupper()), "names keep their capitals"
    assert not [w for w in words(new) if w[0].isupper() and w not in NAMES]


def check_typo(new, old, s):
    changed = [(a, b) for a, b in zip(new.split(), old.split(), strict=True) if a != b]
    assert len(changed) == 1 and sorted(changed[0][0].lower()) == sorted(changed[0][1].lower()), "two letters of one word are swapped"


def check_trailing_space(new, old, s): assert new == old + " "


@every_variant
def test_only_listed_names_are_said(axis, variant):
    for row, listed in zip(made(axis, variant).labels.itertuples(), names_in(made(axis, variant))):
        fixed = set(words(" ".join(t for g in IOI["templates"].values() for t in g)))
        assert len(set(listed)) == len(listed) == (6 if variant == "triple_io" else 5) and set(words(row.prompt)) & NAMES - fixed <= set(listed)


# Roles

@every_variant
def test_role_positions_point_at_the_right_tokens(axis, variant):
    p = made(axis, variant)
    for i, row in enumerate(p.labels.itertuples()):
        io, s, said = *row.names.split()[:2], words(row.prompt)
        at = {r: int(v[i]) for r, v in p.positions.items()}
        where = {r: len(words(said_until(p, r, i))) - 1 for r in at}  # of the word that the token ends
        assert all(said_until(p, r, i).endswith(s if r[0] == "S" else io) for r in at if r[0] in "SI" and "+" not in r), "a mention's last token"
        assert [k for k, w in enumerate(said) if w == io] == [where[r] for r in ("IO", "IO2", "IO3") if r in at]
        assert [k for k, w in enumerate(said) if w == s] == [where[r] for r in ("S1", "S2a", "S2") if r in at]
        assert (at["IO"] < at["S1"]) == (row.order == "ABBA") and max(at["IO"], at["S1"]) < at["S2"] < at["END"]
        assert at["END"] == p.lengths[i] - 1 == at["END-2"] + 2
        assert said[-1] == ("the" if variant == "role_nouns" else "to") and all(at[r] == at[r.removesuffix("+1")] + 1 for r in at if r.endswith("+1"))
        first = [tokenizer()(f" {n}", add_special_tokens=False)["input_ids"][0] for n in (io, s)]
        assert "S1+1" in at and [p.answers[i].tolist(), p.distractors[i].tolist()] == [[first[0]], [first[1]]] and first[0] != first[1]


@pytest.mark.parametrize("variant, roles", [("double_io", {"IO2"}), ("triple_io", {"IO2", "IO3"}), ("repeated_io", {"IO2"}),
                                            ("extra_subject", {"S2a"}), ("misleading_clause", {"S2a"}), ("passive", set())])
def test_extra_mentions_have_roles_of_their_own(variant, roles):
    (axis,) = {a for a, v in VARIANTS if v == variant}
    assert set(made(axis, variant).positions) - set(made().positions) == roles


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
    repeated = [r for r in ("IO2", "IO3", "S2a", "S2") if r in p.positions]
    for i, listed in enumerate(names_in(p)):
        old, new = (words(tokenizer().decode(x[i, : p.lengths[i]])) for x in (p.tokens, p.counterfactual))
        changed = [k for k, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        assert changed == sorted(len(words(said_until(p, r, i))) - 1 for r in repeated), "first mentions and everything else are kept"
        names = [new[k].removeprefix("The ") for k in changed]
        assert len(set(names)) == len(names) and set(names) <= set(listed[3:]), "distinct, unrelated names"
        assert all(Counter(new)[n] <= 1 for n in listed), "so nobody is named twice"


# Splits and pools

@pytest.mark.parametrize("group, least", [("task", 200), ("rare", 20), ("multi", 20), ("role_nouns", 6)])
def test_splits_share_no_name(group, least):
    hands = {split: set(name_hand(tokenizer(), group, split)) for split in SPLITS}
    assert set(hands) == {"scored", "reference", "discovery", "calibration"} and all(len(h) >= least for h in hands.values())
    for a, b in combinations(hands, 2): assert not hands[a] & hands[b], (a, b)
    assert not set().union(*hands.values()) & {r["name"] for r in task_data("names.csv") if r["split"] != group}


@every_variant
def test_prompts_of_two_splits_share_no_name(axis, variant):
    used = {split: {n for row in names_in(made(axis, variant, split=split)) for n in row} for split in SPLITS}
    for a, b in combinations(used, 2): assert not used[a] & used[b], (a, b)
    pool = reference_pool(made(axis, variant)[:4], tokenizer(), n=32)
    said = {w for text in pool.labels.prompt for w in words(text)} & NAMES
    fixed = set(words(" ".join(t for g in IOI["templates"].values() for t in g)))
    for split in ("scored", "discovery", "calibration"): assert not (said - fixed) & used[split], split


@every_variant
def test_reference_pools_are_uninformative_and_fit(axis, variant):
    p = made(axis, variant)[[0, 1, len(IOI["templates"]["base"]) + (2 if "order" in variant_spec("ioi", axis, variant) else 1)]]
    pool = reference_pool(p, tokenizer())
    cells, mine = Counter(cell_of(pool)), cell_of(p)
    assert len(set(mine)) == 3 and set(cells) == set(mine) and all(cells[c] == 32 for c in mine), "32 of each prompt's cell: length and positions too"
    mentions = [r for r in ("IO", "IO2", "IO3", "S1", "S2a", "S2") if r in pool.positions]
    for i in range(len(pool)):
        said, told = [word_at(pool, r, i) for r in mentions], Counter(words(pool.labels.prompt[i]))
        assert len(set(said)) == len(said) and all(told[n] == 1 for n in said), "unrelated names, each mentioned once"
    assert pool.labels.prompt.nunique() > 0.9 * len(pool) and pool.labels.prompt_id.is_unique and not set(pool.labels.prompt) & set(p.labels.prompt)
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


# GPT-2's own tokenizer

@every_variant
def test_gpt2_reads_every_variant(axis, variant, gpt2):
    p = make_prompts("ioi", axis, variant, 72, 0, gpt2)
    pool = reference_pool(p, gpt2)
    assert set(cell_of(pool)) == set(cell_of(p)) and (p.answers != p.distractors).all() and p.counterfactual.shape == p.tokens.shape
    for i, row in enumerate(p.labels.itertuples()):
        io, s = row.names.split()[:2]
        for role, name in dict(IO=io, IO2=io, IO3=io, S1=s, S2a=s, S2=s).items():
            if role in p.positions: assert gpt2.decode(p.tokens[i, : p.positions[role][i] + 1]).endswith(name), (row.prompt, role)
        if variant != "multi_token_names": assert gpt2.decode(p.answers[i]) == f" {io}" and gpt2.decode(p.distractors[i]) == f" {s}"


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
    with pytest.raises(TaskError, match="this tokenizer has only 0 task names that scored prompts may use; 5 are needed"):
        make_prompts("ioi", n=1, tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner))


def test_other_prompts_have_no_pool():
    bare = PromptSet.from_tokens([[1, 2]], answers=[3], distractors=[4], labels={"prompt_id": ["mine"], "prompt": ["a b"]})
    with pytest.raises(PromptError, match=r"prompt mine \('a b'\) was not generated by a task.*reference="): reference_pool(bare, tokenizer())


def test_a_pool_that_cannot_fit_is_refused():
    p = made(n=2)
    moved = replace(p, positions=p.positions | {"S2": p.positions["S2"] - 1})
    with pytest.raises(PromptError, match=r"prompt ioi-base-scored-0-0000. \('.*only 0 of 32 reference prompts of its length and role"):
        reference_pool(moved, tokenizer())
