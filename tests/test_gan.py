"""The gan tasks: their networks and examples, and (slow) that training learns to draw clothes."""

import time
from argparse import Namespace

import pytest
import torch
from torch import nn

import qbench
from qbench.capture import capture
from qbench.compose import Composer
from qbench.metrics import decisions
from qbench.quantization import quantize_network
from tasks import fashion_mnist, gan, gan_training, resnet18
from tasks.batch_norm import settle_batch_norm
from tasks.classifier import fit, seeded


def composed(task):
    (job,) = Composer(Namespace(multirun=False, overrides=[f"task={task}"], config_dir=None)).jobs()
    return job.values["task"]


def quiet(text):
    pass


@pytest.fixture(scope="module")
def networks():
    """Untrained, the batch norms settled: enough for everything but the quality."""
    model = gan.build()
    settle_batch_norm(model.generator, [gan.latents(256, 9)])
    return model.eval().requires_grad_(False)


def test_the_judge_and_the_generator_are_those_of_their_own_tasks():
    """The same configuration means the same cache folder: nothing is trained twice."""
    assert composed("gan")["source"] == composed("resnet18")
    assert composed("gan_discriminator")["source"] == composed("gan")


def test_the_generator_is_small_and_ends_in_images(networks):
    count = sum(parameter.numel() for parameter in networks.generator.parameters())
    assert 0.3e6 < count < 0.5e6
    assert sum(isinstance(module, nn.ConvTranspose2d) for module in networks.generator.modules()) == 4
    images = networks(gan.latents(3, 0))
    assert images.shape == (3, 1, 28, 28)
    assert images.abs().max() <= 1
    assert networks.discriminator(images).shape == (3, 2)


def test_the_same_seed_builds_the_same_networks():
    first, second, other = (gan.build(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_evaluation_has_fixed_latents_in_fifty_blocks():
    task = gan.task(source=None)
    examples = task.evaluation()
    assert examples.inputs[0].shape == (10_000, 64, 1, 1)
    assert examples.units.bincount().tolist() == [200] * 50
    assert examples.first(1000).units.bincount().tolist() == [20] * 50
    assert examples.targets.shape == (10_000, 1, 28, 28)
    assert (examples.targets.min(), examples.targets.max()) == (pytest.approx(-1), pytest.approx(1))
    assert torch.equal(examples.inputs[0], task.evaluation().inputs[0])
    seen = {latent.numpy().tobytes() for (batch,) in task.calibration() for latent in batch}
    assert len(seen) == 256
    assert not seen & {latent.numpy().tobytes() for latent in examples.inputs[0]}


def test_the_judge_projects_what_the_classifier_decides_by():
    classifier = seeded(resnet18.network).eval()
    judge = gan.task(source=lambda: classifier).judge()
    normalized = fashion_mnist.evaluation().inputs[0][:4]
    entering = []
    classifier.fc.register_forward_hook(lambda module, inputs, output: entering.append(inputs[0]))
    classifier(normalized)
    features = judge(gan.as_generated(normalized))
    assert features.shape == (4, 64)
    assert torch.allclose(features, entering[0] @ judge.projection, atol=1e-4)
    again = gan.task(source=lambda: classifier).judge()
    assert torch.equal(judge.projection, again.projection)


def test_the_discriminator_sees_as_many_real_images_as_generated_ones(networks):
    task = gan.discriminator_task(source=lambda: networks)
    examples = task.evaluation()
    assert len(examples) == 10_000
    assert examples.targets.bincount().tolist() == [5_000, 5_000]
    real = gan.as_generated(fashion_mnist.evaluation().inputs[0])
    assert torch.equal(examples.inputs[0][1], real[0])
    assert torch.allclose(examples.inputs[0][0], networks(gan.latents(5_000, gan.EVALUATION_SEED)[:1])[0], atol=1e-5)
    assert [batch.shape[0] for (batch,) in task.calibration()] == [32] * 8
    assert sum(parameter.numel() for parameter in task.build().parameters()) < 0.2e6
    assert task.build() is not networks.discriminator


@pytest.mark.parametrize("part", ["generator", "discriminator"])
@pytest.mark.parametrize("method", ["ptdq", "ptsq"])
def test_both_run_whole_in_int8(networks, part, method):
    task = gan.discriminator_task(source=lambda: networks) if part == "discriminator" else gan.task(source=None)
    model = networks.discriminator if part == "discriminator" else networks
    x = task.calibration()[0]
    q = quantize_network(capture(model, x), qbench.Recipe(method=method), [x])
    noise = (q(*x) - model(*x)).square().mean()
    assert noise < 0.01 * model(*x).var()
    assert q.int8_mac_fraction == 1.0
    targets = [str(node.target) for node in q.program.graph.nodes]
    if method == "ptsq":
        assert q.float_ops == []
        assert targets.count("qbench.quantize.default") == 1
        assert targets.count("qbench.dequantize.default") == (part == "generator")  # behind the table of tanh


def test_a_step_of_training_moves_both_and_repeats_itself(monkeypatch):
    monkeypatch.setattr(gan_training, "EPOCHS", 1)
    monkeypatch.setattr(gan_training, "SETTLING_LATENTS", 64)
    images = gan.as_generated(fashion_mnist.training()[0][:128])

    def trained(seed):
        model, said = gan.build(), []
        gan_training.train(model.generator, model.discriminator, images, seed, said.append)
        assert said
        return model.state_dict()

    start, first, second, other = gan.build().state_dict(), trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for part in ("generator.0.weight", "discriminator.0.weight"):
        assert not torch.equal(first[part], start[part])
        assert not torch.equal(first[part], other[part])


@pytest.mark.slow
def test_training_learns_to_draw():
    """In its time; the images are far nearer to real ones than noise, and the discriminator is often wrong."""
    model, started = gan.build(), time.monotonic()
    gan.fit(None, 0, model, quiet)
    assert time.monotonic() - started < 240  # 120 s on two free cores
    model.requires_grad_(False)
    examples = gan.discriminator_task(source=lambda: model).evaluation()
    found = decisions(model.discriminator(examples.inputs[0])) == examples.targets.numpy()
    assert 0.6 < found.mean() < 0.99
    classifier = seeded(resnet18.network)
    fit(resnet18.SCHEDULE, None, 0, classifier, quiet)
    task = gan.task(source=lambda: classifier)
    evaluation, judge = task.evaluation(), task.judge().requires_grad_(False)
    real, generated = judge(evaluation.targets), judge(model(evaluation.inputs[0]))
    noise = judge(torch.rand_like(evaluation.targets) * 2 - 1)
    compared = task.metric.compare(generated, noise, real, evaluation.units)
    assert compared.score < 0.1 * compared.score_fp32
