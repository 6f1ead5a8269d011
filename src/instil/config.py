"""One strict configuration tree: every key, its default, unit and range, once; and where each value came from."""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML

from instil.errors import SECRET, Problem, UsageError, masked
from instil.yamltext import read_value, read_yaml

Share = Annotated[float, Field(ge=0, lt=1)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # no names of files on Windows


class Section(BaseModel):
    """A part of the tree: frozen, no unknown keys. null means "chosen for you", and the run folder records the choice."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SourceConfig(Section):
    """One entry of data.train that is more than a path."""

    path: str = Field(min_length=1, description="file, folder, glob or hub name")
    mapping: dict[str, Any] = Field(default_factory=dict, description="as data.mapping, for this source")
    repeat: float = Field(1.0, gt=0, le=1000, description="passes over this source in an epoch")
    weight: float | None = Field(None, gt=0, description="share of the epoch's target tokens; all sources or none")


class DataConfig(Section):
    train: Annotated[
        list[str | SourceConfig],
        Field(min_length=1, description="files, folders, globs, hub names, or {path, mapping, repeat, weight}"),
    ]
    heldout: str | Share = Field(0.05, description="file, or share of the training rows, to measure on; 0 = none")
    heldout_most: int = Field(200, ge=1, description="rows that a share of heldout takes at most")
    mapping: dict[str, Any] = Field(default_factory=dict, description="columns and roles of rows in no known format")
    too_long: Literal["drop", "error", "trim-context"] = Field(
        "drop", description="examples longer than a pack; trim-context = old turns leave the prompt, answers stay whole"
    )
    drop_most: float = Field(0.05, ge=0, le=1, description="share of the rows that may be dropped before the run stops")
    strict: bool = Field(False, description="rows that would be dropped for what they hold are errors")
    leak: Literal["error", "drop", "allow"] = Field("error", description="training rows that are held out as well")


class ChatConfig(Section):
    control_text: Literal["plain", "reject", "as-served"] = Field(
        "plain", description="control tokens typed in the data: plain text, an error, or control tokens"
    )
    terminator: str | None = Field(
        None, min_length=1, description="text the server stops at; null = found in the template's output"
    )
    template_args: dict[str, Any] = Field(default_factory=dict, description="template variables, e.g. enable_thinking")


class TargetsConfig(Section):
    turns: Literal["all", "last", "everything"] = Field(
        "all", description="answers that are learnt; everything = all of them and the prompts too"
    )
    loss_per: Literal["token", "example"] = Field("token", description="what counts alike in a step's mean")
    answer: float = Field(1.0, ge=0, le=1000, description="weight of answer text")
    reasoning: float = Field(1.0, ge=0, le=1000, description="weight of reasoning")
    tool_call: float = Field(1.0, ge=0, le=1000, description="weight of tool calls")
    terminator: float = Field(1.0, ge=0.001, le=1000, description="weight of the token that ends an answer")


class PackConfig(Section):
    tokens: int | None = Field(None, ge=2, description="capacity of a pack in tokens; null = what fits the machine")


class TrainConfig(Section):
    lr: float | None = Field(None, gt=0, le=10, description="peak learning rate; null = 2e-5 full, 2e-4 LoRA")
    epochs: int | None = Field(
        None, ge=1, le=1000, description="passes over the data; null = 1 above 10k examples, else 2"
    )
    steps: int | None = Field(None, ge=1, description="stop after so many steps; null = when the epochs are done")
    batch_tokens: int | None = Field(None, ge=1, description="target tokens a step, on average")
    batch_examples: int | None = Field(
        None, ge=1, description="examples a step, on average; null = 8 to 128 by data size"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="shape of the rate after warm-up")
    warmup: Share = Field(0.03, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decay of matrices, per step and unit of rate")
    clip_norm: float = Field(1.0, ge=0, description="longest gradient, as a 2-norm; 0 = off")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the computation; weights are kept in fp32")
    compile: bool | None = Field(
        None, description="layers through torch.compile; null = where a trial shows that a long run gains from it"
    )
    spikes: Literal["warn", "skip"] = Field(
        "warn", description="steps whose loss leaps far above the last ones: named, or named and left out"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the order of the data and of new weights")


class AdapterConfig(Section):
    rank: int = Field(0, ge=0, le=4096, description="LoRA rank; 0 = full tuning")
    alpha: float | None = Field(None, gt=0, description="LoRA scale is alpha / rank; null = 2 * rank")
    targets: list[str] = Field(default_factory=list, description="linear layers to adapt; none = all but the head")


class EvaluateConfig(Section):
    every_steps: int | None = Field(
        None, ge=1, description="steps between held-out losses; null = a quarter of the run"
    )
    examples: int = Field(64, ge=1, description="held-out examples measured during the run")


class CheckpointConfig(Section):
    every_steps: int = Field(0, ge=0, description="steps between checkpoints; 0 = by time")
    every_s: float = Field(300, gt=0, description="seconds between checkpoints where every_steps is 0")
    keep: int = Field(2, ge=1, le=1000, description="verified checkpoints to keep")


class RunConfig(Section):
    dir: str = Field("runs", description="folder of run folders")
    name: str | None = Field(
        None, pattern=NAME, description="the run's folder in run.dir; null = made from model and data"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto = the first GPU, else the CPU")
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads; null = all cores")

    @field_validator("name")
    @classmethod
    def _no_device(cls, name: str | None) -> str | None:
        """A folder of such a name could not be copied to every system."""
        if name is not None and DEVICES.fullmatch(name):
            raise ValueError("is the name of a device on Windows, where no folder can be called so")
        return name


class Config(Section):
    """model + data + this = a run folder."""

    model: str = Field(min_length=1, description="hub name, local folder, .gguf file, or demo")
    template: str | None = Field(None, description="chat template file in place of the model's own")
    data: DataConfig
    chat: ChatConfig = ChatConfig()
    targets: TargetsConfig = TargetsConfig()
    pack: PackConfig = PackConfig()
    train: TrainConfig = TrainConfig()
    adapter: AdapterConfig = AdapterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()


# Keys that a resumed run may have otherwise: they do not change what is learnt, nor what its losses are measured on. All
# other keys must stay as they were. run.device and run.threads change the order of sums: the run says so once, and goes on.
HARMLESS = (
    "evaluate.every_steps", "checkpoint.every_steps", "checkpoint.every_s", "checkpoint.keep",
    "run.dir", "run.name", "run.device", "run.threads",
)  # fmt: skip
UNFORKABLE = ("model", "adapter.rank", "adapter.targets")  # a checkpoint's tensors fit no other


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the tree, dotted, in order."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


MAPPINGS = ("data.mapping", "chat.template_args")  # keys whose value is a mapping of the user's own


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + str(name)
        found.update(flat(value, f"{key}.") if isinstance(value, Mapping) and key not in MAPPINGS else {key: value})
    return found


def shaping(config: Config) -> dict[str, str]:
    """The settings that a run must keep, each value as JSON: what a checkpoint's manifest carries."""
    return {key: json.dumps(value) for key, value in flat(config.model_dump()).items() if key not in HARMLESS}


def load_config(file: Path | None, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> Config:
    """The configuration from a YAML 1.2 file, then `section.key=value` overrides, then `given` (dotted key: value).

    Raises UsageError with every problem at once, each naming its place (file:line: key, or the override) and remedy.
    """
    tree, places = read_yaml(file) if file else ({}, {})
    if isinstance(tree.get("targets"), str):
        tree["targets"] = {"turns": tree["targets"]}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise UsageError.at(text, "is not section.key=value", "write for instance train.lr=2e-5")
        place = _cut(text)
        found = read_value(value, place)
        key = _in_full(key, found)
        _set(tree, key, found, place)
        places[key] = place
    for key, value in (given or {}).items():
        key = _in_full(key, value)
        _set(tree, key, value, f"--{key}")
        places[key] = f"--{key}"
    return _validated(tree, places)


def _in_full(key: str, value: Any) -> str:
    """`targets=last` is short for `targets.turns=last`, and leaves the other targets alone."""
    return "targets.turns" if key == "targets" and isinstance(value, str) else key


def _validated(tree: dict[str, Any], places: Mapping[str, str]) -> Config:
    if isinstance(tree.get("data"), dict) and isinstance(tree["data"].get("train"), str | dict):
        tree["data"]["train"] = [tree["data"]["train"]]
    secrets = _secrets(tree, places)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        known = list(keys())
        found: dict[str, Problem] = {}
        for e in error.errors():
            problem = _problem(e, known, places)
            if e["type"] != "string_type" or problem.place not in found:  # of `text or number` the number says more
                found[problem.place] = problem
        raise UsageError(*found.values(), *secrets) from None
    if problems := [*_contradictions(config, places), *secrets]:
        raise UsageError(*problems)
    return config


def _contradictions(config: Config, places: Mapping[str, str]) -> Iterator[Problem]:
    """Keys that exclude each other: one of them would be passed over in silence."""
    if config.train.batch_tokens and config.train.batch_examples:
        place = places.get("train.batch_tokens", "train.batch_tokens")
        remedy = "keep one of them, and set the other to null, for instance train.batch_examples=null"
        yield Problem(place, "train.batch_tokens and train.batch_examples are both set", remedy)
    for key, value in (("adapter.alpha", config.adapter.alpha), ("adapter.targets", config.adapter.targets)):
        if value and not config.adapter.rank:
            what = f"{key} is set, and adapter.rank is 0, which is full tuning"
            yield Problem(_place(key, places), what, f"set adapter.rank, for instance to 16, or leave out {key}")
    most = config.data.heldout_most
    if isinstance(config.data.heldout, str) and most != DataConfig.model_fields["heldout_most"].default:
        what = f"data.heldout_most is {most}, and data.heldout is a file, of which all rows are taken"
        yield Problem(_place("data.heldout_most", places), what, "leave it out, or shorten the file")


def _secrets(tree: Mapping[str, Any], places: Mapping[str, str]) -> list[Problem]:
    """Values that look like credentials: a configuration is written into the run folder, and shared with it."""
    remedy = "take it out; set HF_TOKEN in the environment, or keep it in a credential store (`hf auth login`)"
    return [
        Problem(_place(key, places), f"holds what looks like a credential ({masked(text)})", remedy, "secret")
        for key, value in flat(tree).items()
        for text in [key, *_texts(value)]
        if SECRET.search(text)
    ]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for each in pair for text in _texts(each))
    elif isinstance(value, list):
        yield from (text for each in value for text in _texts(each))


def _problem(error: Any, known: list[str], places: Mapping[str, str]) -> Problem:
    """One pydantic error in our words."""
    if "SourceConfig" in error["loc"] and error["type"] in ("extra_forbidden", "missing"):
        name, known = str(error["loc"][-1]), list(SourceConfig.model_fields)
        near = (difflib.get_close_matches(name, known, 1, 0.0) or known)[0]
        what, remedy = f"{name!r} is no key of a source", f"did you mean {near}? keys: {', '.join(known)}"
        if error["type"] == "missing":
            what, remedy = f"a source lacks {name!r}", "write for instance {path: FILE, repeat: 2}"
        return Problem(_place("data.train", places), what, remedy, "bad value")
    path = [
        part
        for part in error["loc"]
        if isinstance(part, str) and part not in BRANCHES and not part.startswith("constrained-")
    ]
    key = ".".join(path)
    while key not in places and key not in known and "." in key and error["type"] != "extra_forbidden":
        key = key.rpartition(".")[0]
    if error["type"] == "extra_forbidden":  # of an unknown section, its first key says more
        key = next((k for k in places if k.startswith(f"{key}.")), key)
    place = _place(key, places)
    if error["type"] == "extra_forbidden":
        return Problem(place, "unknown key", f"did you mean {nearest_key(key, known)}?", "unknown key")
    if error["type"] == "missing":
        return Problem(place, "is missing", MISSING.get(key, "set it"), "missing key")
    message = error["msg"].removeprefix("Input ").removeprefix("Value error, ").partition(" or instance of ")[0]
    return Problem(place, f"{_cut(repr(error['input']))}: {message}", _description(key), "bad value")


def _cut(text: str) -> str:
    """Fit for a line: cut where it is long; masked first, as half a credential is one too."""
    text = masked(text) if len(text) > 200 else text
    return text if len(text) <= 200 else text[:197] + "..."


BRANCHES = ("str", "float", "SourceConfig")  # pydantic's names for the kinds that a value may have; no keys

MISSING = {
    "model": "give --model, or `model:` in the file (a hub name, a folder, a .gguf file, or demo)",
    "data": "give --data FILE, or `data.train:` in the file",
    "data.train": "give --data FILE, or `data.train:` in the file",
}


def nearest_key(key: str, known: Sequence[str]) -> str:
    """The key most like the one that was written, looking at its last part first."""
    last = key.rpartition(".")[2]
    if last in ALIASES:
        return ALIASES[last]
    tails = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = difflib.get_close_matches(key, known, 1, 0.75) or [
        tails[t] for t in difflib.get_close_matches(last, list(tails), 1, 0.5)
    ]
    return (close or difflib.get_close_matches(key, known, 1, 0.0) or [known[0]])[0]


ALIASES = {
    "learning_rate": "train.lr", "learnig_rate": "train.lr", "num_train_epochs": "train.epochs",
    "max_steps": "train.steps", "per_device_train_batch_size": "train.batch_examples",
    "batch_size": "train.batch_examples", "lora_r": "adapter.rank", "lora_alpha": "adapter.alpha",
    "max_length": "pack.tokens", "sequence_len": "pack.tokens", "model_name_or_path": "model", "base_model": "model",
    "dataset": "data.train", "datasets": "data.train", "output_dir": "run.dir", "max_grad_norm": "train.clip_norm",
    "lr_scheduler_type": "train.schedule", "warmup_ratio": "train.warmup", "save_steps": "checkpoint.every_steps",
    "eval_steps": "evaluate.every_steps", "train_on_inputs": "targets.turns", "assistant_only_loss": "targets.turns",
    "chat_template": "template", "chat_template_kwargs": "chat.template_args", "strict": "data.strict",
    "excess_length_strategy": "data.too_long",
}  # fmt: skip


def _description(key: str) -> str:
    section: Any = Config
    for part in key.split("."):
        field = section.model_fields.get(part)
        if field is None:
            return "see docs/configuration.md"
        section = field.annotation
    if not field.description:
        return f"{key} is a section; see docs/configuration.md"
    return f"{key}: {field.description}{_range(field)}"


def _range(field: Any) -> str:
    """What a number may be, from the limits of its key."""
    words = (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below"))
    found = [f"{word} {getattr(m, name):g}" for name, word in words for m in field.metadata if hasattr(m, name)]
    return f" ({' '.join(found)})" if found else ""


def _place(key: str, places: Mapping[str, str]) -> str:
    while key:
        if key in places:
            return places[key] if "=" in places[key] or places[key].startswith("--") else f"{places[key]}: {key}"
        inside = next((places[k] for k in places if k.startswith(key + ".")), None)
        if inside or "." not in key:
            return inside if inside and "=" in inside else key
        key = key.rpartition(".")[0]
    return key


def _set(tree: dict[str, Any], key: str, value: Any, place: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError.at(place, f"{section} is a value, not a section", "see docs/configuration.md")
    tree[last] = value


def dump_config(config: Config) -> str:
    """The configuration as YAML, every value written out, each with its description."""
    lines: list[str] = []

    def walk(section: BaseModel, indent: str) -> None:
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                lines.append(f"{indent}{name}:")
                walk(value, indent + "  ")
            else:
                lines.append(f"{indent}{name}: {_yaml(_dumped(value))}  # {field.description}")

    walk(config, "")
    return "\n".join(lines) + "\n"


def _dumped(value: Any) -> Any:
    """Sources as plain values."""
    return (
        [each.model_dump() if isinstance(each, BaseModel) else each for each in value]
        if isinstance(value, list)
        else value
    )


PRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def _yaml(value: Any) -> str:
    if isinstance(value, list | dict):  # JSON is YAML; in YAML's own flow style [?0] would be a mapping
        return PRINTABLE.sub(lambda odd: f"\\u{ord(odd.group()):04x}", json.dumps(value, ensure_ascii=False))
    buffer = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = True
    writer.width = 1 << 20
    writer.dump(value, buffer)
    return buffer.getvalue().removesuffix("\n").removesuffix("...").strip("\n")
