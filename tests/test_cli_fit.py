"""`harmonict fit` on a cohort table, as a user meets it: model, resume, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from harmonict import cli
from harmonict.dicom.read import read_series
from harmonict.train import Run
from harmonict.volumes import write_volume
from test_data import MIXED, TRIAL, write_trial
from toy import toy_series

QUICK = "--set layers=3 --set channels=8 --set patch=24 --set batch=2 --set check_every=2".split()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_trial(tmp_path_factory.mktemp("trial"), TRIAL)


def test_a_method_trained_on_a_cohort_harmonizes_its_dicom(run, cohort, tmp_path):
    command = ["fit", "choe", "--cohort", cohort, "--target-protocol", "Bl64", "--out", tmp_path / "model"]
    command += ["--source-protocol", "Br40", "--size", "compact", *QUICK, "--set", "steps=4"]
    code, out, err = run(*command)
    assert code == 0 and "choe fitted" in out, err
    assert "pairs of slices: 12; 6 of 1 patients held out" in err and "validation CCC" in err
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    assert card["protocol_pairs"] == [{"source": "Br40 1 mm", "target": "Bl64 1 mm", "slice_pairs": 12}]
    assert {"log.csv", "run.json", "sheets", "loop-0"} <= {p.name for p in (tmp_path / "model.run").iterdir()}
    assert run(*command)[1] == out  # nothing is done again
    code, out, _ = run("harmonize", cohort.parent / "p1-Br40-0", tmp_path / "out", "--model", tmp_path / "model")
    assert code == 0 and pd.read_csv(tmp_path / "out" / "cohort.csv")["kernel"].tolist() == ["Bl64"]
    code, _, err = run(
        "harmonize",
        cohort.parent / "p1-Br40-0",
        tmp_path / "b",
        "--model",
        tmp_path / "model",
        "--target-protocol",
        "B10",
    )
    assert code == 2 and "was fitted for Bl64" in err


def test_killed_it_goes_on_with_the_same_command_to_the_same_model(run, cohort, tmp_path):
    def command(name, steps=30):
        words = ["fit", "choe", "--cohort", cohort, "--target-protocol", "Bl64", "--out", tmp_path / name]
        return [str(w) for w in [*words, *QUICK, "--set", f"steps={steps}"]]

    code = f"""
import sys
from harmonict import cli, train
init = train.Run.__init__
def often(self, *a, **k):
    init(self, *a, save_every_s=0.0, **k)
train.Run.__init__ = often
step = train.Run.step
def slow(self, *a):
    import time
    time.sleep(0.2)
    step(self, *a)
train.Run.step = slow
cli.main({command("killed")!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    place = tmp_path / "killed.run" / "loop-0"
    while not list(place.glob("step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    _, out, err = run(*command("killed"))
    _, whole, _ = run(*command("whole"))
    assert "going on from step" in err
    assert out.split()[2] == whole.split()[2]  # the digest: the same weights to the last bit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cohort", "COHORT"], "needs --target-protocol"),
        (["--cohort", "COHORT", "--target-protocol", "B99"], "there are: Bl57"),
        (["--cohort", "COHORT", "--target-protocol", "Bl64", "--source", "x"], "not both"),
        (["--target-protocol", "Bl64"], "choose rows of a --cohort"),
        (["--cohort", "COHORT", "--target-protocol", "Bl64", "--size", "huge"], "it has: paper, compact"),
        (["--cohort", "COHORT", "--target-protocol", "Bl64", "--set", "patch=400"], "smaller than the patch"),
        (["--cohort", "COHORT", "--target-protocol", "Bl64", "--set", "rate=1e30"], "training stopped at step"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_exit_code_2(run, cohort, tmp_path, options, words):
    quick = [] if "--size" in options else [*QUICK, "--set", "steps=6"]
    options = [str(cohort) if o == "COHORT" else o for o in options]
    code, out, err = run("fit", "choe", "--out", tmp_path / "model", *quick, *options)
    lines = [line for line in err.splitlines() if line.startswith("harmonict: ")]
    assert code == 2 and out == "" and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "model").exists()


def refused(result):
    """The one line of a refusal."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("harmonict: ")]
    assert code == 2 and len(lines) == 1, err
    return lines[0]


def fitting(cohort, out, *options, target="Bl64", steps=4):
    words = ["fit", "choe", "--cohort", cohort, "--target-protocol", target, "--out", out, *QUICK]
    return [*words, "--set", f"steps={steps}", *options]


@pytest.mark.parametrize(
    ("rows", "target", "words"),
    [
        (MIXED, "Bl64", "mixed spacings: pixels of 0.7 mm (patient p1) and 0.9 mm (patient p3)"),
        (MIXED, "Bl64", "resample them all with --resample"),
        (TRIAL[:3], "Bl64", "too few patients to split: 1; training needs at least 2"),
        ([*TRIAL[:2], TRIAL[5]], "Bl64", "no pairs of slices for the target Bl64"),
        (TRIAL[2::3], "Bl64", "no source series beside the target Bl64"),
    ],
)
def test_a_cohort_that_cannot_be_trained_on_is_one_line_and_exit_code_2(run, tmp_path, rows, target, words):
    cohort = write_trial(tmp_path, rows)
    assert words in refused(run(*fitting(cohort, tmp_path / "model", target=target)))
    assert not (tmp_path / "model").exists()


def test_a_training_that_breaks_says_at_which_step_and_goes_on_from_the_last_good_state(
    run, cohort, tmp_path, monkeypatch
):
    """NaN from step 3 on; the same command, given again once the cause is gone, starts at step 2."""
    init, step = Run.__init__, Run.step
    monkeypatch.setattr(Run, "__init__", lambda self, *a, **k: init(self, *a, save_every_s=0.0, **k))

    def poisoned(self, losses, optimizer):
        bad = self.step_number >= 2
        step(self, {name: (w, raw * (float("nan") if bad else 1)) for name, (w, raw) in losses.items()}, optimizer)

    monkeypatch.setattr(Run, "step", poisoned)
    line = refused(run(*fitting(cohort, tmp_path / "model")))
    assert "training stopped at step 3: the loss 'L2' became nan; the last good state is kept" in line
    kept = tmp_path / "model.run" / "loop-0" / "step-00000002"
    assert str(kept) in line and (kept / "tensors.safetensors").is_file() and not (tmp_path / "model").exists()
    monkeypatch.setattr(Run, "step", step)
    code, _, err = run(*fitting(cohort, tmp_path / "model"))
    assert code == 0 and "going on from step 2 of 4" in err


def test_sources_of_other_thicknesses_are_trained_on_with_the_1_mm_target(run, tmp_path):
    rows = [
        {"patient": p, "kernel": k, "role": role, "thickness": t}
        for p in ("p1", "p2")
        for k, role, t in (("Br40", "source", 0.5), ("Br44", "source", 3.0), ("Bl64", "target", 1.0))
    ]
    code, _, err = run(*fitting(write_trial(tmp_path, rows), tmp_path / "model"))
    assert code == 0, err
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    counts = {row["source"]: row["slice_pairs"] for row in card["protocol_pairs"]}
    assert counts == {"Br40 0.5 mm": 6, "Br44 3 mm": 2}  # 6 mm of one patient


# -- pixels of several sizes -----------------------------------------------------------------------------------------


def test_a_mixed_cohort_is_trained_on_in_one_pixel_size_and_the_card_says_so(run, tmp_path):
    cohort = write_trial(tmp_path, MIXED)
    code, _, err = run(*fitting(cohort, tmp_path / "model", "--resample"))
    assert code == 0, err
    card, page = (tmp_path / "model" / name for name in ("card.json", "card.md"))
    pixel_mm = json.loads(card.read_text())["pixel_mm"]
    assert pixel_mm == [0.7, 0.7]
    code, _, err = run(*fitting(cohort, tmp_path / "wide", "--resample", "0.8"))
    assert code == 0 and "resampled in the plane: " in err
    resampled = json.loads((tmp_path / "wide" / "card.json").read_text())["resampled"]
    assert {part["to_mm"] for part in resampled} == {0.8} and sum(part["series"] for part in resampled) == 6
    assert "resampled in the plane, from pixels of 0.7 mm to 0.8 mm" in (tmp_path / "wide" / "card.md").read_text()
    assert "of another training" not in page.read_text()
    assert "--resample takes a pixel size in mm" in refused(run(*fitting(cohort, tmp_path / "no", "--resample", "big")))


def test_images_of_mixed_pixel_sizes_are_refused_or_resampled_too(run, tmp_path):
    for side, kernel in (("source", "B30"), ("target", "B70")):
        (tmp_path / side).mkdir()
        for n, pixel_mm in enumerate((0.9, 0.7)):
            image = toy_series(size=64, pixel_mm=pixel_mm, kernel=kernel, seed=n)
            write_volume(image, tmp_path / side / f"{n}.nii.gz")
    command = ["fit", "choe", "--out", tmp_path / "model", *QUICK, "--set", "steps=2"]
    command += ["--source", tmp_path / "source", "--target", tmp_path / "target"]
    assert "--resample" in refused(run(*command))
    code, _, err = run(*command, "--resample")
    assert code == 0 and "2 series from pixels of 0.9 mm to 0.7 mm" in err, err


@pytest.fixture(scope="module")
def model(cohort, tmp_path_factory):
    """Of pixels of 0.7 mm."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    with pytest.raises(SystemExit) as end:
        cli.main([str(w) for w in fitting(cohort, folder, steps=30)])
    assert not end.value.code
    return folder


def test_a_series_of_other_pixels_is_translated_in_the_trained_ones_and_keeps_its_own(run, model, tmp_path):
    cohort = write_trial(tmp_path / "in", MIXED)
    source = next(cohort.parent.glob("p3-Br40-*"))
    results = {}
    for name, options in (("as it is", []), ("resampled", ["--resample"])):
        code, _, err = run("harmonize", source, tmp_path / name, "--model", model, *options)
        assert code == 0, err
        row = pd.read_csv(tmp_path / name / "cohort.csv").iloc[0]
        results[name] = row["series"], read_series(sorted((tmp_path / name / row["path"]).glob("*.dcm"))), row["reason"]
    before = read_series(sorted(source.glob("*.dcm")))
    (uid, plain, note), (other_uid, resampled, other_note) = results["as it is"], results["resampled"]
    assert note == "trained on pixels of 0.7 mm, these are of 0.9 mm" and uid != other_uid
    assert other_note == "translated in pixels of 0.7 mm, its own are of 0.9 mm"
    assert resampled.geometry == before.geometry and resampled.hu.shape == before.hu.shape
    assert not np.array_equal(resampled.hu, before.hu) and not np.array_equal(resampled.hu, plain.hu)


def test_strict_refuses_what_is_outside_the_training_and_takes_it_resampled(run, model, tmp_path):
    cohort = write_trial(tmp_path / "in", MIXED).parent
    outside = next(cohort.glob("p3-Br40-*"))
    code, out, _ = run("harmonize", outside, tmp_path / "one", "--model", model, "--strict")
    assert code == 2 and "0 series done, 1 failed" in out and not list((tmp_path / "one").rglob("*.dcm"))
    assert "outside what the model was trained on: trained on pixels of 0.7 mm, these are of 0.9 mm" in out
    code, out, _ = run("harmonize", cohort, tmp_path / "all", "--model", model, "--strict")
    assert code == 1 and "6 series done, 3 failed" in out
    code, out, _ = run("harmonize", cohort, tmp_path / "all", "--model", model, "--strict", "--resample")
    assert code == 0 and "9 series done, 0 failed" in out
    assert len(list((tmp_path / "all").rglob("*.dcm"))) == 9 * 6
    table = pd.read_csv(tmp_path / "all" / "cohort.csv")
    assert len(table) == 9 and not table["path"].duplicated().any()


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        (
            "weights.safetensors",
            lambda b: b[:-1] + bytes([b[-1] ^ 1]),
            "does not match its SHA-256; copy the model again",
        ),
        ("config.json", lambda b: b.replace(b'"layers": 3', b'"layers": 4'), "weights and config.json do not fit"),
        ("config.json", lambda b: b.replace(b'"layers"', b'"storeys"'), "unknown setting 'storeys'"),
        ("config.json", lambda b: b[:40], "config.json is missing or not JSON"),
    ],
)
def test_a_model_that_is_not_whole_is_one_line_and_exit_code_2(run, model, cohort, tmp_path, name, edit, words):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(edit((model / name).read_bytes()))
    line = refused(run("harmonize", cohort.parent, tmp_path / "out", "--model", tmp_path / "model"))
    assert words in line and not (tmp_path / "out").exists()


def test_a_target_that_the_model_was_not_fitted_for_is_one_line_and_exit_code_2(run, model, cohort, tmp_path):
    command = ["harmonize", cohort.parent, tmp_path / "out", "--model", model, "--target-protocol", "B10"]
    line = refused(run(*command))
    assert "was fitted for Bl64" in line and "not for B10" in line and not (tmp_path / "out").exists()
