"""The pictures: readable PNG files of the expected size, with what they say derived by hand."""

import struct
import subprocess
import sys

import pytest
import torch

from qbench import figures, tradeoff
from qbench.recipe import Recipe
from qbench.record import Record


def png_size(path):
    """Width and height from the header of a PNG file, which must be whole."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def titles(figure):
    return [ax.get_title() for ax in figure.axes]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to be looked at with matplotlib's own eyes."""
    saved = []
    save = figures.save

    def keep(figure, path):
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save", keep)
    monkeypatch.setattr(tradeoff, "save", keep)
    return saved


def test_a_skewed_activation(tmp_path, drawn):
    # 0 ... 255 in steps of one: affine has scale 1 and zero point 0, each value its own code.
    # Symmetric spans -255 ... 255 with scale 255/127: 128 codes from 128 to 255 are reached, none below.
    figures.scheme_figure(torch.arange(256.0), "ramp", tmp_path / "a" / "ramp.png")
    assert png_size(tmp_path / "a" / "ramp.png") == (1100, 420)
    symmetric, affine = titles(drawn[0])
    assert symmetric.startswith("symmetric: scale 2.01, zero point 128\n128 of 255 codes used, SQNR ")
    assert affine == "affine: scale 1, zero point 0\n256 of 256 codes used, no error"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["ramp.png"]  # written whole, nothing left beside it


def test_a_symmetric_weight(tmp_path, drawn):
    # -127 ... 127 in steps of one: symmetric int8 has scale 1 and zero point 0 and uses all its 255 codes.
    figures.scheme_figure(torch.arange(-127.0, 128.0), "weight", tmp_path / "w.png", weight=True)
    assert titles(drawn[0])[0] == "symmetric: scale 1, zero point 0\n255 of 255 codes used, no error"


def test_one_scale_for_all_beside_one_each(tmp_path, drawn):
    # Channel 1 is a hundredth of channel 0: one scale of 1 rounds its -1.27 ... 1.27 to the 3 codes -1, 0, 1.
    ramp = torch.arange(-127.0, 128.0)
    figures.granularity_figure(torch.stack([ramp, ramp / 100]), "weight", tmp_path / "g.png")
    assert png_size(tmp_path / "g.png") == (1100, 520)
    assert titles(drawn[0])[0].startswith("per_tensor: 1 scale; SQNR ")
    assert titles(drawn[0])[1].startswith("per_channel: 2 scales; ")
    spans = [[int(v) for v in ax.patches[0].get_data().values] for ax in drawn[0].axes[2:]]
    assert spans == [[255, 3], [255, 255]]


@pytest.mark.parametrize(
    "values", [torch.zeros(10), torch.full((5,), 3.0), torch.randn(4, 3, 2, 2), torch.tensor([1e-30])],
    ids=["zeros", "constant", "small conv", "tiny"],
)  # fmt: skip
def test_odd_tensors_can_be_drawn(tmp_path, values):
    figures.scheme_figure(values, "odd", tmp_path / "s.png")
    figures.granularity_figure(values.reshape(len(values), -1), "odd", tmp_path / "g.png")
    assert png_size(tmp_path / "s.png") == (1100, 420)


def test_values_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        figures.scheme_figure(torch.tensor([1.0, float("nan")]), "nan", tmp_path / "nan.png")
    assert not list(tmp_path.iterdir())


def test_equal_pictures_are_equal_files(tmp_path):
    for name in ("a.png", "b.png"):
        figures.granularity_figure(torch.eye(8), "weight", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def cell(task, method, granularity, drop, size):
    metrics = {"score": 0.9 - drop, "score_drop": drop, "size_bytes": size}
    metrics |= {"score_drop_ci_low": drop - 0.01, "score_drop_ci_high": drop + 0.01}
    return Record(
        **(Recipe(method=method, granularity=granularity).names() | {"backend": "native"}),
        **{"cell": f"{task}{method}{granularity}", "key": f"{task}{method}{granularity}", "status": "ok", "task": task},
        **{"family": "cnn", "label": "x", "metrics": metrics, "details": {"metric": "accuracy"}},
    )


def test_the_tradeoff_has_a_panel_a_task_and_marks_the_front(tmp_path, drawn):
    records = [
        cell(task, *rest)
        for task in ("resnet18", "mobilenet_v2")
        for rest in (
            ("fp32", "per_tensor", 0.0, 40e6),
            ("ptsq", "per_channel", 0.001, 10.1e6),
            ("ptsq", "per_tensor", 0.5, 10.0e6),
            ("woq", "per_group", 0.002, 10.2e6),
        )
    ]
    tradeoff.tradeoff_figure(records, tmp_path / "t.png")
    assert png_size(tmp_path / "t.png") == (1240, 500)
    assert titles(drawn[0]) == ["resnet18 (fp32: 40 MB)", "mobilenet_v2 (fp32: 40 MB)"]
    front = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert front == ["1  ptsq tensor sym", "2  ptsq channel sym"]
    assert drawn[0].axes[0].get_yscale() == "symlog"  # 50 points beside 0.1


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        tradeoff.tradeoff_figure([cell("resnet18", "fp32", "per_tensor", 0.0, 4e6)], tmp_path / "t.png")


def test_no_figure_is_kept_alive_by_pyplot(tmp_path):
    code = (
        "import sys, pathlib; from qbench import figures; assert 'matplotlib' not in sys.modules; import torch; "
        "figures.granularity_figure(torch.eye(4), 't', pathlib.Path(sys.argv[1]) / 'f.png'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_loss_of_fine_tuning(tmp_path, drawn):
    figures.loss_figure([0.5, 0.25, 0.125, 0.0625], 2, tmp_path / "loss.png")
    assert png_size(tmp_path / "loss.png") == (700, 400)
    curve, frozen = drawn[0].axes[0].lines
    assert list(curve.get_xdata()) == [1, 2, 3, 4]
    assert list(curve.get_ydata()) == [0.5, 0.25, 0.125, 0.0625]
    assert list(frozen.get_xdata()) == [2.5, 2.5]  # between the second step and the third, the first with frozen ranges
