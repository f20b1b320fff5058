"""The two hashes: what changes them, what does not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qbench import identity, sources

PREPARED = {"data_sha256": "d", "weights_sha256": "w", "name": "t", "folder": "/somewhere"}
RECIPE = {"method": {"name": "ptsq"}, "granularity": {"name": "per_channel"}}
TASK = {"_target_": "tasks.small_maps.task", "width": 8}
MEASURE = {"threads": 1, "batch": 16, "timeout_s": 600}


def cell(recipe=RECIPE, task=TASK, measure=MEASURE, prepared=PREPARED):
    return identity.cell_hash(recipe, task, measure, prepared)


def test_cell_changes_with_everything_that_is_asked():
    hashes = {
        cell(),
        cell(recipe={**RECIPE, "granularity": {"name": "per_tensor"}}),
        cell(task={**TASK, "width": 9}),
        cell(measure={**MEASURE, "batch": 8}),
        cell(prepared={**PREPARED, "data_sha256": "e"}),
        cell(prepared={**PREPARED, "weights_sha256": "x"}),
    }
    assert len(hashes) == 6


def test_cell_does_not_change_with_what_is_not_asked():
    assert cell(prepared={**PREPARED, "folder": "/elsewhere"}) == cell()
    assert cell(measure={**MEASURE, "timeout_s": 5}) == cell()
    assert cell(recipe=dict(reversed(RECIPE.items()))) == cell()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project's sources that a test may edit."""
    shutil.copytree(Path(identity.__file__).parent, tmp_path / "qbench", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").touch()
    (tmp_path / "tasks" / "one.py").write_text("import tasks.shared\n")
    (tmp_path / "tasks" / "shared.py").touch()
    (tmp_path / "tasks" / "other.py").touch()
    monkeypatch.setattr(sources, "PROJECT", tmp_path)
    return tmp_path


def key():
    return identity.key_hash("c", identity.sources_hash({"_target_": "tasks.one.task"}, "qbench.backends"))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("qbench/numerics.py", True),
        ("qbench/observers.py", True),
        ("qbench/measure.py", True),
        ("qbench/cell.py", True),
        ("tasks/one.py", True),
        ("tasks/shared.py", True),
        ("tasks/other.py", False),
        ("qbench/report.py", False),
        ("qbench/tracking.py", False),
        ("qbench/sweep.py", False),
        ("qbench/cli.py", False),
    ],
)
def test_key_changes_with_the_sources_that_run(project, file, changes):
    before = key()
    with (project / file).open("a") as source:
        source.write("\n# edited\n")
    assert (key() != before) == changes


def test_key_changes_with_the_environment_and_the_cell(monkeypatch):
    before = identity.key_hash("c", "s")
    assert identity.key_hash("d", "s") != before
    assert identity.key_hash("c", "t") != before
    for name, value in {
        "cpu": "other",
        "threads": 99,
        "torch": "0",
        "python": "2",
        "kernel_path": {"X": "avx2"},
    }.items():
        changed = {**identity.answering_environment(), name: value}
        monkeypatch.setattr(identity, "answering_environment", lambda changed=changed: changed)
        assert identity.key_hash("c", "s") != before, name
        monkeypatch.undo()


def test_kernel_path_follows_the_settings_of_torch_and_onednn():
    code = "from qbench import identity; print(identity.key_hash('c', 's'))"
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    environment = {**__import__("os").environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    chosen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert chosen.stdout != plain


def test_a_users_own_module_and_its_neighbour_count(tmp_path, monkeypatch):
    (tmp_path / "mymodel.py").write_text("import json\n")
    (tmp_path / "mytask.py").write_text("def build():\n    from mymodel import net\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = sources.closure(
        sources.modules_of_targets({"_target_": "mytask.build", "inner": {"_target_": "json.loads"}})
    )
    assert found == {"mytask": tmp_path / "mytask.py", "mymodel": tmp_path / "mymodel.py"}


def test_imports_for_the_type_checker_do_not_count(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\nelse:\n    import b\nfrom . import c\n"
    )
    assert list(sources.imports(path, "pkg.module")) == ["typing", "typing.TYPE_CHECKING", "b", "pkg", "pkg.c"]


def test_environment_explains_a_number_and_is_json():
    found = json.loads(json.dumps(identity.environment()))
    assert {"cpu", "cpu_flags", "vnni", "threads", "torch", "python", "git_revision", "load", "cores"} <= set(found)
    assert found["vnni"] == any("vnni" in flag for flag in found["cpu_flags"])


def test_key_has_no_time_load_host_or_path(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 9.0, 9.0))
    assert not {"load", "system", "git_revision", "cores"} & set(identity.answering_environment())
