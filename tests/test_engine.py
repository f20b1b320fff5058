"""The engine outside Python: what the library exports, and its calls replayed under sanitizers and on other CPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import engine_cases
import pytest

from qbench.native import build, sources
from qbench.native.library import SIGNATURES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not sources.built(), reason="the native backend is not built here"),
]

COMPILER = os.environ.get("CXX") or shutil.which("g++") or "clang++"
# g++ 12 gives up on pairs of vectors without any optimization.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "cases"
    assert engine_cases.record(path) > 300
    return path


def program(folder: Path, compiler: str, *flags: str) -> Path:
    """engine_replay with an engine of the package's own flags and these; skips where the compiler cannot make it."""
    command = [compiler, *build.FLAGS, "-Wextra", *flags, "-I", str(sources.FOLDER), "-o", str(folder / "replay")]
    (folder / "nothing.cpp").write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    try:
        subprocess.run([*command, str(folder / "nothing.cpp")], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{compiler} does not compile with {' '.join(flags)} here")
    compiled = [str(sources.FOLDER / name) for name in sources.COMPILED]
    replay = str(Path(__file__).with_name("engine_replay.cpp"))
    done = subprocess.run([*command, *compiled, replay], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "replay"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory.mktemp("sanitized"), COMPILER, *SANITIZERS)


@pytest.fixture(scope="module")
def optimized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory.mktemp("optimized"), COMPILER)


def replayed(*command: str | Path, isa: str | None = None) -> str:
    """The instruction set that ran. Fails where a result differs, or a sanitizer or the CPU stops the program."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", **({"QBENCH_ISA": isa} if isa else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ran, rest = done.stdout.split(": ")
    assert rest.endswith("cases, 0 failures\n")
    return ran


# --- what is exported ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("nm"), reason="there is no nm")
def test_the_library_exports_what_the_header_declares_and_nothing_else() -> None:
    """So no product of floats can be called but that of weight-only layers, which the header names as such."""
    listed = subprocess.run(["nm", "-D", "--defined-only", sources.LIBRARY], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in listed.stdout.splitlines()}
    header = re.sub(r"//.*", "", (sources.FOLDER / "engine.h").read_text())
    declared = set(re.findall(r"\b(qb_\w+)\(", header))
    assert exported == declared == {*SIGNATURES, "qb_sources"}


# --- sanitizers, whose program takes a minute to compile: CI runs the slow tests of this file -------------------------


@pytest.mark.slow
@pytest.mark.parametrize("isa", sources.PATHS)
def test_no_sanitizer_objects(isa: str, sanitized: Path, cases: Path) -> None:
    """Memory of exactly the tensors' sizes, at the least alignment; two threads."""
    ran = replayed(sanitized, cases, isa=isa)
    if ran != isa and isa != "portable":
        pytest.skip(f"this CPU does not run {isa}, {ran} ran")
    assert ran == isa


@pytest.mark.slow
@pytest.mark.parametrize("isa", sources.PATHS)
def test_what_an_optimizer_adds_stays_in_memory(isa: str, optimized: Path, cases: Path) -> None:
    """As it is shipped: loads that only the compiler's vectors make would end in the page that nobody may touch."""
    ran = replayed(optimized, cases, isa=isa)
    if ran != isa:
        pytest.skip(f"this CPU does not run {isa}, {ran} ran")


@pytest.mark.slow
@pytest.mark.parametrize("isa", sources.PATHS)
def test_a_lack_of_memory_is_told_and_survived(isa: str, sanitized: Path, cases: Path, tmp_path: Path) -> None:
    """Each allocation of scratch fails in turn, on whichever thread makes it; then the same thread is right again."""
    (tmp_path / "no cases").write_bytes(bytes(8))
    if (would := replayed(sanitized, tmp_path / "no cases", isa=isa)) != isa:
        pytest.skip(f"this CPU does not run {isa}, {would} would")
    assert replayed(sanitized, cases, "4", isa=isa) == isa


@pytest.mark.slow
def test_a_wrong_result_is_noticed(sanitized: Path, cases: Path, tmp_path: Path) -> None:
    """The last byte of the last result, which stands before a number and a tolerance, altered."""
    data = bytearray(cases.read_bytes())
    data[-17] ^= 1
    (tmp_path / "altered").write_bytes(data)
    done = subprocess.run([sanitized, tmp_path / "altered"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "element 19 differs" in done.stderr
    (tmp_path / "altered").write_bytes(data[:-1])
    done = subprocess.run([sanitized, tmp_path / "altered"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "engine_replay: the file is cut off\n")


# --- other CPUs ------------------------------------------------------------------------------------------------------


def emulator(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"there is no {name} (Debian: qemu-user)")


@pytest.mark.slow
def test_on_aarch64(cases: Path, tmp_path: Path) -> None:
    qemu = emulator("qemu-aarch64")
    assert replayed(qemu, program(tmp_path, "aarch64-linux-gnu-g++", "-static"), cases) == "portable"


@pytest.mark.slow
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "portable"), ("Haswell", "avx2")])
def test_on_an_older_x86_64(cpu: str, isa: str, cases: Path, optimized: Path) -> None:
    """Nehalem has no AVX: one such instruction outside the paths that need it would end the program."""
    qemu = emulator("qemu-x86_64")
    assert replayed(qemu, "-cpu", cpu, optimized, cases) == isa
