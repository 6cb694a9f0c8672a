"""Experiments against closed forms: ``python benchmarks/closed_form.py --output docs/figures`` (docs/closed-form.md).

Writes one figure per experiment and ``closed_form.json`` into the folder above; on one core of a busy machine it took 19 minutes.
``--only NAME`` runs one experiment and keeps the others' results.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from crd.toy.experiments import EXPERIMENTS
from crd.toy.figures import FIGURES


def main(output: Path, only: list[str], seeds: int) -> None:
    path = output.parent / "closed_form.json"
    for name in only:
        began = time.perf_counter()
        numbers = EXPERIMENTS[name](seeds)
        results = json.loads(path.read_text()) if path.exists() else {}
        results[name] = {"seeds": seeds, "seconds": round(time.perf_counter() - began), "results": numbers}
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        FIGURES[name](output / f"closed_form_{name}.png", numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder of the figures")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="experiments to run")
    parser.add_argument("--seeds", type=int, choices=range(2, 6), default=5, help="runs of every variant")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    main(arguments.output, arguments.only, arguments.seeds)
