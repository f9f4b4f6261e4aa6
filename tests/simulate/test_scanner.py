"""The scanner: projection against closed forms, noise against Poisson, doses, slice profile, bad input."""

import numpy as np
import pytest

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.simulate.materials import mu_water_per_mm
from harmonict.simulate.scanner import (
    Scanner,
    dose_mgy,
    expose,
    line_integrals,
    mgy_per_mas,
    noise_rng,
    polar_grid,
    quanta_per_sample,
    scan,
    slice_profile,
)

CHEST = ScanProtocol(kernel="Br40", kvp=120, ctdivol_mgy=6.5, slice_thickness_mm=1.0, fov_mm=500.0)
SMALL = Scanner(views=180, detectors=640, pitch_mm=0.8, electronic_quanta=0.0)


def disc_hu(matrix, fov_mm, radius_mm, hu=0.0, outside=-1000.0):
    x = (np.arange(matrix) - (matrix - 1) / 2) * fov_mm / matrix
    cover = np.clip((radius_mm - np.hypot(x[:, None], x)) * matrix / fov_mm + 0.5, 0, 1)
    return (outside + (hu - outside) * cover).astype(np.float32)


def test_the_line_integral_of_a_disc_is_its_chord():
    views = line_integrals(disc_hu(512, 500, 100), pixel_mm=500 / 512, kvp=120, scanner=SMALL)
    t = (np.arange(640) - 320) * 0.8
    chord = 2 * np.sqrt(np.maximum(100**2 - t**2, 0)) * mu_water_per_mm(120)
    inside = np.abs(t) < 95
    assert np.abs(views - chord)[:, inside].max() < 0.005 * chord.max()  # the raster's own error, 1 mm pixels
    assert np.abs(views[:, np.abs(t) > 105]).max() < 0.002 * chord.max()


def test_an_object_off_the_centre_projects_along_x_in_view_0_and_along_y_in_the_middle_view():
    hu = np.full((256, 256), -1000, np.float32)
    hu[40, 200] = 5000  # y = -171 mm, x = +142 mm
    views = line_integrals(hu, pixel_mm=500 / 256, kvp=120, scanner=SMALL, area_averaged=False)
    t = (np.arange(640) - 320) * 0.8
    assert abs(t[views[0].argmax()] - (200 - 127.5) * 500 / 256) < 0.8
    assert abs(t[views[90].argmax()] - (40 - 127.5) * 500 / 256) < 0.8


def test_projection_and_back_projection_are_adjoint():
    rng = np.random.default_rng(0)
    for shape, centre in (((64, 96), (0.0, 0.0)), ((65, 64), (3.0, -7.0))):
        grid = polar_grid(SMALL, shape, 2.0, centre)
        gain = SMALL.blur_mtf(grid.frequency_per_mm).astype(np.float32)
        image = rng.standard_normal(shape).astype(np.float32)
        views = rng.standard_normal((SMALL.views, SMALL.detectors)).astype(np.float32)
        left = np.vdot(grid.project(image, gain).astype(float), views)
        right = np.vdot(image.astype(float), grid.back_project(views, gain))
        scale = np.linalg.norm(grid.project(image, gain)) * np.linalg.norm(views)
        assert abs(left - right) < 1e-5 * scale


def test_projection_is_linear():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 64, 64)).astype(np.float32)
    grid = polar_grid(SMALL, (64, 64), 2.0)
    both = grid.project(2 * a - 3 * b)
    assert np.allclose(both, 2 * grid.project(a) - 3 * grid.project(b), atol=1e-3 * np.abs(both).max())


def test_the_blur_is_the_product_of_two_boxes():
    scanner = Scanner(aperture_mm=0.6, focal_spot_mm=0.4)
    assert scanner.blur_mtf(0.0) == 1.0
    assert scanner.blur_mtf(1.0) == pytest.approx(
        np.sin(0.6 * np.pi) / (0.6 * np.pi) * np.sin(0.4 * np.pi) / (0.4 * np.pi)
    )
    assert scanner.blur_mtf(1 / 0.6) == pytest.approx(0, abs=1e-12)


def test_counts_are_poisson_and_halve_with_the_dose():
    flat = np.full((SMALL.views, SMALL.detectors), 3.0, np.float32)
    raw = expose(flat, protocol=CHEST, scanner=SMALL, rng=np.random.default_rng(0))
    counts = quanta_per_sample(SMALL, CHEST)[320] * np.exp(-raw.line_integrals[:, 310:330].astype(float))
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)
    half = quanta_per_sample(SMALL, CHEST.with_(ctdivol_mgy=3.25))
    assert np.allclose(2 * half, quanta_per_sample(SMALL, CHEST))
    thick = quanta_per_sample(SMALL, CHEST.with_(slice_thickness_mm=3.0))
    assert np.allclose(thick, 3 * quanta_per_sample(SMALL, CHEST), rtol=1e-6)


def test_electronic_noise_adds_its_variance():
    flat = np.full((SMALL.views, SMALL.detectors), 5.0, np.float32)
    scanner = Scanner(views=180, detectors=640, pitch_mm=0.8, electronic_quanta=50.0)
    raw = expose(flat, protocol=CHEST, scanner=scanner, rng=np.random.default_rng(0))
    counts = quanta_per_sample(scanner, CHEST)[320] * np.exp(-raw.line_integrals[:, 310:330].astype(float))
    assert counts.var() == pytest.approx(counts.mean() + 50.0**2, rel=0.1)
    assert raw.variance()[:, 320].mean() == pytest.approx(raw.line_integrals[:, 310:330].var(), rel=0.1)


def test_starved_rays_stay_finite():
    flat = np.full((SMALL.views, SMALL.detectors), 14.0, np.float32)
    scanner = Scanner(views=180, detectors=640, pitch_mm=0.8, electronic_quanta=20.0)
    raw = expose(flat, protocol=CHEST.with_(ctdivol_mgy=0.5), scanner=scanner, rng=np.random.default_rng(0))
    assert np.isfinite(raw.line_integrals).all()
    assert raw.line_integrals.max() <= np.log(raw.quanta.max()) + 1e-4


def test_the_bow_tie_takes_from_the_rim_and_its_strength_0_is_none():
    quanta = quanta_per_sample(SMALL, CHEST)
    assert quanta[320] == quanta.max()
    assert quanta[0] < 0.2 * quanta[320]
    open_beam = quanta_per_sample(Scanner(views=180, detectors=640, pitch_mm=0.8, bow_tie=0.0), CHEST)
    assert np.ptp(open_beam) == 0


def test_20_and_100_mas_are_1_3_and_6_5_mgy():
    assert dose_mgy(ScanProtocol(kvp=120, exposure_mas=20)) == pytest.approx(1.3)
    assert dose_mgy(ScanProtocol(kvp=120, exposure_mas=100)) == pytest.approx(6.5)
    assert dose_mgy(ScanProtocol(kvp=120, exposure_mas=100, ctdivol_mgy=7.0)) == 7.0
    assert mgy_per_mas(80) < mgy_per_mas(120) < mgy_per_mas(140)


def test_noise_depends_on_seed_slice_and_dose_and_on_nothing_else():
    def draw(seed=1, index=5, protocol=CHEST):
        return noise_rng(seed, index, protocol).standard_normal(4)

    assert np.array_equal(draw(), draw())
    # the kernel shares the raw data
    assert np.array_equal(draw(), draw(protocol=CHEST.with_(kernel="Bl64", iterative_strength=3.0, fov_mm=350.0)))
    others = [
        draw(seed=2),
        draw(index=6),
        draw(protocol=CHEST.with_(ctdivol_mgy=1.3)),
        draw(protocol=CHEST.with_(kvp=80)),
    ]
    others.append(draw(protocol=CHEST.with_(slice_thickness_mm=3.0)))
    assert not any(np.allclose(draw(), o) for o in others)


def test_the_slice_profile_has_the_width_of_the_slice():
    for thickness in (0.5, 1.0, 1.5, 3.0, 5.0):
        offsets, weights = slice_profile(0.1, thickness, Scanner())
        assert weights.sum() == pytest.approx(1)
        assert np.allclose(weights, weights[::-1])
        assert (weights @ offsets**2) == pytest.approx((thickness**2 + min(0.5, thickness) ** 2) / 12, abs=0.002)
        half = weights > weights.max() / 2
        assert np.ptp(offsets[half]) + 0.1 == pytest.approx(thickness, abs=0.11)


def test_noise_free_data_are_the_line_integrals():
    hu = disc_hu(128, 500, 100)
    raw = scan(hu, pixel_mm=500 / 128, protocol=CHEST, scanner=SMALL, rng=None)
    assert np.array_equal(raw.line_integrals, line_integrals(hu, pixel_mm=500 / 128, kvp=120, scanner=SMALL))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ctdivol_mgy": 0.0}, "above 0"),
        ({"ctdivol_mgy": -1.0}, "above 0"),
        ({"ctdivol_mgy": None}, "dose is needed"),
        ({"ctdivol_mgy": None, "exposure_mas": -20.0}, "above 0"),
        ({"slice_thickness_mm": 0.0}, "slice_thickness_mm"),
        ({"kvp": 90.0}, "got 90"),
        ({"kvp": None}, "kvp"),
    ],
)
def test_a_protocol_that_cannot_be_scanned_is_refused(changes, words):
    with pytest.raises(HarmonictError, match=words):
        scan(disc_hu(64, 500, 100), pixel_mm=500 / 64, protocol=CHEST.with_(**changes), scanner=SMALL, rng=None)


def test_an_object_outside_the_field_of_view_is_refused_with_its_size():
    with pytest.raises(HarmonictError, match="field of view of 500 mm"):
        line_integrals(disc_hu(256, 600, 280), pixel_mm=600 / 256, kvp=120, scanner=SMALL)


def test_a_slice_thinner_than_the_sampling_is_refused():
    with pytest.raises(HarmonictError, match="thinner than the phantom's sampling"):
        slice_profile(1.0, 0.5, Scanner())
    with pytest.raises(HarmonictError, match="above 0"):
        slice_profile(1.0, 0.0, Scanner())


def test_a_scanner_whose_detector_does_not_cover_its_field_is_refused():
    with pytest.raises(HarmonictError, match="do not cover"):
        Scanner(detectors=512)
    with pytest.raises(HarmonictError, match="views must be above 0"):
        Scanner(views=0)
