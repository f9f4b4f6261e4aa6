import numpy as np
import pytest
import pywt

from harmonict.core import HarmonictError
from harmonict.radiomics.filters import filtered_images, laplacian_of_gaussian


def images(hu, mask, spacing=(1.0, 1.0, 1.0), in_plane=False, filters=("LoG", "Wavelet"), sigma=(1.5,)):
    found = filtered_images(hu, mask, spacing, filters=filters, log_sigma_mm=sigma, wavelet="coif1", in_plane=in_plane)
    return dict(found)


def test_the_log_of_a_constant_is_zero_and_of_a_parabola_is_twice_sigma_squared():
    x = np.arange(120, dtype=np.float64) * 0.7
    flat = laplacian_of_gaussian(np.full((30, 30, 40), -350.0), (2.0, 1.0, 0.7), sigma_mm=3.0)
    assert np.abs(flat).max() < 1e-3
    parabola = np.broadcast_to((x - x.mean()) ** 2, (24, 24, 120))
    found = laplacian_of_gaussian(parabola, (1.0, 1.0, 0.7), sigma_mm=2.0)
    assert found[12, 12, 60] == pytest.approx(2 * 2.0**2, rel=1e-4)


def test_the_log_equals_itks_filter():
    sitk = pytest.importorskip("SimpleITK")
    hu = np.random.default_rng(0).integers(-1000, 400, (13, 21, 30)).astype(np.int16)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((0.7, 0.8, 2.5))
    itk = sitk.LaplacianRecursiveGaussianImageFilter()
    itk.SetNormalizeAcrossScale(True)
    for sigma in (1.0, 3.0):
        itk.SetSigma(sigma)
        wanted = sitk.GetArrayFromImage(itk.Execute(image))
        found = laplacian_of_gaussian(hu, (2.5, 0.8, 0.7), sigma_mm=sigma)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_the_log_around_a_roi_equals_the_log_of_the_whole_image():
    hu = np.random.default_rng(0).normal(-500, 300, (12, 90, 100)).astype(np.float32)
    mask = np.zeros(hu.shape, bool)
    mask[4:8, 40:50, 44:60] = True
    whole = laplacian_of_gaussian(hu, (3.0, 1.0, 1.0), sigma_mm=1.5)
    part = images(hu, mask, (3.0, 1.0, 1.0), filters=("LoG",))["log-sigma-1-5-mm-3D"]
    np.testing.assert_allclose(part, whole[4:8, 40:50, 44:60], atol=1e-3 * whole.std() * 1e-2)


@pytest.mark.parametrize("in_plane", [False, True])
def test_the_wavelet_around_a_roi_equals_that_of_the_whole_periodic_image(in_plane):
    rng = np.random.default_rng(1)
    hu = rng.normal(size=(7, 40, 31))
    mask = np.zeros(hu.shape, bool)
    mask[0:3, 35:40, 0:6] = True  # at three edges, where the image wraps around
    axes = (2, 1) if in_plane else (2, 1, 0)
    padded = np.pad(hu, [(0, n % 2) for n in hu.shape], "wrap")
    wanted = pywt.swtn(padded, "coif1", level=1, axes=axes)[0]
    found = images(hu, mask, in_plane=in_plane, filters=("Wavelet",))
    assert len(found) == 2 ** len(axes)
    for name, band in wanted.items():
        key = "wavelet-" + name.replace("a", "L").replace("d", "H")
        np.testing.assert_allclose(found[key], band[0:3, 35:40, 0:6], atol=1e-12)


def test_wavelet_letters_run_from_x_to_z():
    hu = np.zeros((16, 16, 16))
    hu[:, :, ::2] = 100.0  # changes along x only
    mask = np.zeros(hu.shape, bool)
    mask[4:12, 4:12, 4:12] = True
    found = images(hu, mask, filters=("Wavelet",))
    loud = {name for name, image in found.items() if np.abs(image).max() > 1e-6}
    assert loud == {"wavelet-HLL", "wavelet-LLL"}


def test_an_image_too_thin_for_the_log_is_refused_with_the_cure():
    with pytest.raises(HarmonictError, match="leave the LoG filter out"):
        laplacian_of_gaussian(np.zeros((1, 64, 64)), (1.0, 1.0, 1.0), sigma_mm=1.0)
    with pytest.raises(HarmonictError, match="above 0 mm"):
        laplacian_of_gaussian(np.zeros((9, 9, 9)), (1.0, 1.0, 1.0), sigma_mm=0.0)
