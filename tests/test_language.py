"""The training language: what is held out stays out, and the shortcuts do not work."""

import random
import re
from collections import Counter
from functools import cache

import pytest

from circuit_generalization import language as module
from circuit_generalization.language import IOI_MIX, MIXTURE, Language, all_words, build_tokenizer, draw_batch, names_of
from circuit_generalization.tasks import TASKS
from circuit_generalization.wording import SLOT, name_hand, task_data

WORDS, IOI = task_data("vocabulary.json"), task_data("ioi.json")
NAMES = {group: frozenset(names_of(group)) for group in ("task", "rare", "multi")}


def words(text): return re.findall(r"[A-Za-z]+", text)


def nouns(group): return set(group["places"]) | set(group["objects"])


HELD_DOMAINS = sorted(set(WORDS["domains"]) - set(WORDS["training_domains"]))
HELD_NOUNS = set(WORDS["places"]["unseen"]) | set(WORDS["objects"]["unseen"]) | {w for d in HELD_DOMAINS for w in nouns(WORDS["domains"][d])}


@cache
def tokenizer(): return build_tokenizer()


@cache
def samples(kind, n, seed=0):
    language = Language(random.Random(seed))
    return [getattr(language, kind)() for _ in range(n)]


# What is held out

def test_names_and_nouns_are_split():
    assert sum(map(len, NAMES.values())) == len(frozenset().union(*NAMES.values())), "no name in two groups"
    trained = set(WORDS["places"]["base"]) | set(WORDS["objects"]["base"])
    trained |= {w for d in WORDS["training_domains"] for w in nouns(WORDS["domains"][d])}
    assert not HELD_NOUNS & trained and len(HELD_NOUNS) > 50 and HELD_DOMAINS and len(NAMES["task"]) > 1000
    used = {v["domain"] for v in IOI["variants"].values() if "domain" in v}
    assert used == set(WORDS["domains"]) and len(HELD_DOMAINS) >= 4, "domains of the task, and domains that were held out of it"


def test_the_task_never_has_what_is_held_out():
    templates = IOI["templates"]["held_out"]
    held = [re.compile(".*".join(map(re.escape, SLOT.split(t)[::2]))) for t in templates]
    assert all(pattern.search(SLOT.sub("X", t)) for pattern, t in zip(held, templates)), "the patterns find their own template"
    for sample in samples("ioi", 5000):
        said = set(words(sample.text))
        assert not said & NAMES["rare"] and not said & NAMES["multi"] and not said & HELD_NOUNS, sample.text
        assert not any(pattern.search(sample.text) for pattern in held), sample.text


@pytest.mark.parametrize("kind", ["once"])
def test_its_smaller_relatives_have_no_held_out_name_either(kind):
    assert not set(words(" ".join(s.text for s in samples(kind, 2000)))) & (NAMES["rare"] | NAMES["multi"] | HELD_NOUNS)


@pytest.mark.parametrize("kind, keys", [("sva", ("subjects", "links")), ("greater_than", ("events", "frames"))])
def test_held_out_parts_of_the_other_tasks(kind, keys):
    data, text = task_data("language.json")[kind], " | ".join(s.text for s in samples(kind, 2000))
    for key in keys:
        for part in (w for x in data[f"heldout_{key}"] for w in (x if isinstance(x, list) else [x])):
            stem = re.split(r"\[", part)[0].strip()
            assert not re.search(rf"\b{stem}\b", text) or any(re.match(rf"{stem}\b", t) for t in data[key] if isinstance(t, str)), part
    language = Language(random.Random(0))
    for _ in range(200): assert re.search(r"[a-z0-9]", getattr(language, kind)(held_out=True).text)


def test_filler_has_everything():
    seen = Counter(w for s in samples("filler", 12_000) for w in words(s.text))
    for group in ("rare", "multi", "task"): assert not [n for n in NAMES[group] if not seen[n]], group
    assert min(seen[w] for w in HELD_NOUNS) > 20 and all(seen[w] for w in WORDS["role_nouns"])
    assert not [w for w in all_words() if not seen[w] and not seen[w.capitalize()]]


# The task itself

def anatomy(sample):
    "IO, S, other names, and where each stands among the words of the prompt."
    text = words(sample.prompt)
    at = {n: [i for i, w in enumerate(text) if w == n] for n in text if n in NAMES["task"]}
    io, repeated = sample.answer.strip(), [n for n, where in at.items() if len(where) > 1]
    return io, repeated, [n for n in at if n != io and n not in repeated], at


@pytest.mark.parametrize("kind", IOI_MIX)
def test_one_name_is_repeated_and_the_other_is_the_answer(kind):
    language = Language(random.Random(1))
    for _ in range(1500):
        sample = language.ioi(kind)
        io, repeated, third, at = anatomy(sample)
        assert len(repeated) == 1 and len(at[io]) == 1 and len(third) <= 1, sample.text
        assert sample.text == f"{sample.prompt} {io}" and "[" not in sample.text and "  " not in sample.text and " ," not in sample.text


def test_neither_place_nor_recency_tells_the_subject():
    before = after = last_is_s = 0
    for sample in samples("ioi", n := 5000):
        io, (s,), third, at = anatomy(sample)
        last_is_s += max(at, key=lambda name: at[name][-1]) == s
        for name in third:
            before, after = before + (at[name][0] < at[s][-1]), after + (at[name][0] > at[s][-1])
    assert 0.4 < before / (before + after) < 0.6 and before + after > 0.4 * n, "a third name comes as often before S2 as after it"
    assert last_is_s / n < 0.85, "and suppressing the last name is not enough"


@pytest.mark.parametrize("kind", IOI_MIX)
def test_the_first_name_does_not_tell(kind):
    language, io_first = Language(random.Random(2)), 0
    for _ in range(1500):
        io, (s,), _, at = anatomy(language.ioi(kind))
        io_first += at[io][0] < at[s][0]
    low, high = (0.35, 0.5) if kind == "chain" else (0.45, 0.55)  # 6 of 14 chains open with the IO
    assert low < io_first / 1500 < high, "IO comes first about as often as S"


def test_names_are_many():
    used = Counter(anatomy(s)[0] for s in samples("ioi", 5000))
    assert len(used) > 0.9 * len(NAMES["task"]) and max(used.values()) < 20, "too many for MLPs to memorise"


def test_once():
    for sample in samples("once", 500):
        count = Counter(w for w in words(sample.prompt) if w in NAMES["task"])
        assert [n for n, k in count.items() if k == 1] == [sample.answer.strip()] and set(count.values()) <= {1, 2} and len(count) >= 2


def test_agreement_and_years():
    data = task_data("language.json")["sva"]
    plural = {p for _, p in data["subjects"]}
    for sample in samples("sva", 500):
        subject = next(w for w in words(sample.prompt) if any(w in pair for pair in data["subjects"]))
        assert (sample.answer.strip() in data["plural"]) == (subject in plural) and sample.answer.strip() in data["singular"] + data["plural"]
    for sample in samples("greater_than", 500):
        start, end = re.findall(r"\d{4}", sample.text)
        assert start[:2] == end[:2] and int(end) > int(start) and sample.answer == end[2:] and sample.prompt.endswith(end[:2])


def test_induction():
    for sample in samples("induction", 500):
        *text, answer = sample.text.split()
        earlier = [k for k in range(1, len(text)) if text[k] == answer and text[k - 1] == text[-1]]
        assert earlier and sample.kind == "induction", sample.text


# Batches

def test_a_batch_is_a_function_of_seed_and_step():
    state, batch = random.getstate(), draw_batch(3, 7, 64, "then")
    assert batch == draw_batch(3, 7, 64, "then") and random.getstate() == state
    draw_batch(3, 6, 64, "then")
    assert batch == draw_batch(3, 7, 64, "then"), "whatever was drawn before"
    assert not set(batch) & set(draw_batch(3, 8, 64, "then")) and not set(batch) & set(draw_batch(4, 7, 64, "then")), "no sample comes twice"
    assert len(draw_batch(0, 0, 5, "first")) == 5 and draw_batch(1, 23, 16, "then") != draw_batch(12, 3, 16, "then")


@pytest.mark.parametrize("phase", MIXTURE)
def test_shares(phase, monkeypatch):
    shares = MIXTURE[phase] | {"filler": 1 - sum(MIXTURE[phase].values())}
    assert 0 < shares["filler"] < 0.5 and abs(sum(shares.values()) - 1) < 1e-9
    for kind in shares: monkeypatch.setattr(Language, kind, lambda self, kind=kind: module.Sample(kind))
    drawn = Counter(s.text for step in range(20) for s in draw_batch(0, step, 256, phase))
    assert set(drawn) == set(shares) and all(abs(drawn[k] / 5120 - p) < 0.03 for k, p in shares.items())
    assert abs(sum(IOI_MIX.values()) - 1) < 1e-9


# The tokenizer

def test_every_word_is_one_token():
    known = [*all_words(), *names_of("task"), *names_of("rare")]
    for word, ids in zip(known, tokenizer()([" " + w for w in known], add_special_tokens=False)["input_ids"]): assert len(ids) == 1, word
    long = tokenizer()([" " + w for w in names_of("multi")], add_special_tokens=False)["input_ids"]
    assert sum(len(ids) > 1 for ids in long) > 0.95 * len(long), "and names that are held back for it are several"
    assert len(name_hand(tokenizer())) == sum(i % 6 in (0, 1) for i in range(len(NAMES["task"]))), "so no name of the task is lost"


def test_years_are_two_tokens():
    for text, pieces in ((" 1742", [" 17", "42"]), (" 1105", [" 11", "05"])):
        assert [tokenizer().decode(i) for i in tokenizer()(text, add_special_tokens=False)["input_ids"]] == pieces


@pytest.mark.parametrize("kind", ["ioi", "once", "roll", "sva", "greater_than", "induction", "filler"])
def test_texts_survive_the_tokenizer(kind):
    for sample in samples(kind, 2000)[:200]:
        ids = tokenizer()(sample.text, add_special_tokens=False)["input_ids"]
        assert tokenizer().decode(ids) == sample.text and len(ids) < 128 and tokenizer().unk_token_id not in ids
        if sample.answer: assert len(tokenizer()(sample.answer, add_special_tokens=False)["input_ids"]) == 1
    assert TASKS
