"""Data preparation against TRL's: rows of a file to stored examples, one core, tokens per second, paired A-B-B-A.

    python benchmarks/data.py --data train.jsonl.gz --model demo --trl /path/to/trl-venv/bin/python

TRL (see requirements.txt) lives in a virtual environment of its own. Both sides read the same JSONL from disk, with the
same tokenizer and template, in a fresh process pinned to one core, and keep their result on disk: ours examples in
`packs/`, TRL's the Arrow file that SFTTrainer's own preparation writes. Importing and loading the model do not count.
Ours is given twice: as TRL's, and with the certificate, which TRL has not. Tokens are those of whole conversations.
Kinds of data: `pairs` = prompt and completion, of which TRL's defaults learn the completion; `turns` = conversations of
ten such exchanges of which the answers are learnt (TRL: assistant_only_loss, which needs the {% generation %} blocks of
the template below). --data has a question and an answer a row (JSONL, may be gzip). Writes results/data.json.
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

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\\n{% else %}{{ message['content'] }}<|im_end|>"
    "\\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)

TRL = """
import json, os, sys, time
import torch, transformers
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
file, model, out, template, kind = sys.argv[1:6]
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.chat_template = open(template).read()
net = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                   num_attention_heads=2, num_key_value_heads=2))
args = SFTConfig(output_dir=out, max_length=None, packing=False, report_to=[], use_cpu=True, bf16=False,
                 assistant_only_loss=kind == "turns",
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
import gc
from instil.chat.certificate import certify
from instil.chat.pairs import make_examples
from instil.data.mixture import load_conversations
from instil.model.locate import locate
from instil.pack.store import publish_examples
from instil.prepare import chat_options, configured, open_chat, sources
file, model, out, template, kind = sys.argv[1:6]
config = configured([file], model)
folder = locate(model, need_weights=False).path
chat = open_chat(folder, template)
options = chat_options(config, folder, chat.tokenizer)
gc.disable()  # as workers.py does
began = time.perf_counter()
rows = load_conversations(sources(config))
pairs = make_examples(rows.conversations, chat.tokenizer, chat.template, options)
publish(Path(out) / "packs", {"train": pairs.examples}, {})
seconds = time.perf_counter() - began
certificate, faults = certify(pairs.examples, rows.conversations, chat.tokenizer, chat.template, rows.digests, options)
certified_seconds = time.perf_counter() - began
assert not faults and not pairs.problems and certificate["checked"] == len(pairs.examples)
last = {example.origin: example for example in pairs.examples}
tokens = sum(len(e.prompt_tokens) + len(e.answer_tokens) for e in last.values())
print("RESULT", json.dumps({"seconds": seconds, "certified_seconds": certified_seconds, "tokens": tokens, "rows": len(last)}))
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
        lines = [
            {"messages": [message for pair in exchanges[i : i + 10] for message in pair]}
            for i in range(0, len(exchanges) - 9, 10)
        ]
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
            template = Path(folder) / "template.jinja"
            template.write_text(TEMPLATE, encoding="utf-8")
            pairs = []
            for round_number in range(given.rounds):
                order = [("ours", sys.executable, OURS), ("trl", given.trl, TRL)]
                order = order if round_number % 2 == 0 else order[::-1]
                found = {}
                for name, python, program in order:
                    with tempfile.TemporaryDirectory() as out:
                        found[name] = measured(python, program, file, model, out, str(template), kind)
                ours, trl = found["ours"], found["trl"]
                ratio = ours["tokens_per_s"] / trl["tokens_per_s"]
                certified = ours["tokens"] / ours["certified_seconds"] / trl["tokens_per_s"]
                pairs.append(found | {"ratio": ratio, "certified_ratio": certified, "load": os.getloadavg()[0]})
                print(kind, f"ratio {ratio:.2f}, with the certificate {certified:.2f}", json.dumps(found), flush=True)
            results[kind] = {
                name: {"median": statistics.median(p[name] for p in pairs), "worst": min(p[name] for p in pairs)}
                for name in ("ratio", "certified_ratio")
            } | {"rounds": pairs}  # type: ignore[dict-item]
    cpu = next((line.partition(": ")[2].strip() for line in open("/proc/cpuinfo") if "model name" in line), "")
    record = {"machine": f"{os.cpu_count()} cores, {cpu}, {platform.python_version()}", "date": time.strftime("%Y-%m-%d"),
              "rows": len(rows), "results": results}  # fmt: skip
    (HERE / "results" / "data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
