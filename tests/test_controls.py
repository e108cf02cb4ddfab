"""Random circuits: of the circuit's shape in every layer, and nothing else of it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization.circuit import Circuit, CircuitError
from circuit_generalization.controls import overlap, random_circuit, random_circuits
from circuit_generalization.errors import InputError

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
