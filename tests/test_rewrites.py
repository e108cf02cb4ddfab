"""Hypotheses written finer or coarser, joined, attacked."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from families import made
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization.causal_scrubbing import scrub
from circuit_generalization.hypotheses import HypothesisError, hypothesis_from_dict
from circuit_generalization.prompts import PromptSet
from circuit_generalization.resampling import Resampler
from circuit_generalization.rewrites import adversary, combine, details, isomorphic, join, separate
from circuit_generalization.scrubbing_engine import Scrubber

FEATURES = ["order", "colour", "token@S"]


@pytest.fixture(scope="module")
def model(): return made("gpt2")


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    words = rng.integers(1, 5, (160, 5))
    labels = pd.DataFrame(dict(order=words[:, 0] % 2, colour=words[:, 2] % 2, template=[str(i % 12) for i in range(160)]))
    return PromptSet.from_tokens(words.tolist(), None, words[:, 1] + 10, words[:, 1] + 20, {"S": [2] * 160}, labels)


def claims_of(**claims): return hypothesis_from_dict(dict(name="h", output=[next(iter(claims))], claims=claims))


TREE = claims_of(late=dict(nodes=["a2.h0", "a2.h1"], feature=["order"], reads=dict(q="own", v=["early"])),
                 early=dict(nodes=["a0.h1", "a0.h3"], positions="S", feature=["token@S"]))


def logits(model, prompts, h, seed=0):
    scrubber = Scrubber(model, prompts, h)
    return scrubber.logits(scrubber.resampler.draw(np.arange(20), seed))


def test_separate_and_combine_undo_each_other_everywhere_they_are_read():
    finer = separate(TREE, "early")
    assert [c.name for c in finer.claims] == ["late", "early a0.h1", "early a0.h3"]
    assert finer.claim("late").reads["v"] == ("early a0.h1", "early a0.h3")
    assert combine(finer, ["early a0.h1", "early a0.h3"], "early") == TREE
    assert separate(TREE, "late").output == ("late a2.h0", "late a2.h1")


def test_what_is_separate_is_drawn_separately(prompts):
    drawn = Resampler(separate(TREE, "early"), prompts).draw(np.arange(60)).children["late"].children
    assert (drawn["early a0.h1"].datum != drawn["early a0.h3"].datum).any()


def test_claims_that_say_different_things_are_not_one():
    odd = claims_of(a=dict(nodes="a2.h0", feature=["order"], reads=dict(v="b")), b=dict(nodes="a0.h1", feature=["order"]))
    with pytest.raises(HypothesisError, match="'a' and 'b' differ in more than their components"): combine(odd, ["a", "b"], "c")


def test_the_isomorphic_form_gives_the_same_logits_and_leaves_nothing_out(model, prompts):
    whole = isomorphic(TREE)
    assert whole.output == ("late", "anything") and whole.claim("late").reads == {"q": ("own",), "k": ("anything",), "v": ("early", "anything")}
    assert np.allclose(logits(model, prompts, TREE), logits(model, prompts, whole), atol=1e-4)
    assert isomorphic(whole) == whole
    with pytest.raises(HypothesisError, match="samples together"): isomorphic(replace(TREE, unimportant="together"))


def test_a_claim_called_anything_is_not_overwritten():
    taken = claims_of(anything=dict(nodes="a2.h0", feature=[]))
    assert [c.name for c in isomorphic(taken).claims] == ["anything", "anything 0"]


def swaps(h, prompts, name):
    classes = Resampler(h, prompts).classes[name]
    return classes.ids[:, None] == classes.ids


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(FEATURES), unique=True), st.lists(st.sampled_from(FEATURES), unique=True))
def test_a_join_permits_a_swap_where_both_permit_it(prompts, a, b):
    one, two = (claims_of(x=dict(nodes="a1.h0", feature=f)) for f in (a, b))
    assert (swaps(join(one, two), prompts, "x") == (swaps(one, prompts, "x") & swaps(two, prompts, "x"))).all()


def test_a_join_keeps_the_claims_of_both_and_translates_names():
    other = claims_of(m=dict(nodes=["a2.h0", "a2.h1"], feature=["colour"], reads=dict(q="own", k=["early"])),
                      early=dict(nodes="a1.h2", positions="S", feature=[]))
    joint = join(TREE, replace(other, name="g"))
    assert joint.claim("late").feature == ("order", "colour") and joint.claim("late").reads == {"q": ("own",), "v": ("early",), "k": ("early (g)",)}
    assert joint.claim("early").nodes == ("a0.h1", "a0.h3") and joint.claim("early (g)").nodes == ("a1.h2",) and joint.output == ("late",)
    assert join(TREE, claims_of(x=dict(nodes=["a2.h0", "a2.h1"], reads=dict(q="own")))).claim("late").feature is None


@pytest.mark.parametrize("other, says", [
    (replace(TREE, universe="heads+mlps"), "their universes"), (replace(TREE, unimportant="together"), "their ways to sample"),
    (claims_of(x=dict(nodes=["a2.h0", "a2.h1"], feature=[])), "taken apart by one and not by the other"),
    (claims_of(x=dict(nodes=["a2.h0", "a2.h1"], feature=[], reads=dict(v="own"))), "taken apart by one and not by the other")])
def test_what_has_no_join_says_so(other, says):
    with pytest.raises(HypothesisError, match=says): join(TREE, other)


def test_every_detail_is_one_more_feature_or_one_more_input():
    found = details(TREE, FEATURES)
    assert set(found) == {("late", "carries colour"), ("late", "carries token@S"), ("late", "its own k"), ("early", "carries order"),
                          ("early", "carries colour")}
    assert found["late", "its own k"].claim("late").reads["k"] == ("own",) and found["early", "carries order"].claim("early").feature[-1] == "order"


def test_an_adversary_says_by_how_much_each_detail_moves_the_score(model, prompts):
    h = claims_of(rest=dict(nodes="rest", feature=["colour"]))
    table = adversary(model, h, prompts, ["token@S", "order"], n=80, n_confirmed=1)
    assert set(table.added) == {"carries token@S", "carries order"} and table.change.notna().all() and (table.p_adjusted >= table.p_value).all()
    first = scrub(model, h, prompts, 40, 0, "ld")
    with_word = scrub(model, details(h, ["token@S"])["rest", "carries token@S"], prompts, 40, 0, "ld")
    found = table.set_index("added").found["carries token@S"]
    assert found == pytest.approx(with_word.recovered.estimate - first.recovered.estimate, abs=1e-6)
    assert adversary(model, h, prompts, ["order"], n=80).equals(adversary(model, h, prompts, ["order"], n=80))


def test_an_adversary_needs_prompts_for_both_halves(model, prompts):
    from circuit_generalization.errors import InputError
    with pytest.raises(InputError, match="some to search on and some to confirm"): adversary(model, TREE, prompts, FEATURES, n=3)
