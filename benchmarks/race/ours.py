"""instil's worker: the loop's own parts (loader, step, optimizer, allocator) on the examples of one run after another.

Everything of instil that the race trains with is called here, as run.py and train/loop.py call it.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from pipe import Meter, Pipe


@dataclasses.dataclass(frozen=True)
class Lora:
    """What add_lora asks for; alpha and the layers are its defaults (2 * rank, all linear layers)."""

    rank: int
    alpha: float | None = None
    targets: list[str] = dataclasses.field(default_factory=list)


def main() -> None:
    pipe = Pipe()
    job = pipe.job
    from instil.cli.console import share_cores

    share_cores()
    import torch

    from instil.model.adapters import add_lora
    from instil.model.load import load_model
    from instil.model.machine import release_free_memory, set_up_machine
    from instil.model.memory import fitting_tokens
    from instil.pack.loader import Loader
    from instil.pack.plan import plan_steps
    from instil.pack.prefixes import Prefixes
    from instil.pack.store import open_store
    from instil.train.loop import RELEASE_EVERY_STEPS
    from instil.train.optim import MasterAdamW
    from instil.train.step import step

    set_up_machine(job["threads"])
    cpu, dtype = torch.device("cpu"), {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    store = open_store(Path(job["packs"]))[0]["train"]
    longest = int(store.lengths.max())
    loaded = dtype if job["rank"] else torch.float32  # frozen weights need no masters
    net = load_model(Path(job["model"]), dtype=loaded, device=cpu, longest_tokens=longest)
    if job["rank"]:
        add_lora(net, Lora(job["rank"]), "demo", job["seed"])
    net.train()
    optimizer = MasterAdamW(net, dtype=dtype, weight_decay=job["weight_decay"])
    limit = fitting_tokens(net, dtype, cpu)
    loaders = []
    for i, (wanted, steps) in enumerate(zip(job["runs"], job["steps"], strict=True)):
        examples = [store[j] for j in wanted]
        prefixes = Prefixes.of(examples)
        plan = plan_steps(prefixes, len(examples) / steps, limit)
        loaders.append(Loader(examples, prefixes, plan, seed=job["seed"] + i))
    pipe.send(settings={"precision": job["precision"], "rank": job["rank"], "most_tokens_of_a_pack": limit})
    meter, done = Meter(), 0
    while (number := pipe.wait()) is not None:
        meter.begin()
        for i in range(loaders[number].plan.steps_per_epoch):
            batch = loaders[number].batch(i)
            stats = step(net, optimizer, batch, lr=job["lr"], clip_norm=job["clip_norm"])
            if done % RELEASE_EVERY_STEPS == 0:
                release_free_memory()
            done += 1
            meter.step(stats.loss, stats.target_tokens, stats.computed_tokens)
        pipe.send(**meter.result())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
