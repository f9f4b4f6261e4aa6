"""A series unlike those of the training is marked with the numbers, and refused where that is asked for."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from harmonict.abstention import looks, outside, trained_on
from harmonict.core import ScanProtocol
from harmonict.data import Scan, SlicePairs
from harmonict.volumes import write_volume
from toy import toy_series


def patient(n, **settings):
    series = toy_series(**{"noise_hu": 12.0 + n, "blur_mm": 0.8, "seed": n, **settings})
    protocol = ScanProtocol(kernel="B30", slice_thickness_mm=settings.get("thickness", 3.0))
    return replace(series, protocol=protocol, patient=f"p{n}", name=f"p{n}")


def pairs_of(*series):
    return SlicePairs([(s, z, s, z) for s in series for z in range(len(s.hu))])


PAIRS = pairs_of(*(patient(n) for n in range(3)))
KNOWN = trained_on(PAIRS)["source"]


def test_the_card_says_what_the_images_of_the_training_were_like():
    assert KNOWN["series"] == 3 and KNOWN["pixel_mm"] == [1.2, 1.2] and KNOWN["thickness_mm"] == [3.0, 3.0]
    assert 9 < KNOWN["noise_hu"][0] < KNOWN["noise_hu"][1] < 17
    assert KNOWN["f50_per_mm"][0] == pytest.approx(np.sqrt(np.log(2) / 2) / (np.pi * 0.8), rel=0.15)
    assert sum(KNOWN["hu_shares"]["mean"]) == pytest.approx(1)
    assert json.loads(json.dumps(KNOWN)) == KNOWN


def test_the_other_side_is_known_too_where_a_model_can_be_turned_round():
    scans = [Scan(patient(0)), Scan(patient(1, blur_mm=1.6))]
    known = trained_on(SlicePairs.unpaired([(scans[0], 0)], [(scans[1], 0)]))
    assert known["target"]["f50_per_mm"][1] < known["source"]["f50_per_mm"][0] and "target" not in trained_on(PAIRS)


def test_a_new_patient_like_those_of_the_training_is_inside():
    assert outside(looks(patient(7, noise_hu=13.0)), KNOWN) == ()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"noise_hu": 60.0}, "HU, trained on"),
        ({"blur_mm": 1.8}, "sharpness (MTF f50)"),
        ({"thickness": 8.0}, "slices of 8 mm, trained on 3 mm"),
    ],
)
def test_what_is_unlike_the_training_is_said_with_the_numbers(other, words):
    settings = {k: v for k, v in other.items() if k != "thickness"}
    series = patient(9, **{"noise_hu": 13.0, **settings})
    if "thickness" in other:
        series = replace(series, protocol=ScanProtocol(slice_thickness_mm=other["thickness"]))
    (sentence,) = outside(looks(series), KNOWN)
    assert words in sentence


def test_a_scale_that_is_off_is_seen_in_the_hu():
    series = patient(9, noise_hu=13.0)
    lifted = series.with_hu(np.where(series.hu > -600, series.hu + 500, series.hu))
    assert any("of the patient at other HU than in training" in s for s in outside(looks(lifted), KNOWN))


def test_a_model_that_knows_nothing_of_its_training_says_nothing():
    assert outside(looks(patient(9, noise_hu=90.0)), {}) == ()


def fitted(run, tmp_path):
    for side in ("source", "target"):
        (tmp_path / side).mkdir()
        for n in range(2):
            write_volume(patient(n), tmp_path / side / f"p{n}.nii.gz")
    quick = "--set layers=3 --set channels=4 --set patch=24 --set batch=2 --set steps=2".split()
    sides = ["--source", tmp_path / "source", "--target", tmp_path / "target"]
    code, _, err = run("fit", "choe", "--out", tmp_path / "model", *sides, *quick)
    assert code == 0, err


def test_a_noisy_series_is_marked_on_screen_in_its_row_and_in_the_report_and_strict_refuses_it(run, tmp_path):
    fitted(run, tmp_path)
    (tmp_path / "in").mkdir()
    write_volume(patient(7, noise_hu=13.0), tmp_path / "in" / "usual.nii.gz")
    write_volume(patient(8, noise_hu=80.0), tmp_path / "in" / "noisy.nii.gz")
    command = ["harmonize", tmp_path / "in", tmp_path / "out", "--model", tmp_path / "model"]
    code, out, err = run(*command, "--qc", tmp_path / "qc.json")
    assert code == 0, err
    marked = re.compile(r"noise (7|8)\d HU, trained on 1\d to 1\d HU")
    assert len(marked.findall(out)) == 1
    rows = {row["series"]: row for row in json.loads((tmp_path / "qc.json").read_text())["series"]}
    noisy, usual = rows["noisy.nii.gz"], rows["usual.nii.gz"]
    assert marked.search(noisy["reason"]) and any(map(marked.search, noisy["qc"]["training"]["outside"]))
    assert "trained on" not in (usual["reason"] or "") and usual["qc"]["training"]["outside"] == []
    code, out, _ = run(*command[:2], tmp_path / "strict", *command[3:], "--strict")
    assert code == 1 and "1 series done, 1 failed" in out
    assert "outside what the model was trained on: noise" in out and marked.search(out) and "FAILED" in out
