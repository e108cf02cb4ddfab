"""Who may stand in for whom: draws by property and by count, their independence, slices, entropy by hand, and bad features."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from guesses import hypotheses
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from circuit_generalization.hypotheses import UNIMPORTANT, Claim, Hypothesis, HypothesisError, hypothesis_from_dict
from circuit_generalization.prompts import PromptSet
from circuit_generalization.resampling import (
    FEATURES,
    Classes,
    Resampler,
    class_sizes,
    entropy,
    feature_values,
    has_rest,
    joined,
    layouts,
)


def prompts_of(n=36, seed=0):
    "Two lengths; S at one place in each, T in the shorter ones only; few tokens, so that many agree."
    rng, short = np.random.default_rng(seed), np.arange(n) % 3 > 0
    tokens = [rng.integers(0, 3, 4 if s else 6).tolist() for s in short]
    labels = pd.DataFrame(dict(x=rng.integers(0, 2, n), y=rng.choice(["a", "b", "c"], n)))
    return PromptSet.from_tokens(tokens, None, [1] * n, [2] * n, {"S": np.where(short, 1, 2), "T": np.where(short, 2, -1)}, labels)


PROMPTS = prompts_of()
SAMPLES = np.arange(36).repeat(3)


def h_of(claims, *output, **more):
    return hypothesis_from_dict(dict(output=list(output or claims), claims=claims, **more))


def nodes_of(drawn, path=()):
    for name, child in drawn.children.items():
        yield (*path, name), drawn, child
        yield from nodes_of(child, (*path, name))


def same(a, b):
    return (a.datum == b.datum).all() and (a.rest.of("q of a1.h0 hears m0") == b.rest.of("q of a1.h0 hears m0")).all()


# Features


def test_features_by_hand():
    some = PromptSet.from_tokens([[5, 7], [5, 8], [6, 7, 5]], None, [1] * 3, [2] * 3, {"S": [1, -1, 2]}, pd.DataFrame(dict(x=["b", "a", "b"])))
    assert feature_values(some, "x").tolist() == [0, 1, 0]
    assert feature_values(some, "token").tolist() == [[0, 1, 2], [0, 3, 2], [4, 1, 0]]
    assert feature_values(some, "token@END").tolist() == [0, 1, 2] and feature_values(some, "token@S").tolist() == [0, 1, 2]
    assert feature_values(some, "f", {"f": lambda p: [0.1 + 0.2, 0.3, 0.3 + 1e-6]}).tolist() == [0, 0, 1]
    assert feature_values(some, "f@S", {"f": lambda p: np.ones((3, 3))}).tolist() == [0, 1, 0]
    assert feature_values(some, "x", {"x": lambda p: [1, 2, 3]}).tolist() == [0, 1, 2]  # what is registered comes first
    assert layouts(some).tolist() == [1, 0, 2] and layouts(replace(some, positions={})).tolist() == [0, 0, 1]  # length counts by itself
    assert set(FEATURES) >= {"token"}


def test_joined():
    assert joined(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 0])).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(("name", "function", "message"), [
    ("ordre", None, "no feature 'ordre': there is token, open_left, open_right, and these prompts' labels x, y, prompt_id"),
    ("x@S", None, "feature 'x@S': it has one value a prompt, so that it cannot be asked at S"),
    ("token@Q", None, "feature 'token@Q': these prompts have no role Q: there is END, S, T"),
    ("f", lambda p: [1, 2], r"feature 'f' has shape \(2,\): it should have a value for each of 36 prompts, or for each of their 6 positions too"),
    ("f@S", lambda p: np.zeros((2, 6)), r"feature 'f@S' has shape \(2, 6\)"),
    ("f", lambda p: np.zeros((36, 5)), r"feature 'f' has shape \(36, 5\)"),
    ("f", lambda p: 1, r"feature 'f' has shape \(\)"),
])
def test_bad_features(name, function, message):
    with pytest.raises(HypothesisError, match=message): feature_values(PROMPTS, name, FEATURES | ({"f": function} if function else {}))


@pytest.mark.parametrize(("claim", "message"), [
    (dict(feature="token"), "claim 'a': feature 'token' has a value at every position: name one, as in token@END, or set the positions to 'each'"),
    (dict(feature="z"), "no feature 'z'"),
    (dict(feature="x", positions=["END", "Q"]), "claim 'a' is at Q, but these prompts have no such role: there is END, S, T"),
    (dict(positions=["END", "Q"]), "claim 'a' is at Q, but these prompts have no such role"),
])
def test_claims_that_do_not_fit_the_prompts(claim, message):
    with pytest.raises(HypothesisError, match=message): Resampler(h_of({"a": dict(nodes="a0.h0") | claim}), PROMPTS)


def test_a_rest_is_at_no_position():
    assert Resampler(h_of({"r": dict(nodes="rest", positions="Q", feature="x")}), PROMPTS).classes["r"] is not None


# Draws


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30).map(np.array), st.integers(0, 9))
def test_a_draw_agrees_and_may_be_anyone(keys, seed):
    classes, n = Classes(keys), len(keys)
    drawn = classes.draw(np.arange(n), np.random.default_rng(seed))
    assert (keys[drawn] == keys).all() and drawn.shape == (n,)
    sizes = np.array([(keys == k).sum() for k in keys])
    assert (classes.sizes[classes.ids] == sizes).all() and np.isclose(classes.information, np.log2(sizes).mean())
    if sizes.max() <= 3:  # then a hundred draws leave nobody out
        often = np.stack([classes.draw(np.arange(n), np.random.default_rng([seed, i])) for i in range(100)])
        assert all(set(often[:, i]) == set(np.flatnonzero(keys == keys[i])) for i in range(n))


def test_draws_are_uniform_and_prompts_draw_alone():
    keys = np.array([0, 1, 0, 2, 1, 0, 0])
    drawn = Classes(keys).draw(np.tile([0, 2], 4000), np.random.default_rng(0)).reshape(-1, 2)
    for who in range(2): assert stats.chisquare(np.unique(drawn[:, who], return_counts=True)[1]).pvalue > 0.01
    assert set(drawn[:, 0]) == {0, 2, 5, 6}  # itself included
    assert stats.chi2_contingency(pd.crosstab(drawn[:, 0], drawn[:, 1])).pvalue > 0.01


@given(hypotheses(), st.integers(0, 3))
def test_every_node_agrees_with_its_reader(h, seed):
    resampler = Resampler(h, PROMPTS)
    drawn = resampler.draw(SAMPLES, seed)
    values, layout = {f: feature_values(PROMPTS, f) for f in ("x", "y", "token@S", "token")}, layouts(PROMPTS)
    assert (drawn.datum == SAMPLES).all() and (layout[drawn.rest.of("any")] == layout[SAMPLES]).all()
    assert [path for path, _, _ in nodes_of(drawn)] == [path for path, _ in h.walk()]
    for path, reader, node in nodes_of(drawn):
        claim = h.claim(path[-1])
        if claim.feature is None: assert node.datum is reader.datum
        elif claim.positions == ("each",):
            assert node.datum.shape == (len(SAMPLES), 6)
            for p in range(6):
                for f in claim.feature:
                    v = values[f][:, p] if f == "token" else values[f]
                    assert (v[node.datum[:, p]] == v[reader.datum]).all()
                assert (layout[node.datum[:, p]] == layout[reader.datum]).all()
        else: assert all((v[node.datum] == v[reader.datum]).all() for v in [layout, *(values[f] for f in claim.feature)])
        if node.datum.ndim == 1:
            like = SAMPLES if h.unimportant == "together" else node.datum
            assert (layout[node.rest.of("any")] == layout[like]).all()


def test_each_position_draws_for_itself():
    resampler = Resampler(h_of({"a": dict(nodes="a0.h0", positions="each", feature=[]), "b": dict(nodes="a0.h1", positions="each")}), PROMPTS)
    drawn = resampler.draw(np.zeros(4000, int))
    a, b = drawn.children["a"].datum, drawn.children["b"].datum
    assert a.shape == (4000, 6) and (b == 0).all() and set(a[:, 0]) == set(range(0, 36, 3))
    for p in range(1, 6): assert stats.chi2_contingency(pd.crosstab(a[:, 0], a[:, p])).pvalue > 0.01


# What does not matter


TWO = {"a": dict(nodes="a1.h0", feature="x", reads=dict(q="c", k=[])), "b": dict(nodes="a1.h1", feature="x", reads=[]),
       "c": dict(nodes="a0.h0", feature="y")}


def rests(unimportant, **more):
    drawn = Resampler(h_of(TWO, "a", "b", unimportant=unimportant), PROMPTS).draw(SAMPLES, **more)
    return [drawn.rest, drawn.children["a"].rest, drawn.children["b"].rest, drawn.children["a"].children["c"].rest]


def test_together_is_one_prompt_for_all():
    found = [r.of(x) for r in rests("together") for x in ("", "q of a1.h0 hears m0")]
    assert all((f == found[0]).all() for f in found) and (found[0] != SAMPLES).any()


def test_per_parent_is_one_prompt_for_each_reader():
    found = rests("per parent")
    for r in found: assert (r.of("x") == r.of("y")).all()
    for i in range(4):
        for j in range(i): assert 0 < (found[i].of() == found[j].of()).mean() < 0.5
    assert (found[0].of() == rests("together")[0].of()).all()


def test_separately_is_one_prompt_for_each_component_heard():
    found = [r.of(x) for r in rests("separately") for x in ("x", "y")]
    for i in range(8):
        for j in range(i): assert 0 < (found[i] == found[j]).mean() < 0.5
    again = rests("separately")[0]
    assert (again.of("x") == found[0]).all() and (again.of("y") == found[1]).all()


def test_rests_are_uniform():
    for kind in UNIMPORTANT:
        drawn = Resampler(h_of(TWO, "a", "b", unimportant=kind), PROMPTS).draw(np.zeros(6000, int), 1).children["a"]
        members, counts = np.unique(drawn.rest.of("x"), return_counts=True)
        assert (members == range(0, 36, 3)).all() and stats.chisquare(counts).pvalue > 0.01


def test_what_is_read_of_the_rest_is_what_does_not_matter():
    "A claim that the rest carries nothing says what no claim says."
    for path, claims in [((), {"r": dict(nodes="rest", feature=[])}),
                         (("a",), {"a": dict(nodes="a0.h0", reads=dict(q="r")), "r": dict(nodes="rest", feature=[])})]:
        drawn = Resampler(h_of(claims, [*claims][0]), PROMPTS).draw(SAMPLES)
        for name in path: drawn = drawn.children[name]
        assert (drawn.children["r"].datum == drawn.rest.of()).all()


def test_two_rests_of_one_reader_are_independent_where_they_differ():
    h = h_of({"a": dict(nodes="a1.h0", reads=dict(q="r", k="s", v="t")), "r": dict(nodes="rest", feature="x"), "s": dict(nodes="rest", feature=[]),
              "t": dict(nodes="rest", feature="x")}, "a")
    a = Resampler(h, PROMPTS).draw(np.zeros(4000, int)).children["a"].children
    assert stats.chi2_contingency(pd.crosstab(a["r"].datum, a["s"].datum)).pvalue > 0.01 and (a["r"].datum == a["t"].datum).all()


# Seeds and paths


def test_seeds():
    resampler = Resampler(h_of(TWO, "a", "b"), PROMPTS)
    one, again, other = (dict((p, d) for p, _, d in nodes_of(resampler.draw(SAMPLES, seed))) for seed in (0, 0, 1))
    assert all(same(one[p], again[p]) for p in one)
    assert all((one[p].datum != other[p].datum).any() and (one[p].rest.of() != other[p].rest.of()).any() for p in one)


def test_two_that_read_one_claim_draw_it_twice():
    h = h_of(TWO | {"b": dict(nodes="a1.h1", reads=dict(q="c")), "a": dict(nodes="a1.h0", reads=dict(q="c"))}, "a", "b")
    drawn = Resampler(h, PROMPTS).draw(SAMPLES)
    a, b = (drawn.children[x].children["c"] for x in "ab")
    assert (a.datum != b.datum).any() and (a.rest.of() != b.rest.of()).any()


@given(hypotheses(), st.data())
def test_a_change_of_one_claim_leaves_other_draws_as_they_were(h, data):
    if not h.claims: return
    changed = data.draw(st.sampled_from(h.claims))
    other = replace(h, claims=tuple(replace(c, feature=("y",)) if c is changed else c for c in h.claims))
    before, after = (Resampler(x, PROMPTS).draw(SAMPLES) for x in (h, other))
    assert same(before, after)
    for (path, _, a), (_, _, b) in zip(nodes_of(before), nodes_of(after), strict=True):
        if changed.name not in path and a.datum.ndim == 1: assert same(a, b)


def test_another_claim_beside_leaves_draws_as_they_were():
    less, more = (Resampler(h_of(claims, *out), PROMPTS).draw(SAMPLES).children["a"]
                  for claims, out in [({k: v for k, v in TWO.items() if k != "b"}, "a"), (TWO, "ba")])
    assert same(less, more) and same(less.children["c"], more.children["c"])


# Slices


@given(hypotheses(), st.integers(0, 20), st.integers(0, 20), st.integers(1, 3))
def test_slices_of_trees(h, start, length, step):
    whole = Resampler(h, PROMPTS).draw(SAMPLES)
    one, two = slice(start, start + length), slice(3, 50, step)
    for some, index in [(whole[one], np.arange(108)[one]), (whole[two][start:], np.arange(108)[two][start:])]:
        for (path, _, a), (_, _, b) in zip([((), None, some), *nodes_of(some)], [((), None, whole), *nodes_of(whole)], strict=True):
            assert (a.datum == b.datum[index]).all(), path
            if b.datum.ndim == 1:
                for x in ("", "k of a2.h1 hears embed"): assert (a.rest.of(x) == b.rest.of(x)[index]).all(), path


# Bits


TWELVE = PromptSet.from_tokens([[i % 2, i % 3, 5] for i in range(12)] + [[0, 0, 5, 5]] * 4, None, [1] * 16, [2] * 16, {"S": [1] * 16},
                               pd.DataFrame(dict(two=[i % 2 for i in range(16)], three=[i % 3 for i in range(16)])))
ANY = (12 * np.log2(12) + 4 * 2) / 16  # bits of a prompt of the same layout
HALF = (12 * np.log2(6) + 4 * 1) / 16  # that agrees on `two`


@pytest.mark.parametrize(("claims", "output", "bits", "rests"), [
    ({"r": dict(nodes="rest")}, "r", 0, 0),
    ({"r": dict(nodes="rest", feature=[])}, "r", ANY, 0),
    ({"a": dict(nodes="a0.h0", feature="two")}, "a", HALF, 1),
    ({"a": dict(nodes="a0.h0", feature="two", reads="own")}, "a", HALF, 1),
    ({"a": dict(nodes="a0.h0", feature="two", reads=[])}, "a", HALF, 2),
    ({"a": dict(nodes="a0.h0", reads=dict(q="own", k="own"))}, "a", 0, 2),
    ({"a": dict(nodes="a0.h0", feature="two"), "r": dict(nodes="rest", feature="two")}, "ar", 2 * HALF, 0),
    ({"a": dict(nodes="a1.h0", reads=dict(q=["b", "r"], k=["b", "r"], v="own")), "b": dict(nodes="a0.h0", feature="two", positions="all"),
      "r": dict(nodes="rest")}, "a", HALF, 1),
    ({"a": dict(nodes="a1.h0", reads=dict(k="b")), "c": dict(nodes="a1.h1", reads=dict(k="b")),
      "b": dict(nodes="a0.h0", feature="two", reads="own")}, "ac", 2 * HALF, 3),
    ({"a": dict(nodes="a0.h0", positions="each", feature="two")}, "a", 4 * HALF, 1),
])
def test_entropy_by_hand(claims, output, bits, rests):
    h = h_of(claims, *output)
    for unimportant in ("per parent", "separately"):
        assert np.isclose(entropy(Resampler(replace(h, unimportant=unimportant), TWELVE)), 4 + bits + rests * ANY)
    assert np.isclose(entropy(Resampler(replace(h, unimportant="together"), TWELVE)), 4 + bits + min(1, rests) * ANY)


def test_entropy_of_no_claim(): assert np.isclose(entropy(Resampler(Hypothesis((), ()), TWELVE)), 4 + ANY)


def test_who_hears_a_rest():
    r = Claim("r", ("rest",))
    def reader(reads): return Claim("a", ("a1.h0",), reads=reads)
    def of(reads): return has_rest(Hypothesis((reader(reads), r, Claim("b", ("a0.h0",))), ("a", "r", "b")), reader(reads))
    own = dict(q=("own",), k=("own",), v=("own",))
    assert not of(None) and not of(own) and of({}) and of(own | dict(q=())) and of(own | dict(q=("b",))) and not of(own | dict(q=("b", "r")))
    assert of(dict(q=("own",), k=("r",))) and not of(dict(q=("own",), k=("r",), v=("own",)))
    assert has_rest(Hypothesis((), ()), None) and not has_rest(Hypothesis((r,), ("r",)), None)


def test_class_sizes_by_hand():
    h = h_of({"a": dict(nodes="a0.h0", feature=["two", "three"]), "b": dict(nodes="a0.h1"), "c": dict(nodes="a0.h2", feature=[]),
              "e": dict(nodes="a0.h3", positions="each", feature="token")})
    table = class_sizes(Resampler(h, TWELVE)).set_index("claim")
    assert list(table.columns) == ["feature", "classes", "median_size", "smallest", "itself", "bits"] and list(table.index) == ["a", "c", "e"]
    # `a`: six classes of two among the twelve, four of one; `e`: halves, thirds, all and all of the twelve; always all four of the others
    assert table.loc["a"].tolist() == ["two, three", 10, 2, 1, (12 / 2 + 4) / 16, 12 / 16]
    assert table.loc["c"].tolist() == ["nothing", 2, 12, 4, 2 / 16, ANY]
    assert table.loc["e", ["feature", "classes", "smallest"]].tolist() == ["token", 4, 4]
    assert np.isclose(table.loc["e", "itself"], (2 + 3 + 1 + 1 + 4 * 1) / 64)
    assert np.isclose(table.loc["e", "bits"], (12 * np.log2(6 * 4 * 12 * 12) + 4 * 4 * 2) / 64)
    assert class_sizes(Resampler(h_of({"b": dict(nodes="a0.h1")}), TWELVE)).empty
