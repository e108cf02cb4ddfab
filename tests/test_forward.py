"""The engine against GPT-2 written out in NumPy: every edit, every path, one unpadded prompt at a time."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuit_generalization.ablation import Activations, Mask, capture
from circuit_generalization.errors import InputError
from circuit_generalization.forward import Edit, PathEdit, engine_of, path_patch_with_hooks, run_edits, run_with_hooks
from circuit_generalization.models import as_bridge, final_logits, micro_gpt2, random_gpt2
from circuit_generalization.views import path_patch

LAYERS, HEADS, WIDTH, VOCAB, PLACES = 3, 2, 16, 20, 12
SIZE = WIDTH // HEADS
TOLERANCE = dict(atol=1e-5, rtol=1e-5)
few = settings(max_examples=12, deadline=None)
both = pytest.mark.parametrize("run", [pytest.param(run_edits, id="cone"), pytest.param(run_with_hooks, id="hooks")])


def follow_in_cone(model, tokens, lengths, path, clean, hold_mlps=False, token_ids=None):
    return path_patch(model, tokens, lengths, [path], hold_mlps, token_ids)[0]


both_follow = pytest.mark.parametrize("follow", [pytest.param(follow_in_cone, id="cone"), pytest.param(path_patch_with_hooks, id="hooks")])


# The oracle

@dataclass
class Trace:
    logits: np.ndarray  # pos vocab
    z: np.ndarray  # layer pos head size
    mlp: np.ndarray  # layer pos width
    pre: np.ndarray  # layer pos width: the stream before each layer


class Gpt2:
    "GPT-2's arithmetic in float64: LayerNorm, attention, LayerNorm, MLP, and what can be put in their place."

    def __init__(self, model):
        self.w = {k.removeprefix("transformer."): v.detach().double().numpy() for k, v in model.state_dict().items()}
        self.n_layers, self.n_heads, self.eps = model.config.n_layer, model.config.n_head, model.config.layer_norm_epsilon
        self.size = model.config.n_embd // self.n_heads

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.eps) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x, name): return x @ self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def qkv(self, stream, layer):
        "[3, pos, head, size]"
        x = self.linear(self.norm(stream, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
        return np.stack([part.reshape(len(x), self.n_heads, self.size) for part in np.split(x, 3, axis=-1)])

    def attend(self, q, k, v):
        "[pos, head, size]: each position reads itself and what came before."
        out = np.zeros_like(v)
        for head in range(self.n_heads):
            for i in range(len(q)):
                score = k[: i + 1, head] @ q[i, head] / np.sqrt(self.size)
                weight = np.exp(score - score.max())
                out[i, head] = weight @ v[: i + 1, head] / weight.sum()
        return out

    def write(self, z, layer): return self.linear(z.reshape(len(z), -1), f"h.{layer}.attn.c_proj")

    def think(self, stream, layer):
        x = self.linear(self.norm(stream, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        return self.linear(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), f"h.{layer}.mlp.c_proj")

    def unembed(self, stream): return self.norm(stream, "ln_f") @ self.w["lm_head.weight"].T

    def run(self, ids, z=(), mlp=(), qkv=()):
        "z: {(layer, pos, head): vector}, mlp: {(layer, pos): vector}, qkv: {(layer, 'q', pos, head): vector}: what is put in."
        z, mlp, qkv = dict(z), dict(mlp), dict(qkv)
        x, kept = self.w["wte.weight"][ids] + self.w["wpe.weight"][: len(ids)], Trace(None, [], [], [])
        for layer in range(self.n_layers):
            kept.pre.append(x)
            parts = self.qkv(x, layer)
            for (at, which, pos, head), new in qkv.items():
                if at == layer: parts["qkv".index(which), pos, head] = new
            read = self.attend(*parts)
            for (at, pos, head), new in z.items():
                if at == layer: read[pos, head] = new
            middle = x + self.write(read, layer)
            thought = self.think(middle, layer)
            for (at, pos), new in mlp.items():
                if at == layer: thought[pos] = new
            kept.z.append(read)
            kept.mlp.append(thought)
            x = middle + thought
        return Trace(self.unembed(x), *map(np.stack, (kept.z, kept.mlp, kept.pre)))


hf = random_gpt2(seed=3, n_layers=LAYERS, n_heads=HEADS, d_model=WIDTH, n_vocab=VOCAB, n_positions=PLACES)
model, oracle = as_bridge(hf), Gpt2(hf)
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3, 2], [7]]


def padded(prompts, fill=0):
    width = max(map(len, prompts))
    return torch.tensor([p + [fill] * (width - len(p)) for p in prompts]), torch.tensor([len(p) for p in prompts])


tokens, lengths = padded(PROMPTS)
clean = capture(model, tokens, "heads+mlps")


def random_edit(seed, share=0.3, shape=tokens.shape):
    "Some heads and MLPs at some positions, and what they are made to say."
    g = torch.Generator().manual_seed(seed)
    mask = Mask(torch.rand(*shape, LAYERS, HEADS, generator=g) < share, torch.rand(*shape, LAYERS, generator=g) < share)
    return Edit(mask, Activations(torch.randn(*shape, LAYERS, HEADS, SIZE, generator=g), torch.randn(*shape, LAYERS, WIDTH, generator=g)))


def by_hand(edit, i):
    "The final logits of prompt i under an edit, by the oracle."
    z = {(layer, pos, head): edit.replacement.z[i, pos, layer, head].numpy()
         for pos, layer, head in edit.mask.heads[i].nonzero().tolist() if pos < lengths[i]}
    mlp = {(layer, pos): edit.replacement.mlp[i, pos, layer].numpy() for pos, layer in edit.mask.mlps[i].nonzero().tolist() if pos < lengths[i]}
    return oracle.run(PROMPTS[i], z, mlp).logits[-1]


def close(got, expected): np.testing.assert_allclose(np.asarray(got, dtype=float), np.asarray(expected, dtype=float), **TOLERANCE)


# Nothing edited

def test_the_model_of_these_tests_has_a_cone(): assert engine_of(model) == "cone"


def test_the_oracle_is_gpt2():
    for prompt in PROMPTS:
        with torch.no_grad(): close(hf(torch.tensor([prompt])).logits[0], oracle.run(prompt).logits)


def test_captured_values_are_the_oracles():
    for i, prompt in enumerate(PROMPTS):
        trace = oracle.run(prompt)
        close(clean.z[i, : len(prompt)].transpose(0, 1), trace.z)
        close(clean.mlp[i, : len(prompt)].transpose(0, 1), trace.mlp)


@both
def test_no_edit_is_the_model(run):
    nothing = Edit(Mask(torch.zeros(*tokens.shape, LAYERS, HEADS, dtype=torch.bool), torch.zeros(*tokens.shape, LAYERS, dtype=torch.bool)), clean)
    own = run(model, tokens, lengths, [nothing])[0]
    close(own, final_logits(model, tokens, lengths))
    for i, prompt in enumerate(PROMPTS): close(own[i], oracle.run(prompt).logits[-1])


@both
def test_everything_put_back_is_the_model(run):
    everything = Edit(Mask(torch.ones(*tokens.shape, LAYERS, HEADS, dtype=torch.bool), torch.ones(*tokens.shape, LAYERS, dtype=torch.bool)), clean)
    close(run(model, tokens, lengths, [everything])[0], final_logits(model, tokens, lengths))


# Edits

@both
@few
@given(st.integers(0, 10**6), st.sampled_from([0.02, 0.3, 1.0]))
def test_edits_are_the_oracles(run, seed, share):
    edit = random_edit(seed, share)
    got = run(model, tokens, lengths, [edit])[0]
    for i in range(len(PROMPTS)): close(got[i], by_hand(edit, i))


@both
@few
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=4))
def test_edits_know_nothing_of_each_other(run, seeds):
    edits = [random_edit(s) for s in seeds]
    together = run(model, tokens, lengths, edits)
    alone = torch.cat([run(model, tokens, lengths, [e]) for e in reversed(edits)]).flip(0)
    close(together, alone)
    assert together.shape == (len(seeds), len(PROMPTS), VOCAB)


@both
@few
@given(st.integers(0, 10**6), st.permutations(range(len(PROMPTS))), st.integers(0, 3), st.integers(0, VOCAB - 1))
def test_order_and_padding_are_irrelevant(run, seed, order, extra, fill):
    edit, own = random_edit(seed), run(model, tokens, lengths, [random_edit(seed)])[0]
    wide = torch.nn.functional.pad(tokens, (0, extra))[order].clone()
    wide[torch.arange(wide.shape[1]) >= lengths[order][:, None]] = fill
    pad = torch.nn.functional.pad
    mask = Mask(pad(edit.mask.heads[order], (0, 0, 0, 0, 0, extra), value=True), pad(edit.mask.mlps[order], (0, 0, 0, extra), value=True))
    new = Activations(pad(edit.replacement.z[order], (0, 0, 0, 0, 0, 0, 0, extra), value=7.0),
                      pad(edit.replacement.mlp[order], (0, 0, 0, 0, 0, extra)))
    close(run(model, wide, lengths[order], [Edit(mask, new)])[0], own[order])
    i = order[0]
    just = [i], slice(lengths[i])
    one = Edit(Mask(edit.mask.heads[just], edit.mask.mlps[just]), Activations(edit.replacement.z[just], edit.replacement.mlp[just]))
    close(run(model, tokens[just], lengths[[i]], [one])[0, 0], own[i])


@both
@pytest.mark.parametrize("pos", [1, 2])
def test_later_positions_cannot_reach_back(run, pos):
    edit, ends = random_edit(1, share=1.0), torch.full((2,), pos)
    late = Edit(Mask(edit.mask.heads[[0, 2]].clone(), edit.mask.mlps[[0, 2]].clone()), edit.replacement[[0, 2]])
    late.mask.heads[:, :pos], late.mask.mlps[:, :pos] = False, False
    close(run(model, tokens[[0, 2]], ends, [late])[0], final_logits(model, tokens[[0, 2]], ends))


@both
def test_wanted_tokens_are_columns(run):
    edit, wanted = random_edit(5), torch.tensor([7, 2, 7])
    close(run(model, tokens, lengths, [edit], wanted), run(model, tokens, lengths, [edit])[:, :, wanted])


@both
def test_mlps_need_not_be_captured_where_none_is_replaced(run):
    edit = random_edit(6)
    heads = Mask(edit.mask.heads, torch.zeros_like(edit.mask.mlps))
    close(*(run(model, tokens, lengths, [Edit(heads, new)]) for new in (edit.replacement, Activations(edit.replacement.z))))


@both
def test_the_model_and_the_edit_are_left_as_they_were(run):
    edit, before = random_edit(7), {n: p.clone() for n, p in model.named_parameters()}
    copies = [x.clone() for x in (tokens, lengths, edit.mask.heads, edit.mask.mlps, edit.replacement.z, edit.replacement.mlp)]
    own = final_logits(model, tokens, lengths)
    got = run(model, tokens, lengths, [edit, edit])
    path_patch(model, tokens, lengths, [PathEdit((0, 1), (2, 0, "q"), edit.replacement.z[:, :, 0, 1])])
    assert torch.equal(got[0], got[1]) and not got.requires_grad
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and torch.equal(final_logits(model, tokens, lengths), own)
    given = tokens, lengths, edit.mask.heads, edit.mask.mlps, edit.replacement.z, edit.replacement.mlp
    assert all(torch.equal(a, b) for a, b in zip(copies, given))
    assert not any(hook for point in model.hook_dict.values() for hook in point.fwd_hooks), "no hook is left behind"


@both
def test_the_micro_model_by_hand(run):
    "Ids 0 1: without its head the stream at the end is y + 0 + y, normalised; LD(x, y) follows in the head."
    micro = as_bridge(micro_gpt2())
    ids, n = torch.tensor([[0, 1]]), torch.tensor([2])
    silent = Edit(Mask(torch.ones(1, 2, 1, 1, dtype=torch.bool), torch.zeros(1, 2, 1, dtype=torch.bool)), Activations(torch.zeros(1, 2, 1, 1, 4)))
    # the stream is y, plus the MLP's y: 2y, normalised (0, 0, √2, -√2); its product with x, y, -x is 0, 2√2, 0
    close(run(micro, ids, n, [silent])[0, 0], [0, 2 * 2**0.5, 0])


@both
@pytest.mark.parametrize("extra", [1, 5])
def test_prompts_beyond_the_context_are_refused(run, extra):
    long, n = torch.zeros(2, PLACES + extra, dtype=torch.long), torch.tensor([3, PLACES + extra])
    edit, message = random_edit(0, shape=long.shape), f"the longest prompt has {PLACES + extra} tokens; the model takes at most {PLACES}"
    for refused in (lambda: run(model, long, n, [edit]), lambda: capture(model, long),
                    lambda: path_patch(model, long, n, [PathEdit((0, 0), "logits", edit.replacement.z[:, :, 0, 0])]),
                    lambda: path_patch_with_hooks(model, long, n, PathEdit((0, 0), "logits", edit.replacement.z[:, :, 0, 0]), edit.replacement)):
        with pytest.raises(InputError, match=message): refused()
    with pytest.raises(InputError, match=rf"has 3 tokens \(padded to {PLACES + extra}\)"): final_logits(model, long, torch.tensor([3, 2]))
    capture(model, long[:, :PLACES])


# Paths

def path_by_hand(i, sender, receiver, new, sender_at, receiver_at, hold_mlps):
    "Follow the sender's change down the residual stream, with every other head as it was."
    ids, trace = PROMPTS[i], oracle.run(PROMPTS[i])
    layer, head = sender
    z = trace.z[layer].copy()
    z[sender_at, head] = new[: len(ids)][sender_at]
    stop = LAYERS if receiver == "logits" else receiver[0]
    if layer >= stop: stream = trace.pre[stop]
    else:
        stream = trace.pre[layer]
        for at in range(layer, stop):
            middle = stream + oracle.write(z if at == layer else trace.z[at], at)
            stream = middle + (trace.mlp[at] if hold_mlps else oracle.think(middle, at))
    if receiver == "logits": return oracle.unembed(stream)[-1]
    heard = oracle.qkv(stream, receiver[0])["qkv".index(receiver[2])]
    put = {(receiver[0], receiver[2], pos, receiver[1]): heard[pos, receiver[1]] for pos in np.flatnonzero(receiver_at)}
    return oracle.run(ids, qkv=put).logits[-1]


receivers = st.just("logits") | st.tuples(st.integers(0, LAYERS - 1), st.integers(0, HEADS - 1), st.sampled_from("qkv"))


@both_follow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.tuples(st.integers(0, LAYERS - 1), st.integers(0, HEADS - 1)), receivers, *[st.booleans()] * 3)
def test_paths_are_the_oracles(follow, seed, sender, receiver, some_senders, some_receivers, hold_mlps):
    g = torch.Generator().manual_seed(seed)
    new = torch.randn(*tokens.shape, SIZE, generator=g)
    ats = [torch.rand(tokens.shape, generator=g) < 0.5 if some else None for some in (some_senders, some_receivers)]
    got = follow(model, tokens, lengths, PathEdit(sender, receiver, new, *ats), clean, hold_mlps)
    for i, prompt in enumerate(PROMPTS):
        here = [np.ones(len(prompt), bool) if at is None else at[i, : len(prompt)].numpy() for at in ats]
        close(got[i], path_by_hand(i, sender, receiver, new[i].double().numpy(), *here, hold_mlps))


@both_follow
@pytest.mark.parametrize("receiver", ["logits", (2, 0, "q"), (2, 1, "k"), (2, 1, "v")])
def test_a_path_is_not_nothing(follow, receiver):
    new = torch.randn(*tokens.shape, SIZE, generator=torch.Generator().manual_seed(0))
    own = final_logits(model, tokens, lengths)
    a, b = (follow(model, tokens, lengths, PathEdit((0, 1), receiver, new), clean, hold) for hold in (False, True))
    assert (a - own)[:3].abs().max() > 1e-3 and (b - own)[:3].abs().max() > 1e-3 and (a - b)[:3].abs().max() > 1e-4
    upstream = follow(model, tokens, lengths, PathEdit((2, 0), (2, 1, "k"), new), clean)
    close(upstream, own)


@both_follow
def test_wanted_tokens_of_a_path(follow):
    new, wanted = torch.ones(*tokens.shape, SIZE), torch.tensor([4, 1])
    for receiver in ("logits", (1, 0, "v")):
        whole, some = (follow(model, tokens, lengths, PathEdit((0, 0), receiver, new), clean, token_ids=t) for t in (None, wanted))
        close(whole[:, wanted], some)


@pytest.mark.parametrize("sender, receiver, hold, message", [
    ((0, 1), (2, 0, "z"), False, "a receiver reads through q, k, v, not 'z'"),
    ((3, 0), "logits", False, "no head a3.h0: it has 3 layers of 2 heads"),
    ((0, 2), "logits", False, "no head a0.h2"), ((0, 0), (1, 5, "q"), False, "no head a1.h5"), ((0, -1), "logits", False, "no head a0.h-1"),
    ((0, 0), "logits", True, "to hold the MLPs, capture them")])
def test_paths_that_are_none_are_refused(sender, receiver, hold, message):
    path = PathEdit(sender, receiver, torch.zeros(*tokens.shape, SIZE))
    with pytest.raises(InputError, match=message): path_patch_with_hooks(model, tokens, lengths, path, Activations(clean.z), hold)
    if hold: return  # the engine captures what it holds
    with pytest.raises(InputError, match=message): path_patch(model, tokens, lengths, [path])
