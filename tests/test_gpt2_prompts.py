"""Every prompt that we generate, under GPT-2's own tokenizer: its tokens, its answers, and every role position, read back as words."""

import re
from functools import cache

import pytest
import torch

from circuit_generalization.greater_than import digits, years
from circuit_generalization.prompts import bos_ids, encode
from circuit_generalization.tasks import TASKS, list_variants, make_prompts
from circuit_generalization.wording import SPLITS, name_hand, task_data

EVERY = [(task, row.axis, row.variant) for task in TASKS for row in list_variants(task).itertuples()]
every_variant = pytest.mark.parametrize("task, axis, variant", EVERY)
N = 36  # each template of every task at least once, IOI's in both orders


@pytest.fixture(scope="module")
def made(gpt2):
    "`made(task, axis, variant)`, each made once."
    return cache(lambda task, axis, variant: make_prompts(task, axis, variant, N, tokenizer=gpt2))


def tokens_of(p, i, tokenizer): return [tokenizer.decode(t) for t in p.tokens[i, : p.lengths[i]]]


def until(p, i, role, tokenizer): return tokenizer.decode(p.tokens[i, : p.positions[role][i] + 1])


@every_variant
def test_texts_are_what_is_tokenized_and_nothing_is_added(task, axis, variant, made, gpt2):
    p = made(task, axis, variant)
    assert not p.labels.bos.any() and (p.tokens[:, 0] != gpt2.bos_token_id).all()
    for i, text in enumerate(p.labels.prompt):
        assert p.tokens[i, : p.lengths[i]].tolist() == encode(gpt2, text) and (p.tokens[i, p.lengths[i] :] == 0).all()
        assert gpt2.decode(p.tokens[i, : p.lengths[i]]) == text


@pytest.mark.parametrize("task", TASKS)
def test_a_beginning_of_sequence_token_is_asked_for(task, gpt2):
    plain, moved = (make_prompts(task, n=4, tokenizer=gpt2, bos=bos) for bos in (False, True))
    assert moved.tokens[:, 0].tolist() == bos_ids(gpt2) * 4 == [50256] * 4
    assert moved.labels.bos.all() and moved.labels.prompt.equals(plain.labels.prompt)
    assert all((moved.positions[r] == plain.positions[r] + 1).all() for r in plain.positions)


@every_variant
def test_answers_are_single_tokens_that_read_as_the_labels_say(task, axis, variant, made, gpt2):
    p = made(task, axis, variant)
    for ids, texts in ((p.answers, p.labels.answer), (p.distractors, p.labels.distractor)):
        for row, text in zip(ids.tolist(), texts):
            read = [gpt2.decode([t]) for t in row if t >= 0]
            if variant == "multi_token_names": assert len(read) == 1 and text.startswith(read[0]) and len(encode(gpt2, text)) in (2, 3)
            else: assert sorted(read) == sorted(text.split("|"))


@every_variant
def test_role_positions_point_at_their_words(task, axis, variant, made, gpt2):
    p, check = made(task, axis, variant), globals()[f"check_{task}"]
    assert torch.equal(p.positions["END"], p.lengths - 1) and set(TASKS[task].role_tokens) <= set(p.positions)
    for i, row in enumerate(p.labels.itertuples()): check(p, i, row, gpt2)


def check_ioi(p, i, row, tokenizer):
    io, s = row.names.split()[:2]
    at, text = {r: int(k[i]) for r, k in p.positions.items()}, tokens_of(p, i, tokenizer)
    mentions = {name: [len(encode(tokenizer, row.prompt[: m.end()])) - 1 for m in re.finditer(rf"\b{name}\b", row.prompt)] for name in (io, s)}
    assert [at[r] for r in ("IO", "IO2", "IO3") if r in at] == mentions[io] and [at[r] for r in ("S1", "S2a", "S2") if r in at] == mentions[s]
    assert all(at[r] == at[r.removesuffix("+1")] + 1 for r in at if r.endswith("+1")) and at["END-2"] == len(text) - 3
    if row.variant != "multi_token_names": assert all(text[at[r]] == f" {name}" for r, name in (("IO", io), ("S1", s), ("S2", s)))
    assert text[-1] == {"role_nouns": " the", "trailing_space": " "}.get(row.variant, " to")


def check_sva(p, i, row, tokenizer):
    at, text = {r: int(k[i]) for r, k in p.positions.items()}, tokens_of(p, i, tokenizer)
    pairs, (subject, attractor) = row.nouns.split(), map(int, row.numbers.split())
    assert text[at["SUBJ"]] == f" {pairs[subject]}" and text[at["ATTR"]] == f" {pairs[2 + attractor]}"
    assert at["SUBJ+1"] == at["SUBJ"] + 1 and at["ATTR-1"] == at["ATTR"] - 1
    if "ATTR2" in at: assert text[at["ATTR2"]] == f" {pairs[4 + attractor]}"


def check_greater_than(p, i, row, tokenizer):
    at, text = {r: int(k[i]) for r, k in p.positions.items()}, tokens_of(p, i, tokenizer)
    assert text[at["EVENT"]] == f" {row.event}" and text[at["XX1"]] == text[at["END"]] == f" {row.century}"
    assert text[at["YY"]] == f"{int(row.year):02d}" and at["YY"] == at["XX1"] + 1 == at["YY+1"] - 1
    right, wrong = ([int(x) for x in texts.split("|")] for texts in (row.answer, row.distractor))
    assert right == list(range(int(row.year) + 1, 100)) and wrong == list(range(int(row.year) + 1)), "all hundred are single tokens"


def check_induction(p, i, row, tokenizer):
    at, text = {r: int(k[i]) for r, k in p.positions.items()}, tokens_of(p, i, tokenizer)
    assert text[at["A1"]] == text[at["END"]] and at["A1"] < at["END"] and at["B1"] == at["A1"] + 1 == at["B1+1"] - 1
    assert text[at["B1"]] == row.answer and text[at["D1"]] == row.distractor and text == [f" {w}" for w in row.prompt.split()]


@every_variant
def test_counterfactuals_have_the_same_tokens_but_for_a_few(task, axis, variant, made, gpt2):
    p = made(task, axis, variant)
    differs = (p.tokens != p.counterfactual).sum(1)
    most = {"ioi": 9, "sva": 1, "greater_than": 1}.get(task, p.tokens.shape[1])  # three repeated names of three tokens, the subject, the year
    assert (differs >= 1).all() and (differs <= most).all()
    assert all(encode(gpt2, gpt2.decode(t[:n])) == t[:n].tolist() for t, n in zip(p.counterfactual, p.lengths)), "they are texts too"


# Names

@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("group, least", [("task", 100), ("rare", 10), ("role_nouns", 5)])
def test_single_token_names_are_single_tokens(group, least, split, gpt2):
    names = name_hand(gpt2, group, split)
    assert len(names) >= least and all(len(encode(gpt2, f" {n}")) == 1 for n in names)


@pytest.mark.parametrize("split", SPLITS)
def test_multi_token_names_are_several(split, gpt2):
    assert len(hand := name_hand(gpt2, "multi", split)) >= 20 and {len(encode(gpt2, f" {n}")) for n in hand} == {2, 3}


def test_how_many_names_gpt2_reads_as_one_token(gpt2):
    "Of names that the organisms read as one; the others never enter its prompts."
    names = {group: [r["name"] for r in task_data("names.csv") if r["split"] == group] for group in ("task", "rare")}
    single = {group: sum(len(encode(gpt2, f" {n}")) == 1 for n in every) for group, every in names.items()}
    assert single == {"task": 746, "rare": 78} and sum(len(name_hand(gpt2, "task", s)) for s in SPLITS) == 746


def test_no_sentence_begins_with_a_name():
    "Without a space before it a name is another token, and S1 would not be S2's."
    assert not [t for group in task_data("ioi.json")["templates"].values() for t in group if re.match(r"\[(A|B|S|IO|C)\]", t)]


def test_years_are_a_century_and_two_digits(gpt2):
    assert digits(gpt2) == tuple(range(100)) and list(years(gpt2)) == [11, 12, 13, 14, 15, 16, 17, 18], "1901 is one token"
    assert all(len(encode(gpt2, f" {c}{y:02d}")) == 2 for c, ys in years(gpt2).items() for y in ys)
    assert 76 in years(gpt2)[17] and 0 not in years(gpt2)[18] and len(encode(gpt2, " 1800")) == 1


# Written out by hand

@pytest.mark.parametrize("variant, i, text, places", [
    ("abba", 1, "When| Saul| and| Jay| got| to| the| museum|,| Jay| decided| to| give| a| ball| to",
     {"IO": 1, "IO+1": 2, "S1": 3, "S1+1": 4, "S2": 9, "S2+1": 10, "END-2": 13, "END": 15}),
    ("baba", 1, "When| Jay| and| Saul| got| to| the| museum|,| Jay| decided| to| give| a| ball| to",
     {"IO": 3, "IO+1": 4, "S1": 1, "S1+1": 2, "S2": 9, "S2+1": 10, "END-2": 13, "END": 15}),
    ("multi_token_names", 1, "When| Gr|ise|lda| and| Patt|ie| got| to| the| museum|,| Patt|ie| decided| to| give| a| ball| to",
     {"IO": 3, "IO+1": 4, "S1": 6, "S1+1": 7, "S2": 13, "S2+1": 14, "END-2": 17, "END": 19}),
    ("triple_io", 1, "When| Saul| and| Jay| got| to| the| museum|,| Saul| was| happy|.| Saul| sat| down|.| Jay| decided| to| give| a| ball| to",
     {"IO": 1, "IO2": 9, "IO3": 13, "S1": 3, "S2": 17, "END": 23}),
    ("trailing_space", 1, "When| Saul| and| Jay| got| to| the| museum|,| Jay| decided| to| give| a| ball| to| ", {"S2": 9, "END": 16})])
def test_ioi_by_hand(variant, i, text, places, made, gpt2):
    p = made("ioi", {v: a for t, a, v in EVERY if t == "ioi"}[variant], variant)
    assert tokens_of(p, i, gpt2) == text.split("|") and {r: int(p.positions[r][i]) for r in places} == places
    assert [until(p, i, r, gpt2).split()[-1] for r in ("IO", "S1", "S2")] == p.labels.names[i].split()[:1] + p.labels.names[i].split()[1:2] * 2
