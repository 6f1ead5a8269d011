"""The vocabulary projection and its loss: instil's head against the textbook's, and against its matrix products alone.

    .venv/bin/python benchmarks/head.py [--tokens 512] [--share 0.4] [--vocabulary 49152] [--width 576] [--rounds 5]

Forward and backward of hidden states and a tied weight, bf16, from random numbers. The textbook projects every position,
makes float32 logits and calls cross_entropy, as transformers' own loss does; ours projects targets only. `products` are
the three matrix products that ours cannot do without. Before any time, loss and gradients of the two must agree. Each is
timed in turn, the least of --rounds counts; peak memory is that of a process of its own. Writes results/head.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from train_cpu import machine, own_peak_bytes

HERE = Path(__file__).parent
KINDS = ("tensors", "textbook", "instil", "products")


def main() -> None:
    """Compare, time, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, value in (
        ("tokens", int, 512), ("share", float, 0.4), ("vocabulary", int, 49152), ("width", int, 576), ("rounds", int, 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value)
    parser.add_argument("--only", choices=KINDS, help="print the peak memory of one of them, and no more")
    args = parser.parse_args()
    if args.only:
        case = Case(args)
        if args.only != "tensors":
            case.run(args.only)
        print(own_peak_bytes())
        return
    case = Case(args)
    case.compare()
    seconds = {kind: float("inf") for kind in KINDS[1:]}
    for _ in range(args.rounds):
        for kind in seconds:
            start = time.perf_counter()
            case.run(kind)
            seconds[kind] = min(seconds[kind], time.perf_counter() - start)
    options = [f"--{name}={getattr(args, name)}" for name in ("tokens", "share", "vocabulary", "width")]
    command = [sys.executable, __file__, *options]
    memory = {kind: int(subprocess.check_output([*command, f"--only={kind}"])) for kind in KINDS}
    result = {
        "seconds": {kind: round(s, 4) for kind, s in seconds.items()},
        "textbook_over_instil": round(seconds["textbook"] / seconds["instil"], 2),
        "instil_over_products": round(seconds["instil"] / seconds["products"], 2),
        "memory_mb_beyond_the_tensors": {k: round((memory[k] - memory["tensors"]) / 1e6) for k in KINDS[1:]},
        "machine": machine(), "load_average": os.getloadavg()[0], "arguments": vars(args),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    (HERE / "results" / "head.json").write_text(json.dumps(result, indent=2) + "\n")


class Case:
    """Random hidden states, weight and targets, and the ways to their loss and gradients."""

    def __init__(self, args: argparse.Namespace):
        import numpy as np
        import torch

        from instil.model.head import Triples
        from instil.model.machine import set_up_machine

        set_up_machine(None)
        torch.manual_seed(0)
        count = round(args.tokens * args.share)
        at = np.sort(np.random.default_rng(0).permutation(args.tokens)[:count])
        target = np.random.default_rng(1).integers(0, args.vocabulary, count)
        self.triples = Triples.of(at, target, np.ones(count, np.float32))
        self.labels = torch.full((args.tokens,), -100)
        self.labels[torch.from_numpy(at)] = torch.from_numpy(target)
        self.hidden = torch.randn(args.tokens, args.width).bfloat16().requires_grad_()
        self.weight = (torch.randn(args.vocabulary, args.width) / 30).bfloat16().requires_grad_()

    def run(self, kind: str) -> float:
        """Forward and backward; the loss."""
        self.hidden.grad = self.weight.grad = None
        ways: dict[str, Callable[[], float]] = {
            "textbook": self.textbook, "instil": self.instil, "products": self.products
        }  # fmt: skip
        return ways[kind]()

    def textbook(self) -> float:
        import torch

        logits = torch.nn.functional.linear(self.hidden, self.weight).float()
        loss = torch.nn.functional.cross_entropy(logits, self.labels, reduction="sum")
        loss.backward()
        return loss.item()

    def instil(self) -> float:
        from instil.model.head import Head, weighted_nll

        found = weighted_nll(self.hidden, Head(self.weight, None), self.triples)
        found.nll.backward()
        return found.nll.item()

    def products(self) -> float:
        import torch

        with torch.no_grad():
            h = self.hidden[self.triples.rows]
            z = torch.nn.functional.linear(h, self.weight)
            (z @ self.weight, z.t() @ h)
        return 0.0

    def compare(self) -> None:
        """Both ways give one loss and one gradient, as far as bf16 goes."""
        found = []
        for kind in ("textbook", "instil"):
            loss = self.run(kind)
            found.append((loss, self.hidden.grad.float(), self.weight.grad.float()))
        (a, *ours), (b, *theirs) = found
        if abs(a - b) > 1e-3 * abs(a):
            sys.exit(f"head: the losses disagree: {a} and {b}")
        for x, y in zip(ours, theirs, strict=True):
            if float((x - y).norm()) > 0.02 * float(x.norm()):
                sys.exit("head: the gradients disagree")


if __name__ == "__main__":
    main()
