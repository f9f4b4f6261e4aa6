"""STAN-CT's reconstruction from patches: what each quality unit finds, repairs and tells."""

import json
import time

import numpy as np
import pytest
import torch

from harmonict.core import HarmonictError
from harmonict.patch_fusion import (
    MODES,
    FusionSettings,
    draw_patches,
    fuse_slice,
    patch_steps,
    reachable,
    slice_seed,
    stretch_to_source,
)
from toy import toy_series

SERIES = toy_series(blur_mm=0.8, size=320, pixel_mm=0.8, slices=1, padding=True)
HU, PADDING = SERIES.hu[0].copy(), SERIES.padding[0].copy()
EDGE = np.ones(HU.shape, bool)
EDGE[8:-8, 8:-8] = False  # no tissue at the image's edge, where no patch can lie across a border of another
HU[HU < -950] -= 50  # the air around, out of the range of soft tissue, noise and all
HU[EDGE], PADDING[EDGE] = -2048, True
TISSUE = (HU >= -1000) & (HU <= 900) & ~PADDING
SETTINGS = FusionSettings()


def identity(x):
    return x


def brighter(x):
    return x + 10


def bright_frame(x):
    y = x + 40
    y[..., 4:-4, 4:-4] -= 40
    return y


def standard(x):
    return torch.ones(len(x))


def no_bone(x):
    return (x.amax(dim=(1, 2, 3)) < 300).float()


def fuse(translate=identity, d=standard, *, hu=HU, padding=PADDING, seed=1, **settings):
    return fuse_slice(
        hu, padding=padding, translate_patch=translate, realness=d, settings=FusionSettings(**settings), seed=seed
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blend", [False, True])
def test_what_changes_nothing_changes_no_hu_in_any_mode(mode, blend):
    out, record = fuse(mode=mode, blend=blend)
    assert out.dtype == np.float32 and np.array_equal(out, HU)
    assert record["box_artifacts_found"] == 0 and record["tissue_pixels_empty"] == 0
    assert record["eq7_shift_hu"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_soft_tissue_is_translated_and_everything_else_keeps_its_hu_exactly(mode):
    out, record = fuse(brighter, mode=mode)
    assert np.array_equal(out[~TISSUE], HU[~TISSUE]) and (~TISSUE & ~PADDING).any()
    assert np.allclose(out[TISSUE], HU[TISSUE] + 10, atol=1e-3)
    assert record["tissue_pixels"] == TISSUE.sum() and record["box_artifacts_found"] == 0


def test_the_record_is_plain_enough_for_json():
    for mode in MODES:
        _, record = fuse(bright_frame, mode=mode)
        assert json.loads(json.dumps(record)) == record and record["mode"] == mode


# -- unit 1


def test_every_drawn_patch_is_soft_tissue_of_the_sides_asked_for_and_the_overlap_is_reached():
    reached = TISSUE & reachable(TISSUE, SETTINGS)
    boxes = draw_patches(TISSUE, reached, [], np.random.default_rng(0), SETTINGS, cap=200)
    count = np.zeros(HU.shape, int)
    for y, x, side in boxes:
        assert 100 <= side <= 256 and min(y, x) >= 0 and max(y, x) + side <= 320
        assert TISSUE[y : y + side, x : x + side].mean() >= 0.7
        count[y : y + side, x : x + side] += 1
    assert (count[reached] >= 2).all()
    assert all((count[y : y + s, x : x + s] > 1).mean() >= 0.5 for y, x, s in boxes)
    assert len({side for _, _, side in boxes}) > len(boxes) / 2  # random sides, not one


def test_a_pixel_is_called_reachable_exactly_where_some_soft_tissue_patch_holds_it():
    rng = np.random.default_rng(2)
    tissue = rng.random((40, 53)) < np.linspace(0.2, 1, 53)
    settings = FusionSettings(patch_px=(10, 12))
    slow = {side: np.zeros(tissue.shape, bool) for side in (10, 11, 12)}
    for side, found in slow.items():
        for y in range(40 - side + 1):
            for x in range(53 - side + 1):
                if tissue[y : y + side, x : x + side].mean() >= 0.7:
                    found[y : y + side, x : x + side] = True
    assert np.array_equal(reachable(tissue, settings), slow[10]) and 0 < slow[10].mean() < 1
    large = reachable(tissue, FusionSettings(patch_px=(11, 12)))
    assert np.array_equal(large, (slow[11] | slow[12]) & slow[11])


def test_noisy_air_around_the_patient_asks_for_no_patches():
    rng = np.random.default_rng(0)
    air = np.where(TISSUE, HU, rng.normal(-1000, 15, HU.shape)).astype(np.float32)
    _, clean = fuse(mode="overlap")
    _, noisy = fuse(hu=air, padding=None, mode="overlap")
    assert noisy["tissue_pixels"] > 1.1 * clean["tissue_pixels"]
    assert noisy["patches_drawn"] < 1.5 * clean["patches_drawn"]


def test_overlap_is_asked_for_of_each_patch_where_single_coverage_would_do_for_the_pixels():
    settings = FusionSettings(patch_px=(20, 30), coverage=1)
    tissue = np.ones((60, 60), bool)
    boxes = draw_patches(tissue, tissue, [], np.random.default_rng(0), settings, cap=200)
    count = np.zeros(tissue.shape, int)
    for y, x, side in boxes:
        count[y : y + side, x : x + side] += 1
    assert all((count[y : y + s, x : x + s] > 1).mean() >= 0.5 for y, x, s in boxes)


def test_a_cap_on_the_patches_holds_and_what_is_left_uncovered_is_told_and_keeps_its_hu():
    out, record = fuse(brighter, max_patches=1, mode="overlap")
    assert record["patches_drawn"] == 1 and record["tissue_pixels_below_coverage"] > 0
    kept = TISSUE & (out == HU)
    assert kept.sum() == record["tissue_pixels_empty"] > 0


def test_tissue_that_no_patch_can_reach_is_told_and_keeps_its_hu():
    hu = HU.copy()
    hu[:, :] = -2000
    hu[100:300, 100:300] = 40
    hu[10:14, 10:14] = 40  # an island: every patch around it is air
    out, record = fuse(brighter, hu=hu, padding=None)
    assert record["tissue_pixels_out_of_reach"] >= 16 and (out[10:14, 10:14] == 40).all()
    assert (out[150:250, 150:250] == 50).all()


@pytest.mark.parametrize("shape", [(64, 64), (1, 7), (101, 333), (90, 400)])
def test_an_image_of_any_shape_or_smaller_than_a_patch_is_covered(shape):
    hu = np.full(shape, 40, np.float32)
    for mode in MODES:
        out, record = fuse(brighter, hu=hu, padding=None, mode=mode)
        assert (out == 50).all() and record["tissue_pixels_empty"] == 0


def test_sides_are_multiples_of_a_networks_stride_where_asked():
    seen = []

    def look(x):
        seen.append(tuple(x.shape))
        return x

    fuse(look, multiple_px=32)
    assert {side for *_, side in seen} <= {128, 160, 192, 224, 256} and all(s[:2] == (1, 1) for s in seen)


def test_a_slice_without_tissue_comes_back_as_it_is():
    hu = np.full((200, 200), -1024, np.float32)
    for mode in MODES:
        out, record = fuse(brighter, hu=hu, padding=None, mode=mode)
        assert np.array_equal(out, hu) and record["tissue_pixels"] == 0


# -- unit 2


def test_patches_that_do_not_fool_d_are_dropped_and_drawn_again_elsewhere():
    calls = []

    def every_third_fails(x):
        calls.append(1)
        return torch.tensor([0.5 if len(calls) % 3 == 0 else 1.0])

    out, record = fuse(brighter, every_third_fails, mode="real-fake")
    assert record["patches_dropped_by_d"] >= 1 and record["patches_redrawn"] >= 1
    assert record["patches_drawn"] == record["patches_used"] + record["patches_dropped_by_d"] == len(calls)
    assert record["tissue_pixels_below_coverage"] == 0 and np.allclose(out[TISSUE], HU[TISSUE] + 10, atol=1e-3)


def test_a_region_that_never_fools_d_is_drawn_again_up_to_the_cap_and_told():
    bone = TISSUE & (HU >= 290)
    out, record = fuse(brighter, no_bone, mode="real-fake", max_redraws=15)
    assert record["patches_redrawn"] == 15 and record["patches_dropped_by_d"] > 0
    assert np.array_equal(out[bone], HU[bone]) and record["tissue_pixels_empty"] >= bone.sum() > 0
    filled, told = fuse(brighter, no_bone, mode="all", max_redraws=15)
    assert np.allclose(filled[TISSUE], HU[TISSUE] + 10, atol=1e-3)
    assert told["tissue_pixels_from_dropped_patches"] == told["tissue_pixels_empty"] == record["tissue_pixels_empty"]


def test_empty_pixels_take_the_most_real_of_the_dropped_patches():
    offsets = iter(range(1000))
    last = {}

    def counted(x):
        last["n"] = next(offsets)
        return x * 0 + last["n"]

    def later_is_more_real(x):
        return torch.tensor([last["n"] / 1000])

    out, record = fuse(counted, later_is_more_real, max_redraws=5)
    n = record["patches_drawn"] - 1
    assert record["patches_used"] == 0 and record["tissue_pixels_empty"] == TISSUE.sum()
    assert (out[TISSUE] == n).any() and record["tissue_pixels_from_dropped_patches"] == TISSUE.sum()


def test_no_d_is_asked_where_the_unit_is_off_and_its_absence_is_refused_where_it_is_on():
    def never(x):
        raise AssertionError

    fuse(d=never, mode="straightforward")
    fuse(d=never, mode="overlap")
    fuse(d=None, mode="overlap")
    with pytest.raises(HarmonictError, match="needs a discriminator"):
        fuse(d=None, mode="real-fake")


# -- unit 3


def test_eq_7_puts_the_least_gray_at_min_and_the_greatest_at_max():
    p_g = np.array([[0.2, 0.4], [0.6, 1.2]])
    assert stretch_to_source(p_g, -1000.0, 400.0) == pytest.approx(np.array([[-1000, -720], [-440, 400]]))
    assert (stretch_to_source(np.ones((3, 3)), -500.0, 10.0) == -500).all()


def test_eq_7_undoes_any_affine_gray_and_its_shift_is_measured_either_way():
    out, _ = fuse(lambda x: (x + 1024) / 2000, gray="minmax")
    assert np.allclose(out, HU, atol=0.01)
    half, record = fuse(lambda x: x / 2, mode="overlap")  # HU of half the range: eq 7 would stretch them
    assert np.allclose(half[TISSUE], HU[TISSUE] / 2, atol=1e-3) and abs(record["eq7_shift_hu"]) > 50


def test_eq_7_with_the_range_of_the_whole_slice_moves_a_patch_without_bone():
    out, _ = fuse(identity, gray="minmax-slice", mode="overlap")
    assert np.abs(out - HU)[TISSUE].max() > 20


def test_a_bright_frame_around_each_patch_is_found_and_repaired_below_half_a_hu():
    for mode in MODES[:3]:
        out, record = fuse(bright_frame, mode=mode)
        assert record["box_artifacts_found"] > 0 and record["largest_step_found_hu"] > 4
        assert record["reintegrations"] == 0 and record["box_artifacts_left"] == record["box_artifacts_found"]
        assert np.abs(out - HU)[TISSUE].max() > 10
    out, record = fuse(bright_frame, mode="all")
    assert record["reintegrations"] >= 1 and record["box_artifacts_left"] == 0 and record["patches_cropped"] > 0
    assert np.abs(out - HU)[TISSUE].max() < 0.5


@pytest.mark.parametrize("seed", range(6))
def test_patches_each_off_by_a_constant_are_found_and_nearly_all_steps_faded_out(seed):
    def run(mode):
        rng = np.random.default_rng(seed)
        out, record = fuse(lambda x: x + float(rng.uniform(-40, 40)), mode=mode, seed=seed)
        change = np.where(TISSUE, out - HU, np.nan)
        steps = np.concatenate([np.abs(np.diff(change, axis=axis)).ravel() for axis in (0, 1)])
        return steps[np.isfinite(steps)], record

    (before, plain), (after, record) = run("real-fake"), run("all")
    assert plain["box_artifacts_left"] == record["box_artifacts_found"] > 0 and record["largest_step_found_hu"] > 4
    assert record["box_artifacts_left"] == 0 and (after > 4).sum() < 0.1 * (before > 4).sum()
    assert record["largest_patch_offset_hu"] > 10  # a crop cannot mend this, and it is told


def test_pixels_that_only_cropped_borders_reach_keep_their_uncropped_hu_and_are_told():
    left = 0
    for seed in range(6):  # few patches, none in place of others: every round empties more
        rng = np.random.default_rng(seed)
        out, record = fuse(lambda x, rng=rng: x + float(rng.uniform(10, 200)), seed=seed, max_redraws=0)
        assert np.isfinite(out).all() and (out[TISSUE] - HU[TISSUE] > 9.9).all()
        left += record["tissue_pixels_left_with_cropped_borders"] * (record["reintegrations"] > 1)
    assert left > 0


def test_new_noise_edges_and_slow_changes_are_no_box_artifacts():
    rng = np.random.default_rng(5)
    noise = (rng.standard_normal(HU.shape) * 20).astype(np.float32)
    where = {}

    def translate(x):  # the same noise wherever a pixel is seen: what a sharper kernel would add
        y, x0, side = where["box"]
        return x + torch.from_numpy(noise[y : y + side, x0 : x0 + side])[None, None]

    reached = TISSUE & reachable(TISSUE, SETTINGS)
    boxes = iter(draw_patches(TISSUE, reached, [], np.random.default_rng(1), SETTINGS, cap=200))

    def next_box(x):
        where["box"] = next(boxes)
        return translate(x)

    out, record = fuse(next_box, seed=1)
    assert np.allclose(out[TISSUE], (HU + noise)[TISSUE], atol=1e-3)
    assert record["box_artifacts_found"] == 0


def test_a_step_is_measured_to_its_height_and_only_where_it_is():
    change = np.zeros((80, 90))
    change[:, 30:] = 7.0
    valid = np.ones(change.shape, bool)
    boxes = [(10, 60, 30, 70), (0, 80, 0, 30), (5, 10, 30, 60)]
    steps, shown = patch_steps(change, valid, boxes, least_hu=4, sds=4)
    assert steps[0] == pytest.approx([7, 0, 0, 0]) and steps[1] == pytest.approx([0, 7, 0, 0])
    assert (steps[2] == 0).all()  # five rows are too few to tell
    assert np.array_equal(shown, steps > 0)
    steps, shown = patch_steps(change.T, valid.T, [(30, 70, 10, 60)], least_hu=8, sds=4)
    assert steps[0] == pytest.approx([0, 0, 7, 0]) and not shown.any()


def test_a_step_along_a_part_of_a_border_is_found_at_its_full_height_and_noise_is_not():
    rng = np.random.default_rng(4)
    change = rng.standard_normal((200, 200)) * 10
    valid = np.ones(change.shape, bool)
    box = [(0, 192, 100, 190)]
    assert not patch_steps(change, valid, box, least_hu=4, sds=4)[1].any()
    change[96:144, 100:150] += 20
    steps, shown = patch_steps(change, valid, box, least_hu=4, sds=4)
    assert shown.tolist() == [[True, False, False, False]] and steps[0, 0] == pytest.approx(20, abs=6)


# -- the whole


def test_the_same_slice_gives_the_same_bytes_and_another_seed_other_patches():
    def uneven(x):
        return x + x.shape[-1] / 10

    a, one = fuse(uneven, seed=slice_seed(HU))
    b, two = fuse(uneven, seed=slice_seed(HU.copy()))
    c, _ = fuse(uneven, seed=slice_seed(HU, 1))
    assert np.array_equal(a, b) and one == two and not np.array_equal(a, c)
    other = HU.copy()
    other[100, 100] += 1
    assert slice_seed(other) != slice_seed(HU)


def test_resizing_shows_the_network_patches_of_one_size_and_keeps_the_grid():
    seen = set()

    def look(x):
        seen.add(tuple(x.shape))
        return x

    out, _ = fuse(look, resize_px=256, mode="overlap")
    assert seen == {(1, 1, 256, 256)}
    changed = np.abs(out - HU)[TISSUE]
    assert 0 < changed.mean() < 8 and out.shape == HU.shape


def test_a_translated_patch_of_another_shape_or_with_nan_is_refused_in_words():
    with pytest.raises(HarmonictError, match="expected"):
        fuse(lambda x: x[..., 1:])
    with pytest.raises(HarmonictError, match="NaN"):
        fuse(lambda x: x * float("nan"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "most"},
        {"gray": "no"},
        {"patch_px": (200, 100)},
        {"patch_px": (100, 120), "multiple_px": 64},
        {"low_hu": 900.0},
        {"share": 0.0},
        {"max_patches": 0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(HarmonictError):
        FusionSettings(**wrong)


def test_a_whole_slice_takes_less_than_a_quarter_of_a_second_beside_the_network():
    series = toy_series(blur_mm=0.8, size=512, pixel_mm=0.6, slices=1, padding=True)
    times = []
    for seed in range(4):
        start = time.process_time()
        _, record = fuse(hu=series.hu[0], padding=series.padding[0], seed=seed)
        times.append(time.process_time() - start)
        assert record["patches_drawn"] < 60
    assert min(times) < 0.25, times
