"""Digital patients and QA phantoms: the truth that they claim is the truth that they show."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.simulate import materials
from harmonict.simulate.disease import EmphysemaSpec, NoduleSpec
from harmonict.simulate.phantom import (
    disc_phantom,
    edge_phantom,
    make_patient,
    object_from_series,
    truth_series,
    water_cylinder,
    wire_phantom,
)

SMALL = {"shape": (256, 256), "fov_mm": 500.0}


def middle(patient, share=0.5):
    return round(share * patient.lung_height_mm, 1)


def lung_slab(patient, shares=(0.25, 0.45, 0.65, 0.85)):
    """HU and masks of single slices at these shares of the lung's height."""
    found = [patient.slab([middle(patient, s)], **SMALL) for s in shares]
    masks = {n: np.concatenate([o.masks[n] for o in found]) for n in found[0].masks}
    return np.concatenate([o.hu120 for o in found]), masks


@pytest.fixture(scope="module")
def healthy():
    return make_patient(11)


def test_the_same_seed_gives_the_same_bytes(healthy):
    z = [middle(healthy)]
    again = make_patient(11)
    assert again == healthy
    from harmonict.simulate import phantom

    first = healthy.slab(z, **SMALL)
    phantom._anatomy.cache_clear()
    second = again.slab(z, **SMALL)
    assert first.hu120.tobytes() == second.hu120.tobytes()
    assert first.spectral.tobytes() == second.spectral.tobytes()
    assert all(np.array_equal(first.masks[n], second.masks[n]) for n in first.masks)


def test_different_seeds_give_different_patients(healthy):
    other = make_patient(12)
    assert other.half_width_mm != healthy.half_width_mm
    a, b = healthy.slab([100.0], **SMALL), other.slab([100.0], **SMALL)
    assert np.abs(a.hu120 - b.hu120).mean() > 20


def test_a_slice_does_not_depend_on_what_else_is_asked_for(healthy):
    z = middle(healthy)
    stack = healthy.slab([z, z + 0.5, z + 1.0], 0.5, **SMALL)
    assert np.array_equal(stack.hu120[1], healthy.slab([z + 0.5], **SMALL).hu120[0])


def test_disease_changes_the_lung_and_nothing_else(healthy):
    z = middle(healthy, 0.7)
    ill = make_patient(11, emphysema=EmphysemaSpec(0.3), nodules=[NoduleSpec(10.0)])
    a, b = healthy.slab([z], **SMALL), ill.slab([z], **SMALL)
    changed = a.hu120 != b.hu120
    assert changed[a.masks["lung"]].mean() > 0.2
    border = binary_dilation(a.masks["lung"], iterations=3)  # partial pixels, and bronchi cut out of the mask
    assert not changed[~border].any()


def test_the_masks_of_the_lungs_are_the_lung(healthy):
    hu, masks = lung_slab(healthy)
    assert np.array_equal(masks["lung"], masks["lung_left"] | masks["lung_right"])
    assert not (masks["lung_left"] & masks["lung_right"]).any()
    assert 0.6 < masks["lung_left"].sum() / masks["lung_right"].sum() < 1.2
    assert -905 < np.median(hu[masks["lung"]]) < -820
    assert not masks["emphysema"].any()


def test_tissues_are_where_they_belong(healthy):
    z = middle(healthy, 0.55)
    o = healthy.slab([z], shape=(512, 512), fov_mm=450.0)
    hu, x = o.hu120[0], (np.arange(512) - 255.5) * 450 / 512
    assert np.all(hu[:20] == -1000)
    assert (hu > 300).sum() > 500, "no bone"
    assert ((hu > -130) & (hu < -70)).sum() > 8000, "no fat"
    assert ((hu > 20) & (hu < 80)).sum() > 15000, "no soft tissue"
    left, right = x[o.masks["lung_left"][0].any(0)], x[o.masks["lung_right"][0].any(0)]
    assert left.mean() > 30 and right.mean() < -30


def test_a_smooth_nodule_has_the_volume_of_its_ball(healthy):
    z = middle(healthy, 0.75)
    spec = NoduleSpec(12.0, position_mm=(-62.3, 4.1, z + 0.2))
    patient = make_patient(11, nodules=[spec])
    assert patient.placed_nodules() == [((-62.3, 4.1, z + 0.2), spec)]
    o = patient.slab(np.arange(z - 8.0, z + 8.01, 0.5), 0.5, shape=(384, 384), fov_mm=230.0, allow_crop=True)
    mask = o.masks["nodule_1"]
    voxel = 0.5 * (230.0 / 384) ** 2
    assert mask.sum() * voxel == pytest.approx(np.pi / 6 * 12.0**3, rel=0.02)
    inside = o.hu120[mask]
    assert 20 < np.median(inside) < 70


def test_ground_glass_is_lighter_than_part_solid_and_solid():
    mean = {}
    for density in ("ground-glass", "part-solid", "solid"):
        patient = make_patient(11, nodules=[NoduleSpec(16.0, density, position_mm=(-108.0, 10.0, 150.0))])
        o = patient.slab([150.0], shape=(384, 384), fov_mm=260.0, allow_crop=True)
        mean[density] = o.hu120[o.masks["nodule_1"]].mean()
    assert -700 < mean["ground-glass"] < -500 < mean["part-solid"] < -250 < 0 < mean["solid"]


def test_spicules_make_a_nodule_reach_further():
    reach = []
    for rough in (0.0, 1.0):
        patient = make_patient(11, nodules=[NoduleSpec(16.0, spiculation=rough, position_mm=(-62.0, 4.0, 170.0))])
        o = patient.slab([168.0, 169.0, 170.0], 1.0, shape=(512, 512), fov_mm=230.0, allow_crop=True)
        _, rows, columns = np.nonzero(o.masks["nodule_1"])
        x, y = (columns - 255.5) * 230 / 512, (rows - 255.5) * 230 / 512
        reach.append(np.hypot(x + 62, y - 4).max())
    assert reach[0] == pytest.approx(8, abs=0.4)
    assert reach[1] > 10


def test_laa_950_of_the_truth_rises_with_severity():
    laa, holes = [], []
    for share in (0.0, 0.05, 0.15, 0.30):
        patient = make_patient(11, emphysema=EmphysemaSpec(share, "diffuse") if share else None)
        hu, masks = lung_slab(patient)
        laa.append((hu[masks["lung"]] < -950).mean())
        holes.append(masks["emphysema"].sum() / masks["lung"].sum())
    assert np.all(np.diff(laa) > 0.02)
    assert laa[0] < 0.02
    assert holes == pytest.approx([0.0, 0.05, 0.15, 0.30], abs=0.04)
    assert laa[1:] == pytest.approx([0.05, 0.15, 0.30], rel=0.35)


def test_more_emphysema_keeps_the_holes_that_were_there():
    z = 150.0
    mild = make_patient(11, emphysema=EmphysemaSpec(0.1)).slab([z], **SMALL).masks["emphysema"]
    severe = make_patient(11, emphysema=EmphysemaSpec(0.3)).slab([z], **SMALL).masks["emphysema"]
    assert mild.sum() > 50 and not (mild & ~severe).any()


def test_upper_lobe_emphysema_sits_above():
    patient = make_patient(11, emphysema=EmphysemaSpec(0.2, "upper"))
    low = patient.slab([middle(patient, 0.2)], **SMALL).masks
    high = patient.slab([middle(patient, 0.85)], **SMALL).masks
    share = [m["emphysema"].sum() / m["lung"].sum() for m in (low, high)]
    assert share[1] > 1.5 * share[0]


def test_bone_and_iodine_brighten_at_low_kvp_and_fat_darkens():
    patient = make_patient(11, iodine_mg_ml=8.0)
    o = patient.slab([middle(patient, 0.45)], shape=(512, 512), fov_mm=450.0)
    at = {k: o.hu(k) for k in materials.KVP}
    bone, fat = o.hu120 > 500, (o.hu120 > -112) & (o.hu120 < -98)
    blood = (o.spectral[1] > 7.9) & (o.spectral[1] < 8.1)
    assert min(bone.sum(), fat.sum(), blood.sum()) > 200
    assert at[80][bone].mean() > 1.2 * at[120][bone].mean() > 1.2 * at[140][bone].mean()
    assert at[80][blood].mean() > at[120][blood].mean() + 100
    assert at[80][fat].mean() < at[120][fat].mean() - 10
    assert np.allclose(at[120], o.hu120)
    air = o.hu120 == -1000
    assert all(np.allclose(at[k][air], -1000) for k in at)


def test_the_attenuation_map_is_that_of_the_hu(healthy):
    o = water_cylinder().slab([0.0], **SMALL)
    assert o.mu_per_mm(120)[0, 128, 128] == pytest.approx(materials.mu_water_per_mm(120))
    assert o.mu_per_mm(70)[0, 0, 0] == 0
    assert 0.0175 < materials.mu_water_per_mm(120) < 0.0205


def test_the_skin_moves_by_less_than_a_pixel_when_the_body_does(healthy):
    """The mass of the wall beside the lungs follows the fat's thickness smoothly: no staircase."""
    z = [middle(healthy, 0.5)]
    lung = healthy.slab(z, **SMALL).masks["lung"][0].any(0)
    beside = np.nonzero(lung)[0].max() + 4
    mass = []
    for extra in (0.0, 0.05, 0.10, 0.15, 0.20):
        o = replace(healthy, fat_mm=healthy.fat_mm + extra).slab(z, **SMALL)
        mass.append((o.hu120[0, :, beside:].astype(float) + 1000).sum())
    steps = np.diff(mass)
    assert np.all(steps > 0)
    assert steps.max() < 1.6 * steps.min()


def test_a_borders_place_is_known_to_a_fraction_of_a_pixel():
    for radius in (70.0, 70.13, 70.41, 70.77):
        o = water_cylinder(2 * radius).slab([0.0], **SMALL)
        area = ((o.hu120[0].astype(float) + 1000) / 1000).sum() * (500 / 256) ** 2
        assert np.sqrt(area / np.pi) == pytest.approx(radius, abs=0.01)


def test_mass_stays_when_the_grid_changes(healthy):
    z = [middle(healthy, 0.6)]
    total = []
    for n in (256, 512, 1024):
        o = healthy.slab(z, shape=(n, n), fov_mm=480.0)
        total.append((o.hu120.astype(float) + 1000).sum() * (480.0 / n) ** 2)
    assert total[0] == pytest.approx(total[2], rel=0.004)
    assert total[1] == pytest.approx(total[2], rel=0.002)


def test_vessels_keep_their_volume_when_they_are_thinner_than_a_pixel():
    from harmonict.simulate import shapes

    for radius in (0.2, 0.5, 1.1, 3.0):
        segment = np.array([[-0.3, 0.2, -9.0, radius, 0.4, 0.1, 9.0, radius]])
        for pixel in (0.5, 1.0):
            x = np.arange(-12.0, 12.01, pixel)
            cover = np.zeros((len(x), len(x)), np.float32)
            shapes.cover_capsules(cover, x, x, 0.0, segment, pixel)
            # a thin one meets few pixels: the area is right on average over where it falls
            shifts = []
            for dx in np.linspace(0, pixel, 5)[:-1]:
                for dy in np.linspace(0, pixel, 5)[:-1]:
                    cover[:] = 0
                    moved = segment + np.array([dx, dy, 0, 0, dx, dy, 0, 0])
                    shapes.cover_capsules(cover, x, x, 0.0, moved, pixel)
                    shifts.append(cover.sum() * pixel**2)
            assert np.mean(shifts) == pytest.approx(np.pi * radius**2, rel=0.03)


def test_lungman_has_vessels_in_air_and_three_tumours():
    patient = make_patient(3, kind="lungman")
    hu, masks = lung_slab(patient)
    lung = hu[masks["lung"]]
    assert np.median(lung) == -1000
    assert (lung < -990).mean() > 0.7
    assert (lung > -200).mean() > 0.01
    assert [spec.diameter_mm for _, spec in patient.placed_nodules()] == [8.0, 10.0, 12.0]
    z = round(patient.placed_nodules()[0][0][2], 1)
    o = patient.slab([z], shape=(512, 512), fov_mm=450.0)
    assert o.masks["nodule_1"].any()
    assert np.median(o.hu120[o.masks["nodule_1"]]) == pytest.approx(materials.tissue_hu("urethane_tumour", 120), abs=15)


def test_the_truth_series_averages_over_the_slice(healthy):
    z = middle(healthy, 0.5)
    series = truth_series(healthy, [z], 2.0, shape=(128, 128), fov_mm=500.0)
    thin = healthy.slab(z + np.array([-0.75, -0.25, 0.25, 0.75]), 0.5, shape=(128, 128), fov_mm=500.0)
    assert np.allclose(series.hu, thin.hu120.mean(0), atol=0.01)
    assert series.protocol.slice_thickness_mm == 2.0
    assert series.geometry.spacing_mm == (2.0, 500 / 128, 500 / 128)
    assert series.geometry.origin_mm[2] == z


def test_qa_phantoms_show_what_they_were_told():
    disc = disc_phantom(inserts=("air", "acrylic", 100.0)).slab([0.0, 1.0], 1.0, shape=(512, 512), fov_mm=256.0)
    centre = (np.arange(512) - 255.5) * 0.5
    ring = 200 / 4 + 25 / 4
    for n, hu in enumerate((-1000, materials.tissue_hu("acrylic", 120), 100.0)):
        angle = 2 * np.pi * n / 3
        row = np.argmin(np.abs(centre - ring * np.sin(angle)))
        column = np.argmin(np.abs(centre - ring * np.cos(angle)))
        assert disc.hu120[1, row, column] == pytest.approx(hu, abs=0.5)
    wire = wire_phantom(wire_mm=0.2, wire_hu=20000.0).slab([0.0], shape=(512, 512), fov_mm=256.0)
    assert ((wire.hu120 + 1000).sum() * 0.25) == pytest.approx(21000 * np.pi * 0.1**2, rel=0.01)
    edge = edge_phantom(angle_deg=3.0).slab([0.0], shape=(512, 512), fov_mm=256.0).hu120[0]
    # half a cylinder: the line's x falls by tan(3 degrees) a millimetre of y
    crossing = [centre[200:312][np.argmin(np.abs(edge[row, 200:312] + 500))] for row in (156, 356)]
    assert crossing[0] - crossing[1] == pytest.approx(100 * np.tan(np.deg2rad(3.0)), abs=0.6)


def test_a_scan_can_be_the_digital_object():
    hu = np.full((2, 8, 8), -1100, np.float32)
    hu[:, 2:6, 2:6] = 40
    hu[:, 3, 3] = 900
    padding = np.zeros(hu.shape, bool)
    padding[:, 0] = True
    hu[padding] = 3000
    series = Series(hu, Geometry(), ScanProtocol(kvp=120.0), padding=padding)
    o = object_from_series(series)
    assert np.all(o.hu120[padding] == -1000) and o.hu120.min() == -1000
    assert o.hu120[0, 2, 2] == 40 and o.hu(80)[0, 3, 3] > 1000
    at80 = object_from_series(Series(hu, Geometry(), ScanProtocol(kvp=80.0), padding=padding))
    assert at80.hu120[0, 3, 3] < 900
    assert at80.hu(80)[0, 3, 3] == pytest.approx(900, abs=1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_patient(1, kind="mouse"), "chest, lungman"),
        (lambda: make_patient(1, nodules=-1), "0 or more"),
        (lambda: EmphysemaSpec(0.9), "0 and 0.6"),
        (lambda: EmphysemaSpec(0.2, hole_mm=50.0), "2 and 20"),
        (lambda: NoduleSpec(100.0), "2 and 60"),
        (lambda: NoduleSpec(10.0, "gas"), "ground-glass"),
        (lambda: make_patient(1, nodules=[NoduleSpec(60.0)] * 40).slab([100.0]), "no place in the lung"),
        (lambda: make_patient(1).slab([100.0], fov_mm=250.0), "field of view"),
        (lambda: make_patient(1).slab([900.0]), "lies at"),
        (lambda: make_patient(1).slab([100.0, 100.05], 0.05), "finer than the phantom"),
        (lambda: make_patient(1).slab([100.0, 104.0], 0.5), "0.5 mm apart"),
        (lambda: water_cylinder(300.0).slab([0.0], fov_mm=200.0), "fov_mm must be 300"),
        (lambda: water_cylinder().slab([0.0]).hu(90), "70, 80, 100, 120, 140"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(call, words):
    with pytest.raises(HarmonictError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
