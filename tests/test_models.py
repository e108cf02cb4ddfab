"""Loading a model, naming its parts, and reading its last row: exact values and every way to be refused."""

import copy
import json

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from circuit_generalization import models
from circuit_generalization.errors import InputError
from circuit_generalization.models import (
    ModelError,
    as_bridge,
    component_names,
    final_logits,
    list_models,
    load_model,
    model_hash,
    quiet,
    random_gpt2,
)

ROOT2 = 2**0.5
SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=32)


def save(model, folder, tokenizer=None):
    with quiet():
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def words():
    """A tokenizer of five words and a beginning-of-sequence token, with no padding token."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "When", "Mary", "and", "John", "a"])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_key_value_heads": 1} | changes)))


@pytest.fixture
def folder(tmp_path):
    return save(random_gpt2(), tmp_path / "model")


def refusal(name, **options):
    with pytest.raises(ModelError) as caught:
        load_model(name, **options)
    text = str(caught.value)
    assert "\n" not in text and text
    return text


# values computed by hand

def test_micro_model_by_hand(micro):
    logits = micro(torch.tensor([[0, 1], [2, 1]]))[:, -1]
    # [2, 1]: attention 1/4 on token 2, so z = -1/4, and the stream ends as (-1/2, 2)
    expected = [[6 * ROOT2 / 5, 8 * ROOT2 / 5, -6 * ROOT2 / 5],
                [-2 * ROOT2 / 17**0.5, 8 * ROOT2 / 17**0.5, 2 * ROOT2 / 17**0.5]]
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_final_logits_by_hand_under_padding(micro):
    tokens, lengths = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 1]]), torch.tensor([2, 4])
    logits = final_logits(micro, tokens, lengths)
    # [1, 1, 0, 1]: attention 1 : 1 : 3 : 1, so z = 1/2, and the stream ends as (1, 2)
    expected = [[6 * ROOT2 / 5, 8 * ROOT2 / 5, -6 * ROOT2 / 5],
                [2 * ROOT2 / 5**0.5, 4 * ROOT2 / 5**0.5, -2 * ROOT2 / 5**0.5]]
    torch.testing.assert_close(logits, torch.tensor(expected))


@pytest.mark.parametrize("hook, x, y", [("attn.hook_z", 0, 2), ("hook_mlp_out", 1.5, 1)])
def test_final_logits_with_a_part_silenced_by_hand(micro, hook, x, y):
    silenced = [(f"blocks.0.{hook}", lambda value, hook: torch.zeros_like(value))]
    logits = final_logits(micro, torch.tensor([[0, 1]]), fwd_hooks=silenced, token_ids=torch.tensor([1, 0]))
    scale = 2 * ROOT2 / (x**2 + y**2) ** 0.5
    torch.testing.assert_close(logits, torch.tensor([[scale * y, scale * x]]))


# the last row

def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05,
                                          **SIZES))


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def opt():
    return OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **SIZES))


def olmo2():
    return Olmo2ForCausalLM(Olmo2Config(pad_token_id=0, **SIZES))


architectures = pytest.mark.parametrize("make", [random_gpt2, llama, gemma2, neox, opt, olmo2], ids=[
    "gpt2", "llama", "gemma2 (soft cap)", "neox (parallel)", "opt (fused attention unless told)",
    "olmo2 (known by its class alone)"])


@architectures
def test_final_logits_is_the_full_forward_in_every_architecture(make):
    torch.manual_seed(0)
    original = make().eval()
    model = as_bridge(original)
    tokens = torch.randint(0, 50, (4, 9))
    lengths = torch.tensor([9, 1, 4, 8])
    with torch.no_grad():
        full = original(tokens).logits[torch.arange(4), lengths - 1]
    assert full.std() > 1e-3
    torch.testing.assert_close(final_logits(model, tokens, lengths), full, atol=1e-5, rtol=0)


def test_padding_content_and_batch_do_not_matter():
    model = as_bridge(random_gpt2())
    tokens = torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12, 3, 7, 1, 9])
    together = final_logits(model, tokens, lengths)
    other = tokens.where(torch.arange(12) < lengths[:, None], 63)
    alone = torch.cat([final_logits(model, tokens[i: i + 1, :n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(final_logits(model, other, lengths), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_final_logits_leaves_no_hook_and_changes_no_weight():
    model = as_bridge(random_gpt2())
    before = model_hash(model)
    tokens = torch.arange(6)[None]
    plain = final_logits(model, tokens)
    changed = final_logits(model, tokens, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: 2 * z)])
    assert (plain - changed).abs().max() > 1e-3
    assert torch.equal(final_logits(model, tokens), plain) and model(tokens).shape == (1, 6, 64)
    assert model_hash(model) == before


@pytest.mark.parametrize("tokens, lengths, complaint", [
    ([[1, 64]], [2], "0 to 63"), ([[-1, 2]], [2], "0 to 63"), ([[1, 2]], [3], "between 1 and 2"),
    ([[1, 2]], [0], "between 1 and 2"), ([[1, 2]], [1, 1], "one length per row"),
    ([1, 2], [1, 1], "one length per row"), ([[1] * 33], [33], "at most 32"),
])
def test_final_logits_refuses(tokens, lengths, complaint):
    with pytest.raises(InputError, match=complaint):
        final_logits(as_bridge(random_gpt2()), torch.tensor(tokens), torch.tensor(lengths))


# loading

def test_a_loaded_model_is_the_saved_one(folder):
    model, tokens = load_model(folder), torch.randint(0, 64, (3, 8))
    torch.testing.assert_close(model(tokens), random_gpt2()(tokens).logits, atol=1e-5, rtol=0)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.tokenizer is None


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    model = load_model(save(random_gpt2().half(), tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model_hash(model) == model_hash(random_gpt2().half().float()) == model_hash(random_gpt2().half())


def test_the_tokenizer_stays_as_saved_and_nothing_is_prepended(tmp_path):
    model = load_model(save(random_gpt2(), tmp_path, words()))
    assert model.tokenizer.encode("When Mary and John") == [1, 2, 3, 4]
    assert model.to_tokens("When Mary and John").tolist() == [[1, 2, 3, 4]]
    assert model.to_tokens(["Mary", "Mary and"]).tolist() == [[2, 0], [2, 3]]  # padded, on the right


def test_path_and_string_are_the_same(folder):
    assert model_hash(str(folder)) == model_hash(folder)


def test_embedded_models_are_listed_and_load_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "files", lambda package: tmp_path)
    assert len(list_models()) == 0
    home = save(random_gpt2(), tmp_path / "data" / "models" / "organism-x")
    (home / "card.json").write_text(json.dumps({"summary": "a test"}))
    save(llama(), tmp_path / "data" / "models" / "organism-y")
    first, second = list_models().to_dict("records")
    assert {k: first[k] for k in ("name", "layers", "heads", "d_model", "what")} == {
        "name": "organism-x", "layers": 2, "heads": 2, "d_model": 16, "what": "a test"}
    assert first["MB"] == round((home / "model.safetensors").stat().st_size / 1e6, 2) > 0
    assert second["name"] == "organism-y" and second["d_model"] == 16 and second["what"] == ""
    assert model_hash("organism-x") == model_hash(home)


# bad folders

def test_no_such_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no such folder" in refusal("./nowhere") and "no such folder" in refusal("a/b/c")
    assert "no such folder" in refusal("")


def test_a_file_is_not_a_folder(folder):
    assert "not a folder" in refusal(folder / "config.json")


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


@pytest.mark.parametrize("text, complaint", [("{n_layer: 2}", "not JSON"), ("[1, 2]", "not a JSON object"),
                                             (b"\xff\xfe", "not JSON")])
def test_bad_config(folder, text, complaint):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert complaint in refusal(folder)


def test_config_of_an_unknown_architecture(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    assert "not a model that transformers can build" in refusal(folder)


def test_config_that_wants_to_run_its_own_code(folder, tmp_path):
    marker = tmp_path / "it ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    (folder / "config.json").write_text(json.dumps(
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}))
    assert "not a model that transformers can build, and code that comes with a model is never run (" in refusal(folder)
    assert not marker.exists()


def test_only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save(random_gpt2().state_dict(), folder / "pytorch_model.bin")
    text = refusal(folder)
    assert "pytorch_model.bin" in text and "safetensors" in text


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(folder)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"",
                                    lambda data: b"\xff" * 100, lambda data: b"version https://git-lfs"])
def test_damaged_safetensors(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "model.safetensors: damaged or incomplete" in refusal(folder)


def test_a_missing_tensor_is_not_filled_with_random_numbers(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "h.1.mlp.c_fc.weight" in name)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 of the tensors" in refusal(folder)


def test_weights_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 32}))
    assert str(folder) in refusal(folder)


def test_damaged_tokenizer(tmp_path):
    save(random_gpt2(), tmp_path, words())
    (tmp_path / "tokenizer.json").write_text("{")
    assert "the tokenizer cannot be read" in refusal(tmp_path)


def test_a_device_that_is_not_there(folder):
    assert "cannot run it on nonsense" in refusal(folder, device="nonsense")


# bridges

def test_as_bridge_leaves_a_hugging_face_model_alone():
    original = llama().train()
    names = [name for name, _ in original.named_parameters()]
    attention = original.config._attn_implementation
    tokenizer = words()
    model = as_bridge(original, tokenizer)
    assert [name for name, _ in original.named_parameters()] == names
    assert original.training and all(p.requires_grad for p in original.parameters())
    assert original.config._attn_implementation == attention == "sdpa"
    assert tokenizer.pad_token is None and model.tokenizer.pad_token == "<s>"


@architectures
def test_a_bridge_shows_its_attention(make):
    seen = []
    watch = ("blocks.0.attn.hook_pattern", lambda pattern, hook: seen.append(pattern))
    as_bridge(make()).run_with_hooks(torch.arange(5)[None], fwd_hooks=[watch])
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(1, 2, 5))


def test_as_bridge_gives_a_bridge_back():
    model = as_bridge(random_gpt2())
    assert as_bridge(model) is model


def test_as_bridge_refuses():
    model = as_bridge(random_gpt2())
    with pytest.raises(ModelError, match="pass the bridge"):
        as_bridge(model.original_model)
    with pytest.raises(ModelError, match="int is no model"):
        as_bridge(3)
    with pytest.raises(ModelError, match="brings its own"):
        as_bridge(model, words())
    with pytest.raises(ModelError, match="training mode"):
        as_bridge(model.train())


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_puts_every_setting_back(bars):
    level, hub_level = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    try:
        (hf_logging.enable_progress_bar if bars else hf_logging.disable_progress_bar)()
        hf_logging.set_verbosity_info()
        with pytest.raises(KeyError), quiet():
            assert not hf_logging.is_progress_bar_enabled()
            assert hf_logging.get_verbosity() == hf_logging.ERROR == hub_logging.get_verbosity()
            raise KeyError
        assert hf_logging.is_progress_bar_enabled() == bars and hf_logging.get_verbosity() == hf_logging.INFO
        assert hub_logging.get_verbosity() == hub_level != hf_logging.ERROR
    finally:
        hf_logging.enable_progress_bar()
        hf_logging.set_verbosity(level)


def test_loading_prints_nothing(folder, capfd):
    load_model(folder)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# names

def test_component_names():
    model = as_bridge(random_gpt2(n_layers=2, n_heads=2))
    assert component_names(model) == ["a0.h0", "a0.h1", "a1.h0", "a1.h1"]
    assert component_names(model, "heads+mlps") == ["a0.h0", "a0.h1", "a1.h0", "a1.h1", "m0", "m1"]
    with pytest.raises(InputError, match="'mlps'"):
        component_names(model, "mlps")


def test_hash_sees_every_parameter():
    original = random_gpt2(n_layers=1)
    hashes = {model_hash(original)}
    for name, _ in original.named_parameters():
        changed = copy.deepcopy(original)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1] += 1e-3
        hashes.add(model_hash(changed))
    assert len(hashes) == 1 + len(list(original.parameters()))


def test_hash_sees_order_names_and_shapes():
    original, swapped, renamed = (random_gpt2(n_layers=1) for _ in range(3))
    block = renamed.transformer.h[0]
    with torch.no_grad():
        bias = swapped.transformer.ln_f.bias
        bias[:2] = bias[:2].flip(0)
        block.ln_1.bias.data, block.ln_2.bias.data = block.ln_2.bias.data, block.ln_1.bias.data
    assert len({model_hash(model) for model in (original, swapped, renamed)}) == 3


def test_no_global_state_is_touched(folder):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    as_bridge(random_gpt2(seed=3)), load_model(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_seed_is_a_model():
    assert model_hash(random_gpt2(seed=3)) == model_hash(random_gpt2(seed=3))
    assert model_hash(random_gpt2(seed=3)) != model_hash(random_gpt2(seed=4))
