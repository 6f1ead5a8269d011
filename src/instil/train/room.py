"""A batch that does not fit into memory: nothing has changed yet, its packs are halved, the batch stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instil.errors import MachineError
from instil.pack.tree import build_pack
from instil.train.loss import learn
from instil.train.optim import MasterAdamW
from instil.types import Batch, Example, Pack


@dataclass
class Room:
    """What is known of the memory. examples: of the run, to halve packs with (none = a batch must fit as it is);
    limit_tokens: as of build_pack; most_tokens: larger packs have failed, and are halved before they are tried."""

    examples: Sequence[Example] = ()
    limit_tokens: int | None = None
    say: Callable[[str], None] = lambda line: None
    most_tokens: float = field(default=float("inf"))

    def learn(self, net: PreTrainedModel, optimizer: MasterAdamW, batch: Batch) -> list[Tensor]:
        """The gradients of a batch, added up in the optimizer; the sums [nll, right, entropy] of each pack.

        The loss is divided by the batch's weight_sum, so any split gives the same gradient (up to the order of its sums).
        Raises MachineError where a pack of a single example does not fit.
        """
        while True:
            packs = [part for pack in batch.packs for part in self._fitting(pack)]
            optimizer.zero()
            failed = 0
            losses = []
            for pack in packs:
                try:
                    part = learn(net, pack, batch.weight_sum)
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    failed = len(pack.tokens)
                    asked = str(error).splitlines()[0] if str(error) else "out of memory"
                if failed:  # outside of the handler: the traceback holds what the pack had allocated
                    break
                losses.append(torch.stack([part.nll.double(), part.right.double(), part.entropy.double()]))
            if not failed:
                return losses
            self._less(failed, pack, batch, asked)

    def _fitting(self, pack: Pack) -> list[Pack]:
        """The pack, or smaller ones of the same examples."""
        if len(pack.tokens) <= self.most_tokens or len(pack.examples) < 2 or not self.examples:
            return [pack]
        middle = len(pack.examples) // 2
        halves = (pack.examples[:middle], pack.examples[middle:])
        built = [build_pack([self.examples[i] for i in half], half, self.limit_tokens) for half in halves]
        return [part for half in built for part in self._fitting(half)]

    def _less(self, tokens: int, pack: Pack, batch: Batch, asked: str) -> None:
        """Note that packs of so many tokens do not fit, and say so."""
        place, what = f"step {batch.step + 1}", f"a pack of {tokens:,} tokens does not fit into memory"
        if len(pack.examples) < 2 or not self.examples:
            remedy = "use a smaller pack.tokens (--fresh), adapter.rank, or a machine with more memory"
            raise MachineError.at(place, f"{what} ({asked})", remedy, "memory")
        self.most_tokens = min(self.most_tokens, tokens // 2)
        self.say(f"{place}: {what}: packs of more than {self.most_tokens:,.0f} are halved, the batch stays the same")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an allocator says: of CUDA, of the CPU, or Python's own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
