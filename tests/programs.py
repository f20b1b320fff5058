"""Small networks and one-operation programs for the tests of the quantization core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from qbench.backends import native, reference
from qbench.native import sources
from qbench.ops import ACTIVATIONS
from qbench.program import Macs, Program


def grid(*shape: int, seed: int, step: float = 0.125, limit: int = 16) -> Tensor:
    """Multiples of `step`, so that float32 sums of products are exact in any order."""
    values = np.random.default_rng(seed).integers(-limit, limit + 1, shape)
    return torch.from_numpy(values * step).float()


def on_grid(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode, with parameters on a grid."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = grid(*parameter.shape, seed=seed + number)
    return module.eval().requires_grad_(False)


class Apply(nn.Module):
    """function(modules, x), so that a test can write a network as a lambda."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module, **constants: Tensor) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(modules)
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class EveryOperation(nn.Module):
    """One of each kind of node: layers of all sorts, residuals, clamps, tables, pools, joins, moves, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8), nn.ReLU6())
        self.grouped = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4)
        self.before = nn.Sequential(nn.BatchNorm2d(16), nn.Hardtanh(-2, 2))
        self.same = nn.Conv2d(16, 16, (2, 3), padding="same", padding_mode="zeros")
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.squeeze = nn.Conv2d(24, 8, 1)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4, 10)
        self.register_buffer("shift", torch.linspace(-1, 1, 16).reshape(16, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.depthwise(functional.pad(x, (1, 0, 1, 0)))
        y = functional.silu(self.grouped(x)) + x
        y = functional.relu(self.same(self.before(y)) + y)
        y = y * self.gate(y) - 0.5 * x + self.shift
        pooled = functional.avg_pool2d(y, 3, 2, 1, count_include_pad=False)
        top = functional.interpolate(functional.max_pool2d(y, 2), size=pooled.shape[2:])
        joined = torch.cat([functional.gelu(pooled), functional.leaky_relu(top)[:, :8]], 1)
        z = self.squeeze(joined)
        z = self.line(z.flatten(2)).unflatten(2, z.shape[2:])
        return self.head(functional.adaptive_avg_pool2d(z, 2).flatten(1))


def every_operation(seed: int = 0) -> nn.Module:
    """EveryOperation with seeded random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EveryOperation().eval().requires_grad_(False)


def op_program(name: str, *activations: Any, **arguments: Any) -> tuple[Program, list[Tensor]]:
    """A program of one int8 operation, and its inputs.

    Activations and tensors may be numpy arrays; integer activations are passed as uint8, float ones as float32.
    """
    operation = getattr(torch.ops.qbench, name).default
    values = [torch.as_tensor(np.asarray(a)) for a in activations]
    values = [(v.float() if v.is_floating_point() else v.to(torch.uint8)) for v in values]
    names = [a.name for a in operation._schema.arguments if a.name in ACTIVATIONS][: len(values)]
    graph, tensors = fx.Graph(), {}
    inputs = [graph.placeholder(n) for n in names]
    for key, value in arguments.items():
        if isinstance(value, np.ndarray | Tensor):
            tensors[key] = torch.as_tensor(value)
            arguments[key] = graph.get_attr(key)
    graph.output([graph.call_function(operation, tuple(inputs), arguments)])
    specs = [{"shape": [None] * v.dim(), "dtype": str(v.dtype)[6:]} for v in values]
    return Program(graph, tensors, specs, 0), values


def run_op(name: str, *activations: Any, macs: Macs | None = None, **arguments: Any) -> np.ndarray:
    """Execute one int8 operation on the reference (see op_program); native gives the same, where built."""
    program, values = op_program(name, *activations, **arguments)
    result = program.lower(reference(), macs or Macs())(*values)
    if sources.built():
        other = program.lower(native(), Macs())(*values)
        tolerance = 1e-6 * float(result.abs().max()) if "dynamic" in name and result.numel() else 0.0
        torch.testing.assert_close(other, result, rtol=0, atol=tolerance)
    found: np.ndarray = result.numpy()
    return found


def result_of(q: oracle.Q) -> dict[str, Any]:
    """The arguments of an operation that say how its result is rounded."""
    return {"scale": q.scale, "zero_point": q.zero_point, "q_min": q.q_min, "q_max": q.q_max}


def read_by(q: oracle.Q, prefix: str = "x") -> dict[str, Any]:
    """The arguments of an operation that say how an operand is read."""
    return {f"{prefix}_scale": q.scale, f"{prefix}_zero_point": q.zero_point}


@torch.no_grad()
def sqnr_db(reference: Tensor, result: Tensor) -> float:
    """10 log10(signal / error), in float64."""
    error = (reference.double() - result.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / error))
