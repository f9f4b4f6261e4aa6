"""Pairs of slices: which slices go together, what a batch holds, and what is never read."""

import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from harmonict import data
from harmonict.core import Geometry, HarmonictError, ScanProtocol, Series
from harmonict.core.cohort import cohort_table, write_cohort
from harmonict.data import About, SoftTissue, cohort_pairs, pair_series
from harmonict.dicom.read import read_series
from make_dicom import make_ct_series

ALL = SoftTissue(-5000, 5000)


def series(n, *, z0=0.0, dz=3.0, name="", kernel="B30", value=0.0, pixel=0.7, **fields):
    hu = np.full((n, 8, 8), value, np.float32) + np.arange(n, dtype=np.float32)[:, None, None]
    return Series(hu, Geometry((0.0, 0.0, z0), (dz, pixel, pixel)), ScanProtocol(kernel=kernel), name=name, **fields)


def test_slices_pair_by_position_where_the_stacks_overlap():
    pairs = pair_series([series(4, z0=0)], [series(4, z0=6, value=100)])
    assert [(p.source[0, 0], p.target[0, 0]) for p in pairs] == [(2, 100), (3, 101)]


def test_a_thin_stack_pairs_with_a_thick_one_only_at_common_positions():
    pairs = pair_series([series(7, dz=1.0)], [series(3, dz=3.0, value=100)])
    assert [p.source[0, 0] for p in pairs] == [0, 3, 6]


def test_several_series_pair_by_name():
    pairs = pair_series([series(1, name="a"), series(1, name="b")], [series(1, name="b", value=9)])
    assert len(pairs) == 1 and pairs[0].target[0, 0] == 9


def test_padding_of_either_side_is_not_measured():
    padding = np.zeros((1, 8, 8), bool)
    padding[0, 0] = True
    pair = pair_series([series(1, padding=padding)], [series(1)])[0]
    assert not pair.measured[0].any() and pair.measured[1:].all()


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (series(2), series(2, pixel=0.8), "spacing-mm"),
        (series(2, z0=0), series(3, z0=500), "no pairs"),
    ],
)
def test_what_is_no_pair_is_refused_in_words(source, target, words):
    with pytest.raises(HarmonictError, match=words):
        pair_series([source], [target])


def test_the_target_protocol_is_what_all_targets_share():
    targets = [series(1, name=n, kernel="B70") for n in "ab"]
    assert pair_series([series(1, name=n) for n in "ab"], targets).target_protocol.kernel == "B70"


def test_whole_series_are_cut_down_to_the_slices_that_pair():
    pairs = pair_series([series(4, z0=0)], [series(4, z0=6, value=100)])
    ((source, target),) = pairs.whole_series()
    assert source.hu[:, 0, 0].tolist() == [2, 3] and target.hu[:, 0, 0].tolist() == [100, 101]
    assert source.is_volume and np.allclose(source.slice_positions_mm, target.slice_positions_mm)
    ((thin, thick),) = pair_series([series(7, dz=1.0)], [series(3, dz=3.0)]).whole_series()
    assert not thin.is_volume and thin.slice_positions_mm.tolist() == [0, 3, 6] and thick.is_volume


# -- batches ---------------------------------------------------------------------------------------------------------


def texture(patient, *, kernel="sharp", blur=0.0, seed=None, size=48, slices=2, padding=None):
    rng = np.random.default_rng(zlib.crc32(patient.encode()) if seed is None else seed)
    hu = rng.normal(0, 60, (slices, size, size))
    if blur:
        hu = ndimage.gaussian_filter(hu, (0, blur, blur))
    return Series(
        hu.astype(np.float32),
        Geometry((0.0, 0.0, 0.0), (3.0, 0.7, 0.7)),
        ScanProtocol(kernel=kernel),
        padding,
        name=patient,
        patient=patient,
    )


def texture_pairs(*patients):
    return pair_series([texture(p) for p in patients], [texture(p, kernel="soft", blur=1.0) for p in patients])


def same(a, b):
    return torch.equal(a.source, b.source) and torch.equal(a.target, b.target) and a.items == b.items


def test_the_same_seed_gives_the_same_batch_whatever_was_drawn_before():
    pairs = texture_pairs("a", "b", "c")
    forward = [pairs.batch((0, step), size=3, patch=16) for step in range(4)]
    backward = [texture_pairs("a", "b", "c").batch((0, step), size=3, patch=16) for step in reversed(range(4))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert not same(forward[0], forward[1]) and not same(forward[0], pairs.batch((1, 0), size=3, patch=16))
    noise = [torch.rand(3, generator=batch.generator) for batch in (forward[0], backward[0], forward[1])]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


@pytest.mark.parametrize("patch", [16, None])
def test_source_and_target_are_cut_turned_and_shifted_together(patch):
    source = texture("a")
    pairs = pair_series([source], [source.with_hu(source.hu + 1000, protocol=ScanProtocol(kernel="plus"))])
    seen = set()
    for step in range(8):
        batch = pairs.batch((0, step), size=2, patch=patch, tissue=SoftTissue(-5000, 5000))
        assert torch.allclose(batch.target - batch.source, torch.tensor(1000.0), atol=1e-3)
        assert batch.source.shape[1:] == ((1, 16, 16) if patch else (1, 48, 48)) and batch.source.dtype == torch.float32
        seen |= {float(image[0, 0, 0]) for image in batch.source}
    assert len(seen) > 8
    plain = pairs.batch((0, 0), size=1, augment=False)
    assert any(np.array_equal(plain.source[0, 0].numpy(), hu) for hu in source.hu)


def test_what_a_shift_brings_in_over_the_edge_is_not_measured():
    batch = texture_pairs("a").batch((0, 3), size=8)
    assert not batch.measured.all() and batch.measured.float().mean() > 0.2
    for image, seen in zip(batch.source[:, 0].numpy(), batch.measured[:, 0].numpy(), strict=True):
        assert len(np.unique(image[seen])) == seen.sum()  # nothing is there twice


def test_patches_show_enough_soft_tissue():
    source = texture("a", size=64)
    half = source.with_hu(np.where(np.arange(64) < 32, source.hu, np.float32(-3000)))
    batch = pair_series([half], [half]).batch((0, 0), size=16, patch=16, tissue=SoftTissue(-1000, 900, 0.7))
    assert ((batch.source > -1000).float().mean((1, 2, 3)) >= 0.7).all()
    empty = source.with_hu(np.full_like(source.hu, -3000))
    with pytest.raises(HarmonictError, match="no patch of 16 pixels with 70%"):
        pair_series([empty], [empty]).batch((0, 0), size=1, patch=16)


def test_padding_is_filled_in_batches_and_marked():
    padding = np.zeros((2, 48, 48), bool)
    padding[:, :, :8] = True
    source = texture("a", padding=padding)
    source = source.with_hu(np.where(padding, np.float32(-2048), source.hu))
    batch = pair_series([source], [texture("a", kernel="soft")]).batch((0, 0), size=2, augment=False)
    assert batch.source.min() > -1000 and not batch.source_measured[..., :8].any() and batch.target_measured.all()
    assert torch.equal(batch.measured, batch.source_measured)


def test_what_a_method_says_of_a_source_comes_with_every_batch_of_it():
    pairs = texture_pairs("a", "b")
    batch = pairs.batch((0, 0), size=6, patch=16, describe=lambda scan: About(scan.pixel_mm, note=scan.patient))
    assert [about.note for about in batch.about] == [pairs[n].patient for n, _ in batch.items]
    assert {about.note for about in batch.about} == {"a", "b"}


def test_unpaired_is_the_same_slices_with_the_targets_shuffled():
    pairs = texture_pairs(*"abcdef")
    shuffled = pairs.shuffled()
    assert len(shuffled) == len(pairs) and not shuffled.paired
    targets = lambda ps: sorted(float(p.target[0, 0]) for p in ps)  # noqa: E731
    assert targets(shuffled) == targets(pairs)
    assert [float(p.source[0, 0]) for p in shuffled] == [float(p.source[0, 0]) for p in pairs]
    assert sum(np.array_equal(a.target, b.target) for a, b in zip(shuffled, pairs, strict=True)) < len(pairs) / 2
    items = shuffled.batch((0, 0), size=8, patch=16).items
    assert any(n != m for n, m in items)
    train = shuffled.split(np.random.default_rng(0))
    assert not set(train.subjects) & set(train.held_out.subjects)


def test_patients_never_cross_a_split():
    pairs = texture_pairs(*"abcdefgh")
    for seed in range(10):
        train = pairs.split(np.random.default_rng(seed), share=0.25)
        assert not set(train.subjects) & set(train.held_out.subjects)
        assert {p.patient for p in train} | {p.patient for p in train.held_out} == set("abcdefgh")
        assert len(train.held_out.subjects) == 2 and len(train) + len(train.held_out) == len(pairs)
    with pytest.raises(HarmonictError, match="too few patients"):
        texture_pairs("a").split(np.random.default_rng(0))


# -- cohort tables ---------------------------------------------------------------------------------------------------


def write_trial(root, rows):
    """A cohort of DICOM series of 48 x 48 pixels; each row: patient, kernel, and what else differs."""
    table = []
    for number, row in enumerate(rows):
        thickness = row.get("thickness", 1.0)
        pixel = row.get("pixel", 0.7)
        count = row.get("slices") or round(6 / thickness)
        folder = root / f"{row['patient']}-{row['kernel']}-{number}"
        first = thickness / 2  # every stack begins at 0 mm
        z = first + thickness * np.arange(count)
        hu = 100 * z[:, None, None] + np.random.default_rng(number).normal(0, 20, (count, 48, 48))
        make_ct_series(
            folder,
            hu=np.round(hu),
            signed=True,
            intercept=0,
            spacing_mm=(thickness, pixel, pixel),
            origin_mm=(0.0, 0.0, first),
            patient=row["patient"],
            kernel=row["kernel"],
            series_uid=f"1.2.3.{number}",
        )
        table.append(
            {
                "path": str(folder),
                "patient": row["patient"],
                "series": f"1.2.3.{number}",
                "format": "dicom",
                "role": row.get("role", "source"),
                "kernel": row["kernel"],
                "slice_thickness_mm": thickness,
                "model": "truth" if row.get("role") == "truth" else "M",
                "state": "found",
                "subject": row.get("subject", row["patient"]),
                "split": row.get("split", "train"),
            }
        )
    write_cohort(cohort_table(table), root / "cohort.csv")
    return root / "cohort.csv"


def found(cohort, target="Bl64", **options):
    return cohort_pairs(cohort, target=target, rng=np.random.default_rng(0), **options)


def everything(pairs):
    return [*pairs, *pairs.held_out]


TRIAL = [
    {"patient": p, "kernel": k, "role": "target" if k == "Bl64" else "source"}
    for p in ("p1", "p2", "p3")
    for k in ("Br40", "Bl57", "Bl64")
]


def test_every_source_of_a_patient_pairs_with_the_target_of_that_patient(tmp_path):
    pairs = found(write_trial(tmp_path, TRIAL))
    assert len(pairs) + len(pairs.held_out) == 3 * 2 * 6
    assert pairs.target_protocol.kernel == "Bl64"
    assert {p.source_protocol.kernel for p in everything(pairs)} == {"Br40", "Bl57"}
    assert all(abs(p.source.mean() - p.target.mean()) < 5 for p in everything(pairs))  # 100 HU a mm: the same slice
    only = found(tmp_path / "cohort.csv", sources=["Br40"])
    assert {p.source_protocol.kernel for p in everything(only)} == {"Br40"}


def test_nothing_of_the_test_and_score_patients_is_read(tmp_path):
    forbidden = [{**row, "patient": split, "split": split} for row in TRIAL[:3] for split in ("test", "score")]
    cohort = write_trial(tmp_path, [*TRIAL, *forbidden])
    for folder in [f for f in tmp_path.iterdir() if f.name.startswith(("test", "score"))]:
        for file in folder.iterdir():
            file.unlink()
            file.symlink_to(file)  # opening it is an error, whoever tries
    pairs = found(cohort)
    assert pairs.left_out == [] and {*pairs.subjects, *pairs.held_out.subjects} == {"p1", "p2", "p3"}
    for step in range(3):
        pairs.batch((0, step), size=4, patch=16, tissue=ALL)
    table = pd.read_csv(cohort)
    write_cohort(table.assign(split="score"), cohort)
    with pytest.raises(HarmonictError, match=r"split must be 'train'.*score"):
        found(cohort)


def test_two_models_of_one_subject_stay_on_one_side(tmp_path):
    rows = [
        {"patient": p + model, "subject": p, "kernel": k, "role": "target" if k == "Bl64" else "source"}
        for p in ("s1", "s2")
        for model in "ab"
        for k in ("Br40", "Bl64")
    ]
    pairs = found(write_trial(tmp_path, rows))
    sides = [{p.patient[:2] for p in side} for side in (pairs, pairs.held_out)]
    assert sorted(len(side) for side in sides) == [1, 1] and sides[0] != sides[1]
    assert {p.patient for p in pairs} in ({"s1a", "s1b"}, {"s2a", "s2b"})


def test_a_batch_reads_its_own_slices_and_nothing_else(tmp_path, monkeypatch):
    pairs = found(write_trial(tmp_path, TRIAL))
    data._slice.cache_clear()
    read = []
    monkeypatch.setattr(data, "read_series", lambda files, **o: read.extend(files) or read_series(files, **o))
    pairs.batch((0, 0), size=2, patch=16, tissue=ALL)
    assert 2 <= len(read) <= 4


@pytest.mark.parametrize(("thickness", "offset_mm", "per_target"), [(0.5, 0.25, 6), (1.5, 0.25, 4), (3.0, 0.0, 2)])
def test_other_thicknesses_pair_on_the_targets_slices(tmp_path, thickness, offset_mm, per_target):
    rows = [
        {"patient": p, "kernel": k, "role": role, "thickness": t}
        for p in ("p1", "p2")
        for k, role, t in (("Br40", "source", thickness), ("Bl64", "target", 1.0))
    ]
    cohort = write_trial(tmp_path, rows)
    nearest = everything(found(cohort))
    assert len(nearest) == 2 * per_target
    assert all(abs(abs(p.source.mean() - p.target.mean()) - 100 * offset_mm) < 5 for p in nearest)
    linear = everything(found(cohort, along_z="linear"))
    assert all(abs(p.source.mean() - p.target.mean()) < 5 for p in linear) and len(linear) >= len(nearest)
    if offset_mm:  # the mean of neighbours is less noisy: the reason why it is not the default
        assert np.mean([p.source.std() for p in linear]) < 0.85 * np.mean([p.source.std() for p in nearest])


MIXED = [*TRIAL[:6], *({**row, "pixel": 0.9} for row in TRIAL[6:])]


def test_mixed_pixel_sizes_are_seen_in_those_of_most_targets_or_in_the_one_asked_for(tmp_path):
    cohort = write_trial(tmp_path, MIXED)
    pairs = found(cohort, resample=True)
    assert {p.pixel_mm for p in everything(pairs)} == {(0.7, 0.7)}
    assert {p.source.shape for p in everything(pairs)} == {(48, 48), (62, 62)}  # 48 * 0.9 / 0.7
    assert all(abs(p.source.mean() - p.target.mean()) < 5 for p in everything(pairs))
    of_both = [part for side in (pairs, pairs.held_out) for part in side.resampled()]
    assert of_both == [{"from_mm": 0.9, "to_mm": 0.7, "series": 3}]
    assert pairs.batch((0, 0), size=4, patch=24, tissue=ALL).source.shape == (4, 1, 24, 24)
    wide = found(cohort, resample=True, pixel_mm=1.4)
    assert {p.pixel_mm for p in everything(wide)} == {(1.4, 1.4)}
    alike = found(write_trial(tmp_path / "one", TRIAL))
    assert len({(p.digest, p.held_out.digest) for p in (pairs, wide, alike)}) == 3


def test_a_resampled_slice_and_a_resampled_series_are_the_same_and_read_when_asked_for(tmp_path, monkeypatch):
    pairs = found(write_trial(tmp_path, MIXED), resample=True)
    data._slice.cache_clear()
    data._resampled_slice.cache_clear()
    read = []
    monkeypatch.setattr(data, "read_series", lambda files, **o: read.extend(files) or read_series(files, **o))
    scan = next(s for side in (pairs, pairs.held_out) for s in side.scans[0] if s.resampled_from_mm)
    assert read == []
    hu, _ = scan.slice(2)
    assert len(read) == 1 and scan.slice(2)[0] is hu and len(read) == 1
    assert scan.shape == (6, 62, 62) and hu.shape == (62, 62)
    series = scan.read()
    assert np.array_equal(series.hu[2], hu) and series.geometry == scan.geometry and series.pixel_mm == (0.7, 0.7)


def test_series_in_memory_are_resampled_to_pair():
    kinds = {"name": "a", "pixel": 0.9}, {"name": "b", "pixel": 0.6}
    sources, targets = ([series(3, **k, kernel=kernel) for k in kinds] for kernel in ("B30", "B70"))
    pairs = pair_series(sources, targets, pixel_mm=(0.6, 0.6))
    assert {p.pixel_mm for p in pairs} == {(0.6, 0.6)} and pairs.resampled()[0]["series"] == 2
    pairs.check_spacings()
    with pytest.raises(HarmonictError, match=r"mixed spacings: pixels of 0.6 mm \(b\) and 0.9 mm \(a\).*--resample"):
        pair_series(sources, targets).check_spacings()


def test_truth_as_the_target_is_that_of_the_sources_own_thickness(tmp_path):
    rows = [
        {"patient": p, "kernel": "Br40" if role == "source" else "none", "role": role, "thickness": t}
        for p in ("p1", "p2")
        for role in ("source", "truth")
        for t in (1.0, 3.0)
    ]
    pairs = everything(found(write_trial(tmp_path, rows), target="truth"))
    assert len(pairs) == 2 * (6 + 2) and all(p.target_protocol.model == "truth" for p in pairs)
    assert all(p.source_protocol.slice_thickness_mm == p.target_protocol.slice_thickness_mm for p in pairs)


def test_unpaired_needs_no_patient_with_both(tmp_path):
    rows = [{"patient": f"g{n}", "kernel": "LUNG"} for n in range(3)]
    rows += [{"patient": f"s{n}", "kernel": "Bl64", "role": "target"} for n in range(3)]
    cohort = write_trial(tmp_path, rows)
    with pytest.raises(HarmonictError, match="no pairs of slices for the target Bl64"):
        found(cohort)
    pairs = found(cohort, unpaired=True)
    batch = pairs.batch((0, 0), size=4, patch=16, tissue=ALL)
    assert {p.kernel for p in batch.source_protocol} == {"LUNG"} and {p.kernel for p in batch.target_protocol} == {
        "Bl64"
    }


def test_a_series_that_cannot_be_read_is_left_out_with_its_reason(tmp_path):
    cohort = write_trial(tmp_path, TRIAL)
    broken = next(f for f in tmp_path.iterdir() if f.name.startswith("p1-Br40"))
    for file in broken.iterdir():
        file.write_bytes(b"no image")
    pairs = found(cohort)
    assert len(pairs) + len(pairs.held_out) == 5 * 6
    assert len(pairs.left_out) == 1 and str(broken) in pairs.left_out[0]


@pytest.mark.parametrize(
    ("rows", "target", "words"),
    [
        (TRIAL, "B99", "no series to train on has the protocol B99; there are: Bl57 1 mm, Bl64 1 mm, Br40 1 mm"),
        (TRIAL, "truth", "no series to train on has the protocol truth"),
        (TRIAL[:3], "Bl64", "too few patients to split: 1"),
        ([*TRIAL, {**TRIAL[2], "thickness": 3.0}, {**TRIAL[0], "thickness": 2.0}], "Bl64", "ambiguous.*Bl64 3 mm"),
        ([*TRIAL[:6], *({**row, "pixel": 0.9} for row in TRIAL[6:])], "Bl64", "mixed spacings: pixels of 0.7 mm"),
        ([*TRIAL[:6], TRIAL[6], {**TRIAL[8], "pixel": 0.9}], "Bl64", "pairs must lie on one grid"),
    ],
)
def test_a_cohort_that_cannot_be_trained_on_is_refused_in_words(tmp_path, rows, target, words):
    with pytest.raises(HarmonictError, match=words):
        found(write_trial(tmp_path, rows), target=target)
