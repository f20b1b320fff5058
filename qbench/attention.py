"""Attention in one form: scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=factor).

q is [..., L, D], k [..., S, D], v [..., S, Dv]. The mask is float32 and is added to the scores (-inf hides a key), or
None; `causal` hides every key behind its query; `factor` is a number. Explicit products around a softmax, boolean
masks, shared key heads, a scale that was multiplied into q or k, a triangle given as a mask: all become this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qbench.insert import insert_call
from qbench.numerics import check_products

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = {aten.matmul.default, aten.bmm.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
REPLACES = -1e4  # exp(score + this) is 0, whatever the score


def unify_attention(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    """Bring every attention of a captured graph into the one form; what does not fit it stays as it is."""
    for node in list(graph.nodes):
        if node.target is ATTENTION:
            _complete(node)
        elif node.target in PRODUCTS:
            _from_products(node, tensors)


def simplify_masks(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    """A constant mask that only hides the future becomes `causal`; one of zeros goes."""
    for node in graph.nodes:
        mask = node.args[3] if is_attention(node) else None
        if mask is None or mask.op != "get_attr":
            continue
        values = tensors[mask.target]
        future = torch.full(values.shape[-2:], -math.inf).triu(1) if values.dim() > 1 else None
        if not bool(values.any()):
            node.args = (*node.args[:3], None, *node.args[4:])
        elif future is not None and len(set(future.shape)) == 1 and bool((values == future).all()):
            node.args = (*node.args[:3], None, 0.0, True)


def is_attention(node: fx.Node) -> bool:
    """Is the node an attention in the one form?"""
    explicit = node.kwargs.keys() == {"scale"} and node.kwargs["scale"] is not None
    return node.target is ATTENTION and explicit and len(node.args) == 6 and not node.args[4]


def check_attention(node: fx.Node) -> None:
    """Raise ValueError for sums that could overflow: over the size of a head, and over the keys where known."""
    q, _, v = (source.meta["val"].shape for source in node.args[:3])
    for count in (q[-1], v[-2]):
        if isinstance(count, int):
            check_products(node.meta["layer"] or node.name, count)


def only_masks(graph: fx.Graph, multiplies: Any) -> set[fx.Node]:
    """The nodes that do nothing but prepare masks: they stay float, whose -inf no scale could hold.

    `multiplies(node)` tells a node with multiply-accumulates, which is never one of them.
    """
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        roles = [user in found or (is_attention(user) and user.args.index(node) == 3) for user in node.users]
        if node.op == "call_function" and roles and all(roles) and not multiplies(node):
            found.add(node)
    return found


# --- a call of scaled_dot_product_attention --------------------------------------------------------------------------


def _complete(node: fx.Node) -> None:
    """Explicit scale, float mask, one head of k and v for each of q."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False} | dict(zip(names, node.args, strict=False))
    given |= node.kwargs
    q, k, v, mask = (given[name] for name in names[:4])
    size, scale = q.meta["val"].shape[-1], given.get("scale")
    if given["dropout_p"] or (scale is None and not isinstance(size, int)):
        return
    if given.get("enable_gqa"):
        k, v = (_repeat_heads(node, x, q.meta["val"].shape[-3]) for x in (k, v))
    node.args = (q, k, v, None if mask is None else _additive(node, mask), 0.0, given["is_causal"])
    node.kwargs = {"scale": 1 / math.sqrt(size) if scale is None else scale}


def _repeat_heads(before: fx.Node, x: fx.Node, heads: int) -> fx.Node:
    """Each head of x as often as the heads of q ask for."""
    rank, times = x.meta["val"].dim(), heads // x.meta["val"].shape[-3]
    wide = insert_call(before, aten.unsqueeze.default, x, -3)
    wide = insert_call(before, aten.expand.default, wide, [-1] * (rank - 2) + [times, -1, -1])
    return insert_call(before, aten.flatten.using_ints, wide, rank - 3, rank - 2)


def _additive(before: fx.Node, mask: fx.Node) -> fx.Node:
    """A boolean mask (true: look) as 0 and -inf."""
    if mask.meta["val"].dtype != torch.bool:
        return mask
    return insert_call(before, aten.where.Scalar, mask, 0.0, -math.inf)


# --- explicit products -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scores:
    """What a softmax is taken of: factor * (q k_t) + the masks, perhaps seen in another shape on the way.

    `sizes`: the dimensions before the last two in that shape, where the masks are added.
    """

    q: fx.Node
    k_t: fx.Node
    factor: float = 1.0
    masks: tuple[fx.Node, ...] = ()
    sizes: tuple[Any, ...] | None = None
    back: tuple[Any, ...] | None = None


def _from_products(node: fx.Node, tensors: dict[str, Tensor]) -> None:
    """softmax(scores) times v becomes attention, if the scores are of q and k."""
    weights, v = node.args[:2]
    if weights.target not in SOFTMAX or not _over_the_last(weights):
        return
    scores = _Reader(node, tensors).scores(weights.args[0])
    if scores is None or (scores.sizes is not None and scores.back is None):
        return
    k = _transposed(node, scores.k_t)
    mask = None
    for part in scores.masks:
        mask = part if mask is None else insert_call(node, aten.add.Tensor, mask, part)
    q, k, v = (_seen_in(node, x, scores.sizes) for x in (scores.q, k, v))
    result = insert_call(node, ATTENTION, q, k, v, mask, 0.0, False, scale=scores.factor)
    node.replace_all_uses_with(_seen_in(node, result, scores.back))
    node.graph.erase_node(node)


def _over_the_last(softmax: fx.Node) -> bool:
    """Is it taken over the last axis, in float32?"""
    value, dim = softmax.meta["val"], softmax.args[1]
    return value.dtype == torch.float32 and dim in (-1, value.dim() - 1)


def _transposed(before: fx.Node, k_t: fx.Node) -> fx.Node:
    """k of a k that is transposed; two transpositions cancel."""
    rank = k_t.meta["val"].dim()
    if k_t.target is aten.transpose.int and {axis % rank for axis in k_t.args[1:3]} == {rank - 2, rank - 1}:
        return k_t.args[0]
    return insert_call(before, aten.transpose.int, k_t, -2, -1)


def _seen_in(before: fx.Node, x: fx.Node, sizes: tuple[Any, ...] | None) -> fx.Node:
    """x with other dimensions before its last two."""
    if sizes is None:
        return x
    return insert_call(before, aten.reshape.default, x, [*sizes, *x.meta["val"].shape[-2:]])


class _Reader:
    """Reads scores from the softmax back to their product."""

    def __init__(self, before: fx.Node, tensors: dict[str, Tensor]) -> None:
        self.before, self.tensors = before, tensors

    def scores(self, node: Any) -> _Scores | None:
        """The scores that a node computes, None where it does something else."""
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return None
        match node.target:
            case aten.matmul.default | aten.bmm.default:
                return self._product(*node.args[:2])
            case aten.baddbmm.default if node.kwargs.get("beta", 1) == 1:
                product = self._product(*node.args[1:3])
                return self._masked(self._scaled(product, node.kwargs.get("alpha", 1)), node.args[0])
            case aten.mul.Tensor | aten.div.Tensor:
                inner, factor = self._times(node)
                return self._scaled(self.scores(inner), factor) if factor is not None else None
            case aten.add.Tensor if node.kwargs.get("alpha", 1) == 1:
                return self._sum(node)
            case aten.masked_fill.Scalar | aten.masked_fill.Tensor:
                return self._hidden(node.args[0], node.args[1], node.args[2], 0.0)
            case aten.where.self | aten.where.ScalarOther:
                return self._hidden(node.args[1], node.args[0], 0.0, node.args[2])
            case aten.reshape.default:
                return self._reshaped(self.scores(node.args[0]), node)
        return None

    def _product(self, q: fx.Node, k_t: fx.Node) -> _Scores:
        """A number that was multiplied into q or k belongs to the scale."""
        (q, q_factor), (k_t, k_factor) = self._times(q), self._times(k_t)
        return _Scores(q, k_t, (q_factor or 1.0) * (k_factor or 1.0))

    def _times(self, node: fx.Node) -> tuple[fx.Node, float | None]:
        """The operand and the number of `operand * number`; the node itself and None where it is something else."""
        number = self._number(node.args[1]) if node.target in (aten.mul.Tensor, aten.div.Tensor) else None
        if number is None:
            return node, None
        return node.args[0], number if node.target is aten.mul.Tensor else 1 / number

    def _number(self, value: Any) -> float | None:
        """A number, or a constant tensor that holds one."""
        if isinstance(value, fx.Node) and value.op == "get_attr" and self.tensors[value.target].dim() == 0:
            return float(self.tensors[value.target])
        return float(value) if isinstance(value, int | float) else None

    def _scaled(self, scores: _Scores | None, factor: float) -> _Scores | None:
        if scores is None or scores.masks:
            return None
        return replace(scores, factor=scores.factor * factor)

    def _sum(self, node: fx.Node) -> _Scores | None:
        """scores + mask, in either order."""
        for inner, mask in (node.args[:2], node.args[1::-1]):
            if isinstance(mask, fx.Node) and (found := self.scores(inner)) is not None:
                return self._masked(found, mask)
        return None

    def _masked(self, scores: _Scores | None, mask: fx.Node) -> _Scores | None:
        return None if scores is None or scores.back else replace(scores, masks=(*scores.masks, mask))

    def _hidden(self, inner: Any, condition: fx.Node, where_true: Any, where_false: Any) -> _Scores | None:
        """Scores that give way to a number where a condition says so: as good as added, when it is very negative."""
        ends = self._number(where_true), self._number(where_false)
        scores = self.scores(inner)
        if scores is None or None in ends or sum(ends) > REPLACES:  # type: ignore[arg-type]
            return None
        return self._masked(scores, insert_call(self.before, aten.where.Scalar, condition, *ends))

    def _reshaped(self, scores: _Scores | None, node: fx.Node) -> _Scores | None:
        """Scores in another shape, and back: Swin adds its window mask so."""
        if scores is None or scores.back is not None:
            return None
        *sizes, rows, columns = node.args[1]
        if (rows, columns) != tuple(node.args[0].meta["val"].shape[-2:]):
            return None
        if scores.sizes is not None:
            return replace(scores, back=tuple(sizes))
        fits = all(_broadcasts_behind(mask.meta["val"], node.args[0].meta["val"], sizes) for mask in scores.masks)
        return replace(scores, sizes=tuple(sizes)) if fits else None


def _broadcasts_behind(mask: Any, scores: Any, sizes: list[Any]) -> bool:
    """Does a mask of the scores mean the same when the dimensions before the last two become `sizes`?

    It does where it varies only along trailing dimensions that both have.
    """
    kept = 2
    for old, new in zip(reversed(scores.shape[:-2]), reversed(sizes), strict=False):
        if not isinstance(new, int) or old != new:
            break
        kept += 1
    return all(size == 1 for size in mask.shape[: max(mask.dim() - kept, 0)])
