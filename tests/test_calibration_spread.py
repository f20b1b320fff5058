"""The calibration page: draws grouped, their spread by hand, and what the sweep asks."""

import dataclasses

from test_report import record
from user_project import needs_engine

from qbench import calibration_spread, cli
from qbench.calibration_spread import grouped, page


def drawn(seed, drop, noise, samples=16, observer="minmax"):
    recipe = {"calibration_samples": samples, "calibration_seed": seed}
    made = record(drop=drop, metrics={"sqnr_db": noise}, details={"recipe": recipe})
    return dataclasses.replace(made, observer=observer, key=f"{seed}{samples}{observer}")


CELLS = [drawn(0, 0.01, 30.0), drawn(1, 0.03, 33.0), drawn(0, 0.0, 31.0, samples=64)]


def test_cells_that_differ_in_their_seed_only_are_draws_of_one_thing():
    groups = grouped([*CELLS, drawn(0, 0.0, 30.0, observer="mse"), record("fp32"), record()])
    assert [(g.observer, g.samples, len(g.cells)) for g in groups] == [
        ("minmax", 16, 2),
        ("minmax", 64, 1),
        ("mse", 16, 1),
    ]


def test_the_numbers_by_hand(tmp_path):
    files = page(CELLS, tmp_path)
    assert [path.name for path in files] == ["calibration.md", "calibration.png"]
    text = files[0].read_text()
    # Scores 89 and 87 %: mean 88, sd sqrt(2) = 1.41 points. SQNR 30 and 33: mean 31.5, sd 2.12.
    assert "| minmax | 16 | 2 | 88.00 | 87.00 | 89.00 | 1.41 | 31.5 | 30.0 | 33.0 | 2.1 |" in text
    assert "| minmax | 64 | 1 | 90.00 | 90.00 | 90.00 | 0.00 | 31.0 | 31.0 | 31.0 | 0.0 |" in text
    assert "Largest standard deviation: 1.41 points (minmax, 16 examples)." in text
    assert "reaches 0.20 points to each side" in text


def test_nothing_drawn_is_said(tmp_path):
    (only,) = page([record()], tmp_path)
    assert "No cells with a calibration_seed." in only.read_text()


def test_the_figure_has_a_column_a_task_and_a_line_an_observer_beside_fp32(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(calibration_spread, "save", lambda figure, path: figures.append(figure))
    other = [dataclasses.replace(cell, task="lstm") for cell in CELLS]
    page([*CELLS, *other, drawn(0, 0.0, 30.0, observer="mse")], tmp_path)
    (figure,) = figures
    assert [ax.get_title() for ax in figure.axes] == ["resnet18", "lstm", "", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fp32", "minmax", "mse"]


@needs_engine
def test_the_sweep_asks_each_draw_once_and_fp32_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["+sweep=calibration", "task=resnet18", "observer=mse", "calibration_samples=16", "dry_run=true"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "to do  resnet18[fp32]"
    assert lines[2] == (
        "to do  resnet18[ptsq-per_channel-symmetric observer=mse calibration_samples=16 calibration_seed=1]"
    )
    assert lines[-1].startswith("6 cells, 0 done, 6 to do")
