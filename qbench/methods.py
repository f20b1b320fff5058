"""The ways of quantizing a network, one object each (weights only, dynamic, static, trained), and the float baselines.

The class names are lower-case on purpose: the name of the class is the name of the option (`method=ptsq`).
A method says which axes of a recipe mean something to it, and builds the program from the normalized network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from qbench.capture import Network
    from qbench.distillation import Distillation, Say
    from qbench.fake_quantized import FineTune
    from qbench.program import Program
    from qbench.recipe import Recipe

__all__ = ["bf16", "fp32", "ptdq", "ptsq", "qat", "woq"]

WEIGHT_AXES = ("granularity", "scheme")
CALIBRATION_VALUES = ("calibration_samples", "calibration_seed")
STATIC_AXES = (*WEIGHT_AXES, "activation_scheme", "observer", "output", "keep_float", *CALIBRATION_VALUES)


class Method(Protocol):
    """A way of quantizing a network."""

    name: ClassVar[str]
    label: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]
    needs_calibration: ClassVar[bool]
    trains: ClassVar[bool]
    runs_in_torch: ClassVar[bool]  # every operation is torch's own, none the backend's

    def build(
        self, network: Network, recipe: Recipe, calibration: list[list[Tensor]] | None, fine_tune: FineTune | None
    ) -> Program:
        """Turn the normalized network into a program; `calibration` is the input tensors of each batch.

        `fine_tune` trains the fake-quantized module in place, for a method that trains.

        Raises ValueError naming the layer that cannot run in int8.
        """
        ...


@dataclass(frozen=True)
class fp32:
    """The float baseline: nothing is quantized."""

    name: ClassVar[str] = "fp32"
    label: ClassVar[str] = "fp32"
    axes: ClassVar[tuple[str, ...]] = ()
    needs_calibration: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    runs_in_torch: ClassVar[bool] = True

    def build(
        self, network: Network, recipe: Recipe, calibration: list[list[Tensor]] | None, fine_tune: FineTune | None
    ) -> Program:
        """The network as it is."""
        from qbench.weights_only import float_program

        return float_program(network)


@dataclass(frozen=True)
class bf16:
    """The second float baseline: weights and arithmetic in bfloat16, nothing calibrated."""

    name: ClassVar[str] = "bf16"
    label: ClassVar[str] = "bf16"
    axes: ClassVar[tuple[str, ...]] = ()
    needs_calibration: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    runs_in_torch: ClassVar[bool] = True

    def build(
        self, network: Network, recipe: Recipe, calibration: list[list[Tensor]] | None, fine_tune: FineTune | None
    ) -> Program:
        """The network in bfloat16, float32 at its edges."""
        from qbench.bfloat16 import bfloat16_program

        return bfloat16_program(network)


@dataclass(frozen=True)
class woq:
    """Weight-only quantization: int8 weights, dequantized inside the kernel; activations stay float."""

    name: ClassVar[str] = "woq"
    label: ClassVar[str] = "woq"
    axes: ClassVar[tuple[str, ...]] = (*WEIGHT_AXES, "keep_float")
    needs_calibration: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    runs_in_torch: ClassVar[bool] = False

    def build(
        self, network: Network, recipe: Recipe, calibration: list[list[Tensor]] | None, fine_tune: FineTune | None
    ) -> Program:
        """Replace each layer by its weight-only form."""
        from qbench.weights_only import weight_only_program

        return weight_only_program(network, recipe)


@dataclass(frozen=True)
class ptdq:
    """Post-training dynamic quantization: int8 products, activations quantized at run time from the tensor itself."""

    name: ClassVar[str] = "ptdq"
    label: ClassVar[str] = "ptdq"
    axes: ClassVar[tuple[str, ...]] = (*WEIGHT_AXES, "activation_scheme", "activation_granularity", "keep_float")
    needs_calibration: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    runs_in_torch: ClassVar[bool] = False

    def build(
        self, network: Network, recipe: Recipe, calibration: list[list[Tensor]] | None, fine_tune: FineTune | None
    ) -> Program:
        """Replace each layer by its dynamic form."""
        from qbench.weights_only import dynamic_program

        return dynamic_program(network, recipe)


@dataclass(frozen=True)
class ptsq:
    """Post-training static quantization: int8 from layer to layer, with calibrated scales."""

    name: ClassVar[str] = "ptsq"
    label: ClassVar[str] = "ptsq"
    axes: ClassVar[tuple[str, ...]] = STATIC_AXES
    needs_calibration: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    runs_in_torch: ClassVar[bool] = False

    def build(
        self, network: Network, recipe: Recipe, calibration: list[list[Tensor]] | None, fine_tune: FineTune | None
    ) -> Program:
        """Calibrate, then convert to an int8 program."""
        from qbench.calibrate import calibrate
        from qbench.convert import static_program

        assert calibration is not None  # quantize() has checked needs_calibration
        return static_program(calibrate(network, recipe, calibration))


@dataclass(frozen=True)
class qat:
    """Quantization-aware training: ptsq of a network that was fine-tuned while it was fake-quantized.

    `steps` and `learning_rate` are those of the built-in training; see qbench.distillation.
    """

    steps: int = 20
    learning_rate: float = 0.003
    name: ClassVar[str] = "qat"
    label: ClassVar[str] = "qat"
    axes: ClassVar[tuple[str, ...]] = STATIC_AXES
    needs_calibration: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    runs_in_torch: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"method.steps={self.steps!r}: give a whole number, at least 1")
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
            raise ValueError(f"method.learning_rate={rate!r}: give a number above 0")

    def trainer(self, network: Network, batches: list[list[Tensor]], say: Say) -> Distillation:
        """What fine-tunes when no other training is given: towards the float network's results on the batches."""
        from qbench.distillation import Distillation

        return Distillation(network, batches, self.steps, self.learning_rate, say)

    def build(
        self, network: Network, recipe: Recipe, calibration: list[list[Tensor]] | None, fine_tune: FineTune | None
    ) -> Program:
        """Calibrate, fine-tune (on the calibration data, unless told otherwise), convert to an int8 program."""
        from qbench.calibrate import calibrate
        from qbench.convert import static_program
        from qbench.distillation import silent
        from qbench.fake_quantized import fine_tuned

        assert calibration is not None  # quantize() has checked needs_calibration
        chosen = fine_tune or self.trainer(network, calibration, silent)
        return static_program(fine_tuned(calibrate(network, recipe, calibration), chosen))
