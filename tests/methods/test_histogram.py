import numpy as np
import pytest

from harmonict.core import HarmonictError, Series
from harmonict.methods.histogram import Config, Histogram


def noise(mean, sd, seed, n=4):
    return Series(np.random.default_rng(seed).normal(mean, sd, (n, 64, 64)).astype(np.float32))


def test_a_gaussian_histogram_becomes_the_reference_gaussian():
    result = Histogram.like([noise(200, 5, 0)]).harmonize(noise(-100, 40, 1)).hu
    assert result.mean() == pytest.approx(200, abs=0.5)
    assert result.std() == pytest.approx(5, rel=0.03)


def test_the_map_is_monotone():
    source = noise(0, 30, 1)
    result = Histogram.like([noise(50, 10, 0)]).harmonize(source).hu
    order = np.argsort(source.hu.ravel())
    assert np.all(np.diff(result.ravel()[order]) >= -1e-3)


def test_images_of_the_reference_histogram_stay_as_they_are():
    source = noise(0, 30, 1)
    assert np.abs(Histogram.like([source]).harmonize(source).hu - source.hu).max() < 1e-3


def test_clipped_air_stays_one_value():
    hu = noise(0, 30, 1).hu.copy()
    hu[:, :32] = -1024
    reference = noise(10, 30, 2).hu.copy()
    reference[:, :32] = -1000
    result = Histogram.like([Series(reference)]).harmonize(Series(hu)).hu
    assert np.ptp(result[:, :32]) == 0 and result[0, 0, 0] == pytest.approx(-1000, abs=1)


def test_without_a_reference_it_says_what_to_do():
    with pytest.raises(HarmonictError, match="--like"):
        Histogram().harmonize(noise(0, 1, 0))
    with pytest.raises(ValueError, match="levels"):
        Config(levels=1)
