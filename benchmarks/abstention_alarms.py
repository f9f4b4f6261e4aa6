"""How often abstention marks series of patients that were left out of the training, and series of real scanners.

    [HARMONICT_DATA=...] python benchmarks/abstention_alarms.py TRIAL [TRIAL ...]

TRIAL: a folder that `harmonict simulate` wrote. Of each, every third series that is not truth; one patient at a time is
left out, the others are the training. Prints what docs/abstention.md says. Nothing is random.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from harmonict.abstention import looks, outside, trained_on
from harmonict.core.cohort import read_cohort
from harmonict.data import Scan, SlicePairs
from harmonict.dicom.inventory import find_series


def training(scans: list[Scan]) -> dict:
    return trained_on(SlicePairs([(scan, 0, scan, 0) for scan in scans]))["source"]


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("name the folder of a simulated trial")
    for trial in map(Path, sys.argv[1:]):
        table = read_cohort(trial / "cohort.csv")
        table = table[table["role"] != "truth"].iloc[::3]
        scans = [
            Scan(find_series(trial / path).found[0], subject=patient)
            for path, patient in zip(table["path"], table["patient"], strict=True)
        ]
        marked = 0
        for patient in sorted({scan.subject for scan in scans}):
            known = training([scan for scan in scans if scan.subject != patient])
            for scan in [scan for scan in scans if scan.subject == patient]:
                found = outside(looks(scan.read()), known)
                marked += bool(found)
                if found:
                    print(f"  {patient}, {scan.protocol.label()}: {'; '.join(found)}", flush=True)
        print(f"{trial.name}: {marked} of {len(scans)} left-out series marked", flush=True)
        if data := os.environ.get("HARMONICT_DATA"):
            known = training(scans)
            for one in find_series(Path(data) / "ct").found:
                print(f"  real {one.patient}: {'; '.join(outside(looks(one.read()), known)) or 'inside'}", flush=True)


if __name__ == "__main__":
    main()
