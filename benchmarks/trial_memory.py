"""Peak memory of `harmonict simulate demo`, and whether it grows with the number of patients.

    python benchmarks/trial_memory.py [--many 10]

Memory is the proportional set size of the process and all its workers, read every 20 ms (Linux). The bound for `demo`
on two workers is 2 GB (ratio = bound / ours, passed at 1); a trial of `--many` patients in one process may need at most
1.1 times what one of three needs (patients differ in size), else the exit code is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BOUND_MB = 2000.0
GROWTH = 1.1
RUN = """
import sys
from dataclasses import replace
from harmonict.simulate.trial import load_trial, run_trial
trial = load_trial("demo", slices=1)
group = replace(trial.groups[0], patients=int(sys.argv[1]))
run_trial(replace(trial, groups=(group,)), sys.argv[2])
"""


def peak_mb(command: list[str]) -> tuple[float, float]:
    """Highest proportional set size of a command with its children, MB, and its seconds."""
    start, highest = time.monotonic(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        highest = max(highest, sum(_pss_mb(pid) for pid in _family(process.pid)))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return highest, time.monotonic() - start


def _family(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    for parent in found:
        for listing in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in listing.read_text().split()]
            except OSError:  # it has just ended
                continue
    return found


def _pss_mb(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=10)
    many = parser.parse_args().many
    with tempfile.TemporaryDirectory() as folder:
        peaks = {}
        for patients in (3, many):
            command = [sys.executable, "-c", RUN, str(patients), f"{folder}/{patients}"]
            peaks[patients], seconds = peak_mb(command)
            print(f"{patients} patients, one slice each, one process: {peaks[patients]:.0f} MB, {seconds:.0f} s")
        growth = peaks[many] / peaks[3]
        print(f"growth from 3 to {many} patients: {growth:.2f} (bound {GROWTH:g})")
        command = [sys.executable, "-m", "harmonict", "simulate", "demo", "--out", f"{folder}/demo", "--jobs", "2"]
        demo, seconds = peak_mb(command)
    print(f"simulate demo on two workers: {demo:.0f} MB, {seconds:.0f} s")
    print(f"trial_memory: ratio {BOUND_MB / demo:.2f} (ours {demo:.0f} MB, peer {BOUND_MB:.0f} MB)")
    if growth > GROWTH:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
