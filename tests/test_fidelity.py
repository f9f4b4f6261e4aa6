"""The guard against invented structure: what was planted, removed or stepped is found, a kernel change is not."""

import json
import os
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from harmonict.core import HarmonictError
from harmonict.fidelity import check_fidelity
from harmonict.methods.identity import Identity
from harmonict.volumes import read_volume, write_volume
from toy import toy_series

SHARP = toy_series(blur_mm=1.0, noise_hu=20, slices=3)
SOFT = SHARP.with_hu(ndimage.gaussian_filter(SHARP.hu, (0, 0.9, 0.9)))  # the same raw data, another kernel
LUNG = (128, 128 - 42)  # row, column in the middle of a lung


def ball(diameter_mm, hu, place=LUNG, z=1):
    """A blurred disc in one slice."""
    y, x = np.indices(SHARP.hu.shape[1:]) * 1.2
    disc = np.hypot(y - place[0] * 1.2, x - place[1] * 1.2) < diameter_mm / 2
    change = np.zeros_like(SHARP.hu)
    change[z] = hu * ndimage.gaussian_filter(disc.astype(np.float32), 0.8)
    return change


@pytest.mark.parametrize(("source", "result"), [(SHARP, SOFT), (SOFT, SHARP), (SHARP, SHARP)])
def test_another_kernel_of_the_same_raw_data_passes(source, result):
    found = check_fidelity(source, result)
    assert found.verdict == ("pass",) * 3 and found.note() == ""
    assert found.residual_hu.shape == source.hu.shape and np.all(found.rmse_hu < 0.5 * found.noise_hu)


def test_a_source_without_its_noise_passes():
    quiet = toy_series(blur_mm=1.0, noise_hu=0.01, slices=3)
    found = check_fidelity(SHARP, quiet)
    assert found.verdict == ("pass",) * 3
    assert np.all((0.6 < found.rmse_hu / found.noise_hu) & (found.rmse_hu / found.noise_hu < 1.4))


@pytest.mark.parametrize("hu", [400, -400])
def test_a_nodule_that_was_planted_or_removed_fails_in_its_slice_alone(hu):
    found = check_fidelity(SHARP, SOFT.with_hu(SOFT.hu + ball(8, hu)))
    assert found.verdict == ("pass", "fail", "pass")
    assert np.abs(found.peak_yx_mm[1] - np.array(LUNG) * 1.2).max() < 4
    y, x = LUNG
    assert np.sign(found.residual_hu[1, y, x]) == np.sign(hu) and abs(found.residual_hu[1, y, x]) > 100
    assert "1 of 3 slices fail (first: slice 1)" in found.note()


@pytest.mark.parametrize(("axis", "at"), [("row", 100), ("column", 120)])
def test_a_seam_is_found_where_it_is(axis, at):
    hu = SOFT.hu.copy()
    hu[2][(slice(at, None),) if axis == "row" else (slice(None), slice(at, None))] += 15
    found = check_fidelity(SHARP, SOFT.with_hu(hu))
    assert found.verdict[:2] == ("pass", "pass") and found.verdict[2] != "pass"
    assert found.seam_axis[2] == axis and abs(found.seam_mm[2] - at * 1.2) < 4


def test_what_lies_outside_the_window_of_a_method_counts_for_nothing():
    result = SOFT.with_hu(SOFT.hu + ball(8, 400))
    assert check_fidelity(SHARP, result, window_hu=(-160, 240)).verdict == ("pass",) * 3


def test_padding_and_clipped_air_are_no_finding():
    padded = toy_series(blur_mm=1.0, noise_hu=20, padding=True)
    result = padded.with_hu(np.where(padded.padding, padded.hu, ndimage.gaussian_filter(padded.hu, (0, 0.9, 0.9))))
    assert "fail" not in check_fidelity(padded, result).verdict
    clipped = SHARP.with_hu(np.maximum(SHARP.hu, -1024)), SOFT.with_hu(np.maximum(SOFT.hu, -1024))
    assert check_fidelity(*clipped).verdict == ("pass",) * 3


def test_another_grid_and_a_series_without_tissue_are_refused_in_words():
    with pytest.raises(HarmonictError, match="differ in their grid"):
        check_fidelity(SHARP, toy_series(size=128))
    with pytest.raises(HarmonictError, match="no patch of soft tissue"):
        check_fidelity(SHARP.with_hu(np.full_like(SHARP.hu, -1000)), SHARP)


def test_the_report_holds_the_check_and_the_map_lies_beside_it(run, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    write_volume(SHARP, tmp_path / "in" / "scan.nii.gz")
    monkeypatch.setattr(
        Identity, "translate", lambda self, x, target, about: x + 500 * (ball(8, 1)[1] > 0.5).astype(np.float32)
    )
    command = ["harmonize", tmp_path / "in", tmp_path / "out", "--model", "identity"]
    code, out, _ = run(*command)
    assert code == 0 and "fidelity" not in out and not list(tmp_path.glob("*-residual"))
    code, out, _ = run(*command, "--qc", tmp_path / "report.json")
    assert code == 0 and "fidelity to the source: 3 of 3 slices fail" in out
    (row,) = json.loads((tmp_path / "report.json").read_text())["series"]
    told = row["qc"]["fidelity"]
    assert told["slices"]["fail"] == 3 and len(told["per_slice"]) == 3
    map_hu = read_volume(told["residual"]).hu
    assert Path(told["residual"]).parent == tmp_path / "report-residual"
    assert map_hu.shape == SHARP.hu.shape and map_hu[1][LUNG] > 100


def test_all_pairs_of_real_kernels_of_one_slice_pass():
    data = os.environ.get("HARMONICT_DATA")
    if not data:
        pytest.skip("set HARMONICT_DATA to the folder of public data")
    place = Path(data) / "paired" / "siemens-chest"
    images = {k: read_volume(place / f"{k}.mha", spacing_mm=0.693359) for k in ("B10", "B30", "B50", "B70")}
    for a, b in permutations(images, 2):
        assert check_fidelity(images[a], images[b]).verdict == ("pass",), f"{a} -> {b}"
