"""instil: supervised fine-tuning of language models, where an example is a pair: prompt tokens, answer tokens.

    config = instil.load_config(Path("config.yaml"), ["train.lr=1e-5"])
    run = instil.train(config)                       # the run folder; the same call resumes
    print(instil.evaluate(str(run)).loss)            # nats per target token on held-out answers
    pairs = instil.examples(["train.jsonl"], "demo")  # what training on a file would learn

Everything is imported on first use, so that `import instil` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from instil.audit import check
    from instil.config import Config, load_config
    from instil.errors import DataError, DivergedError, InstilError, MachineError, ModelError, UsageError
    from instil.measure import Evaluation, evaluate
    from instil.prepare import examples
    from instil.run import Listener, train
    from instil.types import Conversation, Example, Message, Pack

_HOMES = {
    "Config": "config", "load_config": "config",
    "InstilError": "errors", "UsageError": "errors", "DataError": "errors", "ModelError": "errors",
    "MachineError": "errors", "DivergedError": "errors",
    "Evaluation": "measure", "evaluate": "measure",
    "check": "audit", "examples": "prepare",
    "Listener": "run", "train": "run",
    "Message": "types", "Conversation": "types", "Example": "types", "Pack": "types",
}  # fmt: skip

__all__ = [
    "Config", "Conversation", "DataError", "DivergedError", "Evaluation", "Example", "InstilError", "Listener",
    "MachineError", "Message", "ModelError", "Pack", "UsageError", "check", "evaluate", "examples", "load_config",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'instil' has no attribute {name!r}")
    return getattr(import_module(f"instil.{_HOMES[name]}"), name)


class _Root(ModuleType):
    """`instil.train` and `instil.evaluate` stay the functions when Python binds the folders of those names here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root
