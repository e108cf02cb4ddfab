"""Causal scrubbing on models whose inputs can be listed: against numbers by hand, a literal oracle, and statements that must hold on any model."""

from fractions import Fraction
from itertools import permutations, product
from math import e, inf, nan

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.optimize import linprog, minimize

from circuit_generalization.errors import InputError
from circuit_generalization.finite_scrubbing import (
    UNIMPORTANT,
    Attack,
    FiniteHypothesis,
    FiniteModel,
    adversary,
    claim,
    detail,
    distribution,
    entropy_of,
    expectation,
    isomorphic,
    join,
    join_by_swaps,
    leaf_names,
    randomised_loss,
    recovered,
    sample_scrubbed,
    scrubbed_distribution,
    scrubbed_inputs,
    scrubbed_outputs,
    treeify,
)
from circuit_generalization.scrubbing_lessons import (
    _wires,
    answering,
    best_neuron,
    hash_game,
    information_kept,
    neuron,
    neuron_loss,
    node_inputs,
    output_distance,
    scrubbed_entropy,
    sparse,
    with_constant,
)

BITS = distribution(product((0, 1), repeat=2))


def times(*values): return int(np.prod(values))


def the_same(x): return x


FOUR = FiniteModel({"a": (lambda x: x[0],)} | {n: (lambda x: x[1],) for n in "rsxy"} |
                   {"V": (times, "a", "r", "s"), "Z": (times, "a", "x", "y"), "out": (times, "V", "Z")}, "out")
ONLY_A = FiniteHypothesis(FiniteModel({"a": (lambda x: x[0],), "V": (the_same, "a"), "Z": (the_same, "a"), "out": (times, "V", "Z")}, "out"))
HOW = pytest.mark.parametrize("how", UNIMPORTANT)


# Random models of inputs, nodes that read them, and an output that reads both; random hypotheses about them


def mixed(weights, modulus):
    """A function of any number of small numbers that is neither linear nor symmetric."""
    return lambda *values: (sum(w * v for w, v in zip(weights, values)) + times(*values)) % modulus


@st.composite
def models(draw):
    n = draw(st.integers(2, 3))
    inputs = distribution({x: draw(st.integers(1, 3)) for x in range(n)})
    table = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    factors = st.lists(st.integers(1, 2), min_size=4, max_size=4)
    nodes = {f"i{k}": (draw(table).__getitem__,) for k in range(draw(st.integers(1, 3)))}
    read = st.lists(st.sampled_from(sorted(nodes)), min_size=1, max_size=3, unique=True)
    nodes |= {f"m{k}": (mixed(draw(factors), 3), *draw(read)) for k in range(2)}
    above = draw(st.lists(st.sampled_from(sorted(nodes)), min_size=1, max_size=3, unique=True))
    return FiniteModel(nodes | {"out": (mixed(draw(factors), 3), *above)}, "out"), inputs


@st.composite
def hypotheses(draw, model, inputs, only=None):
    """Nodes are named by path, so a node of the model that is read twice has two counterparts, which may differ.

    `only`: a tree of names to follow in place of a random one.
    """
    nodes, stands_for = {}, {}
    factors = st.lists(st.integers(1, 2), min_size=3, max_size=3)
    tables = [t for t in product((1, 0, 2), repeat=len(inputs)) if len(set(t)) > 1] + [(0,) * len(inputs)]  # few that say nothing

    def grow(node, path, shape):
        stands_for[path] = node
        parents = model.parents(node)
        if shape is None:
            kept = draw(st.lists(st.sampled_from(parents), unique=True, min_size=1)) if parents and draw(st.integers(0, 3)) else []
            shape = {p: None for p in kept}
        if shape: nodes[path] = (mixed(draw(factors), 3), *(grow(p, f"{path}.{p}", s) for p, s in shape.items()))
        else: nodes[path] = (draw(st.sampled_from(tables)).__getitem__,)
        return path

    root = grow(model.output, "out", only)
    return FiniteHypothesis(FiniteModel(nodes, root), stands_for)


@st.composite
def cases(draw, n_hypotheses=1, leaves=5):
    model, inputs = draw(models())
    found = [draw(hypotheses(model, inputs)) for _ in range(n_hypotheses)]
    assume(all(len(leaf_names(treeify(model, h, inputs), "each")) <= leaves for h in found))
    return model, inputs, *found


def shape_of(tree): return {p.node: shape_of(p) for p in tree.parents}


def swaps(tree):
    """Model's path → pairs of inputs that may be swapped there."""
    def walk(node, path):
        path = (*path, node.node)
        yield path, {(x, y) for x, y in product(node.feature, repeat=2) if node.feature[x] == node.feature[y]}
        for p in node.parents: yield from walk(p, path)
    return dict(walk(tree, ()))


def literal(model, hypothesis, inputs, how):
    """The published pseudocode with every random choice spelt out as (value, probability): no classes, no merging, no cache."""
    graph = hypothesis.interpretation

    def run(node, x, shared):
        important = {hypothesis.stands_for(p): p for p in graph.parents(node)}
        here = hypothesis.stands_for(node)
        if not important: return [(model.values(x)[here], Fraction(1))]
        parents = model.parents(here)
        rest = [p for p in parents if p not in important]
        options = []
        for p in parents:
            if p not in important: continue
            same = [y for y in inputs if graph.values(y)[important[p]] == graph.values(x)[important[p]]]
            weight = sum(inputs[y] for y in same)
            options.append([({p: v}, inputs[y] / weight * q) for y in same for v, q in run(important[p], y, shared)])
        if how == "together": options.append([({p: model.values(shared)[p] for p in rest}, Fraction(1))])
        elif how == "per node": options.append([({p: model.values(y)[p] for p in rest}, w) for y, w in inputs.items()])
        else: options += [[({p: model.values(y)[p]}, w) for y, w in inputs.items()] for p in rest]
        found = []
        for chosen in product(*options):
            values, weight = {}, Fraction(1)
            for part, w in chosen: values, weight = values | part, weight * w
            found.append((model.nodes[here][0](*(values[p] for p in parents)), weight))
        return found

    result = {}
    for x, w in inputs.items():
        for u, v in inputs.items():
            for value, p in run(graph.output, x, u): result[value] = result.get(value, 0) + w * v * p
    return result


# Distributions


def test_distributions_by_hand():
    assert distribution("aab") == {"a": Fraction(2, 3), "b": Fraction(1, 3)}
    assert distribution({"a": np.int64(3), "b": Fraction(1, 2)}) == {"a": Fraction(6, 7), "b": Fraction(1, 7)}
    assert all(type(p) is Fraction for p in distribution({"a": np.int64(3), "b": 1}).values())
    assert expectation(distribution({2: 1, 5: 2})) == 4 and expectation(BITS, sum) == 1
    assert entropy_of(distribution({0: 1, 1: 1, 2: 2})) == 1.5 and np.isclose(entropy_of(distribution("ab"), e), np.log(2))
    assert str(entropy_of(distribution("a"))) == "0.0"


@pytest.mark.parametrize("bad", [[], {}, {"a": 0.5}, {"a": 0}, {"a": 1, "b": -1}, {"a": nan}, {"a": "1"}])
def test_distribution_refuses(bad):
    with pytest.raises(InputError, match="Fractions above 0|at least one outcome"): distribution(bad)


# Models, hypotheses, trees


@pytest.mark.parametrize(("nodes", "output", "message"), [
    ({"a": (abs,)}, "b", "output 'b' is no node"),
    ({"a": (abs, "b")}, "a", "'a' reads 'b', which is no node"),
    ({"a": (abs, "b"), "b": (abs, "a")}, "a", "cycle"),
    ({"a": (abs,), "b": (max, "a", "a")}, "b", "names a parent twice")])
def test_a_model_refuses(nodes, output, message):
    with pytest.raises(InputError, match=message): FiniteModel(nodes, output)


def test_values_in_any_order_of_nodes():
    model = FiniteModel({"out": (lambda a, b: a - b, "a", "b"), "b": (lambda a: 2 * a, "a"), "a": (lambda x: x + 1,)}, "out")
    assert model.values(4) == {"a": 5, "b": 10, "out": -5} and model(4) == -5


def test_a_hypothesis_refuses():
    model = FiniteModel({"a": (the_same,), "b": (the_same, "a"), "out": (max, "a", "b")}, "out")
    def tree(nodes, output, stands_for=()): return treeify(model, FiniteHypothesis(FiniteModel(nodes, output), dict(stands_for)), range(2))
    with pytest.raises(InputError, match="must stand for the model's, 'out'"): tree({"b": (the_same,)}, "b")
    with pytest.raises(InputError, match="'b' is claimed to need 'out'"):
        tree({"o": (the_same,), "b": (the_same, "o"), "out": (abs, "b")}, "out", {"o": "out"})
    with pytest.raises(InputError, match="two claims about the same parent of 'out'"):
        tree({"a": (the_same,), "c": (the_same,), "out": (max, "a", "c")}, "out", {"c": "a"})
    with pytest.raises(InputError, match="a claim about 'c', which is no node"): tree({"c": (the_same,), "out": (abs, "c")}, "out")
    with pytest.raises(InputError, match="correspondence names 'z'"): FiniteHypothesis(model, {"z": "a"})
    with pytest.raises(InputError, match="unimportant='some'"): scrubbed_distribution(FOUR, ONLY_A, BITS, "some")
    with pytest.raises(InputError, match="unimportant='some'"): sample_scrubbed(FOUR, ONLY_A, BITS, 1, 0, "some")
    with pytest.raises(InputError, match="unimportant='some'"): scrubbed_entropy(FOUR, ONLY_A, BITS, "some")


def test_a_tree_repeats_what_is_read_twice():
    tree = treeify(FOUR, ONLY_A, BITS)
    assert [(path, c.node, c.unimportant) for path, c in tree.walk()] == [
        (("out",), "out", ()), (("out", "V"), "V", ("r", "s")), (("out", "V", "a"), "a", ()),
        (("out", "Z"), "Z", ("x", "y")), (("out", "Z", "a"), "a", ())]
    assert tree.feature == {x: x[0] for x in BITS}
    assert leaf_names(tree) == ["a → V → out", "(r, s) → V → out", "a → Z → out", "(x, y) → Z → out"]
    assert leaf_names(tree, "each")[1:3] == ["(r) → V → out", "(s) → V → out"]


# The algorithm


def test_unimportant_parents_by_hand():
    found = {how: expectation(scrubbed_distribution(FOUR, ONLY_A, BITS, how)) for how in UNIMPORTANT}
    assert found == {"together": Fraction(1, 4), "per node": Fraction(1, 8), "each": Fraction(1, 32)}


@HOW
def test_sampling_agrees_with_the_distribution(how):
    exact = scrubbed_distribution(FOUR, ONLY_A, distribution({x: 1 + sum(x) for x in BITS}), how)
    drawn = sample_scrubbed(FOUR, ONLY_A, {x: 1 + sum(x) for x in BITS}, 1500, 7, how)
    assert drawn[:20] == sample_scrubbed(FOUR, ONLY_A, {x: 1 + sum(x) for x in BITS}, 20, 7, how)
    for value, p in exact.items(): assert abs(drawn.count(value) / 1500 - p) < 4 * (float(p * (1 - p)) / 1500) ** 0.5


def test_sampling_draws_from_the_class():
    """Two copies of one number cancel; claimed to share only a bit, they need not."""
    model = FiniteModel({"one": (the_same,), "two": (the_same,), "out": (lambda a, b: a - b, "one", "two")}, "out")
    hypothesis = FiniteHypothesis(FiniteModel({n: (lambda x: x // 2,) for n in ("one", "two")} | {"out": (max, "one", "two")}, "out"))
    assert scrubbed_distribution(model, hypothesis, range(4)) == {-1: Fraction(1, 4), 0: Fraction(1, 2), 1: Fraction(1, 4)}
    drawn = sample_scrubbed(model, hypothesis, range(4), 600, 3)
    assert set(drawn) == {-1, 0, 1} and all(abs(drawn.count(v) / 600 - 0.25) < 0.07 for v in (-1, 1))


@HOW
@given(cases())
@settings(max_examples=60)
def test_the_distribution_is_the_pseudocode_spelt_out(how, case):
    model, inputs, hypothesis = case
    exact = scrubbed_distribution(model, hypothesis, inputs, how)
    assert exact == literal(model, hypothesis, inputs, how)
    assert sum(exact.values()) == 1


@HOW
@given(cases())
@settings(max_examples=40)
def test_running_the_tree_on_the_leaves_inputs_gives_the_outputs(how, case):
    model, inputs, hypothesis = case
    root = treeify(model, hypothesis, inputs)

    def run(node, leaves):
        if not node.parents: return model.values(next(leaves))[node.node]
        arrived = {p.node: run(p, leaves) for p in node.parents}
        if how == "each": arrived |= {n: model.values(next(leaves))[n] for n in node.unimportant}
        elif node.unimportant:
            x = next(leaves)
            arrived |= {n: model.values(x)[n] for n in node.unimportant}
        return model.nodes[node.node][0](*(arrived[p] for p in model.parents(node.node)))

    leaves, found = scrubbed_inputs(model, hypothesis, inputs, how), {}
    assert {len(xs) for xs in leaves} == {len(leaf_names(root, how))}
    for xs, p in leaves.items():
        value = run(root, iter(xs))
        found[value] = found.get(value, 0) + p
    assert found == scrubbed_distribution(model, hypothesis, inputs, how)


@given(cases())
@settings(max_examples=40)
def test_isomorphic_hypotheses_scrub_as_per_node_whatever_the_rule(case):
    model, inputs, hypothesis = case
    rewritten, whole = isomorphic(model, hypothesis)
    assert all(rewritten(x) == model(x) for x in inputs)
    assert rewritten.nodes.keys() == whole.interpretation.nodes.keys()
    assert all(not c.unimportant for _, c in treeify(rewritten, whole, inputs).walk())
    for how in UNIMPORTANT:
        assert scrubbed_outputs(rewritten, whole, inputs, how) == scrubbed_outputs(model, hypothesis, inputs)
        assert scrubbed_inputs(rewritten, whole, inputs, how) == scrubbed_inputs(model, hypothesis, inputs)


@given(models(), st.permutations(range(3)))
@settings(max_examples=30)
def test_names_and_order_of_nodes_do_not_matter(case, order):
    model, inputs = case
    shuffled = FiniteModel(dict(reversed(model.nodes.items())), "out")
    h = FiniteHypothesis(FiniteModel({"l": (order.__getitem__,), "o": (the_same, "l")}, "o"), {"o": "out", "l": model.parents("out")[0]})
    for how in UNIMPORTANT: assert scrubbed_outputs(model, h, inputs, how) == scrubbed_outputs(shuffled, h, inputs, how)


def test_a_tree_by_hand_needs_no_interpretation():
    leaf = claim(FOUR, BITS, "a", lambda x: x[0])
    tree = claim(FOUR, BITS, "out", the_same, claim(FOUR, BITS, "V", lambda x: x[0], leaf), claim(FOUR, BITS, "Z", lambda x: x[0], leaf))
    assert scrubbed_outputs(FOUR, tree, BITS) == scrubbed_outputs(FOUR, ONLY_A, BITS)
    odd = claim(FOUR, BITS, "V", lambda x: x[1], leaf)  # b does not follow from a
    tree = claim(FOUR, BITS, "out", the_same, odd)
    assert sum(scrubbed_distribution(FOUR, tree, BITS).values()) == 1
    with pytest.raises(InputError, match="'V' is claimed to carry does not follow"): scrubbed_entropy(FOUR, tree, BITS)


def test_a_tree_must_fit():
    with pytest.raises(InputError, match="a tree about 'V': it must be about the model's output, 'out'"):
        scrubbed_outputs(FOUR, claim(FOUR, BITS, "V", the_same), BITS)
    with pytest.raises(InputError, match="a tree about other inputs"): scrubbed_inputs(FOUR, treeify(FOUR, ONLY_A, BITS), [(0, 0)])


# The share recovered


def test_recovered_is_not_clipped():
    assert recovered(Fraction(1, 2), 0, 1) == Fraction(1, 2) and recovered(3.0, 0.0, 1.0) == -2 and recovered(-1, 0, 1) == 2
    assert recovered(2, 2, 1) == 1 and recovered(1, 2, 1) == 0  # a score, where more is better


@pytest.mark.parametrize(("losses", "message"), [((1, 2, 2), "nothing to recover"), ((nan, 1, 2), "the scrubbed loss is nan"),
                                                 ((1, inf, 2), "the model loss is inf"), ((1, 1, -inf), "the randomised loss is -inf")])
def test_recovered_refuses(losses, message):
    with pytest.raises(InputError, match=message): recovered(*losses)


def test_the_randomised_loss_is_the_mean_over_permutations_and_an_unrelated_output():
    labels, outputs = (3, 1, 4, 1), (2, 7, 1, 8)
    def loss(label, out): return abs(label - out) ** 3
    by_permutation = [Fraction(sum(loss(labels[j], outputs[i]) for i, j in enumerate(order)), 4) for order in permutations(range(4))]
    found = randomised_loss(loss, labels.__getitem__, outputs.__getitem__, range(4))
    assert found == sum(by_permutation) / 24
    model = FiniteModel({"label": (labels.__getitem__,), "out": (outputs.__getitem__,), "loss": (loss, "label", "out")}, "loss")
    unrelated = FiniteHypothesis(FiniteModel({"label": (the_same,), "loss": (the_same, "label")}, "loss"))
    assert expectation(scrubbed_distribution(model, unrelated, range(4))) == found


# What scrubbing keeps


@HOW
@given(cases())
@settings(max_examples=40)
def test_lemma_1(how, case):
    model, inputs, hypothesis = case
    found = node_inputs(model, hypothesis, inputs, how)
    assert len(found) == sum(bool(c.parents) for _, c in treeify(model, hypothesis, inputs).walk())
    for scrubbed, consistent in found.values(): assert scrubbed == consistent
    leaves = scrubbed_inputs(model, hypothesis, inputs, how)
    for i in range(len(next(iter(leaves)))):
        marginal = {x: sum(p for xs, p in leaves.items() if xs[i] == x) for x in inputs}
        assert marginal == inputs


@HOW
def test_lemma_1_by_hand(how):
    both = {(0, 0): Fraction(1, 2), (1, 1): Fraction(1, 2)}
    one = {(0,): Fraction(1, 2), (1,): Fraction(1, 2)}
    assert node_inputs(FOUR, ONLY_A, BITS, how) == {("out",): (both, both), ("out", "V"): (one, one), ("out", "Z"): (one, one)}


@HOW
@given(cases())
@settings(max_examples=40)
def test_fact_3(how, case):
    model, inputs, hypothesis = case
    assert np.isclose(scrubbed_entropy(model, hypothesis, inputs, how), entropy_of(scrubbed_inputs(model, hypothesis, inputs, how)))


def conditions(model, hypothesis, inputs):
    """Cells, and for each condition which group every cell is in and what the groups must add up to."""
    root = treeify(model, hypothesis, inputs)
    cells = list(product(inputs, repeat=len(leaf_names(root))))
    wires = [_wires(root, hypothesis.interpretation, cell, "per node") for cell in cells]
    keys = [([tuple(w[(*path, p.name)] for p in c.parents) for w in wires], [tuple(p.feature[x] for p in c.parents) for x in inputs])
            for path, c in root.walk() if c.parents]
    keys += [([cell[i] for cell in cells], list(inputs)) for i in range(len(cells[0]))]
    found = []
    for of_cell, of_input in keys:
        number = {key: i for i, key in enumerate(dict.fromkeys(of_cell))}
        target = np.zeros(len(number))
        for key, p in zip(of_input, inputs.values()): target[number[key]] += float(p)
        found.append((np.array([number[key] for key in of_cell]), target))
    return cells, found


def fitted(n, groups, cycles=400):
    """Iterative proportional fitting from the uniform distribution: the most entropy under these conditions."""
    p = np.full(n, 1 / n)
    for _ in range(cycles):
        before = p
        for group, target in groups:
            sums = np.bincount(group, p, len(target))
            p = p * np.divide(target, sums, out=np.zeros(len(target)), where=sums > 0)[group]
        if np.abs(p - before).max() < 1e-13: break
    return p


@given(cases())
@settings(max_examples=40)
def test_theorem_2(case):
    model, inputs, hypothesis = case
    cells, groups = conditions(model, hypothesis, inputs)
    exact = scrubbed_inputs(model, hypothesis, inputs)
    p = np.array([float(exact.get(cell, 0)) for cell in cells])
    assert np.abs(fitted(len(cells), groups) - p).max() < 1e-9


@given(cases(leaves=4), st.integers(0, 2**32))
@settings(max_examples=30)
def test_theorem_2_no_other_distribution_has_as_much(case, seed):
    model, inputs, hypothesis = case
    cells, groups = conditions(model, hypothesis, inputs)
    exact = scrubbed_inputs(model, hypothesis, inputs)
    p = np.array([float(exact.get(cell, 0)) for cell in cells])
    rows = np.concatenate([np.eye(len(target))[:, group] for group, target in groups])
    targets = np.concatenate([target for _, target in groups])
    assert np.allclose(rows @ p, targets)
    outside = linprog(-(p == 0).astype(float), A_eq=rows, b_eq=targets, bounds=(0, 1))
    assert outside.status == 0 and -outside.fun < 1e-9  # nothing that meets the conditions goes where scrubbing does not
    inside = p > 0
    ways = null_space(rows[:, inside])
    rng = np.random.default_rng(seed)
    for _ in range(5 * bool(ways.shape[1])):
        step = ways @ rng.normal(size=ways.shape[1])
        other = p[inside] + step * rng.uniform(0.1, 0.9) / np.max(-step / p[inside])
        assert -(other * np.log2(other)).sum() < entropy_of(exact)


@given(st.data(), cases(leaves=4))
@settings(max_examples=40)
def test_a_detail_on_named_nodes_never_gives_bits_back(data, case):
    model, inputs, hypothesis = case
    tree = treeify(model, hypothesis, inputs)
    other = data.draw(hypotheses(model, inputs, only=shape_of(tree)))
    assume(shape_of(treeify(model, other, inputs)) == shape_of(tree))
    for how in UNIMPORTANT:
        alone, joined = (information_kept(model, h, inputs, how) for h in (hypothesis, join(hypothesis, other)))
        assert joined > alone - 1e-9 and alone > -1e-9


def test_bits_by_hand():
    assert {how: scrubbed_entropy(FOUR, ONLY_A, BITS, how) for how in UNIMPORTANT} == {"together": 5, "per node": 7, "each": 11}
    assert {how: information_kept(FOUR, ONLY_A, BITS, how) for how in UNIMPORTANT} == {"together": 7, "per node": 5, "each": 1}
    whole = FiniteHypothesis(FiniteModel({"out": (FOUR,)}, "out"))
    assert information_kept(FOUR, whole, BITS) == 5 * 2 and scrubbed_entropy(FOUR, whole, BITS) == 2


# Joins


@given(cases(2))
@settings(max_examples=60)
def test_both_joins_are_one(case):
    model, inputs, first, second = case
    a, b = (treeify(model, h, inputs) for h in (first, second))
    tree, joined = join_by_swaps(a, b), join(first, second)
    assert swaps(treeify(model, joined, inputs)) == swaps(tree)
    assert [c.unimportant for _, c in treeify(model, joined, inputs).walk()] == [c.unimportant for _, c in tree.walk()]
    for path, allowed in swaps(tree).items():  # where a hypothesis names nothing it permits any swap
        everything = set(product(inputs, repeat=2))
        assert allowed == swaps(a).get(path, everything) & swaps(b).get(path, everything)
    for how in UNIMPORTANT: assert scrubbed_outputs(model, joined, inputs, how) == scrubbed_outputs(model, tree, inputs, how)


@given(cases(3))
@settings(max_examples=40)
def test_a_join_has_no_order(case):
    model, inputs, first, second, third = case
    def of(h): return swaps(treeify(model, h, inputs))
    assert of(join(first, first)) == of(first)
    assert of(join(first, second)) == of(join(second, first))
    assert of(join(join(first, second), third)) == of(join(first, join(second, third)))


@given(cases())
@settings(max_examples=20)
def test_joined_with_a_hypothesis_that_permits_nothing_it_is_the_model(case):
    model, inputs, hypothesis = case
    nothing = FiniteHypothesis(FiniteModel({"out": (the_same,)}, "out"))
    assert scrubbed_outputs(model, join(hypothesis, nothing), inputs) == {x: {model(x): 1} for x in inputs}


def test_a_join_keeps_what_a_node_computes():
    """Each side's function gets its own parents, in its own order, and nothing of the other's."""
    model = FiniteModel({"a": (lambda x: x[0],), "b": (lambda x: x[1],), "out": (lambda a, b: a - b, "a", "b")}, "out")
    swapped = FiniteModel({"p": (lambda x: x[1],), "q": (lambda x: x[0],), "out": (lambda p, q: 2 * p - q, "p", "q")}, "out")
    forth, back = FiniteHypothesis(model), FiniteHypothesis(swapped, {"p": "b", "q": "a"})
    only_b = FiniteHypothesis(FiniteModel({"b": (lambda x: -x[1],), "out": (the_same, "b")}, "out"))
    for h, value in ((back, lambda a, b: 2 * b - a), (only_b, lambda a, b: -b)):
        assert treeify(model, join(forth, h), BITS).feature == {(a, b): (a - b, value(a, b)) for a, b in BITS}
        assert treeify(model, join(h, forth), BITS).feature == {(a, b): (value(a, b), a - b) for a, b in BITS}


def test_a_join_refuses():
    other = FiniteHypothesis(FiniteModel({"V": (the_same,)}, "V"))
    with pytest.raises(InputError, match="stand for 'out' and 'V'"): join(ONLY_A, other)
    with pytest.raises(InputError, match="claims about 'out' and 'V' cannot be joined"):
        join_by_swaps(treeify(FOUR, ONLY_A, BITS), claim(FOUR, BITS, "V", the_same))
    with pytest.raises(InputError, match="the same inputs"): join_by_swaps(*(claim(FOUR, distribution(xs), "V", sum) for xs in ([(0, 0)], BITS)))
    twice = FiniteHypothesis(FiniteModel({"a": (the_same,), "b": (the_same,), "out": (max, "a", "b")}, "out"), {"a": "V", "b": "V"})
    with pytest.raises(InputError, match="stand for the same node"): join(twice, ONLY_A)


# The adversary


def parity():
    def xor(x): return x[0] ^ x[1]
    return FiniteModel({"label": (xor,), "out": (xor,), "score": (lambda a, b: int(a == b), "label", "out")}, "score")


def test_an_adversary_with_two_details_finds_what_one_does_not():
    nothing_about_out = FiniteHypothesis(FiniteModel({"label": (lambda x: x[0] ^ x[1],), "score": (the_same, "label")}, "score"))
    bits = {name: detail(["score", "out"], lambda x, i=i: x[i]) for i, name in enumerate("ab")}
    assert adversary(parity(), nothing_about_out, BITS, bits) == [Attack(("a",), Fraction(1, 2), 0), Attack(("b",), Fraction(1, 2), 0)]
    assert adversary(parity(), nothing_about_out, BITS, bits, 2)[0] == Attack(("a", "b"), 1, Fraction(1, 2))


def test_an_adversary_puts_the_largest_change_first_whatever_its_sign():
    game, plays = hash_game()
    false = answering(lambda x: x[1] if x[0] == "easy" else x[2])
    details = {name: detail(["score", "answer"], lambda x, i=i: x[i]) for i, name in enumerate(("mode", "guess", "bit"))}
    found = adversary(game, false, plays, details, 3)
    assert found[0] == Attack(("mode",), Fraction(1, 4), Fraction(-19, 8)) and len(found) == 7
    assert [abs(a.change) for a in found] == sorted((abs(a.change) for a in found), reverse=True)
    assert all(a.score - a.change == Fraction(21, 8) for a in found)


def test_an_adversary_refuses():
    game, plays = hash_game()
    for details, at_most in (({}, 1), ({"a": detail(["score"], the_same)}, 0)):
        with pytest.raises(InputError, match="give at least one of each"): adversary(game, answering(the_same), plays, details, at_most)
    for path in ([], ["out", "out"]):
        with pytest.raises(InputError, match="each once"): detail(path, the_same)


@given(models(), st.lists(st.integers(0, 1), min_size=3, max_size=3))
@settings(max_examples=40)
def test_no_detail_moves_a_hypothesis_that_says_all(case, table):
    """The model as its own interpretation, with a detail along any path."""
    model, inputs = case
    paths = [path for path, _ in treeify(model, FiniteHypothesis(model), inputs).walk()]
    details = {" ".join(path): detail(path, table.__getitem__) for path in paths}
    assert all(a.change == 0 for a in adversary(model, FiniteHypothesis(model), inputs, details))
    assert scrubbed_outputs(model, FiniteHypothesis(model), inputs) == {x: {model(x): 1} for x in inputs}


# The lessons


def resampled(model, node, inputs):
    """Expected output if all parents of `out` but one are right."""
    rest = [p for p in model.parents("out") if p != node]
    claims = {p: (the_same,) for p in ("label", *rest)} | {"out": (lambda *xs: xs[0], *rest), "loss": (lambda x, _: x, "label", "out")}
    return expectation(scrubbed_distribution(model, FiniteHypothesis(FiniteModel(claims, "loss")), inputs))


def test_a_backup_hides_behind_mean_ablation():
    model = FiniteModel({"label": (sum,), "M1": (lambda x: x[0],), "M2": (lambda x: x[1],), "M3": (lambda x: x[1] * Fraction(9, 10),),
                         "out": (lambda a, b, c: a + (b or c), "M1", "M2", "M3"), "loss": (lambda y, out: (y - out) ** 2, "label", "out")}, "loss")
    signs = distribution(product((-1, 1), repeat=2))
    assert expectation(signs, with_constant(model, "M2", 0)) == Fraction(1, 100) and resampled(model, "M2", signs) == 2
    assert expectation(signs, model) == 0 and resampled(model, "M3", signs) == 0
    with pytest.raises(InputError, match="'M4' is no node"): with_constant(model, "M4", 0)


@given(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(1, 20), st.floats(1, 20))
@settings(max_examples=30)
def test_no_neuron_is_better_than_the_best(a, b, k1, k2):
    best = neuron_loss(a, b, *best_neuron(a, b, k1, k2), k1, k2)
    starts = [(1, 1), (a**0.5, 0.1), (0.1, b**0.5), (1, -1)]
    searched = [minimize(lambda cd: neuron_loss(a, b, *cd**2, k1, k2), s).fun for s in starts]
    assert best <= min(searched) + 1e-6 * (1 + best) and min(searched) <= best + 1e-3 * (1 + best)


def test_best_neuron_by_hand():
    assert best_neuron(7, 7, 4, 4) == (5, 5) and best_neuron(7, 7, 3, 3) == (Fraction(28, 3), 0) and best_neuron(2, 9, 2, 3) == (0, Fraction(29, 3))
    for bad in [(0, 1, 4, 4), (1, -1, 4, 4), (1, 1, 0.9, 4), (1, 1, 4, nan), (inf, 1, 4, 4)]:
        with pytest.raises(InputError, match="kurtosis of 1 or more"): best_neuron(*bad)
    for bad in (5, 0, -4, 1):
        with pytest.raises(InputError, match="give a square above 1"): sparse(bad)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(-3, 3), st.integers(-3, 3), st.sampled_from([4, 9]), st.sampled_from([4, 16]))
@settings(max_examples=25)
def test_interference_from_elsewhere_costs_what_it_did(a, b, c, d, k1, k2):
    inputs = distribution({(x, y): p * q for x, p in sparse(k1).items() for y, q in sparse(k2).items()})
    true_loss = neuron_loss(a, b, c * c, d * d, k1, k2)
    assert true_loss == expectation(inputs, lambda x: (a * x[0] ** 2 + b * x[1] ** 2 - (c * x[0] + d * x[1]) ** 2) ** 2)
    for m in (1, 2, 3):
        model, hypothesis = neuron(a, b, c * c, d * d, [Fraction(2 * c * d, m)] * m)
        per_node, each = (expectation(scrubbed_distribution(model, hypothesis, inputs, how)) for how in ("per node", "each"))
        assert expectation(inputs, model) == per_node == true_loss
        assert true_loss - each == 4 * (c * d) ** 2 * (1 - Fraction(1, m))


def test_the_hash_game_by_hand():
    game, plays = hash_game()
    def earned(feature): return expectation(scrubbed_distribution(game, answering(feature), plays))
    assert expectation(plays, game) == Fraction(1, 4)
    assert earned(lambda x: x[1] if x[0] == "easy" else x[2]) == Fraction(21, 8)
    assert earned(lambda x: x[1] if x[0] == "easy" else "don't know") == earned(the_same) == Fraction(1, 4)
    assert earned(lambda x: x[2]) == Fraction(-9, 8)  # half of the time a guess from elsewhere: (1/2 easy, -5 hard)


def test_output_distance_by_hand():
    model = FiniteModel({"z": (lambda x: 3 * x,), "out": (the_same, "z")}, "out")
    unrelated = FiniteHypothesis(FiniteModel({"z": (lambda x: 0,), "out": (the_same, "z")}, "out"))
    assert output_distance(model, unrelated, {0: 3, 1: 1}) == 9 * 2 * Fraction(3, 16)
    assert output_distance(model, FiniteHypothesis(model), {0: 3, 1: 1}) == 0
