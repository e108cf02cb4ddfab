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
from circuit_generalization.attribution import edge_attribution
from circuit_generalization.circuit import Circuit
from circuit_generalization.circuit_scorer import circuit_edits, head_masks, nothing
from circuit_generalization.cone import CleanRun, cone_flops, cone_logits
from circuit_generalization.edges import capture_senders, every_edge
from circuit_generalization.forward import Edit, PathEdit, hooks_of, path_patch_with_hooks
from circuit_generalization.measurement import to_csv
from circuit_generalization.models import as_bridge, load_model, quiet
from circuit_generalization.prompts import PromptSet
from circuit_generalization.views import edge_logits, path_logits

PROMPTS, TOKENS, WANTED = 64, 16, (5, 7)  # the tokens wanted: an answer and a distractor
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


def gpt2_shaped():
    "GPT-2 small with random weights, the same each time: speed does not depend on them."
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()


class Bench:
    "One model, its prompts, and rows of the table."

    def __init__(self, name: str, repeats: int, timed: int, found):
        self.name, self.repeats, self.timed, self.found = name, repeats, timed, found
        if name == "gpt2-shaped":
            with quiet(): self.model = as_bridge(gpt2_shaped())
        else: self.model = load_model(name)
        cfg = self.model.cfg
        ids = torch.randint(0, cfg.d_vocab, (2, PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0))
        at = {role: [place] * PROMPTS for role, place in PLACES.items()}
        answer, distractor = ([token] * PROMPTS for token in WANTED)
        self.prompts = PromptSet.from_tokens(ids[0].tolist(), ids[1].tolist(), answer, distractor, positions=at)
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

    def cone(self, edits, wanted=WANTED):
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

    def paths_in_cone(self, paths):
        run = CleanRun(self.model, self.prompts.tokens, self.prompts.lengths)
        return path_logits(run, paths, token_ids=torch.tensor(WANTED))

    def paths_with_hooks(self, paths):
        clean = capture(self.model, self.prompts.tokens)
        return torch.stack([path_patch_with_hooks(self.model, self.prompts.tokens, self.prompts.lengths, p, clean, token_ids=torch.tensor(WANTED))
                            for p in paths])

    def one_edge_at_a_time(self, edges):
        "Effects on LD, each edge ablated exactly, with shared views."
        clean = capture_senders(self.model, self.prompts.tokens, "heads+mlps")
        alone = [Circuit((), "heads+mlps", edges=(e,)) for e in edges]
        ids = torch.tensor(WANTED)
        return torch.stack([edge_logits(self.model, self.prompts, c, clean, self.senders, "complement", ids) for c in alone])

    def attributed(self, edges):
        found = edge_attribution(self.model, self.prompts, self.senders)
        return torch.stack([found.of(e) for e in edges])

    # The table

    def compare(self, question: str, items: list, ours, peer, target: float | None = None, starts=None, agree=None):
        "Our time for all items, the peer's, and how far their answers differ."
        mine = warm_times(lambda: ours(items), self.repeats)
        part = [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(len(items), self.timed)).astype(int))]
        theirs = warm_times(lambda: peer(part), self.repeats)
        seconds, other = statistics.median(mine), len(items) / len(part) * statistics.median(theirs)
        def spread(times): return (max(times) - min(times)) / statistics.median(times)
        row = dict(model=self.name, question=question, edits=len(items), ours_s=seconds, ours_spread=spread(mine),
                   peer=peer.__name__.replace("_", " "), timed=len(part), peer_s=other, peer_spread=spread(theirs), ratio=other / seconds,
                   target=target, largest_difference=agree(part).abs().max().item() if agree else np.nan)
        if starts:
            flops = PROMPTS * sum(cone_flops(self.model.cfg, layer, window, TOKENS, 2) for layer, window in starts)
            bound = flops / 1e9 / self.peak
            row |= dict(gflop=flops / 1e9, peak_gflops=self.peak, lower_bound_s=bound, share_of_peak=bound / seconds)
        self.found(row)

    def nodes(self):
        "The questions about edits of heads."
        heads, n_heads = list(self.listed), self.shape[1]
        def by_hooks(part): return self.cone(part, None) - self.plain_hooks(part)
        sweep = [Edit(m, self.new) for m in head_masks(self.universe)]
        self.compare("each head, all positions", sweep, self.cone, self.transformer_lens, 2.5, [(i // n_heads, 0) for i in range(len(sweep))],
                     lambda part: self.cone(part)[..., 0].mean(1) - self.transformer_lens(part))
        place = {h: (int(h[1:h.index(".")]), PLACES[self.listed[h]]) for h in heads}
        singles = [Edit(self.mask([h]), self.new) for h in heads]
        self.compare("each head of a circuit, listed position", singles, self.cone, self.plain_hooks, 8, list(place.values()), by_hooks)
        pairs = list(itertools.combinations(heads, 2))
        starts = [tuple(map(min, zip(place[a], place[b], strict=True))) for a, b in pairs]
        double = [Edit(self.mask(p), self.new) for p in pairs]
        self.compare("each pair of a circuit's heads", double, self.cone, self.plain_hooks, 6, starts, by_hooks)
        four = [nothing(self.prompts, *self.shape), Edit(self.universe, self.new), *circuit_edits(self.universe, self.mask(heads), self.new)]
        self.compare("scoring: model, all ablated, circuit, complement", four, self.cone, self.plain_hooks, 1.5, agree=by_hooks)

    def paths(self):
        "The questions about paths and edges."
        n_layers, n_heads = self.shape
        def path(layer, head, receiver, at=None): return PathEdit((layer, head), receiver, self.new.z[:, :, layer, head], at, at)
        def agree(part): return self.paths_in_cone(part) - self.paths_with_hooks(part)
        every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        self.compare("each head's path to the logits", [path(*h, "logits") for h in every], self.paths_in_cone, self.paths_with_hooks, agree=agree)
        at = torch.zeros_like(self.prompts.tokens, dtype=torch.bool).index_fill(1, torch.tensor(PLACES["END"]), True)
        mover = next((int(h[1:h.index(".")]), int(h.split("h")[1]), "q") for h in reversed(self.listed) if self.listed[h] == "END")
        to_mover = [path(*h, mover, at) for h in every if h[0] < mover[0]]
        self.compare(f"each earlier head's path to the query of a{mover[0]}.h{mover[1]}, END", to_mover, self.paths_in_cone, self.paths_with_hooks,
                     agree=agree)
        self.senders = capture_senders(self.model, self.prompts.counterfactual, "heads+mlps")
        self.compare("each edge, to first order", list(every_edge(*self.shape)), self.attributed, self.one_edge_at_a_time)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2-shaped", "organism-a"], help="'gpt2-shaped' (random weights), or an embedded model")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken (%(default)s)")
    parser.add_argument("--timed", type=int, default=6, help="edits on which a peer is timed (%(default)s)")
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

    for name in options.models:
        bench = Bench(name, options.repeats, options.timed, found)
        bench.nodes()
        bench.paths()
    print(f"Wrote {options.out / 'engine.csv'}.")


if __name__ == "__main__": main()
