"""93 features of a 48 x 48 x 24 ROI, one thread, beside PyRadiomics' C code; memory and start of one worker.

    python benchmarks/radiomics_speed.py --peer pyrad/bin/python

How to build the peer's environment: benchmarks/pyradiomics_agreement.py. The ROI is smoothed noise (seed 1), 55,296
voxels of 44 grey levels at bin width 25. Both sides hold the same array in memory, warm up once and report the median
of nine calls; three such runs of each, in turn. Neither time holds the start of the interpreter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

SHAPE = (24, 48, 48)
SPACING_MM = (3.0, 0.9, 0.9)
FAMILIES = ("firstorder", "glcm", "glrlm", "glszm", "gldm", "ngtdm")
REPEATS = 9


def roi() -> tuple[np.ndarray, np.ndarray]:
    """int16 HU (32, 64, 64) and a full box of SHAPE inside it."""
    from scipy import ndimage

    noise = np.random.default_rng(1).normal(size=(32, 64, 64))
    hu = ndimage.gaussian_filter(noise, 1.0) * 900 - 100
    mask = np.zeros(hu.shape, bool)
    mask[4:28, 8:56, 8:56] = True
    return hu.astype(np.int16), mask


def seconds(call) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def peer(path: Path) -> None:
    """Time PyRadiomics (under its own interpreter), reading of the image excluded."""
    import logging

    import SimpleITK as sitk
    from radiomics.featureextractor import RadiomicsFeatureExtractor

    logging.getLogger("radiomics").setLevel(logging.CRITICAL)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    case = np.load(path)
    image, mask = sitk.GetImageFromArray(case["hu"]), sitk.GetImageFromArray(case["mask"].astype(np.uint8))
    for item in (image, mask):
        item.SetSpacing(SPACING_MM[::-1])
    extractor = RadiomicsFeatureExtractor(additionalInfo=False, binWidth=25)
    extractor.disableAllFeatures()
    extractor.enableFeaturesByName(**{name: [] for name in FAMILIES})
    assert len(extractor.execute(image, mask)) == 93
    print(seconds(lambda: extractor.execute(image, mask)))


def ours(path: Path) -> None:
    """Time ours and report what one worker costs: median, import, first call (seconds), memory (MB)."""
    import resource

    start = time.perf_counter()
    from harmonict.radiomics import FeatureSettings, extract_features

    imported = time.perf_counter() - start
    settings = FeatureSettings(bin_width=25, families=FAMILIES)
    case = np.load(path)
    hu, mask = case["hu"].astype(np.float32), case["mask"]
    start = time.perf_counter()
    assert len(extract_features(hu, mask, SPACING_MM, settings)) == 93
    first = time.perf_counter() - start
    assert "torch" not in sys.modules
    median = seconds(lambda: extract_features(hu, mask, SPACING_MM, settings))
    print(median, imported, first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _one(path: str) -> int:
    from harmonict.radiomics import FeatureSettings, extract_features

    case = np.load(path)
    return len(extract_features(case["hu"], case["mask"], SPACING_MM, FeatureSettings(families=FAMILIES)))


def throughput(path: Path, processes: int) -> float:
    """ROIs a second of a pool of worker processes, their start excluded."""
    with get_context("spawn").Pool(processes) as pool:
        pool.map(_one, [str(path)] * 4 * processes, chunksize=4)
        start = time.perf_counter()
        pool.map(_one, [str(path)] * 80, chunksize=10)
        return 80 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="interpreter of the environment that holds PyRadiomics")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        side, path = arguments.run
        (peer if side == "peer" else ours)(Path(path))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roi.npz"
        hu, mask = roi()
        np.savez(path, hu=hu, mask=mask)
        print(f"{int(mask.sum())} voxels, {len(np.unique(hu[mask] // 25))} grey levels")

        def run(side: str, interpreter: str) -> list[float]:
            command = [interpreter, __file__, "--run", side, str(path)]
            cache = os.environ | {"NUMBA_CACHE_DIR": str(Path(folder) / "cache")}
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=cache).stdout
            return [float(v) for v in out.split()]

        cold = run("ours", sys.executable)  # with nothing compiled yet
        mine, theirs = [], []
        for _ in range(3):  # in turn, so that a busy machine hits both alike
            mine.append(run("ours", sys.executable))
            theirs.append(run("peer", arguments.peer)[0])
        one, two = (max(throughput(path, n) for _ in range(2)) for n in (1, 2))
    time_ours, time_peer = float(np.median([m[0] for m in mine])), float(np.median(theirs))
    print(f"first call: {cold[2]:.2f} s with nothing compiled, {min(m[2] for m in mine):.2f} s in every later process")
    print(f"import: {min(m[1] for m in mine):.2f} s; memory of one worker: {max(m[3] for m in mine):.0f} MB")
    print(f"two processes: {two / one:.2f} times one ({one:.1f} and {two:.1f} ROIs a second)")
    print(
        f"RADIOMICS-93: ratio {time_peer / time_ours:.2f} "
        f"(ours {time_ours * 1e3:.1f} ms, peer {time_peer * 1e3:.1f} ms)"
    )


if __name__ == "__main__":
    main()
