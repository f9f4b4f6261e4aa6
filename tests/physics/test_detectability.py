import numpy as np
import pytest

from harmonict.core import HarmonictError
from harmonict.physics.detectability import detectability, disc_task, eye_filter
from harmonict.physics.kernel import Kernel
from harmonict.physics.nps import NoiseSpectrum

F = np.linspace(0, 6, 1201)
IDEAL = Kernel("ideal", F, np.ones_like(F))
WHITE = NoiseSpectrum(F[1:], np.full(1200, 50.0), 10.0, 1)


def test_the_task_at_zero_frequency_is_area_times_contrast():
    assert disc_task(np.array([0.0]), diameter_mm=4, contrast_hu=100)[0] == pytest.approx(100 * np.pi * 4)


def test_the_task_holds_the_energy_of_the_disc():
    w = disc_task(F, diameter_mm=4, contrast_hu=100)
    assert np.trapezoid(2 * np.pi * F * w**2, F) == pytest.approx(100**2 * np.pi * 4, rel=0.03)


def test_in_white_noise_without_an_eye_d_prime_is_the_matched_filter():
    # d'^2 = contrast^2 * area / NPS for a perfect MTF; the integral stops at 6 per mm.
    found = detectability(IDEAL, WHITE, eye=False)
    assert found == pytest.approx(np.sqrt(100**2 * np.pi * 4 / 50), rel=0.015)


def test_with_a_gaussian_mtf_it_is_the_closed_integral():
    mtf = Kernel("g", F, np.exp(-((F / 0.5) ** 2)))
    w = disc_task(F, diameter_mm=4, contrast_hu=100)
    expected = np.sqrt(np.trapezoid(2 * np.pi * F * (w * mtf.mtf) ** 2 / 50, F))
    assert detectability(mtf, WHITE, eye=False) == pytest.approx(expected, rel=1e-3)


def test_without_internal_noise_the_eye_cancels():
    assert detectability(IDEAL, WHITE, alpha=0.0) == pytest.approx(detectability(IDEAL, WHITE, eye=False), rel=1e-6)


def test_twice_the_contrast_is_twice_the_index_and_internal_noise_lowers_it():
    one, two = (detectability(IDEAL, WHITE, contrast_hu=c) for c in (100, 200))
    assert two == pytest.approx(2 * one)
    assert detectability(IDEAL, WHITE, alpha=1e-3) < one


def test_the_eye_sees_four_cycles_per_degree_best():
    per_mm = np.linspace(0.01, 3, 2000)
    degrees = per_mm * 500 * np.pi / 180
    assert degrees[np.argmax(eye_filter(per_mm))] == pytest.approx(4, abs=0.05)
    assert eye_filter(np.array([4 / (500 * np.pi / 180)]))[0] == pytest.approx(1)


@pytest.mark.parametrize("bad", [{"diameter_mm": 0}, {"contrast_hu": -1}, {"viewing_mm": 0}])
def test_what_must_be_above_zero_is_checked(bad):
    with pytest.raises(HarmonictError, match="above 0"):
        detectability(IDEAL, WHITE, **bad)
