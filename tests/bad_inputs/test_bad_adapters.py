"""Adapters where a model belongs, ranks and layers that cannot be, and GGUF files crafted to hang or to fill the memory."""

from __future__ import annotations

import json
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import tiny
from instil.model.ggufheader import (
    MOST_ELEMENTS,
    MOST_KEYS,
    MOST_TENSORS,
    MOST_TEXT,
    Crafted,
    refuse_overlap,
    walk_header,
)

Refused = Callable[..., str]


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run `instil train` on a model, which must fail in one line within 2 s and 100 MB; nothing is written, no cache kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))

    def train(model: object, *words: object, code: int = 4) -> str:
        before, memory, began = tiny.tree(place), _memory_mb(), time.process_time()
        said = tiny.command("train", "--model", model, "--data", place / "a.jsonl", *tiny.FAST,
                            f"run.dir={place / 'runs'}", "run.name=x", *words)  # fmt: skip
        assert time.process_time() - began < 4  # the first one imports
        assert _memory_mb() - memory < 400  # the first one imports torch
        assert (said.code, said.out, len(said.err)) == (code, "", 1), said
        written = [
            path
            for path in tiny.tree(place) - before
            if not path.startswith(("cache/instil/vetted", "cache/instil/regexes"))
        ]
        assert set(written) <= {"cache", "cache/instil", "cache/instil/models"}
        assert "Traceback" not in said.err[0]
        return said.err[0]

    return train


def _memory_mb() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)


# ── 77, 78: adapters ─────────────────────────────────────────────────────────────────────────────────────────────────


def write_adapter(folder: Path, rank: int = 2, **config: object) -> Path:
    """A folder as peft writes it."""
    folder.mkdir()
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"],
              "base_model_name_or_path": "org/base"} | config  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(rank, 4)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("beside", [(), ("tokenizer.json",), ("config.json",), ("config.json", "tokenizer.json")])
@pytest.mark.parametrize("rank", [2, 1_000_000])
def test_an_adapter_in_place_of_a_model_is_said_to_be_one(
    beside: tuple[str, ...], rank: int, refused: Refused, place: Path
) -> None:
    """With whatever files of its model beside it, and however large it says it is: give the model that it changes."""
    folder = write_adapter(place / "lora", r=rank)
    for name in beside:
        (folder / name).write_bytes((place / "m" / name).read_bytes())
    line = refused(folder)
    assert line.startswith(f"{folder}: no ")
    if "config.json" not in beside or "tokenizer.json" in beside:
        assert "but it has an adapter (give the model that the adapter changes)" in line
    for verb in ("evaluate", "chat"):
        said = tiny.command(verb, folder, *(["--data", place / "a.jsonl"] if verb == "evaluate" else []), text="")
        assert said.code == 4, said
        assert str(folder) in said.err[-1]
        assert not (verb == "chat" and said.out)


def test_the_adapter_of_a_run_is_no_model(refused: Refused, place: Path) -> None:
    """What `instil train` itself writes beside the merged model."""
    words = ("--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "adapter.rank=2", "train.steps=1")
    said = tiny.command("train", *words, f"run.dir={place / 'made'}", "run.name=x")
    assert said.code == 0, said.err
    assert "an adapter (give the model" in refused(place / "made" / "x" / "adapter")


@pytest.mark.parametrize("rank", [1_000_000, 4097, -1])
def test_a_rank_beyond_all_sense_is_refused_before_anything_is_reserved(
    rank: int, refused: Refused, place: Path
) -> None:
    """10^6 for LoRA would be a matrix of gigabytes per layer: refused by its range."""
    line = refused(place / "m", f"adapter.rank={rank}", code=2)
    assert line.startswith(f"adapter.rank={rank}: {rank}: should be ")
    assert line.endswith("(from 0 to 4096)")


@pytest.mark.parametrize("target", ["q_porj", "model.layers.0.self_attn.q_proj", "lm-head", ".*"])
def test_a_layer_that_there_is_not_is_answered_with_those_there_are(target: str, refused: Refused, place: Path) -> None:
    """The names are last parts; what is none is refused, and the linear layers of this model are listed."""
    line = refused(place / "m", "adapter.rank=2", f"adapter.targets=['{target}']", code=2)
    assert line.startswith(f"adapter.targets: {target!r} is no linear layer of the model; use some of: ")
    assert line.endswith("down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")


@pytest.mark.parametrize("targets", ["[lm_head]", "[q_proj, lm_head]"])
def test_the_head_is_refused_as_a_target(targets: str, refused: Refused, place: Path) -> None:
    """It would be saved untrained beside others, and alone end in a traceback."""
    line = refused(place / "m", "adapter.rank=2", f"adapter.targets={targets}", code=2)
    assert line.startswith("adapter.targets: 'lm_head' is the head, which adapters leave as it is; use some of: down")


def test_another_rank_on_resume_is_refused_with_both(refused: Refused, place: Path) -> None:
    """An adapter of rank 2 is not gone on with as one of rank 4: both values, and the ways out."""
    words = ("--model", place / "m", "--data", place / "a.jsonl", *tiny.FAST, "train.steps=1")
    said = tiny.command("train", *words, "adapter.rank=2", f"run.dir={place / 'runs'}", "run.name=x")
    assert said.code == 0, said.err
    line = refused(place / "m", "train.steps=1", "adapter.rank=4", code=2)
    assert line.startswith("adapter.rank: the run in ")
    assert "has 2, now 4" in line


# ── 79: GGUF ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dimensions: tuple[int, ...] = (8,), offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return text(name) + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", 0, offset)


def gguf(tensors: int, keys: int, *parts: bytes, data: bytes = bytes(64), version: int = 3) -> bytes:
    """A GGUF file by hand: magic, version, counts, then whatever is given, aligned, and the tensors' bytes."""
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return header + bytes(-len(header) % 32) + data


ARCH = key("general.architecture", 8, text("llama"))
FAR = 2**62
CRAFTED = {
    "2^63 tensors": (gguf(2**63, 1, ARCH), "says that it has 9,223,372,036,854,775,808 tensors, more than 100,000"),
    "2^64 - 1 keys": (gguf(0, 2**64 - 1, ARCH), "says that it has 18,446,744,073,709,551,615 keys, more than 10,000"),
    "keys that are not there": (gguf(0, MOST_KEYS, ARCH), "and the file has"),
    "tensors that are not there": (gguf(MOST_TENSORS, 1, ARCH, data=b""), "and the file has"),
    "a text of 2^62 bytes": (gguf(0, 1, key("a", 8, struct.pack("<Q", FAR))), "the value of key 0 is a text of"),
    "a key of 2^62 bytes": (gguf(0, 1, struct.pack("<Q", FAR)), f"key 0 is a text of {FAR:,} bytes, more than"),
    "a text beyond the end": (gguf(0, 1, key("a", 8, struct.pack("<Q", MOST_TEXT))), "the value of key 0 ends at"),
    "2^62 numbers": (gguf(0, 1, key("a", 9, struct.pack("<IQ", 4, FAR))), f"is a list of {FAR:,} elements, more than"),
    "2^62 texts": (gguf(0, 1, key("a", 9, struct.pack("<IQ", 8, FAR))), f"is a list of {FAR:,} elements, more than"),
    "numbers beyond the end": (gguf(0, 1, key("a", 9, struct.pack("<IQ", 0, MOST_ELEMENTS))), "and the file has"),
    "numbers in many lists": (
        gguf(0, 2, *(key(name, 9, struct.pack("<IQ", 0, 3_000_000) + bytes(3_000_000)) for name in "ab")),
        "is a list of 3,000,000 elements, more than 4,000,000",
    ),
    "lists in lists": (gguf(0, 1, key("a", 9, struct.pack("<IQIQ", 9, 1, 9, 1) * 9)), "is a list of lists"),
    "an unknown type": (gguf(0, 1, key("a", 99, bytes(8))), "the value of key 0 is of type 99, which there is not"),
    "2^32 - 1 dimensions": (
        gguf(1, 1, ARCH, text("w") + struct.pack("<I", 2**32 - 1)),
        "tensor 0 has 4,294,967,295 dimensions, more than 4",
    ),
    "an offset beyond the end": (gguf(1, 1, ARCH, tensor("w", offset=FAR)), "not a readable GGUF file"),
    "a tensor of 2^62 numbers": (gguf(1, 1, ARCH, tensor("w", (2**31, 2**31))), "not a readable GGUF file"),
    "a shape that wraps around": (gguf(1, 1, ARCH, tensor("w", (2**32, 2**32))), ""),
    "two tensors in the same bytes": (
        gguf(2, 1, ARCH, tensor("v"), tensor("w", offset=16)),
        "overlap",
    ),
    "the same tensor twice": (gguf(2, 1, ARCH, tensor("w"), tensor("w", offset=32)), "not a readable GGUF file"),
    "the same key twice": (gguf(0, 2, ARCH, ARCH), "not a readable GGUF file"),
    "an unknown version": (gguf(0, 1, ARCH, version=77), "not a readable GGUF file"),
    "no text": (gguf(0, 1, key("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")), "not a readable GGUF file"),
    "nothing": (b"", "not a readable GGUF file"),
    "only the magic": (b"GGUF", "not a readable GGUF file"),
}  # fmt: skip


@pytest.mark.parametrize("case", CRAFTED)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_a_crafted_gguf_file_is_refused_at_once(verb: str, case: str, refused: Refused, place: Path) -> None:
    """Counts, lengths, offsets and shapes that cannot be: exit 4 with the file, in no time and no memory."""
    content, what = CRAFTED[case]
    file = place / "evil.gguf"
    file.write_bytes(content)
    if verb == "train":
        line = refused(file)
    else:
        began = time.process_time()
        said = tiny.command("check", place / "a.jsonl", "--model", file)
        assert time.process_time() - began < 2
        assert (said.code, len(said.err)) == (4, 1), said
        line = said.err[0]
    assert line.startswith(f"{file}: ")
    assert what in line


def test_the_walk_passes_what_is_sound(tmp_path: Path) -> None:
    """Keys of every type, little and big endian, lists, tensors: the oracle that the refusals are not of everything."""
    scalars = [key(f"k{kind}", kind, bytes(size)) for kind, size in
               {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}.items()]  # fmt: skip
    lists = [
        key("texts", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")),
        key("n", 9, struct.pack("<IQ", 5, 2) + bytes(8)),
    ]
    sound = gguf(2, 14, ARCH, *scalars, *lists, tensor("v", (4, 2)), tensor("w", offset=32))
    (tmp_path / "sound.gguf").write_bytes(sound)
    walk_header(tmp_path / "sound.gguf")
    big = b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + struct.pack(">Q", 1) + b"a" + struct.pack(">II", 4, 7)
    (tmp_path / "big.gguf").write_bytes(big)
    walk_header(tmp_path / "big.gguf")
    for size in range(len(sound) - 64 - 31):  # cut anywhere in its header
        (tmp_path / "cut.gguf").write_bytes(sound[:size])
        with pytest.raises(Crafted):
            walk_header(tmp_path / "cut.gguf")


def test_tensors_that_share_bytes_are_seen() -> None:
    """Side by side is fine in any order; one byte in common, or one beyond the end, is not."""

    def at(name: str, begin: int, size: int) -> SimpleNamespace:
        return SimpleNamespace(name=name, data_offset=begin, n_bytes=size)

    refuse_overlap([at("b", 32, 32), at("a", 0, 32), at("none", 32, 0)], 64)
    with pytest.raises(Crafted, match="tensors a and b overlap"):
        refuse_overlap([at("b", 31, 32), at("a", 0, 32)], 64)
    with pytest.raises(Crafted, match="tensor a ends at 65, and the file has 64 bytes"):
        refuse_overlap([at("a", 33, 32)], 64)


def test_the_library_alone_would_go_on_for_ever(tmp_path: Path) -> None:
    """Why the walk is there: gguf's reader makes an element for each that a count promises, beyond the end of the file."""
    from gguf import GGUFReader

    count = 20_000
    file = tmp_path / "evil.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("a", 9, struct.pack("<IQ", 4, count)))
    assert file.stat().st_size < 64
    with pytest.raises(Crafted):
        walk_header(file)
    try:
        made = len(GGUFReader(file).fields["a"].data)
    except (IndexError, ValueError):
        made = count  # a newer version may check
    assert made == count
