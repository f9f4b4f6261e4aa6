"""PyRadiomics' own stored baselines (`baseline_*.csv` of its test suite, versions 1.3 to 2.1), to 1e-4.

Not compared, and why: the columns `*_resampling` (PyRadiomics aligns the new grid with the image's corner and cuts the
mask by nearest neighbour; here grids share their centre and the mask is cut at one half, as IBSI asks) and the cases
lung1 and lung2 (their images are not among the data). The four mesh values of
brain1, recorded with version 2.0.1, differ by up to 0.09 % from what version 3.0.1 computes (ours equal the latter,
see benchmarks/pyradiomics_agreement.py): those are held to 0.2 %.
"""

import ast
import csv

import numpy as np
import pytest

from harmonict.radiomics import FeatureSettings, extract_features

sitk = pytest.importorskip("SimpleITK")
CASES = ("brain1", "brain2", "breast1")
OLDER_MESH = {f"original_shape_{n}" for n in ("MeshVolume", "SurfaceArea", "SurfaceVolumeRatio", "Sphericity")}
VARIANTS = ("", "_2d", "_FBN", "_combined", "_flatRegion", "_normalization", "_resegmentation")


def baselines(folder, column):
    """{family: (PyRadiomics' settings, {feature: value})} of one column, from every file that has it."""
    found = {}
    for path in sorted(folder.glob("baseline_*.csv")):
        with open(path) as file:
            rows = {row[0]: row[1:] for row in csv.reader(file)}
        names = rows.pop("featureName")
        if column in names:
            k = names.index(column)
            settings = ast.literal_eval(rows["diagnostics_Configuration_Settings"][k])
            values = {key: float(row[k]) for key, row in rows.items() if key.startswith("original_")}
            found[path.stem.removeprefix("baseline_")] = (settings, values)
    return found


def extracted(folder, case, theirs, families):
    image = sitk.ReadImage(str(folder / f"{case}_image.nrrd"))
    hu = sitk.GetArrayFromImage(image).astype(np.float64)
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{case}_label.nrrd"))) == 1
    if theirs.get("normalize"):
        hu = ((hu - hu.mean()) / hu.std(ddof=1) * theirs["normalizeScale"]).astype(np.float32)
    range_hu, sigma = None, None
    if theirs.get("resegmentMode") == "sigma":
        sigma = theirs["resegmentRange"][1]
    elif theirs.get("resegmentRange"):
        range_hu = (theirs["resegmentRange"][0], 1e6)
    settings = FeatureSettings(
        bin_width=theirs.get("binWidth", 25),
        bin_count=theirs.get("binCount"),
        dimension="2D" if theirs["force2D"] else "3D",
        merge_directions=theirs.get("weightingNorm") == "no_weighting",
        resegment_hu=range_hu,
        resegment_sigma=sigma,
        energy_shift_hu=theirs.get("voxelArrayShift", 0),
        families=tuple(families),
    )
    return extract_features(hu, mask, image.GetSpacing()[::-1], settings)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_stored_baselines_of_pyradiomics_are_met(data, case, variant):
    folder = data / "pyradiomics"
    wanted = baselines(folder, case + variant)
    assert wanted
    misses = {}
    for family, (theirs, values) in wanted.items():
        found = extracted(folder, case, theirs, [family])
        assert set(values) <= set(found)
        for name, value in values.items():
            tolerance = 2e-3 if case == "brain1" and name in OLDER_MESH else 1e-4
            if not found[name] == pytest.approx(value, rel=tolerance, abs=1e-12):
                misses[name] = (found[name], value)
    assert not misses
