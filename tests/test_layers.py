"""The per-layer table: the layer that hurts is the one that was spoilt, costs are those counted by hand."""

import csv
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from qbench.capture import capture
from qbench.layers import LayerRow, as_csv, layer_table
from qbench.quantization import quantize_network
from qbench.recipe import Recipe

IMAGES = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
METHODS = ("woq", "ptdq", "ptsq")


class Net(nn.Module):
    """A residual block, a depthwise convolution and a head; `spoilt` gets one weight 300 times too large."""

    def __init__(self, spoilt=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, groups=16)])
        self.head = nn.Linear(16, 10)
        if spoilt is not None:
            weight = self.get_submodule(spoilt).weight.data
            weight.view(-1)[7] = 300 * weight.std()

    def forward(self, x):
        x = functional.relu(self.stem(x))
        x = functional.relu(self.body[0](x) + x)
        return self.head(functional.relu(self.body[1](x)).mean((2, 3)))


LAYERS = ["stem", "body.0", "body.1", "head"]


def table(spoilt=None, inputs=IMAGES, **recipe):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = capture(Net(spoilt).eval(), (inputs,))
    model = quantize_network(network, Recipe(**recipe), [(inputs,)])
    return layer_table(network, Recipe(**recipe), model, (inputs,)), model


@pytest.mark.parametrize("method", METHODS)
def test_a_row_for_each_layer_in_the_order_of_execution(method):
    rows, _ = table(method=method)
    assert [row.layer for row in rows] == LAYERS
    kind = {"woq": "weight_only_", "ptdq": "dynamic_", "ptsq": ""}[method]
    assert [row.operation for row in rows] == [f"{kind}conv"] * 3 + [f"{kind}linear"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spoilt", LAYERS)
def test_the_layer_with_the_outlier_hurts_most(method, spoilt):
    """One weight 300 times the others leaves a single scale for the whole tensor no codes for them."""
    rows, _ = table(spoilt, method=method, granularity="per_tensor")
    worst = min(rows, key=lambda row: row.sqnr_alone_db)
    assert worst.layer == spoilt
    others = [row.sqnr_alone_db for row in rows if row.layer != spoilt]
    assert worst.sqnr_alone_db < min(others) - 3
    assert worst.weight_codes_used < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_for_each_channel_is_the_cure(method):
    spoilt, _ = table("body.0", method=method, granularity="per_tensor")
    cured, _ = table("body.0", method=method, granularity="per_channel")
    assert cured[1].sqnr_alone_db > spoilt[1].sqnr_alone_db + 6


@pytest.mark.parametrize("method", METHODS)
def test_macs_of_one_example_by_hand(method):
    rows, _ = table(method=method)
    assert {row.layer: row.macs for row in rows} == {
        "stem": 12 * 12 * 16 * 3 * 9,
        "body.0": 12 * 12 * 16 * 16 * 9,
        "body.1": 5 * 5 * 16 * 9,
        "head": 16 * 10,
    }


def test_macs_do_not_depend_on_the_batch():
    few, many = (table(inputs=IMAGES[:count])[0] for count in (2, 8))
    assert [row.macs for row in few] == [row.macs for row in many]


def test_bytes_are_those_of_the_tensors_by_hand():
    """int8 weights, float32 scales, an int8 zero point for each scale where affine, an int32 or float32 bias."""
    weights = {"stem": 16 * 3 * 9, "body.0": 16 * 16 * 9, "body.1": 16 * 9, "head": 160}
    outputs = {"stem": 16, "body.0": 16, "body.1": 16, "head": 10}
    for method in METHODS:
        rows, model = table(method=method, granularity="per_channel", scheme="affine")
        assert {row.layer: row.bytes for row in rows} == {
            layer: weights[layer] + (4 + 1 + 4) * outputs[layer] for layer in LAYERS
        }
        held = sum(tensor.nbytes for tensor in model.program.tensors.values())
        assert sum(row.bytes for row in rows) == held
    rows, _ = table(granularity="per_tensor", scheme="symmetric")
    assert {row.layer: row.bytes for row in rows} == {
        layer: weights[layer] + 4 + 4 * outputs[layer] for layer in LAYERS
    }


def test_in_place_noise_grows_from_layer_to_layer():
    """In place a layer has the noise of the layers before it too; alone it has only its own."""
    rows, _ = table()
    in_place = [row.sqnr_in_place_db for row in rows]
    assert in_place[0] > in_place[1]
    assert all(20 < noise < 60 for noise in in_place)
    assert all(row.sqnr_alone_db > in_place[-1] for row in rows)  # of the result: one layer's noise is less than all


def test_codes_used_are_shares():
    static, _ = table()
    assert all(0 < row.weight_codes_used <= 1 for row in static)
    assert all(0 < row.output_codes_used <= 1 for row in static[:-1])
    assert static[-1].output_codes_used is None  # the last layer leaves its accumulator
    assert all(row.output_codes_used is None for row in table(method="ptdq")[0])


def test_a_kept_layer_has_no_row():
    for method in METHODS:
        rows, _ = table(method=method, keep_float=["body.0"])
        assert [row.layer for row in rows] == ["stem", "body.1", "head"]
        assert all(row.sqnr_alone_db > 20 for row in rows)


def test_the_table_as_csv():
    rows = [LayerRow("conv1", "conv", 1234567, 10, 41.23456789, None, 0.5, None), *table()[0]]
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert read[0] == {
        "layer": "conv1",
        "operation": "conv",
        "macs": "1234567",
        "bytes": "10",
        "sqnr_alone_db": "41.2346",
        "sqnr_in_place_db": "",
        "weight_codes_used": "0.5",
        "output_codes_used": "",
    }
    assert [row["layer"] for row in read[1:]] == LAYERS
