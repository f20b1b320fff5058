"""How a network's results are nested: a JSON form of tuples, lists and dictionaries of tensors."""

from __future__ import annotations

from typing import Any

Structure = Any  # an int (the index of a leaf), {"tuple": [...]}, {"list": [...]} or {"dict": {...}}


def describe(nested: Any) -> Structure:
    """The structure of nested leaf numbers. Raises ValueError for a container that JSON cannot say."""
    if isinstance(nested, int):
        return nested
    if type(nested) in (tuple, list):
        return {type(nested).__name__: [describe(item) for item in nested]}
    if isinstance(nested, dict) and all(isinstance(key, str) for key in nested):
        return {"dict": {key: describe(item) for key, item in nested.items()}}
    raise ValueError(
        f"the network returns a {type(nested).__name__}; tensors in tuples, lists and dictionaries are known"
    )


def build(structure: Structure, leaves: list[Any]) -> Any:
    """Put the leaves back in place. Raises ValueError for a structure that is none, or names a missing leaf."""
    if isinstance(structure, int) and not isinstance(structure, bool):
        if not 0 <= structure < len(leaves):
            raise ValueError(f"result {structure} of {len(leaves)}")
        return leaves[structure]
    if isinstance(structure, dict) and len(structure) == 1:
        ((kind, items),) = structure.items()
        if kind in ("tuple", "list") and isinstance(items, list):
            nested = [build(item, leaves) for item in items]
            return tuple(nested) if kind == "tuple" else nested
        if kind == "dict" and isinstance(items, dict):
            return {key: build(item, leaves) for key, item in items.items()}
    raise ValueError(f"{structure!r} does not say how results are nested")
