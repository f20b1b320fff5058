"""New calls in a captured graph, with what the passes after capture read of every node."""

from __future__ import annotations

from typing import Any

from torch import fx


def insert_call(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call before a node, with its value (as shapes) and the name of that node's layer."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    read = fx.map_arg(args, lambda source: source.meta["val"])
    node.meta = {"val": target(*read, **kwargs), "layer": before.meta["layer"]}
    return node
