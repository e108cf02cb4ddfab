"""Random circuits, random weights, reset heads, permuted labels, random splits: nulls that keep their promise, and one function for all."""

import random
from collections import Counter
from functools import cache, reduce
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from circuit_generalization.circuit import Circuit, CircuitError
from circuit_generalization.circuit_scorer import NO_BASELINE, CircuitScorer
from circuit_generalization.compiled import compiled_circuit
from circuit_generalization.controls import (
    COLUMNS_OF_CONTROLS,
    CONTROLS,
    WEIGHTS,
    NullTest,
    _controls_table,
    _own_weights,
    best_per_group,
    holm,
    overlap,
    permuted_labels,
    random_circuit,
    random_circuits,
    random_splits,
    random_twin,
    reset_components,
    run_controls,
    unbridged,
    variant_pairs,
)
from circuit_generalization.errors import InputError
from circuit_generalization.generalization import generalization_table
from circuit_generalization.models import ModelError, as_bridge, model_hash, model_name, quiet, random_gpt2
from circuit_generalization.prompts import concat_prompts
from circuit_generalization.tasks import make_prompts

LAYERS, HEADS = 4, 8
places = st.none() | st.lists(st.sampled_from(["S2", "END", "S1+1"]), min_size=1, max_size=2, unique=True).map(tuple)
heads = st.builds("a{}.h{}".format, st.integers(0, LAYERS - 1), st.integers(0, HEADS - 1))
listed = st.dictionaries(heads | st.builds("m{}".format, st.integers(0, LAYERS - 1)), places, max_size=14)


def build(listed):
    return Circuit.from_components(list(listed), positions=listed, roles=["a role"] * len(listed), attends_to=["S1"] * len(listed),
                                   edges=["m0->logits"], task="ioi", model="tiny")


def shape(circuit):
    "How many heads have which positions in which layer, and all MLPs."
    return Counter((n.component.layer, n.positions) for n in circuit.nodes if n.component.head is not None), \
        {(n.name, n.positions) for n in circuit.nodes if n.component.head is None}


toy = build({"a0.h1": ("S2",), "a0.h6": ("S2",), "a1.h0": ("END",), "a3.h0": ("END",), "a3.h4": None})


@settings(max_examples=50)
@given(listed, st.integers(0, 10**6))
def test_layers_and_positions_are_kept(listed, seed):
    circuit = build(listed)
    for drawn in random_circuits(circuit, LAYERS, HEADS, 3, seed):
        assert shape(drawn) == shape(circuit) and drawn.universe == circuit.universe and len(set(drawn.components)) == len(circuit)
        assert all(0 <= (n.component.head or 0) < HEADS for n in drawn.nodes)
        assert drawn.roles == () and drawn.edges is None and not any(n.attends_to for n in drawn.nodes), "no claims"
        assert (drawn.task, drawn.model) == ("ioi", "tiny") and drawn.name == "circuit-random" and drawn.provenance != circuit.provenance
    assert circuit == build(listed)


@settings(max_examples=30)
@given(listed, st.integers(0, 10**6))
def test_a_seed_decides_and_more_circuits_keep_the_first(listed, seed):
    circuit = build(listed)
    five = random_circuits(circuit, LAYERS, HEADS, 5, seed)
    assert five == random_circuits(circuit, LAYERS, HEADS, 5, seed) and five[:2] == random_circuits(circuit, LAYERS, HEADS, 2, seed)
    assert random_circuits(circuit, LAYERS, HEADS, 0, seed) == []


def test_seeds_and_draws_differ():
    drawn = random_circuits(toy, LAYERS, HEADS, 99, 0)
    assert len({c.hash for c in drawn}) > 95 and len({c.hash for c in drawn} & {c.hash for c in random_circuits(toy, LAYERS, HEADS, 99, 1)}) < 10
    state = np.random.get_state()[1].copy()
    random_circuits(toy, LAYERS, HEADS, 3)
    assert (np.random.get_state()[1] == state).all()


def test_every_head_is_as_likely():
    drawn = random_circuits(toy, LAYERS, HEADS, 1600, 0)
    counts = Counter(n for c in drawn for n in c.components)
    for layer, k in ((0, 2), (1, 1), (3, 2)):
        expected, mine = 1600 * k / HEADS, [counts[f"a{layer}.h{h}"] for h in range(HEADS)]
        assert all(abs(m - expected) < 5 * expected**0.5 for m in mine), "with the circuit's own heads among them"
    at_end = Counter(n.name for c in drawn for n in c.nodes if n.component.layer == 3 and n.positions == ("END",))
    assert all(abs(at_end[f"a3.h{h}"] - 200) < 5 * 200**0.5 for h in range(HEADS)), "positions are dealt out at random too"


def test_a_full_layer_has_nothing_to_draw():
    whole = build({f"a1.h{h}": None for h in range(HEADS)} | {"m2": ("END",)})
    (drawn,) = random_circuits(whole, LAYERS, HEADS, 1)
    assert drawn.components == whole.components and overlap(whole, drawn) == 1 and shape(drawn) == shape(whole)


def test_overlap():
    other = build({"a0.h1": ("END",), "a1.h3": ("END",), "a3.h0": None, "a0.h2": None, "a0.h3": None})
    assert overlap(toy, other) == 2 / 5 and overlap(toy, toy) == 1 and overlap(toy, build({"a1.h1": None})) == 0
    assert overlap(build({"a0.h1": None}), toy) == 1 and overlap(toy, build({"a0.h1": None})) == 1 / 5 and overlap(build({}), toy) == 0
    assert abs(np.mean([overlap(toy, c) for c in random_circuits(toy, LAYERS, HEADS, 800)]) - (2 * 2 / 8 + 1 / 8 + 2 * 2 / 8) / 5) < 0.03


def test_refusals():
    with pytest.raises(CircuitError, match="a3.h0, a3.h4, but the model has 3 layers"): random_circuits(toy, 3, HEADS, 1)
    with pytest.raises(CircuitError, match="a0.h6"): random_circuit(toy, LAYERS, 6, np.random.default_rng(0))
    with pytest.raises(InputError, match="-1 random circuits"): random_circuits(toy, LAYERS, HEADS, -1)


# random weights

SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32)


def neox(): return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
def llama(shared=False): return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1 if shared else 2, attention_bias=True))
def gemma2(): return Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=1, head_dim=8, **SIZES))
def opt(): return OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **SIZES))
def shared_llama(): return llama(shared=True)


MAKERS = dict(gpt2=random_gpt2, llama=llama, grouped=shared_llama, neox=neox, gemma2=gemma2, opt=opt)


@pytest.fixture(scope="module")
def family():
    "`family(name)`: a tiny bridge whose every parameter, biases among them, is random."
    @cache
    def made(name):
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = MAKERS[name]()
            with torch.no_grad():
                for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
        return as_bridge(model.eval())

    return made


every_family = pytest.mark.parametrize("name", MAKERS)


def weights(model): return {name: p.detach() for name, p in unbridged(model).named_parameters()}


def parameters(model): return {name: p.detach().clone() for name, p in model.named_parameters()}


@every_family
def test_weights_are_taken_out_of_a_bridge(name, family):
    bridge, before = family(name), model_hash(family(name))
    out = unbridged(bridge)
    assert type(out) is type(bridge.original_model) and not out.training and model_hash(as_bridge(out)) == before == model_hash(bridge)
    assert out.config is not bridge.original_model.config
    with torch.no_grad():
        for p in out.parameters(): p.zero_()
    assert model_hash(bridge) == before, "nothing is shared"


def test_a_folded_bridge_is_refused():
    folded = as_bridge(random_gpt2(seed=2))
    folded.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ModelError, match="folded or edited .* load the model anew"): random_twin(folded, kind="shuffle")
    with pytest.raises(ModelError, match="folded"): reset_components(folded, "a0.h0")


@every_family
def test_init_is_the_familys_own_draw(name, family):
    bridge = family(name)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = type(bridge.original_model)(bridge.original_model.config)
    twin = weights(random_twin(bridge, 7))
    for key, p in expected.named_parameters(): assert torch.equal(twin[key], p), key
    assert twin.keys() == weights(bridge).keys()


@every_family
def test_shuffle_keeps_the_entries_of_each_tensor(name, family):
    before, after = weights(family(name)), weights(random_twin(family(name), 3, "shuffle"))
    for key, p in before.items():
        assert p.flatten().sort().values.equal(after[key].flatten().sort().values) and p.shape == after[key].shape
        assert not p.equal(after[key]), key
    other = weights(random_twin(family(name), 4, "shuffle"))
    assert not any(other[key].equal(after[key]) for key in before)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_twin_is_a_model_of_its_own(kind, compiled):
    before, states = model_hash(compiled), (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    twin, again, other = (random_twin(compiled, seed, kind) for seed in (5, 5, 6))
    assert model_hash(twin) == model_hash(again) and len({model_hash(m) for m in (twin, other, compiled)}) == 3 and model_hash(compiled) == before
    assert torch.get_rng_state().equal(states[0]) and (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    assert twin.tokenizer is compiled.tokenizer and model_name(twin) == f"compiled-ioi-{kind}-5" and not twin.training
    assert not twin.cfg.default_prepend_bos and twin.cfg.tokenizer_prepends_bos == compiled.cfg.tokenizer_prepends_bos
    assert not any(p.requires_grad for p in twin.parameters()) and as_bridge(twin) is twin
    assert twin.run_with_cache(torch.tensor([[1, 2, 3]]))[1]["blocks.1.attn.hook_z"].shape == (1, 3, 8, 16)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_whatever_a_model_comes_from(kind, tmp_path):
    original = random_gpt2(seed=4)
    with quiet(): original.save_pretrained(tmp_path / "saved")
    twins = [random_twin(m, 1, kind) for m in (original, as_bridge(original), tmp_path / "saved", str(tmp_path / "saved"))]
    assert len({model_hash(t) for t in twins}) == 1
    assert model_name(twins[2]) == f"saved-{kind}-1" and twins[0].tokenizer is None


def test_a_twin_keeps_the_precision():
    half = as_bridge(random_gpt2().to(torch.bfloat16))
    for twin in (random_twin(half), random_twin(half, 0, "shuffle"), reset_components(half, "a0.h0")):
        assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


def test_unknown_kinds_of_weights(micro):
    with pytest.raises(InputError, match="no kind of random weights 'noise': there is init, shuffle"): random_twin(micro, 0, "noise")
    with pytest.raises(InputError, match="'noise'"): reset_components(micro, "a0.h0", 0, "noise")


# resets

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 50


def outputs(model, hook, hooks=()):
    "An activation, and the logits."
    seen = []
    logits = model.run_with_hooks(TOKENS, fwd_hooks=[*hooks, (hook, lambda x, hook: seen.append(x.clone()))])
    return seen[0], logits


def put(head, value):
    def edit(z, hook):
        z = z.clone()
        z[:, :, head] = value
        return z
    return [("blocks.1.attn.hook_z", edit)]


@every_family
@pytest.mark.parametrize("head", [0, 1])
def test_one_head_and_nothing_else(name, head, family):
    model = family(name)
    reset = reset_components(model, f"a1.h{head}", 3, "shuffle")
    (z, logits), (new, new_logits) = (outputs(m, "blocks.1.attn.hook_z") for m in (model, reset))
    assert z[:, :, 1 - head].equal(new[:, :, 1 - head]) and not z[:, :, head].allclose(new[:, :, head]) and not logits.allclose(new_logits)
    assert outputs(model, "blocks.1.hook_resid_pre")[0].equal(outputs(reset, "blocks.1.hook_resid_pre")[0])
    silent = [outputs(m, "hook_embed", put(head, 0.0))[1] for m in (model, reset)]
    assert silent[0].allclose(silent[1], atol=1e-5), "with this head silent the two models are the same"
    loud = [outputs(m, "hook_embed", put(head, 1.0))[1] for m in (model, reset)]
    assert not loud[0].allclose(loud[1], atol=1e-3), "it writes by other weights"


def changes(model, reset):
    "Where each changed tensor changed, and whether it then equals the twin's."
    before, after = weights(model), weights(reset)
    return {name: before[name] != after[name] for name in before if not before[name].equal(after[name])}


def rows(*ranges, of): return torch.isin(torch.arange(of), torch.tensor([i for r in ranges for i in r]))


def test_which_weights_are_a_heads_own_in_gpt2(family):
    where = changes(family("gpt2"), reset_components(family("gpt2"), "a1.h1", 3))
    mine = rows(range(8, 16), range(24, 32), range(40, 48), of=48)
    at = "transformer.h.1.attn."
    assert where.keys() == {f"{at}c_attn.weight", f"{at}c_attn.bias", f"{at}c_proj.weight"}
    assert where[f"{at}c_attn.weight"].any(0).equal(mine) and where[f"{at}c_attn.bias"].equal(mine)
    assert where[f"{at}c_proj.weight"].any(1).equal(rows(range(8, 16), of=16))


@pytest.mark.parametrize("name, projections", [("llama", "qkv"), ("grouped", "q"), ("gemma2", "q"), ("opt", "qkv")])
def test_which_weights_are_a_heads_own_where_projections_are_apart(name, projections, family):
    where = changes(family(name), reset_components(family(name), "a1.h0", 3))
    at, out = ("model.decoder.layers.1.self_attn.", "out_proj") if name == "opt" else ("model.layers.1.self_attn.", "o_proj")
    mine = rows(range(8), of=16)
    biases = {f"{at}{p}_proj.bias" for p in projections if name != "gemma2"}
    assert where.keys() == {f"{at}{p}_proj.weight" for p in projections} | biases | {f"{at}{out}.weight"}
    for key, changed in where.items():
        assert (changed.any(0) if out in key else changed.any(1) if changed.ndim == 2 else changed).equal(mine), key


def test_which_weights_are_a_heads_own_in_neox(family):
    where = changes(family("neox"), reset_components(family("neox"), "a0.h1", 3))
    at, mine = "gpt_neox.layers.0.attention.", rows(range(24, 48), of=48)
    assert where.keys() == {f"{at}query_key_value.weight", f"{at}query_key_value.bias", f"{at}dense.weight"}
    assert where[f"{at}query_key_value.weight"].any(1).equal(mine) and where[f"{at}query_key_value.bias"].equal(mine)
    assert where[f"{at}dense.weight"].any(0).equal(rows(range(8, 16), of=16))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_the_new_weights_are_the_twins(name, kind, family):
    model, components = family(name), ["a1.h0", "a0.h1", "m1"]
    before = model_hash(model)
    reset, twin = reset_components(model, components, 9, kind), weights(random_twin(model, 9, kind))
    after, old = weights(reset), weights(model)
    for key, where in changes(model, reset).items(): assert after[key][where].equal(twin[key][where]), key
    mlps = {key for key in old if "mlp" in key}
    assert {key for key in mlps if not old[key].equal(after[key])} == {key for key in mlps if ".1." in key and not old[key].equal(twin[key])} != set()
    assert all(after[key].equal(twin[key]) for key in mlps if ".1." in key) and model_hash(model) == before
    singly = reduce(lambda m, c: reset_components(m, c, 9, kind), components, model) if kind == "init" else reset
    assert model_hash(singly) == model_hash(reset) == model_hash(reset_components(model, components[::-1], 9, kind))
    assert model_hash(reset_components(model, components, 10, kind)) != model_hash(reset)


def test_layer_1_is_not_layer_11():
    deep = as_bridge(random_gpt2(n_layers=12, d_model=4))
    assert {name.split(".")[2] for component in ("a1.h0", "m1") for name in changes(deep, reset_components(deep, component))} == {"1"}


def test_names_of_reset_models(compiled, micro):
    assert model_name(reset_components(compiled, ["a3.h3", "a0.h1"], 2)) == "compiled-ioi-reset-a0.h1+a3.h3-init-2"
    assert model_name(reset_components(compiled, [f"a0.h{h}" for h in range(8)])) == "compiled-ioi-reset-8-components-init-0"


def test_what_cannot_be_reset(family, micro):
    with pytest.raises(CircuitError, match="a2.h0, but the model has 2 layers of 2 heads"): reset_components(family("gpt2"), "a2.h0")
    with pytest.raises(CircuitError, match="'head 3' is not a component"): reset_components(micro, "head 3")
    with pytest.raises(CircuitError, match="more than once"): reset_components(micro, ["a0.h0", "a0.h0"])
    with pytest.raises(InputError, match="no components to reset"): reset_components(micro, [])
    with pytest.raises(ModelError, match="OPTForCausalLM: layer 1 has no module called mlp"): reset_components(family("opt"), "m1")
    with pytest.raises(ModelError, match="Linear: it is not known which of its weights"): _own_weights(torch.nn.Linear(2, 2), 0, 1, 2)
    multi_query = torch.nn.Module()
    multi_query.c_attn, multi_query.c_proj = torch.nn.Linear(16, 32), torch.nn.Linear(16, 16)
    with pytest.raises(ModelError, match="not known"): _own_weights(multi_query, 0, 2, 8)


# ranks

def slow_p(observed, null):
    def low(x): return -np.inf if np.isnan(x) else x
    return (1 + sum(low(v) >= low(observed) for v in null)) / (len(null) + 1)


@given(st.lists(st.sampled_from([np.nan, -1.0, 0.0, 0.3, 2.0]), min_size=2, max_size=12))
def test_a_rank_keeps_its_promise_whatever_the_values(values):
    "Each of n + 1 values in turn is the observed one: at most k of them have p <= k / (n + 1). Undefined ones included."
    p = [NullTest(v, np.array(values[:i] + values[i + 1:])).p_value for i, v in enumerate(values)]
    assert np.allclose(p, [slow_p(v, values[:i] + values[i + 1:]) for i, v in enumerate(values)])
    assert all(sum(x <= k / len(values) + 1e-12 for x in p) <= k for k in range(1, len(values) + 1))


def test_ranks_by_hand():
    null = np.array([0.1, 0.5, np.nan, 0.9])
    assert [NullTest(v, null).p_value for v in (1, 0.9, 0.1, -9, np.nan)] == [0.2, 0.4, 0.8, 0.8, 1.0]
    assert NullTest(-0.9, null, two_sided=True).p_value == 0.4 and NullTest(0.5, -null, two_sided=True).p_value == 0.6
    assert NullTest(0.9, np.array([0.9, 0.1, 0.2, 0.3]), exact=True).p_value == 0.25
    assert NullTest(0.1 + 0.2, np.array([0.3])).p_value == 1 and NullTest(0.3001, np.array([0.3])).p_value == 0.5
    assert NullTest(1e-20, np.array([-1e-20, 1e-21])).p_value == 1 / 3, "small numbers are no rounding"
    assert NullTest(0.0, np.array([-1e-17, 1.0])).p_value == 1, "but next to a large one they are"
    assert NullTest(np.nan, np.full(4, np.nan)).p_value == 1 and NullTest(0.0, np.full(4, np.nan)).p_value == 0.2
    test = NullTest(0.9, np.append(null, -2))
    assert test.n_undefined == 1 and test.quantile_95 == pytest.approx(0.84) and np.isnan(NullTest(1, np.full(2, np.nan)).quantile_95)
    assert NullTest(0.9, np.array([-1.0, 0.0]), two_sided=True).quantile_95 == 0.95


@given(st.lists(st.floats(0, 1) | st.just(np.nan), max_size=6))
def test_holm_is_the_closure_of_bonferroni(p):
    "A hypothesis falls when every set of hypotheses that holds it does, by Bonferroni (Marcus, Peritz & Gabriel 1976)."
    sets = [s for k in range(1, len(p) + 1) for s in combinations([i for i, x in enumerate(p) if not np.isnan(x)], k)]
    expected = [max((min(1, len(s) * min(p[j] for j in s)) for s in sets if i in s), default=np.nan) for i in range(len(p))]
    given = np.array(p, dtype=float)
    assert np.allclose(holm(given), expected, equal_nan=True) and np.array_equal(given, p, equal_nan=True)


def test_holm_by_hand():
    assert np.allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06]) and holm([0.9, 0.8]).tolist() == [1, 1] and holm([0.2]).tolist() == [0.2]


# permuted labels

def test_labels_by_hand():
    test = permuted_labels([0, 0, 0, 1], [1, 1, 1, 1], ["a", "a", "b", "c"], n=7)
    assert test.exact and test.two_sided and test.observed == -0.75 and test.p_value == 0.5
    assert sorted(test.null) == [-0.75, -0.75, -0.25, -0.25, 0.25, 0.25, 0.75, 0.75], "a's two pairs go together"
    assert permuted_labels([1, 1, 1], [0, 0, 0], "abc", two_sided=False).p_value == 1 / 8
    assert permuted_labels([0, 0, 0], [1, 1, 1], "abc", two_sided=False).p_value == 1
    assert permuted_labels([1, 1, 1], [0, 0, 0], "abc").p_value == 1 / 4 and permuted_labels([1, 1], [0, 0], "aa").p_value == 1
    assert permuted_labels([0.5, 0.5], [0.5, 0.5], "ab").p_value == 1


def test_all_arrangements_where_those_are_no_more_than_the_draws():
    a, b = np.arange(4.0), np.zeros(4)
    assert permuted_labels(a, b, range(4), n=15).exact and len(permuted_labels(a, b, range(4), n=99).null) == 16
    drawn = permuted_labels(a, b, range(4), n=14)
    assert not drawn.exact and len(drawn.null) == 14 and drawn.p_value * 15 == pytest.approx(round(drawn.p_value * 15))


values = st.floats(-5, 5).map(lambda x: round(x, 2))
some_pairs = st.lists(st.tuples(values, values, st.sampled_from("abcd")), min_size=1, max_size=10)


@settings(max_examples=60)
@given(some_pairs, st.randoms(use_true_random=False))
def test_labels_against_a_slow_count(pairs, shuffle):
    a, b, clusters = zip(*pairs)
    names, d = sorted(set(clusters)), np.subtract(a, b)
    signs = [dict(zip(names, s)) for s in product((1, -1), repeat=len(names))]
    null = np.array([np.mean([x * sign[c] for x, c in zip(d, clusters)]) for sign in signs])
    expected = (np.abs(null) >= abs(d.mean()) - 1e-9).mean()
    test = permuted_labels(a, b, clusters, n=15)
    assert test.exact and test.p_value == pytest.approx(expected) and test.observed == pytest.approx(d.mean())
    order = list(range(len(d)))
    shuffle.shuffle(order)
    moved = permuted_labels(*(np.array(x)[order] for x in (a, b, clusters)), n=15)
    assert moved.p_value == pytest.approx(expected) == permuted_labels(b, a, clusters, n=15).p_value
    assert permuted_labels(3 * np.array(a), 3 * np.array(b), clusters, n=15).p_value == pytest.approx(expected)


def test_drawn_arrangements_approach_all_of_them():
    rng = np.random.default_rng(0)
    a, b, clusters = rng.normal(0.3, 1, 60), rng.normal(0, 1, 60), np.arange(60) % 11
    every, drawn = (permuted_labels(a, b, clusters, n=n) for n in (2047, 2046))
    assert every.exact and not drawn.exact and abs(every.p_value - drawn.p_value) < 4 * (0.25 / 2046) ** 0.5
    assert np.array_equal(drawn.null, permuted_labels(a, b, clusters, n=2046).null)
    assert not np.array_equal(drawn.null, permuted_labels(a, b, clusters, n=2046, seed=1).null)


def test_another_statistic():
    def ratio(x, y): return x.sum() / y.sum()
    def medians(x, y): return np.median(x) - np.median(y)
    a, b = np.array([4.0, 4, 4]), np.array([1.0, 1, 1])
    assert permuted_labels(a, b, "abc", ratio, two_sided=False).p_value == 1 / 8 and permuted_labels(a, b, "abc", medians).p_value == 1
    with pytest.raises(InputError, match="does not change its sign .* pass two_sided=False"): permuted_labels(a, b, "abc", ratio)


@pytest.mark.parametrize("given, message", [
    (([1, 0], [1], "ab"), "one length"), (([1, np.nan], [1, 0], "ab"), "not finite"), (([1, 0], [1, 0], "a"), "cluster labels"),
    (([1, 0], [1, 0], ["a", None]), "cluster label is missing"), (([], [], []), "not empty"),
    (([1, 0], [1, 0], "ab", lambda x, y: "high"), "the statistic returned a str"),
    (([1, 0], [1, 0], "ab", lambda x, y: np.inf), "the statistic returned inf")])
def test_what_is_no_pair(given, message):
    with pytest.raises(InputError, match=message): permuted_labels(*given)


@pytest.fixture(scope="module")
def scores(compiled):
    asked = ("base", "base"), ("syntactic", "double_io"), ("syntactic", "abba")
    asked = [make_prompts("ioi", *which, n=36, tokenizer=compiled.tokenizer) for which in asked]
    scorer = CircuitScorer(compiled, compiled_circuit())
    return scorer.score(concat_prompts(asked), "counterfactual", n_random=0, baseline=NO_BASELINE, profile=False)


def test_the_pairs_are_those_of_the_generalisation_table(scores):
    table = generalization_table(scores).set_index("variant")
    for name in ("double_io", "abba"):
        variant, base, templates = variant_pairs(scores, name)
        row = table.loc[name]
        assert 0 < len(variant) == row.n_pairs < 36 and (variant - base).mean() == pytest.approx(row.difference)
        assert len(templates) == len(base) and set(templates) <= set(scores.template[scores.variant == name])
    assert not set(variant_pairs(scores, "double_io")[2]) & set(scores.template[scores.variant == "base"])
    bare = scores.drop(columns="axis")
    assert all(np.array_equal(x, y) for x, y in zip(variant_pairs(scores, "abba"), variant_pairs(bare, "abba"))), "pairs are told by base_id alone"
    assert len(variant_pairs(scores, "abba")[0]) < len(scores) / 3, "prompts that the variant left as they were are no pairs"
    assert not np.isin(variant_pairs(scores, "double_io", "ld_circuit")[0], (0, 1)).any()
    variant, base, _ = variant_pairs(scores, "double_io")
    assert permuted_labels(*variant_pairs(scores, "double_io")).p_value < 0.05 and base.mean() > variant.mean()


def test_what_holds_no_pairs(scores):
    with pytest.raises(InputError, match="no column active: pass"): variant_pairs(scores.drop(columns="active"), "abba")
    with pytest.raises(InputError, match="variant 'passive' has no matched pair .* there is base, double_io, abba"): variant_pairs(scores, "passive")
    with pytest.raises(InputError, match="no matched pair"): variant_pairs(scores.assign(ld_model=-1.0), "abba")
    with pytest.raises(InputError, match="more than once"): variant_pairs(pd.concat([scores, scores]), "abba")


# random splits

def test_best_per_group_by_hand():
    values = [[1, 0, 0, 0.5], [0, 1, 0, 0.5], [0, 0, 0.4, 0.9]]
    assert best_per_group(values, "aaaa") == pytest.approx(1.5 / 4) and best_per_group(values, "aabb") == pytest.approx((1 + 1.3) / 4)
    assert best_per_group(values, "abcd") == pytest.approx((1 + 1 + 0.4 + 0.9) / 4)
    assert best_per_group(values, [0, 1, 0, 1]) == pytest.approx((1 + 1.5) / 4)


@settings(max_examples=30)
@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=12).filter(lambda g: len(set(g)) > 1), st.integers(0, 99))
def test_splits_are_of_the_same_sizes(groups, seed):
    seen = []
    def score(labels):
        seen.append(list(labels))
        return float(sum(x == y for x, y in zip(labels, groups)))
    test = random_splits(score, groups, n=20, seed=seed)
    assert seen[-1] == groups and any(s != groups for s in seen) and all(sorted(s) == sorted(groups) for s in seen)
    assert test.observed == len(groups) and not test.exact
    assert test.p_value == (1 + sum(s == groups for s in seen[:-1])) / 21
    assert np.array_equal(test.null, random_splits(score, groups, n=20, seed=seed).null)


def test_random_groups_lift_the_best_of_several():
    rng = np.random.default_rng(0)
    noise, groups = rng.integers(0, 2, (30, 48)), np.arange(48) % 4
    test = random_splits(lambda g: best_per_group(noise, g), groups)
    assert noise.mean(1).max() + 0.05 < test.observed and 0.05 < test.p_value
    noise[groups, np.arange(48)] = 1
    assert random_splits(lambda g: best_per_group(noise, g), groups).p_value == 0.001


def test_what_is_no_partition():
    with pytest.raises(InputError, match="at least two groups"): random_splits(len, "aaa")
    with pytest.raises(InputError, match="prompt 1 has no group"): random_splits(len, ["a", None, "b"])
    with pytest.raises(InputError, match="the score of a partition returned a list"): random_splits(lambda g: [1], "ab")
    for wrong in (dict(n=0), dict(seed=-1)):
        with pytest.raises(InputError, match="n is 0|seed -1"): random_splits(len, "ab", **wrong)
        with pytest.raises(InputError, match="n is 0|seed -1"): permuted_labels([1, 0], [0, 1], "ab", **wrong)


# all of them

CLAIM = Circuit.from_components(["a0.h1", "a1.h0"])
OF_A_MODEL = ["random weights", "shuffled weights", "reset circuit", "reset single component", "random circuits"]


def named(values):
    "A measure that knows models by name: the first entry whose key is part of it."
    def measure(model, circuit, prompts):
        assert prompts == "some prompts"
        name = model_name(model)
        return values["claim" if circuit == CLAIM else "other circuit"] if "-" not in name else next(v for k, v in values.items() if k in name)
    return measure


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_every_control_of_a_measure(name, family):
    model = family(name)
    before, state = model_hash(model), torch.get_rng_state()
    values = {"claim": 1.0, "other circuit": 0.5, "init": 2.0, "shuffle": np.nan, "reset-a0.h1+a1.h0": 0.25, "reset-a0.h1": 0.0, "reset-a1.h0": 1.0}
    values = dict(sorted(values.items(), key=lambda kv: "reset" not in kv[0]))  # a reset model's name ends with 'init' too
    table = run_controls(named(values), model, CLAIM, "some prompts", n=3).set_index("control")
    same = sum(c == CLAIM for c in random_circuits(CLAIM, 2, 2, 3))
    assert list(table) == COLUMNS_OF_CONTROLS[1:] and list(table.index) == OF_A_MODEL and (table.observed == 1).all() and (table.n == 3).all()
    assert table.p_value.tolist() == [1, 0.25, 0.25, 1, (1 + same) / 4] and table.n_undefined.tolist() == [0, 3, 0, 0, 0]
    assert np.allclose(table.null_mean, [2, np.nan, 0.25, 1, (0.5 * (3 - same) + same) / 3], equal_nan=True) and table.null_95["random weights"] == 2
    assert np.allclose(table.p_adjusted, holm(table.p_value)) and (table.correction == "Holm").all()
    assert table.establishes["reset single component"] == "not shown: it needs what each component computes; least missed: a1.h0"
    assert table.establishes["shuffled weights"] == ("too few draws to show with 5 controls: the same weights in another order do not reach it "
                                                     "(undefined on 3 of 3)")
    assert table.establishes["random weights"].startswith("not shown: an untrained") and model_hash(model) == before
    assert torch.get_rng_state().equal(state)


def test_what_is_established(family):
    values = {"claim": 1.0, "init": 0.0}
    table = run_controls(named(values), family("gpt2"), CLAIM, "some prompts", kinds="random weights", n=19)
    assert table.p_adjusted.tolist() == [0.05] and table.establishes[0] == "an untrained model of this architecture does not reach it"
    calls, measure = [], named(values)
    def counted(*given): return calls.append(1) or measure(*given)
    short = run_controls(counted, family("gpt2"), CLAIM, "some prompts", kinds=["random weights"] * 2, n=18)
    assert len(calls) == 19, "one for the claim, one a draw"
    assert short.establishes.tolist() == ["too few draws to show with 1 control: an untrained model of this architecture does not reach it"]


@pytest.mark.parametrize("k", range(1, 8))
def test_the_draws_that_k_controls_need(k):
    "With n = 20 k - 1 draws of each, no null value reaching the observed, all are shown; with one less, none."
    for n, shown in ((20 * k - 1, k), (20 * k - 2, 0)):
        table = _controls_table({kind: NullTest(1.0, np.zeros(n)) for kind in list(CONTROLS)[:k]}, {})
        assert sum(said == CONTROLS[kind] for kind, said in zip(table.control, table.establishes)) == shown


def test_means_are_of_what_is_defined():
    row = _controls_table({"random weights": NullTest(1.0, np.array([np.nan, 0.0, 0.5]))}, {}).loc[0]
    assert (row.null_mean, row.null_95, row.n, row.n_undefined, row.p_value) == (0.25, 0.475, 3, 1, 0.25)
    assert row.establishes.endswith("does not reach it (undefined on 1 of 3)")


def test_single_components_by_their_least_missed(family):
    draws = iter([0.0, 5.0, 0.0, 0.0, 5.0, 5.0])  # a0.h0 is missed twice of three, a0.h1 always, a1.h1 once
    def measure(model, circuit, prompts): return 1.0 if model is family("gpt2") else next(draws)
    claim = Circuit.from_components(["a0.h0", "a0.h1"])
    table = run_controls(measure, family("gpt2"), claim, None, kinds=["reset single component"], n=3)
    assert table.p_value.tolist() == [0.75] and table.establishes[0].endswith("least missed: a0.h1") and table.null_mean[0] == pytest.approx(10 / 3)


def test_an_undefined_claim_beats_nothing(family):
    table = run_controls(lambda *given: np.nan, family("gpt2"), CLAIM, None, kinds=["random circuits", "random weights"], n=3)
    assert (table.p_value == 1).all() and (table.n_undefined == 3).all() and table.observed.isna().all() and table.null_95.isna().all()
    assert table.control.tolist() == ["random circuits", "random weights"], "in the order asked for"


def test_nulls_are_the_twins_and_resets_of_the_seed(family):
    seen = {}
    def measure(model, circuit, prompts):
        seen.setdefault(model_hash(model), []).append(circuit.components)
        return 0.0
    model = family("llama")
    run_controls(measure, model, CLAIM, None, n=2, seed=4)
    seeds = np.random.SeedSequence(4).generate_state(2).tolist()
    made = [random_twin(model, s, kind) for s in seeds for kind in WEIGHTS]
    made += [reset_components(model, names, s) for s in seeds for names in (CLAIM.components, "a0.h1", "a1.h0")]
    assert seen.keys() == {model_hash(m) for m in (model, *made)} and len(seen) == 11
    assert seen[model_hash(model)] == [CLAIM.components, *(c.components for c in random_circuits(CLAIM, 2, 2, 2, seed=4))]
    first = dict(seen)
    run_controls(measure, model, CLAIM, None, kinds="random weights", n=1, seed=5)
    assert len(seen.keys() - first.keys()) == 1


def test_labels_and_splits_take_part_where_they_are_given(family):
    def never(*given): raise AssertionError("not asked for")
    pairs, split = ([1] * 7 + [0], [0] * 8, "abcdefgh"), (lambda g: float((g == np.array(list("aabb"))).all()), "aabb")
    for n, n_labels, seed in ((99, 99, 0), (99, 99, 3), (256, 256, 3)):
        table = run_controls(never, family("gpt2"), CLAIM, None, kinds=["random splits", "permuted labels"], n=n, seed=seed, pairs=pairs, split=split)
        labels, splits = permuted_labels(*pairs, n=n, seed=seed), random_splits(*split, n=n, seed=seed)
        assert table.observed.tolist() == [1, 7 / 8] and table.p_value.tolist() == [splits.p_value, labels.p_value]
        assert table.null_95.tolist() == [splits.quantile_95, labels.quantile_95] and table.n.tolist() == [n, n_labels]
    assert labels.exact and labels.p_value == 4 / 256
    every = run_controls(lambda *given: 0.0, family("gpt2"), CLAIM, None, n=1, pairs=pairs, split=split)
    assert every.control.tolist() == list(CONTROLS)


@pytest.mark.parametrize("given, message", [
    (dict(n=0), "n is 0: a rank needs"), (dict(seed=-1), "seed -1: give 0"), (dict(kinds=["luck"]), "no control 'luck': there is random weights"),
    (dict(kinds="permuted labels"), "'permuted labels' needs its input: pass pairs"), (dict(kinds=["random splits"]), "pass split"),
    (dict(kinds=[]), "no controls to run"),
    (dict(circuit=Circuit(())), "'circuit' has no components"), (dict(circuit="nowhere"), "no circuit 'nowhere'"),
    (dict(circuit=Circuit.from_components(["a7.h0"]), kinds="random weights"), "a7.h0, but the model has 2 layers"),
    (dict(measure=lambda *given: pd.DataFrame({"score": [1, 2]})), "the measure returned a DataFrame: it must return one number"),
    (dict(measure=lambda *given: None), "the measure returned a NoneType"), (dict(measure=lambda *given: -np.inf), "the measure returned -inf")])
def test_what_cannot_be_controlled(given, message, family):
    with pytest.raises(InputError, match=message):
        run_controls(**dict(measure=lambda *given: 0.0, model=family("gpt2"), circuit=CLAIM, prompts=None, n=1) | given)


def test_tensors_and_packaged_circuits_will_do(compiled):
    table = run_controls(lambda model, circuit, prompts: torch.tensor(float(len(circuit))), "compiled-ioi", "compiled-ioi-ioi", None,
                         kinds="random circuits", n=2)
    assert table.observed[0] == 7 and table.p_value[0] == 1


# known truth

def wide_llama(): return LlamaForCausalLM(LlamaConfig(**SIZES | dict(num_attention_heads=4), num_key_value_heads=4))


def first_logit(model, circuit, prompts): return float(model(TOKENS)[0, -1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("kind, component", [("random weights", None), ("reset circuit", "a1.h1")])
def test_a_model_that_is_itself_a_draw_gets_uniform_p_values(kind, component, family):
    "Where training did nothing, to the model or to its head, the rank among redraws is uniform on 1/10 … 10/10."
    base, p = as_bridge(wide_llama()), []
    for seed in range(30):
        drawn = random_twin(base, seed) if component is None else reset_components(base, component, seed)
        p.append(run_controls(first_logit, drawn, Circuit.from_components(["a1.h1"]), None, kinds=kind, n=9, seed=100 + seed).p_value[0])
    for alpha in (0.1, 0.2, 0.3, 0.5, 0.8): assert abs(np.mean(np.array(p) <= alpha + 1e-9) - alpha) < 3.3 * (alpha * (1 - alpha) / 30) ** 0.5
    assert len(set(p)) > 5


def test_a_planted_head_is_noticed_and_a_dead_one_is_not(family):
    "One head writes what the measure reads; another is as it was drawn."
    model = wide_llama().eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(0.1 if p.ndim == 2 else 1)
        model.model.layers[1].self_attn.o_proj.weight[:, 4:8] *= 1e4
    model = as_bridge(model)
    def loudness(some, circuit, prompts): return float(outputs(some, "blocks.1.hook_attn_out")[0].std())
    planted, dead = (run_controls(loudness, model, Circuit.from_components([c]), None, kinds="reset circuit", n=9) for c in ("a1.h1", "a1.h2"))
    assert planted.p_value[0] == 0.1 and planted.null_mean[0] < 0.1 * planted.observed[0]
    assert abs(dead.null_mean[0] / dead.observed[0] - 1) < 0.01
