"""The operations of an int8 program, declared once: name and signature, no arithmetic.

They are torch operators of the namespace `qbench`, so that a program is an ordinary fx graph, its printed code names
them and a file can be checked against their schemas. Backends execute them; the arithmetic is section 3 of the design.

Activations (`x`, `a`, `b`, `residual`) are uint8 tensors with scale and zero point as numbers. A weight is int8
[outputs, inputs / groups, ...] (a transposed convolution's too), with scales (float32) and zero points (int8, absent
when all are zero) [outputs or 1, blocks], a block being `block` consecutive inputs. `scale=None` leaves the float32
accumulator, clamped to [low, high] where there are bounds. `indices` are int64 or int32.
"""

from __future__ import annotations

import torch
from torch.library import Library

_X = "Tensor x, *, float x_scale, int x_zero_point"
_Y = "float scale, int zero_point, int q_min, int q_max"
_ROWS = "Tensor weight, Tensor weight_scale, Tensor? weight_zero_point, int block"
_WEIGHT = f"{_ROWS}, Tensor? bias"
_CELL = ", ".join(
    f"Tensor {w}, Tensor {w}_scale, Tensor? {w}_zero_point, int {w}_block" for w in ("weight_ih", "weight_hh")
)
_CELL = f"Tensor x, Tensor? h=None, Tensor? c=None, *, {_CELL}, Tensor? bias"
_QKV = "Tensor q, Tensor k, Tensor v, Tensor? mask=None, *, float factor, bool causal"
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups"
_TRANSPOSED = f"{_WINDOW}, int[] output_padding"
_STATIC = (
    f"{_WEIGHT}, float x_scale, int x_zero_point, float? scale, int zero_point, int q_min, int q_max, "
    f"float residual_scale=1.0, int residual_zero_point=0, float? low=None, float? high=None"
)
_DYNAMIC = f"{_WEIGHT}, str rows, str scheme"

SCHEMAS = (
    # edges between float and codes
    "quantize(Tensor x, *, float scale, int zero_point, int q_min, int q_max) -> Tensor",
    "dequantize(Tensor x, *, float x_scale, int x_zero_point) -> Tensor",
    # layers, static: bias int32, or float32 with more than one block
    f"linear(Tensor x, Tensor? residual=None, *, {_STATIC}) -> Tensor",
    f"conv(Tensor x, Tensor? residual=None, *, {_WINDOW}, {_STATIC}) -> Tensor",
    f"conv_transpose(Tensor x, Tensor? residual=None, *, {_TRANSPOSED}, {_STATIC}) -> Tensor",
    # layers, dynamic: x, bias and result float32
    f"dynamic_linear(Tensor x, *, {_DYNAMIC}) -> Tensor",
    f"dynamic_conv(Tensor x, *, {_WINDOW}, {_DYNAMIC}) -> Tensor",
    f"dynamic_conv_transpose(Tensor x, *, {_TRANSPOSED}, {_DYNAMIC}) -> Tensor",
    # layers, weight-only: x, bias and result float32
    f"weight_only_linear(Tensor x, *, {_WEIGHT}) -> Tensor",
    f"weight_only_conv(Tensor x, *, {_WINDOW}, {_WEIGHT}) -> Tensor",
    f"weight_only_conv_transpose(Tensor x, *, {_TRANSPOSED}, {_WEIGHT}) -> Tensor",
    # an LSTM layer in one direction: h of every step, the last h, the last c; a state that is absent is zero
    f"lstm({_CELL}, float x_scale, int x_zero_point, {_Y}) -> (Tensor, Tensor, Tensor)",
    f"dynamic_lstm({_CELL}, str rows, str scheme) -> (Tensor, Tensor, Tensor)",
    f"weight_only_lstm({_CELL}) -> (Tensor, Tensor, Tensor)",
    # rows of a weight by index; scale=None leaves them float32
    f"embedding(Tensor indices, *, {_ROWS}, float? scale, int zero_point, int q_min, int q_max) -> Tensor",
    # softmax(factor * q k^T + mask) v; the mask float32, added; dynamic: q, k, v and result float32
    f"attention({_QKV}, float q_scale, int q_zero_point, float k_scale, int k_zero_point, float v_scale, "
    f"int v_zero_point, {_Y}) -> Tensor",
    f"dynamic_attention({_QKV}, str rows, str scheme) -> Tensor",
    # between layers
    f"add(Tensor a, Tensor b, *, float a_scale, int a_zero_point, float b_scale, int b_zero_point, float alpha, {_Y})"
    " -> Tensor",
    f"mul(Tensor a, Tensor b, *, float a_scale, int a_zero_point, float b_scale, int b_zero_point, {_Y}) -> Tensor",
    f"mean({_X}, int[] dim, bool keepdim, {_Y}) -> Tensor",
    f"average_pool({_X}, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
    f"int? divisor, {_Y}) -> Tensor",
    f"adaptive_average_pool({_X}, int[] size, {_Y}) -> Tensor",
    f"layer_norm({_X}, Tensor gamma, Tensor beta, float eps, {_Y}) -> Tensor",
    f"channel_affine(Tensor x, *, int x_zero_point, Tensor gamma, Tensor beta, {_Y}) -> Tensor",
    f"rescale({_X}, {_Y}) -> Tensor",
    "clamp(Tensor x, *, int q_min, int q_max) -> Tensor",
    "table(Tensor x, *, Tensor table) -> Tensor",
)
ACTIVATIONS = ("x", "a", "b", "residual", "h", "c", "indices", "q", "k", "v", "mask")
WEIGHTS = ("weight", "weight_ih", "weight_hh")

_library = Library("qbench", "DEF")  # the declarations live as long as this object
for _schema in SCHEMAS:
    _library.define(_schema)


def is_int8_op(target: object) -> bool:
    """Is this graph target one of the operations declared here?"""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "qbench"
