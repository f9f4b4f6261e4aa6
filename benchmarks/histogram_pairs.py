"""Histogram matching on the public Siemens pairs, with the slice's own target as reference: its best case.

HARMONICT_DATA=... python benchmarks/histogram_pairs.py
"""

import os
from pathlib import Path

import numpy as np

from harmonict.evaluate.image import compare
from harmonict.methods.histogram import Histogram
from harmonict.volumes import read_volume

FOLDER = Path(os.environ["HARMONICT_DATA"]) / "paired" / "siemens-chest"
PAIRS = [("B10", "B70"), ("B30", "B50"), ("B50", "B30"), ("B70", "B30"), ("B70", "B10")]


def psnr(reference, image) -> str:
    table = compare(reference, image.with_hu(np.rint(image.hu)))
    mean = table[table["slice"] == "mean"].set_index("region")["psnr_db"]
    return f"{mean['whole']:.2f} / {mean['body']:.2f}"


print("| PSNR whole / body, dB | none | histogram |\n|---|---|---|")
for a, b in PAIRS:
    source, target = (read_volume(FOLDER / f"{k}.mha", spacing_mm=0.693359) for k in (a, b))
    matched = Histogram.like([target]).harmonize(source)
    print(f"| {a}->{b} | {psnr(target, source)} | {psnr(target, matched)} |")
