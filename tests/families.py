"""Small models with random weights, of every architecture that the fast engine claims."""

import torch
import transformers

from circuit_generalization.models import as_bridge, random_gpt2

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32)
FAMILIES = dict(
    gpt2=lambda: random_gpt2(seed=0, n_layers=3, n_heads=4, d_model=32, n_vocab=97),
    one_layer=lambda: random_gpt2(seed=0, n_layers=1, n_heads=2, d_model=32, n_vocab=97),
    llama=lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    grouped=lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
    pythia=lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, rotary_pct=0.25)),
    in_turn=lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=False)),
)


def made(name):
    "A model with random weights, large enough that a mistake shows."
    torch.manual_seed(0)
    hf = FAMILIES[name]().eval()
    with torch.no_grad():
        for p in hf.parameters(): p.mul_(1 if hf.config.model_type == "gpt2" else 2)  # our own are large as they are
    return as_bridge(hf)
