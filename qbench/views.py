"""Chains of views in their shortest form, and linear layers in the order in which their inputs lie in memory.

nn.MultiheadAttention swaps batch and tokens before its linear layers and back behind them, and splits heads by way of
shapes that are no views of the layer's result: as written, each of these steps would copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from qbench.insert import insert_call

aten = torch.ops.aten

SHAPED = {  # other sizes, same order: what they are is in the value's shape
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
VIEWS = {*SHAPED, aten.transpose.int, aten.permute.default, aten.select.int}
UNKNOWN = 999_983  # stands for a size that is free: a prime larger than any other factor


def shorten_views(graph: fx.Graph) -> None:
    """Rewrite a captured graph in place; what it computes stays the same. The calls that nothing reads stay too."""
    for node in list(graph.nodes):
        if node.target is aten.linear.default:
            _in_order(node)
    for node in list(graph.nodes):
        if node.target in VIEWS and any(user.target not in VIEWS for user in node.users):
            chain = _Chain.to(node)
            if chain is not None and (written := chain.written(node, chain.length)) is not None:
                node.replace_all_uses_with(written)


@dataclass(frozen=True)
class _Part:
    """A dimension of a chain's base, or a factor of one: `place` sorts them as they lie in memory."""

    size: int
    place: tuple[int, ...]

    def split(self, outer: int) -> tuple[_Part, _Part]:
        return _Part(outer, (*self.place, 0)), _Part(self.size // outer, (*self.place, 1))


@dataclass(frozen=True)
class _Chain:
    """What views make of `base`: the parts that each dimension consists of, and those of which one element is taken."""

    base: fx.Node
    dims: tuple[tuple[_Part, ...], ...]
    free: frozenset[Any]  # symbols in the sizes
    taken: dict[_Part, int] = field(default_factory=dict)
    length: int = 0

    @classmethod
    def to(cls, node: fx.Node) -> _Chain | None:
        """The chain that ends in a node; None where a view is none of one of these parts."""
        if node.target not in VIEWS:
            sizes = _sizes(node)
            if sizes is None:
                return None
            dims = tuple((_Part(size, (n,)),) if size > 1 else () for n, size in enumerate(sizes))
            return cls(node, dims, _symbols(node))
        before = cls.to(node.args[0])
        if before is None or len(before.free | _symbols(node)) > 1:
            return None
        after = before._then(node)
        return None if after is None else replace(after, length=before.length + 1)

    def _then(self, node: fx.Node) -> _Chain | None:
        if node.target in SHAPED:
            sizes = _sizes(node)
            return None if sizes is None else self._shaped(sizes)
        dims = list(self.dims)
        if node.target is aten.transpose.int:
            a, b = (axis % len(dims) for axis in node.args[1:3])
            dims[a], dims[b] = dims[b], dims[a]
        elif node.target is aten.permute.default:
            dims = [dims[axis] for axis in node.args[1]]
        else:
            axis, index = node.args[1] % len(dims), node.args[2]
            if len(dims[axis]) != 1 or not isinstance(index, int):
                return None
            (part,) = dims.pop(axis)
            index = index if part.size % UNKNOWN == 0 else index % part.size
            return replace(self, dims=tuple(dims), taken={**self.taken, part: index})
        return replace(self, dims=tuple(dims))

    def _shaped(self, sizes: Sequence[int]) -> _Chain | None:
        """The same elements in dimensions of these sizes."""
        parts, dims = [part for dim in self.dims for part in dim], []
        for size in sizes:
            dim: list[_Part] = []
            while math.prod(part.size for part in dim) < size:
                if not parts or size % math.prod(part.size for part in dim):
                    return None
                part, missing = parts.pop(0), size // math.prod(part.size for part in dim)
                if part.size > missing:
                    if part.size % missing:
                        return None
                    part, rest = part.split(missing)
                    parts.insert(0, rest)
                dim.append(part)
            if math.prod(part.size for part in dim) != size:
                return None
            dims.append(tuple(dim))
        return None if parts else replace(self, dims=tuple(dims))

    def parts(self) -> list[_Part]:
        """All of the base, in the order of memory."""
        return sorted([*(part for dim in self.dims for part in dim), *self.taken], key=lambda part: part.place)

    def written(self, before: fx.Node, shorter_than: int) -> fx.Node | None:
        """The chain as new calls before a node, few of a kind; None where they are not fewer, or sizes are unknown."""
        parts, left = self.parts(), [part for part in self.parts() if part not in self.taken]
        order = [left.index(part) for dim in self.dims for part in dim]
        splits = [part.size for part in parts] != _sizes(self.base)
        moves, merges = order != sorted(order), any(len(dim) != 1 for dim in self.dims)
        if moves + splits + merges + len(self.taken) >= shorter_than:
            return None
        shapes = [_written(part.size for part in parts), _written(math.prod(p.size for p in dim) for dim in self.dims)]
        if None in shapes:
            return None
        node = insert_call(before, aten.reshape.default, self.base, shapes[0]) if splits else self.base
        for part in sorted(self.taken, key=lambda part: part.place, reverse=True):
            node = insert_call(before, aten.select.int, node, parts.index(part), self.taken[part])
        node = insert_call(before, aten.permute.default, node, order) if moves else node
        return insert_call(before, aten.reshape.default, node, shapes[1]) if merges else node


def _in_order(linear: fx.Node) -> None:
    """Let a linear layer take its rows in the order in which they lie in memory, and bring the results into theirs."""
    chain, out = _Chain.to(linear.args[0]), _sizes(linear)
    if chain is None or chain.taken or out is None or len(chain.free | _symbols(linear)) > 1:
        return
    *rows, last = chain.dims
    given = [part for dim in rows for part in dim]
    order = sorted(given, key=lambda part: part.place)
    windows = any(len(part.place) > 1 for part in given)  # of an image: they are better copied before than after
    if order == given or windows:
        return
    moved = replace(chain, dims=(*((part,) for part in order), last))
    back = [order.index(part) for part in given]
    shape = _written(out)
    x = moved.written(linear, 1 << 30)
    if x is None or shape is None:
        return
    node = insert_call(linear, aten.linear.default, x, *linear.args[1:])
    node = insert_call(linear, aten.permute.default, node, [*back, len(back)])
    linear.replace_all_uses_with(insert_call(linear, aten.reshape.default, node, shape))


def _sizes(node: fx.Node) -> list[int] | None:
    """The sizes of a node's value, UNKNOWN for a symbol; None where one is no multiple of it, or it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes: list[int] = []
    for size in value.shape:
        if isinstance(size, int):
            sizes.append(size)
            continue
        once, twice = (size.node.expr.subs(dict.fromkeys(_symbols_of(size), UNKNOWN * times)) for times in (1, 2))
        if not once.is_integer or twice != 2 * once:
            return None
        sizes.append(int(once))
    return sizes if 0 not in sizes else None


def _symbols(node: fx.Node) -> frozenset[Any]:
    """The symbols in the sizes of a node's value."""
    sizes = [size for size in node.meta["val"].shape if not isinstance(size, int)]
    return frozenset().union(*map(_symbols_of, sizes))


def _symbols_of(size: Any) -> set[Any]:
    symbols: set[Any] = size.node.expr.free_symbols
    return symbols


def _written(sizes: Iterable[int]) -> list[int] | None:
    """Sizes as a call takes them: -1 for the one that is free, None where there are two."""
    written = [-1 if size % UNKNOWN == 0 else size for size in sizes]
    return written if written.count(-1) < 2 else None
