"""`qbench.quantize`: from a float model and a recipe to a quantized model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qbench.calibration_draw import draw
from qbench.capture import Network, capture
from qbench.fake_quantized import FineTune
from qbench.model import QuantizedModel
from qbench.program import check_inputs
from qbench.recipe import Recipe, option


def quantize(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    recipe: Recipe | None = None,
    *,
    calibration: Iterable[tuple[Any, ...]] | None = None,
    fine_tune: FineTune | None = None,
    backend: str | None = None,
    dynamic_shapes: Any = None,
) -> QuantizedModel:
    """Quantize a float model; the model itself is not changed.

    `example_inputs`: a tuple of tensors (nested allowed), dimension 0 the batch. `calibration`: tuples of the same
    form, for methods that need them (ptsq, qat). `fine_tune` (qat) trains the module that it is given, a
    `qbench.fake_quantized.FakeQuantized`, in place; without it the recipe's own steps on the calibration data do.
    `backend` overrides the recipe's, which is native by default. `dynamic_shapes` goes to torch.export.

    Raises CaptureError when torch.export cannot capture the model, ValueError for calibration that is missing, of the
    wrong shape or not finite, for weights that are not finite, for a layer that has no int8 form, and for fine-tuning
    that diverges or changes no weight; NativeUnavailable where native is asked for and not built. Where nobody asks
    for it, the reference stands in, with a RuntimeWarning.
    """
    recipe = recipe or Recipe()
    if fine_tune is not None and not recipe.method.trains:
        raise ValueError(f"fine_tune: method {recipe.method.name} does not train; leave it out")
    network = capture(model, example_inputs, dynamic_shapes)
    return quantize_network(network, recipe, calibration, backend, fine_tune)


def quantize_network(
    network: Network,
    recipe: Recipe,
    calibration: Iterable[tuple[Any, ...]] | None = None,
    backend: str | None = None,
    fine_tune: FineTune | None = None,
) -> QuantizedModel:
    """The same for a network that is captured already: several recipes can share one capture."""
    batches = calibration_batches(network, recipe, calibration) if recipe.method.needs_calibration else None
    program = recipe.method.build(network, recipe, batches, fine_tune)
    chosen = recipe.backend if backend is None else option("backend", backend)
    return QuantizedModel(program, recipe.canonical() | {"backend": None}, chosen)


def calibration_batches(
    network: Network, recipe: Recipe, calibration: Iterable[tuple[Any, ...]] | None
) -> list[list[Tensor]]:
    """The input tensors of each batch, checked and drawn as the recipe says. Raises ValueError that names the batch."""
    batches = checked_batches(network, "calibration", calibration or ())
    if not batches:
        raise ValueError(
            f"method {recipe.method.name} needs calibration data: pass calibration=, a list of input tuples"
        )
    return draw(batches, recipe.calibration_samples, recipe.calibration_seed)


def checked_batches(network: Network, purpose: str, inputs: Iterable[tuple[Any, ...]]) -> list[list[Tensor]]:
    """The input tensors of each batch. Raises ValueError that names the first one the network cannot take."""
    batches = [pytree.tree_leaves(batch) for batch in inputs]
    for number, leaves in enumerate(batches):
        try:
            check_inputs(network.inputs, leaves)
            if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
                raise ValueError("it has values that are not finite (NaN or infinity)")
        except ValueError as error:
            raise ValueError(f"{purpose} batch {number}: {error}") from error
    return batches
