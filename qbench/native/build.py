"""Builds the engine: run by the package's build hook, or by hand with `python -m qbench.native.build`.

The library links no OpenMP of its own: it uses the pool of threads that torch has loaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qbench.native import sources

FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp",
    "-Wall",
    "-Wno-maybe-uninitialized",  # of g++ 12 about its own intrinsics
    "-Wno-psabi",  # vectors never leave their file
)
LINK_FLAGS = ("-shared", "-Wl,-z,lazy")


def build() -> str | None:
    """Compile qbench/native/libqbench.so; returns why not, in a line, where that fails."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "there is no C++ compiler (g++ or clang++)"
    with tempfile.TemporaryDirectory(dir=sources.FOLDER) as folder:
        objects = [str(Path(folder) / name) + ".o" for name in sources.COMPILED]
        library = str(Path(folder) / sources.LIBRARY.name)
        define = f'-DQB_SOURCES="{sources.sha256()}"'
        commands = [
            [compiler, *FLAGS, define, "-c", str(sources.FOLDER / name), "-o", out]
            for name, out in zip(sources.COMPILED, objects, strict=True)
        ]
        exports = Path(folder) / "exports"  # the standard library's templates would be seen outside otherwise
        exports.write_text("{ global: qb_*; local: *; };\n")
        link = [compiler, *LINK_FLAGS, f"-Wl,--version-script={exports}", "-o", library, *objects]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
            reasons = list(pool.map(_why_not, commands))
        if reason := next(filter(None, reasons), None) or _why_not(link):
            return reason
        Path(library).replace(sources.LIBRARY)
    return None


def _why_not(command: list[str]) -> str | None:
    """Run a command of the compiler; returns why it failed, in a line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]} does not run ({error.strerror})"
    if done.returncode:
        return f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
    return None


if __name__ == "__main__":
    if reason := build():
        raise SystemExit(f"the native backend was not built: {reason}")
    print(sources.LIBRARY)
