"""The 1,401 features of a 48 x 48 x 24 ROI, one thread, beside PyRadiomics' 93, allowed 10 times its time.

    python benchmarks/ibex_speed.py --peer pyrad/bin/python

How to build the peer's environment: benchmarks/pyradiomics_agreement.py. ROI, peer and timing are those of
benchmarks/radiomics_speed.py. Ours is also timed on white noise of SD 700 HU in the same ROI, which fills all 256 grey
levels.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import radiomics_speed
from radiomics_speed import SPACING_MM, roi, seconds


def ours(path: Path) -> None:
    """Print median seconds on the ROI and on white noise, seconds to import and to a first result, and memory in MB."""
    import resource

    start = time.perf_counter()
    from harmonict.radiomics.ibex import ibex_features

    case = np.load(path)
    hu, mask = case["hu"].astype(np.float32), case["mask"]
    assert len(ibex_features(hu, mask, SPACING_MM)) == 1401
    first = time.perf_counter() - start
    noise = (np.random.default_rng(2).normal(size=hu.shape) * 700).astype(np.float32)
    medians = [seconds(lambda image=image: ibex_features(image, mask, SPACING_MM)) for image in (hu, noise)]
    print(*medians, first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required="--run" not in sys.argv, help="interpreter that has PyRadiomics")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        ours(arguments.run)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roi.npz"
        hu, mask = roi()
        np.savez(path, hu=hu, mask=mask)

        def run(*command: str) -> list[float]:
            done = subprocess.run([*command, str(path)], check=True, capture_output=True, text=True)
            return [float(v) for v in done.stdout.split()]

        run(sys.executable, __file__, "--run")  # fills the cache of compiled code
        mine, theirs = [], []
        for _ in range(3):  # in turn, so that a busy machine hits both alike
            mine.append(run(sys.executable, __file__, "--run"))
            theirs.append(run(arguments.peer, radiomics_speed.__file__, "--run", "peer")[0])
    table, peer = np.array(mine), float(np.median(theirs))
    time_ours, time_noise = np.median(table[:, :2], axis=0)
    print(f"second start: import and first 1,401 features in {table[:, 2].min():.2f} s")
    print(f"memory of one worker: {table[:, 3].max():.0f} MB")
    print(f"white noise in 256 grey levels: {time_noise * 1e3:.0f} ms")
    print(f"IBEX-1401: ratio {10 * peer / time_ours:.1f} (ours {time_ours * 1e3:.1f} ms, peer {peer * 1e3:.1f} ms)")


if __name__ == "__main__":
    main()
