"""Reading + mtf-ratio + writing of a whole chest CT against pydicom alone reading, decoding and rewriting the same files.

    HARMONICT_DATA=... python benchmarks/harmonize_speed.py

Both run in one process, in turn, five times; medians. The model goes toward another patient's measured MTF, so the source
is measured at its own skin each time. Peak memory is that of a fresh process which does the whole job once, beside the size
of the float32 volume. Bounds: time at most 5 x pydicom's; memory at most 3 x the volume + 500 MB.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pydicom
import torch

from harmonict.dicom.read import read_series
from harmonict.dicom.write import write_series
from harmonict.harmonize_cohort import derivation_of
from harmonict.methods.mtf_ratio import MTFRatio

DATA = Path(os.environ["HARMONICT_DATA"])
FILES = sorted((DATA / "ct" / "LUNG1-001" / "image").glob("*.dcm"))
TIMES_BOUND, VOLUMES_BOUND, EXTRA_MB = 5.0, 3.0, 500.0


def peer(out: Path) -> None:
    out.mkdir()
    for path in FILES:
        image = pydicom.dcmread(path)
        pixels = image.pixel_array
        image.PixelData = pixels.tobytes()
        image.save_as(out / path.name)


def ours(model: MTFRatio, out: Path) -> None:
    series = read_series(FILES)
    about = model.describe(series)
    write_series(model.harmonize(series, about=about), out / "series", derivation_of(model, about))


def timed(work) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        work(Path(folder) / "out")
        return time.perf_counter() - start


def model() -> MTFRatio:
    return MTFRatio.like([read_series(sorted((DATA / "ct" / "C3N-00249" / "image").glob("*.dcm")))])


def main() -> None:
    if "--once" in sys.argv:
        saved = MTFRatio.load(sys.argv[2])
        timed(lambda out: ours(saved, out))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    fitted = model()
    with tempfile.TemporaryDirectory() as folder:
        fitted.save(Path(folder) / "model")
        peak = float(
            subprocess.run(
                [sys.executable, __file__, "--once", str(Path(folder) / "model")],
                capture_output=True,
                check=True,
                text=True,
            ).stdout
        )
    timed(lambda out: ours(fitted, out)), timed(peer)
    pairs = [(timed(lambda out: ours(fitted, out)), timed(peer)) for _ in range(5)]
    a, b = (statistics.median(p[n] for p in pairs) for n in (0, 1))
    volume = read_series(FILES).hu.nbytes / 2**20
    allowed = VOLUMES_BOUND * volume + EXTRA_MB
    print(f"{len(FILES)} slices, {torch.get_num_threads()} threads")
    print(f"time: ours {a:.2f} s, pydicom alone {b:.2f} s: {a / b:.1f} x (bound {TIMES_BOUND:g} x)")
    print(f"peak memory: {peak:.0f} MB, float32 volume {volume:.0f} MB (bound {allowed:.0f} MB)")
    print(f"harmonize_memory: ratio {allowed / peak:.2f} (ours {peak:.0f} MB, bound {allowed:.0f} MB)")
    print(f"harmonize_speed: ratio {TIMES_BOUND * b / a:.2f} (ours {a:.2f} s, peer {b:.2f} s)")


if __name__ == "__main__":
    main()
