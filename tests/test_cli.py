"""The command line as a user meets it: exit codes, one line of words, tables, JSON."""

import json
from pathlib import Path

import pandas as pd
import pytest

from harmonict import cli
from harmonict.volumes import write_volume
from make_dicom import make_ct_series
from toy import toy_series


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, blur in [("soft", 1.3), ("sharp", 0.8)]:
        series = toy_series(blur_mm=blur, seed=5)
        make_ct_series(
            folder / name,
            hu=series.hu,
            signed=True,
            intercept=0,
            spacing_mm=series.geometry.spacing_mm,
            patient=name,
            kernel=f"K-{name}",
        )
    return folder


def commands() -> list[str]:
    return [c.name or c.callback.__name__ for c in cli.app.registered_commands]


@pytest.mark.parametrize("command", commands())
def test_every_help_shows_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"Example: harmonict {command}" in out


def test_inspect_lists_series_and_writes_the_cohort_table(run, images, tmp_path):
    code, out, _ = run("inspect", images, "--out", tmp_path / "cohort.csv", "--jobs", 1)
    assert code == 0 and "K-soft" in out and "most common protocol" in out
    table = pd.read_csv(tmp_path / "cohort.csv")
    assert sorted(table["kernel"]) == ["K-sharp", "K-soft"] and table["f50_per_mm"].notna().all()


def test_json_is_json(run, images):
    code, out, _ = run("inspect", images, "--json", "--jobs", 1)
    assert code == 0 and len(json.loads(out)) == 2
    assert {m["method"] for m in json.loads(run("methods", "--json")[1])} >= {"identity", "histogram", "mtf-ratio"}


def test_methods_says_what_each_is_fitted_on_and_needs(run):
    rows = {row["method"]: row for row in json.loads(run("methods", "--json")[1])}
    assert rows["choe"]["fitted on"] == "pairs" and rows["choe"]["sizes"] == "paper, compact"
    assert rows["cyclegan"]["fitted on"] == "unpaired images" and rows["histogram"]["fitted on"] == "target images"
    assert rows["mtf-ratio"]["needs"] == "source MTF, measured or given"
    assert rows["radiomic-gan"]["needs"] == "feature weights"


def test_methods_shows_the_settings_of_one(run):
    rows = {row["setting"]: row for row in json.loads(run("methods", "choe", "--json")[1])}
    assert rows["channels"] == {"setting": "channels", "default": "64", "compact": "32"}
    code, _, words = run("methods", "choo")
    assert code == 2 and "no method 'choo'" in words


def test_a_model_fitted_on_pairs_brings_the_images_closer(run, images, tmp_path):
    for fit in ("ratio", "wiener", "fir"):
        model = tmp_path / fit
        code, _, _ = run(
            "fit",
            "mtf-ratio",
            "--out",
            model,
            "--source",
            images / "sharp",
            "--target",
            images / "soft",
            "--set",
            f"fit={fit}",
        )
        assert code == 0
        code, _, _ = run("harmonize", images / "sharp", tmp_path / f"out-{fit}", "--model", model, "--jobs", 1)
        assert code == 0
        table = tmp_path / "quality.csv"
        code, out, _ = run(
            "evaluate",
            "--reference",
            images / "soft",
            "--images",
            images / "sharp",
            tmp_path / f"out-{fit}",
            "--out",
            table,
        )
        assert code == 0 and "PSNR dB" in out
        quality = pd.read_csv(table)
        mean = quality[(quality.slice == "mean") & (quality.region == "body")].set_index("images")["psnr_db"]
        assert mean[str(tmp_path / f"out-{fit}")] > mean[str(images / "sharp")] + 3


def test_like_another_image_needs_no_fit(run, images, tmp_path):
    code, out, _ = run(
        "harmonize",
        images,
        tmp_path / "out",
        "--model",
        "mtf-ratio",
        "--like",
        images / "sharp",
        "--qc",
        tmp_path / "qc.json",
        "--jobs",
        1,
    )
    assert code == 0 and "2 series done" in out
    qc = json.loads((tmp_path / "qc.json").read_text())["series"]
    assert {row["patient"] for row in qc} == {"soft", "sharp"} and all("f50_per_mm" in row for row in qc)


def test_the_target_may_be_named_by_its_protocol(run, images, tmp_path):
    code, out, _ = run(
        "harmonize", images, tmp_path / "out", "--model", "histogram", "--target-protocol", "K-soft", "--jobs", 1
    )
    assert code == 0 and "2 series done" in out
    code, _, err = run("harmonize", images, tmp_path / "o2", "--model", "histogram", "--target-protocol", "K-none")
    assert code == 2 and "K-sharp" in err and "K-soft" in err


def test_measured_curves_make_a_model_without_images(run, images, tmp_path):
    for name in ("soft", "sharp"):
        assert run("measure", images / name, "--out", tmp_path / f"{name}.csv")[0] == 0
    code, _, _ = run(
        "fit",
        "mtf-ratio",
        "--out",
        tmp_path / "model",
        "--source-mtf",
        tmp_path / "sharp.csv",
        "--target-mtf",
        tmp_path / "soft.csv",
    )
    assert code == 0
    assert run("harmonize", images / "sharp", tmp_path / "out", "--model", tmp_path / "model", "--jobs", 1)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "{t}/nothing"], "no file or folder"),
        (["inspect", "{t}/empty"], "no CT series"),
        (["nonsense"], "No such command"),
        (["harmonize", "{i}"], "Missing argument"),
        (["harmonize", "{i}", "{t}/o", "--model", "mtf-ratio"], "--like"),
        (["harmonize", "{i}", "{t}/o", "--model", "stan"], "there are"),
        (["harmonize", "{i}", "{t}/o", "--model", "./stan"], "no model at"),
        (["harmonize", "{i}", "{i}/o", "--model", "identity"], "outside of it"),
        (["harmonize", "{i}", "{t}/o", "--model", "mtf-ratio", "--like", "{i}/soft", "--set", "fit=best"], "one of"),
        (["harmonize", "{i}", "{t}/o", "--model", "identity", "--source-mtf", "{t}/none.csv"], "none.csv"),
        (["fit", "mtf-ratio", "--out", "{t}/m", "--source", "{i}/soft"], "--target"),
        (
            ["fit", "mtf-ratio", "--out", "{t}/m", "--source", "{i}/soft", "--target", "{i}/sharp", "--set", "x"],
            "KEY=VALUE",
        ),
        (["evaluate", "--reference", "{i}/soft", "--images", "{i}/sharp", "--hu-range", "wide"], "LOW,HIGH"),
        (["evaluate", "--reference", "{i}/soft", "--images", "{i}/sharp", "--out", "{t}/no/x.csv"], "{t}/no"),
        (["inspect", "{i}", "--spacing-mm", "-1"], "above 0"),
        (["inspect", "{i}", "--jobs", "0"], "at least 1"),
        (["inspect", "{i}", "--jobs", "1", "--out", "{t}/table.xlsx"], ".csv or .parquet"),
        (["simulate", "duk", "--out", "{t}/trial"], "did you mean duke"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, images, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    code, _, err = run(*[a.format(t=tmp_path, i=images) for a in arguments])
    assert code == 2, err
    assert (
        words.format(t=tmp_path) in err
        and "None" not in err
        and len(err.strip().splitlines()) == 1
        and err.startswith("harmonict: ")
    )


def test_some_failed_series_give_exit_code_1(run, images, tmp_path):
    broken = make_ct_series(tmp_path / "in" / "broken", patient="broken")
    broken[1].write_bytes(broken[1].read_bytes()[:-400])
    write_volume(toy_series(), tmp_path / "in" / "fine.nrrd")
    code, out, _ = run("harmonize", tmp_path / "in", tmp_path / "out", "--model", "identity", "--jobs", 1)
    assert code == 1 and "FAILED broken" in out and "1 series done, 1 failed" in out


def test_slicewise_takes_images_that_form_no_volume(run, tmp_path):
    series = toy_series(slices=2)
    make_ct_series(
        tmp_path / "in", hu=series.hu, signed=True, intercept=0, spacing_mm=(339.0, 1.2, 1.2), SliceThickness="1"
    )
    code, out, err = run("harmonize", tmp_path / "in", tmp_path / "out", "--model", "identity", "--jobs", 1)
    assert code == 2 and "--slicewise" in out + err
    code, out, _ = run(
        "harmonize", tmp_path / "in", tmp_path / "out", "--model", "identity", "--slicewise", "--jobs", 1
    )
    assert code == 0 and len(list((tmp_path / "out").rglob("*.dcm"))) == 2
