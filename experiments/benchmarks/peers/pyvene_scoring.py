"""Run by `peers.py` in pyvene's own environment: the model, all heads ablated, the circuit alone, its complement.

    python pyvene_scoring.py FOLDER REPEATS THREADS
"""

import json
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pyvene
import torch
import transformers


def groups(kept: dict[str, list[int]], n_heads: int, width: int) -> list[tuple[list[int], list[int]]]:
    "Heads of one layer that are replaced at the same positions: (heads, positions), everything but what is kept."
    found: dict[tuple, list[int]] = {}
    for head in range(n_heads):
        at = tuple(p for p in range(width) if p not in kept.get(str(head), []))
        if at: found.setdefault(at, []).append(head)
    return [(heads, list(at)) for at, heads in found.items()]


class Question:
    "One set of interventions, all from the same source."

    def __init__(self, model, parts: list[tuple[int, list[int], list[int]]], n_prompts: int):
        self.where = [[[heads] * n_prompts, [at] * n_prompts] for _, heads, at in parts]
        config = [pyvene.RepresentationConfig(layer, "head_attention_value_output", "h.pos", len(heads), group_key=0) for layer, heads, _ in parts]
        self.model = pyvene.IntervenableModel(pyvene.IntervenableConfig(config, intervention_types=pyvene.VanillaIntervention), model, use_fast=False)

    def __call__(self, base, source):
        return self.model({"input_ids": base}, [{"input_ids": source}], {"sources->base": (self.where, self.where)})[1].logits[:, -1]


def main(folder: Path, repeats: int, threads: int):
    torch.set_num_threads(threads)
    given = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    clean, donor = torch.tensor(given["clean"]), torch.tensor(given["donor"])
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "model").float().eval().requires_grad_(False)
    n_layers, n_heads, (n, width) = model.config.n_layer, model.config.n_head, clean.shape
    kept = given["kept"]  # layer → head → positions
    everything = [(layer, list(range(n_heads)), list(range(width))) for layer in range(n_layers)]
    alone = [(layer, *group) for layer in range(n_layers) for group in groups(kept.get(str(layer), {}), n_heads, width)]
    without = [(int(layer), [int(head)], at) for layer, heads in kept.items() for head, at in heads.items()]
    questions = [Question(model, parts, n) for parts in (everything, alone, without)]

    def ask():
        with torch.no_grad(): return torch.stack([model(clean).logits[:, -1], *(q(clean, donor) for q in questions)])

    logits, seconds = ask(), []
    for _ in range(repeats):
        start = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - start)
    np.save(folder / "pyvene.npy", logits.numpy())
    versions = {name: metadata.version(name) for name in ("pyvene", "torch", "transformers")}
    found = dict(seconds=seconds, median=statistics.median(seconds), versions=versions)
    (folder / "pyvene.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__": main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
