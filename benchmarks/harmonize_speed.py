"""Reading + mtf-ratio + writing of a whole chest CT against pydicom alone reading, decoding and rewriting its files.

    HARMONICT_DATA=... python benchmarks/harmonize_speed.py

Both run in one process, in turn, seven times; medians. The filter of the bound is fitted beforehand (from two MTFs, as
`harmonict fit` makes it); what measuring the source's own MTF and noise adds is printed beside it. Peak memory is that
of a fresh process that does the whole job once, measuring included, beside the size of the float32 volume. Bounds: time
at most 5 x pydicom's; memory at most 3 x the volume + 500 MB.
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
from harmonict.physics.mtf import skin_air_mtf

DATA = Path(os.environ["HARMONICT_DATA"]) / "ct"
FILES = sorted((DATA / "LUNG1-001" / "image").glob("*.dcm"))
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


def main() -> None:
    if "--once" in sys.argv:
        saved = MTFRatio.load(sys.argv[2])
        timed(lambda out: ours(saved, out))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    target = read_series(sorted((DATA / "C3N-00249" / "image").glob("*.dcm")))
    measuring = MTFRatio.like([target])
    source = read_series(FILES)
    volume = source.hu.nbytes / 2**20
    fitted = MTFRatio.from_mtfs(skin_air_mtf(target).kernel, skin_air_mtf(source).kernel)
    with tempfile.TemporaryDirectory() as folder:
        measuring.save(Path(folder) / "model")
        command = [sys.executable, __file__, "--once", str(Path(folder) / "model")]
        peak = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    jobs = (lambda out: ours(fitted, out), peer, lambda out: ours(measuring, out))
    rounds = [[timed(job) for job in jobs] for _ in range(8)][1:]  # the first round warms up
    a, b, c = (statistics.median(times) for times in zip(*rounds, strict=True))
    allowed = VOLUMES_BOUND * volume + EXTRA_MB
    print(f"{len(FILES)} slices, {torch.get_num_threads()} threads; pydicom alone {b:.2f} s")
    print(f"fitted filter: {a:.2f} s, {a / b:.1f} x pydicom (bound {TIMES_BOUND:g} x)")
    print(f"measuring the source's MTF and noise as well: {c:.2f} s, {c / b:.1f} x pydicom")
    print(f"harmonize_memory: ratio {allowed / peak:.2f} (ours {peak:.0f} MB, bound {allowed:.0f} MB)")
    print(f"harmonize_speed: ratio {TIMES_BOUND * b / a:.2f} (ours {a:.2f} s, peer {b:.2f} s)")


if __name__ == "__main__":
    main()
