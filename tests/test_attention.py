"""Heads from weights and from runs: numbers computed by hand, or by an independent forward pass."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from circuit_generalization.attention import (
    attention_pattern,
    attention_to,
    duplicate_token_score,
    head_detectors,
    head_weights,
    induction_score,
    known_heads_gpt2,
    ov_circuit,
    ov_copying_score,
    ov_scores,
    previous_token_score,
    qk_circuit,
    repeated_tokens,
    token_vectors,
)
from circuit_generalization.errors import InputError
from circuit_generalization.models import as_bridge, component_names, micro_gpt2, model_hash, random_gpt2


@pytest.fixture(scope="module")
def known():
    return as_bridge(known_heads_gpt2())


@pytest.fixture(scope="module")
def model():
    return as_bridge(random_gpt2(n_layers=2, n_heads=4, d_model=32))


@pytest.fixture(scope="module")
def llama():
    """Rotary, RMSNorm, and four query heads for two key/value heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hugging_face = LlamaForCausalLM(LlamaConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=32, max_position_embeddings=32, initializer_range=0.3))
        for name, parameter in hugging_face.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return as_bridge(hugging_face)


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (5, 12), generator=torch.Generator().manual_seed(0))


def looks_at(*keys):
    return torch.eye(len(keys))[list(keys)]


# weights

def test_micro_weights_by_hand(micro):
    W_Q, W_K, W_V, W_O = head_weights(micro, 0, 0)
    x, y = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]])
    zero = torch.zeros(4, 3)
    torch.testing.assert_close(W_Q, torch.cat([2 * math.log(3) / 8**0.5 * y[:, None], zero], 1))
    torch.testing.assert_close(W_K, torch.cat([x[:, None] / 8**0.5, zero], 1))
    torch.testing.assert_close(W_V, torch.cat([x[:, None] / 8**0.5, zero], 1))
    torch.testing.assert_close(W_O, torch.cat([2 * x[None], zero.T]))


@pytest.mark.parametrize("layer, head", [(2, 0), (0, 4), (-1, 0), (0, -1)])
def test_no_such_head(model, layer, head):
    with pytest.raises(InputError, match="2 layers of 4 heads"):
        head_weights(model, layer, head)


def test_shared_value_heads_are_handed_out_right(llama, tokens):
    _, cache = llama.run_with_cache(tokens)
    for layer in range(2):
        stream = cache[f"blocks.{layer}.hook_resid_pre"]
        normed = stream / (stream.pow(2).mean(-1, keepdim=True) + llama.cfg.eps).sqrt() * llama.blocks[layer].ln1.weight
        for head in range(4):
            value = normed @ head_weights(llama, layer, head)[2]
            z = cache[f"blocks.{layer}.attn.hook_pattern"][:, head] @ value
            assert z.std() > 0.1
            torch.testing.assert_close(z, cache[f"blocks.{layer}.attn.hook_z"][:, :, head], atol=1e-4, rtol=1e-4)


def test_circuits_are_the_products_of_the_matrices(model):
    W_Q, W_K, W_V, W_O = head_weights(model, 1, 3)
    q, k = qk_circuit(model, 1, 3)
    v, o = ov_circuit(model, 1, 3)
    assert q.shape == v.shape == (32, 8) and k.shape == o.shape == (8, 32)
    torch.testing.assert_close(q @ k, W_Q @ W_K.T)
    torch.testing.assert_close(v @ o, W_V @ W_O)


# patterns

def test_pattern_by_hand(micro):
    pattern = attention_pattern(micro, torch.tensor([[0, 0, 1], [2, 1, 0]]))["a0.h0"]
    # tokens 0 and 2 ask for nothing and look at all before them equally; token 1 looks 3 : 1 : 1/3
    expected = [[[1, 0, 0], [1 / 2, 1 / 2, 0], [3 / 7, 3 / 7, 1 / 7]],
                [[1, 0, 0], [1 / 4, 3 / 4, 0], [1 / 3, 1 / 3, 1 / 3]]]
    torch.testing.assert_close(pattern, torch.tensor(expected))


@pytest.mark.parametrize("which", ["model", "llama"])
def test_patterns_are_the_librarys_under_their_names(which, tokens, request):
    subject = request.getfixturevalue(which)
    _, cache = subject.run_with_cache(tokens)
    patterns = attention_pattern(subject, tokens)
    assert list(patterns) == component_names(subject)
    for layer in range(2):
        for head in range(4):
            torch.testing.assert_close(patterns[f"a{layer}.h{head}"],
                                       cache[f"blocks.{layer}.attn.hook_pattern"][:, head])


def test_only_the_patterns_asked_for(model, tokens):
    assert list(attention_pattern(model, tokens, ["a1.h2", "a0.h1"])) == ["a0.h1", "a1.h2"]


@pytest.mark.parametrize("name, complaint", [("m0", "only heads attend"), ("a2.h0", "no head a2.h0"),
                                             ("a0.h4", "no head a0.h4"), ("9.6", "9.6")])
def test_patterns_of_no_head(model, tokens, name, complaint):
    with pytest.raises(InputError, match=complaint):
        attention_pattern(model, tokens, [name])


def test_watching_changes_nothing(model, tokens):
    before, weights = model(tokens), model_hash(model)
    attention_pattern(model, tokens)
    attention_to(model, tokens, torch.full((5,), 3), torch.full((5,), 1))
    assert torch.equal(model(tokens), before) and model_hash(model) == weights


# OV

def test_ov_scores_by_hand(micro):
    # looking at token 0 writes (2, 0): each of the two coordinates meets the unembedding's ±1
    torch.testing.assert_close(ov_scores(micro, 0, 0, torch.arange(3)),
                               4.0 * torch.tensor([[1, 0, -1], [0, 0, 0], [-1, 0, 1]]))
    assert ov_copying_score(micro, 0, 0, torch.tensor([0, 2]), top=1) == 1
    assert ov_copying_score(micro, 0, 0, torch.tensor([0, 2]), top=1, negative=True) == 0


def test_a_head_with_its_sign_turned_suppresses():
    turned = micro_gpt2()
    turned.transformer.h[0].attn.c_proj.weight.data *= -1
    turned = as_bridge(turned)
    assert ov_copying_score(turned, 0, 0, torch.tensor([0, 2]), top=1) == 0
    assert ov_copying_score(turned, 0, 0, torch.tensor([0, 2]), top=1, negative=True) == 1


def test_the_induction_head_copies(known):
    everything = torch.arange(16)
    assert ov_copying_score(known, 1, 0, everything, top=1) == 1
    assert ov_copying_score(known, 1, 0, everything, top=1, negative=True) == 0


def test_token_vectors_are_embeddings_then_the_first_mlps_answer(tokens):
    original = random_gpt2(n_layers=2, n_heads=4, d_model=32)
    model, ids = as_bridge(original), torch.tensor([3, 50, 7])
    with torch.no_grad():
        embedded, (first, second) = original.transformer.wte(ids), original.transformer.h
        torch.testing.assert_close(token_vectors(model, 0, ids), first.ln_1(embedded))
        rewritten = embedded + first.mlp(first.ln_2(embedded))
        torch.testing.assert_close(token_vectors(model, 1, ids), second.ln_1(rewritten))


@pytest.mark.parametrize("which, centred", [("model", True), ("llama", False)])
def test_ov_scores_rank_as_the_normalised_output_does(which, centred, request):
    subject = request.getfixturevalue(which)
    ids = torch.arange(20)
    left, right = ov_circuit(subject, 1, 2)
    written = token_vectors(subject, 1, ids) @ left @ right
    shifted = written - written.mean(-1, keepdim=True) if centred else written
    normed = shifted / shifted.pow(2).mean(-1, keepdim=True).sqrt() * subject.ln_final.weight
    expected = (normed @ subject.W_U[:, ids]).argsort(-1)
    assert torch.equal(ov_scores(subject, 1, 2, ids).argsort(-1), expected)


def test_copying_counts_places(model):
    ids = torch.arange(30)
    ranks = (-ov_scores(model, 0, 1, ids)).argsort(-1).argsort(-1).diagonal()  # 0: the token itself is on top
    for top in (1, 5, 29):
        assert ov_copying_score(model, 0, 1, ids, top=top) == pytest.approx((ranks < top).float().mean().item())
        assert (ov_copying_score(model, 0, 1, ids, top=top, negative=True)
                == pytest.approx((ranks >= 30 - top).float().mean().item()))


@pytest.mark.parametrize("top", [0, 3, 5])
def test_copying_with_every_place_counting_is_refused(model, top):
    with pytest.raises(InputError, match="every token would count"):
        ov_copying_score(model, 0, 0, torch.arange(3), top=top)


# detectors

def test_detectors_on_patterns_by_hand():
    previous, duplicate, induction = (looks_at(0, 0, 1, 2, 3, 4), looks_at(0, 0, 0, 0, 1, 2), looks_at(0, 0, 0, 1, 2, 3))
    scores = [[f(pattern).item() for f in (previous_token_score, lambda p: duplicate_token_score(p, 3),
                                           lambda p: induction_score(p, 3))]
              for pattern in (previous, duplicate, induction)]
    # five queries have a previous token; query 1 of each pattern looks at position 0, which is its previous token
    torch.testing.assert_close(torch.tensor(scores), torch.tensor([[1, 0, 0], [1 / 5, 1, 0], [1 / 5, 0, 1]]))


def test_detectors_weigh_every_query_alike():
    pattern = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]])
    assert previous_token_score(pattern).item() == pytest.approx((0.5 + 0.3 + 0.3) / 3)
    assert duplicate_token_score(pattern, 2).item() == pytest.approx((0.2 + 0.2) / 2)
    assert induction_score(pattern, 2).item() == pytest.approx((0.3 + 0.3) / 2)
    assert previous_token_score(pattern.expand(2, 3, 4, 4)).shape == (2, 3)


def test_known_heads_are_found(known):
    found = head_detectors(known, repeated_tokens(8, 10, torch.arange(16))).set_index("component")
    names = ["previous_token", "duplicate_token", "induction"]
    assert list(found.columns) == names and list(found.index) == component_names(known)
    for head, job in zip(["a0.h0", "a0.h1", "a1.h0"], names, strict=True):
        assert found.loc[head, job] > 0.99
        assert (found.loc[head, [other for other in names if other != job]] < 0.15).all()
    equal = [sum(1 / n for n in range(2, 21)) / 19, *[sum(1 / n for n in range(11, 21)) / 10] * 2]
    assert found.loc["a1.h1"].tolist() == pytest.approx(equal)


def test_induction_needs_the_previous_token_head(known):
    tokens = repeated_tokens(4, 10, torch.arange(16), seed=1)
    silence = ("blocks.0.attn.hook_z", lambda z, hook: z.index_fill(2, torch.tensor(0), 0.0))
    with known.hooks(fwd_hooks=[silence]):
        blind = head_detectors(known, tokens).set_index("component")
    assert blind.loc["a1.h0", "induction"] < 0.2 and blind.loc["a0.h1", "duplicate_token"] > 0.99


def test_detectors_average_over_prompts(model):
    tokens = repeated_tokens(4, 6, torch.arange(50))
    together = head_detectors(model, tokens).drop(columns="component")
    alone = sum(head_detectors(model, row[None]).drop(columns="component") for row in tokens) / 4
    assert (together - alone).abs().max().max() < 1e-6 and together.stack().std() > 1e-3


@pytest.mark.parametrize("tokens", [[[1, 2, 3, 1, 2, 4]], [[1, 2, 3, 1, 2]], [[1, 1]], [1, 2, 1, 2]])
def test_detectors_refuse_tokens_that_do_not_repeat(model, tokens):
    with pytest.raises(InputError, match="followed by itself"):
        head_detectors(model, torch.tensor(tokens))


def test_repeated_tokens():
    ids = torch.tensor([3, 9, 27, 81])
    tokens = repeated_tokens(50, 3, ids, seed=2)
    assert tokens.shape == (50, 6) and torch.equal(tokens[:, :3], tokens[:, 3:])
    assert all(len(set(row.tolist())) == 3 for row in tokens) and set(tokens.unique().tolist()) == set(ids.tolist())
    assert len({tuple(row.tolist()) for row in tokens}) > 10
    assert torch.equal(tokens, repeated_tokens(50, 3, ids, seed=2))
    assert not torch.equal(tokens, repeated_tokens(50, 3, ids, seed=3))


@pytest.mark.parametrize("period", [1, 5])
def test_repeated_tokens_refuses(period):
    with pytest.raises(InputError, match="between 2 and the number of tokens, 4"):
        repeated_tokens(2, period, torch.arange(4))


# from one position to another

def test_attention_to_by_hand(micro):
    attention = attention_to(micro, torch.tensor([[0, 0, 1], [2, 1, 0]]), torch.tensor([2, 1]), torch.tensor([0, 0]))
    torch.testing.assert_close(attention, torch.tensor([3 / 7, 1 / 4]).reshape(2, 1, 1))


@pytest.mark.parametrize("which", ["model", "llama"])
def test_attention_to_is_an_entry_of_the_pattern(which, tokens, request):
    subject = request.getfixturevalue(which)
    query, key = torch.tensor([[11, 3], [7, 0], [5, 11], [2, 9], [10, 8]]), torch.tensor([[0, 2], [7, 0], [4, 1], [1, 9], [3, 6]])
    attention = attention_to(subject, tokens, query, key)
    assert attention.shape == (5, 2, 2, 4)
    patterns = attention_pattern(subject, tokens)
    for prompt in range(5):
        for pair in range(2):
            expected = [patterns[name][prompt, query[prompt, pair], key[prompt, pair]] for name in component_names(subject)]
            assert torch.equal(attention[prompt, pair].flatten(), torch.stack(expected))
    assert torch.equal(attention_to(subject, tokens, query[:, 1], key[:, 1]), attention[:, 1])


def test_a_place_that_a_prompt_does_not_have_is_nan(model, tokens):
    query, key = torch.tensor([3, -1, 3, -1, 3]), torch.tensor([1, 1, -1, -1, 0])
    missing = attention_to(model, tokens, query, key).isnan()
    assert missing.all((1, 2)).tolist() == [False, True, True, True, False] and not missing[[0, 4]].any()


def test_attention_to_ignores_padding(model, tokens):
    query, key = torch.full((5,), 4), torch.tensor([0, 1, 2, 3, 4])
    padded = torch.cat([tokens[:, :5], torch.full((5, 9), 63)], 1)
    torch.testing.assert_close(attention_to(model, padded, query, key),
                               attention_to(model, tokens[:, :5], query, key), atol=1e-6, rtol=0)


def test_one_forward_pass_for_any_number_of_pairs(model, tokens):
    passes = []
    count = ("blocks.0.hook_resid_pre", lambda stream, hook: passes.append(1))
    with model.hooks(fwd_hooks=[count]):
        attention_to(model, tokens, torch.ones(5, 7, dtype=torch.long), torch.zeros(5, 7, dtype=torch.long))
    assert len(passes) == 1


@pytest.mark.parametrize("query, key, complaint", [
    ([3] * 5, [12] * 5, "between 0 and 11"), ([-2] * 5, [0] * 5, "between 0 and 11"),
    ([3] * 4, [0] * 4, "4 rows of positions for 5 prompts"), ([3] * 5, [[0]] * 5, r"\(5,\) query positions, \(5, 1\) key"),
])
def test_impossible_positions(model, tokens, query, key, complaint):
    with pytest.raises(InputError, match=complaint):
        attention_to(model, tokens, torch.tensor(query), torch.tensor(key))
