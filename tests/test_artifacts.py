"""What lies beside a record: programs that read as what ran, a table, the figures of this network's own tensors."""

import csv
import re

import pytest
import torch
from torch import nn

from qbench.artifacts import FIGURES, diverging_weight, skewed_activation, write_artifacts
from qbench.capture import capture
from qbench.measure import Measure
from qbench.quantization import quantize_network
from qbench.recipe import Recipe

PNG = b"\x89PNG\r\n\x1a\n"


class Net(nn.Module):
    """`second` is the layer whose input has one side, `third` the one whose channels differ."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            self.third.weight[2] *= 50

    def forward(self, x):
        return self.head(self.third(self.second(torch.relu(self.first(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def calibration():
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(20, 1, 10, 10, generator=random),) for _ in range(2)]


@pytest.fixture(scope="module")
def network(calibration):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return capture(Net().eval(), calibration[0])


def write(folder, network, calibration, recipe, task_folder=None, **measure):
    model = quantize_network(network, recipe, calibration)
    folder.mkdir()
    said = []
    write_artifacts(folder, task_folder or folder, network, recipe, model, calibration, Measure(**measure), said.append)
    return model, said


def test_a_static_cell_has_programs_table_and_figures(tmp_path, network, calibration):
    model, said = write(tmp_path / "cell", network, calibration, Recipe())
    names = {path.name for path in (tmp_path / "cell").iterdir() if path.is_file()}
    assert names == {"program.txt", "program-fp32.txt", "layers.csv", *FIGURES}
    assert said == ["per-layer table", "figures"]
    program = (tmp_path / "cell" / "program.txt").read_text()
    assert program == model.code
    assert re.search(r"\bthird = torch\.ops\.qbench\.conv\.default\(second, ", program)
    assert "torch.ops.aten.conv2d.default(" in (tmp_path / "cell" / "program-fp32.txt").read_text()
    with (tmp_path / "cell" / "layers.csv").open() as table:
        assert [row["layer"] for row in csv.DictReader(table)] == ["first", "second", "third", "head"]
    for name in FIGURES:
        data = (tmp_path / "cell" / name).read_bytes()
        assert data.startswith(PNG)
        assert len(data) > 5000


def test_the_fp32_cell_has_no_layer_table(tmp_path, network, calibration):
    write(tmp_path / "cell", network, calibration, Recipe("fp32"), figures=False)
    assert {path.name for path in (tmp_path / "cell").iterdir()} == {"program.txt", "program-fp32.txt"}


def test_table_and_figures_can_be_left_out(tmp_path, network, calibration):
    _, said = write(tmp_path / "cell", network, calibration, Recipe(), layers=False, figures=False)
    assert {path.name for path in (tmp_path / "cell").iterdir()} == {"program.txt", "program-fp32.txt"}
    assert said == []


def test_the_cells_of_a_task_share_its_figures(tmp_path, network, calibration):
    """They show the float network: drawn for the first cell, copied for the others."""
    task = tmp_path / "task"
    write(tmp_path / "one", network, calibration, Recipe(), task, layers=False)
    drawn = {name: (task / "figures" / name).stat().st_mtime_ns for name in FIGURES}
    write(tmp_path / "two", network, calibration, Recipe("woq"), task, layers=False)
    assert drawn == {name: (task / "figures" / name).stat().st_mtime_ns for name in FIGURES}
    for name in FIGURES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_figure_that_is_missing_is_drawn_again(tmp_path, network, calibration):
    task = tmp_path / "task"
    write(tmp_path / "one", network, calibration, Recipe(), task, layers=False)
    (task / "figures" / FIGURES[1]).unlink()
    write(tmp_path / "two", network, calibration, Recipe(), task, layers=False)
    assert (tmp_path / "two" / FIGURES[1]).read_bytes() == (tmp_path / "one" / FIGURES[1]).read_bytes()


def test_the_activation_shown_is_the_most_one_sided(network, calibration):
    values, layer = skewed_activation(network, calibration[0])
    assert layer == "second"  # behind the ReLU
    assert float(values.min()) == 0


def test_the_weight_shown_is_the_one_whose_channels_differ_most(network):
    weight, layer = diverging_weight(network)
    assert layer == "third"
    assert torch.equal(weight, network.tensors["third.weight"])


def test_a_network_without_layers_has_no_figures_but_its_programs(tmp_path):
    images = [(torch.randn(4, 1, 8, 8),)]
    network = capture(nn.ReLU(), images[0])
    write(tmp_path / "cell", network, images, Recipe())
    assert {"program.txt", "program-fp32.txt", "layers.csv"} <= {path.name for path in (tmp_path / "cell").iterdir()}
