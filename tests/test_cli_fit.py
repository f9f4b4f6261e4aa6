"""`harmonict fit` on a cohort table, as a user meets it: model, resume, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from test_data import TRIAL, write_trial

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
