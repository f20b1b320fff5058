"""The data files of the project: read, unpacked and checked."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path


def read_checked(path: Path, sha256: str) -> bytes:
    """The content of a file, unpacked where its name ends in .gz.

    Raises ValueError in one line for a file that is missing, damaged or whose content has another sha256.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, restore it from the repository") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}), restore it from the repository") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: content has sha256 {found[:12]}..., expected {sha256[:12]}..., restore the file")
    return content
