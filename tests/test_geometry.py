"""Distances and shapes: by hand, against literal versions, unmoved by rotation, order, batches and padding; and where the truth is known."""

from dataclasses import replace
from itertools import permutations
from math import isnan, sqrt

import numpy as np
import pandas as pd
import pytest
import torch
from families import made
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy, ortho_group
from sklearn.covariance import LedoitWolf, ledoit_wolf_shrinkage

from circuit_generalization import geometry as geo
from circuit_generalization.errors import InputError
from circuit_generalization.geometry import base_cloud, effective_dimension, geometry, participation_ratio
from circuit_generalization.models import final_logits, load_model
from circuit_generalization.passes import counted_passes
from circuit_generalization.prompts import PromptSet, concat_prompts
from circuit_generalization.tasks import make_prompts

CORNERS = np.vstack([np.eye(4), -np.eye(4)])
small = arrays(np.float64, (9, 3), elements=st.floats(-10, 10).map(lambda x: round(x, 2)))


def draw_prompts(n, seed=0, n_vocab=64, lengths=(5, 9), variant="base"):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, n_vocab, rng.integers(*lengths)).tolist() for _ in range(n)]
    middle = [len(r) // 2 for r in rows]
    labels = pd.DataFrame({"prompt_id": [f"{variant}-{seed}-{i}" for i in range(n)], "variant": variant})
    return PromptSet.from_tokens(rows, None, [1] * n, [2] * n, {"MID": middle, "FEW": [1] * 5 + [-1] * (n - 5), "OWN": [0] * n}, labels)


@pytest.fixture(scope="module")
def base(): return draw_prompts(40, seed=1)


@pytest.fixture(scope="module")
def cloud(random_model, base): return base_cloud(random_model, base)


@pytest.fixture(scope="module")
def scored():
    return concat_prompts([draw_prompts(12, seed=2), draw_prompts(11, seed=3, variant="other"), draw_prompts(7, seed=4, variant="few")])


# The stream


@pytest.mark.parametrize("name", ["gpt2", "grouped", "pythia"])
def test_streams_are_those_of_each_prompt_alone(name):
    model, prompts = made(name), draw_prompts(7)
    found = geo._streams(model, prompts, (0, 2), ("END", "MID", "FEW"), batch_size=3)
    def keeper(kept, layer): return f"blocks.{layer}.hook_resid_post", lambda value, hook: kept.update({layer: value[0]})
    assert found.shape == (2, 3, 7, 32)
    for i in range(7):
        kept, own = {}, prompts.tokens[i:i + 1, :prompts.lengths[i]]
        final_logits(model, own, None, [keeper(kept, 0), keeper(kept, 2)])
        for j, layer in enumerate((0, 2)):
            assert np.allclose(found[j, 0, i], kept[layer][-1], atol=1e-4)
            assert np.allclose(found[j, 1, i], kept[layer][len(own[0]) // 2], atol=1e-4)
            if i < 5: assert np.allclose(found[j, 2, i], kept[layer][1], atol=1e-4)
            else: assert np.isnan(found[j, 2, i]).all()


def test_the_layers_are_the_middle_one_and_the_last(random_model, base, cloud):
    assert cloud.layers == {"middle": 0, "last": 1} and cloud.d_model == 32
    gpt2 = made("gpt2")
    assert base_cloud(gpt2, base).layers == {"middle": 1, "last": 2} and base_cloud(made("one_layer"), base).layers == {"middle": 0, "last": 0}
    chosen = base_cloud(gpt2, base, {"early": 0})
    assert chosen.layers == {"early": 0} and {name for name, _ in chosen.clouds} == {"early"}
    x = geo._streams(gpt2, base, (0,), ("END",), 64)[0, 0]
    assert np.allclose(chosen.clouds["early", "END"].mean, x.mean(0))
    assert [*geometry(gpt2, draw_prompts(8, seed=2), chosen)] == [f"{what}_early_{where}" for what, where in (
        ("mahalanobis", "END"), ("mahalanobis", "roles"), ("participation_ratio", "END"), ("effective_dimension", "END"))]


def test_passes_are_counted_and_the_model_is_left_as_it_was(random_model, base):
    before = final_logits(random_model, base.tokens, base.lengths)
    with counted_passes() as passes: base_cloud(random_model, base, batch_size=7)
    assert (passes.whole, passes.edited) == (40, 0)
    assert torch.equal(final_logits(random_model, base.tokens, base.lengths), before)


# Distances


def test_a_diagonal_cloud_by_hand():
    x = np.vstack([np.diag([4.0, 2, 1]), -np.diag([4.0, 2, 1])] * 3) + [5, 0, -5]
    own, variances = geo._fitted(x), np.array([16, 4, 1]) * 6 / 18
    shrinkage = ledoit_wolf_shrinkage(x)
    shrunk = (1 - shrinkage) * variances + shrinkage * variances.mean()
    assert np.allclose(own.root @ own.root.T, np.diag(shrunk)) and np.allclose(own.mean, [5, 0, -5]) and own.n == 18
    apart = np.array([[3.0, 0, 0], [0, -2, 0], [1, 1, 1], [0, 0, 0]])
    assert np.allclose(own.distance(apart + [5, 0, -5]) * own.unit, np.sqrt((apart**2 / shrunk).sum(1)))


def test_distances_are_scikit_learns():
    x, y = np.random.default_rng(0).normal(size=(2, 30, 8)) * np.arange(1, 9)
    own = geo._fitted(x)
    assert np.allclose((own.distance(y) * own.unit) ** 2, LedoitWolf().fit(x).mahalanobis(y))


@pytest.mark.parametrize("shape", [(8, 3), (12, 30), (40, 5)])
def test_the_unit_is_literally_leaving_one_out(shape):
    x = np.random.default_rng(1).normal(size=shape) ** 3
    shrinkage, floor, squares = ledoit_wolf_shrinkage(x), x.var(0).mean(), []
    for i in range(len(x)):
        others = np.delete(x, i, 0)
        covariance = (1 - shrinkage) * np.cov(others.T, bias=True) + shrinkage * floor * np.eye(shape[1])
        apart = x[i] - others.mean(0)
        squares.append(apart @ np.linalg.inv(covariance) @ apart)
    assert geo._fitted(x).unit == pytest.approx(sqrt(np.mean(squares)))


@given(st.integers(0, 99), st.floats(0.01, 100))
def test_distances_know_no_rotation_shift_or_unit(seed, scale):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 20, 6)) * np.arange(1, 7)
    turn = ortho_group.rvs(6, random_state=seed)
    def moved(x): return scale * x @ turn + 3
    assert np.allclose(geo._fitted(moved(x)).distance(moved(y)), geo._fitted(x).distance(y))


@pytest.mark.parametrize("spectrum", [np.ones(40), 1 / np.arange(1, 41), 1 / np.arange(1, 41) ** 2], ids=["flat", "1/k", "1/k2"])
def test_unseen_members_of_a_gaussian_cloud_have_1(spectrum):
    rng = np.random.default_rng(0)
    def draw(n): return rng.normal(size=(n, 40)) * np.sqrt(spectrum)
    for n, slack in ((30, 0.1), (100, 0.06), (4000, 0.02)):
        far = np.mean([(geo._fitted(draw(n)).distance(draw(300)) ** 2).mean() for _ in range(10 if n < 1000 else 1)])
        assert sqrt(far) == pytest.approx(1, abs=slack)
    assert geo._fitted(draw(4000)).unit == pytest.approx(sqrt(40), rel=0.02)


def test_a_cloud_on_a_line_has_an_outside():
    line = np.outer(np.linspace(-1, 1, 20), [1, 0, 0])
    own = geo._fitted(line)
    on, off = own.distance(np.array([[0.5, 0, 0], [0, 0.5, 0]]))
    assert on < 1 < off and np.isfinite(off)
    two_points = geo._fitted(np.array([[1.0, 0], [-1, 0]] * 5))  # Ledoit and Wolf would not shrink this one at all
    assert np.isfinite(two_points.distance(np.array([[0.0, 1]]))).all() and np.isfinite(two_points.unit)


def test_nan_stays_nan():
    own = geo._fitted(np.random.default_rng(0).normal(size=(20, 3)))
    far = own.distance(np.array([[np.nan] * 3, [0, 0, 0]]))
    assert isnan(far[0]) and np.isfinite(far[1])


# Shapes


@given(small)
def test_participation_ratio_is_the_mean_over_four_different_prompts(x):
    assume(geo._varies(x))
    above = below = 0
    for i, j, k, m in permutations(range(len(x)), 4):
        u, v = x[i] - x[j], x[k] - x[m]
        above, below = above + (u @ u) * (v @ v), below + (u @ v) ** 2
    assume(below > 1e-6 * above)
    assert participation_ratio(x) == pytest.approx(above / below, rel=1e-6)


def test_shapes_by_hand():
    line = np.outer(range(10), [1, -2, 0.5])
    assert participation_ratio(line) == pytest.approx(1) and effective_dimension(line) == pytest.approx(1)
    assert effective_dimension(CORNERS) == pytest.approx(4)
    skew = CORNERS * [3, 1, 1, 1]  # eigenvalues 9, 1, 1, 1
    assert effective_dimension(skew) == pytest.approx(np.exp(entropy([9, 1, 1, 1])))
    # squared distances are 4 (opposite corners) and 2: T = 128, R = 8 · 16², Q = 320, so 8832 over 30 · 320 + 8832 - 10 · 1728
    assert participation_ratio(CORNERS) == pytest.approx(8832 / 1152)


@given(st.integers(0, 99), st.floats(0.01, 100))
def test_shapes_know_no_rotation_shift_or_unit(seed, scale):
    x = np.random.default_rng(seed).normal(size=(12, 5)) * np.arange(1, 6)
    moved = scale * x @ ortho_group.rvs(5, random_state=seed) - 7
    for shape in (participation_ratio, effective_dimension): assert shape(moved) == pytest.approx(shape(x))
    assert participation_ratio(x) >= 1 and 1 <= effective_dimension(x) <= 5


@pytest.mark.parametrize("spectrum", [np.ones(16), 1 / np.arange(1, 65), np.r_[np.ones(3), np.full(60, 1e-3)]], ids=["flat", "1/k", "three"])
def test_the_number_of_prompts_does_not_drive_shapes(spectrum):
    rng, truth = np.random.default_rng(0), spectrum.sum() ** 2 / (spectrum**2).sum()
    ratios, dimensions = {}, {}
    for n, times in ((8, 200), (32, 60), (128, 40)):
        clouds = [rng.normal(size=(n, len(spectrum))) * np.sqrt(spectrum) for _ in range(times)]
        ratios[n] = np.median([participation_ratio(x) for x in clouds])
        dimensions[n] = np.mean([effective_dimension(x) for x in clouds[:40]])
    for n, slack in ((8, 0.3), (32, 0.1), (128, 0.05)): assert ratios[n] == pytest.approx(truth, rel=slack)
    assert np.ptp([*dimensions.values()]) < 0.2


def test_draws_of_eight_are_seeded():
    x = np.random.default_rng(0).normal(size=(30, 5)) * np.arange(1, 6)
    state = str(np.random.get_state())
    assert effective_dimension(x) == effective_dimension(x) != effective_dimension(x, seed=1)
    assert str(np.random.get_state()) == state
    eight = np.linalg.svd(x[:8] - x[:8].mean(0), compute_uv=False) ** 2
    assert effective_dimension(x[:8], seed=3) == pytest.approx(np.exp(entropy(eight)))


@pytest.mark.parametrize("shape", [participation_ratio, effective_dimension])
def test_no_shape(shape):
    rng = np.random.default_rng(0)
    assert isnan(shape(rng.normal(size=(7, 3)))) and not isnan(shape(rng.normal(size=(8, 3))))
    assert isnan(shape(np.full((9, 3), 2.0))) and isnan(shape(np.zeros((9, 3))))
    rounding = (100 + 1e-5 * rng.normal(size=(9, 3))).astype(np.float32)
    assert isnan(shape(rounding)), "rounding has no shape"
    for bad in (np.ones(9), np.full((9, 2), np.nan)):
        with pytest.raises(InputError, match="a row of finite numbers"): shape(bad)


# Every prompt


def test_what_comes_back(random_model, cloud, scored):
    found = geometry(random_model, scored, cloud)
    assert [*found] == [f"{what}_{layer}_{where}" for layer in ("middle", "last") for what, where in (
        ("mahalanobis", "END"), ("mahalanobis", "roles"), ("participation_ratio", "END"), ("effective_dimension", "END"))]
    assert len(found) == len(scored) and isinstance(found.index, pd.RangeIndex) and set(map(str, found.dtypes)) == {"float64"}
    by_variant = found.groupby(scored.labels.variant)
    for column in found.filter(regex="participation|effective"):
        assert by_variant[column].nunique(dropna=False).eq(1).all(), "the same for a whole group"
        assert found[column].isna().tolist() == (scored.labels.variant == "few").tolist()
        assert found[column].nunique() == 2


def test_roles_are_those_that_both_have(random_model, cloud, scored):
    found = geometry(random_model, scored, cloud)
    assert cloud.roles == ("END", "MID", "OWN"), "only 5 base prompts have FEW"
    streams = geo._streams(random_model, scored, (0, 1), ("END", "MID", "OWN"), 64)
    for i, layer in enumerate(("middle", "last")):
        far = [cloud.clouds[layer, role].distance(x) for role, x in zip(("END", "MID", "OWN"), streams[i])]
        assert np.allclose(found[f"mahalanobis_{layer}_END"], far[0]) and np.allclose(found[f"mahalanobis_{layer}_roles"], np.mean(far, 0))
    lacking = replace(scored, positions={"END": scored.positions["END"], "MID": scored.positions["MID"].where(torch.arange(30) % 2 == 0, -1)})
    less = geometry(random_model, lacking, cloud)
    half = np.where(np.arange(30) % 2 == 0, np.mean(far[:2], 0), far[0])
    assert np.allclose(less.mahalanobis_last_roles, half)


def test_order_batches_and_padding_change_nothing(random_model, base, cloud, scored):
    found, mixed = geometry(random_model, scored, cloud), np.random.default_rng(0).permutation(len(scored))
    assert np.allclose(geometry(random_model, scored[mixed], cloud, batch_size=4), found.iloc[mixed], rtol=1e-4, equal_nan=True)
    padded = replace(scored, tokens=torch.nn.functional.pad(scored.tokens, (0, 40), value=3))  # wider than the model's context
    assert np.allclose(geometry(random_model, padded, cloud), found, rtol=1e-4, equal_nan=True)
    again = base_cloud(random_model, base[np.random.default_rng(1).permutation(40)], batch_size=9)
    assert np.allclose(geometry(random_model, scored, again), found, rtol=1e-4, equal_nan=True)


def test_groups_can_be_given(random_model, cloud, scored):
    whole = geometry(random_model, scored, cloud, groups=["all"] * len(scored))
    assert whole.participation_ratio_last_END.nunique() == 1 and whole.notna().all(axis=None)
    end = geo._streams(random_model, scored, (1,), ("END",), 64)[0, 0]
    assert whole.participation_ratio_last_END[0] == pytest.approx(participation_ratio(end))
    apart = geometry(random_model, scored, cloud, groups=np.arange(len(scored)) % 2)
    assert apart.participation_ratio_last_END[1] == pytest.approx(participation_ratio(end[1::2]))
    assert np.allclose(whole.filter(like="mahalanobis"), apart.filter(like="mahalanobis"))


def test_held_out_base_prompts_have_1_and_strange_ones_more():
    model = load_model("organism-a")
    def made_ioi(axis="base", variant="base", seed=0, n=60): return make_prompts("ioi", axis, variant, n, seed, model.tokenizer)
    prompts = concat_prompts([made_ioi(), made_ioi("syntactic", "passive")])
    found = geometry(model, prompts, base_cloud(model, made_ioi(seed=1, n=80)))
    new, passive = found[:60], found[60:]
    assert np.sqrt((new.filter(regex="mahalanobis.*END") ** 2).mean()).between(0.9, 1.1).all()
    assert passive.mahalanobis_last_END.min() > 2 > new.mahalanobis_last_END.max()
    assert passive.participation_ratio_last_END.iloc[0] < 5 < 15 < new.participation_ratio_last_END.iloc[0]


# What is refused


def test_base_prompts_are_checked(random_model, base):
    with pytest.raises(InputError, match="7 base prompts: at least 8"): base_cloud(random_model, base[:7])
    same = PromptSet.from_tokens([[1, 2, 3]] * 9, None, [1] * 9, [2] * 9)
    with pytest.raises(InputError, match="do not differ at END after layer 0"): base_cloud(random_model, same)
    for layers in ({"far": 2}, {"early": -1}, {}):
        with pytest.raises(InputError, match="a number from 0 to 1"): base_cloud(random_model, base, layers)
    with pytest.raises(InputError, match="batch size 0"): base_cloud(random_model, base, batch_size=0)


def test_a_cloud_goes_with_its_model_and_with_other_prompts(random_model, base, cloud, scored):
    with pytest.raises(InputError, match=r"d_model 32\), the model is .*d_model 4\).*base_cloud"): geometry(load_micro(), scored, cloud)
    for other in (replace(cloud, model="another"), replace(cloud, layers={"far": 5})):
        with pytest.raises(InputError, match="fit it on this model"): geometry(random_model, scored, other)
    with pytest.raises(InputError, match=r"prompt base-1-3 is one of the cloud's base prompts \(1 are\)"):
        geometry(random_model, concat_prompts([scored, base[[3]]]), cloud)


def load_micro():
    from circuit_generalization.models import as_bridge, micro_gpt2

    return as_bridge(micro_gpt2())


@pytest.mark.parametrize("groups", [["a"] * 29, ["a"] * 29 + [None], []])
def test_groups_are_checked(random_model, cloud, scored, groups):
    with pytest.raises(InputError, match="group labels for 30 prompts.*one per prompt"): geometry(random_model, scored, cloud, groups)
