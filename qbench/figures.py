"""The pictures: the textbook's two figures from a model's own tensors, and size against score drop.

The only module that imports matplotlib, inside functions: the import takes half a second. It draws on a Figure of its
own, without pyplot, which keeps every figure of a process alive.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.record import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from qbench.granularities import Granularity
    from qbench.schemes import Scheme

# Okabe and Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#BBBBBB"
DPI = 100


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write as PNG, whole or not at all, without the time, so that equal pictures are equal files."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def scheme_figure(values: Tensor, title: str, path: Path, weight: bool = False) -> None:
    """The textbook's first figure: a tensor's values under the int8 grid, symmetric beside affine.

    One bar a code: how many values take it; the codes that no value takes are grey. `weight` chooses int8 (weights)
    instead of uint8 (activations). Raises ValueError for values that are not finite.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from qbench import schemes

    figure = new_figure(11, 4.2)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    both: tuple[Scheme, ...] = (schemes.symmetric(), schemes.affine())
    for ax, scheme in zip(axes, both, strict=True):
        _code_histogram(ax, values.detach().float().flatten(), scheme, weight)
    axes[0].set_ylabel("values per code")
    figure.legend(
        handles=[Patch(color=BLUE), Patch(color=GREY, alpha=0.45), Line2D([], [], color=RED)],
        labels=["values, by the code they take", "codes that no value takes", "zero"],
        loc="outside lower center",
        ncols=3,
        fontsize=9,
    )
    figure.suptitle(title)
    save(figure, path)


def _code_histogram(ax: Axes, values: Tensor, scheme: Scheme, weight: bool) -> None:
    import torch

    from qbench import numerics
    from qbench.schemes import INT8_MIDDLE, UINT8_MIDDLE

    if not bool(torch.isfinite(values).all()):
        raise ValueError("the tensor has values that are not finite (NaN or infinity)")
    ends = torch.tensor([min(0.0, float(values.min())), max(0.0, float(values.max()))], dtype=torch.float64)
    middle = INT8_MIDDLE if weight else UINT8_MIDDLE
    q_min, q_max = scheme.codes(middle)
    scale, zero_point = scheme.choose(ends[0], ends[1], middle)
    q = numerics.quantize(values, scale, zero_point, q_min, q_max)
    counts = torch.bincount((q - q_min).flatten(), minlength=q_max - q_min + 1)
    grid = numerics.dequantize(torch.arange(q_min, q_max + 1), scale, zero_point)
    used = counts > 0
    edges = torch.cat([grid - scale / 2, grid[-1:] + scale / 2])
    ax.stairs(counts.numpy(), edges.numpy(), fill=True, color=BLUE)
    for start, stop in _runs(~used):
        ax.axvspan(float(edges[start]), float(edges[stop + 1]), color=GREY, alpha=0.45, linewidth=0)
    ax.set_yscale("log")
    ax.axvline(0.0, color=RED, linewidth=0.8)
    noise = numerics.dequantize(q, scale, zero_point) - values
    ax.set_title(
        f"{scheme.name}: scale {float(scale):.3g}, zero point {int(zero_point)}\n"
        f"{int(used.sum())} of {q_max - q_min + 1} codes used, {_sqnr(values, noise)}",
        fontsize=10,
    )
    ax.set_xlabel("value; above, its code")
    _code_axis(ax, float(scale), int(zero_point), q_min, q_max)


def _code_axis(ax: Axes, scale: float, zero_point: int, q_min: int, q_max: int) -> None:
    """The codes, above the values that they stand for."""
    shown = sorted({q_min, q_max, *(code for code in range(-64, 256, 64) if q_min + 32 < code < q_max - 32)})
    ticks = [scale * (code - zero_point) for code in shown]
    ax.secondary_xaxis("top").set_xticks(ticks, [str(code) for code in shown])


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """First and last index of each run of True."""
    runs: list[tuple[int, int]] = []
    for index in mask.nonzero().flatten().tolist():
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _sqnr(values: Tensor, noise: Tensor) -> str:
    """`SQNR 32.1 dB`, from sums of squares in float64."""
    import math

    signal, error = float(values.double().square().sum()), float(noise.double().square().sum())
    return f"SQNR {10 * math.log10(signal / error):.1f} dB" if signal and error else "no error"


def granularity_figure(weight: Tensor, title: str, path: Path) -> None:
    """The textbook's second figure: the ranges of a weight's channels, with one scale for all beside one each.

    `weight` is [output channels, input channels, ...]. Above, each channel's range inside what its codes can reach;
    below, how many codes it spans. Raises ValueError for values that are not finite.
    """
    from qbench import granularities

    figure = new_figure(11, 5.2)
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(2, 1))
    both: tuple[Granularity, ...] = (granularities.per_tensor(), granularities.per_channel())
    for column, granularity in zip(axes.T, both, strict=True):
        _channel_ranges(column, weight.detach().float(), granularity)
    axes[0, 0].set_ylabel("value")
    axes[1, 0].set_ylabel("codes spanned")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(title)
    save(figure, path)


def _channel_ranges(axes: Sequence[Axes], weight: Tensor, granularity: Granularity) -> None:
    from qbench import numerics, schemes

    quantized = numerics.quantize_weight(weight, granularity, schemes.symmetric(), group_size=weight.shape[1])
    channels = [index - 0.5 for index in range(len(weight) + 1)]
    flat, codes = weight.flatten(1), quantized.values.flatten(1)
    reach = 127 * quantized.scale[:, 0].expand(len(weight)).numpy()
    lo, hi = flat.amin(1).numpy(), flat.amax(1).numpy()
    axes[0].stairs(reach, channels, baseline=-reach, fill=True, color=GREY, alpha=0.6, label="what the codes reach")
    axes[0].stairs(hi, channels, baseline=lo, fill=True, color=BLUE, label="what the channel holds")
    axes[1].stairs((codes.amax(1).int() - codes.amin(1).int() + 1).numpy(), channels, fill=True, color=BLUE)
    axes[1].set_xlabel("output channel")
    axes[1].set_ylim(0, 260)
    scales = quantized.scale.numel()
    axes[0].set_title(
        f"{granularity.name}: {scales} scale{'s' * (scales > 1)}; {_sqnr(weight, quantized.dequantize() - weight)}",
        fontsize=10,
    )


def loss_figure(losses: Sequence[float], frozen_at: int, path: Path) -> None:
    """The loss of each step of fine-tuning; `frozen_at` is the first step with frozen ranges of the activations."""
    figure = new_figure(7, 4)
    ax = figure.subplots()
    ax.plot(range(1, len(losses) + 1), losses, color=BLUE, marker=".", label="loss")
    ax.axvline(frozen_at + 0.5, color=GREY, linestyle="--", label="ranges frozen from here")
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("relative squared error of the results")
    ax.set_title("Fine-tuning with fake quantization, towards fp32", fontsize=10)
    ax.legend(fontsize=9)
    save(figure, path)
