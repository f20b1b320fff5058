"""From a model to a network: torch.export, then `normalize`."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from qbench.lengths import STANDS_FOR, any_length
from qbench.normalize import normalize
from qbench.structure import Structure, describe

aten = torch.ops.aten
IN_PLACE = {  # activations, as the same calls without it
    aten.relu_.default: aten.relu.default,
    aten.relu6_.default: aten.relu6.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.silu_.default: aten.silu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
}


class CaptureError(ValueError):
    """The model cannot be captured; the message says what torch.export said and what to do."""


@dataclass
class Network:
    """A captured network: a graph of functional aten calls over `tensors`, one placeholder for each input tensor.

    `inputs` gives shape (None where any size fits) and dtype of each placeholder; `outputs` how the results are nested.
    A node's meta["layer"] is the name of the module that it comes from.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    inputs: list[dict[str, Any]]
    outputs: Structure

    def module(self) -> fx.GraphModule:
        """The network as a runnable GraphModule that returns its result tensors as a list."""
        return fx.GraphModule(nn.ParameterDict(), self.graph) if not self.tensors else _module(self)


def _module(network: Network) -> fx.GraphModule:
    root = attach(network.tensors)
    return fx.GraphModule(root, network.graph)


def attach(tensors: dict[str, Tensor], root: nn.Module | None = None) -> nn.Module:
    """A module tree (below `root`) that holds each tensor under its dotted name, as a buffer; a parameter stays one."""
    root = nn.Module() if root is None else root
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, tensor)
        else:
            module.register_buffer(leaf, tensor)
    return root


def capture(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None) -> Network:
    """Capture `model` in evaluation mode with torch.export, dimension 0 of every input of any size.

    `dynamic_shapes` is passed to torch.export instead, when given. Raises CaptureError.
    """
    leaves = pytree.tree_leaves(example_inputs)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise CaptureError("example_inputs must be a tuple of tensors (nested allowed)")
    network = _trace(model, example_inputs, leaves, dynamic_shapes)
    normalize(network)
    return network


def _trace(model: nn.Module, example: tuple[Any, ...], leaves: list[Tensor], dynamic_shapes: Any) -> Network:
    doubled = dynamic_shapes is None and leaves[0].dim() > 0 and leaves[0].shape[0] == 1
    if doubled:  # torch.export takes a size of 1 for a constant
        example = pytree.tree_map(lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t, example)
    frozen = copy.deepcopy(model).eval()
    try:
        with (
            any_length(model),
            warnings.catch_warnings(),
            torch.no_grad(),
            _quiet("torch._dynamo", "torch.export", "torch.fx"),
            _without_fast_path(),
        ):
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            shapes = _any_batch(model, example) if dynamic_shapes is None else dynamic_shapes
            exported = torch.export.export(frozen, example, dynamic_shapes=shapes)
            _out_of_place(exported.graph_module)
            exported = exported.run_decompositions({})
    except Exception as error:  # torch.export raises dozens of types, some private
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}: {said.strip()[:300]}; "
            f"make its forward free of data-dependent Python, or pass dynamic_shapes="
        ) from error
    return _unlift(exported, leaves)


def _out_of_place(module: fx.GraphModule) -> None:
    """Activations that overwrite a fresh tensor which nothing else reads, as calls that do not.

    run_decompositions would come to the same, but takes a twentieth of a second for each relu6.
    """
    for node in module.graph.nodes:
        if node.target not in IN_PLACE:
            continue
        written = node.args[0]
        computed = written.op == "call_function" and isinstance(written.target, torch._ops.OpOverload)
        fresh = computed and not any(returned.alias_info for returned in written.target._schema.returns)
        if fresh and len(written.users) == 1:
            node.target = IN_PLACE[node.target]
    module.recompile()


def _any_batch(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Any]:
    """Dimension 0 of every input of any size, by parameter of forward: torch.export nests what `*args` takes."""
    by_parameter = inspect.signature(model.forward).bind(*example).arguments
    return {
        name: pytree.tree_map(lambda t: {0: torch.export.Dim.DYNAMIC} if t.dim() else {}, value)
        for name, value in by_parameter.items()
    }


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Transformer modules say each product: their fused kernel of evaluation mode would hide them."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _quiet:
    """Silence the loggers of torch for the length of a block: their messages repeat the exception's."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.CRITICAL)

    def __exit__(self, *exception: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)


def _unlift(exported: torch.export.ExportedProgram, leaves: list[Tensor]) -> Network:
    """A graph whose parameters are get_attr nodes again, under their own names."""
    held = {**exported.state_dict, **exported.constants}
    sources = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in exported.graph_signature.output_specs):
        raise CaptureError("the model changes its own state in forward; qbench needs a pure function of its inputs")
    graph, tensors, values = fx.Graph(), {}, {}
    for node in exported.graph.nodes:
        spec = sources.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind != InputKind.USER_INPUT:
            assert spec.target is not None
            tensors[spec.target] = held[spec.target].detach()
            values[node] = graph.get_attr(spec.target)
        else:
            target = STANDS_FOR.get(node.target, node.target)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = graph.create_node(node.op, target, args, kwargs, name=_name(node))
        values[node].meta = {"val": node.meta.get("val"), "layer": _layer(node, values[node].name)}
    results = pytree.tree_unflatten(
        list(range(len(exported.graph_signature.output_specs))), exported.call_spec.out_spec
    )
    values_in = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    inputs = [
        {
            "shape": [None if isinstance(size, torch.SymInt) else int(size) for size in value.shape],
            "dtype": str(leaf.dtype)[6:],
        }
        for leaf, value in zip(leaves, values_in, strict=True)
    ]
    return Network(graph, tensors, inputs, describe(results))


def _name(node: fx.Node) -> str:
    """The operation's name: torch numbers its nodes differently from version to version."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.split("::")[1])
    return str(node.name)


def _layer(node: fx.Node, own: str) -> str:
    """The name of the module that the node comes from; its own for a call in the model's own forward."""
    stack = node.meta.get("nn_module_stack")
    return (list(stack.values())[-1][0] if stack else "") or own
