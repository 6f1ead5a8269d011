"""Coverage-guided fuzzing by hand: python tests/fuzz/by_hand.py READER [libFuzzer options], e.g. -max_total_time=900.

Needs `pip install atheris`. Begins with, and adds to, tests/fuzz/corpus/READER in a scratch copy; what is worth keeping is
copied back by hand (-merge=1). READER is one of readers.READERS.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["instil", "ruamel"]):
    from readers import READERS


def main() -> None:
    name, *options = sys.argv[1:]
    kept = Path(__file__).parent / "corpus" / name
    found = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    print(f"new inputs go to {found}")
    atheris.Setup([sys.argv[0], *options, str(found), str(kept)], READERS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
