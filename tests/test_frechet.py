"""The Frechet distance against closed forms, and the interval of its difference where that is known too."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from qbench import metrics
from qbench.frechet import Gaussian, Moments, distance, frechet_distance, psnr_db


def drawn(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_one_dimension():
    """(m - m')^2 + (s - s')^2."""
    a, b = (Gaussian(np.array([mean]), np.array([[spread**2]])) for mean, spread in ((1.0, 3.0), (-1.0, 0.5)))
    assert distance(a, b) == pytest.approx(2.0**2 + 2.5**2)
    assert distance(b, a) == pytest.approx(2.0**2 + 2.5**2)
    assert distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_covariances_with_the_same_axes():
    """|m - m'|^2 + sum of (s - s')^2 along the axes, however they are turned."""
    random = np.random.default_rng(0)
    axes, _ = np.linalg.qr(random.normal(size=(5, 5)))
    spreads, means = random.uniform(0, 2, (2, 5)), random.normal(size=(2, 5))
    spreads[0, 0] = 0.0  # a covariance without full rank
    a, b = (Gaussian(m, axes @ np.diag(s**2) @ axes.T) for m, s in zip(means, spreads, strict=True))
    want = ((means[0] - means[1]) ** 2).sum() + ((spreads[0] - spreads[1]) ** 2).sum()
    assert distance(a, b) == pytest.approx(want)


def test_two_by_two_covariances_that_do_not_commute():
    """tr (C C')^1/2 = sqrt(tr C C' + 2 sqrt(det C C')) in two dimensions."""
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.75], [-0.75, 3.0]])
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    zero = np.zeros(2)
    assert distance(Gaussian(zero, a), Gaussian(zero, b)) == pytest.approx(3.0 + 4.0 - 2 * root)


def test_moments_with_and_without_a_unit_are_numpys():
    features, groups = drawn(30, 3, 1).double().numpy() + 5, np.arange(30) % 4
    for without, kept in ((None, groups >= 0), (2, groups != 2)):
        gaussian = Moments.of(features, groups).gaussian(without)
        assert gaussian.mean == pytest.approx(features[kept].mean(axis=0))
        assert gaussian.covariance == pytest.approx(np.cov(features[kept].T))


def test_a_shifted_generator_has_the_interval_of_a_mean():
    """All features moved by v: the drop is |m + v - r|^2 - |m - r|^2 = 2 v (m - r) + v^2, linear in the mean m."""
    fp32, real, v = drawn(600, 4, 2), drawn(500, 4, 3), torch.tensor([0.5, 0.0, -0.25, 1.0])
    units = torch.arange(600) % 30
    found = frechet_distance().compare(fp32 + v, fp32, real, units)
    each = (2 * (fp32 - real.mean(0)) @ v + v @ v).double().numpy()
    blocks = np.array([each[units.numpy() == unit].mean() for unit in range(30)])
    half = stats.t.ppf(0.975, 29) * blocks.std(ddof=1) / math.sqrt(30)
    assert (found.drop, found.units, found.test) == (pytest.approx(each.mean(), rel=1e-4), 30, "jackknife over units")
    assert (found.ci_low, found.ci_high) == (
        pytest.approx(each.mean() - half, rel=1e-3),
        pytest.approx(each.mean() + half, rel=1e-3),
    )
    assert found.score - found.score_fp32 == pytest.approx(found.drop)
    assert found.significant
    assert found.p_value == pytest.approx(stats.ttest_1samp(blocks, 0).pvalue, rel=1e-2)
    better = frechet_distance().compare(fp32, fp32 + v, real, units)
    assert (better.drop, better.ci_high < 0) == (pytest.approx(-found.drop), True)  # lower is better


def test_fp32_itself():
    features = drawn(100, 4, 4)
    found = frechet_distance().compare(features, features, drawn(90, 4, 5), torch.arange(100) % 10)
    assert (found.drop, found.ci_low, found.ci_high, found.p_value, found.significant) == (0, 0, 0, 1, False)
    assert found.notes == ("few_units",)
    assert found.metrics(frechet_distance())["frechet_distance"] == found.score > 0


def test_what_cannot_be_compared_says_why():
    features = drawn(20, 3, 6)
    with pytest.raises(ValueError, match="frechet_distance needs targets: the real images to compare with"):
        frechet_distance().compare(features, features, None)
    with pytest.raises(ValueError, match="0 examples outside one unit: an interval needs several units"):
        frechet_distance().compare(features, features, features, torch.zeros(20))
    with pytest.raises(
        ValueError, match=r"features of shape \(20, 3, 1\): one vector is needed for each of 20 examples"
    ):
        frechet_distance().compare(features[:, :, None], features, features)
    with pytest.raises(ValueError, match="60 of 60 outputs are NaN or infinite"):
        frechet_distance().compare(features * math.nan, features, features)


def test_psnr_of_known_noise():
    """Noise of 0.02 on a range of 2: 10 log10(4 / 0.0004) = 40 dB."""
    images = drawn(2, 16, 7).double()
    noise = 0.02 * torch.tensor([1.0, -1.0]).repeat(16).reshape(2, 16)
    assert psnr_db(images, images + noise, 2.0) == pytest.approx(40.0, abs=1e-4)
    assert psnr_db(images, images, 2.0) is None
    assert frechet_distance(peak_to_peak=20.0).beside(images + noise, images) == {
        "psnr_db": pytest.approx(60, abs=1e-4)
    }
    assert frechet_distance().beside(images, images) == {}


def test_it_is_declared_and_lower_is_better():
    declaration = metrics.declared("frechet_distance")
    assert declaration is frechet_distance.declaration
    assert declaration.worse(now=2.0, before=1.0)
    assert metrics.declared("psnr_db").worse(now=20.0, before=30.0)
