"""The lstm task: its data, the split by subject, and (slow) that training reaches the promised score; bench_lstm."""

import gzip
import hashlib
import re

import pytest
import torch
from torch import nn

import qbench
from qbench.metrics import accuracy
from tasks import bench, lstm, watch

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the recordings --------------------------------------------------------------------------------------------------


def test_the_recordings_are_whole_and_balanced():
    held = watch.read()
    assert held["samples"].shape == (6, 244_102)
    assert held["lengths"].sum() == 244_102
    assert held["exercise"].bincount().tolist() == [20] * 7
    assert held["subject"].bincount().tolist() == [0] + [14] * 10


def test_the_provenance_file_lists_the_hashes_of_the_file_and_of_its_content():
    text = (watch.EMBEDDED.parents[1] / "PROVENANCE.md").read_text()
    content = watch.EMBEDDED.read_bytes()
    (row,) = re.findall(r"^\| watch.safetensors.gz \| (\d+) \| `(\w+)` \| `(\w+)` \|$", text, re.MULTILINE)
    assert row == (str(len(content)), hashlib.sha256(content).hexdigest(), watch.SHA256)


def test_no_subject_is_on_both_sides():
    examples, (windows, classes) = watch.evaluation(), watch.training()
    held = watch.read()
    judging = set(held["subject"][examples.units.unique()].tolist())
    assert judging == {8, 9, 10}
    recordings = set(torch.nonzero(held["subject"] >= 8).flatten().tolist())
    assert set(examples.units.tolist()) == recordings  # every recording of theirs, and no other
    assert len(windows) + len(examples) == 4_677
    assert torch.equal(examples.targets, held["exercise"].long()[examples.units])
    assert classes.bincount().min() > 300


def test_windows_are_cut_from_the_recordings():
    """Window k of a recording is its steps 50 k ... 50 k + 99, normalized by the steps of subjects 1 to 7."""
    held, examples = watch.read(), watch.evaluation()
    samples, starts = held["samples"].double() * held["scale"].double()[:, None], held["lengths"].cumsum(0)
    seen = torch.cat(
        [samples[:, starts[r] - held["lengths"][r] : starts[r]] for r in range(140) if held["subject"][r] < 8], 1
    )
    mean, std = seen.mean(1), seen.std(1)
    recording = int(examples.units[0])
    own = samples[:, starts[recording] - held["lengths"][recording] : starts[recording]]
    count = int((examples.units == recording).sum())
    assert count == (own.shape[1] - 100) // 50 + 1
    for k in (0, count - 1):
        want = ((own[:, 50 * k : 50 * k + 100].T - mean) / std).float()
        torch.testing.assert_close(examples.inputs[0][k], want, rtol=1e-4, atol=1e-4)


def test_calibration_windows_are_training_windows():
    def contents(windows):
        return {window.numpy().tobytes() for window in windows}

    calibration = [window for (batch,) in watch.calibration() for window in batch]
    assert len(calibration) == 256
    assert contents(calibration) < contents(watch.training()[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:1000], "damaged gzip file"),
        (lambda packed: b"not gzip" + packed, "damaged gzip file"),
        (lambda packed: gzip.compress(b"another"), r"content has sha256 .* expected"),
    ],
    ids=["truncated", "not gzip", "another file"],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, damage, message):
    path = tmp_path / watch.EMBEDDED.name
    path.write_bytes(damage(watch.EMBEDDED.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        watch.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file, restore it from the repository"):
        watch.read(tmp_path / "nowhere")


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lstm.task, bench.lstm])
def test_build_is_seeded_and_leaves_the_callers_random_state(make):
    before = torch.random.get_rng_state()
    weights = [make(seed).build().lstm.weight_ih_l0 for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_network_is_two_layers_of_128_and_a_linear_layer():
    model = lstm.task().build()
    assert isinstance(model.lstm, nn.LSTM)
    assert (model.lstm.input_size, model.lstm.hidden_size, model.lstm.num_layers) == (6, 128, 2)
    assert model(torch.zeros(2, 100, 6)).shape == (2, 7)


@pytest.mark.parametrize(("method", "fraction"), [("woq", 0.0), ("ptdq", 1.0), ("ptsq", 1.0)])
def test_the_task_runs_in_every_method(method, fraction):
    task = lstm.task()
    model = task.build().eval()
    calibration = [tuple(leaf[:4] for leaf in batch) for batch in task.calibration()[:2]]
    q = qbench.quantize(model, calibration[0], qbench.Recipe(method=method), calibration=calibration)
    x = task.evaluation().inputs[0][:3]
    with torch.no_grad():
        assert torch.allclose(q(x), model(x), atol=0.01)
    assert q.int8_mac_fraction == fraction
    assert q.float_ops == [] or method != "ptsq"


def test_bench_lstm_is_the_stated_network_and_judges_itself():
    task = bench.lstm()
    model = task.build()
    assert (model.lstm.input_size, model.lstm.hidden_size, model.lstm.num_layers) == (128, 512, 2)
    examples, calibration = task.evaluation(), torch.cat([batch for (batch,) in task.calibration()])
    assert examples.inputs[0].shape == (64, 100, 128)
    assert examples.targets is None
    assert task.train is None
    assert not torch.equal(examples.inputs[0][:32], calibration)
    with torch.no_grad():
        assert model(examples.inputs[0][:1]).shape == (1, bench.CLASSES)


@pytest.mark.slow
def test_training_reaches_the_promised_score():
    task, said = lstm.task(), []
    model = task.build()
    task.train(model, said.append)
    assert not model.training
    examples = task.evaluation()
    with torch.no_grad():
        outputs = torch.cat([model(batch) for batch in examples.inputs[0].split(250)])
    compared = accuracy().compare(outputs, outputs, examples.targets, examples.units)
    assert compared.score >= 0.80
    assert (compared.test, compared.units) == ("cluster bootstrap", 42)
    assert re.fullmatch(r"epoch \d+/\d+, batch \d+/\d+, loss \d\.\d\d, 0 s left", said[-1])
    assert len(said) > 3
