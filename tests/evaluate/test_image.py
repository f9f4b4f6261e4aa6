"""Image quality tables: the body, the columns, the figures of the real pair."""

import numpy as np
import pytest

from harmonict import metrics
from harmonict.core import Geometry, HarmonictError, Series
from harmonict.evaluate.image import body_mask, compare, radial_power_spectrum, spectrum_error_db


def chest(shape: tuple[int, int, int] = (2, 96, 96)) -> np.ndarray:
    """A disc of water with two air-filled lungs, a table below it and air around."""
    _, y, x = np.indices(shape)
    hu = np.full(shape, -1000.0)
    hu[np.hypot(y - 44, x - 48) < 36] = 40
    for centre in (32, 64):
        hu[np.hypot((y - 44) / 1.6, x - centre) < 11] = -850
    hu[:, 90:93, 5:90] = 100
    return hu.astype(np.float32)


def noisy(hu: np.ndarray, sd: float, seed: int = 0) -> np.ndarray:
    return (hu + np.random.default_rng(seed).normal(0, sd, hu.shape)).astype(np.float32)


def test_the_body_holds_the_lungs_and_not_the_table():
    hu = chest()
    _, y, x = np.indices(hu.shape)
    radius = np.hypot(y - 44, x - 48)
    body = body_mask(hu)
    assert body[radius < 34].all()
    assert not body[radius > 38].any()


def test_the_body_of_a_slice_of_air_is_empty():
    assert not body_mask(np.full((2, 32, 32), -1000, np.float32)).any()


def test_the_body_is_not_eaten_at_the_edge_of_the_image():
    assert body_mask(np.zeros((1, 32, 32), np.float32)).all()


def test_single_images_each_keep_their_own_body():
    one = chest((1, 96, 96))
    small = np.full_like(one, -1000)
    small[0, 2:14, 82:94] = 0  # does not touch the other slice's body, so a volume would drop it
    body = body_mask(np.concatenate([one, small]), is_volume=False)
    assert body[1].any()
    assert not body_mask(np.concatenate([one, small]), is_volume=True)[1].any()


def test_an_image_compared_with_itself_has_no_error():
    table = compare(chest(), chest())
    assert list(table["slice"]) == ["0", "0", "1", "1", "mean", "mean", "sd", "sd"]
    exact = table[table["slice"] != "sd"]
    assert (exact["psnr_db"] == np.inf).all()
    assert np.allclose(exact["ssim"], 1) and np.allclose(exact["ncc"], 1)
    assert (exact[["nrmse", "mae_hu", "bias_hu"]] == 0).all(axis=None)
    assert (exact.loc[exact["region"] == "whole", "spectrum_error_db"] == 0).all()


def test_the_table_holds_the_metrics_of_the_clipped_images_and_says_the_range():
    ref, img = chest(), noisy(chest(), 60)
    table = compare(ref, img, hu_range=(-1000, 200)).set_index(["slice", "region"])
    r, i = np.clip(ref, -1000, 200), np.clip(img, -1000, 200)
    body = body_mask(ref)
    assert table.loc[("1", "whole"), "psnr_db"] == pytest.approx(metrics.psnr(r[1], i[1], data_range=1200))
    assert table.loc[("1", "body"), "psnr_db"] == pytest.approx(metrics.psnr(r[1], i[1], data_range=1200, mask=body[1]))
    assert table.loc[("0", "body"), "ssim"] == pytest.approx(
        metrics.ssim(r[0], i[0], data_range=1200, mask=body[0]), rel=1e-6
    )
    assert table.loc[("0", "whole"), "bias_hu"] > 5  # clipped air keeps only the positive half of the noise
    slices = table.loc[["0", "1"]].xs("whole", level="region")["psnr_db"]
    assert table.loc[("mean", "whole"), "psnr_db"] == pytest.approx(slices.mean())
    assert table.loc[("sd", "whole"), "psnr_db"] == pytest.approx(slices.std(ddof=1))
    assert set(table["hu_min"]) == {-1000.0} and set(table["hu_max"]) == {200.0}


def test_a_slice_without_body_takes_no_part_in_the_mean():
    ref = chest()
    ref[1] = -1000
    table = compare(ref, noisy(ref, 10)).set_index(["slice", "region"])
    assert table.loc[("1", "body"), "pixels"] == 0
    assert table.loc[("mean", "body"), "mae_hu"] == pytest.approx(table.loc[("0", "body"), "mae_hu"])


def test_white_noise_has_its_variance_at_every_frequency():
    noise = np.random.default_rng(3).normal(0, 12, (256, 200))
    frequency, power = radial_power_spectrum(noise, pixel_mm=(0.7, 0.8))
    assert frequency[-1] <= 0.5 / 0.8 + 1e-9 and frequency[0] > 0
    assert power[10:].mean() == pytest.approx(144, rel=0.03)
    assert power[5:40].mean() == pytest.approx(power[-40:].mean(), rel=0.1)


@pytest.mark.parametrize("shape", [(32, 40), (33, 41)])
def test_the_radial_spectrum_is_the_ring_mean_of_the_whole_transform(shape):
    image = np.random.default_rng(6).normal(0, 10, shape).cumsum(1)
    pixel_mm = (0.8, 0.7)
    window = np.outer(*(np.hanning(n + 1)[:n] for n in shape))
    power = np.abs(np.fft.fft2(window * (image - image.mean()))) ** 2 / np.sum(window**2)
    fy, fx = (np.fft.fftfreq(n, d) for n, d in zip(shape, pixel_mm, strict=True))
    frequency, radial = radial_power_spectrum(image, pixel_mm=pixel_mm)
    ring = np.rint(np.hypot(fy[:, None], fx) / frequency[0])
    np.testing.assert_allclose(radial, [power[ring == n].mean() for n in range(1, len(frequency) + 1)])


def test_doubled_noise_is_a_spectrum_error_of_six_decibels():
    noise = np.random.default_rng(4).normal(0, 100, (128, 128))
    assert spectrum_error_db(noise, 2 * noise) == pytest.approx(20 * np.log10(2), abs=1e-3)


def test_blur_is_a_spectrum_error_that_grows():
    from scipy import ndimage

    noise = np.random.default_rng(5).normal(0, 100, (128, 128))
    errors = [spectrum_error_db(noise, ndimage.gaussian_filter(noise, s)) for s in (0.5, 1, 2)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_grids_that_differ_are_refused_in_words():
    ref = Series(chest(), Geometry(spacing_mm=(1, 0.7, 0.7)), name="a")
    with pytest.raises(HarmonictError, match="b does not lie where its reference a lies"):
        compare(ref, Series(chest(), Geometry(spacing_mm=(1, 0.8, 0.8)), name="b"))
    with pytest.raises(HarmonictError, match="voxels"):
        compare(ref, Series(chest()[:1], Geometry(spacing_mm=(1, 0.7, 0.7)), name="b"))
    with pytest.raises(HarmonictError, match="not one of each"):
        compare(ref, chest())
    with pytest.raises(HarmonictError, match="one shape"):
        compare(chest(), chest()[:1])
    with pytest.raises(HarmonictError, match="lower first"):
        compare(chest(), chest(), hu_range=(0, 0))


@pytest.mark.parametrize(
    ("source", "target", "whole", "body"),
    [("B10", "B70", 25.64, 24.33), ("B30", "B50", 34.08, 33.02), ("B50", "B30", 34.08, 33.02)],
)
def test_the_real_kernel_pair_has_the_published_baseline(data, source, target, whole, body):
    volumes = pytest.importorskip("harmonict.volumes")
    ref, img = (volumes.read_volume(data / f"paired/siemens-chest/{k}.mha").hu for k in (target, source))
    table = compare(ref, img).set_index(["slice", "region"])
    assert table.loc[("mean", "whole"), "psnr_db"] == pytest.approx(whole, abs=0.01)
    assert table.loc[("mean", "body"), "psnr_db"] == pytest.approx(body, abs=0.02)
