"""Models that cannot be used: exit 4, the file and the tensor or number in one line with what to do, nothing written."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from architectures import architecture
from instil.model.tensorfile import HEADER_LIMIT, Unsound, safetensors_names

Refused = Callable[..., str]
WEIGHTS = "model.safetensors"


@pytest.fixture
def refused(place: Path) -> Refused:
    """Run `instil train` on the model `m`, which must fail in one line; whatever was there is there, and nothing else."""

    def train(*words: object, code: int = 4) -> str:
        before = tiny.tree(place)
        began = time.process_time()
        said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST,
                            f"run.dir={place / 'runs'}", "run.name=x", *words)  # fmt: skip
        assert time.process_time() - began < 5
        assert (said.code, said.out, len(said.err)) == (code, "", 1), said
        assert tiny.tree(place) == before, "something half-written stayed behind"
        assert "Traceback" not in said.err[0]
        return said.err[0]

    return train


def header_and_bytes(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file by hand: eight bytes of length, a JSON header, the tensors' bytes."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_tensors(file: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)


def test_what_is_written_by_hand_is_what_the_library_reads(place: Path) -> None:
    """The oracle of this file: a header rewritten by hand and left as it is gives a model that trains."""
    file = place / "m" / WEIGHTS
    write_tensors(file, *header_and_bytes(file))
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1",
                        f"run.dir={place / 'runs'}", "run.name=x")  # fmt: skip
    assert said.code == 0, said.err


# ── 44, 45, 49: files that are not what they say ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("left", [0.9, 0.5, 0.1])
def test_a_truncated_file_says_both_numbers_of_bytes(left: float, refused: Refused, place: Path) -> None:
    """The bytes that there are and the bytes that the header asks for, at three places of the cut."""
    file = place / "m" / WEIGHTS
    whole = file.read_bytes()
    cut = whole[: int(len(whole) * left)]
    file.write_bytes(cut)
    line = refused()
    assert line.startswith(f"{file}: has {len(cut):,} bytes, which is not what its header says; fetch it again; ")
    assert f"{len(whole):,} bytes" in line


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1, 0, 3])
def test_a_header_of_an_impossible_length_is_refused_at_once(length: int, refused: Refused, place: Path) -> None:
    """2^40 bytes are neither read nor reserved: the number is compared with the file's size."""
    file = place / "m" / WEIGHTS
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    line = refused()
    assert line.startswith(f"{file}: is not a safetensors file")
    assert f"{length:,} bytes" in line or length < 8


def test_a_header_of_a_hundred_megabytes_is_not_read(place: Path) -> None:
    """As JSON it would fill gigabytes: the file is refused by the number, and the process reserves next to nothing."""
    file = place / "m" / WEIGHTS
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_000))
        stream.truncate(8 + 100_000_000)  # a sparse file
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Unsound, match=f"its header would have 100,000,000 bytes, more than {HEADER_LIMIT:,}"):
        safetensors_names(file)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 20_000 or sys.platform == "darwin"  # there it counts bytes


def _overlap(header: dict[str, Any]) -> str:
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    first, second = names[0], names[1]
    begin, end = header[second]["data_offsets"]
    header[second]["data_offsets"] = [begin - 4, end - 4]
    return f"its tensors {first} and {second} overlap"


def _gap(header: dict[str, Any]) -> str:
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    last = names[-2]
    del header[last]
    return f"its tensors {names[-3]} and {names[-1]} have a gap between them"


def _shape(header: dict[str, Any]) -> str:
    header["model.norm.weight"]["shape"] = [33]
    return "tensor model.norm.weight of shape [33] in F32 needs 132 bytes, and has 128"


def _huge_shape(header: dict[str, Any]) -> str:
    header["model.norm.weight"]["shape"] = [2**40, 2**40]
    return "tensor model.norm.weight of shape [1099511627776, 1099511627776] in F32 needs"


def _negative(header: dict[str, Any]) -> str:
    header["model.norm.weight"]["data_offsets"][0] -= 10**6
    return "is not a safetensors file"


@pytest.mark.parametrize("spoil", [_overlap, _gap, _shape, _huge_shape, _negative])
def test_offsets_and_shapes_that_cannot_be_are_refused_by_tensor(
    spoil: Callable[[dict[str, Any]], str], refused: Refused, place: Path
) -> None:
    """Bytes that two tensors share, or none has, and shapes that need other bytes: the file and the tensors are named."""
    file = place / "m" / WEIGHTS
    header, data = header_and_bytes(file)
    expected = spoil(header)
    write_tensors(file, header, data)
    line = refused()
    assert line.startswith(f"{file}: ")
    assert expected in line
    assert line.endswith("fetch it again")


class Runs:
    """What a pickle can do: anything."""

    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_pickle_called_safetensors_is_named_and_never_opened(how: str, refused: Refused, place: Path) -> None:
    """It is told by its first bytes; the program inside does not run, though pickle.loads would run it."""
    marker, file = place / "ran", place / "m" / WEIGHTS
    buffer = io.BytesIO()
    torch.save({"w": Runs(marker)}, buffer) if how == "torch.save" else pickle.dump(Runs(marker), buffer)
    file.write_bytes(buffer.getvalue())
    line = refused()
    assert line.startswith(f"{file}: is a pickle with another name, which can run code and is refused; ")
    assert "safe_serialization=True" in line
    assert not marker.exists()
    if how == "torch.save":
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        pickle.loads(file.read_bytes())  # noqa: S301, the fault itself
    assert marker.exists(), "the planted program does run where somebody opens it"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "epoch1.ckpt"])
def test_a_folder_with_only_pickles_says_how_to_convert(name: str, refused: Refused, place: Path) -> None:
    """The pickle is named, is not opened, and the line says what writes safetensors."""
    (place / "m" / WEIGHTS).rename(place / "m" / name)
    line = refused()
    assert line.startswith(f"{place / 'm'}: its weights are pickle ({name}), which can run code and is refused; ")
    assert line.endswith("save_pretrained(FOLDER, safe_serialization=True)")


# ── 46: shards ───────────────────────────────────────────────────────────────────────────────────────────────────────


def in_shards(folder: Path) -> dict[str, str]:
    """The weights in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, half in (("one.safetensors", names[::2]), ("two.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in half}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> Path:
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(
        weight_map if isinstance(weight_map, str) else json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return index


def test_sound_shards_train(place: Path) -> None:
    """The oracle of the next tests: two shards and their index are a model."""
    in_shards(place / "m")
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1",
                        f"run.dir={place / 'runs'}", "run.name=x")  # fmt: skip
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("shard", "what"),
    [
        ("three.safetensors", "names three.safetensors, which is missing"),
        ("../evil.safetensors", "names ../evil.safetensors, which is not a file inside the folder"),
        ("a/../../evil.safetensors", "names a/../../evil.safetensors, which is not a file inside"),
        ("/evil.safetensors", "names /evil.safetensors, which is not a file inside the folder"),
        ("..\\evil.safetensors", "which is not a file inside the folder"),
        ("evil.bin", "names evil.bin, which is not a .safetensors file"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(shard: str, what: str, refused: Refused, place: Path) -> None:
    """A shard that is missing, or outside the folder though there is such a file: the index and the name are said."""
    weight_map = in_shards(place / "m")
    (place / "evil.safetensors").write_bytes((place / "m" / "one.safetensors").read_bytes())
    index = write_index(place / "m", weight_map | {"model.norm.weight": shard})
    line = refused()
    assert line.startswith(f"{index}: names ")
    assert what in line


def test_a_tensor_in_two_files_is_refused(refused: Refused, place: Path) -> None:
    """Which of the two would count nobody knows; the tensor and both files are said."""
    in_shards(place / "m")
    one, two = (load_file(place / "m" / f"{name}.safetensors") for name in ("one", "two"))
    name = sorted(one)[0]
    save_file(two | {name: one[name] + 1}, place / "m" / "two.safetensors", metadata={"format": "pt"})
    line = refused()
    assert line.startswith(
        f"{place / 'm' / 'two.safetensors'}: holds {name}, which one.safetensors holds as well; fetch"
    )


def test_a_name_twice_in_one_file_is_refused(refused: Refused, place: Path) -> None:
    """Twice in a header, and twice in an index: JSON's readers would take the last in silence."""
    file = place / "m" / WEIGHTS
    header, data = header_and_bytes(file)
    twice = json.dumps(header)[:-1] + f', "model.norm.weight": {json.dumps(header["model.norm.weight"])}}}'
    write_tensors(file, twice, data)
    assert refused() == f"{file}: is not a safetensors file: model.norm.weight is there twice; fetch it again"
    write_tensors(file, header, data)
    weight_map = in_shards(place / "m")
    pairs = json.dumps(weight_map)[:-1] + ', "model.norm.weight": "two.safetensors"}'
    index = write_index(place / "m", f'{{"weight_map": {pairs}}}')
    assert refused() == f"{index}: not JSON (model.norm.weight is there twice); fetch it again"


def test_an_index_that_promises_a_tensor_that_its_file_lacks_is_refused(refused: Refused, place: Path) -> None:
    """The tensor is named before anything is loaded."""
    weight_map = in_shards(place / "m")
    index = write_index(place / "m", weight_map | {"model.ghost.weight": "one.safetensors"})
    assert refused() == f"{index}: says that model.ghost.weight is in a file that lacks it; fetch it again"


# ── 47: weights that are no numbers ──────────────────────────────────────────────────────────────────────────────────

NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight",
         "model.norm.weight", "lm_head.weight"]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_no_number_is_refused_by_its_tensor(
    name: str, value: float, refused: Refused, place: Path
) -> None:
    """One value of one tensor, wherever it stands."""
    tensors = load_file(place / "m" / WEIGHTS)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, place / "m" / WEIGHTS, metadata={"format": "pt"})
    assert refused() == f"{place / 'm'}: {name} holds NaN or infinity; use a sound copy of the model"


# ── 50, 53: models that are programs, or of another kind ─────────────────────────────────────────────────────────────


def change_config(folder: Path, **changes: Any) -> None:
    """Keys of config.json; None removes one."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_code_of_a_model_is_never_run(refused: Refused, place: Path) -> None:
    """auto_map names a program in the folder: refused by name, and the program leaves no trace."""
    (place / "m" / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nclass Model: pass\n")
    change_config(place / "m", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Model"})
    line = refused()
    assert line.startswith(f"{place / 'm' / 'config.json'}: auto_map: the model brings its own Python code")
    assert not (place / "ran").exists()


def test_code_of_a_tokenizer_is_never_run(place: Path) -> None:
    """auto_map in tokenizer_config.json is not looked at: the tokenizer is tokenizer.json, and nothing runs."""
    (place / "m" / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nclass T: pass\n")
    file = place / "m" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}))
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1",
                        f"run.dir={place / 'runs'}", "run.name=x")  # fmt: skip
    assert said.code == 0, said.err
    assert not (place / "ran").exists()


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ("LlamaForSequenceClassification", "is a classifier or reward model"),
        ("LlamaForTokenClassification", "is a classifier of tokens"),
        ("LlamaForRewardModel", "is a reward model"),
        ("LlamaForQuestionAnswering", "is an extractive reader"),
        ("LlamaModel", "is not a causal language model"),
        ("BertForMaskedLM", "is an encoder"),
        ("ViTForImageClassification", "is an image model"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_made_for_something_else_is_refused_by_its_class(
    tied: bool, architecture: str, what: str, refused: Refused, place: Path
) -> None:
    """Even where its weights would load: with tied embeddings a reward model has all that a language model needs."""
    tiny.write_model(place / "m", tie_word_embeddings=tied)
    change_config(place / "m", architectures=[architecture])
    line = refused()
    assert line.startswith(f"{place / 'm'}: {architecture} {what}; use a causal language model")


@pytest.mark.parametrize(
    ("kind", "what"), [("bert", ""), ("vit", ""), ("clip", ""), ("t5", "is an encoder-decoder"), ("llava", "")]
)
def test_configurations_of_other_kinds_are_refused(kind: str, what: str, refused: Refused, place: Path) -> None:
    """Encoders, image models and encoder-decoders, with a text model's weights beside them and no class named."""
    (place / "m" / "config.json").write_text(json.dumps({"model_type": kind}))
    line = refused()
    assert line.startswith(f"{place / 'm'}")
    assert what in line


def test_a_configuration_without_a_class_is_no_error(place: Path) -> None:
    """`architectures` may be absent: then the weights decide."""
    change_config(place / "m", architectures=None)
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1",
                        f"run.dir={place / 'runs'}", "run.name=x")  # fmt: skip
    assert said.code == 0, said.err


# ── 51: three numbers of one vocabulary ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("said", [299, 310, 32_000])
def test_a_vocab_size_that_is_not_the_embeddings_is_refused_with_three_numbers(
    said: int, refused: Refused, place: Path
) -> None:
    """config.json says one number, the weights have 300 rows, and the tokenizer's ids end at 299."""
    change_config(place / "m", vocab_size=said)
    line = refused()
    assert line.startswith(f"{place / 'm' / WEIGHTS}: ")
    assert f"vocab_size is {said:,}, the embedding has 300 rows, the tokenizer's ids go up to 299" in line
    assert "resize the embeddings" in line


def shorten(folder: Path, rows: int) -> None:
    """A model with fewer embeddings, and a config.json that says so."""
    tensors = load_file(folder / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    change_config(folder, vocab_size=rows)


def highest_token(place: Path) -> int:
    """By `inspect`: the highest id in the examples of a.jsonl."""
    shown = tiny.command("inspect", place / "a.jsonl", "--model", place / "m", "--json").out.splitlines()
    return max(max(each["prompt_tokens"] + each["answer_tokens"]) for each in map(json.loads, shown))


def test_a_token_without_an_embedding_is_refused_before_the_first_step(refused: Refused, place: Path) -> None:
    """The highest id of the examples is one too many: the three numbers are said; one row more, and the model trains."""
    most = highest_token(place)
    shorten(place / "m", most)
    line = refused()
    assert line.startswith(f"{place / 'm'}: the examples have the token {most:,}, for which there is no embedding: ")
    assert f"vocab_size is {most:,}, the embedding has {most:,} rows, the tokenizer's ids go up to 299; " in line
    evaluated = tiny.command("evaluate", place / "m", "--data", place / "a.jsonl")
    assert evaluated.code == 4
    assert f"the examples have the token {most:,}" in evaluated.err[-1]
    tiny.write_model(place / "m")
    shorten(place / "m", most + 1)
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1",
                        f"run.dir={place / 'runs'}", "run.name=x")  # fmt: skip
    assert said.code == 0, said.err  # its tokenizer still knows tokens that no example has


# ── models that learn otherwise in a pack than alone ─────────────────────────────────────────────────────────────────


def other_model(folder: Path, name: str, **changes: Any) -> None:
    """The tokenizer and template of `m` with a model of another architecture."""
    (folder / WEIGHTS).unlink()
    ids = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
    architecture(name, attention="eager", **ids, **changes).save_pretrained(folder)


@pytest.mark.parametrize(("name", "key"), [("GPT-2, learned positions", "attn_pdrop"), ("Llama", "attention_dropout")])
def test_dropout_in_attention_is_refused_before_anything_is_written(
    name: str, key: str, refused: Refused, place: Path
) -> None:
    """With the key that this model's config.json has, and its value; with 0 there, the same command trains."""
    other_model(place / "m", name, **{key: 0.1})
    file = place / "m" / "config.json"
    what = f"{file}: {key}=0.1: dropout in attention is not exact in a pack; set {key} to 0 there"
    assert refused() == what
    said = tiny.command("plan", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST)
    assert (said.code, said.out, said.err[-1]) == (4, "", what)
    change_config(place / "m", **{key: 0.0})
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1",
                        f"run.dir={place / 'runs'}", "run.name=x")  # fmt: skip
    assert said.code == 0, said.err
    assert not [line for line in said.err if "draws at random" in line]


def test_dropout_elsewhere_is_said_when_training_begins(place: Path) -> None:
    """GPT-2's embeddings and residuals: how large, and that examples share it where they share a prefix."""
    other_model(place / "m", "GPT-2, learned positions", resid_pdrop=0.1, embd_pdrop=0.2)
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1",
                        f"run.dir={place / 'runs'}", "run.name=x")  # fmt: skip
    assert said.code == 0, said.err
    (line,) = [line for line in said.err if "draws at random" in line]
    assert line.endswith("(resid_pdrop=0.1, embd_pdrop=0.2); examples share the draws of what they begin with")


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("Phi-3, window", {"sliding_window": None, "original_max_position_embeddings": 60, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 60,
            "short_factor": [1.0, 1.5, 1.2, 2.0], "long_factor": [8.0, 40.0, 30.0, 50.0]}},
         "phi3 has longrope positions, which change at 60 tokens, and an example has "),
        ("Phi-3.5-MoE, window", {"sliding_window": 60}, "does not tell its attention of its window of 60 tokens; an example"),
    ],
    ids=["longrope", "window"],
)  # fmt: skip
def test_a_held_out_row_beyond_a_limit_of_the_model_is_refused(
    name: str, changes: dict[str, Any], what: str, refused: Refused, place: Path
) -> None:
    """Its loss would not be that of the row alone, though every row to learn from is short enough."""
    other_model(place / "m", name, **changes)
    tiny.write_rows(place / "h.jsonl", [tiny.row(" ".join(tiny.WORDS * 3), "red")])
    words = (f"data.heldout={place / 'h.jsonl'}",)
    assert what in refused(*words)
    said = tiny.command("plan", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, *words)
    assert (said.code, said.out) == (4, "")
    assert what in said.err[-1]
    tiny.write_rows(place / "h.jsonl", [tiny.row(" ".join(tiny.WORDS[:2]), "red")])
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1",
                        f"run.dir={place / 'runs'}", "run.name=x", *words)  # fmt: skip
    assert said.code == 0, said.err


# ── 43, 52: nothing there, and a precision that there is not ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("missing", "neither a folder here nor a usable hub name"),
        ("empty", "the folder is empty; give one with config.json, tokenizer.json and model.safetensors"),
        ("file", "is a file, but not a .gguf file"),
    ],
)
def test_a_model_that_is_not_there_says_what_was_looked_for(kind: str, what: str, place: Path) -> None:
    """A path that is nothing, an empty folder, a file that is no .gguf: exit 4 at once, and no run folder."""
    given = place / "given"
    if kind == "empty":
        given.mkdir()
    elif kind == "file":
        given.write_text("weights")
    before = tiny.tree(place)
    said = tiny.command("train", "--model", given, "--data", place / "a.jsonl", f"run.dir={place / 'runs'}")
    assert (said.code, said.out, len(said.err)) == (4, "", 1)
    assert str(given) in said.err[0]
    assert what in said.err[0]
    assert tiny.tree(place) == before


@pytest.mark.parametrize("precision", ["fp16", "int4", "fp8"])
def test_a_precision_that_there_is_not_says_what_is_possible(precision: str, refused: Refused) -> None:
    """There is no fp16 and no 4-bit training: exit 2 with the two that there are."""
    line = refused(f"train.precision={precision}", code=2)
    assert line.startswith(f"train.precision={precision}: '{precision}': should be 'bf16' or 'fp32'; train.precision: ")


def test_a_refusal_is_no_traceback_in_a_process_of_its_own(place: Path) -> None:
    """As a user sees it: one line on stderr, exit code 4. (`check`, as it starts without torch.)"""
    change_config(place / "m", auto_map={"AutoModel": "evil.Model"})
    code = "import sys; from instil.cli.main import main; sys.argv[0] = 'instil'; main()"
    words = ["check", str(place / "a.jsonl"), "--model", str(place / "m")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1), done.stderr
