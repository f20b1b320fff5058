"""The transformer task: its text, its network, its score, and (slow) what training reaches; the bench tasks."""

from __future__ import annotations

import gzip
import hashlib
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from qbench.metrics import bits_per_char
from qbench.statistics import cluster_bootstrap
from qbench.task import Task
from tasks import bench, sotu, transformer

# --- text ------------------------------------------------------------------------------------------------------------


def test_the_provenance_file_lists_the_hashes_of_the_files_and_of_their_content() -> None:
    text = (sotu.EMBEDDED.parent / "PROVENANCE.md").read_text()
    for name, sha256 in sotu.SHA256.items():
        path = sotu.EMBEDDED / f"{name}.gz"
        (row,) = re.findall(rf"^\| {name}.gz \| (\d+) \| `(\w+)` \| `(\w+)` \|$", text, re.MULTILINE)
        assert row == (str(path.stat().st_size), hashlib.sha256(path.read_bytes()).hexdigest(), sha256)


def test_whole_speeches_are_held_out() -> None:
    training, held_out = sotu.training(), sotu.held_out()
    assert (len(training), len(held_out)) == (56, 29)
    seen = b"".join(characters(speech) for speech in training)
    for speech in map(characters, held_out):
        shared = [speech[start : start + 60] in seen for start in range(0, len(speech) - 60, 400)]
        assert np.mean(shared) < 0.02  # a quotation, a formula


def characters(speech: torch.Tensor) -> bytes:
    return speech.to(torch.uint8).numpy().tobytes()


def test_targets_are_the_next_characters_and_units_the_speeches() -> None:
    examples, speeches = sotu.evaluation(), sotu.held_out()
    (x,) = examples.inputs
    assert x.shape == examples.targets.shape == (29 * 16, 128)
    assert torch.equal(x[:, 1:], examples.targets[:, :-1])
    assert examples.units.bincount().tolist() == [16] * 29
    for unit in (0, 28):
        first, last = x[examples.units == unit][[0, -1]]
        assert torch.equal(first, speeches[unit][:128])
        assert torch.equal(last, speeches[unit][-129:-1])


def test_calibration_is_from_training_speeches() -> None:
    text = characters(torch.cat(sotu.training()))
    batches = [batch for (batch,) in sotu.calibration()]
    assert [batch.shape for batch in batches] == [(32, 128)] * 4
    assert all(characters(row) in text for row in torch.cat(batches)[::16])


def test_characters_have_numbers() -> None:
    assert sotu.encode("\n ~A").tolist() == [0, 1, 95, 34]
    assert len(sotu.ALPHABET) == 96
    with pytest.raises(ValueError, match=r"'\\t' is no character of the alphabet"):
        sotu.encode("a\tb")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:1000], "damaged gzip file"),
        (lambda packed: b"not gzip" + packed, "damaged gzip file"),
        (lambda packed: gzip.compress(b"another"), "content has sha256 .* expected"),
    ],
    ids=["truncated", "not gzip", "another file"],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "held_out.txt.gz"
    path.write_bytes(damage((sotu.EMBEDDED / path.name).read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        sotu.read_text(path, sotu.SHA256["held_out.txt"])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        sotu.read_text(tmp_path / "none.gz", "")


# --- network and score -----------------------------------------------------------------------------------------------


def test_the_network_is_causal_and_its_weights_are_seeded() -> None:
    model, again = transformer.build(0).eval(), transformer.build(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert sum(parameter.numel() for parameter in model.parameters()) == 834_400
    x = sotu.evaluation().inputs[0][:2]
    changed = x.clone()
    changed[:, 100] = 0
    with torch.inference_mode():
        before, after = model(x), model(changed)
    assert before.shape == (2, 128, 96)
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100], after[:, 100])


def test_bits_per_char_by_hand() -> None:
    """Two speeches of two windows of one character each; a probability of 1/2 is one bit, of 1/4 two."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.5, 0.25, 0.25]]).log()[:, None]
    targets, units = torch.tensor([[0], [0], [2], [0]]), torch.tensor([7, 7, 9, 9])
    even = torch.full((4, 1, 3), math.log(1 / 4)) + 3  # any constant: a third each
    found = bits_per_char().compare(even, logits, targets, units)
    assert found.score_fp32 == pytest.approx((1 + 2 + 1 + 1) / 4)
    assert found.score == pytest.approx(math.log2(3))
    assert found.drop == pytest.approx(found.score - found.score_fp32)  # more bits are worse
    spread = cluster_bootstrap([2 * math.log2(3) - 3, 2 * math.log2(3) - 2], [2, 2])
    assert (found.ci_low, found.ci_high) == pytest.approx((spread.low, spread.high))
    assert (found.units, found.test, found.notes) == (2, "cluster bootstrap", ("few_units",))
    assert found.metrics(bits_per_char())["bits_per_char"] == found.score


def test_fewer_bits_are_a_negative_drop() -> None:
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (40, 8), generator=random)
    sure = torch.nn.functional.one_hot(targets, 5) * torch.rand(40, 8, 1, generator=random)
    found = bits_per_char().compare(3 * sure, sure, targets, torch.arange(40) // 2)
    assert found.ci_low < found.drop < found.ci_high < 0
    assert found.significant


def test_bits_per_char_refuses_what_it_cannot_score() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="bits_per_char needs targets"):
        bits_per_char().compare(x, x, None)
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3, 4\) for targets of shape \(2, 4\)"):
        bits_per_char().compare(x, x, torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.slow
def test_training_reaches_the_stated_score() -> None:
    model = transformer.build()
    transformer.fit(0, model, lambda text: None)
    examples = sotu.evaluation()
    with torch.inference_mode():
        outputs = torch.cat([model(x) for x in examples.inputs[0].split(120)])
    assert bits_per_char().compare(outputs, outputs, examples.targets, examples.units).score < 2.6


# --- bench -----------------------------------------------------------------------------------------------------------

BENCH: dict[str, tuple[Callable[[], Task], float]] = {
    "bench_encoder": (bench.encoder, 10.6e6),
    "bench_resnet18": (lambda: bench.classifier("resnet18"), 11.7e6),
    "bench_mobilenet_v2": (lambda: bench.classifier("mobilenet_v2"), 3.5e6),
}


@pytest.mark.parametrize("name", BENCH)
def test_bench_networks_are_of_the_stated_size(name: str) -> None:
    make, parameters = BENCH[name]
    task = make()
    assert task.name == name
    model = task.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_the_layers_of_the_encoder_have_weights_of_their_own() -> None:
    task = bench.encoder()
    model = task.build()
    first, second = (model.layers[i].linear1.weight for i in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, task.build().layers[0].linear1.weight)
    assert not model.training
    (x,) = task.evaluation().inputs
    assert x.shape == (64, 128, 384)
    assert not any(torch.equal(x[0], y) for (batch,) in task.calibration() for y in batch)
