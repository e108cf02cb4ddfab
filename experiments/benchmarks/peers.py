"""The same claims about a circuit, asked of this package and of pyvene and AutoCircuit, each in an environment of its own.

    make benchmarks-peers                                             # installs them under .peers/, then half an hour on 2 cores
    .venv/bin/python experiments/benchmarks/peers.py --repeats 1 --models organism-a

pyvene is asked what a node circuit does: model, all heads ablated, circuit alone, complement. AutoCircuit is asked what an edge circuit
does: alone, complement. Replacements come from a donor prompt each, whose run counts, for us too. All answers are compared.
"""

import argparse
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from engine import Bench, gpt2_shaped, warm_times

from circuit_generalization.ablation import capture
from circuit_generalization.circuit import Circuit
from circuit_generalization.circuit_scorer import circuit_edits, nothing
from circuit_generalization.edges import capture_senders, every_edge
from circuit_generalization.forward import Edit, run_edits
from circuit_generalization.measurement import to_csv
from circuit_generalization.models import find_model
from circuit_generalization.views import edge_logits

HERE = Path(__file__).parent
REQUIRED = {"pyvene": ["pyvene"], "autocircuit": ["auto-circuit", "transformer-lens<3", "datasets<4", "pyarrow<19"]}  # it wants NumPy 1
EDGES = 963  # of GPT-2 small's, as many as the canonical IOI graph has; as large a share elsewhere


def environment(name: str, folder: Path) -> Path:
    "The Python of a peer's own environment, made where it is missing."
    python = folder / name / "bin" / "python"
    if python.exists(): return python
    print(f"Installing {', '.join(REQUIRED[name])} in {folder / name}.", flush=True)
    venv.create(folder / name, with_pip=True)
    constraint = next(line for line in (HERE.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    try:
        for packages in ([constraint], [*REQUIRED[name], constraint]): subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(folder / name)
        raise SystemExit(f"{name} could not be installed; its row is left out with --peers") from None
    return python


class Claims:
    "A model, a circuit of nodes and one of edges, and our answers about them."

    def __init__(self, bench: Bench):
        self.bench, self.prompts, self.model = bench, bench.prompts, bench.model
        every = every_edge(*bench.shape)
        chosen = random.Random(0).sample(every, round(EDGES * len(every) / len(every_edge(12, 12))))
        self.edges = Circuit((), "heads+mlps", edges=tuple(chosen))
        self.mask = bench.mask(bench.listed)

    def pyvene(self):
        "Model, all ablated, circuit, complement."
        new = capture(self.model, self.prompts.counterfactual)
        alone, without = circuit_edits(self.bench.universe, self.mask, new)
        edits = [nothing(self.prompts, *self.bench.shape), Edit(self.bench.universe, new), alone, without]
        return run_edits(self.model, self.prompts.tokens, self.prompts.lengths, edits)

    def autocircuit(self):
        "The edges alone, and all but them."
        clean, new = (capture_senders(self.model, t, "heads+mlps") for t in (self.prompts.tokens, self.prompts.counterfactual))
        return torch.stack([edge_logits(self.model, self.prompts, self.edges, clean, new, keep) for keep in ("circuit", "complement")])

    def write(self, folder: Path):
        "The model and the questions, for the peers."
        if self.bench.name == "gpt2-shaped": gpt2_shaped().save_pretrained(folder / "model")
        else: shutil.copytree(find_model(self.bench.name), folder / "model")
        kept: dict = {}
        for layer, head in self.mask.heads[0].any(0).nonzero().tolist():
            kept.setdefault(layer, {})[head] = self.mask.heads[0, :, layer, head].nonzero()[:, 0].tolist()
        questions = dict(clean=self.prompts.tokens.tolist(), donor=self.prompts.counterfactual.tolist(), kept=kept, edges=self.edges.edges)
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")


def compare(claims: Claims, peer: str, python: Path, repeats: int, threads: int) -> dict:
    "One row: our time, the peer's, and how far the answers differ."
    ours = warm_times(getattr(claims, peer), repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        claims.write(folder)
        subprocess.run([python, HERE / "peers" / f"{peer}_scoring.py", folder, str(repeats), str(threads)], check=True)
        theirs, answers = json.loads((folder / f"{peer}.json").read_text(encoding="utf-8")), torch.from_numpy(np.load(folder / f"{peer}.npy"))
    mine = statistics.median(ours)
    def spread(times): return (max(times) - min(times)) / statistics.median(times)
    return dict(model=claims.bench.name, peer=peer, question=getattr(Claims, peer).__doc__, ours_s=mine, ours_spread=spread(ours),
                peer_s=theirs["median"], peer_spread=spread(theirs["seconds"]), ratio=theirs["median"] / mine,
                largest_difference=(getattr(claims, peer)() - answers).abs().max().item(), repeats=repeats, threads=threads,
                machine=platform.machine(), torch=metadata.version("torch"),
                peer_versions=" ".join(f"{k}={v}" for k, v in theirs["versions"].items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2-shaped", "organism-a"], help="'gpt2-shaped' (random weights), or an embedded model")
    parser.add_argument("--peers", nargs="+", choices=list(REQUIRED), default=list(REQUIRED))
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (%(default)s)")
    parser.add_argument("--environments", type=Path, default=HERE.parents[1] / ".peers", help="folder of the peers' environments")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "results" / "benchmarks", help="folder of peers.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pythons = {peer: environment(peer, options.environments) for peer in options.peers}
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.models:
        claims = Claims(Bench(name, options.repeats, 1, rows.append))
        for peer, python in pythons.items():
            rows.append(compare(claims, peer, python, options.repeats, options.threads))
            to_csv(pd.DataFrame(rows), options.out / "peers.csv")
            print({k: rows[-1][k] for k in ("model", "peer", "ours_s", "peer_s", "ratio", "largest_difference")}, flush=True)
    print(f"Wrote {options.out / 'peers.csv'}.")


if __name__ == "__main__": sys.exit(main())
