"""Every YAML under conf/ composes, and means what its name says; new files are found by glob."""

import os
import subprocess
import sys
import textwrap
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
from user_project import needs_engine

from qbench import cli
from qbench.compose import Composer
from qbench.config import conf_folder, instantiate, measure_of, recipe_of
from qbench.measure import Measure
from qbench.recipe import AXES, Recipe

CONF = conf_folder()
CHOICES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/*.yaml"))
MARKS = {Path("backend/native"): needs_engine}
RUNNABLE = [pytest.param(choice, id=str(choice), marks=MARKS.get(choice, ())) for choice in CHOICES]
SWEEPS = [choice.name for choice in CHOICES if choice.parts[0] == "sweep"]
NEEDS = {"torchvision": ["task.name=resnet18"]}  # what a choice cannot do without


def composed(*overrides):
    (job,) = Composer(Namespace(multirun=False, overrides=list(overrides), config_dir=None)).jobs()
    return job


@pytest.mark.parametrize("choice", [c for c in RUNNABLE if c.values[0].parts[0] != "sweep"])
def test_every_choice_composes(choice: Path):
    group, name = choice.parts
    job = composed(f"{group}={name}", *NEEDS.get(name, []))
    assert job.choices[group] == name
    assert "_target_" in job.values[group]


@pytest.mark.parametrize("choice", [c for c in RUNNABLE if c.values[0].parts[0] in AXES])
def test_the_file_of_a_choice_is_named_like_the_object_it_makes(choice: Path):
    axis, name = choice.parts
    made = instantiate(composed(f"{axis}={name}").values[axis])
    assert made.name == name
    assert made == getattr(Recipe(**{axis: name}), axis)  # the YAML has the same values as the class


def test_every_option_of_an_axis_has_a_file():
    for axis, module in AXES.items():
        options = {getattr(module, public).name for public in module.__all__}
        assert options == {choice.name for choice in CHOICES if choice.parts[0] == axis}, axis


def test_the_defaults_of_the_configuration_are_those_of_the_classes():
    values = composed().values
    assert recipe_of(values) == Recipe()
    assert measure_of(values) == Measure()


def test_quick_measures_less_than_default():
    quick, default = (measure_of(composed(f"measure={name}").values) for name in ("quick", "default"))
    assert quick.processes < default.processes
    assert quick.examples == 1000
    assert not quick.compile


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_composes(sweep: str):
    composer = Composer(Namespace(multirun=False, overrides=[f"+sweep={sweep}", "task=resnet18"], config_dir=None))
    assert composer.multirun
    jobs = list(composer.jobs())
    assert len(jobs) > 1
    assert {recipe_of(job.values) for job in jobs}


def test_no_choice_is_named_on_two_lines_of_the_table_of_contents():
    lines = (CONF / "config.yaml").read_text().splitlines()
    entries = [line for line in lines if line.startswith("  - ") and "_self_" not in line and "override" not in line]
    assert all("#" in line for line in entries)  # commented, every one
    assert {entry.split(":")[0].strip("- ") for entry in entries} == {c.parts[0] for c in CHOICES} - {"sweep"}


def test_a_wheel_finds_its_conf_and_tasks_from_any_folder(tmp_path):
    """conf lies inside the package there, tasks beside it; an unpacked wheel is what pip installs."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(Path(__file__).parent.parent)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    (elsewhere / "tasks.py").write_text("raise RuntimeError('the project has tasks of its own')\n")
    code = """
        from qbench.config import conf_folder, use_project_tasks
        use_project_tasks()
        import tasks
        print(conf_folder(), tasks.__file__, sep="\\n")
    """
    environment = {**os.environ, "PYTHONPATH": str(site)}
    places = [sys.executable, "-c", textwrap.dedent(code)]
    found = subprocess.run(places, cwd=elsewhere, env=environment, check=True, capture_output=True, text=True).stdout
    assert found.splitlines() == [str(site / "qbench" / "conf"), str(site / "tasks" / "__init__.py")]
    composed = [sys.executable, "-m", "qbench", "--cfg", "job", "method=woq"]
    shown = subprocess.run(composed, cwd=elsewhere, env=environment, check=True, capture_output=True, text=True).stdout
    assert "_target_: qbench.methods.woq" in shown
    assert [path.name for path in elsewhere.iterdir()] == ["tasks.py"]


def test_a_users_tasks_never_shadow_the_projects(tmp_path, monkeypatch):
    (tmp_path / "tasks.py").write_text("raise RuntimeError('the project has tasks of its own')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tasks", raising=False)
    made = instantiate(composed("task=resnet18").values["task"])
    assert made.name == "resnet18"
    assert Path(sys.modules["tasks"].__file__).parent.parent == CONF.parent


@pytest.mark.parametrize(
    "arguments",
    [
        ["+sweep=observers", "task=resnet18"],
        ["-m", "observer=percentile", "observer.percentile=99,99.9", "method=ptsq,woq"],
        ["-m", "measure=default,quick", "measure.batch=4,8", "method=fp32"],  # both touch measure: composed one by one
    ],
    ids=lambda arguments: arguments[1],
)
def test_combinations_put_together_are_those_that_hydra_composes(arguments):
    composer = Composer(cli._parser().parse_args(arguments))
    assert list(composer.jobs()) == [composer.job(o) for product in composer._combinations() for o in product]
