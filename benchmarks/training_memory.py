"""Memory and time of every trained method at its compact size: its training, and one 512 x 512 slice.

    python benchmarks/training_memory.py [--methods choe ganai] [--steps 40]

Makes a toy cohort of three patients (512 x 512 pixels, two kernels). For each method in turn, in fresh processes:
`harmonict fit METHOD --size compact` for some steps, and one slice through the model that came of it, the median of
three after a first. Peak memory is that of the whole process, libraries included. Minutes of a whole training: its
seconds a step here, start and checks included, times the compact size's steps. Bounds: fit 4 GB and 15 minutes (bridge
and physics 30), slice 2 GB and 1 s (diffusion and bridge 2); R is the worst of bound / ours over all methods.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

FIT_GB, FIT_MINUTES, SLICE_GB, SLICE_S = 4.0, 15.0, 2.0, 1.0
LONGER = {"bridge": 30.0, "physics": 30.0}  # minutes
SLOWER = dict.fromkeys(("encoder-decoder", "ddpm", "diffusion-ct", "bridge"), 2.0)  # seconds


def make_cohort(folder: Path) -> Path:
    """Round patients of soft tissue with lungs; the target kernel shows the same with more noise."""
    from harmonict.core import Geometry, ScanProtocol, Series
    from harmonict.volumes import write_volume

    y, x = (np.mgrid[:512, :512] - 255.5) * 0.7
    body = np.where(np.hypot(y / 0.9, x) < 160, 40.0, -1000.0)
    body[np.hypot(y / 1.4, abs(x) - 70) < 45] = -850
    body = ndimage.gaussian_filter(body, 1.0)
    rows = []
    for patient in ("p1", "p2", "p3"):
        for n, (kernel, noise) in enumerate((("Br40", 10.0), ("Bl64", 40.0))):
            rng = np.random.default_rng([n, int(patient[1])])
            hu = (body + noise * rng.standard_normal((6, 512, 512))).round().astype(np.float32)
            path = folder / f"{patient}-{kernel}.nii.gz"
            write_volume(Series(hu, Geometry((0, 0, 0), (1.0, 0.7, 0.7)), ScanProtocol(kernel=kernel)), path)
            role = "target" if kernel == "Bl64" else "source"
            row = {"path": path.name, "patient": patient, "series": path.name, "format": "nifti", "role": role}
            rows.append({**row, "kernel": kernel, "slice_thickness_mm": 1.0, "state": "found"})
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return folder / "cohort.csv"


def one_slice(model_folder: str, image: str) -> None:
    """Prints the seconds of a slice and this process's peak memory in GB."""
    from dataclasses import replace

    from harmonict.methods import load_model
    from harmonict.volumes import read_volume

    model, series = load_model(model_folder), read_volume(image)
    series = replace(series, hu=series.hu[:1])
    about = model.describe(series)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        model.harmonize(series, about=about)
        times.append(time.perf_counter() - start)
    print(float(np.median(times[1:])), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def fit(arguments: list[str]) -> None:
    """The command line in this process; prints its peak memory in GB."""
    from harmonict import cli

    try:
        cli.main(arguments)
    except SystemExit as end:
        if end.code:
            raise
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def called(*arguments: str) -> list[float]:
    """The last line of this script in a fresh process, as numbers."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def minutes(method: str, model_folder: str) -> float:
    """Of a whole training at the compact size, from that of a few steps."""
    from harmonict.harmonizer import make_config
    from harmonict.methods import METHODS

    config = make_config(METHODS[method].Config, METHODS[method].sizes["compact"])
    phases = json.loads((Path(model_folder) / "card.json").read_text())["training"]
    if hasattr(config, "steps_diffusion"):
        first, second = (phase["seconds"] / phase["steps"] for phase in phases)
        return (first * config.steps + second * config.steps_diffusion) / 60
    return sum(p["seconds"] for p in phases) / sum(p["steps"] for p in phases) * config.steps / 60


def main() -> None:
    if sys.argv[1:2] == ["--slice"]:
        return one_slice(*sys.argv[2:])
    if sys.argv[1:2] == ["fit"]:
        return fit(sys.argv[1:])
    from harmonict.methods import METHODS

    trained = [name for name, kind in METHODS.items() if "compact" in kind.sizes]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=trained, choices=trained)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    short = {"steps": options.steps, "steps_diffusion": options.steps, "check_every": max(1, options.steps // 2)}
    worst = np.inf
    with tempfile.TemporaryDirectory() as scratch:
        cohort = make_cohort(Path(scratch))
        for name in options.methods:
            model = str(Path(scratch) / name)
            changes = [f"{key}={n}" for key, n in short.items() if hasattr(METHODS[name].Config, key)]
            words = ["fit", name, "--size", "compact", "--cohort", str(cohort), "--target-protocol", "Bl64"]
            (training,) = called(*words, "--out", model, *(w for change in changes for w in ("--set", change)))
            seconds, memory = called("--slice", model, str(cohort.parent / "p1-Br40.nii.gz"))
            whole = minutes(name, model)
            worst = min(worst, FIT_GB / training, LONGER.get(name, FIT_MINUTES) / whole)
            worst = min(worst, SLICE_GB / memory, SLOWER.get(name, SLICE_S) / seconds)
            print(
                f"{name}: fit {training:.2f} GB, {whole:.1f} min; a slice {memory:.2f} GB, {seconds:.2f} s", flush=True
            )
    bounds = f"fit {FIT_GB:g} GB and {FIT_MINUTES:g} min, slice {SLICE_GB:g} GB and {SLICE_S:g} s"
    print(f"training_memory: ratio {worst:.2f} (ours the worst of {len(options.methods)} methods, bounds {bounds})")


if __name__ == "__main__":
    main()
