"""TRL's settings: its defaults, what was known to be its best, and the choices that a sweep tries one after another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

LEAST_CAPACITY_TOKENS = 512  # of a pack; a longer row makes it longer. Its masks grow with the square of it
MOST_TOKENS = 4096  # of an unswept micro-batch: the logits of all its positions take some 3 MB a token


@dataclass(frozen=True)
class Setting:
    """How TRL trains. order: `shuffled` rows, rows `sorted` by length within a run, or `packed` ones (bfd).

    weights: `autocast` = float32 weights under bf16=True, `bf16` = weights loaded in bf16, `bf16 under autocast`, `fp32`.
    batch: rows (packs) of a micro-batch; accumulation makes up the step. checkpointing: of activations.
    plain: SFTConfig's own defaults are left to say all this.

    Sorting stands for train_sampling_strategy="group_by_length": that one shuffles within windows of 50 steps, of which
    a run is a small part, so it would begin with the longest rows and reach the short ones after the race.
    """

    order: str = "sorted"
    weights: str = "bf16"
    batch: int = 8
    checkpointing: bool = False
    plain: bool = False

    def __str__(self) -> str:
        saved = ", checkpointing" if self.checkpointing else ""
        return f"{self.order}, {self.weights}, {self.batch} at a time{saved}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def fitting(self, rows: int, longest_tokens: int) -> Setting:
        """This with the largest micro-batch, up to its own, that divides the rows and stays within MOST_TOKENS."""
        most = max(1, min(self.batch, rows, MOST_TOKENS // longest_tokens))
        return replace(self, batch=next(batch for batch in range(most, 0, -1) if rows % batch == 0))

    def config(self, rows: int, longest_tokens: int) -> dict[str, Any]:
        """What this changes of SFTConfig, for steps of so many rows."""
        batch = min(self.batch, rows)
        found: dict[str, Any] = {"gradient_accumulation_steps": rows // batch, "per_device_train_batch_size": batch}
        if self.plain:
            if batch == self.batch:
                del found["per_device_train_batch_size"]
            return found
        found |= {"gradient_checkpointing": self.checkpointing, "bf16": "autocast" in self.weights}
        found |= {"optim": "adamw_torch_fused"}
        if self.weights.startswith("bf16"):
            found["model_init_kwargs"] = {"dtype": "bfloat16"}
        if self.order == "packed":  # shuffled, so that no run gets only the long ones
            found |= {"packing": True, "packing_strategy": "bfd", "shuffle_dataset": True}
            found["max_length"] = max(LEAST_CAPACITY_TOKENS, longest_tokens)
        return found

    def ordered(self, run: list[int], lengths: list[int], seed: int) -> list[int]:
        """The rows of a run in the order in which TRL is to get them."""
        rows = list(run)
        random.Random(seed).shuffle(rows)
        return sorted(rows, key=lambda i: -lengths[i]) if self.order == "sorted" else rows


DEFAULT = Setting(order="shuffled", weights="autocast", batch=8, checkpointing=True, plain=True)
KNOWN_BEST = Setting(order="packed", batch=1)


def choices(best: Setting, rows: int, stage: str) -> Iterator[Setting]:
    """What a stage of the sweep compares, `best` being the winner so far."""
    if stage == "order":
        yield from (replace(best, order="shuffled"), replace(best, order="sorted"))
        yield replace(best, order="packed", batch=1)
    elif stage == "weights":
        yield from (replace(best, weights=weights) for weights in ("bf16", "autocast", "bf16 under autocast"))
    elif stage == "batch" and best.order != "packed":
        yield from (replace(best, batch=batch) for batch in (1, 2, 4, 8, 16) if rows % batch == 0 and batch <= rows)


STAGES = ("order", "weights", "batch")
