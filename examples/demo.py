"""The main job from end to end, on two patients that the program makes itself.

    python examples/demo.py [FOLDER]        about a minute on two cores

Each command is printed as a user would type it. The picture is FOLDER/demo.png.
"""

import shlex
import sys
from pathlib import Path

from harmonict import cli
from harmonict.core.cohort import read_cohort
from harmonict.dicom.inventory import find_series
from harmonict.report.figures import SOFT_WINDOW_HU, save_montage


def harmonict(*arguments: object) -> None:
    """Run and print one command line."""
    words = [str(a) for a in arguments]
    print(f"\n$ harmonict {shlex.join(words)}", flush=True)
    try:
        cli.main(words)
    except SystemExit as end:
        if end.code:
            raise


def slice_hu(path: str | Path):
    """The middle slice of the series in a folder."""
    (found,) = find_series(path).found
    hu = found.read().hu
    return hu[len(hu) // 2]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    trial, out = folder / "trial", folder / "harmonized"
    harmonict("simulate", "demo", "--out", trial)
    harmonict("inspect", trial / "cohort.csv")
    harmonict("harmonize", trial / "cohort.csv", out, "--model", "mtf-ratio", "--target-protocol", "B30,dose=6.5")
    made = read_cohort(trial / "cohort.csv")
    made = made[made["ctdivol_mgy"] == 6.5].set_index(["patient", "kernel"])
    done = read_cohort(out / "cohort.csv").set_index("derived_from")
    rows = []
    for patient in sorted(set(made.index.get_level_values(0))):
        target, source = made.loc[(patient, "B30"), "path"], made.loc[(patient, "B70"), "path"]
        result = done.loc[made.loc[(patient, "B70"), "series"], "path"]
        harmonict("evaluate", "--reference", target, "--images", source, result)
        rows.append((patient, [slice_hu(p) for p in (source, result, target)]))
    titles = ["source: B70", "harmonized to B30", "target: the same raw data with B30"]
    save_montage(rows, titles, folder / "demo.png", window_hu=SOFT_WINDOW_HU, size_inch=3.2)
    print(f"\nbefore, after and target side by side: {folder / 'demo.png'}")


if __name__ == "__main__":
    main()
