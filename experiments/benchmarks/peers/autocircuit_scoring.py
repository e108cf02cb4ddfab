"""Run by `peers.py` in AutoCircuit's own environment: a circuit's edges alone, and all but them.

    python autocircuit_scoring.py FOLDER REPEATS THREADS
"""

import json
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import transformers
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune import run_circuits
from auto_circuit.types import AblationType, PatchType
from auto_circuit.utils.graph_utils import patchable_model
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights


def named(edge: str) -> str:
    "AutoCircuit's name of an edge such as 'a0.h1->a2.h3<q>'."
    def end(name):
        if name in ("input", "logits"): return {"input": "Resid Start", "logits": "Resid End"}[name]
        if name[0] == "m": return f"MLP {name[1:]}"
        layer, head = name[1:].split("<")[0].split(".h")
        return f"A{layer}.{head}" + (f".{name[-2].upper()}" if "<" in name else "")
    return "->".join(map(end, edge.split("->")))


def loaded(folder: Path):
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder / "model").float().eval()
    c = hf.config
    cfg = HookedTransformerConfig(n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.n_positions, d_head=c.n_embd // c.n_head, n_heads=c.n_head,
                                  d_mlp=c.n_inner or 4 * c.n_embd, d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN",
                                  eps=c.layer_norm_epsilon, device="cpu", default_prepend_bos=False)
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    for use in (model.set_use_attn_result, model.set_use_hook_mlp_in, model.set_use_split_qkv_input): use(True)
    return patchable_model(model, factorized=True, slice_output="last_seq", separate_qkv=True, device=torch.device("cpu"))


def main(folder: Path, repeats: int, threads: int):
    torch.set_num_threads(threads)
    given = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    clean, donor, model = torch.tensor(given["clean"]), torch.tensor(given["donor"]), loaded(folder)
    n, one = len(clean), torch.tensor([0])
    loader = PromptDataLoader(PromptDataset(list(clean), list(donor), [one] * n, [one] * n), seq_len=None, diverge_idx=0, batch_size=n, shuffle=False)
    scores = {name: torch.zeros_like(value) for name, value in model.new_prune_scores().items()}
    own = {e.name: e for e in model.edges}
    for edge in map(named, given["edges"]): scores[own[edge].dest.module_name][own[edge].patch_idx] = 1.0

    def ask():
        ways = {PatchType.TREE_PATCH: False, PatchType.EDGE_PATCH: True}  # reversed: the clean prompt, and the circuit's edges from the donor
        found = [run_circuits(model, loader, [len(given["edges"])], scores, patch_type=how, ablation_type=AblationType.RESAMPLE,
                              reverse_clean_corrupt=back) for how, back in ways.items()]
        return torch.stack([next(iter(next(iter(f.values())).values())) for f in found])

    logits, seconds = ask(), []
    for _ in range(repeats):
        start = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - start)
    np.save(folder / "autocircuit.npy", logits.detach().numpy())
    versions = {name: metadata.version(name) for name in ("auto-circuit", "torch", "transformer-lens")}
    found = dict(seconds=seconds, median=statistics.median(seconds), versions=versions)
    (folder / "autocircuit.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__": main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
