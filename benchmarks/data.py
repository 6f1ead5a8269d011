"""Data preparation against TRL's: rows of a file to stored examples, one core, tokens per second, paired A-B-B-A.

    python benchmarks/data.py --data train.jsonl.gz --model demo --trl /path/to/trl-venv/bin/python

TRL (see requirements.txt) lives in a virtual environment of its own. Both sides read the same JSONL from disk, with the
same tokenizer and template, in a fresh process pinned to one core, and keep their result on disk: ours certified examples
in `packs/`, TRL's the Arrow file that SFTTrainer's own preparation writes. Importing and loading the model do not count.
Kinds of data: `pairs` = question and answer; `turns` = conversations of ten such exchanges. --data has a question and an
answer a row (JSONL, may be gzip). Writes results/data.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ONE_CORE = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

TRL = """
import json, os, sys, time
import torch, transformers
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
file, model, out = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(model)
net = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                   num_attention_heads=2, num_key_value_heads=2))
args = SFTConfig(output_dir=out, max_length=None, packing=False, report_to=[], use_cpu=True, bf16=False,
                 eos_token=tokenizer.eos_token, pad_token=tokenizer.eos_token)
began = time.perf_counter()
rows = load_dataset("json", data_files=file, split="train", cache_dir=out)
trainer = SFTTrainer(model=net, args=args, train_dataset=rows, processing_class=tokenizer)
seconds = time.perf_counter() - began
tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
print("RESULT", json.dumps({"seconds": seconds, "tokens": tokens, "rows": len(rows)}))
"""

OURS = """
import json, sys, time
from pathlib import Path
from instil.data.mixture import load_conversations
from instil.model.locate import locate
from instil.pack.store import publish
from instil.prepare import chat_options, configured, open_chat, sources
from instil.workers import certified
file, model, out = sys.argv[1:4]
config = configured([file], model)
folder = locate(model, need_weights=False).path
chat = open_chat(folder, None)
options = chat_options(config, folder, chat.tokenizer)
began = time.perf_counter()
rows = load_conversations(sources(config))
found = certified(rows.conversations, chat.tokenizer, chat.template, options, rows.digests, workers=1)
publish(Path(out) / "packs", {"train": found.pairs.examples}, {"certificate": found.certificate})
seconds = time.perf_counter() - began
assert not found.faults and not found.pairs.problems
last = {example.origin: example for example in found.pairs.examples}
tokens = sum(len(e.prompt_tokens) + len(e.answer_tokens) for e in last.values())
print("RESULT", json.dumps({"seconds": seconds, "tokens": tokens, "rows": len(last)}))
"""


def written(kind: str, rows: list[dict[str, str]], folder: Path) -> Path:
    """The data as a file that both sides read: prompt and completion as messages, or whole conversations."""
    file = folder / f"{kind}.jsonl"
    exchanges = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    if kind == "pairs":
        lines = [{"prompt": pair[:1], "completion": pair[1:]} for pair in exchanges]
    else:
        lines = [{"messages": sum(exchanges[i : i + 10], [])} for i in range(0, len(exchanges) - 9, 10)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def measured(python: str, program: str, *arguments: str) -> dict[str, float]:
    """One fresh process on one core."""
    command = ["taskset", "-c", "0", python, "-c", program, *arguments]
    done = subprocess.run(command, env=os.environ | ONE_CORE, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    return found | {"tokens_per_s": found["tokens"] / found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--trl", required=True, help="python of TRL's virtual environment")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    opened = gzip.open if given.data.endswith(".gz") else open
    with opened(given.data, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    from instil.model.locate import locate

    model = str(locate(given.model, need_weights=False).path)
    results: dict[str, object] = {}
    for kind in ("pairs", "turns"):
        with tempfile.TemporaryDirectory() as folder:
            file = str(written(kind, rows, Path(folder)))
            pairs = []
            for round_number in range(given.rounds):
                order = [("ours", sys.executable, OURS), ("trl", given.trl, TRL)]
                order = order if round_number % 2 == 0 else order[::-1]
                found = {}
                for name, python, program in order:
                    with tempfile.TemporaryDirectory() as out:
                        found[name] = measured(python, program, file, model, out)
                pairs.append(found | {"ratio": found["ours"]["tokens_per_s"] / found["trl"]["tokens_per_s"]})
                print(kind, f"ratio {pairs[-1]['ratio']:.2f}", json.dumps(found), f"load {os.getloadavg()[0]:.1f}", flush=True)
            ratios = [pair["ratio"] for pair in pairs]
            results[kind] = {"median_ratio": statistics.median(ratios), "worst_ratio": min(ratios), "rounds": pairs}
    cpu = next((line.partition(": ")[2].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")
    record = {"machine": f"{os.cpu_count()} cores, {cpu}, {platform.python_version()}", "date": time.strftime("%Y-%m-%d"),
              "rows": len(rows), "results": results}  # fmt: skip
    (HERE / "results" / "data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
