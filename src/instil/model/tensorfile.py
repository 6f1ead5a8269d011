"""A safetensors file's header read and measured against the file, before anything is made of what it says."""

from __future__ import annotations

import json
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

HEADER_LIMIT = 16_000_000  # bytes, about 150,000 tensors; the format allows 100 MB, which as JSON would fill gigabytes
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's archive, and bare pickles
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
AGAIN = "fetch it again"


class Unsound(Exception):
    """A file that is not what it says. what: of the file; remedy: what to do."""

    def __init__(self, what: str, remedy: str = AGAIN):
        self.what, self.remedy = what, remedy
        super().__init__(what)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object whose keys differ. Raises ValueError with the key that is there twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_short(name)} is there twice")
        found[name] = value
    return found


def safetensors_names(file: Path) -> list[str]:
    """The names of the tensors in a file; no more of it is read than its header. Raises Unsound."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version"):
            raise Unsound("is a Git LFS pointer, not the weights", "run `git lfs pull` in that folder")
        if start.startswith(PICKLES):
            remedy = "load it elsewhere with transformers and save_pretrained(FOLDER, safe_serialization=True)"
            raise Unsound("is a pickle with another name, which can run code and is refused", remedy)
        length = int.from_bytes(start, "little")
        if length > size - 8:
            raise Unsound(f"is not a safetensors file, or cut off: its header would have {length:,} bytes of {size:,}")
        if length > HEADER_LIMIT:
            what = f"is not a safetensors file: its header would have {length:,} bytes"
            raise Unsound(f"{what}, more than {HEADER_LIMIT:,}")
        header = stream.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=once)
        entries.pop("__metadata__", None)
        spans = sorted((*_span(name, entry), name) for name, entry in entries.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        twice = f": {error}" if str(error).endswith("twice") else ""
        raise Unsound(f"is not a safetensors file{twice}") from None
    whole = 8 + length + max((end for _, end, _ in spans), default=0)
    if whole != size:
        remedy = f"{AGAIN}; it is cut off, or changed: {whole:,} bytes"
        raise Unsound(f"has {size:,} bytes, which is not what its header says", remedy)
    _refuse_overlap(spans)
    return [name for _, _, name in spans]


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end. Raises Unsound where its shape needs another number of them."""
    begin, end = entry["data_offsets"]
    shape, bits = entry["shape"], BITS.get(entry["dtype"])
    if not all(isinstance(n, int) and 0 <= n < 2**63 for n in (begin, end, *shape)):
        raise ValueError
    if bits is not None and 8 * (end - begin) != prod(shape) * bits:
        what = f"tensor {_short(name)} of shape {shape} in {entry['dtype']} needs {prod(shape) * bits // 8:,} bytes"
        raise Unsound(f"{what}, and has {end - begin:,}")
    return begin, end


def _refuse_overlap(spans: list[tuple[int, int, str]]) -> None:
    """The tensors must lie one behind the other, as the format says: bytes that two share, or none, hide something."""
    if spans and spans[0][0] != 0:
        raise Unsound(f"has {spans[0][0]:,} bytes before its first tensor {_short(spans[0][2])}")
    for (_, end, name), (begin, _, following) in pairwise(spans):
        if begin != end:
            relation = "overlap" if begin < end else "have a gap between them"
            raise Unsound(f"its tensors {_short(name)} and {_short(following)} {relation}")


def _short(name: str) -> str:
    text = name.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."
