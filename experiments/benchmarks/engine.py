"""How fast is the causal cone? Each question is asked of our engine and of what one would use today, in one process, on the same threads.

    make benchmarks                                                                   # everything: about half an hour on 2 cores
    .venv/bin/python experiments/benchmarks/engine.py --models organism-a --repeats 3  # a try

Times are medians of warm repeats. A peer whose passes cost the same for every edit is timed on a part of the edits, and the time of all
follows in proportion: `timed` says how many of `edits` were run.
"""

import argparse
import itertools
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from transformer_lens import patching

from circuit_generalization.ablation import Mask, capture, circuit_mask, universe_mask
from circuit_generalization.circuit import Circuit
from circuit_generalization.circuit_scorer import circuit_edits, head_masks, nothing
from circuit_generalization.cone import CleanRun, cone_flops, cone_logits
from circuit_generalization.forward import Edit, hooks_of
from circuit_generalization.measurement import to_csv
from circuit_generalization.models import as_bridge, load_model, quiet
from circuit_generalization.prompts import PromptSet

PROMPTS, TOKENS = 64, 16
PLACES = {"IO": 1, "S1": 3, "S1+1": 4, "S2": 10, "END": 15}
# The 26 heads of the IOI circuit in GPT-2 small, by where they act (Wang et al., 2022)
IOI = {"S2": "a0.h1 a0.h10 a3.h0 a5.h5 a5.h8 a5.h9 a6.h9", "S1+1": "a2.h2 a4.h11",
       "END": "a7.h3 a7.h9 a8.h6 a8.h10 a9.h6 a9.h9 a10.h0 a10.h7 a11.h10 a9.h0 a9.h7 a10.h1 a10.h2 a10.h6 a10.h10 a11.h2 a11.h9"}
# Eight heads of organism-a, as in its packaged circuit
ORGANISM = {"S2": "a0.h2 a1.h3 a1.h5", "S1+1": "a0.h3", "IO": "a0.h7", "END": "a1.h6 a2.h0 a3.h5"}


def warm_times(ask, repeats: int) -> list[float]:
    "Seconds of some repeats, after one that does not count."
    ask()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - start)
    return seconds


def peak_gflops(repeats: int, rows: int, d_in: int, d_out: int) -> float:
    "The machine's speed at a float32 matrix product of the size of an MLP's."
    a, b = torch.randn(rows, d_in), torch.randn(d_in, d_out)
    return 2 * rows * d_in * d_out / min(warm_times(lambda: a @ b, 5 * repeats)) / 1e9


class Bench:
    "One model, its prompts, and rows of the table."

    def __init__(self, name: str, repeats: int, timed: int, found):
        self.name, self.repeats, self.timed, self.found = name, repeats, timed, found
        torch.manual_seed(0)
        if name == "gpt2-shaped":
            with quiet(): self.model = as_bridge(transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval())
        else: self.model = load_model(name)
        cfg = self.model.cfg
        ids = torch.randint(0, cfg.d_vocab, (2, PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0))
        at = {role: [place] * PROMPTS for role, place in PLACES.items()}
        self.prompts = PromptSet.from_tokens(ids[0].tolist(), ids[1].tolist(), answers=[5] * PROMPTS, distractors=[7] * PROMPTS, positions=at)
        self.shape, self.new = (cfg.n_layers, cfg.n_heads), capture(self.model, self.prompts.counterfactual)
        self.universe = universe_mask(self.prompts, *self.shape, "heads")
        listed = IOI if name == "gpt2-shaped" else ORGANISM
        self.listed = {head: role for role, heads in listed.items() for head in heads.split()}
        self.peak = peak_gflops(repeats, 2048, cfg.d_model, cfg.d_mlp)

    def mask(self, heads) -> Mask:
        "Some heads at their listed positions."
        circuit = Circuit.from_components(list(heads), positions=[[self.listed[h]] for h in heads])
        return circuit_mask(circuit, self.prompts, *self.shape)

    # The engines

    def cone(self, edits, wanted=(5, 7)):
        run = CleanRun(self.model, self.prompts.tokens, self.prompts.lengths)
        return cone_logits(run, edits, None if wanted is None else torch.tensor(wanted))

    def plain_hooks(self, edits):
        "What one would write: a hook on every layer with something to replace."
        with torch.no_grad():
            return torch.stack([self.model.run_with_hooks(self.prompts.tokens, fwd_hooks=hooks_of(e))[:, -1] for e in edits])

    def transformer_lens(self, edits):
        "`get_act_patch_attn_head_out_all_pos`, for some heads: mean logit of token 5."
        heads = pd.DataFrame([e.mask.heads[0, 0].nonzero()[0].tolist() for e in edits], columns=["layer", "head"])
        cache = {f"blocks.{i}.attn.hook_z": self.new.z[:, :, i] for i in range(self.shape[0])}
        with torch.no_grad():
            return patching.get_act_patch_attn_head_out_all_pos(self.model, self.prompts.tokens, cache, lambda logits: logits[:, -1, 5].mean(),
                                                                index_axis_names=None, index_df=heads)

    # The table

    def compare(self, question: str, edits, peer, target: float, starts=None):
        "Our time for all edits, the peer's, and how far their answers differ."
        ours = warm_times(lambda: self.cone(edits), self.repeats)
        part = [edits[i] for i in np.unique(np.linspace(0, len(edits) - 1, min(len(edits), self.timed)).astype(int))]
        theirs = warm_times(lambda: peer(part), self.repeats)
        fast, slow = self.cone(part, None), peer(part)
        difference = (fast - slow if slow.ndim > 1 else fast[..., 5].mean(1) - slow).abs().max().item()
        mine, other = statistics.median(ours), len(edits) / len(part) * statistics.median(theirs)
        def spread(times): return (max(times) - min(times)) / statistics.median(times)
        row = dict(model=self.name, question=question, edits=len(edits), ours_s=mine, ours_spread=spread(ours), peer=peer.__name__.replace("_", " "),
                   timed=len(part), peer_s=other, peer_spread=spread(theirs), ratio=other / mine, target=target, largest_difference=difference)
        if starts:
            flops = PROMPTS * sum(cone_flops(self.model.cfg, layer, window, TOKENS, 2) for layer, window in starts)
            row |= dict(gflop=flops / 1e9, peak_gflops=self.peak, lower_bound_s=flops / 1e9 / self.peak, share_of_peak=flops / 1e9 / self.peak / mine)
        self.found(row)

    def run(self):
        "All questions."
        heads, n_heads = list(self.listed), self.shape[1]
        sweep = [Edit(m, self.new) for m in head_masks(self.universe)]
        self.compare("each head, all positions", sweep, self.transformer_lens, 2.5, [(i // n_heads, 0) for i in range(len(sweep))])
        place = {h: (int(h[1:h.index(".")]), PLACES[self.listed[h]]) for h in heads}
        singles = [Edit(self.mask([h]), self.new) for h in heads]
        self.compare("each head of a circuit, listed position", singles, self.plain_hooks, 8, list(place.values()))
        pairs = list(itertools.combinations(heads, 2))
        starts = [tuple(map(min, zip(place[a], place[b], strict=True))) for a, b in pairs]
        self.compare("each pair of a circuit's heads", [Edit(self.mask(p), self.new) for p in pairs], self.plain_hooks, 6, starts)
        four = [nothing(self.prompts, *self.shape), Edit(self.universe, self.new), *circuit_edits(self.universe, self.mask(heads), self.new)]
        self.compare("scoring: model, all ablated, circuit, complement", four, self.plain_hooks, 1.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2-shaped", "organism-a"], help="'gpt2-shaped' (random weights), or an embedded model")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken (%(default)s)")
    parser.add_argument("--timed", type=int, default=12, help="edits on which a peer is timed (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "results" / "benchmarks", help="folder of engine.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "transformer-lens")}
    used = dict(repeats=options.repeats, threads=options.threads, machine=platform.machine(), **versions)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []

    def found(row):
        "Print a row, and write all so far: a run that is stopped has lost only what it did not finish."
        rows.append(row | used)
        to_csv(pd.DataFrame(rows), options.out / "engine.csv")
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    for name in options.models: Bench(name, options.repeats, options.timed, found).run()
    print(f"Wrote {options.out / 'engine.csv'}.")


if __name__ == "__main__": main()
