"""DCGAN on Fashion-MNIST: a generator of transposed convolutions, and the discriminator that it was trained against.

Radford, Metz and Chintala 2016. Both come from one training: the `gan` task holds both and runs the generator; the
`gan_discriminator` task takes the other one from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from qbench.frechet import frechet_distance
from qbench.metrics import accuracy
from qbench.task import Examples, Task
from tasks import fashion_mnist, gan_training
from tasks.checkpoints import kept
from tasks.gan_training import LATENT, latents

CALIBRATION_SEED, EVALUATION_SEED, FINE_TUNING_SEED = 1, 2, 3  # of latents; training draws its own
FINE_TUNING_EXAMPLES, FINE_TUNING_BATCH = 4096, 64
CALIBRATION_EXAMPLES, CALIBRATION_BATCH = 256, 32
GENERATED = 10_000
BLOCKS = 50  # of latents: the resampling units
FEATURES, PROJECTION_SEED = 64, 0
GENERATED_CLASS, REAL_CLASS = gan_training.GENERATED_CLASS, gan_training.REAL_CLASS

Network = Callable[[], nn.Module]


def task(source: Network, full_data: str | None = None, seed: int = 0, checkpoint: str | None = None) -> Task:
    """The generator; `source` gives the trained ResNet-18 whose features judge the images.

    `full_data` is a folder with all 60,000 training images, `seed` that of weights and training; `checkpoint` names
    weights that are kept in the project.
    """
    task = Task(
        name="gan",
        family="gan",
        metric=frechet_distance(),
        build=partial(build, seed),
        train=partial(fit, full_data, seed),
        calibration=calibration,
        fine_tuning=fine_tuning,
        evaluation=evaluation,
        judge=lambda: Judge(source()).eval(),
    )
    return kept(task, checkpoint)


def discriminator_task(source: Network) -> Task:
    """The discriminator; `source` gives the trained networks of the `gan` task."""
    return Task(
        name="gan_discriminator",
        family="gan",
        metric=accuracy(),
        build=lambda: copy.deepcopy(source().discriminator),
        calibration=lambda: discriminator_calibration(source().generator),
        evaluation=lambda: discriminator_evaluation(source().generator),
    )


class Gan(nn.Module):
    """Both networks. Called, it is the generator: latents [N, 64, 1, 1] to images [N, 1, 28, 28] in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = generator()
        self.discriminator = discriminator()

    def forward(self, latent: Tensor) -> Tensor:
        return self.generator(latent)


def generator() -> nn.Sequential:
    """0.40 M parameters; 1 x 1 to 7 x 7 to 14 x 14 to 28 x 28 pixels."""

    def up(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
        layer = nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, bias=False)
        return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *up(LATENT, 96, kernel=7, stride=1, padding=0),
        *up(96, 48, kernel=4, stride=2, padding=1),
        *up(48, 24, kernel=4, stride=2, padding=1),
        nn.ConvTranspose2d(24, 1, 3, padding=1),
        nn.Tanh(),
    )


def discriminator() -> nn.Sequential:
    """Images to two logits: generated, real. 0.17 M parameters."""

    def down(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]

    return nn.Sequential(*down(1, 32), *down(32, 64), *down(64, 128), nn.Flatten(), nn.Linear(128 * 3 * 3, 2))


def build(seed: int = 0) -> nn.Module:
    """The untrained networks: the generator's weights small, as the paper's, because batch norms follow them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gan()
        for module in model.generator.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
    return model


def fit(full_data: str | None, seed: int, model: nn.Module, say: Callable[[str], None]) -> None:
    """Trains both in place."""
    images, _ = fashion_mnist.training(full_data)
    gan_training.train(model.generator, model.discriminator, as_generated(images), seed, say)


def as_generated(images: Tensor) -> Tensor:
    """Normalized images as the generator makes them: black is -1, white 1."""
    return 2 * (images * fashion_mnist.STD + fashion_mnist.MEAN) - 1


def calibration() -> list[tuple[Tensor, ...]]:
    """256 latents in batches of 32."""
    return [(batch,) for batch in latents(CALIBRATION_EXAMPLES, CALIBRATION_SEED).split(CALIBRATION_BATCH)]


def fine_tuning() -> list[tuple[Tensor, ...]]:
    """4,096 other latents in batches of 64."""
    return [(batch,) for batch in latents(FINE_TUNING_EXAMPLES, FINE_TUNING_SEED).split(FINE_TUNING_BATCH)]


def evaluation() -> Examples:
    """10,000 fixed latents in 50 blocks, every slice of them in all blocks; the targets are the real test images."""
    real = as_generated(fashion_mnist.evaluation().inputs[0])
    return Examples((latents(GENERATED, EVALUATION_SEED),), real[:GENERATED], torch.arange(GENERATED) % BLOCKS)


class Judge(nn.Module):
    """Images in [-1, 1] to 64 features: a fixed random projection of what the classifier's last layer decides by."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.body = copy.deepcopy(classifier)
        name, last = [(name, m) for name, m in self.body.named_modules() if isinstance(m, nn.Linear)][-1]
        self.body.set_submodule(name, nn.Identity())
        random = torch.Generator().manual_seed(PROJECTION_SEED)
        self.register_buffer("projection", torch.randn(last.in_features, FEATURES, generator=random) / FEATURES**0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(((images + 1) / 2 - fashion_mnist.MEAN) / fashion_mnist.STD) @ self.projection


def discriminator_calibration(generator: nn.Module) -> list[tuple[Tensor, ...]]:
    """The first training images and as many generated ones, 256 together, mixed in each batch of 32."""
    half = CALIBRATION_EXAMPLES // 2
    images, _ = mixed(as_generated(fashion_mnist.training()[0][:half]), generator, CALIBRATION_SEED)
    return [(batch,) for batch in images.split(CALIBRATION_BATCH)]


def discriminator_evaluation(generator: nn.Module) -> Examples:
    """The first 5,000 test images and 5,000 generated from the first of the generator's evaluation latents."""
    real = as_generated(fashion_mnist.evaluation().inputs[0][: GENERATED // 2])
    images, labels = mixed(real, generator, EVALUATION_SEED)
    return Examples((images,), labels)


@torch.no_grad()
def mixed(real: Tensor, generator: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """Real and generated images by turns, and their classes."""
    generated = torch.cat([generator(batch) for batch in latents(len(real), seed).split(250)])
    images = torch.stack([generated, real], 1).flatten(0, 1)
    return images, torch.tensor([GENERATED_CLASS, REAL_CLASS]).repeat(len(real))
