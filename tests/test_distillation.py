"""The built-in training of qat: seeded, towards fp32, and it recovers what one scale for a weight loses."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from programs import Apply, on_grid
from torch import Tensor, nn

import qbench
from qbench import methods
from qbench.capture import Network, capture
from qbench.distillation import Distillation, draw, relative_error, silent
from qbench.fake_quantized import FakeQuantized
from qbench.quantization import quantize_network
from qbench.saved import dump

pytestmark = pytest.mark.usefixtures("one_thread")

# --- batches and loss ------------------------------------------------------------------------------------------------


def test_every_sample_is_drawn_once_before_one_is_drawn_twice() -> None:
    samples = torch.arange(3 * 16).split([16, 30, 2])  # drawn in batches of the first one's size
    drawing = draw([[part, -part] for part in samples])
    epochs = [[next(drawing) for _ in range(3)] for _ in range(2)]
    orders = [torch.cat([x for x, _ in epoch]) for epoch in epochs]
    assert all(torch.equal(y, -x) for epoch in epochs for x, y in epoch)
    assert all(order.sort().values.tolist() == list(range(3 * 16)) for order in orders)
    assert not torch.equal(orders[0], orders[1])


def test_few_samples_are_one_batch_and_other_shapes_stay_as_they_are() -> None:
    assert sorted(next(draw([[torch.arange(5)], [torch.arange(0)]]))[0].tolist()) == [0, 1, 2, 3, 4]
    batches = [[torch.zeros(2, length)] for length in (3, 4, 5)]
    drawing = draw(batches)
    assert sorted(next(drawing)[0].shape[1] for _ in range(3)) == [3, 4, 5]


def test_the_loss_is_noise_to_signal() -> None:
    y, t = torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 4.0]])
    assert float(relative_error([y], [t])) == pytest.approx(9 / 25)
    assert float(relative_error([y, t], [t, t])) == pytest.approx(9 / 50)
    assert float(relative_error([torch.zeros(2)], [torch.zeros(2)])) == 0.0


# --- training --------------------------------------------------------------------------------------------------------


def small() -> Network:
    return capture(
        Apply(
            lambda s, x: s.layers[1](torch.relu(s.layers[0](x)).mean((2, 3))),
            on_grid(nn.Conv2d(2, 6, 3), 1),
            on_grid(nn.Linear(6, 3), 2),
        ),
        (torch.zeros(2, 2, 6, 6),),
    )


IMAGES = torch.randn(100, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_the_same_bytes_twice_and_no_random_numbers_drawn() -> None:
    network, recipe = small(), qbench.Recipe(methods.qat(steps=5))
    state = torch.random.get_rng_state()
    made = [dump(quantize_network(network, recipe, [(IMAGES,)])) for _ in range(2)]
    assert made[0] == made[1]
    assert torch.equal(state, torch.random.get_rng_state())
    longer = dump(quantize_network(network, qbench.Recipe(methods.qat(steps=6)), [(IMAGES,)]))
    other = dump(quantize_network(network, qbench.Recipe("ptsq"), [(IMAGES,)]))
    assert len({made[0], longer, other}) == 3


def test_ranges_move_in_the_first_half_and_rest_in_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, tuple[float, float]]] = []
    forward = FakeQuantized.forward

    def watched(module: FakeQuantized, *inputs: Tensor) -> Tensor:
        result = forward(module, *inputs)
        seen.append(dict(module._plan.ranges))
        return result

    monkeypatch.setattr(FakeQuantized, "forward", watched)
    quantize_network(small(), qbench.Recipe(methods.qat(steps=7)), [(IMAGES,)])
    assert len(seen) == 7
    assert all(one != other for one, other in itertools.pairwise(seen[:3]))
    assert all(ranges == seen[2] for ranges in seen[2:])


def test_what_is_told_of_the_training() -> None:
    said: list[str] = []
    network = small()
    trainer = Distillation(network, [[IMAGES]], 30, 0.03, said.append)
    quantize_network(network, qbench.Recipe("qat"), [(IMAGES,)], fine_tune=trainer)
    assert len(trainer.losses) == len(said) == 30
    assert said[0].startswith("fine-tuning, step 1/30, loss 0.")
    assert 0 < trainer.weight_change < 0.1
    assert trainer.losses[-1] < 0.9 * trainer.losses[0]


def test_training_that_diverges_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"(lower the learning rate|lower method\.learning_rate|not finite)") as caught:
        quantize_network(small(), qbench.Recipe(methods.qat(steps=9, learning_rate=1e38)), [(IMAGES,)])
    assert "\n" not in str(caught.value)


# --- what it is for --------------------------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 8x8 digits: 1,297 to train with, 500 to judge by."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order].unsqueeze(1) / 16
    labels = torch.from_numpy(data.target)[order]
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


@functools.cache
def uneven() -> nn.Module:
    """A trained network whose channels were rescaled across a ReLU: the same function, but w and 1/w side by side."""
    images, labels, _, _ = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(8):
            for chosen in torch.randperm(len(images)).split(64):
                loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            for before, after, channels in ((0, 2, 16), (2, 5, 32)):
                factors = 2 ** torch.empty(channels).uniform_(-SPREAD, SPREAD)
                model[before].weight.mul_(factors[:, None, None, None])
                model[before].bias.mul_(factors)
                read = model[after].weight.reshape(len(model[after].weight), channels, -1)
                read.div_(factors[:, None])
    return model.eval().requires_grad_(False)


SPREAD = 5


def test_qat_recovers_half_of_what_one_scale_for_a_weight_loses() -> None:
    images, _, held_out, labels = digits()
    model = uneven()
    network = capture(model, (images[:2],))

    def accuracy(outputs: Tensor) -> float:
        return float((outputs.argmax(1) == labels).double().mean())

    def quantized(method: object) -> float:
        recipe = qbench.Recipe(method, "per_tensor")
        trainer = method.trainer(network, [[images]], silent) if isinstance(method, methods.qat) else None
        return accuracy(quantize_network(network, recipe, [(images[:256],)], fine_tune=trainer)(held_out))

    fp32, ptsq, qat = accuracy(model(held_out)), quantized("ptsq"), quantized(methods.qat(steps=60))
    assert fp32 > 0.95
    assert fp32 - ptsq >= 0.05
    assert qat >= ptsq + (fp32 - ptsq) / 2
