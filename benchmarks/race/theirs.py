"""TRL's worker: SFTTrainer itself, in its own loop, paused by a callback after the steps of each run.

Runs in TRL's virtual environment, without instil. The rows come tokenised, with labels (-100 = not learnt), which
SFTTrainer takes as they are; what a setting changes of SFTConfig is in the job's "config", all else is its default.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pipe import Meter, Pipe
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

# On a CPU, nothing saved, logged or reported, no row cut. The order of the rows is made by the race.
NEEDED = {
    "use_cpu": True, "save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
}  # fmt: skip
SHOWN = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "optim", "packing",
    "packing_strategy", "padding_free", "max_length", "learning_rate", "lr_scheduler_type", "weight_decay",
    "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "loss_type", "torch_compile",
)  # fmt: skip


class Counted(SFTTrainer):
    """SFTTrainer that notes what each micro-batch held and what loss it returned."""

    part_losses: list[float]
    target_tokens = computed_tokens = 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.target_tokens += int((inputs["labels"][:, 1:] != -100).sum())
        self.computed_tokens += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.part_losses.append(float(loss))
        return loss


class Pause(TrainerCallback):
    """Waits for the next run's number wherever a run has ended."""

    def __init__(self, pipe: Pipe, steps: list[int]):
        self.pipe, self.steps, self.meter, self.left = pipe, steps, Meter(), 0
        self.trainer: Counted

    def _wait(self, control: Any) -> None:
        number = self.pipe.wait()
        if number is None:
            control.should_training_stop = True
            return
        self.left = self.steps[number]
        self._clear()
        self.meter.begin()

    def _clear(self) -> None:
        self.trainer.part_losses, self.trainer.target_tokens, self.trainer.computed_tokens = [], 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t = self.trainer
        self.meter.step(sum(t.part_losses), t.target_tokens, t.computed_tokens)
        self._clear()
        self.left -= 1
        if self.left == 0:
            self.pipe.send(**self.meter.result())
            self._wait(control)


def main() -> None:
    warnings.filterwarnings("ignore")
    pipe = Pipe()
    job = pipe.job
    torch.set_num_threads(job["threads"])
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    chosen = [rows[i] for run in job["runs"] for i in run]
    data = Dataset.from_list(chosen)
    config, steps = dict(job["config"]), sum(job["steps"])
    if config.get("packing"):  # packs, not rows, are dealt to the steps: as many to each as the data gives
        packs = len(pack_dataset(data.select_columns(["input_ids", "labels"]), config["max_length"], "bfd"))
        config["gradient_accumulation_steps"] = max(1, round(packs / steps / config["per_device_train_batch_size"]))
    args = SFTConfig(output_dir=job["scratch"], max_steps=steps, **NEEDED, **({"max_length": None} | config))
    lora = None
    if job["rank"]:
        from peft import LoraConfig

        lora = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    pause = Pause(pipe, job["steps"])
    trainer = Counted(
        model=job["model"],
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[pause],
        peft_config=lora,
    )
    pause.trainer = trainer
    kept = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    if kept != sum(len(row["input_ids"]) for row in chosen):
        raise SystemExit(f"SFTTrainer kept {kept} of the tokens it was given")
    dtypes = sorted({f"{str(p.dtype).removeprefix('torch.')}" for p in trainer.model.parameters()})
    shown = {name: getattr(args, name) for name in SHOWN} | {"parameters": dtypes, "rank": job["rank"]}
    shown["attention"] = trainer.model.config._attn_implementation
    pipe.send(settings=json.loads(json.dumps(shown, default=str)))
    trainer.train()


if __name__ == "__main__":
    main()
