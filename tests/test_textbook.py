"""The textbook page: each claim on made-up cells whose verdict is known, and the page of a real small sweep."""

import dataclasses
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_report import by_reference, record
from user_project import make, needs_engine

from qbench import cli, textbook, timing_lock, workers
from qbench.recipe import Recipe
from qbench.textbook import methods, speed, tensors
from qbench.textbook.claims import Question
from qbench.textbook.selection import Selection, command
from qbench.textbook.verdicts import FAILS, HOLDS, OPEN, UNTESTED, WEAKLY


def cell(method="ptsq", drop=0.0, sqnr_db=30.0, *, task="resnet18", family="cnn", int8=1.0, half=0.002, **choices):
    """A finished cell of a task whose fp32 score is 0.9: 1 % of it is 0.9 points."""
    names = Recipe(method=method, **({"backend": "native"} | choices)).names()
    metrics = {"sqnr_db": sqnr_db, "int8_mac_fraction": int8}
    words = [f"{axis}={name}" for axis, name in choices.items()]
    line = shlex.join(["python", "-m", "qbench", f"task={task}", f"method={method}", *words, "force=true"])
    made = record(method, drop=drop, task=task, family=family, half=half, metrics=metrics, details={"command": line})
    return dataclasses.replace(made, **{**names, "method": method, "key": f"{task}{method}{choices}"})


def asked(*cells, depthwise=(), results=None):
    return Question(Selection(cells), results, depthwise)


def words(rows):
    return [row.word for row in rows]


# --- finding cells ---------------------------------------------------------------------------------------------------


def test_a_cell_is_found_by_what_is_asked_and_the_defaults_elsewhere():
    plain, tensor, codes = cell(), cell(granularity="per_tensor"), cell(output="int8")
    found = Selection([codes, tensor, plain])
    assert found.cell("resnet18", "ptsq") is plain
    assert found.cell("resnet18", "ptsq", granularity="per_tensor") is tensor
    assert found.cell("resnet18", "ptsq", output="int8") is codes
    assert found.cell("resnet18", "woq") is None
    assert found.cell("lstm", "ptsq") is None


def test_failed_cells_and_those_with_unusual_values_are_not_asked():
    failed = dataclasses.replace(cell(), status="failed", error="no")
    drawn = cell()
    drawn.details["recipe"] = {"calibration_seed": 3}
    assert Selection([failed, drawn]).tasks == []


def test_the_command_joins_what_differs_and_says_defaults_where_others_differ():
    cells = [cell("woq", scheme="affine"), cell("ptsq"), cell("ptsq", task="lstm")]
    assert command(cells) == "python -m qbench -m task=resnet18,lstm method=woq,ptsq scheme=affine,symmetric"
    own = cell()
    own.details["command"] = "python -m qbench --config-dir my task=tiny method=ptsq measure=least force=true"
    assert command([own]) == "python -m qbench --config-dir my -m task=tiny method=ptsq measure=least"


# --- the claims ------------------------------------------------------------------------------------------------------


def sized(method, ratio):
    made = cell(method)
    made.metrics["size_ratio"] = ratio
    return made


def test_memory(tmp_path):
    cells = [cell("fp32"), sized("woq", 0.26), sized("ptdq", 0.4), sized("ptsq", 0.6)]
    assert words(methods.memory(asked(*cells, results=tmp_path))) == [HOLDS, WEAKLY, FAILS]
    for made, size in ((cells[0], 400), (cells[1], 200)):  # a header of 2 bytes, then that many bytes of tensors
        folder = tmp_path / "runs" / made.key
        folder.mkdir(parents=True)
        (folder / "model.qb").write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(size))
    row = methods.memory(asked(*cells, results=tmp_path))[0]
    assert row.texts[-2:] == ("0.000", "0.500")
    assert row.word == WEAKLY  # the file is a quarter, its tensors are a half


def test_accuracy_takes_the_best_recipe_of_each_method():
    cells = [cell("woq", 0.001), cell("ptdq", 0.008), cell("ptsq", 0.010), cell("ptsq", 0.02, granularity="per_tensor")]
    rows = methods.accuracy(asked(*cells))
    assert words(rows) == [HOLDS, WEAKLY, OPEN]  # 0.1 to 0.3, 0.6 to 1.0 and 0.8 to 1.2 points
    assert rows[2].texts == ("resnet18", "ptsq channel sym", "89.00", "+1.00 (+0.80 to +1.20) points", "0.90 points")
    assert words(methods.accuracy(asked(cell("ptsq", 0.012)))) == [FAILS]


@pytest.mark.parametrize(
    ("woq", "int8", "word"), [(33.0, 0.0, HOLDS), (31.5, 0.0, WEAKLY), (30.0, 0.0, FAILS), (33.0, 0.1, FAILS)]
)
def test_storage(woq, int8, word):
    rows = methods.storage(asked(cell("woq", sqnr_db=woq, int8=int8), cell("ptdq", sqnr_db=31.0), cell("ptsq")))
    assert words(rows) == [word]
    assert rows[0].texts[3] == "31.0 (ptdq)"


def test_who_is_suited_depends_on_the_family():
    cells = [
        *(cell(method, drop, task="lstm", family="lstm") for method, drop in (("ptdq", 0.001), ("ptsq", 0.05))),
        *(cell(method, drop, task="gan", family="gan") for method, drop in (("ptdq", 0.001), ("ptsq", 0.05))),
    ]
    rows = methods.suited_score(asked(*cells))
    assert [(row.texts[0], row.texts[2], row.word) for row in rows] == [("lstm", "ptdq", HOLDS), ("gan", "ptsq", FAILS)]


def with_speed(made, value, half=0.1, **more):
    """The cell with a speed-up at both batches, the larger one's half as high."""
    at = {"": value, "_b16": value / 2}
    speeds = {f"speedup{s}": v for s, v in at.items()}
    speeds |= {f"speedup_ci_low{s}": v - half for s, v in at.items()}
    speeds |= {f"speedup_ci_high{s}": v + half for s, v in at.items()}
    return dataclasses.replace(made, metrics=made.metrics | speeds, **more)


def test_int8_is_faster_where_the_interval_of_the_speedup_is_above_one():
    cells = [with_speed(cell("ptsq"), 2.0), with_speed(cell("qat"), 2.3), with_speed(cell("ptdq"), 0.8)]
    rows = speed.computing(asked(cell("fp32"), with_speed(cell("woq"), 3.0), *cells))  # woq computes in float
    assert [row.texts for row in rows] == [
        ("resnet18", "ptdq", "1", "0.80 (0.70 to 0.90)"),
        ("resnet18", "ptdq", "16", "0.40 (0.30 to 0.50)"),
        ("resnet18", "ptsq", "1", "2.00 (1.90 to 2.10)"),
        ("resnet18", "ptsq", "16", "1.00 (0.90 to 1.10)"),
        ("resnet18", "qat", "1", "2.30 (2.20 to 2.40)"),
        ("resnet18", "qat", "16", "1.15 (1.05 to 1.25)"),
    ]
    assert words(rows) == [FAILS, FAILS, HOLDS, OPEN, HOLDS, HOLDS]
    (row, _) = speed.computing(asked(with_speed(cell("ptsq"), 2.0, notes=["disturbed"])))
    assert row.texts[3] == "2.00 (1.90 to 2.10), disturbed"


def test_who_is_suited_by_speed_depends_on_the_family():
    cells = [with_speed(cell(method, task="lstm", family="lstm"), v) for method, v in (("ptdq", 1.0), ("ptsq", 3.0))]
    cells += [with_speed(cell("ptsq"), 2.0), with_speed(cell("ptdq"), 1.7)]
    rows = speed.suited_speed(asked(*cells))
    assert rows[0].texts == (
        "lstm",
        "lstm",
        "ptdq",
        "1",
        "1.00 (0.90 to 1.10)",
        "3.00 (2.90 to 3.10)",
        "-2.00 (-2.20 to -1.80)",
    )
    assert [(row.texts[2], row.texts[3], row.word) for row in rows] == [
        ("ptdq", "1", FAILS),
        ("ptdq", "16", FAILS),
        ("ptsq", "1", HOLDS),  # 0.3 (0.1 to 0.5)
        ("ptsq", "16", OPEN),  # 0.15 (-0.05 to 0.35)
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backend": "reference", "details": by_reference().details}, "no result with backend reference"),
        ({"notes": ["one_process"]}, "timed in one process only"),
        ({"metrics": record().metrics}, "not measured"),
    ],
    ids=["the reference", "one process", "no speed-up"],
)
def test_speed_is_never_judged_where_it_is_no_result(change, text):
    advised, other = with_speed(cell("ptsq"), 2.0), with_speed(cell("ptdq"), 1.0)
    without = dataclasses.replace(advised, **change)
    rows = speed.suited_speed(asked(without, other))
    assert [(row.texts[4:], row.word) for row in rows] == [
        ((text, "1.00 (0.90 to 1.10)", ""), UNTESTED),
        ((text, "0.50 (0.40 to 0.60)", ""), UNTESTED),
    ]
    assert words(speed.computing(asked(without))) == [UNTESTED, UNTESTED]


def trained(drop):
    return dataclasses.replace(cell("ptsq", drop, granularity="per_tensor"), method="qat", key=f"qat{drop}")


def test_recovery_is_asked_where_ptsq_lost():
    lost, kept = cell("ptsq", 0.05, granularity="per_tensor"), cell("ptsq", 0.001)
    assert methods.recovery(asked(lost, kept)) == []  # no qat
    (row,) = methods.recovery(asked(lost, kept, trained(0.01)))
    assert (row.texts[1], row.texts[5], row.word) == ("per_tensor", "80 %", HOLDS)
    assert words(methods.recovery(asked(lost, trained(0.08)))) == [FAILS]
    assert words(methods.recovery(asked(lost, trained(0.049)))) == [OPEN]


def test_int8_output():
    plain, codes = cell("ptsq", 0.001), cell("ptsq", 0.002, 27.0, output="int8")
    (row,) = methods.int8_output(asked(plain, codes))
    assert row.texts[1:3] == ("+0.10 (-0.30 to +0.50) points", "0.90 points")
    assert (row.texts[-1], row.word) == ("-3.0", HOLDS)


def test_symmetric_weights():
    pairs = [cell("woq", 0.001, scheme=name) for name in ("affine", "symmetric")]
    assert words(tensors.symmetric_weights(asked(*pairs))) == [HOLDS]  # -0.4 to 0.4 points
    pairs = [cell("woq", 0.0, scheme="affine"), cell("woq", 0.006, scheme="symmetric")]
    assert words(tensors.symmetric_weights(asked(*pairs))) == [FAILS]  # 0.2 to 1.0 points


def test_affine_activations_hold_by_sqnr_on_every_task():
    cells = [
        cell("ptsq", 0.0, noise, task=task, activation_scheme=name)
        for task in ("resnet18", "lstm")
        for name, noise in (("affine", 30.0), ("symmetric", 25.0))
    ]
    rows = tensors.affine_activations(asked(*cells))
    assert words(rows) == [WEAKLY, WEAKLY]
    claim = tensors.CLAIMS[1]
    assert claim.verdict(rows) == HOLDS
    assert claim.verdict(rows[:1]) == WEAKLY


def test_channels_gain_more_on_a_depthwise_network():
    cells = [
        cell("ptsq", drop, task=task, granularity=name)
        for task, losses in (("resnet18", (0.0, 0.01)), ("mobilenet_v2", (0.0, 0.2)))
        for name, drop in zip(("per_channel", "per_tensor"), losses, strict=True)
    ]
    question = asked(*cells, depthwise=["mobilenet_v2"])
    assert words(tensors.channels(question)) == [HOLDS, HOLDS]
    (row,) = tensors.depthwise(question)
    # (0.2 - 0.01) / 0.9 = 21.11 %; each of the four drops adds 0.002 / 0.9 = 0.222 % to either side.
    assert row.texts[:3] == ("mobilenet_v2 less resnet18", "ptsq", "+21.11 (+20.22 to +22.00) %")
    assert row.word == HOLDS
    assert tensors.depthwise(asked(*cells)) == []  # none is named


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_of_no_cells_says_so(tmp_path):
    assert textbook.page([], tmp_path) == [tmp_path / "textbook.md"]
    text = (tmp_path / "textbook.md").read_text()
    assert text.count(UNTESTED) >= 2 * len(textbook.CLAIMS)
    assert text.count("No cells of this sweep test it.") == len(textbook.CLAIMS)


def test_the_same_records_make_the_same_bytes(tmp_path):
    cells = [cell("woq"), cell("ptsq"), cell("ptsq", activation_scheme="symmetric")]
    contents = []
    for name in ("a", "b"):
        files = textbook.page(cells, tmp_path / name)
        contents.append({path.name: path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"textbook.md", "textbook-drops.png", "textbook-choices.png"}


SWEEP = """# @package _global_
page:
  _target_: qbench.textbook.page
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      task: tiny
      measure: least
cells:
  - method=fp32
  - method=ptsq output=int8
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs command lines in a project whose sweep `claims` has a page; returns the exit code and what was said."""
    folder = make(tmp_path)
    (folder / "my" / "sweep" / "claims.yaml").write_text(SWEEP)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(workers, "stop", lambda: None)
    monkeypatch.setattr(timing_lock, "tempfile", SimpleNamespace(gettempdir=lambda: tmp_path))  # waits for no other

    def run_here(*arguments):
        capsys.readouterr()
        return cli.main(["--config-dir", "my", *arguments]), *capsys.readouterr()

    return run_here


@needs_engine
def test_a_finished_sweep_writes_its_page_again_without_running(run):
    code, said, _ = run("+sweep=claims")
    assert code == 0
    assert "page: results/textbook.md" in said.splitlines()
    page = Path("results/textbook.md")
    first = page.read_text()
    assert "| tiny | ptsq channel sym out:int8 |" in first
    assert "python -m qbench --config-dir my -m task=tiny method=ptsq output=int8 measure=least" in first
    page.unlink()
    assert run("+sweep=claims")[1].startswith("nothing to do: all 2 cells are finished")
    assert page.read_text() == first


@needs_engine
def test_the_lines_of_a_sweep_are_joined_and_the_command_line_wins(run):
    _, said, _ = run("+sweep=claims", "dry_run=true")
    assert said.splitlines()[:2] == ["to do  tiny[fp32]", "to do  tiny[ptsq-per_channel-symmetric output=int8]"]
    _, said, _ = run("+sweep=claims", "method=woq", "dry_run=true")
    assert said.splitlines()[:2] == ["to do  tiny[fp32]", "to do  tiny[woq-per_channel-symmetric]"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("page=here", "page=here: give null, or _target_ (a function of the records and the results folder)"),
        ("page={_target_: qbench.nowhere.page}", "_target_ 'qbench.nowhere.page': Error locating target"),
        ("cells=3", "cells=3: a sweep's YAML gives a list of lines, such as - method=ptsq,woq"),
    ],
)
def test_what_is_no_page_or_no_line_is_said_before_anything_runs(run, given, sentence):
    code, _, complaint = run("+sweep=claims", given)
    assert code == 2
    assert complaint.count("\n") == 1
    assert complaint.startswith(f"qbench: {sentence}")
