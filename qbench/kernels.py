"""`python -m qbench.kernels TASK`: how fast the native engine's kernels are on a task's layers.

Each operation of the quantized program runs alone on the inputs that it has there, called as in a program, without
Python in between. GMAC/s stands beside the share of what this core multiplies at most, measured in the same run:
products with padding count where they are left out too, and all of a convolution's where minimal filtering takes a
quarter of them, so that it may exceed the most.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qbench.config import UsageError, one_line

PEAK_ROUNDS = 1_000_000


@dataclass(frozen=True)
class KernelTime:
    """One operation: its name in the program, the shape of its first input, milliseconds a call, products a call."""

    name: str
    operation: str
    shape: tuple[int, ...]
    ms: float
    macs: int

    @property
    def gmacs(self) -> float:
        """10^9 multiply-accumulates a second."""
        return self.macs / self.ms / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, or 2 for a task or a method that there is not."""
    parser = argparse.ArgumentParser("python -m qbench.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("task", nargs="?", default="bench_resnet18", help="a task of conf/task (default: %(default)s)")
    parser.add_argument("--method", default="ptsq", help="ptsq, ptdq or woq (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    try:
        show(given.task, given.method, given.batch, given.threads)
    except (UsageError, ValueError, OSError) as error:
        print(f"qbench: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def show(task_name: str, method: str, batch: int, threads: int) -> None:
    """Quantize a task's network, time its operations, print the table."""
    import torch

    from qbench.compose import Composer, close
    from qbench.native.library import isa
    from qbench.quantization import quantize
    from qbench.recipe import Recipe
    from qbench.weights import final_weights, task_folder, task_of

    composer = Composer(argparse.Namespace(multirun=False, overrides=[f"task={task_name}"], config_dir=None))
    (job,) = composer.jobs()
    close()
    config, cache = job.values["task"], Path("results") / "cache"
    task = task_of(config, cache, print)
    model = final_weights(task, task_folder(config, cache), print)
    calibration = task.calibration()
    q = quantize(model, calibration[0], Recipe(method=method, backend="native"), calibration=calibration)
    torch.set_num_threads(threads)
    inputs = tuple(torch.cat([leaf] * -(-batch // len(leaf)))[:batch] for leaf in calibration[0])
    highest = peak() * threads
    print(f"{task.name} {method}, batch {batch}, {threads} threads, {isa()}", end="")
    print(f"; most: {highest:.1f} GMAC/s" if highest else "")
    times = time_kernels(q, inputs)
    print(f"{'operation':44} {'input':20} {'ms':>8} {'GMAC/s':>8} {'of most':>8}")
    for row in times:
        speed = f"{row.gmacs:8.1f}" if row.macs else " " * 8
        share = f"{row.gmacs / highest:8.0%}" if row.macs and highest else ""
        name, shape = f"{row.name} ({row.operation})"[:44], " x ".join(map(str, row.shape))
        print(f"{name:44} {shape:20} {row.ms:8.3f} {speed} {share}".rstrip())
    total, macs = sum(row.ms for row in times), sum(row.macs for row in times)
    share = f"{macs / total / 1e6 / highest:8.0%}" if highest else ""
    print(f"{'together':44} {'':20} {total:8.3f} {macs / total / 1e6:8.1f} {share}".rstrip())


def peak() -> float:
    """The GMAC/s of one core that does nothing but multiply int8 values in registers; 0 where the path is portable."""
    from qbench.native.library import library
    from qbench.timing import Timing, time_blocks

    count = library().qb_peak(PEAK_ROUNDS)
    times = time_blocks({"peak": lambda: library().qb_peak(PEAK_ROUNDS)}, Timing(rounds=3, block_calls=3))
    return float(count / min(times.medians_ms["peak"]) / 1e6)


def time_kernels(model: Any, inputs: tuple[Any, ...], block_s: float = 0.02) -> list[KernelTime]:
    """Each operation of the program alone, in the order of execution, from three blocks of calls of so many seconds."""
    import torch
    from torch.utils import _pytree as pytree

    from qbench.program import Macs, lower_graph
    from qbench.timing import Timing, no_garbage_collection, time_blocks

    macs = Macs()
    module = lower_graph(model.program, model.backend, macs)
    found: list[KernelTime] = []

    class Timed(torch.fx.Interpreter):
        def call_function(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if "conv" in getattr(target, "__name__", ""):
                args = tuple(_channels_last(arg) for arg in args)
            before = macs.int8 + macs.float32
            result = target(*args, **kwargs)
            count = macs.int8 + macs.float32 - before
            first = next((leaf for leaf in args if isinstance(leaf, torch.Tensor)), None)
            if first is not None:
                call = _engine_calls(target, args, kwargs) or partial(target, *args, **kwargs)
                times = time_blocks({"it": call}, Timing(rounds=3, block_s=block_s, pause_s=0))
                ms = min(times.medians_ms["it"])
                name, shape = self.current, tuple(first.shape)
                found.append(KernelTime(name, getattr(target, "__name__", str(target)), shape, ms, count))
            return result

        def run_node(self, n: Any) -> Any:
            self.current = n.name
            return super().run_node(n)

    with torch.inference_mode(), no_garbage_collection():
        Timed(module).run(*pytree.tree_leaves(inputs))
    return found


def _engine_calls(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any] | None:
    """The engine's part of an operation on these inputs, written down; None where torch has a part in it."""
    import torch
    from torch.utils import _pytree as pytree

    from qbench.backends.native_plan import Plan, Recording
    from qbench.backends.native_writer import CannotPlanError, TorchCall
    from qbench.native.library import library
    from qbench.program import Macs

    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    images = {index for index in places if _is_channels_last(leaves[index])}

    def run(*given: Any) -> list[Any]:
        tensors = {
            index: leaf.permute(0, 3, 1, 2) if index in images else leaf
            for index, leaf in zip(places, given, strict=True)
        }
        again = [tensors.get(index, leaf) for index, leaf in enumerate(leaves)]
        arguments, options = pytree.tree_unflatten(again, structure)
        return pytree.tree_leaves(target(*arguments, **options))

    inputs = [leaves[i].permute(0, 2, 3, 1) if i in images else leaves[i].contiguous() for i in places]
    try:
        recording = Recording(run, inputs, Macs())
    except CannotPlanError:
        return None
    if not recording.writer.calls or any(isinstance(call, TorchCall) for call in recording.writer.calls):
        return None
    plan = Plan(recording)
    held = plan, plan.run(inputs, Macs()), inputs, (ctypes.c_int64 * 2)()  # what the calls point to
    words, count = plan.stretch()

    def call() -> Any:
        return library().qb_run(ctypes.addressof(words), count, ctypes.addressof(held[-1]))

    return call


def _is_channels_last(leaf: Any) -> bool:
    return bool(leaf.dim() == 4 and not leaf.is_contiguous() and leaf.permute(0, 2, 3, 1).is_contiguous())


def _channels_last(image: Any) -> Any:
    """As the engine has images in a program: otherwise torch would move them, at each call, before the operation."""
    import torch

    is_image = isinstance(image, torch.Tensor) and image.dim() == 4
    return image.contiguous(memory_format=torch.channels_last) if is_image else image


def operations_ms(
    program: str, task_config: dict[str, Any], prepared: dict[str, Any], measure: dict[str, Any]
) -> dict[str, float]:
    """Milliseconds of each operation of a saved program, each timed alone on the inputs that it has at batch 1."""
    import torch

    from qbench import evaluate
    from qbench.measure import Measure
    from qbench.saved import load

    torch.set_num_threads(Measure.of(measure).threads_of(1))
    inputs = evaluate.example_batch(task_config, prepared, 1)
    return {row.name: row.ms for row in time_kernels(load(Path(program), "native"), inputs, block_s=0.004)}


if __name__ == "__main__":
    sys.exit(main())
