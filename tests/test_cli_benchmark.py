"""`harmonict benchmark` as a user meets it: tables on disk, exit codes, refusals in one line."""

import json

import pytest

from toy_trial import PLAN, write_toy_trial


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return write_toy_trial(tmp_path_factory.mktemp("trial"))


def test_one_model_of_a_plan_is_done_and_the_rest_waits(run, trial, tmp_path):
    (trial / "plan.toml").write_text(PLAN)
    command = ["benchmark", trial / "plan.toml", "--out", tmp_path / "out", "--only", "identity", "--jobs", "1"]
    code, out, err = run(*command)
    assert code == 0 and "identity" in out and "not run yet" in out, err
    assert "identity: 8 of 8 series measured" in err
    page = (tmp_path / "out" / "tables.md").read_text()
    assert "Not run yet: ratio" in page and "## All test series" in page
    names = {"models", "cases", "summary", "tumour", "tests"}
    assert {p.stem for p in (tmp_path / "out").glob("*.csv")} == names
    code, out, _ = run(*command, "--json")
    assert code == 0 and {row["model"] for row in json.loads(out)} == {"identity"}
    # the model that cannot be made: 2 where it is all that was asked for
    assert run(*command[:4], "--only", "not there", "--jobs", "1")[0] == 2


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (('"cohort.csv"', '"nowhere.csv"'), [], "no cohort table at"),
        (('target = "Bl64"', 'target = "B99"'), [], "no test series of Br40, Bl57 with a target B99"),
        (("rois = 3", 'tumour = "nobody"'), [], "no test series with a nodule"),
        (("slices = 3", "slices = 3"), ["--only", "nobody"], "the plan has no model 'nobody'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(run, trial, tmp_path, change, options, words):
    plan = trial / f"plan-{tmp_path.name}.toml"
    plan.write_text(PLAN.replace(*change))
    code, out, err = run("benchmark", plan, "--out", tmp_path / "out", *options)
    assert code == 2 and out == "" and words in err and len(err.strip().splitlines()) == 1
