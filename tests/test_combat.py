"""ComBat: neuroCombat's own numbers, and what it must do to location and scale."""

import builtins
import json
import sys

import neuroCombat
import numpy as np
import pandas as pd
import pytest

from harmonict.combat import apply_combat, fit_combat, load_combat, save_combat
from harmonict.core import HarmonictError

NAMES = [f"original_glcm_f{i}" for i in range(8)]


def make(rows=12, seed=0, kernels=("B10", "B30", "B70")) -> pd.DataFrame:
    """Rows of some kernels, each with its own shift and scale, features of very different size."""
    rng = np.random.default_rng(seed)
    unit = 10.0 ** np.arange(-2, 6)
    parts = []
    for n, kernel in enumerate(kernels):
        values = (rng.normal(0, 1 + 0.5 * n, (rows, 8)) + 2 * n * np.linspace(0.5, 1.5, 8) + 5) * unit
        part = pd.DataFrame(values, columns=NAMES)
        part.insert(0, "kernel", kernel)
        part.insert(0, "scan", f"s{n}")
        part.insert(0, "roi", "tumour")
        part.insert(0, "patient", [f"P{i}" for i in range(rows)])
        parts.append(part)
    return pd.concat(parts, ignore_index=True).sample(frac=1, random_state=3).reset_index(drop=True)


@pytest.fixture
def old_numpy(monkeypatch):
    """What neuroCombat 0.2.12 needs of NumPy 1 to run its reference batch and its application to new rows."""
    module = sys.modules["neuroCombat.neuroCombat"]
    monkeypatch.setattr(np, "int", builtins.int, raising=False)
    monkeypatch.setattr(module, "int", lambda v: builtins.int(np.asarray(v).item()), raising=False)


def theirs(table, reference=None):
    result = neuroCombat.neuroCombat(table[NAMES].to_numpy().T, table[["kernel"]], "kernel", ref_batch=reference)
    return result


@pytest.mark.parametrize("reference", [None, "B30"])
def test_rows_of_the_fit_get_the_values_of_neurocombat(old_numpy, reference):
    table = make()
    ours = apply_combat(fit_combat(table, batch="kernel", reference=reference), table)
    np.testing.assert_allclose(ours[NAMES].to_numpy(), theirs(table, reference)["data"].T, rtol=1e-10)


@pytest.mark.parametrize("reference", [None, "B70"])
def test_unseen_rows_get_the_values_of_neurocombat_from_training(old_numpy, reference):
    train, new = make(), make(seed=9, rows=5)
    estimates = theirs(train, reference)["estimates"]
    estimates["batches"] = np.array(["B10", "B30", "B70"])  # it stores numbers for the names
    expected = neuroCombat.neuroCombatFromTraining(new[NAMES].to_numpy().T, new["kernel"].to_numpy(), estimates)
    ours = apply_combat(fit_combat(train, batch="kernel", reference=reference), new)
    np.testing.assert_allclose(ours[NAMES].to_numpy(), expected["data"].T, rtol=1e-10)


def test_location_and_scale_of_the_batches_become_one():
    table = make(rows=4000)
    before = table.groupby("kernel")[NAMES]
    after = apply_combat(fit_combat(table, batch="kernel"), table).groupby("kernel")[NAMES]
    pooled = before.std().mean()
    assert (np.ptp(before.mean().to_numpy(), axis=0) / pooled > 1).all()
    assert (np.ptp(after.mean().to_numpy(), axis=0) / pooled < 0.02).all()  # what shrinkage leaves
    spread = after.std().to_numpy()
    assert np.ptp(spread / spread.mean(0), axis=0).max() < 0.02
    np.testing.assert_allclose(after.mean().mean(), table[NAMES].mean(), rtol=1e-3)


def test_the_reference_batch_stays_as_it_is_and_the_others_come_to_it():
    table = make(rows=4000)
    out = apply_combat(fit_combat(table, batch="kernel", reference="B10"), table)
    own = table["kernel"] == "B10"
    pd.testing.assert_frame_equal(out[own], table[own], check_exact=True)
    mean, sd = out.groupby("kernel")[NAMES].mean(), out.groupby("kernel")[NAMES].std()
    for kernel in ("B30", "B70"):
        assert (np.abs(mean.loc[kernel] - mean.loc["B10"]) < 0.01 * sd.loc["B10"]).all()
        np.testing.assert_allclose(sd.loc[kernel], sd.loc["B10"], rtol=0.02)


def test_order_of_rows_and_units_change_nothing():
    table = make()
    model = fit_combat(table, batch="kernel")
    turned = fit_combat(table[::-1], batch="kernel")
    np.testing.assert_allclose(turned.shift, model.shift, rtol=1e-9)
    larger = table.copy()
    larger[NAMES] *= 1000
    scaled = apply_combat(fit_combat(larger, batch="kernel"), larger)
    np.testing.assert_allclose(scaled[NAMES], 1000 * apply_combat(model, table)[NAMES], rtol=1e-9)


def test_other_columns_and_the_index_stay():
    table = make().assign(parameter_bin_width=25).set_index(["patient", "roi", "scan"])
    out = apply_combat(fit_combat(table, batch="kernel"), table)
    assert out.index.equals(table.index) and list(out.columns) == list(table.columns)
    pd.testing.assert_series_equal(out["kernel"], table["kernel"])
    by_scan = fit_combat(table, batch="scan")
    assert by_scan.batches == ("s0", "s1", "s2")
    np.testing.assert_allclose(apply_combat(by_scan, table)[NAMES], out[NAMES])


def test_a_batch_named_by_numbers_is_no_feature():
    table = make().assign(site=lambda t: t["kernel"].map({"B10": 1, "B30": 2, "B70": 3}))
    model = fit_combat(table, batch="site")
    assert model.batches == ("1", "2", "3") and model.features == tuple(NAMES)
    assert (apply_combat(model, table)["site"] == table["site"]).all()


def test_a_row_that_failed_passes_through():
    table = make()
    model = fit_combat(table, batch="kernel")
    failed = table.copy()
    failed.loc[4, NAMES] = np.nan
    out = apply_combat(model, failed)
    assert out.loc[4, NAMES].isna().all()
    pd.testing.assert_frame_equal(out.drop(4), apply_combat(model, table).drop(4))


def test_saved_estimates_are_json_and_give_the_same_numbers(tmp_path):
    table = make()
    model = fit_combat(table, batch="kernel", reference="B30")
    save_combat(model, tmp_path / "combat.json")
    assert json.loads((tmp_path / "combat.json").read_text())["batches"] == ["B10", "B30", "B70"]
    assert [p.name for p in tmp_path.iterdir()] == ["combat.json"]
    loaded = load_combat(tmp_path / "combat.json")
    pd.testing.assert_frame_equal(apply_combat(loaded, table), apply_combat(model, table))


def test_files_that_are_no_estimates_are_refused(tmp_path):
    with pytest.raises(HarmonictError, match="cannot read"):
        load_combat(tmp_path / "none.json")
    for text in ("{", "[]", '{"format": "other"}', '{"format": "harmonict-combat-1", "mean": [1]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(HarmonictError, match="holds no ComBat estimates"):
            load_combat(tmp_path / "bad.json")
    with pytest.raises(HarmonictError, match="cannot write"):
        save_combat(fit_combat(make(), batch="kernel"), tmp_path / "no" / "c.json")


def change(table, row, column, value):
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        (make().drop(make().query("kernel == 'B10'").index[1:]), {}, "batch 'B10' of 'kernel' has one row"),
        (make().assign(original_glcm_f2=3.0), {}, "'original_glcm_f2' is constant in batch 'B10'"),
        (make().assign(original_glcm_f1=lambda t: t["original_glcm_f1"].where(t["kernel"] != "B30", 1.0)), {}, "B30"),
        (change(make(), 3, "original_glcm_f5", np.nan), {}, "'original_glcm_f5' is NaN"),
        (make(kernels=("B10",)), {}, "two batches"),
        (make(), {"reference": "Br40"}, "reference batch 'Br40' is not among the batches: B10, B30, B70"),
        (make().drop(columns=NAMES[1:]), {}, "at least two"),
        (make(), {"batch": "vendor"}, "no column 'vendor'"),
        (change(make(), 3, "kernel", None), {}, "1 rows of the feature table have no batch"),
    ],
)
def test_what_combat_cannot_fit_is_refused_in_words(table, arguments, message):
    with pytest.raises(HarmonictError, match=message):
        fit_combat(table, **({"batch": "kernel"} | arguments))


def test_what_a_fit_does_not_know_is_refused_in_words():
    model = fit_combat(make(), batch="kernel")
    with pytest.raises(HarmonictError, match="batch 'Br40' of 'kernel' was not in the ComBat fit, which knows B10"):
        apply_combat(model, make(kernels=("B10", "Br40")))
    with pytest.raises(HarmonictError, match="1 are missing from the table, 0 were not fitted"):
        apply_combat(model, make().drop(columns=NAMES[3]))
    with pytest.raises(HarmonictError, match="0 are missing from the table, 1 were not fitted"):
        apply_combat(model, make().assign(original_glcm_new=1.0))
    with pytest.raises(HarmonictError, match="NaN"):
        apply_combat(model, change(make(), 0, NAMES[0], np.nan))
