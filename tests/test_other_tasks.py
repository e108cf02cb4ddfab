"""Agreement, greater-than and induction: every prompt read back token by token."""

from collections import Counter
from importlib import resources

import numpy as np
import pytest
from transformers import AutoTokenizer

from circuit_generalization.ablation import pool_members
from circuit_generalization.agreement import noun_pairs, verbs
from circuit_generalization.circuit import load_circuit
from circuit_generalization.circuit_scorer import CircuitScorer
from circuit_generalization.greater_than import digits, years
from circuit_generalization.models import load_model, model_hash
from circuit_generalization.tasks import TASKS, TaskError, cell_of, list_variants, make_prompts, reference_pool
from circuit_generalization.wording import SPLITS, task_data

OTHERS = ("sva", "greater_than", "induction")
EVERY = [(task, row.axis, row.variant) for task in OTHERS for row in list_variants(task).itertuples()]
N = 144  # every template of a base in every combination of numbers, twice


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(str(resources.files("circuit_generalization") / "data" / "models" / "organism-a"))


@pytest.fixture(scope="module")
def made(tokenizer): return {(task, variant): make_prompts(task, axis, variant, N, tokenizer=tokenizer) for task, axis, variant in EVERY}


def words_of(prompts, tokenizer, i, what="tokens"):
    return [t.lstrip("Ġ") for t in tokenizer.convert_ids_to_tokens(getattr(prompts, what)[i, : prompts.lengths[i]])]


def at(prompts, i): return {role: int(v[i]) for role, v in prompts.positions.items()}


def answers_of(prompts, tokenizer, i):
    return [{t.lstrip("Ġ") for t in tokenizer.convert_ids_to_tokens([x for x in ids[i].tolist() if x >= 0])}
            for ids in (prompts.answers, prompts.distractors)]


# Data

@pytest.mark.parametrize("task", OTHERS)
def test_there_are_axes_templates_and_explanations(task):
    table = list_variants(task)
    assert table.variant.is_unique and table.variant[0] == "base" and table.what.is_unique and TASKS[task].what
    assert table.templates[0] >= 15 and (table.templates >= 8).all() and len(set(table.axis) - {"base"}) >= 3
    for templates in TASKS[task].data["templates"].values(): assert len({str(t) for t in templates}) == len(templates)


@pytest.mark.parametrize("task", OTHERS)
def test_prompt_i_does_not_depend_on_n_and_seeds_differ(task, tokenizer):
    some, more, other = (make_prompts(task, n=n, seed=seed, tokenizer=tokenizer).labels.prompt for n, seed in ((5, 0), (40, 0), (40, 1)))
    assert (some == more[:5]).all() and (more == other).mean() < 0.2


@pytest.mark.parametrize("task, axis, variant", EVERY)
def test_variants_are_matched_pairs_of_the_base(task, axis, variant, made):
    base, new = made[task, "base"].labels, made[task, variant].labels
    assert (new.base_id == base.prompt_id).all() and (new.base_template == base.template).all() and set(new.axis) == {axis}
    changed = (new.prompt != base.prompt).mean()
    # half of the base's attractors are in the other number already, and one event in eight is drawn again
    assert changed == 0 if variant == "base" else 0.4 < changed < 0.6 if variant in ("attraction", "agreement") else changed > 0.8


# Agreement

@pytest.mark.parametrize("variant", [v for t, _, v in EVERY if t == "sva"])
def test_agreement_token_by_token(variant, made, tokenizer):
    prompts, forms = made["sva", variant], verbs(tokenizer)
    number = {w: k for group in task_data("sva.json")["nouns"].values() for pair in group for k, w in enumerate(pair)}
    for i in range(N):
        words, other, roles = words_of(prompts, tokenizer, i), words_of(prompts, tokenizer, i, "counterfactual"), at(prompts, i)
        subject, attractor = words[roles["SUBJ"]], words[roles["ATTR"]]
        assert roles["END"] == len(words) - 1 and roles["SUBJ+1"] == roles["SUBJ"] + 1 < roles["ATTR-1"] == roles["ATTR"] - 1
        assert subject[:3] != attractor[:3]
        assert [k for k, (a, b) in enumerate(zip(words, other)) if a != b] == [roles["SUBJ"]] and number[other[roles["SUBJ"]]] == 1 - number[subject]
        right, wrong = answers_of(prompts, tokenizer, i)
        assert right == set(forms[number[subject]]) and wrong == set(forms[1 - number[subject]])
        if variant in ("attraction", "agreement"): assert (number[subject] != number[attractor]) == (variant == "attraction")
        if "ATTR2" in roles: assert number[words[roles["ATTR2"]]] == number[attractor] and words[roles["ATTR2"]] not in (subject, attractor)


def test_numbers_are_balanced(made):
    assert set(Counter(made["sva", "base"].labels.numbers).values()) == {N // 4}
    numbers = made["sva", "base"].labels.numbers.tolist()
    assert all(max(c.values()) - min(c.values()) <= 2 and len(c) == 4 for n in range(8, N) for c in [Counter(numbers[:n])])  # at any n
    assert Counter(made["sva", "attraction"].labels.numbers) == {"0 1": N // 2, "1 0": N // 2}


def test_one_thing_changes_in_agreement(made):
    base = made["sva", "base"].labels
    for variant in ("relative_clause", "held_out_links", "two_attractors"):
        new = made["sva", variant].labels
        assert (new.nouns == base.nouns).all() and (new.numbers == base.numbers).all() and (new.template != base.template).all()
    for variant in ("people", "household", "outdoors", "held_out_nouns"):
        new = made["sva", variant].labels
        assert (new.template == base.template).all() and (new.numbers == base.numbers).all()
        group = {w for pair in task_data("sva.json")["nouns"]["held_out" if variant == "held_out_nouns" else variant] for w in pair}
        assert all(set(nouns.split()) <= group for nouns in new.nouns)


# Greater than

@pytest.mark.parametrize("variant", [v for t, _, v in EVERY if t == "greater_than"])
def test_greater_than_token_by_token(variant, made, tokenizer):
    prompts = made["greater_than", variant]
    low, high = dict(early_years=(2, 20), late_years=(80, 97)).get(variant, (2, 97))
    for i in range(N):
        words, other, roles = words_of(prompts, tokenizer, i), words_of(prompts, tokenizer, i, "counterfactual"), at(prompts, i)
        year = int(words[roles["YY"]])
        assert low <= year <= high and words[roles["XX1"]] == words[roles["END"]] and roles["END"] == len(words) - 1
        assert roles["YY"] == roles["XX1"] + 1 and words[roles["EVENT"]] == prompts.labels.event[i] and roles["YY+1"] == roles["YY"] + 1
        assert other[roles["YY"]] == "01" and {k for k, (a, b) in enumerate(zip(words, other)) if a != b} <= {roles["YY"]}
        right, wrong = ({int(y) for y in s} for s in answers_of(prompts, tokenizer, i))
        assert right == set(range(year + 1, 100)) and wrong == set(range(year + 1))


def test_one_thing_changes_in_greater_than(made):
    base = made["greater_than", "base"].labels
    same = {"held_out_events": ("template", "year", "century"), "held_out_frames": ("event", "year", "century"), "conflict": ("template", "year"),
            "travel": ("template", "century"), "early_years": ("template", "event"), "late_years": ("template", "event")}
    for variant, columns in same.items():
        for column in columns: assert (made["greater_than", variant].labels[column] == base[column]).all(), (variant, column)


def test_a_year_counts_only_if_it_is_a_century_and_two_digits(tokenizer):
    class Cut:
        "Knows 1700 to 1799 as one token each."
        def __init__(self): self.pad_token_id = 0
        def __call__(self, texts, add_special_tokens=False):
            return {"input_ids": [[int(t)] if "17" in t[:3] else [int(t[:3]), 3000 + int(t[3:])] for t in texts]}

        def convert_ids_to_tokens(self, ids): return [str(i) if i < 3000 else f"{i - 3000:02d}" for i in ids]
    known = years(Cut())
    assert 17 not in known and 16 in known and known[16] == tuple(range(100))
    assert years(tokenizer).keys() == {11, *range(13, 20)}, "this tokenizer cuts 1201 into 1, 20 and 1"
    assert digits(tokenizer) == tuple(range(100))

    class Whole(Cut):
        def __call__(self, texts, add_special_tokens=False): return {"input_ids": [[int(t)] for t in texts]}
    with pytest.raises(TaskError, match="cuts no year"): years(Whole())


# Induction

@pytest.mark.parametrize("variant", [v for t, _, v in EVERY if t == "induction"])
def test_induction_token_by_token(variant, made, tokenizer):
    prompts = made["induction", variant]
    for i in range(N):
        words, other, roles = words_of(prompts, tokenizer, i), words_of(prompts, tokenizer, i, "counterfactual"), at(prompts, i)
        group, number = prompts.labels.template[i].rsplit("-", 1)
        k, p, j, gap, times = task_data("induction.json")["templates"][group][int(number)]
        (right,), (wrong,) = answers_of(prompts, tokenizer, i)
        block = words[p:p + k]
        assert roles["END"] == len(words) - 1 and words[roles["END"]] == words[roles["A1"]] == block[j] and len(set(block)) == k
        assert roles["B1+1"] == roles["B1"] + 1 < roles["D1"] and words[roles["B1"]] == right == block[j + 1]
        assert words[roles["D1"]] == wrong == block[-1] != right and words[p + k + gap:] == block * (times - 1) + block[:j + 1]
        assert set(words[p + k:p + k + gap]) & set(block) == ({wrong} if variant == "echo" else set())
        assert other[roles["B1"]] == wrong and other[roles["D1"]] == right and other[roles["END"]] == words[roles["END"]]
        assert sum(a != b for a, b in zip(words, other)) == 2 * times
        assert wrong not in words[len(words) - j - 1:], "the distractor is not said again"


# Hands and pools

def test_hands_are_disjoint(tokenizer):
    for group in task_data("sva.json")["nouns"]:
        hands = []
        for split in SPLITS:
            try: hands.append({w for pair in noun_pairs(tokenizer, group, split) for w in pair})
            except TaskError as error: assert "two are needed" in str(error) and split in str(error)
        assert sum(map(len, hands)) == len(set().union(*hands))
    for task, column in (("greater_than", "event"), ("induction", "words"), ("sva", "nouns")):
        def said(variant, split, task=task, column=column):
            axis = dict((v, a) for t, a, v in EVERY if t == task)[variant]
            return {w for text in make_prompts(task, axis, variant, 72, tokenizer=tokenizer, split=split).labels[column] for w in text.split()}
        base = {split: said("base", split) for split in SPLITS}
        assert not any(base[a] & base[b] for a in base for b in base if a < b), task
        for variant in [v for t, a, v in EVERY if t == task and a == "domain"]:
            assert not said(variant, "scored") & set().union(*(base[s] for s in SPLITS if s != "scored")), "a word has one hand, in every variant"


@pytest.mark.parametrize("task, axis, variant", EVERY)
@pytest.mark.parametrize("bos", [False, True])
def test_pools_fit_and_tell_nothing(task, axis, variant, bos, tokenizer):
    prompts = make_prompts(task, axis, variant, 6, tokenizer=tokenizer, bos=bos)
    pool = reference_pool(prompts, tokenizer)
    cells = dict.fromkeys(cell_of(prompts))
    assert set(cell_of(pool)) == set(cells) and len(pool) == 32 * len(cells) and set(pool.labels.task) == {task}
    assert all(len(m) >= 31 for m in pool_members(prompts, pool))
    if task == "greater_than":
        assert all(words_of(pool, tokenizer, i)[pool.positions["YY"][i]] == "01" for i in range(len(pool)))
    if task == "induction":
        for i in range(len(pool)): assert len(set(own := words_of(pool, tokenizer, i)[bos:])) == len(own)
    if task == "sva":
        singular = pool.labels.answer.str.contains(" is").to_numpy()
        assert abs(singular.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(pool)) and len(set(pool.labels.prompt)) > len(cells)


# Refusals

def test_what_a_task_does_not_have():
    for call, words in ((lambda: make_prompts("svo"), "no task 'svo': there is ioi, sva, greater_than, induction"),
                        (lambda: make_prompts("sva", "domain", "kitchen"), "has no variant 'kitchen': there is people, household, outdoors"),
                        (lambda: make_prompts("greater_than", "moral"), "no axis 'moral': there is base, lexical, syntactic, domain, adversarial"),
                        (lambda: make_prompts("induction", receivers={"a": "b"}, tokenizer=object()), "gives nothing to anybody")):
        with pytest.raises(TaskError, match=words.replace("(", r"\(")): call()


def test_two_changes_at_once(tokenizer):
    both = make_prompts("sva", "combined", "people+relative_clause", 20, tokenizer=tokenizer)
    assert both.labels.template.str.startswith("relative").all() and both.labels.prompt.str.contains(" that the ").all()
    with pytest.raises(TaskError, match="two of its parts change the domain"): make_prompts("sva", "combined", "people+outdoors", tokenizer=tokenizer)


def test_a_tokenizer_without_the_words_is_told():
    class Letters:
        "One token a letter."
        def __call__(self, texts, add_special_tokens=False, **_): return {"input_ids": [[ord(c) for c in t] for t in texts]}
        def convert_ids_to_tokens(self, ids): return [chr(i) for i in ids]
    for task, words in (("sva", "only 0 base nouns, of one token in both numbers"), ("greater_than", "no one-token base events"),
                        ("induction", "only 0 base words")):
        with pytest.raises(TaskError, match=words): make_prompts(task, n=1, tokenizer=Letters())


# The organisms do them, with circuits of their own

@pytest.mark.slow
@pytest.mark.parametrize("task", OTHERS)
@pytest.mark.parametrize("name", ["organism-a", "organism-b", "organism-c"])
def test_packaged_circuits_are_of_these_weights_and_hold_on_new_prompts(name, task):
    model, circuit = load_model(name), load_circuit(f"{name}-{task}")
    assert circuit.task == task and circuit.model == name and 5 <= len(circuit) <= 13
    assert circuit.provenance["model_hash"] == model_hash(model) and f"--task {task}" in circuit.provenance["command"]
    assert min(circuit.provenance["sufficiency"], circuit.provenance["necessity"]) > 0.9
    assert circuit.provenance["incompleteness"]["nothing"] < 0.1 and set(circuit.provenance["minimality"]) == set(circuit.components)
    prompts = make_prompts(task, n=72, tokenizer=model.tokenizer)
    table = CircuitScorer(model, circuit).score(prompts, n_random=0, profile=False)
    decided = table[~table.verdict.isin(["model_fails", "undecided"])]  # a late year has few right answers, and little to decide by
    assert (table.ld_model > 0).mean() > 0.95 and decided.active.mean() > 0.85 and len(decided) > 0.6 * len(table)
    whole, alone, without = (table[c].mean() - table.ld_ablated.mean() for c in ("ld_model", "ld_circuit", "ld_complement"))
    assert 0.9 < alone / whole < 1.1 and without / whole < 0.1


def test_where_the_algorithms_differ():
    "In induction organism-c reads what followed; organism-b reads one word further, where the word that followed was copied to."
    def roles(name): return Counter(n.role for n in load_circuit(f"{name}-induction").nodes)
    assert roles("organism-c")["induction"] >= 5 and not roles("organism-c")["late induction"]
    assert roles("organism-b")["late induction"] >= 4 and not roles("organism-b")["induction"]


# GPT-2's tokenizer

@pytest.mark.parametrize("task, axis, variant", EVERY)
def test_gpt2_reads_them_too(task, axis, variant, gpt2):
    try: prompts = make_prompts(task, axis, variant, 36, tokenizer=gpt2)
    except TaskError as error: assert "this tokenizer" in str(error) and variant != "base"
    else:
        for i in range(36):
            words, roles = words_of(prompts, gpt2, i), at(prompts, i)
            if task == "greater_than":
                assert words[roles["YY"]] == f"{int(prompts.labels.year[i]):02d}" and words[roles["END"]] == prompts.labels.century[i]
            if task == "sva": assert words[roles["SUBJ"]] in prompts.labels.nouns[i].split()
            if task == "induction": assert words[roles["END"]] == words[roles["A1"]]
