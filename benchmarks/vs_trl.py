"""instil against TRL 1.16.0 on a CPU: target tokens/s and peak memory, once the losses of both are shown to agree.

    .venv/bin/python benchmarks/vs_trl.py [--gsm8k train.jsonl.gz] [--workloads a,b,c,d,e] [--full] [--lora] [--sweep]

Workloads, all with SmolLM2-135M-Instruct (the `demo` model): a = GSM8K (or, without --gsm8k, words of the same lengths),
b = long-tailed lengths, c = one tool schema of 2,000 tokens before every row, d = four answers to a prompt, e =
conversations of ten turns, which TRL trains as one sequence with all answers as targets. Both trainers get the same
tokens and the same targets, already tokenised: preparing data is benchmarks/data.py's race.

First the losses: 20 steps of a little of every kind, the same rows in the same order, in float32 (every step within
1e-4) and in bf16 (as near to float32 as TRL's bf16 is, within a factor of 1.5). If they disagree there are no speeds.
Then the speeds, against TRL tuned and TRL as it comes: each trainer in a process of its own, one running at a time,
A-B-B-A, two warm-up steps not counted, every pair on rows of its own that both train on entirely. --sweep looks for
TRL's best settings (order of rows, packing, precision, micro-batch); they are kept and used by later races.

TRL lives in a virtual environment of its own: --trl-python, or one made once in the user's cache (requirements.txt).
Writes results/vs_trl.json after every race; what is not raced this time stays as it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from race.settings import DEFAULT, KNOWN_BEST, STAGES, Setting, choices
from race.worker import EndedError, RaceError, Worker, trl_python, versions
from race.workloads import PARITY, WORKLOADS, Data, Workload, data_of
from train_cpu import machine

HERE = Path(__file__).parent
WARM_UP_STEPS = 2
RANKS = {"full": 0, "lora": 16}
RATES = {"full": 2e-5, "lora": 2e-4}
FP32_TOLERANCE = 1e-4  # nats per target token, at every step
BF16_FACTOR = 1.5  # bf16: instil's distance from float32 may be at most so many times TRL's


def main() -> None:
    """Losses, sweeps, races; each is recorded as soon as it is done."""
    given = arguments()
    try:
        race_all(given)
    except RaceError as error:
        sys.exit(f"vs_trl: {error}")
    except KeyboardInterrupt:
        sys.exit("vs_trl: stopped; what was finished is in the results")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="python of an environment with TRL; without it one is made in the cache")
    parser.add_argument("--gsm8k", type=Path, help='rows {"question", "answer"}, JSONL or gzip, for workload a')
    parser.add_argument("--workloads", default="a,b,c,d,e")
    parser.add_argument("--full", action="store_true", help="full fine-tuning (also without --lora)")
    parser.add_argument("--lora", action="store_true", help="LoRA, rank 16, all linear layers")
    parser.add_argument("--against", default="tuned,default", help="TRL's settings: tuned, default or both")
    parser.add_argument("--rounds", type=int, default=3, help="of A-B-B-A, so two pairs each")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; the workload's own without")
    parser.add_argument("--batch", type=int, help="TRL's rows of a step; the workload's own without")
    parser.add_argument("--sweep", action="store_true", help="look for TRL's best settings first")
    parser.add_argument("--sweep-steps", type=int, help="of a try; the workload's own without")
    parser.add_argument("--parity-only", action="store_true")
    parser.add_argument(
        "--keep-parity", action="store_true", help="losses compared before, with these versions, will do"
    )
    parser.add_argument("--parity-steps", type=int, default=20, help="fewer only to try the script")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory-gb", type=float, help="a worker may use; without it 60%% of what is free now")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vs_trl.json")
    given = parser.parse_args()
    given.workloads = given.workloads.split(",")
    given.against = given.against.split(",")
    if unknown := [name for name in given.workloads if name not in WORKLOADS]:
        parser.error(f"--workloads: {unknown[0]!r} is none of {', '.join(WORKLOADS)}")
    if unknown := [name for name in given.against if name not in ("tuned", "default")]:
        parser.error(f"--against: {unknown[0]!r} is neither tuned nor default")
    if given.gsm8k is not None and not given.gsm8k.is_file():
        parser.error(f"--gsm8k: {given.gsm8k} is no file")
    given.modes = [mode for mode in RANKS if getattr(given, mode)] or ["full"]
    return given


def race_all(given: argparse.Namespace) -> None:
    """The story: losses first, then for every mode and workload the sweep and the races."""
    from instil.model.locate import locate

    trl = trl_python(
        given.trl_python, HERE / "requirements.txt", HERE.parent / "constraints.txt", lora="lora" in given.modes
    )
    ground = Ground(
        str(locate("demo", need_weights=True).path), trl, given.threads, int(1e9 * (given.memory_gb or 0.6 * free_gb()))
    )
    record = json.loads(given.out.read_text()) if given.out.exists() else {}
    about = {
        "machine": machine(), "threads": given.threads, "versions": {"trl": versions(trl), "instil": versions(sys.executable)},
    }  # fmt: skip

    def keep(kind: str, mode: str, name: str | None, found: dict[str, Any]) -> None:
        found |= {"about": about | {"date": time.strftime("%Y-%m-%d"), "load_average": os.getloadavg()[0]}}
        place = record.setdefault(kind, {})
        place = place.setdefault(mode, {}) if name else place
        place[name or mode] = found
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")

    for mode in given.modes:
        found = record.get("parity", {}).get(mode)
        if given.keep_parity and found and found["agree"] and found["about"]["versions"] == about["versions"]:
            continue
        found = parity(ground, mode, given.parity_steps)
        keep("parity", mode, None, found)
        say(f"{mode}: {told(found)}")
        if not found["agree"]:
            raise RaceError(f"{mode}: the losses disagree, so speeds would mean nothing ({told(found)})")
    if given.parity_only:
        return
    print(HEADER)
    for mode in given.modes:
        for name in given.workloads:
            workload = chosen(WORKLOADS[name], given)
            with tempfile.TemporaryDirectory(prefix="race-") as folder:
                runs = 1 + max(2 * given.rounds, 1)
                rows = workload.rows * (WARM_UP_STEPS + (runs - 1) * workload.steps)
                data = prepared(workload, rows, Path(folder), given.gsm8k)
                if given.sweep:
                    keep("sweeps", mode, name, sweep(ground, mode, workload, data, given.sweep_steps or workload.steps))
                for against in given.against:
                    setting, why = DEFAULT, "as it comes"
                    if against == "tuned":
                        setting, why = best(
                            record.get("sweeps", {}).get(mode, {}).get(name), about, workload.rows, data
                        )
                    found = race(ground, mode, workload, data, setting, given.rounds)
                    found |= {"setting": setting.as_dict(), "chosen": why, "data": data.data.told}
                    keep("races", mode, f"{name} against {against}", found)
                    print(line_of(mode, name, against, found), flush=True)


def chosen(workload: Workload, given: argparse.Namespace) -> Workload:
    """The workload with what the command line says of its size."""
    return replace(workload, rows=given.batch or workload.rows, steps=given.steps or workload.steps)


def free_gb() -> float:
    """Memory that a process could take now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6


@dataclass(frozen=True)
class Prepared:
    """A workload's data, and where the files of it are that the workers read."""

    data: Data
    rows: Path
    packs: Path


def prepared(workload: Workload, rows: int, folder: Path, gsm8k: Path | None = None) -> Prepared:
    """The rows of a workload made and written, for instil as stored examples and for TRL as JSON."""
    from instil.pack.store import publish_examples

    try:
        data = data_of(workload, rows, folder, seed=0, gsm8k=gsm8k)
    except ValueError as error:
        raise RaceError(str(error)) from error
    publish_examples(folder / "packs", {"train": data.examples}, {})
    file = folder / "trl.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data.rows))
    return Prepared(data, file, folder / "packs")


@dataclass(frozen=True)
class Ground:
    """What all races share: the model's folder, TRL's python, threads, and the memory that a worker may take."""

    model: str
    trl: str
    threads: int
    memory_bytes: int

    def _job(self, mode: str, steps: list[int]) -> dict[str, Any]:
        return {
            "model": self.model, "threads": self.threads, "memory_bytes": self.memory_bytes, "rank": RANKS[mode],
            "steps": steps, "seed": 42, "lr": RATES[mode],
        }  # fmt: skip

    def ours(
        self, mode: str, data: Prepared, runs: list[list[int]], steps: list[int], *, precision: str, decay: float
    ) -> Worker:
        """instil on the examples of those rows."""
        of_row = data.data.of_row
        job = self._job(mode, steps) | {
            "packs": str(data.packs), "runs": [[i for row in run for i in of_row[row]] for run in runs],
            "precision": precision, "weight_decay": decay, "clip_norm": 1.0,
        }  # fmt: skip
        return Worker("instil", sys.executable, "ours.py", job)

    def theirs(
        self, mode: str, data: Prepared, runs: list[list[int]], steps: list[int], config: dict[str, Any]
    ) -> Worker:
        """TRL on those rows, in that order."""
        job = self._job(mode, steps) | {"rows": str(data.rows), "runs": runs, "config": config}
        return Worker("TRL", self.trl, "theirs.py", job)


def parity(ground: Ground, mode: str, steps: int) -> dict[str, Any]:
    """Losses of the same steps from both trainers, in float32 and in bf16, and whether they agree."""
    rows, decay = PARITY.rows, 0.01
    equal = {
        "learning_rate": RATES[mode], "weight_decay": decay, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "gradient_checkpointing": False,
    }  # fmt: skip
    runs = [list(range(i * rows, (i + 1) * rows)) for i in range(steps)]
    ones = [1] * steps
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        data = prepared(PARITY, steps * rows, Path(folder))

        def losses(worker: Worker) -> list[float]:
            with worker:
                return [worker.run(i)["losses"][0] for i in range(steps)]

        def of_ours(precision: str) -> list[float]:
            return losses(ground.ours(mode, data, runs, ones, precision=precision, decay=decay))

        def of_trl(bf16: bool, batch: int) -> list[float]:
            split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": rows // batch, "bf16": bf16}
            return losses(ground.theirs(mode, data, runs, ones, equal | split))

        say(f"{mode}: losses of {steps} steps in float32, then in bf16")
        fp32 = {"instil": of_ours("fp32"), "trl": of_trl(False, 2)}
        bf16 = {"instil": of_ours("bf16")} | {f"trl, {batch} at a time": of_trl(True, batch) for batch in (4, 2, 1)}
    return {
        "fp32": fp32, "bf16": bf16, "settings": equal, "rows_per_step": rows, "data": data.data.told,
        **compared(fp32, bf16),
    }  # fmt: skip


def compared(fp32: dict[str, list[float]], bf16: dict[str, list[float]]) -> dict[str, Any]:
    """How far losses are apart, largest and mean, and whether that is near enough.

    float32, in which both must be the same, is the measure of bf16: what rounding makes of instil's losses may be at most
    BF16_FACTOR times what it makes of TRL's. TRL's ways of cutting a step into micro-batches share the rounded weights, so
    they round alike: how far they are apart says how repeatable TRL is, not how exact. That narrower bound is recorded
    (`within_trl_noise`), not asked for.
    """
    exact = fp32["trl"]
    ours, *trl = bf16.values()
    error, allowed = apart(ours, exact), farthest([apart(each, exact) for each in trl])
    differences = {
        "fp32": apart(fp32["instil"], exact),
        "bf16_instil_to_fp32": error,
        "bf16_trl_to_fp32": allowed,
        "bf16_instil_to_trl": farthest([apart(ours, each) for each in trl]),
        "bf16_trl_to_itself": farthest([apart(a, b) for a, b in itertools.combinations(trl, 2)]),
    }
    agree = differences["fp32"]["largest"] < FP32_TOLERANCE
    apart_bf16, noise = differences["bf16_instil_to_trl"], differences["bf16_trl_to_itself"]
    agree &= all(error[kind] <= BF16_FACTOR * allowed[kind] for kind in error)
    within = all(apart_bf16[kind] <= noise[kind] for kind in noise)
    return {"differences": differences, "agree": agree, "within_trl_noise": within}


def apart(a: list[float], b: list[float]) -> dict[str, float]:
    """The largest and the mean absolute difference of two series of losses."""
    found = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return {"largest": max(found), "mean": statistics.mean(found)}


def farthest(found: list[dict[str, float]]) -> dict[str, float]:
    """The largest of each kind."""
    return {kind: max(each[kind] for each in found) for kind in found[0]}


def told(found: dict[str, Any]) -> str:
    """The losses' verdict in a line."""
    shown = {name: f"{d['largest']:.1e} (mean {d['mean']:.1e})" for name, d in found["differences"].items()}
    return (
        f"losses {'agree' if found['agree'] else 'DISAGREE'}: float32 within {shown['fp32']}; bf16 from float32: instil "
        f"{shown['bf16_instil_to_fp32']}, TRL {shown['bf16_trl_to_fp32']}; in bf16 instil is "
        f"{shown['bf16_instil_to_trl']} from TRL, TRL {shown['bf16_trl_to_itself']} from itself in other micro-batches"
    )


def sweep(ground: Ground, mode: str, workload: Workload, data: Prepared, steps: int) -> dict[str, Any]:
    """TRL's best setting, found a stage at a time; every try is recorded, those that failed with what they said."""
    rows = workload.rows
    start = rows * WARM_UP_STEPS
    runs = [list(range(rows)), list(range(start, start + rows * steps))]
    winner, tried = KNOWN_BEST.fitting(rows, data.data.told["longest_tokens"]), {}
    for stage in STAGES:
        for setting in choices(winner, rows, stage):
            if str(setting) in tried:
                continue
            tried[str(setting)] = {"setting": setting.as_dict(), "target_tokens_per_s": 0.0} | one_try(
                ground, mode, data, setting, runs, [1, steps], rows
            )
            say(f"{mode}, {workload.what}: {setting}: {tried[str(setting)]['target_tokens_per_s']:.1f} target tokens/s")
        fastest = max(tried.values(), key=lambda one: one["target_tokens_per_s"])
        winner = Setting(**fastest["setting"])
    if not fastest["target_tokens_per_s"]:
        raise RaceError(f"TRL trained with none of the settings: {fastest.get('failed')}")
    return {"best": winner.as_dict(), "rows_per_step": rows, "steps": steps, "tried": list(tried.values())}


def one_try(
    ground: Ground, mode: str, data: Prepared, setting: Setting, runs: list[list[int]], steps: list[int], rows: int
) -> dict[str, Any]:
    """A setting on one run after one warm-up step."""
    try:
        with ground.theirs(mode, data, *laid_out(data, setting, runs, steps, rows)) as worker:
            worker.run(0)
            found = worker.run(1)
    except EndedError:
        raise
    except RaceError as error:
        return {"failed": str(error)}
    return {"target_tokens_per_s": found["target_tokens"] / found["wall_s"], "run": found, "load": os.getloadavg()[0]}


def laid_out(
    data: Prepared, setting: Setting, runs: list[list[int]], steps: list[int], rows: int
) -> tuple[list[list[int]], list[int], dict[str, Any]]:
    """The arguments of Ground.theirs for a setting: rows in its order, steps, what SFTConfig is told."""
    lengths = [len(row["input_ids"]) for row in data.data.rows]
    ordered = [setting.ordered(run, lengths, seed) for seed, run in enumerate(runs)]
    return ordered, steps, setting.config(rows, max(lengths))


def best(found: dict[str, Any] | None, about: dict[str, Any], rows: int, data: Prepared) -> tuple[Setting, str]:
    """The winner of a sweep on this machine with steps of this size, else what is known to be good."""
    if found and found["about"]["machine"] == about["machine"] and found["rows_per_step"] == rows:
        return Setting(**found["best"]), f"best of the sweep of {found['about']['date']}"
    fitting = KNOWN_BEST.fitting(rows, data.data.told["longest_tokens"])
    return fitting, "the best that a sweep found on workload a; not swept here"


def race(
    ground: Ground, mode: str, workload: Workload, data: Prepared, setting: Setting, rounds: int
) -> dict[str, Any]:
    """A-B-B-A: pair by pair, both trainers on the same rows, one after the other."""
    rows, steps = workload.rows, [WARM_UP_STEPS] + [workload.steps] * 2 * rounds
    starts = [sum(steps[:i]) * rows for i in range(len(steps) + 1)]
    runs = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    pairs = []
    with ExitStack() as stack:
        ours = stack.enter_context(ground.ours(mode, data, runs, steps, precision="bf16", decay=0.0))
        theirs = stack.enter_context(ground.theirs(mode, data, *laid_out(data, setting, runs, steps, rows)))
        both = {"instil": ours, "trl": theirs}
        warm_up = {name: worker.run(0) for name, worker in both.items()}
        for number in range(1, len(runs)):
            order = ("instil", "trl") if number % 2 else ("trl", "instil")
            found: dict[str, Any] = {name: both[name].run(number) for name in order}
            a, b = found["instil"], found["trl"]
            if setting.order != "packed" and a["target_tokens"] != b["target_tokens"]:
                raise RaceError(
                    f"instil trained {a['target_tokens']} targets, TRL {b['target_tokens']}, of the same rows"
                )
            ratios = {key: rate(a, key) / rate(b, key) for key in ("wall_s", "cpu_s")}
            pairs.append({"first": order[0], **found, "ratio": ratios, "load_average": os.getloadavg()[0]})
            say(
                f"{workload.what}, pair {number}: {ratios['wall_s']:.2f} by the clock, {ratios['cpu_s']:.2f} by processor"
            )
        settings = {name: worker.settings for name, worker in both.items()}
    peak = {name: max(pair[name]["peak_rss_bytes"] for pair in pairs) for name in both}
    return {
        "settings": settings, "rows_per_step": rows, "steps_per_run": workload.steps, "rounds": rounds,
        "ratio": {
            kind: {"median": statistics.median(values), "worst": min(values)}
            for kind, key in (("wall", "wall_s"), ("cpu", "cpu_s"))
            for values in [[pair["ratio"][key] for pair in pairs]]
        },
        "target_tokens_per_s": {
            name: statistics.median(rate(pair[name], "wall_s") for pair in pairs) for name in both
        },
        "peak_rss_bytes": peak, "peak_rss_ratio": peak["instil"] / peak["trl"], "warm_up": warm_up, "pairs": pairs,
    }  # fmt: skip


def rate(run: dict[str, Any], key: str) -> float:
    """Target tokens per second of a run, by the clock or by processor time."""
    return float(run["target_tokens"] / run[key])


HEADER = (
    "                          target tokens/s    ratio by the clock   ratio by processor   peak memory, GB\n"
    "mode  load  TRL           instil     TRL     median    worst      median    worst      instil   TRL   ratio"
)


def line_of(mode: str, name: str, against: str, found: dict[str, Any]) -> str:
    """A race as a line of the table."""
    speed, ratio, peak = found["target_tokens_per_s"], found["ratio"], found["peak_rss_bytes"]
    return (
        f"{mode:5} {name:5} {against:10} {speed['instil']:9.1f} {speed['trl']:7.1f} {ratio['wall']['median']:10.2f} "
        f"{ratio['wall']['worst']:8.2f} {ratio['cpu']['median']:11.2f} {ratio['cpu']['worst']:8.2f} "
        f"{peak['instil'] / 1e9:11.2f} {peak['trl'] / 1e9:6.2f} {found['peak_rss_ratio']:6.2f}"
    )


def say(line: str) -> None:
    """To people, beside the table."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
