"""Lung and nodule biomarkers: closed forms on made chests, contours of a real one."""

import time

import numpy as np
import pytest

from harmonict.biomarkers import biomarkers, lung_density, lung_mask, nodule_mask, nodule_shape
from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series

SPACING = (3.0, 1.0, 1.0)
SHAPE = (40, 240, 300)


def grid_mm(shape=SHAPE, spacing=SPACING):
    return [np.arange(n, dtype=float) * s for n, s in zip(shape, spacing, strict=True)]


def chest(noise=0.0, lung_hu=-860.0) -> tuple[np.ndarray, np.ndarray]:
    """Body, two lungs with a vessel each, a trachea from the top that opens into both, bowel gas: HU and the lungs."""
    z, y, x = np.meshgrid(*grid_mm(), indexing="ij", sparse=True)
    hu = np.full(SHAPE, -1000.0)
    hu[np.broadcast_to(((y - 120) / 95) ** 2 + ((x - 150) / 130) ** 2 < 1, SHAPE)] = 40
    lung = np.zeros(SHAPE, bool)
    for centre in (85, 215):
        lung |= ((z - 60) / 48) ** 2 + ((y - 120) / 65) ** 2 + ((x - centre) / 42) ** 2 < 1
    hu[lung] = lung_hu
    vessel = (np.abs(x - 85) < 2) & (np.abs(y - 120) < 2)
    hu[np.broadcast_to(vessel, SHAPE) & lung] = 50
    gas = ((y - 120) ** 2 + (x - 150) ** 2 < 8**2) & (z > 60)  # trachea, 16 mm wide
    for side in (-1, 1):  # main bronchi, downwards and outwards
        middle = 150 + side * (66 - z) * 1.5
        gas = gas | (((y - 120) ** 2 + (x - middle) ** 2 < 6**2) & (z <= 66) & (z > 48))
    hu[gas & ~lung] = -990
    bowel = ((z - 6) / 7) ** 2 + ((y - 60) / 14) ** 2 + ((x - 150) / 30) ** 2 < 1
    hu[bowel & ~lung] = -1000
    hu += np.random.default_rng(0).normal(0, noise, SHAPE) if noise else 0
    return hu.astype(np.float32), lung


def series(hu, **arguments) -> Series:
    return Series(hu, Geometry(spacing_mm=SPACING), **arguments)


def dice(a, b) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("noise", [0.0, 60.0])
def test_both_lungs_are_found_without_airways_and_bowel(noise):
    hu, lung = chest(noise)
    mask = lung_mask(series(hu))
    assert dice(mask, lung) > 0.97
    assert not mask[30:, 105:135, 138:162].any(), "the trachea is no lung"
    assert not mask[:9, 40:80, 120:180].any(), "bowel gas is no lung"
    assert mask[20, 120, 85], "a vessel inside the lung is lung"


def test_the_lungs_are_the_same_with_the_slices_in_the_other_order():
    hu, _ = chest(30.0)
    down = Geometry(spacing_mm=SPACING, direction=((0.0, 0.0, -1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)))
    np.testing.assert_array_equal(lung_mask(Series(hu[::-1].copy(), down)), lung_mask(series(hu))[::-1])


def test_the_foam_in_a_hollow_table_is_no_lung():
    hu, _ = chest(30.0)
    hu[:, 222:236, 40:260] = 100
    hu[:, 225:233, 44:256] = -900
    for image in (series(hu), series(hu[18:19], is_volume=False)):
        mask = lung_mask(image)
        assert mask.any() and not mask[:, 218:].any()


def test_a_tumour_inside_is_lung_and_one_that_grows_from_the_wall_is_not():
    hu, _ = chest()
    z, y, x = np.meshgrid(*grid_mm(), indexing="ij", sparse=True)
    hu[(z - 60) ** 2 + (y - 120) ** 2 + (x - 70) ** 2 < 15**2] = 40
    hu[(z - 60) ** 2 + (y - 120) ** 2 + (x - 257) ** 2 < 25**2] = 40
    mask = lung_mask(series(hu))
    assert mask[20, 120, 70]
    assert not mask[20, 120, 245]


def test_single_images_and_one_slice_have_their_lungs_without_the_trachea():
    hu, lung = chest(30.0)
    volume = lung_mask(series(hu))
    for slices in ([18], [12, 20, 30]):
        mask = lung_mask(series(hu[slices], is_volume=False))
        assert dice(mask, lung[slices]) > 0.96
        assert dice(mask, volume[slices]) > 0.97
    assert not lung_mask(series(hu[30:31], is_volume=False))[0, 105:135, 138:162].any()


def test_an_image_without_lungs_has_an_empty_mask_and_no_density():
    water = np.full((4, 64, 64), -1000, np.float32)
    water[:, 10:50, 10:50] = 0
    assert not lung_mask(series(water)).any()
    with pytest.raises(HarmonictError, match="no lung in the mask"):
        lung_density(series(water))


def test_density_of_a_known_histogram_is_its_closed_form():
    # 1000 columns of lung of -900 and -960 HU, three to one, in a wide block so that smoothing keeps them below -500
    hu = np.full((2, 40, 50), -900, np.float32)
    hu[:, :10] = -960
    lung = np.ones(hu.shape, bool)
    result = lung_density(series(hu), lung)
    assert result.laa950_percent == pytest.approx(25)
    assert result.perc15_hu == pytest.approx(-960)
    assert result.mean_hu == pytest.approx(-915)
    assert result.volume_ml == pytest.approx(2 * 40 * 50 * 3 / 1000)
    assert result.mass_g == pytest.approx(result.volume_ml * 0.085)


def test_noise_moves_the_emphysema_figures_and_not_the_mass():
    clean, noisy = (lung_density(series(chest(n, -930)[0]), chest()[1]) for n in (0.0, 60.0))
    assert clean.laa950_percent == 0
    assert noisy.laa950_percent == pytest.approx(37, abs=2)  # the normal distribution below -20 / 60
    assert noisy.perc15_hu == pytest.approx(-930 - 1.036 * 60, abs=2)
    assert noisy.mass_g == pytest.approx(clean.mass_g, rel=0.01)


def test_vessels_count_in_the_mass_and_not_in_the_emphysema_figures():
    hu = np.full((1, 60, 60), -900, np.float32)
    hu[:, :, 40:] = 40
    result = lung_density(series(hu), np.ones(hu.shape, bool))
    assert result.perc15_hu == -900 and result.laa950_percent == 0
    assert result.mass_g == pytest.approx(result.volume_ml * (0.1 * 2 / 3 + 1.04 / 3), rel=1e-6)


def test_single_images_count_with_their_slice_thickness():
    hu = np.full((2, 30, 30), -900, np.float32)
    lung = np.ones(hu.shape, bool)
    thick = series(hu, is_volume=False, protocol=ScanProtocol(slice_thickness_mm=5))
    assert lung_density(thick, lung).volume_ml == pytest.approx(9.0)
    assert lung_density(series(hu, is_volume=False), lung).volume_ml == pytest.approx(1.8)


def ball(radius_mm, spacing=(1.0, 0.7, 0.7), hu=40.0, blur=0.0) -> tuple[Series, np.ndarray]:
    from scipy import ndimage

    half = radius_mm + 8
    axes = [np.arange(-half, half + s / 2, s) for s in spacing]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    inside = z**2 + y**2 + x**2 < radius_mm**2
    image = np.where(inside, hu, -850.0)
    if blur:
        image = ndimage.gaussian_filter(image, [blur / s for s in spacing])
    return Series(image.astype(np.float32), Geometry(spacing_mm=spacing)), inside


@pytest.mark.parametrize(("radius", "spacing"), [(6, (1.0, 0.7, 0.7)), (10, (1.0, 0.7, 0.7)), (12, (3.0, 0.8, 0.8))])
def test_a_ball_has_the_volume_surface_and_sphericity_of_a_ball(radius, spacing):
    image, inside = ball(radius, spacing)
    shape = nodule_shape(image, inside)
    assert shape.volume_mm3 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.03)
    assert shape.surface_mm2 == pytest.approx(4 * np.pi * radius**2, rel=0.05)
    assert shape.surface_to_volume_per_mm == pytest.approx(3 / radius, rel=0.06)
    assert 0.95 < shape.sphericity <= 1.001


def test_a_longer_body_is_less_of_a_ball():
    image, _ = ball(12, (1.0, 1.0, 1.0))
    z, y, x = np.indices(image.hu.shape) - np.array(image.hu.shape).reshape(3, 1, 1, 1) // 2
    rod = (np.abs(z) < 15) & (y**2 + x**2 < 5**2)
    h, r = 29, 5
    volume, surface = np.pi * r**2 * h, 2 * np.pi * r * (r + h)
    expected = (36 * np.pi * volume**2) ** (1 / 3) / surface
    assert nodule_shape(image, rod).sphericity == pytest.approx(expected, rel=0.06)


def test_kmeans_finds_the_nodule_that_is_there():
    image, inside = ball(8, blur=0.8)
    noisy = image.with_hu(image.hu + np.random.default_rng(0).normal(0, 40, image.hu.shape).astype(np.float32))
    found = nodule_mask(noisy, np.ones(image.hu.shape, bool))
    assert dice(found, inside) > 0.95
    region = np.zeros(image.hu.shape, bool)
    region[2:-2, 4:-4, 4:-4] = True
    np.testing.assert_array_equal(nodule_mask(noisy, region) & ~region, False)


def test_kmeans_takes_the_largest_part_and_fills_its_holes():
    image, inside = ball(8)
    hu = image.hu.copy()
    centre = tuple(n // 2 for n in hu.shape)
    hu[centre] = -850
    hu[1:3, 1:3, 1:3] = 40
    found = nodule_mask(image.with_hu(hu), np.ones(hu.shape, bool))
    np.testing.assert_array_equal(found, inside)


def test_what_has_no_nodule_is_refused_in_words():
    image, inside = ball(6)
    nothing = np.zeros(inside.shape, bool)
    with pytest.raises(HarmonictError, match="mask is empty"):
        nodule_mask(image, nothing)
    with pytest.raises(HarmonictError, match="mask is empty"):
        nodule_shape(image, nothing)
    with pytest.raises(HarmonictError, match="K-means needs"):
        nodule_mask(image.with_hu(np.zeros_like(image.hu)), inside)
    with pytest.raises(HarmonictError, match="bool with the shape"):
        nodule_shape(image, inside[1:])
    with pytest.raises(HarmonictError, match="needs a volume"):
        nodule_shape(Series(image.hu, image.geometry, is_volume=False), inside)


def test_one_voxel_still_has_a_shape():
    image, inside = ball(6)
    one = np.zeros_like(inside)
    one[10, 10, 10] = True
    shape = nodule_shape(image, one)
    assert shape.volume_mm3 > 0 and 0 < shape.sphericity <= 1


def test_a_row_names_every_biomarker():
    hu, _ = chest()
    z, y, x = np.meshgrid(*grid_mm(), indexing="ij", sparse=True)
    nodule = (z - 60) ** 2 + (y - 120) ** 2 + (x - 70) ** 2 < 9**2
    hu[nodule] = 30
    region = (np.abs(z - 60) < 15) & (np.abs(y - 120) < 12) & (np.abs(x - 70) < 12)
    row = biomarkers(series(hu), nodules={"n1": np.broadcast_to(region, SHAPE)})
    assert {"laa950_percent", "perc15_hu", "mass_g", "n1_volume_mm3", "n1_sphericity"} <= set(row)
    assert row["n1_volume_mm3"] == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.08)


@pytest.fixture(scope="module")
def lung1(data):
    dicom = pytest.importorskip("harmonict.dicom.masks")
    read = pytest.importorskip("harmonict.dicom.read")
    image = read.read_series(sorted((data / "ct/LUNG1-001/image").iterdir()))
    (path,) = (data / "ct/LUNG1-001/rtstruct").glob("*")
    masks = dicom.read_rtstruct(path, image)
    return image, masks["Lung-Left"] | masks["Lung-Right"], masks["GTV-1"]


def test_the_lungs_of_a_real_patient_follow_the_radiotherapists_contours(lung1):
    image, lungs, tumour = lung1
    start = time.process_time()
    mask = lung_mask(image)
    assert time.process_time() - start < 10
    assert dice(mask, lungs) >= 0.97
    assert np.count_nonzero(mask & tumour) < 0.2 * np.count_nonzero(tumour)
    ours, theirs = lung_density(image, mask), lung_density(image, lungs)
    assert ours.perc15_hu == pytest.approx(theirs.perc15_hu, abs=3)
    assert ours.volume_ml == pytest.approx(theirs.volume_ml, rel=0.02)


def test_a_sharper_kernel_shows_more_emphysema_in_the_same_lung(data):
    volumes = pytest.importorskip("harmonict.volumes")
    found = {}
    for kernel in ("B10", "B30", "B50", "B70"):
        image = volumes.read_volume(data / f"paired/siemens-chest/{kernel}.mha")
        true = Geometry(image.geometry.origin_mm, (1.0, 0.693359, 0.693359), image.geometry.direction)
        found[kernel] = lung_density(Series(image.hu, true))
    laa = [d.laa950_percent for d in found.values()]
    perc15 = [d.perc15_hu for d in found.values()]
    assert laa == pytest.approx([1.15, 1.70, 5.5, 13.2], rel=0.05)
    assert perc15 == pytest.approx([-889, -893, -910, -943], abs=2)
    volumes_ml = [d.volume_ml for d in found.values()]
    assert max(volumes_ml) < 1.01 * min(volumes_ml)
