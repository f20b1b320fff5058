"""Makes the embedded Fashion-MNIST from the Debian package's folder; see PROVENANCE.md.

python tasks/data/make_fashion_mnist.py fm/usr/share/datasets/fashion-mnist tasks/data/fashion_mnist
"""

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np

TRAINING_IMAGES_PER_CLASS = 2000
IMAGE_HEADER, LABEL_HEADER = 16, 8  # bytes of the idx headers


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """The indices of the first `count` examples of each class, in the order of the file."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def idx(array: np.ndarray) -> bytes:
    """`array` (uint8) in the idx format: 0, 0, type 8 (uint8), rank, then each dimension as big-endian int32."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write(path: Path, content: bytes) -> None:
    """Compresses without a name or time inside, so that the same content gives the same file."""
    path.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name, path.stat().st_size)


def main(source: Path, target: Path) -> None:
    def content(name: str) -> bytes:
        return gzip.decompress((source / name).read_bytes())

    labels = np.frombuffer(content("train-labels-idx1-ubyte.gz"), np.uint8, offset=LABEL_HEADER)
    images = np.frombuffer(content("train-images-idx3-ubyte.gz"), np.uint8, offset=IMAGE_HEADER).reshape(-1, 28, 28)
    chosen = first_of_each_class(labels, TRAINING_IMAGES_PER_CLASS)
    write(target / "train-images-idx3-ubyte.gz", idx(images[chosen]))
    write(target / "train-labels-idx1-ubyte.gz", idx(labels[chosen]))
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        write(target / name, content(name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
