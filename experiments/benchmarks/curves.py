"""How long is MIB's curve? Ten circuits of a scored graph on GPT-2 small's shape, with random weights and random scores.

    .venv/bin/python experiments/benchmarks/curves.py     # a minute or two; writes results/benchmarks/curves.csv

Seconds are those of one core's work (CPU time, one thread), so that other work on the machine does not count.
Floating-point operations are PyTorch's own count of the matrix products.
"""

import time
from pathlib import Path

import pandas as pd
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from circuit_generalization.graph_curves import cfg_of, graph_curve, random_graph
from circuit_generalization.measurement import to_csv
from circuit_generalization.models import as_bridge, quiet
from circuit_generalization.prompts import PromptSet

PROMPTS, TOKENS = 8, 16


def timed(model, prompts, graph) -> dict:
    "CPU seconds of the second run; operations of one."
    with FlopCounterMode(display=False) as counter: graph_curve(model, prompts, graph)
    start = time.process_time()
    graph_curve(model, prompts, graph)
    return dict(cpu_seconds=time.process_time() - start, gflop=counter.get_total_flops() / 1e9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with quiet(): bridge = as_bridge(transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval())
    ids = torch.randint(0, bridge.cfg.d_vocab, (2, PROMPTS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    found = timed(bridge, PromptSet.from_tokens(*ids, [5] * PROMPTS, [7] * PROMPTS), random_graph(cfg_of(bridge)))
    row = dict(model="gpt2-shaped", prompts=PROMPTS, tokens=TOKENS) | found
    to_csv(pd.DataFrame([row]), Path(__file__).parents[2] / "results" / "benchmarks" / "curves.csv")
    print(row)
