"""CycleGAN: both directions in one model, learned without a pair, and what is no two domains is refused."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.core.geometry import Geometry
from harmonict.data import cohort_pairs, pair_series, unpaired_series
from harmonict.harmonizer import make_config
from harmonict.methods import load_model
from harmonict.methods.cyclegan import Config, CycleGAN, ResNet, discriminator, from_pool
from harmonict.train import Run
from harmonict.two_way import texture_db
from harmonict.volumes import write_volume
from toy import toy_series

SHARP = toy_series(blur_mm=0.8, seed=3, slices=4, noise_hu=40, kernel="B70", size=128)
SOFT = toy_series(blur_mm=1.6, seed=5, slices=4, noise_hu=10, kernel="B30", size=128, name="other")
SMALL = {
    "channels": 8,
    "blocks": 1,
    "discriminator_channels": 8,
    "residual": True,
    "rate": 1e-3,
    "patch": 64,
    "batch": 2,
    "steps": 6,
    "check_every": 3,
}


def fit(pairs, folder=None, **changes):
    run = Run(folder, say=lambda line: None)
    return CycleGAN(make_config(Config, {**SMALL, **changes})).fit(pairs, run)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cyclegan") / "run"
    return fit(unpaired_series([SHARP], [SOFT]), folder), folder


def losses(folder, name):
    with (folder / "log.csv").open() as stream:
        return [float(row[3]) for row in csv.reader(stream) if row[2] == name]


def test_it_drives_cycle_and_identity_on_eight_slices_under_a_tenth_of_their_start(tmp_path):
    """The generators without a residual start far from their input, so there is a way to go."""
    eight = [replace(s, hu=np.concatenate([s.hu, s.hu[:, ::-1]])) for s in (SHARP, SOFT)]
    fit(
        unpaired_series(*([s] for s in eight)),
        tmp_path / "run",
        residual=False,
        steps=150,
        patch=32,
        blocks=0,
        rate=3e-3,
    )
    for name in ("cycle", "identity"):
        values = losses(tmp_path / "run", name)
        assert np.mean(values[-10:]) < 0.1 * values[0], name


def test_either_domain_can_be_the_target_and_the_two_directions_differ(fitted, tmp_path):
    model = fitted[0]
    to_soft, to_sharp = model.harmonize(SHARP), model.harmonize(SHARP, ScanProtocol(kernel="B70"))
    assert to_soft.protocol.kernel == "B30" and to_sharp.protocol.kernel == "B70"
    assert np.abs(to_soft.hu - to_sharp.hu).max() > 0.1
    model.save(tmp_path / "model")
    back = load_model(tmp_path / "model")
    assert back.domains == (SHARP.protocol, SOFT.protocol)
    back.aim(ScanProtocol(kernel="B70"))
    assert np.array_equal(back.harmonize(SHARP).hu, to_sharp.hu) and back.digest != model.digest
    back.save(tmp_path / "other way")
    assert np.array_equal(load_model(tmp_path / "other way").harmonize(SHARP).hu, to_sharp.hu)
    back.aim(ScanProtocol(kernel="B30"))
    assert np.array_equal(back.harmonize(SHARP).hu, to_soft.hu) and back.digest == model.digest


def test_a_third_protocol_and_a_model_without_weights_are_refused(fitted):
    for refused in (lambda p: fitted[0].harmonize(SHARP, p), fitted[0].aim):
        with pytest.raises(HarmonictError, match="fitted for B70 and B30, not for B50"):
            refused(ScanProtocol(kernel="B50"))
    with pytest.raises(HarmonictError, match="no weights yet"):
        CycleGAN().harmonize(SHARP)


def test_identical_domains_are_refused_in_one_line():
    with pytest.raises(HarmonictError, match=r"^domains A and B are the same, both B70: give images of two protocols$"):
        fit(unpaired_series([SHARP], [replace(SHARP, hu=SHARP.hu + 1)]))
    unknown = replace(SHARP, protocol=ScanProtocol())
    with pytest.raises(HarmonictError, match=r"^domains A and B are the same: both hold the images of toy[^\n]*$"):
        fit(unpaired_series([unknown], [replace(unknown)]))
    fit(unpaired_series([unknown], [replace(unknown, hu=unknown.hu + 1)]), steps=1)  # other images, kernel not known


def test_an_empty_domain_is_refused_in_one_line():
    with pytest.raises(HarmonictError, match=r"^no target images: both protocols need at least one series$"):
        unpaired_series([SHARP], [])
    with pytest.raises(HarmonictError, match=r"^no source images: both protocols need at least one series$"):
        unpaired_series([], [SOFT])


def test_paired_images_are_unpaired_before_they_are_learned_from():
    seen = []
    pairs = pair_series([replace(SHARP, name="x")], [replace(SOFT, name="x")])
    model = CycleGAN(make_config(Config, {**SMALL, "steps": 1}))
    found = model.meet(pairs)
    assert pairs.paired and not found.paired
    for n in range(8):
        seen += found.batch((n,), size=4, patch=64).items
    assert any(a != b for a, b in seen)


def test_pixels_outside_the_window_stay(fitted):
    outside = (SHARP.hu < -1000) | (SHARP.hu > 900)
    assert outside.any() and np.array_equal(fitted[0].harmonize(SHARP).hu[outside], SHARP.hu[outside])


def test_a_residual_generator_starts_from_nothing_changed_and_any_size_of_slice_comes_back():
    network = ResNet(make_config(Config, SMALL))
    x = torch.rand(1, 1, 37, 50) * 2 - 1
    assert torch.equal(network(x), x)
    plain = ResNet(make_config(Config, {**SMALL, "residual": False}))(x)
    assert plain.shape == x.shape and plain.abs().max() <= 1 and not torch.allclose(plain, x, atol=0.1)


def test_the_pool_gives_new_images_until_it_is_full_and_then_half_earlier_ones():
    pool, generator = {}, torch.Generator().manual_seed(0)
    fresh = torch.arange(400.0).view(400, 1, 1, 1)
    given = torch.cat([from_pool(pool, "a", fresh[n : n + 2], 50, generator) for n in range(0, 400, 2)])[:, 0, 0, 0]
    assert torch.equal(given[:50], fresh[:50, 0, 0, 0])
    earlier = given[50:] < fresh[50:, 0, 0, 0]
    assert 0.4 < earlier.float().mean() < 0.6 and len(pool["a"]) == 50
    assert torch.equal(from_pool({}, "a", fresh[:3], 0, generator), fresh[:3])


def test_the_state_of_the_best_check_is_kept(tmp_path):
    """Three patients a domain; the score of the kept state is the least of all checks."""
    a, b = (
        [replace(series, patient=f"{side}{n}", name=f"{side}{n}", hu=series.hu + n) for n in range(2)]
        for side, series in (("a", SHARP), ("b", SOFT))
    )
    pairs = unpaired_series(a, b).split(np.random.default_rng(0))
    model = fit(pairs, tmp_path / "run", steps=8, check_every=2, patch=32)
    scores = losses(tmp_path / "run", "unpaired score dB")
    kept = model.card["unpaired_validation"]
    assert len(scores) == 4 and kept["score_db"] == pytest.approx(min(scores))
    assert kept["kept_step"] == 2 * (1 + int(np.argmin(scores)))
    again = fit(pairs, None, steps=8, check_every=8, patch=32)
    last = {key: value for key, value in again.a2b.state_dict().items()}
    same = all(torch.equal(value, last[key]) for key, value in model.a2b.state_dict().items())
    assert same == (kept["kept_step"] == 8)


def test_a_texture_gap_is_zero_for_the_same_noise_and_six_db_for_twice_the_noise():
    rng = np.random.default_rng(0)
    flat = [torch.from_numpy(rng.normal(40, 10, (1, 1, 80, 80)).astype(np.float32)) for _ in range(8)]
    other = [torch.from_numpy(rng.normal(0, 10, (1, 1, 80, 80)).astype(np.float32)) for _ in range(8)]
    assert texture_db(flat, other) < 0.5
    assert texture_db([2 * image for image in flat], other) == pytest.approx(6.02, abs=0.5)


def test_the_papers_size_has_its_parameters_and_does_a_step_and_a_slice():
    c = 64
    resnet = 49 * c + c + 9 * 2 * c * c + 2 * c + 9 * 8 * c * c + 4 * c + 6 * 2 * (9 * 16 * c * c + 4 * c)
    resnet += 9 * 8 * c * c + 2 * c + 9 * 2 * c * c + c + 49 * c + 1
    assert sum(p.numel() for p in ResNet(Config()).parameters()) == resnet == 7_825_153
    assert sum(p.numel() for p in discriminator(64).parameters()) == 2_762_689
    model = fit(unpaired_series([SHARP], [SOFT]), **{k: getattr(Config(), k) for k in SMALL if k != "steps"}, steps=1)
    assert model.harmonize(replace(SHARP, hu=SHARP.hu[:1])).hu.shape == (1, 128, 128)


def test_other_pixels_than_those_of_the_training_are_said(fitted):
    wide = replace(SHARP, geometry=Geometry((0.0, 0.0, 0.0), (3.0, 1.5, 1.5)))
    assert fitted[0].describe(SHARP).outside == ()
    assert "trained on pixels of 1.2 mm" in fitted[0].describe(wide).outside[0]


# -- a trial with renditions that are for scoring only -----------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Two patients of each vendor to train on, and one that was scanned by both, to score by."""
    folder = tmp_path_factory.mktemp("trial")
    rows = []
    for patient, kernel, split in (
        ("ge-1", "LUNG", "train"),
        ("ge-2", "LUNG", "train"),
        ("si-1", "Bl64", "train"),
        ("si-2", "Bl64", "train"),
        ("both", "LUNG", "score"),
        ("both", "Bl64", "score"),
    ):
        blur = 0.8 if kernel == "LUNG" else 1.4
        series = toy_series(blur_mm=blur, noise_hu=20, slices=2, size=96, seed=len(rows), kernel=kernel)
        path = folder / f"{patient}-{kernel}.nii.gz"
        write_volume(series, path)
        rows.append({"path": str(path), "patient": patient, "kernel": kernel, "split": split})
        rows[-1]["role"] = "target" if kernel == "Bl64" else "source"
    return folder, rows


def learn(folder: Path, rows):
    table = pd.DataFrame(rows)
    for name, value in (("series", ""), ("format", "nifti"), ("state", "done")):
        table[name] = value
    table.to_csv(folder / "cohort.csv", index=False)
    pairs = cohort_pairs(folder / "cohort.csv", target="Bl64", rng=np.random.default_rng(0), unpaired=True)
    return pairs, fit(pairs, steps=3)


def test_training_never_reads_what_is_for_scoring_only(trial, tmp_path):
    folder, rows = trial
    shutil.copytree(folder, tmp_path / "t")
    rows = [{**row, "path": str(tmp_path / "t" / Path(row["path"]).name)} for row in rows]
    pairs, whole = learn(tmp_path / "t", rows)
    assert pairs.subjects + pairs.held_out.subjects and "both" not in pairs.subjects + pairs.held_out.subjects
    scored = [Path(row["path"]) for row in rows if row["split"] == "score"]
    scored[0].unlink()
    scored[1].write_bytes(b"poison")
    without = learn(tmp_path / "t", rows)[1]
    assert without._weights() == whole._weights()
    read = [dict(row, split="train") for row in rows]  # the test can fail: with the rows in the training it differs
    shutil.copy(folder / scored[0].name, scored[0]), shutil.copy(folder / scored[1].name, scored[1])
    assert learn(tmp_path / "t", read)[1]._weights() != whole._weights()


def test_a_table_with_one_domain_is_refused_in_one_line(trial, tmp_path):
    rows = trial[1]
    one = [row for row in rows if row["kernel"] == "LUNG" and row["split"] == "train"]
    with pytest.raises(HarmonictError, match=r"^no series to train on has the protocol Bl64; there are: LUNG[^\n]*$"):
        learn(tmp_path, one)
    other = [row for row in rows if row["kernel"] == "Bl64" and row["split"] == "train"]
    with pytest.raises(HarmonictError, match=r"no source series beside the target Bl64[^\n]*$"):
        learn(tmp_path, other)
