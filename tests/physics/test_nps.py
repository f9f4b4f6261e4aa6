import numpy as np
import pytest

from harmonict.core import HarmonictError
from harmonict.physics.nps import nps_2d, nps_radial, patient_nps, uniform_noise_sd
from phantoms_physics import gaussian_mtf, patient_slice, ramp_noise, real_pairs, series_of

PIXEL = (0.8, 0.8)


def white(sd, shape=(200, 32, 32), seed=0):
    return np.random.default_rng(seed).normal(30, sd, shape)


def test_white_noise_is_flat_at_its_variance_times_the_pixel_area():
    spectrum = nps_radial(white(10.0), pixel_mm=PIXEL, detrend=0)
    assert np.allclose(spectrum.nps_hu2_mm2, 100 * 0.64, rtol=0.08)
    assert spectrum.sd_hu == pytest.approx(10, rel=0.01) and spectrum.patches == 200


def test_the_plane_integrates_to_the_variance_exactly():
    patches = white(7.0, (5, 24, 40))
    fy, fx, nps = nps_2d(patches, pixel_mm=(0.5, 0.8), detrend=0)
    assert nps.shape == (24, 40) == (len(fy), len(fx))
    assert nps.sum() / (24 * 0.5 * 40 * 0.8) == pytest.approx(patches.var(axis=(1, 2)).mean(), rel=1e-9)


def test_a_trend_is_no_noise():
    y, x = np.mgrid[:32, :32]
    tilted = white(5.0) + 3 * x - 2 * y + 0.1 * x * y
    plain = nps_radial(white(5.0), pixel_mm=PIXEL, detrend=2)
    assert np.allclose(nps_radial(tilted, pixel_mm=PIXEL, detrend=2).nps_hu2_mm2, plain.nps_hu2_mm2, rtol=1e-6)


@pytest.mark.parametrize("window", [False, True])
def test_filtered_noise_shows_the_filter(window):
    field = ramp_noise((640, 640), lambda f: gaussian_mtf(f, 0.3), 0.8, np.random.default_rng(1)) * 20
    patches = field.reshape(20, 32, 20, 32).transpose(0, 2, 1, 3).reshape(-1, 32, 32)
    spectrum = nps_radial(patches, pixel_mm=PIXEL, detrend=0, window=window)
    f = spectrum.frequency_per_mm
    expected = f * gaussian_mtf(f, 0.3) ** 2
    axis = np.linspace(0, 0.5 / 0.8, 1000)
    norm = np.trapezoid(2 * np.pi * axis * axis * gaussian_mtf(axis, 0.3) ** 2, axis)
    inner = (f > 0.1) & (f < 0.45)
    assert np.allclose(spectrum.nps_hu2_mm2[inner], (400 * expected / norm)[inner], rtol=0.15)


def test_the_noise_of_a_patient_is_that_of_its_uniform_tissue():
    rng = np.random.default_rng(2)
    image = patient_slice(lambda f: gaussian_mtf(f, 0.4), noise_hu=25.0, rng=rng)
    series = series_of([np.rint(image)], 0.9)
    assert uniform_noise_sd(series) == pytest.approx(25, rel=0.1)
    assert patient_nps(series).sd_hu == pytest.approx(25, rel=0.1)


def test_the_spectrum_of_a_patient_has_the_shape_of_the_noise():
    rng = np.random.default_rng(3)
    slices = [patient_slice(lambda f: gaussian_mtf(f, 0.4), noise_hu=25.0, rng=rng) for _ in range(2)]
    spectrum = patient_nps(series_of(slices, 0.9))
    f = spectrum.frequency_per_mm
    expected = f * gaussian_mtf(f, 0.4) ** 2
    inner = (f > 0.12) & (f < 0.5)
    ratio = spectrum.nps_hu2_mm2[inner] / expected[inner]
    assert ratio.std() / ratio.mean() < 0.12


def test_without_tissue_it_says_so():
    for measure in (uniform_noise_sd, patient_nps):
        with pytest.raises(HarmonictError, match="no patch of soft tissue"):
            measure(series_of([np.full((128, 128), -1000.0)], 0.9))


def test_patches_of_the_wrong_shape_are_refused():
    with pytest.raises(HarmonictError, match=r"\(n, h, w\)"):
        nps_2d(np.zeros((8, 8)), pixel_mm=PIXEL)


def test_sharper_kernels_of_one_acquisition_are_noisier(data):
    pairs = real_pairs(data)
    sd = [uniform_noise_sd(pairs[k]) for k in ("B10", "B30", "B50", "B70")]
    assert sd == sorted(sd) and 8 < sd[0] < 16 and 75 < sd[3] < 120
