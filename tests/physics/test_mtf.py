from dataclasses import replace

import numpy as np
import pytest

from harmonict.core import Geometry, HarmonictError
from harmonict.physics.detectability import disc_task
from harmonict.physics.kernel import Kernel
from harmonict.physics.mtf import FREQUENCIES_PER_MM, edge_mtf, mtf_2d, skin_air_mtf, wire_mtf
from phantoms_physics import blurred, disc, gaussian_mtf, patient_slice, real_pairs, series_of, sharp_mtf


def slice_of(kind, f50, pixel_mm, noise_hu=0.0, seed=0, **more):
    rng = np.random.default_rng(seed)
    return np.rint(patient_slice(lambda f: kind(f, f50), pixel_mm=pixel_mm, noise_hu=noise_hu, rng=rng, **more))


@pytest.mark.parametrize(
    ("kind", "f50", "pixel_mm", "noise_hu"),
    [
        (gaussian_mtf, 0.18, 0.98, 15),
        (gaussian_mtf, 0.25, 0.7, 15),
        (gaussian_mtf, 0.35, 0.98, 15),
        (gaussian_mtf, 0.55, 0.7, 40),
        (sharp_mtf, 0.45, 0.98, 60),
        (sharp_mtf, 0.65, 0.7, 60),
    ],
)
def test_the_skin_of_a_noisy_patient_gives_the_known_mtf(kind, f50, pixel_mm, noise_hu):
    found = skin_air_mtf(series_of([slice_of(kind, f50, pixel_mm, noise_hu)], pixel_mm))
    assert found.f50_per_mm == pytest.approx(f50, rel=0.07)
    passed = FREQUENCIES_PER_MM < f50
    assert np.abs(found.kernel.mtf - kind(FREQUENCIES_PER_MM, f50))[passed].max() < 0.1


def test_without_noise_the_whole_curve_is_right_to_two_percent_of_one():
    found = skin_air_mtf(series_of([slice_of(gaussian_mtf, 0.3, 0.8)], 0.8))
    assert found.f50_per_mm == pytest.approx(0.3, rel=0.02)
    assert np.abs(found.kernel.mtf - gaussian_mtf(FREQUENCIES_PER_MM, 0.3)).max() < 0.02


def test_air_clipped_at_minus_1024_is_restored():
    hu = slice_of(sharp_mtf, 0.55, 0.7, 60)
    whole = skin_air_mtf(series_of([hu], 0.7)).f50_per_mm
    clipped = skin_air_mtf(series_of([np.maximum(hu, -1024)], 0.7)).f50_per_mm
    assert (hu < -1024).mean() > 0.1
    assert clipped == pytest.approx(whole, rel=0.03)


def test_a_body_without_thin_skin_over_fat_is_measured_as_well():
    hu = slice_of(gaussian_mtf, 0.3, 0.8, 10, skin_hu=40.0, fat_hu=40.0)
    assert skin_air_mtf(series_of([hu], 0.8)).f50_per_mm == pytest.approx(0.3, rel=0.06)


def test_table_and_clothes_are_left_out():
    clean = slice_of(gaussian_mtf, 0.35, 0.9, 10)
    with_table = clean.copy()
    with_table[300:306, 40:340] = -200  # a table top that touches the back
    with_table[40:200, :70] = np.maximum(with_table[40:200, :70], -700)  # a pad beside one arm
    found = skin_air_mtf(series_of([with_table], 0.9))
    assert found.sectors_used < skin_air_mtf(series_of([clean], 0.9)).sectors_used
    assert found.f50_per_mm == pytest.approx(0.35, rel=0.06)


def test_a_body_cut_by_the_field_of_view_is_measured_where_there_is_skin():
    hu = slice_of(gaussian_mtf, 0.35, 0.9, 10)[:, 60:330]
    found = skin_air_mtf(series_of([hu], 0.9))
    assert found.f50_per_mm == pytest.approx(0.35, rel=0.06)


def test_padding_is_no_skin():
    hu = slice_of(gaussian_mtf, 0.35, 0.9, 10)
    padding = np.zeros(hu.shape, bool)
    padding[:, :90] = True  # cuts the body
    hu[padding] = -2048
    found = skin_air_mtf(series_of([hu], 0.9, padding=padding[None]))
    assert found.f50_per_mm == pytest.approx(0.35, rel=0.06)


def test_a_volume_gives_the_median_of_slices_spread_over_it_and_their_spread():
    slices = [slice_of(gaussian_mtf, f50, 1.1, 10, seed=n, size=300) for n, f50 in enumerate((0.28, 0.3, 0.3, 0.42))]
    found = skin_air_mtf(series_of(slices, 1.1))
    assert found.slices == (0, 1, 2, 3)
    assert found.f50_per_mm == pytest.approx(0.3, rel=0.05)
    assert found.f50_sd_per_mm > 0.03
    assert found.kernel.frequency_per_mm.shape == (64,) == found.mtf_sd.shape
    assert skin_air_mtf(series_of(slices, 1.1), max_slices=2).slices == (1, 3)


@pytest.mark.parametrize("slope", [0.0, 0.4])
def test_skin_that_slants_through_a_thick_slice_does_not_lower_the_mtf(slope):
    """Slices of 5 mm, each the mean of ten thin ones of a body that widens by `slope` mm per mm on one side."""
    kind, pixel_mm = lambda f: gaussian_mtf(f, 0.4), 0.8
    thin = np.arange(-12.25, 12.5, 0.5)
    body = [
        patient_slice(kind, size=240, pixel_mm=pixel_mm, grown_mm=slope * (z + 13)) for z in (thin if slope else [0])
    ]
    thick = [np.mean(body[10 * n : 10 * (n + 1)] if slope else body, axis=0) for n in range(5)]
    series = series_of(thick, pixel_mm)
    spaced = replace(series, geometry=Geometry(spacing_mm=(5.0, pixel_mm, pixel_mm)))
    assert skin_air_mtf(spaced).f50_per_mm == pytest.approx(0.4, rel=0.04)
    if slope:  # the same slices, taken for thin ones
        assert skin_air_mtf(series).f50_per_mm < 0.9 * 0.4


@pytest.mark.parametrize("what", ["air", "tissue", "noise", "unit", "row"])
def test_where_there_is_no_skin_it_says_so(what):
    rng = np.random.default_rng(0)
    hu = {
        "air": np.full((200, 200), -1000.0),
        "tissue": rng.normal(40, 10, (200, 200)),
        "noise": rng.normal(-500, 500, (200, 200)),
        "unit": rng.uniform(0, 1, (200, 200)),
        "row": np.where(np.arange(300) % 100 < 60, 40.0, -1000.0)[None],
    }[what]
    with pytest.raises(HarmonictError, match="no clean border between skin and air"):
        skin_air_mtf(series_of([hu], 0.9))


def test_the_real_kernel_pairs_come_in_their_order(data):
    real_series = real_pairs(data)
    f50 = {name: skin_air_mtf(real_series[name]).f50_per_mm for name in ("B10", "B30", "B50", "B70")}
    assert f50["B10"] < f50["B30"] < f50["B50"] < f50["B70"]
    assert f50 == pytest.approx({"B10": 0.259, "B30": 0.327, "B50": 0.493, "B70": 0.66}, rel=0.12)
    for name in ("00000016", "00000355"):
        soft, sharp = (skin_air_mtf(real_series[f"{k}-{name}"]).f50_per_mm for k in ("FC13", "FC51"))
        assert 0.22 < soft < 0.33 < 0.5 < sharp < 0.75


def test_a_wire_gives_the_gaussian_that_blurred_it():
    fine = disc(radius_mm=0.25, size=80, pixel_mm=0.4, inside=3000, centre_mm=(1.13, -0.77))
    image = blurred(fine, lambda f: gaussian_mtf(f, 0.4), pixel_mm=0.4, fine_factor=4)
    kernel = wire_mtf(image, pixel_mm=(0.4, 0.4), radius_mm=8)
    wire = disc_task(kernel.frequency_per_mm, diameter_mm=0.5, contrast_hu=1) / (np.pi * 0.25**2)
    expected = gaussian_mtf(kernel.frequency_per_mm, 0.4) * wire
    assert np.abs(kernel.mtf - expected).max() < 0.01


def test_a_wire_that_is_not_there_is_refused():
    with pytest.raises(HarmonictError, match="wire"):
        wire_mtf(np.zeros((64, 64)), pixel_mm=(0.5, 0.5))


def test_the_edge_of_a_disc_gives_the_gaussian_that_blurred_it():
    fine = disc(radius_mm=30, size=160, pixel_mm=0.5, inside=120, outside=0, centre_mm=(0.21, 0.37))
    image = blurred(fine, lambda f: gaussian_mtf(f, 0.5), pixel_mm=0.5, fine_factor=4)
    kernel = edge_mtf(image, pixel_mm=(0.5, 0.5), centre_mm=(40, 40), radius_mm=30)
    expected = gaussian_mtf(kernel.frequency_per_mm, 0.5)
    assert np.abs(kernel.mtf - expected).max() < 0.025
    assert kernel.f50_per_mm == pytest.approx(0.5, rel=0.025)


def test_a_slanted_edge_gives_the_gaussian_that_blurred_it():
    y, x = np.mgrid[:512, :512] * 0.125
    distance = (x - 32) * np.cos(0.1) + (y - 32) * np.sin(0.1)
    fine = np.clip(distance / 0.125 + 0.5, 0, 1) * 100
    image = blurred(fine, lambda f: gaussian_mtf(f, 0.45), pixel_mm=0.5, fine_factor=4)[20:-20, 20:-20]
    kernel = edge_mtf(image, pixel_mm=(0.5, 0.5))
    assert np.abs(kernel.mtf - gaussian_mtf(kernel.frequency_per_mm, 0.45)).max() < 0.03


def test_an_image_without_an_edge_is_refused():
    with pytest.raises(HarmonictError, match="edge"):
        edge_mtf(np.full((64, 64), 3.0), pixel_mm=(0.5, 0.5))


def test_the_plane_of_an_isotropic_kernel_is_its_curve_along_every_axis():
    kernel = Kernel("g", FREQUENCIES_PER_MM, gaussian_mtf(FREQUENCIES_PER_MM, 0.4))
    plane = mtf_2d(kernel, shape=(32, 48), pixel_mm=(1.0, 0.5))
    assert plane.shape == (32, 48) and plane[0, 0] == 1
    assert plane[4, 0] == pytest.approx(float(kernel.at(4 / 32)))
    assert plane[0, 3] == pytest.approx(float(kernel.at(3 / 24)))
    assert plane[4, 3] == pytest.approx(float(kernel.at(np.hypot(1 / 8, 1 / 8))))
