"""All 1,804 IBSI-1 reference values beside ours; writes the compliance table of docs/ibsi-compliance.md.

    HARMONICT_DATA=... python benchmarks/ibsi_compliance.py [--write docs/ibsi-compliance.md]

A value is met if it lies within the table's tolerance or equals the reference after rounding to the digits printed.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np

from harmonict.radiomics import FeatureSettings, ibsi_features

CONFIGURATIONS: dict[str, FeatureSettings] = {
    "digital_phantom": FeatureSettings(bin_width=None),
    "ct_phantom_A": FeatureSettings(bin_width=25, dimension="2D", resegment_hu=(-500, 400)),
    "ct_phantom_B": FeatureSettings(bin_count=32, dimension="2D", resample_mm=(0, 2, 2), resegment_hu=(-500, 400)),
    "ct_phantom_C": FeatureSettings(bin_width=25, resample_mm=(2, 2, 2), resegment_hu=(-1000, 400), ivh_bin_width=2.5),
    "ct_phantom_D": FeatureSettings(bin_count=32, resample_mm=(2, 2, 2), resegment_sigma=3),
    "ct_phantom_E": FeatureSettings(
        bin_count=32,
        resample_mm=(2, 2, 2),
        resample_order=3,
        resegment_hu=(-1000, 400),
        resegment_sigma=3,
        ivh_bin_count=1000,
    ),
}
FAMILIES = {
    "morph": "morphology",
    "loc": "local intensity",
    "stat": "statistics",
    "ih": "intensity histogram",
    "ivh": "intensity-volume histogram",
    "cm": "GLCM",
    "rlm": "GLRLM",
    "szm": "GLSZM",
    "dzm": "GLDZM",
    "ngt": "NGTDM",
    "ngl": "NGLDM",
}


def load(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Image, mask (z, y, x) and spacing of one of the two phantoms."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(folder / name / "nifti/image/phantom.nii.gz"))
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name / "nifti/mask/mask.nii.gz")))
    x, y, z = image.GetSpacing()
    return sitk.GetArrayFromImage(image).astype(np.float32), mask > 0, (z, y, x)


def met(value: float, reference: str, tolerance: str) -> bool:
    """Within tolerance, or equal once rounded to the three significant digits that the table prints."""
    if not np.isfinite(value):
        return False
    if abs(value - float(reference)) <= float(tolerance):
        return True
    printed = Decimal(reference)
    if not printed:
        return abs(value) < 5e-4
    digits = max(3, len(str(abs(float(reference))).removesuffix(".0").replace(".", "").strip("0")))
    step = Decimal(1).scaleb(printed.adjusted() - digits + 1)
    return abs(Decimal(repr(float(value))) - printed) <= step / 2


def results(data: Path) -> list[tuple[str, str, str, str, float, bool]]:
    """(configuration, tag, reference, tolerance, ours, met) for every row of the reference table."""
    with open(data / "ibsi/ibsi1_reference_values.csv") as file:
        rows = list(csv.DictReader(file))
    phantoms = {
        "digital": load(data / "ibsi", "ibsi_1_digital_phantom"),
        "ct": load(data / "ibsi", "ibsi_1_ct_radiomics_phantom"),
    }
    out = []
    for configuration, settings in CONFIGURATIONS.items():
        hu, mask, spacing = phantoms[configuration.split("_")[0]]
        dimensions = ("2D", "2.5D", "3D") if configuration == "digital_phantom" else None
        found = ibsi_features(hu, mask, spacing, settings, dimensions=dimensions)
        for row in rows:
            if row["configuration"] == configuration:
                tag, reference, tolerance = row["feature_tag"], row["reference"], row["tolerance"]
                value = found.get(tag, float("nan"))
                out.append((configuration, tag, reference, tolerance, value, met(value, reference, tolerance)))
    return out


def table(found: list[tuple[str, str, str, str, float, bool]]) -> str:
    """Markdown: values met / values in the reference, by family and configuration."""
    names = list(CONFIGURATIONS)
    lines = ["| family | " + " | ".join(n.replace("_", " ") for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    for short, family in [*FAMILIES.items(), ("", "**all**")]:
        cells = []
        for name in names:
            own = [row[5] for row in found if row[0] == name and (not short or row[1].split("_")[0] == short)]
            cells.append(f"{sum(own)} / {len(own)}")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="page whose part between the two marks is replaced")
    arguments = parser.parse_args()
    found = results(Path(os.environ["HARMONICT_DATA"]))
    text = table(found)
    print(text)
    missed = [row for row in found if not row[5]]
    for name, tag, reference, tolerance, value, _ in missed:
        print(f"not met: {name} {tag}: ours {value:.6g}, reference {reference} +- {tolerance}")
    print(f"COMPLIANCE: {len(found) - len(missed)} of {len(found)} values met")
    if arguments.write:
        page = arguments.write.read_text()
        start, end = "<!-- table: begin -->", "<!-- table: end -->"
        head, tail = page[: page.index(start) + len(start)], page[page.index(end) :]
        arguments.write.write_text(
            f"{head}\n{text}\n\n{len(found) - len(missed)} of {len(found)} values are met.\n{tail}"
        )
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
