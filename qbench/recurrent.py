"""One form for LSTMs: a call for each layer and direction, time first, with moves of data around them.

torch.export leaves an nn.LSTM as one aten.lstm call for all its layers. Split, every later stage knows one layer in one
direction only: x [T, N, inputs] and a state (h, c), both [1, N, hidden], to h of every step [T, N, hidden] and the last
h and c. A reverse direction is the same call on the flipped sequence. What torch takes for a missing state becomes one
aten.zeros, so that integer programs can start at the zero point. Dropout is off: networks are captured for evaluation.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from qbench.capture import Network

aten = torch.ops.aten

# num_layers, dropout, train, bidirectional, batch_first of a split call
SPLIT = {"num_layers": 1, "dropout": 0.0, "train": False, "bidirectional": False, "batch_first": False}
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}


def split_lstms(network: Network) -> None:
    """Rewrite each LSTM of a captured network in place; one with proj_size is left as it is.

    A split call's meta["layer"] is `lstm.l0`, `lstm.l0_reverse`, ...; its meta["module"] the nn.LSTM, `lstm`.
    """
    for node in list(network.graph.nodes):
        if node.target is aten.lstm.input and not _projects(node):
            with network.graph.inserting_before(node):
                results = _Split(network, node).results()
            for part in list(node.users):
                part.replace_all_uses_with(results[part.args[1]])
                network.graph.erase_node(part)
            network.graph.erase_node(node)


def _projects(node: fx.Node) -> bool:
    """Is h narrower than c (proj_size)?"""
    h, c = (state.meta["val"] for state in node.args[1])
    return bool(h.shape[-1] != c.shape[-1])


class _Split:
    """Writes one aten.lstm call as a call for each layer and direction."""

    def __init__(self, network: Network, node: fx.Node) -> None:
        self.network, self.node = network, node
        self.x, self.states, self.params, self.has_biases, self.layers, _, _, self.both, self.batch_first = node.args
        self.zeros: fx.Node | None = None

    def results(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """y, h_n and c_n as the original call returns them."""
        x = self._swapped(self.x)
        states: list[tuple[fx.Node, fx.Node]] = []
        for layer in range(self.layers):
            outputs = []
            for reverse in range(1 + self.both):
                sequence = self._call(aten.flip.default, x, [0]) if reverse else x
                y, *state = self._direction(sequence, layer, reverse)
                outputs.append(self._call(aten.flip.default, y, [0]) if reverse else y)
                states.append((state[0], state[1]))
            x = self._call(aten.cat.default, outputs, 2) if self.both else outputs[0]
        return self._swapped(x), *self._last(states)

    def _last(self, states: list[tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, fx.Node]:
        """h_n and c_n of all layers. Cells are stacked, as a concatenation is something that integer programs round."""
        if len(states) == 1:
            return states[0]
        hidden, cells = zip(*states, strict=True)
        flat = [self._call(aten.select.int, cell, 0, 0) for cell in cells]
        return self._call(aten.cat.default, list(hidden), 0), self._call(aten.stack.default, flat, 0)

    def _direction(self, x: fx.Node, layer: int, reverse: int) -> list[fx.Node]:
        """One layer in one direction: y, the last h and the last c."""
        index, count = layer * (1 + self.both) + reverse, 4 if self.has_biases else 2
        states = [self._state(given, index, x) for given in self.states]
        weights = list(self.params[index * count : (index + 1) * count])
        module = self.node.meta["layer"]
        name = f"{module}.l{layer}{'_reverse' * reverse}"
        args = (x, states, weights, self.has_biases, *SPLIT.values())
        call = self.network.graph.create_node("call_function", aten.lstm.input, args, {}, name=name.replace(".", "_"))
        steps, (h, c) = x.meta["val"].shape[0], (state.meta["val"] for state in states)
        call.meta = {"val": (h.new_empty(steps, *h.shape[1:]), h, c), "layer": name, "module": module}
        return [self._call(operator.getitem, call, part) for part in range(3)]

    def _state(self, given: fx.Node, index: int, x: fx.Node) -> fx.Node:
        """[1, N, hidden] of one layer and direction."""
        if self._is_zero(given):
            self.zeros = self.zeros or self._zeros(given, x)
            return self.zeros
        if len(self.params) == (4 if self.has_biases else 2):
            return given
        return self._call(aten.slice.Tensor, given, 0, index, index + 1)

    def _is_zero(self, state: fx.Node) -> bool:
        if state.op == "get_attr":
            return not bool(self.network.tensors[str(state.target)].any())
        return state.target in ZEROS

    def _zeros(self, given: fx.Node, x: fx.Node) -> fx.Node:
        """A state of zeros for as many examples as x has."""
        shape = given.meta["val"][:1]
        count = self.network.graph.call_function(aten.sym_size.int, (x, 1))
        count.meta = {"val": x.meta["val"].shape[1], "layer": self.node.meta["layer"]}
        zeros = self.network.graph.call_function(
            aten.zeros.default, ([1, count, int(shape.shape[2])],), {"dtype": shape.dtype}
        )
        zeros.meta = {"val": shape, "layer": self.node.meta["layer"]}
        return zeros

    def _swapped(self, x: fx.Node) -> fx.Node:
        """Time first from batch first, and back."""
        return self._call(aten.transpose.int, x, 0, 1) if self.batch_first else x

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.network.graph.call_function(target, args)
        value = target(*fx.map_arg(args, lambda source: source.meta["val"]))
        node.meta = {"val": value, "layer": self.node.meta["layer"]}
        return node


def lstm_operands(full: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of float_ops.lstm for an aten.lstm call (all arguments by name); None unless split and constant."""
    params = list(full["params"])
    constant = all(param.op == "get_attr" for param in params)
    if {name: full[name] for name in SPLIT} != SPLIT or not constant:
        return None
    if len(params) != (4 if full["has_biases"] else 2):  # a fifth one projects
        return None
    weights = params if full["has_biases"] else [*params, None, None]
    return full["input"], *weights, *(None if state.target is aten.zeros.default else state for state in full["hx"])


def is_cell_state(node: fx.Node, lstm: Any) -> bool:
    """Is the node the last c among the results of a call of `lstm`? It is float where h is codes."""
    return node.target is operator.getitem and node.args[1] == 2 and node.args[0].target is lstm


def lstm_bias(bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """b = b_ih + b_hh, float32 [4 hidden]: an int8 layer has one bias."""
    return None if bias_ih is None or bias_hh is None else bias_ih + bias_hh


def check_lstm_sizes(
    x: Tensor,
    states: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> None:
    """Raise ValueError unless the tensors of an aten.lstm call fit together.

    Torch hands them to oneDNN, which reads as much memory as the sizes of x and of the state ask for. With proj_size it
    computes itself, and checks.
    """
    h, c = states
    if x.dim() == h.dim() == c.dim() and h.shape[-1] != c.shape[-1]:
        return
    directions, hidden, examples = 1 + bidirectional, h.shape[-1], x.shape[0 if batch_first else 1]
    expected: list[tuple[int, ...]] = []
    for layer in range(layers):
        inputs = directions * hidden if layer else x.shape[-1]
        biases = [(4 * hidden,)] * (2 * has_biases)
        expected += [(4 * hidden, inputs), (4 * hidden, hidden), *biases] * directions
    state = (layers * directions, examples, hidden)
    sizes = x.dim() == 3 and [tuple(p.shape) for p in params] == expected and tuple(h.shape) == tuple(c.shape) == state
    if not sizes or any(tensor.dtype != x.dtype for tensor in (h, c, *params)):
        raise ValueError(f"lstm: an input {list(x.shape)} and a state {list(h.shape)} do not fit the weights")


def recurrent_macs(x: Tensor, params: list[Tensor]) -> int:
    """Multiply-accumulates of an aten.lstm, gru or rnn call: every weight meets every step of every example."""
    return x.shape[0] * x.shape[1] * sum(param.numel() for param in params if param.dim() == 2)
