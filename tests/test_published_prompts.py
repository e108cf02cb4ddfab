"""Prompts in the formats of AutoCircuit and EAP-IG, under a small tokenizer and GPT-2's own: each where it should be, or refused by name."""

import csv
import json
import re
from functools import cache

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_generalization.ablation import pool_members
from circuit_generalization.circuit_scorer import CircuitScorer
from circuit_generalization.cli import main
from circuit_generalization.ioi import role_positions
from circuit_generalization.language import build_tokenizer
from circuit_generalization.prompts import PromptError, PromptSet, bos_ids, prompts_hash
from circuit_generalization.published_prompts import read_autocircuit, read_eap_ig, read_folder, read_prompts, uninformative

PLACES = {"IO": 2, "IO-1": 1, "IO+1": 3, "S1": 4, "S1-1": 3, "S1+1": 5, "S2": 10, "end": 14, "starts": 0, "punct": 9}
FILES = [f"ioi-{order}-{i:02d}" for order in ("ABBA", "BABA") for i in range(15)]
ROLES = ("IO", "IO+1", "S1", "S1+1", "S2")


@cache
def small(): return build_tokenizer()


def said(io, s, again): return f"Then, {io} and {s} went to the library. {again} gave a cup to"


def entry(io="Kathleen", s="Walter", other=("Raymond", "Christine", "Anthony"), **changes):
    return dict(clean=said(io, s, s), corrupt=said(*other), answers=[f" {io}"], wrong_answers=[f" {s}"]) | changes


SECOND = entry("Raymond", "Anthony", ("Walter", "Kathleen", "Walter"))


@pytest.fixture
def write(tmp_path):
    "A JSON file of entries."
    def make(*entries, name="ioi-ABBA-07.json", places=PLACES, **changes):
        path = tmp_path / name
        path.write_text(json.dumps(dict(word_idxs=places, prompts=list(entries)) | changes), encoding="utf-8")
        return path

    return make


@pytest.fixture
def table(tmp_path):
    "A CSV file."
    def make(header, *rows, name="prompts.csv"):
        path = tmp_path / name
        with open(path, "w", newline="", encoding="utf-8") as file: csv.writer(file).writerows([header, *rows])
        return path

    return make


def refusal(read, path, *args):
    "The message with which a file is refused: one line that begins with the file."
    with pytest.raises(PromptError) as caught: read(path, *args)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and message.count(str(path)) == 1
    return message.removeprefix(str(path))


def words(prompts, tokenizer, i, role): return tokenizer.decode(prompts.tokens[i, prompts.positions[role][i]])


# AutoCircuit's JSON

def test_every_field_has_its_place(write):
    p = read_autocircuit(write(entry(), SECOND), small())
    assert p.labels.prompt.tolist() == [entry()["clean"], SECOND["clean"]]
    assert p.labels.counterfactual.tolist() == [entry()["corrupt"], SECOND["corrupt"]]
    assert [small().decode(t[:n]) for t, n in zip(p.counterfactual, p.lengths)] == p.labels.counterfactual.tolist()
    assert [small().decode(a) for a in p.answers] == p.labels.answer.tolist() == [" Kathleen", " Raymond"]
    assert [small().decode(a) for a in p.distractors] == p.labels.distractor.tolist() == [" Walter", " Anthony"]
    assert p.labels.template.tolist() == ["ABBA-07"] * 2 and p.labels.order.tolist() == ["ABBA"] * 2 and p.labels.entry.tolist() == [0, 1]
    assert p.labels.prompt_id.tolist() == ["ioi-ABBA-07-000", "ioi-ABBA-07-001"] and (p.labels.task == "ioi").all() and not p.labels.bos.any()
    assert set(p.positions) == {*PLACES, "END"} - {"end"} and p.positions["END"].tolist() == [14, 14]
    assert [words(p, small(), 1, r) for r in ROLES] == [" Raymond", " and", " Anthony", " went", " Anthony"]


def test_a_beginning_of_sequence_token_moves_every_place(write):
    path = write(entry(), SECOND)
    plain, moved = (read_autocircuit(path, small(), bos) for bos in (False, True))
    assert moved.tokens[:, 0].tolist() == bos_ids(small()) * 2 and moved.tokens[:, 1:].tolist() == plain.tokens.tolist() and moved.labels.bos.all()
    assert {r: (at - 1).tolist() for r, at in moved.positions.items()} == {r: at.tolist() for r, at in plain.positions.items()}
    assert moved.counterfactual[:, 0].tolist() == bos_ids(small()) * 2
    assert [words(moved, small(), 0, r) for r in ("IO", "S2")] == [" Kathleen", " Walter"]


@pytest.mark.parametrize("name, template, order", [("ioi-BABA-14.json", "BABA-14", "BABA"), ("ABBA.json", "ABBA", "ABBA"), ("mine.json", "mine", ""),
                                                   ("ABBA-notes.json", "ABBA-notes", "")])
def test_the_files_name_says_template_and_order(name, template, order, write):
    labels = read_autocircuit(write(entry(), name=name), small()).labels
    assert (labels.template[0], labels.order[0]) == (template, order)


def test_without_places_there_is_the_end_and_no_task(write):
    p = read_autocircuit(write(entry(), places=None), small())
    assert {r: at.tolist() for r, at in p.positions.items()} == {"END": [14]} and p.labels.task.tolist() == [""]
    assert set(read_autocircuit(write(entry(), places={"verb": 5}), small()).positions) == {"END", "verb"}


def test_several_answers_are_a_set(write):
    p = read_autocircuit(write(entry(answers=[" Raymond", " Kathleen"], wrong_answers=[" Walter", " Anthony"])), small())
    assert [small().decode(a) for a in p.answers[0]] == [" Raymond", " Kathleen"] and p.labels.distractor[0] == " Walter| Anthony"


@given(st.integers(0, 3), st.integers(1, 6))
def test_prompts_of_unequal_length_are_padded(k, n):
    "Only END is where each prompt ends; a file with word_idxs has one length, or says so."
    import tempfile
    from pathlib import Path

    more = [entry(clean="Then, " * i + entry()["clean"], corrupt="Then, " * i + entry()["corrupt"]) for i in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "x.json").write_text(json.dumps(dict(prompts=more)))
        p = read_autocircuit(path, small())
        assert p.lengths.tolist() == [15 + 2 * i for i in range(n)] and p.positions["END"].tolist() == [14 + 2 * i for i in range(n)]
        path.write_text(json.dumps(dict(prompts=more, word_idxs={"end": 14 + 2 * k})))
        if n > 1 or k: assert "word_idxs put END at token" in refusal(read_autocircuit, path, small())


@pytest.mark.parametrize("content, says", [
    ("{", ": not JSON"), ("", ": not JSON"), (b"\xff\xfe", ": not JSON"), ("[]", ": no list 'prompts'"), ('{"prompts": {}}', ": no list 'prompts'"),
    ('{"prompts": []}', ": the list of prompts is empty"), ('{"prompts": ["Then,"]}', ", entry 0: should be an object with clean, corrupt"),
    ("[" * 100_000, ": not JSON")])
def test_files_that_hold_no_prompts(content, says, tmp_path):
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(read_autocircuit, tmp_path / "x.json", small()).startswith(says)


def test_files_that_are_not_there(tmp_path):
    assert refusal(read_autocircuit, tmp_path / "x.json", small()) == ": no such file"
    assert refusal(read_autocircuit, tmp_path, small()).startswith(": cannot be read")


@pytest.mark.parametrize("change, says", [
    (dict(clean=None), "'clean' should be text"), (dict(clean=[[5, 7]]), "'clean' should be text (of token ids make prompts with"),
    (dict(corrupt="  "), "'corrupt' should be text"), (dict(answers=" Kathleen"), "'answers' should be a list of texts"),
    (dict(answers=[]), "'answers' should be a list"), (dict(wrong_answers=[17]), "'wrong_answers' should be a list"),
    (dict(answers=[" Zanzibarian"]), "answer ' Zanzibarian' is "), (dict(answers=["Kathleen"]), "'Kathleen' would run into 'to'"),
    (dict(answers=[""]), "answer '' is 0 tokens")])
def test_bad_entries_are_named(change, says, write):
    message = refusal(read_autocircuit, write(entry(), entry(**change)), small())
    assert message.startswith(", entry 1: ") and says in message
    assert refusal(read_autocircuit, write(entry(), {k: v for k, v in entry().items() if k not in change}), small()).startswith(", entry 1: ")


@pytest.mark.parametrize("change, says", [
    (dict(corrupt=entry()["corrupt"] + " a"), ": prompt ioi-ABBA-07-001 has 15 tokens, its counterfactual 16"),
    (dict(wrong_answers=[" Kathleen"]), "the answer is also the distractor")])
def test_pairs_that_do_not_fit_are_named(change, says, write):
    message = refusal(read_autocircuit, write(entry(), entry(**change)), small())
    assert says in message and "ioi-ABBA-07-001" in message


@pytest.mark.parametrize("places, says", [
    ({k: at + 1 for k, at in PLACES.items()}, "put IO at token 3, but prompt ioi-ABBA-07-000"),
    (PLACES | {"S1": 2}, "has 15 tokens, and there ' Kathleen'"),
    (PLACES | {"S2": 9}, "put S2 at token 9"), (PLACES | {"S2": 15}, "and there nothing: count from 0, without a BOS"),
    (PLACES | {"end": 15}, "put END at token 15"), (PLACES | {"end": 13}, "put END at token 13, but prompt ioi-ABBA-07-000"),
    (PLACES | {"punct": 99}, "put punct at token 99"), (PLACES | {"IO": -1}, "IO should be a token's index, counted from 0, not -1"),
    (PLACES | {"IO": 2.0}, "not 2.0"), (PLACES | {"IO": True}, "not True"), (PLACES | {"IO": "2"}, "not '2'"),
    ([2, 4], "'word_idxs' should hold an object")])
@pytest.mark.parametrize("bos", [False, True])
def test_places_that_are_wrong_are_named(places, says, bos, write):
    assert says in refusal(read_autocircuit, write(entry(), places=places), small(), bos)


def test_the_first_prompt_that_is_elsewhere_is_named(write):
    message = refusal(read_autocircuit, write(entry(), entry(clean=said("Walter", "Kathleen", "Walter")), SECOND), small())
    assert "put IO at token 2, but prompt ioi-ABBA-07-001 ('Then, Walter" in message and "and there ' Walter'" in message


# Folders

def test_a_folder_is_read_in_the_order_of_names(write, tmp_path):
    turned = dict(PLACES, IO=4, S1=2) | {"IO+1": 5, "S1+1": 3, "IO-1": 3, "S1-1": 1}
    write(entry(clean=said("Walter", "Kathleen", "Walter")), name="ioi-BABA-00.json", places=turned)
    write(entry(), SECOND, name="ioi-ABBA-00.json")
    for name in ("d", "b", "c"): write(entry(), name=f"{name}.json")
    (tmp_path / "notes.txt").write_text("not read")
    p = read_folder(tmp_path, small())
    assert p.labels.template.tolist() == ["b", "c", "d", "ABBA-00", "ABBA-00", "BABA-00"] and p.labels.prompt_id.is_unique
    assert p.positions["IO"].tolist() == [2, 2, 2, 2, 2, 4] and p.positions["S1+1"].tolist() == [5, 5, 5, 5, 5, 3]
    assert read_folder(tmp_path, small(), bos=True).positions["IO"].tolist() == [3, 3, 3, 3, 3, 5]
    assert prompts_hash(read_prompts(tmp_path, small())) == prompts_hash(p)
    write(name="ioi-BABA-01.json", places={})
    with pytest.raises(PromptError, match="ioi-BABA-01.json: the list of prompts is empty"): read_folder(tmp_path, small())


def test_an_empty_folder(tmp_path):
    assert refusal(read_folder, tmp_path, small()) == ": no .json file in this folder"


# EAP-IG's CSV

def id_of(name, tokenizer=None): return (tokenizer or small()).convert_tokens_to_ids(f"Ġ{name}")


def ids_row(io="Kathleen", s="Walter", tokenizer=None): return [said(io, s, s), said(io, s, "Raymond"), id_of(io, tokenizer), id_of(s, tokenizer)]


IDS = ["clean", "corrupted", "correct_idx", "incorrect_idx"]


def test_answers_by_their_ids(table):
    path = table(["", "clean", "corrupted", "corrupted_hard", "correct_idx", "incorrect_idx", "template", "pos_S2"],
                 [470, *ids_row()[:2], "unused", *ids_row()[2:], "t1", 10], [12, *ids_row("Raymond", "Anthony")[:2], "x",
                                                                           *ids_row("Raymond", "Anthony")[2:], "t2", ""])
    p = read_eap_ig(path, small())
    assert p.labels.answer.tolist() == [" Kathleen", " Raymond"] and p.labels.distractor.tolist() == [" Walter", " Anthony"]
    assert p.labels.prompt_id.tolist() == ["row2", "row3"] and p.labels.template.tolist() == ["t1", "t2"] and p.labels.task.tolist() == ["", ""]
    assert not [c for c in p.labels if c.startswith("Unnamed")], "a data frame's index is no label"
    assert p.labels.counterfactual[0] == said("Kathleen", "Walter", "Raymond") and p.labels.corrupted_hard.tolist() == ["unused", "x"]
    assert small().decode(p.counterfactual[0]) == p.labels.counterfactual[0] and not {"pos_S2", "clean", "correct_idx"} & set(p.labels)
    assert p.positions["S2"].tolist() == [10, -1]
    moved = read_eap_ig(path, small(), bos=True)
    assert moved.positions["S2"].tolist() == [11, -1] and moved.tokens[:, 1:].tolist() == p.tokens.tolist() and moved.labels.bos.all()


def lasted(century, digits): return f"The war lasted from the year {century}{digits} to the year {century}"


@pytest.mark.parametrize("column", ["label", "correct_idx"])
def test_years(column, table):
    p = read_eap_ig(table(["clean", "corrupted", column], [lasted(17, 41), lasted(17, "01"), 41], [lasted(16, "07"), lasted(16, "01"), 7]), small())
    for i, year in enumerate((41, 7)):
        right, wrong = ([int(small().decode(x)) for x in ids[i].tolist() if x >= 0] for ids in (p.answers, p.distractors))
        assert right == list(range(year + 1, 100)) and wrong == list(range(year + 1)), "of all hundred, the year itself is wrong"
        assert [words(p, small(), i, r) for r in ("XX1", "YY", "YY+1", "END")] == [f" {17 - i}", f"{year:02d}", " to", f" {17 - i}"]
    assert (p.labels.task == "greater_than").all() and p.labels.answer[1].startswith("08|09|10")


def test_a_beginning_of_sequence_token_moves_the_years(table):
    path = table(["clean", "corrupted", "label"], [lasted(17, 41), lasted(17, "01"), 41])
    plain, moved = (read_eap_ig(path, small(), bos).positions for bos in (False, True))
    assert {r: at.tolist() for r, at in moved.items()} == {r: (at + 1).tolist() for r, at in plain.items()}


@pytest.mark.parametrize("header, row, says", [
    (["clean", "corrupted"], ["a", "b"], ": neither correct_idx and incorrect_idx (token ids) nor label"),
    (["clean", "correct_idx"], ["a", 1], ": no column corrupted (it has: clean, correct_idx)"),
    (IDS, [ids_row, 10**6, 5], ", row 3: correct_idx is '1000000', and should be the id of one of this tokenizer's"),
    (IDS, [ids_row, 5, -1], ", row 3: incorrect_idx is '-1'"), (IDS, [ids_row, "Mary", 5], ", row 3: correct_idx is 'Mary'"),
    (IDS, [ids_row, 5.5, 7], "'5.5'"), (IDS, [ids_row, "", 7], "correct_idx is ''"), (IDS, [ids_row, 5, 5], ": prompt row3 ("),
    (IDS, ["", "a", 5, 6], ", row 3: a prompt or its counterfactual is empty"), (IDS, ["a", " ", 5, 6], ", row 3: a prompt or its"),
    (IDS, ["Then, Mary", "Then,", 5, 6], ": prompt row3 has ")])
def test_bad_tables_are_named(header, row, says, table):
    row = [*ids_row()[:2], *row[1:]] if row[0] is ids_row else row
    good = [*ids_row()[:2], id_of("Mary"), id_of("John")] if header == IDS else row
    assert says in refusal(read_eap_ig, table(header, good, row), small())


@pytest.mark.parametrize("row, says", [
    ([lasted(17, 41), lasted(17, "01"), 100], ", row 2: label is '100', and should be the last two digits of a year, 0 to 98"),
    ([lasted(17, 41), lasted(17, "01"), 99], "0 to 98"), ([lasted(17, 41), lasted(17, "01"), "forty"], "label is 'forty'"),
    ([lasted(17, 41), lasted(17, "01"), 42], ": prompt row2 ("),
    ([lasted(17, 41), lasted(17, 41), 41], "should differ in the token 41 of the year alone"),
    ([lasted(17, 41), lasted(16, "01"), 41], "of the year alone"),
    ([lasted(17, 41), "The war lasted from the year 1701 to the year 16", 41], "of the year alone")])
def test_bad_years_are_named(row, says, table):
    assert says in refusal(read_eap_ig, table(["clean", "corrupted", "label"], row), small())


def test_a_tokenizer_without_two_digit_numbers(table):
    class Letters:
        "One token a letter."
        def __call__(self, texts, add_special_tokens=False, **_):
            return {"input_ids": [[ord(c) for c in t] for t in texts] if isinstance(texts, list) else [ord(c) for c in texts]}

    with pytest.raises(PromptError, match="no two-digit number of one token"):
        read_eap_ig(table(["clean", "corrupted", "label"], [lasted(17, 41), lasted(17, "01"), 41]), Letters())


# Whatever it is

def test_the_format_is_told_from_the_file(write, table, tmp_path):
    mine = table(["prompt", "answer", "distractor", "clean", "corrupted"], ["Mary gave it to", " Mary", " John", "x", "y"], name="mine.csv")
    assert read_prompts(mine, small()).labels.prompt.tolist() == ["Mary gave it to"], "our own columns come first"
    assert read_prompts(table(IDS, ids_row()), small()).labels.answer.tolist() == [" Kathleen"]
    assert len(read_prompts(write(entry(), name="X.JSON"), small())) == 1 and len(read_prompts(str(write(entry())), small())) == 1
    assert refusal(read_prompts, table(["a", "b"], [1, 2], name="other.csv"), small()).startswith(": no column prompt, answer, distractor")
    assert refusal(read_prompts, tmp_path / "none.csv", small()) == ": no such file"
    for path in (mine, tmp_path): assert "the model has no tokenizer" in refusal(read_prompts, path, None)


# The counterfactuals as a pool

def test_counterfactuals_that_name_somebody_twice_are_left_out(write):
    twice = (SECOND, entry("Raymond", "Anthony", ("Walter", "Walter", "Mary")), entry(other=("Mary", "John", "John")))
    p = read_autocircuit(write(entry(), *twice), small())
    pool = uninformative(p)
    assert pool.labels.prompt.tolist() == [entry()["corrupt"]] and pool.labels.prompt_id.tolist() == ["ioi-ABBA-07-000-cf"]
    assert pool.tokens.tolist() == p.counterfactual[:1].tolist() and pool.counterfactual is None and pool.positions["S2"].tolist() == [10]
    with pytest.raises(PromptError, match="names somebody twice"): uninformative(p[1:3])
    with pytest.raises(PromptError, match="have no counterfactuals"): uninformative(pool)


def test_without_the_three_names_all_are_kept(table):
    p = read_eap_ig(table(IDS, ids_row(), ids_row("Raymond", "Anthony")), small())
    assert uninformative(p).labels.prompt.tolist() == p.labels.counterfactual.tolist()
    bare = PromptSet.from_tokens([[1, 2]], [[1, 3]], answers=[4], distractors=[5])
    assert uninformative(bare).tokens.tolist() == [[1, 3]] and uninformative(bare).labels.prompt.tolist() == [""]


def test_the_pool_fits_the_prompts(write):
    names = ["Kathleen", "Walter", "Raymond", "Christine", "Anthony", "Mary"]
    p = read_autocircuit(write(*(entry(names[i], names[i - 1], (names[i - 2], names[i - 3], names[i - 4])) for i in range(6))), small())
    members = pool_members(p, uninformative(p))
    assert [len(m) for m in members] == [6] * 6


# The published files, under GPT-2's tokenizer

@pytest.fixture(scope="module")
def published(shared, gpt2):
    "All thirty files."
    return read_folder(shared("prompts/ioi-ABBA-00.json").parent, gpt2)


def spoken(text, io, s, order):
    "What `fill` would say about the text: where each name's mention ends."
    first, again = ("A", "B") if order == "ABBA" else ("B", "A"), [m.end() - 1 for m in re.finditer(rf"\b{s}\b", text)]
    (there,) = [m.end() - 1 for m in re.finditer(rf"\b{io}\b", text)]
    assert len(again) == 2
    return sorted([(first[0], there), (first[1], again[0]), ("S", again[1])], key=lambda end: end[1])


@pytest.mark.parametrize("name", FILES)
def test_the_files_places_are_those_of_our_role_finder(name, published, gpt2):
    p = published[(published.labels.template == name[4:]).tolist()]
    assert len(p) == 100 and p.labels.entry.tolist() == list(range(100)) and (p.labels.order == name[4:8]).all()
    for i, row in enumerate(p.labels.itertuples()):
        found = role_positions(gpt2, row.prompt, spoken(row.prompt, row.answer.strip(), row.distractor.strip(), row.order), row.order)
        assert {r: int(p.positions[r][i]) for r in (*ROLES, "END")} == {r: found[r] for r in (*ROLES, "END")}, row.prompt


def test_all_thirty_templates_are_used(published):
    assert published.labels.groupby("template").size().to_dict() == {name[4:]: 100 for name in FILES}
    assert published.labels.order.value_counts().to_dict() == {"ABBA": 1500, "BABA": 1500} and published.labels.prompt.nunique() == 3000
    names = published.labels.groupby("entry")[["answer", "distractor"]].nunique()
    assert (names == 1).all(axis=None), "entry i has the same names in every file"


def test_words_stand_where_the_places_say(published, gpt2):
    rows = torch.arange(len(published))
    here = {role: published.tokens[rows, published.positions[role]] for role in published.positions}
    assert torch.equal(here["IO"], published.answers[:, 0]) and torch.equal(here["S1"], published.distractors[:, 0])
    assert torch.equal(here["S2"], published.distractors[:, 0]) and set(gpt2.batch_decode(here["END"][:, None])) == {" to"}
    abba = torch.tensor((published.labels.order == "ABBA").tolist())
    assert set(gpt2.batch_decode(here["IO+1"][abba][:, None])) == set(gpt2.batch_decode(here["S1+1"][~abba][:, None])) == {" and"}
    assert (published.tokens[:, 0] != gpt2.bos_token_id).all() and (published.positions["IO"] < published.positions["S1"]).equal(abba)


def test_prompt_and_counterfactual_differ_in_the_three_names(published):
    differs = (published.tokens != published.counterfactual).nonzero()
    places = torch.stack([published.positions[r] for r in ("IO", "S1", "S2")], 1).sort().values
    assert torch.equal(differs[:, 1].reshape(-1, 3), places)


def test_two_of_a_hundred_counterfactuals_are_informative(published):
    pool = uninformative(published)
    left_out = set(published.labels.prompt_id + "-cf") - set(pool.labels.prompt_id)
    assert len(pool) == 2940 and {x.rsplit("-", 2)[1] for x in left_out} == {"042", "095"}
    assert [len(m) for m in pool_members(published[:3], pool)] == [98] * 3


# Written out by hand: token by token, with the place of every role.
BY_HAND = {"ioi-ABBA-00": ("Then|,| Scott| and| Jeremy| went| to| the| hospital|.| Jeremy| gave| a| snack| to",
                           dict(IO=2, S1=4, S2=10, END=14) | {"IO+1": 3, "S1+1": 5}),
           "ioi-BABA-14": ("Friends| Jeremy| and| Scott| found| a| snack| at| the| hospital|.| Jeremy| gave| it| to",
                           dict(IO=3, S1=1, S2=11, END=14) | {"IO+1": 4, "S1+1": 2}),
           "ioi-ABBA-12": ("Then|,| Scott| and| Jeremy| had| a| long| argument|.| Afterwards| Jeremy| said| to",
                           dict(IO=2, S1=4, S2=11, END=13) | {"IO+1": 3, "S1+1": 5}),
           "ioi-BABA-11": ("After|wards|,| Jeremy| and| Scott| went| to| the| hospital|.| Jeremy| gave| a| snack| to",
                           dict(IO=5, S1=3, S2=11, END=15) | {"IO+1": 6, "S1+1": 4})}


@pytest.mark.parametrize("name", BY_HAND)
def test_hand_checked(name, published, gpt2):
    i = published.labels.prompt_id.tolist().index(f"{name}-000")
    text, places = BY_HAND[name]
    assert [gpt2.decode(t) for t in published.tokens[i, : published.lengths[i]]] == text.split("|")
    assert {r: int(published.positions[r][i]) for r in places} == places


def test_a_beginning_of_sequence_token_under_gpt2(shared, gpt2):
    plain, moved = (read_autocircuit(shared("prompts/ioi-BABA-11.json"), gpt2, bos) for bos in (False, True))
    assert (moved.tokens[:, 0] == 50256).all() and torch.equal(moved.tokens[:, 1:], plain.tokens)
    assert all(torch.equal(moved.positions[r], plain.positions[r] + 1) for r in plain.positions)


def test_the_greater_than_sample(shared, gpt2):
    p, given_table = read_prompts(shared("prompts/greater-than-eap-ig.csv"), gpt2), pd.read_csv(shared("prompts/greater-than-eap-ig.csv"), dtype=str)
    assert len(p) == 1000 and (p.labels.task == "greater_than").all() and p.positions["END"].tolist() == [11] * 1000
    assert set(zip(*(p.positions[r].tolist() for r in ("XX1", "YY", "YY+1")))) == {(6, 7, 8)}
    years = given_table.label.astype(int).tolist()
    assert [gpt2.decode(t) for t in p.tokens[:, 7]] == [f"{y:02d}" for y in years] and sum(len(x) == 1 for x in given_table.label) == 88
    assert (p.answers >= 0).sum(1).tolist() == [99 - y for y in years] and (p.distractors >= 0).sum(1).tolist() == [y + 1 for y in years]
    assert [gpt2.decode(t) for t in p.tokens[0]] == "The| contract| lasted| from| the| year| 13|52| to| the| year| 13".split("|")
    assert set(gpt2.batch_decode(p.counterfactual[:, 7:8])) == {"01"}


def test_a_table_for_another_tokenizer_is_refused(table, gpt2):
    "Llama's ids, as in EAP-IG's ioi_llama.csv."
    row = ["Then, Aaron and Amber were working at the house. Aaron decided to give a drink to",
           "Then, Aaron and Amber were working at the house. Tiffany decided to give a drink to", 89254, 26757]
    assert "one of this tokenizer's 50257 tokens; was the file made for another one?" in refusal(read_eap_ig, table(IDS, row), gpt2)


# The command

SCORE = ["score", "--model", "compiled-ioi", "--circuit", "compiled-ioi-ioi", "--draws", "2", "--n-random", "1"]


def scored(out, *argv):
    assert main([*map(str, [*SCORE, *argv]), "--out", str(out)]) == 0
    return pd.read_csv(out)


def test_score_takes_each_format(write, table, tmp_path, compiled):
    tables = {"json": scored(tmp_path / "out" / "json.csv", "--prompts", write(entry(), SECOND), "--ablation", "counterfactual")}
    tables["folder"] = scored(tmp_path / "out" / "folder.csv", "--prompts", tmp_path, "--ablation", "counterfactual")
    rows = [[e["clean"], e["corrupt"], *(id_of(e[k][0].strip(), compiled.tokenizer) for k in ("answers", "wrong_answers")), 2, 4, 10]
            for e in (entry(), SECOND)]
    path = table([*IDS, "pos_IO", "pos_S1", "pos_S2"], *rows)
    tables["csv"] = scored(tmp_path / "out" / "csv.csv", "--prompts", path, "--ablation", "counterfactual")
    same = ["prompt", "answer", "distractor", "ld_model", "ld_circuit", "ld_complement", "ld_ablated"]
    for other in ("folder", "csv"): pd.testing.assert_frame_equal(tables["json"][same], tables[other][same])
    prompts = read_autocircuit(tmp_path / "ioi-ABBA-07.json", compiled.tokenizer)
    ours = CircuitScorer(compiled, "compiled-ioi-ioi").score(prompts, "counterfactual", n_random=0, profile=False)
    assert tables["json"].ld_model.tolist() == pytest.approx(ours.ld_model.tolist()) and (tables["json"].ld_model > 1).all()
    assert tables["json"].template.tolist() == ["ABBA-07"] * 2
    assert tables["json"].gap.notna().all() and tables["csv"].gap.isna().all(), "the scale is known where the task is"


def test_the_counterfactuals_are_a_reference(write, tmp_path):
    more = (entry("Mary", "John", ("Raymond", "Christine", "Anthony")), entry("Raymond", "Anthony", ("Mary", "John", "Christine")))
    path = write(entry(), *more, SECOND)
    table = scored(tmp_path / "scores.csv", "--prompts", path, "--ablation", "mean", "--reference", "counterfactuals")
    assert len(table) == 4 and (table.ablation == "mean").all() and table.ld_ablated.notna().all()


def test_a_dry_run_counts_what_a_known_task_adds(write, tmp_path, capsys):
    "Of IOI the effect of each of 32 heads is compared with the base; a file that does not say what it is about has no base."
    passes = []
    for places in (PLACES, None):
        command = [*SCORE, "--prompts", write(entry(), places=places), "--ablation", "counterfactual", "--positions", "all", "--dry-run"]
        assert main([*map(str, command), "--out", str(tmp_path / "x.csv")]) == 0
        passes.append(int(capsys.readouterr().out.split(", ")[1].split()[0]))
    assert passes[0] - passes[1] == 32


@pytest.mark.parametrize("change, says", [
    (dict(answers=[" Zanzibarian"]), "ioi-ABBA-07.json, entry 1: answer ' Zanzibarian' is "), (dict(clean=7), "entry 1: 'clean' should be text")])
def test_bad_files_are_one_line_and_exit_code_2(change, says, write, tmp_path, capfd):
    argv = [*SCORE, "--prompts", write(entry(), entry(**change)), "--ablation", "counterfactual", "--out", tmp_path / "out" / "scores.csv"]
    assert main([str(a) for a in argv]) == 2
    heard = capfd.readouterr()
    assert heard.out == "" and heard.err.count("\n") == 1 and says in heard.err and not (tmp_path / "out").exists()


def test_files_without_the_circuits_places_are_refused_in_one_line(table, tmp_path, capfd, compiled):
    path = table(IDS, ids_row(tokenizer=compiled.tokenizer))
    argv = [*SCORE, "--prompts", path, "--ablation", "counterfactual", "--out", tmp_path / "scores.csv"]
    assert main([str(a) for a in argv]) == 2
    heard = capfd.readouterr().err
    assert heard.count("\n") == 1 and "give pos_S2 (CSV)" in heard
