"""Prompt sets: from ids, from a file, in parts; and real GPT-2 token boundaries."""

import json
import re
from functools import cache

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_generalization.errors import InputError
from circuit_generalization.language import build_tokenizer
from circuit_generalization.prompts import LABELS, PromptError, PromptSet, bos_ids, concat_prompts, encode, prompts_hash, single_token

ids = st.integers(0, 49)


@cache
def small(): return build_tokenizer()


@st.composite
def parts(draw, low=1, high=4):
    "Arguments of `from_tokens`: ragged prompts with everything in place."
    n = draw(st.integers(low, high))
    clean = [draw(st.lists(ids, min_size=1, max_size=6)) for _ in range(n)]
    return dict(clean=clean, counterfactual=[[draw(ids) for _ in c] for c in clean],
                answers=[draw(st.lists(st.integers(0, 24), min_size=1, max_size=3, unique=True)) for _ in clean],
                distractors=[draw(st.lists(st.integers(25, 49), min_size=1, max_size=3, unique=True)) for _ in clean],
                positions={"S2": [draw(st.integers(-1, len(c) - 1)) for c in clean]})


def named(start, **given):
    n = len(given["clean"])
    return PromptSet.from_tokens(**given, labels={"prompt_id": [f"{start}{i}" for i in range(n)]})


def refusal(f, *args, **given):
    "The message with which bad input is refused."
    with pytest.raises(PromptError) as caught: f(*args, **given)
    assert isinstance(caught.value, InputError) and "\n" not in str(caught.value)
    return str(caught.value)


# From token ids

def test_ragged_lists_are_padded():
    p = PromptSet.from_tokens([[5, 7, 9, 7], [5, 8]], [[5, 7, 9, 6], [5, 4]], [9, [8, 3]], [[7, 6], 5], {"S2": [3, -1]})
    assert p.tokens.tolist() == [[5, 7, 9, 7], [5, 8, 0, 0]] and p.counterfactual.tolist() == [[5, 7, 9, 6], [5, 4, 0, 0]]
    assert p.lengths.tolist() == [4, 2] and p.answers.tolist() == [[9, -1], [8, 3]] and p.distractors.tolist() == [[7, 6], [5, -1]]
    assert {r: v.tolist() for r, v in p.positions.items()} == {"END": [3, 1], "S2": [3, -1]}
    assert p.tokens.dtype == p.answers.dtype == p.positions["S2"].dtype == torch.long
    assert set(LABELS) <= set(p.labels) and p.labels.prompt_id.tolist() == p.labels.base_id.tolist() == ["p0000", "p0001"]


@given(parts())
def test_every_token_is_where_it_was(given_parts):
    p = PromptSet.from_tokens(**given_parts)
    for i, (clean, cf) in enumerate(zip(given_parts["clean"], given_parts["counterfactual"])):
        assert p.tokens[i, : p.lengths[i]].tolist() == clean and p.counterfactual[i, : p.lengths[i]].tolist() == cf
        assert (p.tokens[i, p.lengths[i]:] == 0).all() and p.positions["END"][i] == len(clean) - 1
        assert [a for a in p.answers[i].tolist() if a >= 0] == given_parts["answers"][i]


def test_an_answer_set_is_a_set():
    p = PromptSet.from_tokens([[1], [1]], answers=[[2, 2, 3], torch.tensor(4)], distractors=[[5, 5], [6]])
    assert p.answers.tolist() == [[2, 3], [4, -1]] and p.distractors.tolist() == [[5], [6]], "or the logsumexp would count an id twice"


def test_the_arguments_are_left_alone():
    clean, labels = [[1, 2], [3]], pd.DataFrame({"prompt_id": ["x", "y"]})
    PromptSet.from_tokens(clean, None, [1, 2], [3, 4], labels=labels)
    assert clean == [[1, 2], [3]] and list(labels) == ["prompt_id"]


one = dict(clean=[[1, 2], [3, 4, 5]], answers=[6, 7], distractors=[8, 9])


@pytest.mark.parametrize("change, message", [
    (dict(clean=[]), "the prompt set is empty"),
    (dict(clean=[[1, 2], []]), "prompt p0001 has no tokens"),
    (dict(distractors=[8, 7]), "prompt p0001: the answer is also the distractor"),
    (dict(answers=[[6, 5], [1, 2]], distractors=[[3, 5], [4]]), "prompt p0000: the answer is also the distractor"),
    (dict(answers=[6, []]), "prompt p0001 has no answer"), (dict(distractors=[[], 9]), "prompt p0000 has no distractor"),
    (dict(answers=[6]), "differ in number"), (dict(positions={"S2": [0]}), "differ in number"),
    (dict(counterfactual=[[1, 2], [3, 4]]), "prompt p0001 has 3 tokens, its counterfactual 2"),
    (dict(counterfactual=[[1, 2]]), "2 prompts, but 1 counterfactuals"),
    (dict(positions={"S2": [2, 1]}), "prompt p0000: S2 is at token 2, but the prompt has 2 tokens"),
    (dict(positions={"S2": [0, -2]}), "prompt p0001: S2 is at token -2"),
    (dict(labels={"prompt_id": ["x", "x"]}), "prompt_id is not unique"),
    (dict(labels={"prompt_id": ["x"]}), "labels have 1 rows for 2 prompts"),
    (dict(distractors=[8, 7], labels={"prompt_id": ["x", "y"], "prompt": ["A b", "C d"]}), r"prompt y \('C d'\): the answer is also")])
def test_what_makes_no_sense_is_refused(change, message):
    assert re.search(message, refusal(PromptSet.from_tokens, **one | change))


# Parts, unions, hashes

@given(parts(low=2), st.data())
def test_slicing(given_parts, data):
    p = PromptSet.from_tokens(**given_parts)
    at = data.draw(st.lists(st.integers(0, len(p) - 1), min_size=1, max_size=len(p), unique=True))
    some = p[at]
    assert [some.tokens[k, : some.lengths[k]].tolist() for k in range(len(at))] == [given_parts["clean"][i] for i in at]
    assert some.positions["S2"].tolist() == [given_parts["positions"]["S2"][i] for i in at] and len(some) == len(some.labels) == len(at)
    assert some.labels.prompt_id.tolist() == p.labels.prompt_id.iloc[at].tolist() and some.labels.index.tolist() == list(range(len(at)))
    mask = torch.zeros(len(p), dtype=torch.bool).index_fill(0, torch.tensor(at), True)
    assert prompts_hash(p[mask]) == prompts_hash(p[sorted(at)]) and prompts_hash(p[:]) == prompts_hash(p)
    assert p[at[0]].labels.prompt_id.tolist() == [p.labels.prompt_id[at[0]]]


@given(parts(), parts())
def test_joining_undoes_slicing(a, b):
    p, q = named("p", **a), named("q", **b)
    both = concat_prompts([p, q])
    assert len(both) == len(p) + len(q) and both.labels.prompt_id.tolist() == p.labels.prompt_id.tolist() + q.labels.prompt_id.tolist()
    assert prompts_hash(both[: len(p)]) == prompts_hash(p) and prompts_hash(both[len(p):]) == prompts_hash(q), "padding does not count"
    assert prompts_hash(both) == prompts_hash(PromptSet.from_tokens(**{k: a[k] + b[k] for k in a if k != "positions"},
                                                                    positions={"S2": a["positions"]["S2"] + b["positions"]["S2"]}))
    assert both.answers.min() >= -1 and both.tokens.min() >= 0


def test_joining_what_differs():
    p = named("p", clean=[[1, 2]], answers=[3], distractors=[4], counterfactual=[[1, 3]], positions={"S2": [1]})
    q = named("q", clean=[[1, 2, 3]], answers=[[3, 5]], distractors=[4], positions={"IO": [0]})
    both = concat_prompts([p, q])
    assert both.counterfactual is None and both.positions["S2"].tolist() == [1, -1] and both.positions["IO"].tolist() == [-1, 0]
    assert "prompt_id is not unique" in refusal(concat_prompts, [p, p])


@given(parts(), st.data())
def test_the_hash_is_of_what_is_scored(given_parts, data):
    p = PromptSet.from_tokens(**given_parts)
    i = data.draw(st.integers(0, len(p) - 1))
    at = data.draw(st.integers(0, len(given_parts["clean"][i]) - 1))
    what = data.draw(st.sampled_from(["clean", "counterfactual", "answers", "distractors", "positions"]))
    changed = {k: ({"S2": list(v["S2"])} if k == "positions" else [list(x) for x in v]) for k, v in given_parts.items()}
    if what == "positions": changed[what]["S2"][i] = (changed[what]["S2"][i] + 2) % (len(changed["clean"][i]) + 1) - 1
    elif what in ("clean", "counterfactual"): changed[what][i][at] = (changed[what][i][at] + 1) % 50
    else: changed[what][i] = [60] if what == "answers" else [61]
    assert prompts_hash(PromptSet.from_tokens(**changed)) != prompts_hash(p)
    same = {k: [list(reversed(x)) for x in v] if k in ("answers", "distractors") else v for k, v in given_parts.items()}
    assert prompts_hash(PromptSet.from_tokens(**same)) == prompts_hash(p), "answers are a set"
    relabelled = PromptSet.from_tokens(**given_parts, labels={"prompt_id": [f"other{k}" for k in range(len(p))]})
    assert prompts_hash(relabelled) == prompts_hash(p)


def test_the_hash_counts_what_is_missing_and_order():
    p = PromptSet.from_tokens(**one)
    assert prompts_hash(p) != prompts_hash(PromptSet.from_tokens(**one, counterfactual=one["clean"]))
    assert prompts_hash(p) != prompts_hash(PromptSet.from_tokens(**one, positions={"S2": [0, 0]})) != prompts_hash(p[[1, 0]])
    assert prompts_hash(p) != prompts_hash(p[[1, 0]]) and prompts_hash(p) != prompts_hash(p[[0]])


# From a CSV file

HEADER = "prompt,counterfactual,answer,distractor"
ROW = '"Then, Mary and John went to the store. John gave a drink to","Then, Mary and John went to the store. Paul gave a drink to", Mary, John'


def read(tmp_path, *lines, header=HEADER, tokenizer=None, **options):
    path = tmp_path / "mine.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return PromptSet.from_csv(path, tokenizer or small(), **options)


def csv_refusal(tmp_path, *lines, header=HEADER, **options):
    message = refusal(read, tmp_path, *lines, header=header, **options)
    assert message.startswith(str(tmp_path / "mine.csv")), "the file is named"
    return message.removeprefix(str(tmp_path / "mine.csv"))


def test_a_good_file(tmp_path):
    p = read(tmp_path, ROW + ",t1,10,,7", ROW + "| Paul,t2,10,0,", header=HEADER + ",template,pos_S2,pos_START,note")
    text = small().convert_ids_to_tokens(p.tokens[0])
    assert text[10] == "ĠJohn" and text[-1] == "Ġto" and p.positions["S2"].tolist() == [10, 10] and p.positions["START"].tolist() == [-1, 0]
    assert small().convert_ids_to_tokens(p.counterfactual[0])[10] == "ĠPaul" and p.labels.prompt_id.tolist() == ["row2", "row3"]
    assert small().decode(p.answers[0][:1]) == " Mary" and small().convert_ids_to_tokens(p.distractors[1]) == ["ĠJohn", "ĠPaul"]
    assert p.labels.template.tolist() == ["t1", "t2"] and p.labels.note.tolist() == ["7", ""] and "pos_S2" not in p.labels
    assert p.labels.answer.tolist() == [" Mary", " Mary"] and p.positions["END"].tolist() == [14, 14]


def test_a_beginning_of_sequence_token_moves_positions(tmp_path):
    plain, with_bos = (read(tmp_path, ROW + ",10", ROW + ",", header=HEADER + ",pos_S2", bos=bos) for bos in (False, True))
    assert with_bos.tokens[:, 0].tolist() == with_bos.counterfactual[:, 0].tolist() == bos_ids(small()) * 2
    assert with_bos.tokens[:, 1:].tolist() == plain.tokens.tolist() and with_bos.answers.tolist() == plain.answers.tolist()
    assert with_bos.positions["S2"].tolist() == [11, -1] and plain.positions["S2"].tolist() == [10, -1]


def test_a_file_without_counterfactuals(tmp_path):
    assert read(tmp_path, "Mary gave it to, Mary, John", header="prompt,answer,distractor").counterfactual is None
    assert read(tmp_path, "Mary gave it to,, Mary, John").counterfactual is None


@pytest.mark.parametrize("lines, header, message", [
    ([ROW], "prompt,counterfactual,answer,wrong", ": no column distractor (it has: prompt, counterfactual, answer, wrong)"),
    ([ROW], "a,b,c,d", ": no column prompt, answer, distractor"),
    ([], HEADER, ": no prompts, only a header"), ([], "", ": not a CSV file that can be read"),
    ([ROW, "  ,x, Mary, John"], HEADER, ", row 3: the prompt is empty"),
    ([ROW, ROW.replace(" Mary, John", " Mary Ann, John")], HEADER, ", row 3: answer ' Mary Ann' is 2 tokens (ĠMary ĠAnn), and must be one"),
    ([ROW.replace(", John", ", John|")], HEADER, ", row 2: answer '' is 0 tokens"),
    ([ROW, "A dog gave it to,A dog gave it to, Mary"], HEADER, ", row 3: answer '' is 0 tokens"),
    ([ROW.replace(" Mary, John", "Mary, John")], HEADER, ", row 2: answer 'Mary' would run into 'to': write ' Mary' if"),
    ([ROW, ROW.replace("Paul gave", "Paul then gave")], HEADER, ": prompt row3 has 15 tokens, its counterfactual 16"),
    ([ROW, "A dog gave it to,, Mary, John"], HEADER, ", row 3: no counterfactual, and other prompts have one"),
    ([ROW.replace(" Mary, John", " John, John")], HEADER, ": prompt row2 ("),
    ([ROW.replace(" Mary, John", " John, John")], HEADER, "the answer is also the distractor"),
    ([ROW + ",15"], HEADER + ",pos_S2", ": prompt row2 ("),
    ([ROW + ",15"], HEADER + ",pos_S2", "S2 is at token 15, but the prompt has 15 tokens"),
    ([ROW + ",10", ROW + ",ten"], HEADER + ",pos_S2", ", row 3: pos_S2 should be a token's index (from 0; empty for none), not 'ten'"),
    ([ROW + ",1.5"], HEADER + ",pos_S2", ", row 2: pos_S2 should"), ([ROW + ",-3"], HEADER + ",pos_S2", ", row 2: pos_S2 should"),
    ([ROW + ",inf"], HEADER + ",pos_S2", ", row 2: pos_S2 should"), ([ROW + ",x", ROW + ",x"], HEADER + ",prompt_id", ": prompt_id is not unique")])
def test_bad_files_are_named_with_the_row(tmp_path, lines, header, message):
    assert message in csv_refusal(tmp_path, *lines, header=header)


def test_files_that_cannot_be_read(tmp_path):
    assert refusal(PromptSet.from_csv, tmp_path / "none.csv", small()) == f"{tmp_path}/none.csv: no such file"
    assert "not a CSV file that can be read" in refusal(PromptSet.from_csv, tmp_path, small())
    (tmp_path / "latin.csv").write_bytes((HEADER + "\nä,b,c,d\n").encode("latin-1"))
    assert "not a CSV file that can be read" in refusal(PromptSet.from_csv, tmp_path / "latin.csv", small())
    (tmp_path / "mine.csv").write_text(f"{HEADER}\n{ROW}\n")
    assert "the model has no tokenizer" in refusal(PromptSet.from_csv, tmp_path / "mine.csv", None)


def test_a_tokenizer_without_bos(tmp_path):
    bare = build_tokenizer()
    bare.bos_token = None
    assert "no BOS token: leave --bos out" in refusal(read, tmp_path, ROW, tokenizer=bare, bos=True)


def test_one_token_or_a_plain_refusal():
    assert single_token(small(), " Mary", "here") == encode(small(), " Mary")[0] and encode(small(), "") == []
    assert refusal(single_token, small(), " Mary Ann", "here").startswith("here: answer ' Mary Ann' is ")


# GPT-2's token boundaries

def test_this_is_gpt2s_tokenizer(gpt2):
    assert encode(gpt2, " Mary") == [5335] and len(gpt2) == 50257


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_published_ioi_prompts(tmp_path, order, shared, gpt2):
    data = json.loads(shared(f"prompts/ioi-{order}-00.json").read_text())
    where = {"IO": "IO", "S1": "S1", "S1+1": "S1+1", "S2": "S2"}
    table = pd.DataFrame([dict(prompt=x["clean"], counterfactual=x["corrupt"], answer=x["answers"][0], distractor=x["wrong_answers"][0])
                          | {f"pos_{ours}": data["word_idxs"][theirs] for ours, theirs in where.items()} for x in data["prompts"]])
    table.to_csv(tmp_path / "mine.csv", index=False)
    p = PromptSet.from_csv(tmp_path / "mine.csv", gpt2)
    rows = torch.arange(len(p))
    assert len(p) == 100 and torch.equal(p.tokens[rows, p.positions["IO"]], p.answers[:, 0])
    assert torch.equal(p.tokens[rows, p.positions["S2"]], p.distractors[:, 0]) and torch.equal(p.tokens[rows, p.positions["S1"]], p.distractors[:, 0])
    assert p.positions["END"].eq(data["word_idxs"]["end"]).all()
