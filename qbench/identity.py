"""The two hashes of a record. `cell` is what is asked; `key` is one answer to it, and decides what is run again.

cell = sha256(canonical recipe, task, measurement settings, data, fp32 weights)
key  = sha256(cell, content of the source files the cell runs, environment that can change a number)
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from qbench import __version__
from qbench.native import sources
from qbench.sources import PROJECT, closure, locate, modules_of_targets

# What changes a result without changing what is asked: a longer time-out never gives another number.
NOT_ASKED = ("timeout_s",)
# The functions that run in the cell's processes live here; everything else they use is found by following imports.
ENTRY_MODULES = ("qbench.evaluate", "qbench.measure")
# What decides how those functions are called; the files that it imports itself change no number.
CONDUCTORS = ("qbench.cell",)
# Settings by which users choose the code path of the engine, of torch and of oneDNN.
KERNEL_SETTINGS = (
    "QBENCH_ISA",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)
# The flags that choose kernels; the rest of /proc/cpuinfo changes with the operating system.
SIMD_FLAG = re.compile(r"^(sse\d|ssse3|avx|fma|f16c|bmi|amx|asimd|sve|i8mm|bf16|neon)")


def sha256_of(content: Any) -> str:
    """sha256 of JSON content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def cell_hash(
    recipe: Mapping[str, Any], task: Mapping[str, Any], measure: Mapping[str, Any], prepared: Mapping[str, Any]
) -> str:
    """What is asked. `recipe` is canonical, `task` the configuration, `prepared` has the data's and weights' hashes."""
    settings = {name: value for name, value in measure.items() if name not in NOT_ASKED}
    hashes = {name: prepared[name] for name in ("data_sha256", "weights_sha256")}
    return sha256_of({"recipe": recipe, "task": task, "measure": settings, **hashes})


def sources_hash(task: Mapping[str, Any], *backend_modules: str) -> str:
    """The content of every source file that runs for a task's cells on a backend."""
    modules = (*ENTRY_MODULES, *backend_modules, *modules_of_targets(task))
    files = closure(modules) | {name: path for name in CONDUCTORS if (path := locate(name))}
    files |= {f"qbench.native/{path.name}": path for path in sources.files()}
    return sha256_of({name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()})


def key_hash(cell: str, sources: str, packages: Iterable[str] = ()) -> str:
    """One answer: the cell, the source files that run for it, and the environment that can change a number.

    `packages` are those whose versions belong to that environment, beside torch.
    """
    environment = {**answering_environment(), **versions(packages)}
    return sha256_of({"cell": cell, "sources": sources, "environment": environment})


@functools.cache
def answering_environment() -> dict[str, Any]:
    """What can change a number: processor, kernel path, threads, Python, torch. Not time, load, host or path."""
    model, flags = _processor()
    return {
        "cpu": model,
        "cpu_flags": flags,
        "kernel_path": {name: os.environ[name] for name in KERNEL_SETTINGS if name in os.environ},
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores()),
        "python": platform.python_version(),
        **versions(("torch", "torchvision")),
    }


def environment() -> dict[str, Any]:
    """What explains a number, for the record: the answering environment, and versions, revision, cores and load."""
    return {
        **answering_environment(),
        **versions(("hydra-core", "mlflow", "numpy", "safetensors")),
        "vnni": any("vnni" in flag for flag in answering_environment()["cpu_flags"]),
        "qbench": __version__,
        "git_revision": git_revision(),
        "cores": cores(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
    }


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions, read from the metadata: importing torch for this would cost seconds."""
    found = {}
    for package in packages:
        try:
            found[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_revision() -> str | None:
    """The revision of the checkout that qbench runs from, `-dirty` when edited; None outside a checkout."""
    if not (PROJECT / ".git").exists():
        return None
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _processor() -> tuple[str, list[str]]:
    """Model name and SIMD flags of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, sorted(flag for flag in flags if SIMD_FLAG.match(flag))
