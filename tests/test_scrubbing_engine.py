"""The engine: against plain hooks on every architecture, by hand, at its extremes, and where it must refuse."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, made
from guesses import hypotheses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuit_generalization import scrubbing_engine
from circuit_generalization.causal_scrubbing import _unexchanged
from circuit_generalization.cone import CleanRun
from circuit_generalization.errors import InputError
from circuit_generalization.hypotheses import UNIMPORTANT, HypothesisError, hypothesis_from_dict
from circuit_generalization.models import final_logits, model_hash, random_gpt2
from circuit_generalization.passes import counted_passes
from circuit_generalization.prompts import PromptSet
from circuit_generalization.resampling import Classes, Drawn, Rest
from circuit_generalization.scrubbing_engine import Scrubber, check_fits_model, find_part, logits_with_hooks, why_not_scrubbed

LAYOUTS = [(6, 1, 3), (8, 2, 4), (8, 1, -1)]  # length, S, T; the third has no T


def random_prompts(n=24, layouts=LAYOUTS, vocab=97):
    rng, chosen = np.random.default_rng(3), [layouts[i % len(layouts)] for i in range(n)]
    tokens = [rng.integers(0, vocab, length).tolist() for length, _, _ in chosen]
    labels = pd.DataFrame(dict(x=rng.integers(0, 2, n), y=rng.integers(0, 3, n)))
    return PromptSet.from_tokens(tokens, None, [1] * n, [2] * n, {"S": [s for _, s, _ in chosen], "T": [t for _, _, t in chosen]}, labels)


PROMPTS = random_prompts()
_MODELS, _RUNS = {}, {}


def model_of(family):
    "Each model and its clean run are made once: tests only read them."
    if family not in _MODELS:
        _MODELS[family] = made(family)
        _RUNS[family] = CleanRun(_MODELS[family], PROMPTS.tokens, PROMPTS.lengths)
    return _MODELS[family]


def scrubber_of(family, h, **options):
    model = model_of(family)
    return Scrubber(model, PROMPTS, h, run=_RUNS[family], **options)


def clean_of(family, n=None):
    with torch.no_grad(): return final_logits(model_of(family), PROMPTS.tokens, PROMPTS.lengths)[:n]


def h_of(claims, *output, **more):
    return hypothesis_from_dict(dict(output=list(output or claims), claims=claims, **more))


def close(a, b): return (a - b).abs().max() <= 1e-4 * max(1, float(b.abs().max()))


# Against plain hooks


REST = dict(nodes="rest")
BOTH = dict(universe="heads+mlps")
GRID = dict(
    leaf=h_of({"a": dict(nodes=["a0.h1", "a2.h3"], feature="x")}),
    several_positions=h_of({"a": dict(nodes="a1.h0", positions=["END", "S", "T"], feature=["x", "token@S"])}),
    everywhere=h_of({"a": dict(nodes="a1.h2", positions="all", feature="y")}),
    each=h_of({"a": dict(nodes="a1.h2", positions="each", feature="token"), "r": dict(nodes="rest", feature="y")}),
    queries=h_of({"a": dict(nodes="a2.h1", feature="x", reads=dict(q="b")), "b": dict(nodes="a0.h3", feature="y")}, "a"),
    keys=h_of({"a": dict(nodes="a2.h1", feature="x", reads=dict(k="b", v="own")), "b": dict(nodes="a0.h3", positions=["S", "T"])}, "a"),
    values=h_of({"a": dict(nodes="a2.h1", reads=dict(q="own", v="b")), "b": dict(nodes="a1.h3", positions="all", feature=[])}, "a"),
    nothing_read=h_of({"a": dict(nodes=["a1.h1", "a2.h1"], feature="x", reads=[])}),
    rests=h_of({"a": dict(nodes="a2.h0", feature="x", reads=dict(q=["b", "r"], k="s", v="own")), "b": dict(nodes="a1.h1", feature="x"),
                "r": dict(nodes="rest", feature="y"), "s": REST, "t": dict(nodes="rest", feature="x")}, "a", "t"),
    embed=h_of({"a": dict(nodes="a1.h0", feature="x", reads=dict(k="e", v="e")), "e": dict(nodes="embed", positions="all", feature="y")}, "a", "e"),
    deep=h_of({"a": dict(nodes="a2.h0", feature="x", reads=dict(q="b", k=["c", "r"], v="own")), "r": REST,
               "b": dict(nodes="a1.h0", feature="x", reads=dict(v="c")), "c": dict(nodes="a0.h2", positions="all", feature="y")}, "a"),
    mlps=h_of({"a": dict(nodes=["m1", "m2"], feature="x"), "b": dict(nodes="m1", positions="S", feature="y"),
               "c": dict(nodes="a2.h1", reads=dict(k="b"))}, "a", "c", **BOTH),
    an_mlp_reads=h_of({"a": dict(nodes="m2", feature="x", reads=["b", "e"]), "b": dict(nodes=["a0.h0", "a1.h3"], feature="y"),
                       "e": dict(nodes="embed")}, "a", **BOTH),
    an_mlp_hears_the_rest=h_of({"a": dict(nodes="m2", feature="x", reads=[])}, **BOTH),
    subspace=h_of({"a": dict(nodes=["a0.h1", "a2.h3"], positions=["T", "END"], feature="x", part="subspace 1"),
                   "b": dict(nodes="a2.h3", feature="y", part="subspace 2")}),
    fitted=h_of({"a": dict(nodes="a2.h3", feature="x", reads=dict(k="b"), part="fitted"),
                 "b": dict(nodes="a1.h0", positions=["S", "T"], feature="y", part="fitted")}, "a"),
    parts_of_mlps=h_of({"a": dict(nodes="m1", feature="x", part="fitted"),
                        "e": dict(nodes="embed", positions=["END"], feature="y", part="subspace 1")}, **BOTH),
)
SMALL_GRID = dict(
    leaf=h_of({"a": dict(nodes="a0.h1", feature="x")}),
    embed=h_of({"a": dict(nodes="a0.h0", feature="x", reads=dict(k="e", q="own")), "e": dict(nodes="embed", positions="all", feature="y")}, "a"),
    nothing_read=h_of({"a": dict(nodes=["a0.h0", "a0.h1"], feature="x", reads=[]), "m": dict(nodes="m0", reads="own")}, **BOTH),
    same_layer=h_of({"m": dict(nodes="m0", feature="x", reads="a"), "a": dict(nodes="a0.h1", feature="y", part="fitted")}, "m", **BOTH),
)


def grid_of(family): return SMALL_GRID if family == "one_layer" else GRID


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in FAMILIES for n in grid_of(f)])
def test_the_engine_is_the_oracle(family, name):
    h = grid_of(family)[name]
    kinds = UNIMPORTANT if family in ("gpt2", "pythia") else [UNIMPORTANT[(list(grid_of(family)).index(name) + list(FAMILIES).index(family)) % 3]]
    for unimportant in kinds:
        scrubber = scrubber_of(family, replace(h, unimportant=unimportant))
        drawn = scrubber.resampler.draw(np.arange(6), 1)
        fast = scrubber.logits(drawn)
        assert close(fast, logits_with_hooks(model_of(family), scrubber, drawn)), unimportant
        assert not close(fast, clean_of(family, 6))  # something was exchanged


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from([f for f in FAMILIES if f != "one_layer"]), st.integers(0, 9))
def test_random_hypotheses_on_random_models(data, family, seed):
    h = data.draw(hypotheses(parallel=family == "pythia"))
    scrubber = scrubber_of(family, h, fit_on=np.arange(9, 24))
    drawn = scrubber.resampler.draw(np.array([5, 0, 1]), seed)
    assert close(scrubber.logits(drawn), logits_with_hooks(model_of(family), scrubber, drawn))


# By hand, and in NumPy


def fixed(i): return Rest(np.atleast_1d(i), Classes(np.arange(100)), ("no choice",))  # classes of one: always prompt i


def test_a_key_of_another_prompt_by_hand(micro):
    # Tokens are x, y and -x. From y the head looks three times as hard at x as at y, and a third as hard at -x; of y it reads 0, of ±x ±1.
    prompts = PromptSet.from_tokens([[0, 1], [2, 1]], None, [0, 0], [2, 2])
    h = h_of({"a": dict(nodes="a0.h0", feature=[], reads=dict(q="own", v="own"))})
    scrubber = Scrubber(micro, prompts, h)

    def expected(x):  # of a last stream x * (1, -1, 0, 0) + 2 * (0, 0, 1, -1)
        return torch.tensor([2 * x, 4.0, -2 * x]) / np.sqrt((2 * x**2 + 8) / 4)

    def got(value_of, key_of, rest): return scrubber.logits(Drawn(np.array([0]), fixed(rest), {"a": Drawn(np.array([value_of]), fixed(key_of), {})}))

    assert torch.allclose(clean := scrubber.run.unembed(scrubber.run.kept.final), torch.stack([expected(1.5), expected(-0.5)])), clean
    for rest in (0, 1):
        assert torch.allclose(got(0, 0, rest)[0], expected(2 * 3 / 4), atol=1e-6)
        assert torch.allclose(got(0, 1, rest)[0], expected(2 * 1 / 4), atol=1e-6)
        assert torch.allclose(got(1, 0, rest)[0], expected(-2 * 3 / 4), atol=1e-6)


class NumpyGPT2:
    "What every head and MLP writes, from the weights alone."

    def __init__(self, hf):
        self.w = {k.removeprefix("transformer."): v.detach().double().numpy() for k, v in hf.state_dict().items()}
        self.layers, self.heads, self.eps = hf.config.n_layer, hf.config.n_head, hf.config.layer_norm_epsilon

    def norm(self, x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def head(self, layer, head, q, k, v):
        "What a head writes that hears three streams."
        weight, bias = self.w[f"h.{layer}.attn.c_attn.weight"], self.w[f"h.{layer}.attn.c_attn.bias"]
        size, width = len(weight) // self.heads, len(weight)
        mine = [slice(i * width + head * size, i * width + (head + 1) * size) for i in range(3)]
        q, k, v = (self.norm(x, f"h.{layer}.ln_1") @ weight[:, at] + bias[at] for x, at in zip((q, k, v), mine))
        scores = np.where(np.tri(len(q), dtype=bool), q @ k.T / np.sqrt(size), -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        return pattern / pattern.sum(-1, keepdims=True) @ v @ self.w[f"h.{layer}.attn.c_proj.weight"][head * size:(head + 1) * size]

    def mlp(self, layer, x):
        x = self.norm(x, f"h.{layer}.ln_2") @ self.w[f"h.{layer}.mlp.c_fc.weight"] + self.w[f"h.{layer}.mlp.c_fc.bias"]
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return x @ self.w[f"h.{layer}.mlp.c_proj.weight"] + self.w[f"h.{layer}.mlp.c_proj.bias"]

    def run(self, tokens, put=None):
        "`put`: what components write instead. Returns streams before each layer and after the last, and what was written."
        stream = self.w["wte.weight"][tokens] + self.w["wpe.weight"][: len(tokens)]
        stream, streams, wrote = (put or {}).get("embed", stream), [], {"embed": stream}
        def keep(name, x): return wrote.setdefault(name, (put or {}).get(name, x))
        for i in range(self.layers):
            streams.append(stream)
            stream = stream + sum(keep(f"a{i}.h{j}", self.head(i, j, stream, stream, stream)) for j in range(self.heads))
            stream = stream + self.w[f"h.{i}.attn.c_proj.bias"]
            stream = stream + keep(f"m{i}", self.mlp(i, stream))
        return [*streams, stream], wrote

    def logits(self, stream): return self.norm(stream[-1], "ln_f") @ self.w["wte.weight"].T


def in_numpy():
    model = NumpyGPT2(random_gpt2(seed=0, n_layers=3, n_heads=4, d_model=32, n_vocab=97))
    clean = [model.run(PROMPTS.tokens[i, : PROMPTS.lengths[i]].numpy()) for i in range(len(PROMPTS))]
    return model, clean


def held(wrote, *free):
    "Everything is written as it was, but for MLPs where they are free."
    return {k: v for k, v in wrote.items() if k[0] not in free}


def at(wrote, name, position, new):
    "One component says something else at a position."
    x = wrote[name].copy()
    x[position] = new
    return {name: x}


@pytest.mark.parametrize("universe", ["heads", "heads+mlps"])
def test_a_tree_in_numpy(universe):
    model, clean = in_numpy()
    free = "m" if universe == "heads" else ""
    h = h_of({"a": dict(nodes="a1.h0", feature="x", reads=dict(q="own", k="b", v=["c"])), "c": dict(nodes="embed", positions="S", feature="y"),
              "b": dict(nodes="a0.h1", positions="S", feature="y")}, "a", universe=universe)
    scrubber = scrubber_of("gpt2", h)
    drawn = scrubber.resampler.draw(np.arange(9), 2)
    a, different = drawn.children["a"], 0
    for i, got in enumerate(scrubber.logits(drawn)):
        own, u, v = clean[a.datum[i]], clean[a.rest.of()[i]], clean[drawn.rest.of()[i]]
        (b, c), s = (clean[a.children[name].datum[i]] for name in "bc"), int(PROMPTS.positions["S"][i])
        tokens = np.zeros(int(PROMPTS.lengths[i]), int)
        keys = model.run(tokens, held(u[1], *free) | at(u[1], "a0.h1", s, b[1]["a0.h1"][s]))[0][1]
        values = model.run(tokens, held(u[1], *free) | at(u[1], "embed", s, c[1]["embed"][s]))[0][1]
        said = model.head(1, 0, own[0][1], keys, values)[-1]
        last = model.run(tokens, held(v[1], *free) | at(v[1], "a1.h0", -1, said))[0][-1]
        assert np.allclose(got, model.logits(last), atol=1e-4)
        different += len({a.datum[i], a.rest.of()[i], drawn.rest.of()[i], a.children["b"].datum[i], a.children["c"].datum[i]}) > 3
    assert different >= 4


def test_what_is_sampled_separately_in_numpy():
    model, clean = in_numpy()
    scrubber = scrubber_of("gpt2", h_of({"a": dict(nodes="a1.h0", reads="own")}, unimportant="separately", **BOTH))
    drawn = scrubber.resampler.draw(np.arange(6))
    for i, got in enumerate(scrubber.logits(drawn)):
        wrote = {k: clean[i if k == "a1.h0" else drawn.rest.of(f"logits hears {k}")[i]][1][k] for k in clean[i][1]}
        assert np.allclose(got, model.logits(model.run(np.zeros(int(PROMPTS.lengths[i]), int), wrote)[0][-1]), atol=1e-4)
    assert len({tuple(drawn.rest.of(f"logits hears a{i}.h{j}")) for i in range(3) for j in range(4)}) == 12


# Extremes


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_exchanged_is_the_model(family):
    for h in grid_of(family).values():
        scrubber = scrubber_of(family, h)
        assert close(scrubber.logits(_unexchanged(scrubber.resampler.draw(np.arange(9)))), clean_of(family, 9))


@pytest.mark.parametrize("universe", ["heads", "heads+mlps"])
def test_all_its_own_is_the_model(universe):
    reads = dict(q=["b", "r"], k=["e", "r"], v="own")
    h = h_of({"a": dict(nodes=["a1.h0", "a2.h2"], positions="all", reads=reads), "b": dict(nodes="a0.h3", reads="own"), "e": dict(nodes="embed"),
              "r": REST}, "a", "r", universe=universe)
    for unimportant in UNIMPORTANT:
        scrubber = scrubber_of("gpt2", replace(h, unimportant=unimportant))
        assert close(scrubber.logits(scrubber.resampler.draw(np.arange(24))), clean_of("gpt2"))


@pytest.mark.parametrize("family", ["gpt2", "pythia", "grouped"])
def test_all_of_another_prompt_is_the_other_prompt(family):
    pairs = {"pair": lambda p: np.arange(len(p)) // 6}  # one other prompt of each layout
    whole = scrubber_of(family, h_of({"r": dict(nodes="rest", feature="pair")}), features=pairs)
    drawn = whole.resampler.draw(np.arange(24))
    other = drawn.children["r"].datum
    assert 0 < (other != np.arange(24)).sum() < 24 and (other // 6 == np.arange(24) // 6).all()
    assert close(whole.logits(drawn), clean_of(family)[other])
    heads = [f"a{i}.h{j}" for i in range(3) for j in range(4)]
    nodes = dict(h=heads, e=["embed"], m=["m0", "m1", "m2"])
    claims = {name: dict(nodes=n, positions="all", feature="pair") for name, n in nodes.items()}
    parts = scrubber_of(family, h_of(claims, **BOTH), features=pairs)
    each = {name: Drawn(other, fixed(other), {}) for name in claims}
    assert close(parts.logits(Drawn(np.arange(24), drawn.rest, each)), clean_of(family)[other])


@pytest.mark.parametrize("unimportant", UNIMPORTANT)
def test_chunks_and_slices_do_not_matter(unimportant):
    scrubber = scrubber_of("grouped", replace(GRID["rests"], unimportant=unimportant))
    drawn = scrubber.resampler.draw(np.arange(24))
    whole = scrubber.logits(drawn)
    for size in (1, 5, 24): assert torch.allclose(scrubber.logits(drawn, at_once=size), whole, atol=1e-5)
    assert torch.allclose(scrubber.logits(drawn[4:15][2:9]), whole[6:13], atol=1e-5)
    model = model_of("grouped")
    narrow = Scrubber(model, PROMPTS, scrubber.h, run=CleanRun(model, PROMPTS.tokens, PROMPTS.lengths, budget=1))
    assert narrow.run.rows_at_once == 1 and torch.allclose(narrow.logits(drawn), whole, atol=1e-5)


def test_padding_does_not_matter():
    h = GRID["fitted"]
    drawn = scrubber_of("llama", h).resampler.draw(np.arange(24))
    wide = replace(PROMPTS, tokens=torch.nn.functional.pad(PROMPTS.tokens, (0, 3), value=5))
    assert close(Scrubber(model_of("llama"), wide, h).logits(drawn), scrubber_of("llama", h).logits(drawn))


def test_a_prompt_without_the_role_is_not_touched_there():
    one, two = (h_of({"a": dict(nodes="a1.h2", positions=p, feature=[])}) for p in (["END"], ["END", "T"]))
    scrubbers = [scrubber_of("gpt2", h) for h in (one, two)]
    drawn = scrubbers[0].resampler.draw(np.arange(24))
    a, b = (s.logits(drawn) for s in scrubbers)
    assert torch.allclose(a, b, atol=1e-5)  # at END the logits hear nothing of another position
    marks = scrubbers[1]._marks(two.claims[0], torch.arange(3))
    assert [row.nonzero()[:, 0].tolist() for row in marks] == [[3 + 2, 7], [4, 7], [7]]


def test_nothing_is_changed():
    model, before = model_of("llama"), clean_of("llama")
    told, kept = model_hash(model), [x.clone() for x in _RUNS["llama"].kept.stream]
    scrubber = scrubber_of("llama", GRID["deep"])
    drawn = scrubber.resampler.draw(np.arange(6))
    first = scrubber.logits(drawn)
    assert torch.equal(first, scrubber.logits(drawn)) and not first.requires_grad
    assert model_hash(model) == told and torch.equal(clean_of("llama"), before)
    assert all(torch.equal(x, y) for x, y in zip(kept, _RUNS["llama"].kept.stream))


def test_what_is_counted():
    h = h_of({"a": dict(nodes=["a1.h0", "a2.h0"], feature="x", reads=[]), "b": dict(nodes="a1.h1", feature="x")})
    scrubber = scrubber_of("gpt2", h)
    with counted_passes() as counted: scrubber.logits(scrubber.resampler.draw(np.arange(6)))
    assert (counted.whole, counted.edited) == (0, 6 + 2 * 6)
    with counted_passes() as counted: Scrubber(model_of("gpt2"), PROMPTS, h).run.kept  # noqa: B018
    assert counted.whole == len(PROMPTS)


# Parts


SAID = torch.tensor([[1.0, 0], [3, 0], [0, 2], [0, 6], [9, 9]])[:, None]
VALUES = np.array([0, 0, 1, 1, 2])


def test_a_fitted_part_by_hand():
    part = find_part("fitted", SAID, VALUES, np.arange(4))
    assert part.project is None and part.fitted[:, 0].tolist() == [[2, 0], [2, 0], [0, 4], [0, 4], [1, 2]]  # a new value: the mean of all
    changed = part.difference(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([2]), torch.tensor([1]), torch.tensor([0]))
    assert changed.tolist() == [[-2, 4]]


def test_a_subspace_by_hand():
    part = find_part("subspace 1", SAID, VALUES, np.arange(4))
    line = torch.tensor([1.0, -2]) / 5**0.5  # from (0, 4) to (2, 0)
    assert part.fitted is None and torch.allclose(part.project[0], line[:, None] * line, atol=1e-6)
    changed = part.difference(torch.tensor([[3.0, 1]]), torch.tensor([[1.0, 0]]), None, None, torch.tensor([0]))
    assert torch.allclose(changed, torch.zeros(1, 2), atol=1e-6)
    changed = part.difference(torch.tensor([[2.0, 0]]), torch.tensor([[0.0, 4]]), None, None, torch.tensor([0]))
    assert torch.allclose(changed, torch.tensor([[2.0, -4]]), atol=1e-5)
    assert torch.allclose(find_part("subspace 2", SAID, VALUES, np.arange(5)).project[0], torch.eye(2), atol=1e-6)


def test_a_part_is_found_where_there_is_a_place():
    has = torch.tensor([[True], [False], [True], [True], [True]])
    fitted = find_part("fitted", SAID, VALUES, np.arange(4), has).fitted[:, 0]
    assert torch.allclose(fitted, torch.tensor([[1, 0], [1, 0], [0, 4], [0, 4], [1 / 3, 8 / 3]]))
    scrubber = scrubber_of("gpt2", h_of({"a": dict(nodes="a1.h2", positions=["END", "T"], feature="x", part="fitted")}))
    fitted, x = scrubber.parts["a", "a1.h2"].fitted, PROMPTS.labels.x.to_numpy()
    _, clean = in_numpy()
    for value in (0, 1):
        those = [(i, int(t)) for i, t in enumerate(PROMPTS.positions["T"]) if t >= 0 and x[i] == value]
        assert np.allclose(fitted[x == value, 1], np.mean([clean[i][1]["a1.h2"][t] for i, t in those], 0), atol=1e-5)
        assert np.allclose(fitted[x == value, 0], np.mean([clean[i][1]["a1.h2"][-1] for i in np.flatnonzero(x == value)], 0), atol=1e-5)


def test_parts_are_found_on_other_prompts():
    scrubber = scrubber_of("gpt2", h_of({"a": dict(nodes="a1.h2", feature=["x", "y"], part="fitted")}), fit_on=np.arange(12, 24))
    fitted, (_, clean), labels = scrubber.parts["a", "a1.h2"].fitted, in_numpy(), PROMPTS.labels
    like = np.flatnonzero((labels.x == labels.x[12]) & (labels.y == labels.y[12]))
    assert (like < 12).any()
    assert np.allclose(fitted[like, 0], np.mean([clean[i][1]["a1.h2"][-1] for i in like if i >= 12], 0), atol=1e-5)


# What is refused


def test_components_that_there_are_not():
    for node in ("a3.h0", "a0.h4", "m3"):
        with pytest.raises(HypothesisError, match=f"claim 'a': the model has no {node}: it has 3 layers of 4 heads"):
            check_fits_model(h_of({"a": dict(nodes=node)}, **BOTH), model_of("gpt2"))
        with pytest.raises(HypothesisError, match="the model has no"): scrubber_of("gpt2", h_of({"a": dict(nodes=node)}, **BOTH))


def test_parallel_blocks_do_not_hear_each_other():
    h = h_of({"m": dict(nodes="m1", reads="a"), "a": dict(nodes="a1.h0")}, "m", **BOTH)
    with pytest.raises(HypothesisError, match="claim 'm' reads 'a' of its own layer; this model's MLPs do not hear these heads"):
        check_fits_model(h, model_of("pythia"))
    for family in ("gpt2", "in_turn"): check_fits_model(h, model_of(family))
    check_fits_model(h_of({"m": dict(nodes="m1", reads="a"), "a": dict(nodes="a0.h0")}, "m", **BOTH), model_of("pythia"))


def test_a_part_of_all_positions():
    with pytest.raises(HypothesisError, match="claim 'a': a part needs role positions, not 'all'"):
        scrubber_of("gpt2", h_of({"a": dict(nodes="a1.h0", positions="all", feature="x", part="fitted")}))


def test_models_that_are_no_sum(monkeypatch):
    model, h = model_of("gpt2"), GRID["leaf"]
    assert all(why_not_scrubbed(model_of(f), PROMPTS) is None for f in FAMILIES)
    monkeypatch.setattr(scrubbing_engine, "final_logits", lambda *a: final_logits(*a) + torch.tensor([0.0, 0, 0, 1])[:, None])  # one of four
    assert why_not_scrubbed(model, PROMPTS) == "a trial gave other logits"
    with pytest.raises(InputError, match="this model cannot be scrubbed: a trial gave other logits"): Scrubber(model, PROMPTS, h)
    def broken(*a): raise RuntimeError("shapes")
    monkeypatch.setattr(scrubbing_engine, "CleanRun", broken)
    assert why_not_scrubbed(model, PROMPTS) == "its parts do not fit (RuntimeError)"
