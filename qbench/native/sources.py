"""The engine's source files and their hash, by which a library knows what it was built from. Imports nothing heavy."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libqbench.so"
PATHS = ("portable", "avx2", "avx_vnni", "avx512_vnni", "amx")  # values of QBENCH_ISA
COMPILED = ("dispatch.cpp", "replay.cpp", *(f"isa_{path}.cpp" for path in PATHS))


def files() -> list[Path]:
    """All sources, headers included."""
    return sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h", ".inc"))


def sha256() -> str:
    """The hash of the names and contents of all sources."""
    digest = hashlib.sha256()
    for path in files():
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


WHY_NOT = "the native backend is not built here"
CURE = "install a C++ compiler and reinstall qbench, or run python -m qbench.native.build"


@functools.cache
def built() -> bool:
    """Is there a library of these sources? Read from its bytes: nothing is loaded."""
    return LIBRARY.exists() and sha256().encode() in LIBRARY.read_bytes()
