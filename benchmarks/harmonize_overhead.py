"""What `harmonict harmonize` costs beside what cannot be saved: the bare forward pass, pydicom's reading and writing.

    HARMONICT_DATA=... python benchmarks/harmonize_overhead.py [--slices 24] [--rounds 3]

choe at its compact size with random weights (the last layer too, so that it changes something), on the first slices of
LUNG1-001. Ours is all that the command does for a series: reading, describing, translating, writing, and measuring its
sharpness and noise before and after. The peer is the network in a bare loop over the same slices, and pydicom reading,
decoding and rewriting the files. Both run in one process, in turn; medians. Bound: 1.2 x the peer (R = 1.2 x peer /
ours).
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom
import torch

from harmonict.core import ScanProtocol
from harmonict.dicom.inventory import find_series
from harmonict.harmonize_cohort import Task, harmonize_one
from harmonict.harmonizer import make_config
from harmonict.methods.choe import HU_UNIT, HU_ZERO, Choe

DATA = Path(os.environ["HARMONICT_DATA"]) / "ct" / "LUNG1-001" / "image"
BOUND = 1.2


def random_model(pixel_mm: tuple[float, float]) -> Choe:
    torch.manual_seed(0)
    model = Choe(make_config(Choe.Config, Choe.sizes["compact"]), target=ScanProtocol(kernel="B70"))
    torch.nn.init.normal_(model.network.last.weight, std=1e-3)
    model.pixel_mm = torch.tensor(pixel_mm)
    return model.eval()


def peer(model: Choe, files: list[Path], out: Path) -> tuple[float, float]:
    """(seconds of the network, seconds of pydicom)."""
    start = time.perf_counter()
    out.mkdir()
    slices = []
    for path in files:
        image = pydicom.dcmread(path)
        pixels = image.pixel_array
        slices.append(pixels.astype(np.float32) * float(image.RescaleSlope) + float(image.RescaleIntercept))
        image.PixelData = pixels.tobytes()
        image.save_as(out / path.name)
    read = time.perf_counter()
    network = model.network.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for hu in slices:
            network((torch.from_numpy(hu)[None, None] - HU_ZERO) / HU_UNIT)
    return time.perf_counter() - read, read - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "in").mkdir()
        first = {
            p: float(pydicom.dcmread(p, stop_before_pixels=True).ImagePositionPatient[2]) for p in DATA.glob("*.dcm")
        }
        for path in sorted(first, key=lambda p: first[p])[: options.slices]:
            shutil.copy(path, folder / "in")
        files = sorted((folder / "in").glob("*.dcm"))
        (found,) = find_series(folder / "in").found
        model = random_model(found.geometry.spacing_mm[1:])
        model.save(folder / "model")
        times = []
        for n in range(options.rounds + 1):  # the first round warms up
            start = time.perf_counter()
            out = folder / f"out-{n}"
            harmonize_one(Task(found, folder / "in", out, folder / "model", None, None, (), False, False, "key"))
            ours = time.perf_counter() - start
            times.append((ours, *peer(model, files, folder / f"peer-{n}")))
            shutil.rmtree(out)
            shutil.rmtree(folder / f"peer-{n}")
    ours, network, pydicom_s = (statistics.median(column) for column in zip(*times[1:], strict=True))
    ratio = statistics.median((b + c) / a for a, b, c in times[1:])
    print(f"{len(files)} slices, {torch.get_num_threads()} threads: network {network:.2f} s, pydicom {pydicom_s:.2f} s")
    beyond = ours - network - pydicom_s
    print(f"ours beyond these: {beyond:.2f} s, {beyond / len(files):.3f} s a slice")
    print(f"harmonize_overhead: ratio {BOUND * ratio:.2f} (ours {ours:.2f} s, peer {network + pydicom_s:.2f} s)")


if __name__ == "__main__":
    main()
