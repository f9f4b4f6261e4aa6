"""Every feature value beside PyRadiomics 3.0.1's own, on its test images and on a tumour of LUNG1-001.

PyRadiomics needs an environment of its own, outside the project's:

    python3 -m venv pyrad
    pyrad/bin/pip install numpy==2.4.6 setuptools==79 wheel versioneer SimpleITK PyWavelets pykwalify six
    pyrad/bin/pip install --no-cache-dir --no-deps --no-build-isolation pyradiomics==3.0.1

Then, with the project's interpreter:

    HARMONICT_DATA=... python benchmarks/pyradiomics_agreement.py --peer pyrad/bin/python

The script writes images and masks to a temporary folder, starts itself under the other interpreter there, and compares.
A value agrees if it differs by at most 1e-6 of the peer's, or by 1e-9 in absolute terms (a constant that is 0 here and
-3e-16 there). Exit code 1 where one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SETTINGS: dict[str, dict] = {
    "3D bin width 25": {"binWidth": 25},
    "3D 32 bins": {"binCount": 32},
    "2D bin width 25": {"binWidth": 25, "force2D": True},
    "2D 32 bins": {"binCount": 32, "force2D": True},
    "3D distances 1, 2": {"binWidth": 25, "distances": [1, 2], "gldm_a": 1},
    "3D merged": {"binWidth": 25, "weightingNorm": "no_weighting"},
    "LoG bin width 25": {"binWidth": 25, "filters": ["LoG"]},
    "LoG 32 bins": {"binCount": 32, "filters": ["LoG"]},
    "wavelet bin width 25": {"binWidth": 25, "filters": ["Wavelet"]},
    "wavelet 2D 32 bins": {"binCount": 32, "force2D": True, "filters": ["Wavelet"]},
}
SIGMAS_MM = [1.0, 3.0]


def peer(folder: Path) -> None:
    """Run PyRadiomics on every case of the folder (under its own interpreter)."""
    import logging

    import SimpleITK as sitk
    from radiomics.featureextractor import RadiomicsFeatureExtractor

    logging.getLogger("radiomics").setLevel(logging.CRITICAL)
    out: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted(folder.glob("*.npz")):
        case = np.load(path)
        image, mask = sitk.GetImageFromArray(case["image"]), sitk.GetImageFromArray(case["mask"].astype(np.uint8))
        for item in (image, mask):
            item.SetSpacing(case["spacing_mm"][::-1].tolist())
        out[path.stem] = {}
        for name, options in SETTINGS.items():
            options = dict(options)
            filters = options.pop("filters", ["Original"])
            extractor = RadiomicsFeatureExtractor(additionalInfo=False, minimumROIDimensions=1, **options)
            extractor.disableAllImageTypes()
            for one in filters:
                extractor.enableImageTypeByName(one, customArgs={"sigma": SIGMAS_MM} if one == "LoG" else None)
            extractor.enableAllFeatures()
            single = options.get("force2D") and len(np.unique(np.nonzero(case["mask"])[0])) == 1
            extractor.enabledFeatures.pop("shape" if single else "shape2D", None)
            values = extractor.execute(image, mask)
            out[path.stem][name] = {k: float(v) for k, v in values.items()}
    (folder / "peer.json").write_text(json.dumps(out))


def lung1(data: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """int16 HU around LUNG1-001's GTV-1, its mask, spacing (z, y, x)."""
    from harmonict.dicom.masks import read_masks
    from harmonict.dicom.read import read_series
    from harmonict.radiomics import crop_to_mask

    series = read_series(sorted((data / "ct/LUNG1-001/image").glob("*.dcm")))
    rtstruct = next((data / "ct/LUNG1-001/rtstruct").glob("*.dcm"))
    mask = read_masks(rtstruct, series, "GTV-1")["GTV-1"]
    hu, mask = crop_to_mask(series.hu, mask, margin=20)
    return hu.astype(np.int16), mask, series.geometry.spacing_mm


def write_cases(data: Path, folder: Path) -> None:
    import SimpleITK as sitk

    for name in ("brain1", "brain2", "breast1"):
        image = sitk.ReadImage(str(data / f"pyradiomics/{name}_image.nrrd"))
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(data / f"pyradiomics/{name}_label.nrrd"))) == 1
        np.savez(folder / name, image=sitk.GetArrayFromImage(image), mask=label, spacing_mm=image.GetSpacing()[::-1])
    hu, mask, spacing = lung1(data)
    np.savez(folder / "LUNG1-001_GTV-1", image=hu, mask=mask, spacing_mm=spacing)
    middle = np.zeros_like(mask)
    best = int(mask.sum(axis=(1, 2)).argmax())
    middle[best] = mask[best]
    np.savez(folder / "LUNG1-001_GTV-1_one_slice", image=hu, mask=middle, spacing_mm=spacing)


def ours(options: dict, case: np.lib.npyio.NpzFile) -> dict[str, float]:
    from harmonict.radiomics import FeatureSettings, extract_features

    settings = FeatureSettings(
        bin_width=None if "binCount" in options else options["binWidth"],
        bin_count=options.get("binCount"),
        dimension="2D" if options.get("force2D") else "3D",
        distances=tuple(options.get("distances", (1,))),
        dependence_alpha=options.get("gldm_a", 0),
        merge_directions="weightingNorm" in options,
        filters=tuple(options.get("filters", ["Original"])),
        log_sigma_mm=tuple(SIGMAS_MM),
    )
    return extract_features(case["image"].astype(np.float32), case["mask"], tuple(case["spacing_mm"]), settings)


def compare(folder: Path) -> int:
    wanted = json.loads((folder / "peer.json").read_text())
    total = bad = 0
    print(f"{'case':28s} {'setting':24s} {'values':>7s} {'agree':>7s}  largest relative difference")
    for name, by_setting in wanted.items():
        case = np.load(folder / f"{name}.npz")
        for setting, values in by_setting.items():
            found = ours(SETTINGS[setting], case)
            only = set(found) ^ set(values)
            if only:
                bad += len(only)
                print(f"  names on one side only: {sorted(only)[:8]}")
            worst, worst_name, wrong = 0.0, "", []
            for key in set(found) & set(values):
                difference = abs(found[key] - values[key])
                relative = difference / abs(values[key]) if values[key] else difference
                if not difference <= max(1e-6 * abs(values[key]), 1e-9):
                    wrong.append((key, found[key], values[key]))
                if difference > 1e-9 and relative > worst:
                    worst, worst_name = relative, key
            total += len(values)
            bad += len(wrong)
            print(f"{name:28s} {setting:24s} {len(values):7d} {len(values) - len(wrong):7d}  {worst:.1e} {worst_name}")
            for key, a, b in wrong[:12]:
                print(f"    {key}: ours {a!r}, PyRadiomics {b!r}")
    print(f"AGREEMENT: {total - bad} of {total} values within 1e-6")
    return int(bad > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="interpreter of the environment that holds PyRadiomics")
    parser.add_argument("--run-peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_peer:
        peer(arguments.run_peer)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cases(Path(os.environ["HARMONICT_DATA"]), folder)
        subprocess.run([arguments.peer, __file__, "--run-peer", str(folder)], check=True)
        return compare(folder)


if __name__ == "__main__":
    sys.exit(main())
