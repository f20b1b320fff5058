"""Timing with a clock of our own (exact arithmetic), real children for memory and compiling; no speed is asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qbench
from qbench import compiled, latency, measure
from qbench.measure import Measure
from qbench.memory import memory_of
from qbench.statistics import ratio_over_processes
from qbench.timing import BlockTimes, Timing, no_garbage_collection, time_blocks


class Clock:
    """Time that passes only in the calls and sleeps of a test."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.log.append(f"sleep {seconds:g}")
        self.now += seconds

    def call(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        """A contestant whose call number n takes seconds(n)."""
        count = iter(range(10**6))

        def run() -> None:
            self.log.append(name)
            self.now += seconds(next(count))

        return run

    def blocks(self) -> list[tuple[str, int]]:
        """What ran between the sleeps: (name, calls)."""
        found: list[tuple[str, int]] = []
        for event in self.log:
            if event.startswith("sleep"):
                found.append(("", 0))
            else:
                assert found[-1][0] in ("", event)
                found[-1] = (event, found[-1][1] + 1)
        return found


def timed(timing: Timing, seed: int = 0, **contestants: Callable[[int], float]) -> tuple[BlockTimes, Clock]:
    clock = Clock()
    calls = {name: clock.call(name, seconds) for name, seconds in contestants.items()}
    return time_blocks(calls, timing, seed=seed, clock=clock, sleep=clock.sleep), clock


def test_a_block_has_its_calls_and_its_time() -> None:
    """10 ms calls need 10 of them, 2 ms calls 25 to fill 50 ms; the first two are dropped."""
    times, clock = timed(Timing(rounds=3), slow=lambda n: 0.010, fast=lambda n: 0.002)
    rounds = clock.blocks()[-6:]
    assert sorted(rounds) == [("fast", 25)] * 3 + [("slow", 10)] * 3
    assert {name: len(calls) for name, calls in times.calls_ms.items()} == {"slow": 3 * 8, "fast": 3 * 23}
    assert times.medians_ms == {"slow": [pytest.approx(10)] * 3, "fast": [pytest.approx(2)] * 3}
    assert times.ratios("slow", "fast") == pytest.approx([5.0] * 3)
    assert set(clock.log) == {"slow", "fast", "sleep 0.02"}


def test_the_first_two_calls_of_a_block_are_dropped() -> None:
    """Every block starts cold: 100 ms, 50 ms, then 1 ms a call; block_calls = 10 and no minimum of time."""
    clock = Clock()
    cold = {"left": 0}

    def sleep(seconds: float) -> None:
        cold["left"] = 2

    def call() -> None:
        clock.now += {2: 0.1, 1: 0.05, 0: 0.001}[cold["left"]]
        cold["left"] = max(0, cold["left"] - 1)

    times = time_blocks({"a": call}, Timing(rounds=4, block_s=0.0), clock=clock, sleep=sleep)
    assert times.calls_ms["a"] == pytest.approx([1.0] * 8 * 4)


def test_blocks_come_in_an_order_that_the_seed_decides() -> None:
    constant = {name: (lambda n: 0.01) for name in ("a", "b", "c")}
    orders = {}
    with no_garbage_collection():  # else before each
        for seed in range(6):
            times, clock = timed(Timing(rounds=4), seed, **constant)
            order = [name for name, _ in clock.blocks()[-12:]]
            assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 12, 3))
            assert timed(Timing(rounds=4), seed, **constant)[0] == times
            orders[tuple(order)] = seed
    assert len(orders) == 6


def test_warm_up_goes_on_while_a_trend_lasts() -> None:
    """Steady at once: 5 blocks of 2 calls, one after the other. Getting faster for 4 blocks: 7. For ever: 10.

    Then the one of the only round. The time alone is that of the last 5.
    """
    steady, clock = timed(Timing(rounds=1), a=lambda n: 0.01)
    assert clock.blocks() == [("a", 5 * 2), ("a", 10)]
    assert steady.settled == {"a": True}
    tick = 2.0**-10  # so that the clock's sums are exact, and equal calls take equal times
    timing = Timing(rounds=1, pause_s=tick, block_s=32 * tick)
    falling, clock = timed(timing, a=lambda n: (16 - 2 * (n // 2) if n < 8 else 4) * tick)
    # Medians 16 14 12 10 4 4 4 ticks: of the ten pairs among the last five three are ties, and tau is -0.7.
    assert clock.blocks()[0] == ("a", 7 * 2)
    assert falling.alone_ms == {"a": 4000 * tick}
    endless, clock = timed(Timing(rounds=1), a=lambda n: 0.02 * 0.99**n)
    assert clock.blocks()[0] == ("a", 10 * 2)
    assert endless.settled == {"a": False}


def test_slow_calls_prolong_neither_the_warm_up_nor_the_blocks() -> None:
    """Of 2 s calls a block has 6 instead of 10, and one of the warm-up a single one."""
    _, clock = timed(Timing(rounds=1), a=lambda n: 2.0)
    assert clock.blocks() == [("a", 5), ("a", 6)]


def test_a_cold_start_is_no_disturbance() -> None:
    """After each pause one call of 8 ms, one of 4, then 2 ms: the time alone has more warm calls than cold ones."""
    clock, since = Clock(), {"calls": 0}

    def sleep(seconds: float) -> None:
        since["calls"] = 0

    def call() -> None:
        clock.now += (8, 4, *[2] * 98)[since["calls"]] * 2.0**-10
        since["calls"] += 1

    times = time_blocks({"a": call}, Timing(rounds=2, block_s=0.01), clock=clock, sleep=sleep)
    assert times.shift("a") == 1.0


def test_timing_refuses_nothing_to_time_and_blocks_too_short_to_drop_two() -> None:
    with pytest.raises(ValueError, match="at least one contestant"):
        time_blocks({})
    with pytest.raises(ValueError, match="at least 1 round and 3 calls a block"):
        Timing(block_calls=2)


def test_a_real_clock_works_and_the_collector_is_back_afterwards() -> None:
    import gc

    times = time_blocks({"a": lambda: sum(range(100))}, Timing(rounds=2, block_s=0.001, pause_s=0.0))
    assert min(times.calls_ms["a"]) > 0
    assert gc.isenabled()
    assert BlockTimes(**json.loads(json.dumps(times.as_json()))) == times


# --- from processes to metrics ------------------------------------------------------------------------------------


def process(
    batches: dict[str, dict[str, float]], calls: int = 8, rounds: int = 5, shift: float = 1.0
) -> dict[str, Any]:
    """What one timing process answers when every call of a contestant takes its constant time."""
    return {
        "batches": {
            batch: BlockTimes(
                {name: [ms] * calls * rounds for name, ms in times.items()},
                {name: [ms] * rounds for name, ms in times.items()},
                {name: ms / shift for name, ms in times.items()},
                dict.fromkeys(times, True),
            ).as_json()
            for batch, times in batches.items()
        },
        "compile_failure": None,
    }


def test_combine_quantized_cell_by_hand() -> None:
    """Ratios 2, 4, 8: geometric mean 4; fp32 compiled takes exactly half of eager."""
    fp32 = latency.combine([process({"1": {"eager": 8.0, "compiled": 4.0}}) for _ in range(3)])
    processes = [process({"1": {"eager": 8.0, "cell": ms}}) for ms in (4.0, 2.0, 1.0)]
    found = latency.combine(processes, fp32["details"]["fp32_baselines"])
    metrics = found["metrics"]
    assert metrics["latency_ms_median"] == 2.0
    assert metrics["latency_ms_p90"] == 4.0  # of 120 calls a third take 4 ms
    assert metrics["throughput_per_s"] == 500.0
    assert metrics["latency_ms_fp32"] == pytest.approx(4.0)
    assert metrics["speedup_vs_eager"] == pytest.approx(4.0)
    assert metrics["speedup"] == pytest.approx(2.0)
    reach = 4.302653 * math.log(2) / math.sqrt(3)
    assert metrics["speedup_ci_low"] == pytest.approx(2 * math.exp(-reach), rel=1e-5)
    assert metrics["speedup_ci_high"] == pytest.approx(2 * math.exp(reach), rel=1e-5)
    assert found["environment"] == {"fp32_baseline": "compiled"}
    assert found["notes"] == []
    assert found["details"]["timing"]["1"]["eager_over_cell"] == pytest.approx([2, 4, 8])
    assert found["details"]["timing"]["1"]["undisturbed_ms"]["cell"] == pytest.approx([4, 2, 1])
    json.dumps(found, allow_nan=False)


def test_combine_widens_the_interval_by_the_baselines_own() -> None:
    fp32 = latency.combine([process({"1": {"eager": 8.0, "compiled": ms}}) for ms in (4.0, 4.2, 4.1)])
    cell = [process({"1": {"eager": 8.0, "cell": ms}}) for ms in (2.0, 2.02, 2.01)]
    alone = latency.combine(cell)["metrics"]
    chained = latency.combine(cell, fp32["details"]["fp32_baselines"])["metrics"]
    width = [math.log(m["speedup_ci_high"] / m["speedup_ci_low"]) for m in (alone, chained)]
    assert width[1] > 1.5 * width[0]


def test_combine_fp32_cell_is_eager_against_the_fastest() -> None:
    found = latency.combine(
        [process({"1": {"eager": 8.0, "compiled": 4.0}, "16": {"eager": 60.0, "compiled": 80.0}})] * 3
    )
    metrics = found["metrics"]
    assert (metrics["latency_ms_median"], metrics["latency_ms_fp32"]) == (8.0, pytest.approx(4.0))
    assert (metrics["speedup"], metrics["speedup_vs_eager"]) == (pytest.approx(0.5), 1.0)
    assert (metrics["latency_ms_median_b16"], metrics["latency_ms_fp32_b16"]) == (60.0, 60.0)
    assert (metrics["speedup_b16"], metrics["speedup_ci_low_b16"], metrics["speedup_ci_high_b16"]) == (1.0, 1.0, 1.0)
    assert metrics["throughput_per_s_b16"] == pytest.approx(16 / 0.060)
    assert found["environment"] == {"fp32_baseline": "compiled", "fp32_baseline_b16": "eager"}
    assert found["notes"] == []


def test_combine_says_when_only_eager_is_known() -> None:
    answers = [{**process({"1": {"eager": 8.0}}), "compile_failure": "no C++ compiler"}] * 3
    fp32 = latency.combine(answers)
    assert fp32["notes"] == ["baseline_eager_only"]
    assert fp32["details"]["compile_failure"] == "no C++ compiler"
    for baselines in (None, fp32["details"]["fp32_baselines"], {}):
        cell = latency.combine([process({"1": {"eager": 8.0, "cell": 4.0}})] * 3, baselines)
        assert cell["notes"] == ["baseline_eager_only"]
        assert cell["metrics"]["speedup"] == cell["metrics"]["speedup_vs_eager"] == pytest.approx(2.0)


def test_a_compiler_that_failed_in_one_process_leaves_eager() -> None:
    answers = [process({"1": {"eager": 8.0, "compiled": 4.0}}), process({"1": {"eager": 8.0}})]
    for order in (answers, answers[::-1]):
        found = latency.combine(order)
        assert found["environment"] == {"fp32_baseline": "eager"}
        assert found["notes"] == ["baseline_eager_only"]


def test_combine_labels_one_process_and_leaves_out_what_it_cannot_know() -> None:
    fp32 = latency.combine([process({"1": {"eager": 8.0, "compiled": 4.0}}, rounds=3)])
    found = latency.combine([process({"1": {"eager": 8.0, "cell": 2.0}}, rounds=3)], fp32["details"]["fp32_baselines"])
    assert found["notes"] == ["one_process"]
    assert "latency_ms_p90" not in found["metrics"]  # 24 calls
    single = latency.combine([process({"1": {"eager": 8.0, "cell": 2.0}}, rounds=1)])["metrics"]
    assert single["speedup"] == pytest.approx(4.0)
    assert "speedup_ci_low" not in single


@pytest.mark.parametrize(
    ("shifts", "marked"), [((1.04, 0.97, 1.2), False), ((1.06, 1.07, 1.0), True), ((0.9,) * 3, True)]
)
def test_disturbed_when_a_contestant_does_not_reproduce_its_time_alone(shifts: tuple[float, ...], marked: bool) -> None:
    found = latency.combine([process({"1": {"eager": 8.0, "cell": 2.0}}, shift=shift) for shift in shifts])
    assert ("disturbed" in found["notes"]) == marked


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("batch", 0, "allowed is a whole number of at least 1"),
        ("processes", 0, "allowed is a whole number of at least 1"),
        ("threads", -1, "allowed is a whole number of at least 1"),
        ("rounds", 2.5, "allowed is a whole number of at least 1"),
        ("rounds", True, "allowed is a whole number of at least 1"),
        ("rounds", "5", "allowed is a whole number of at least 1"),
        ("block_calls", 2, "allowed is a whole number of at least 3"),
        ("block_ms", -1, "allowed is a number of at least 0"),
        ("timeout_s", math.nan, "allowed is a number of at least 1"),
        ("timeout_s", math.inf, "allowed is a number of at least 1"),
        ("examples", 0, "allowed is a whole number of at least 1 or null"),
        ("eval_batch", None, "allowed is a whole number of at least 1"),
        ("compile", 1, "allowed are true and false"),
    ],
)
def test_impossible_settings_are_one_line(name: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"measure.{name}=.*{allowed}$") as error:
        Measure(**{name: value})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_settings_from_a_configuration_node() -> None:
    settings = Measure.of({"_target_": "qbench.measure.Measure", "batch": 1, "block_ms": 20, "examples": None})
    assert settings == Measure(batch=1, block_ms=20)
    assert (settings.batches, settings.timing.block_s) == ((1,), 0.02)
    assert Measure().batches == (1, 16)


def test_a_glance_keeps_what_is_asked_and_times_less() -> None:
    settings = Measure(batch=8, rounds=2, threads=2, examples=100)
    assert settings.glance() == Measure(
        batch=8, rounds=2, threads=2, examples=100, processes=1, block_calls=3, block_ms=10.0
    )
    assert Measure().glance().rounds == 3


# --- in children --------------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: str) -> Any:
    """Run code in a fresh interpreter and return the JSON that it prints last."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_modules_of_the_parent_leaves_torch_and_scipy_out() -> None:
    code = (
        "import json, sys, qbench.measure, qbench.metrics, qbench.latency\n"
        "print(json.dumps([m for m in ('torch', 'scipy', 'hydra', 'mlflow', 'pandas') if m in sys.modules]))"
    )
    assert run_python(code) == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux /proc")
@pytest.mark.parametrize("mib", [64, 128])
def test_memory_sees_what_is_allocated_and_not_what_was_before(mib: int) -> None:
    code = (
        "import json, sys\n"
        "from qbench.memory import memory_of\n"
        "size = int(sys.argv[1]) << 20\n"
        "ballast = bytearray(b'x') * (200 << 20)\n"
        "earlier = bytearray(b'x') * (300 << 20)\n"
        "del earlier\n"
        "def load():\n"
        "    weights = bytearray(b'x') * (size // 2)\n"
        "    return lambda x: len(weights) + len(bytearray(b'x') * (size // 2))\n"
        "print(json.dumps(memory_of(load, (1,))))"
    )
    found = run_python(code, str(mib))
    assert found == pytest.approx(mib << 20, rel=0.02, abs=1 << 20)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no Linux /proc")
def test_kept_memory_is_not_faulted_in_again() -> None:
    code = (
        "import json, resource\n"
        "from qbench.memory import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    del_me = bytearray(b'x') * (40 << 20)\n"
        "    del del_me\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "given_back = [faults() for _ in range(3)]\n"
        "keep_freed_memory()\n"
        "print(json.dumps([min(given_back), [faults() for _ in range(3)][-1]]))"
    )
    given_back, kept = run_python(code)
    assert given_back > 10
    assert kept < given_back / 2


def test_memory_is_absent_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qbench.memory.CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert memory_of(lambda: lambda x: x, (1,)) is None


COMPILE = """
import json, os, pathlib, sys, torch
from qbench.compiled import compile_fp32
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
found = []
with torch.inference_mode():
    for batch in (1, 4):
        inputs = (torch.randn(batch, 8),)
        compiled = compile_fp32(model, inputs, sys.argv[1])
        if isinstance(compiled, str):
            found.append(compiled)
            continue
        with torch.compiler.set_stance("fail_on_recompile"):
            found.append(torch.allclose(compiled(*inputs), model(*inputs), atol=1e-5))
children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")
print(json.dumps([*found, len(children.read_text().split()) if children.exists() else 0]))
"""


@pytest.mark.slow
def test_compiled_fp32_computes_the_same_and_keeps_its_products(tmp_path: Path) -> None:
    assert run_python(COMPILE, str(tmp_path)) == [True, True, 0]
    assert list((tmp_path / "inductor" / "threads-1").rglob("*.so"))


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    *reasons, workers = run_python(COMPILE, str(tmp_path))
    assert workers == 0
    assert all("no-such-compiler" in reason or "compiler" in reason.lower() for reason in reasons)
    assert all("\n" not in reason and len(reason) <= compiled.LONGEST_REASON for reason in reasons)


@pytest.fixture
def small_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of one small layer and a saved program that is that layer too, in place of the real ones."""
    model = torch.nn.Linear(4, 4)
    stand_ins: dict[str, dict[str, Any]] = {
        "evaluate": {
            "fp32_model": lambda *_: model,
            "example_batch": lambda _, prepared, batch: (torch.zeros(batch, 4),),
        },
        "saved": {"load": lambda path, backend: model},
    }
    for name, content in stand_ins.items():
        module = types.ModuleType(f"qbench.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(qbench, name, module, raising=False)


QUICK = {"batch": 2, "rounds": 2, "block_calls": 3, "block_ms": 0.1, "compile": False}


def test_the_fastest_quarter_of_the_blocks_three_at_least_tells_an_undisturbed_time() -> None:
    assert latency.undisturbed_ms([9.0, 1.0, 8.0, 2.0, 4.0, 7.0]) == pytest.approx(2.0)
    assert latency.undisturbed_ms([*[3.0] * 4, *[6.0] * 12]) == pytest.approx(3.0)
    assert latency.undisturbed_ms([2.0, 8.0]) == pytest.approx(4.0)


@pytest.mark.usefixtures("small_cell")
@pytest.mark.parametrize("programs", [{"0": "m.qb", "1": "n.qb"}, {}])
def test_time_cells_answers_what_combine_reads(programs: dict[str, str]) -> None:
    threads = torch.get_num_threads()
    try:
        answers = [measure.time_cells(programs, {}, {}, QUICK, index, "cache") for index in range(2)]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    answers = json.loads(json.dumps(answers))
    assert set(answers[0]["batches"]["2"]["medians_ms"]) == {"eager", *programs}
    own = [latency.part(process, "1") for process in answers] if programs else answers
    found = latency.combine(own)
    names = {"eager", "cell"} if programs else {"eager"}
    assert [set(part["median_ms"]) for part in found["details"]["timing"].values()] == [names, names]
    assert {"latency_ms_median", "latency_ms_median_b2", "speedup_vs_eager", "speedup_vs_eager_b2"} <= set(
        found["metrics"]
    )


@pytest.mark.usefixtures("small_cell")
def test_time_cells_says_why_it_could_not_compile_and_tries_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def refuse(model: object, inputs: tuple[torch.Tensor, ...], cache: str) -> str:
        tries.append(len(inputs[0]))
        return "no C++ compiler"

    monkeypatch.setattr(compiled, "compile_fp32", refuse)
    answer = measure.time_cells({}, {}, {}, {**QUICK, "compile": True}, 0, "cache")
    assert (answer["compile_failure"], tries) == ("no C++ compiler", [1])


@pytest.mark.usefixtures("small_cell")
@pytest.mark.parametrize(("peak", "found"), [(4096, {"peak_memory_bytes": 4096}), (None, {})])
def test_memory_cell_loads_the_program_and_runs_the_larger_batch(
    monkeypatch: pytest.MonkeyPatch, peak: int | None, found: dict[str, int]
) -> None:
    def memory_of(load: Callable[[], Any], inputs: tuple[torch.Tensor, ...]) -> int | None:
        assert load()(*inputs).shape == (2, 4)
        return peak

    monkeypatch.setattr(measure, "memory_of", memory_of)
    assert measure.memory_cell("m.qb", {}, {}, QUICK) == {"metrics": found}


# --- the public comparison ----------------------------------------------------------------------------------------


def test_compare_latency_is_labelled_as_one_process() -> None:
    quick = Timing(rounds=3, block_calls=4, block_s=0.0, pause_s=0.0)
    model = torch.nn.Linear(8, 8)
    found = qbench.compare_latency({"fp32": model, "int8": model}, (torch.zeros(1, 8),), timing=quick)
    assert "one_process" in found.notes
    assert set(found.medians_ms) == {"fp32", "int8"}
    low, high = found.intervals["int8"]
    assert low <= found.ratios["int8"] <= high
    assert str(found).startswith("fp32: ")
    assert "times as fast as fp32" in str(found)
    with pytest.raises(ValueError, match="at least two"):
        qbench.compare_latency({"fp32": model})


def test_compare_latency_gives_back_the_threads() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def look() -> None:
        seen.append(torch.get_num_threads())

    qbench.compare_latency({"a": look, "b": look}, rounds=1, timing=Timing(rounds=1, block_calls=3, block_s=0.0))
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_the_ratio_is_the_first_over_the_other() -> None:
    times, _ = timed(Timing(rounds=3), fp32=lambda n: 0.03, int8=lambda n: 0.01)
    assert ratio_over_processes([times.ratios("fp32", "int8")]).ratio == pytest.approx(3.0)
