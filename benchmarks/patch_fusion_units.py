"""What the steps of STAN-CT's reconstruction from patches do to HU and texture, before any network errs.

    HARMONICT_DATA=... python benchmarks/patch_fusion_units.py [trial/cohort.csv]

Prints the tables of docs/patch-fusion.md (docs/data.md says where each set is public). The cohort table of a trial that
`harmonict simulate kentucky --out trial` makes adds simulated pairs to the real ones.

1. Eq 7 with a network that makes no error: each patch is "translated" by taking the target's pixels. What is then left
   between result and target is eq 7's.
2. Resizing patches to 256 x 256 and back, with a network that changes nothing, on real slices.
3. The quality units against a network with known faults, on real slices: every patch is off by a constant (SD 10 HU)
   and has a frame of 4 pixels that is 40 HU too bright, and one in four comes out blurred; D sees the blurred ones.
4. Time beside the network.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from harmonict.core import Series
from harmonict.dicom.read import read_series
from harmonict.evaluate.texture import texture_errors
from harmonict.patch_fusion import MODES, FusionSettings, fuse_slice, slice_seed
from harmonict.physics import skin_air_mtf, uniform_noise_sd
from harmonict.volumes import read_volume

DATA = Path(os.environ["HARMONICT_DATA"])
REAL = (("B10", "B70"), ("B30", "B50"), ("B50", "B30"), ("B70", "B10"))
SLICES = 6
KEY_PX = 6  # neighbouring pixels by which a patch is found again in its slice


class TargetPixels:
    """The network that makes no error: finds where in the source a patch was cut and gives the target's pixels."""

    def __init__(self, source: np.ndarray, target: np.ndarray) -> None:
        self.source, self.target = source, target
        self.rows = np.lib.stride_tricks.sliding_window_view(source, KEY_PX, axis=1)

    def __call__(self, x: Tensor) -> Tensor:
        patch = x[0, 0].numpy()
        side = len(patch)
        inner = np.s_[side // 2, side // 2 : side // 2 + KEY_PX]
        for y, x0 in np.argwhere((self.rows == patch[inner]).all(-1)):
            top, left = y - side // 2, x0 - side // 2
            here = np.s_[top : top + side, left : left + side]
            if top >= 0 and left >= 0 and np.array_equal(self.source[here], patch):
                return torch.from_numpy(self.target[here].copy())[None, None]
        raise LookupError("the patch is not of this slice")


class Faulty:
    """A network with the faults named above; `realness` knows which patch was blurred."""

    def __init__(self, seed: int) -> None:
        self.rng, self.blurred = np.random.default_rng(seed), False

    def __call__(self, x: Tensor) -> Tensor:
        self.blurred = bool(self.rng.random() < 0.25)
        y = functional.avg_pool2d(functional.pad(x, (2, 2, 2, 2), "reflect"), 5, 1) if self.blurred else x.clone()
        y += float(self.rng.normal(0, 10)) + 40
        y[..., 4:-4, 4:-4] -= 40
        return y

    def realness(self, x: Tensor) -> Tensor:
        return torch.tensor([0.01 if self.blurred else 0.995])


def fused(series: Series, settings: FusionSettings, make) -> tuple[Series, pd.DataFrame]:
    """Every slice through the pipeline; make(z) -> (translate_patch, realness)."""
    out, records = np.empty_like(series.hu), []
    for z, hu in enumerate(series.hu):
        translate, realness = make(z)
        padding = None if series.padding is None else series.padding[z]
        out[z], record = fuse_slice(
            hu, padding=padding, translate_patch=translate, realness=realness, settings=settings, seed=slice_seed(hu)
        )
        records.append(record)
    return series.with_hu(out, protocol=series.protocol), pd.DataFrame(records)


def tissue(series: Series, settings: FusionSettings) -> np.ndarray:
    mask = (series.hu >= settings.low_hu) & (series.hu <= settings.high_hu)
    return mask if series.padding is None else mask & ~series.padding


def eq7_rows(name: str, source: Series, target: Series) -> list[dict[str, object]]:
    rows = []
    for gray in ("affine", "minmax", "minmax-slice"):
        settings = FusionSettings(gray=gray)
        result, records = fused(
            source,
            settings,
            lambda z: (TargetPixels(source.hu[z], target.hu[z]), lambda x: torch.ones(len(x))),
        )
        mask = tissue(source, settings)
        error = (result.hu - target.hu)[mask]
        texture = texture_errors(result.hu, target.hu, mask=mask).mean()
        rows.append(
            {
                "pair": name,
                "gray to HU": gray,
                "bias, HU": f"{error.mean():.1f}",
                "mean error, HU": f"{np.abs(error).mean():.1f}",
                "contrast error": f"{texture['contrast']:.3f}",
                "correlation error": f"{texture['correlation']:.3f}",
                "eq 7 moves a patch by, HU: mean": f"{records['eq7_shift_hu'].mean():.1f}",
                "at most": f"{records['eq7_largest_shift_hu'].max():.1f}",
                "box artifacts found / left": f"{records['box_artifacts_found'].mean():.1f} / "
                f"{records['box_artifacts_left'].mean():.1f}",
            }
        )
    return rows


def resize_rows(name: str, series: Series) -> list[dict[str, object]]:
    rows = []
    before = None
    for label, settings in (
        ("source", None),
        ("native pixels", FusionSettings(mode="overlap")),
        ("resized, mean", FusionSettings(mode="overlap", resize_px=256)),
        ("resized, straightforward", FusionSettings(mode="straightforward", resize_px=256)),
    ):
        result = series if settings is None else fused(series, settings, lambda z: (lambda x: x, None))[0]
        now = (uniform_noise_sd(result), skin_air_mtf(result).kernel.f50_per_mm)
        before = before or now
        mask = tissue(series, FusionSettings())
        texture = texture_errors(result.hu, series.hu, mask=mask).mean()
        rows.append(
            {
                "scan": name,
                "patches": label,
                "noise SD, HU": f"{now[0]:.1f} ({now[0] / before[0] - 1:+.0%})",
                "f50, 1/mm": f"{now[1]:.3f} ({now[1] / before[1] - 1:+.0%})",
                "contrast error": f"{texture['contrast']:.3f}",
                "mean change, HU": f"{np.abs(result.hu - series.hu)[mask].mean():.2f}",
            }
        )
    return rows


def unit_rows(series: Series) -> list[dict[str, object]]:
    rows = []
    for mode in MODES:
        settings = FusionSettings(mode=mode)

        def faulty(z: int):
            network = Faulty(z)
            return network, network.realness

        result, records = fused(series, settings, faulty)
        mask = tissue(series, settings)
        error = np.abs(result.hu - series.hu)[mask]
        texture = texture_errors(result.hu, series.hu, mask=mask).mean()
        rows.append(
            {
                "mode": mode,
                **{f"{name} error": f"{value:.3f}" for name, value in texture.items()},
                "mean error, HU": f"{error.mean():.1f}",
                "99th percentile, HU": f"{np.percentile(error, 99):.1f}",
                "patches drawn": f"{records['patches_drawn'].mean():.0f}",
                "dropped by D": f"{records['patches_dropped_by_d'].mean():.1f}",
                "box artifacts found / left": f"{records['box_artifacts_found'].mean():.1f} / "
                f"{records['box_artifacts_left'].mean():.1f}",
            }
        )
    return rows


def time_rows(series: Series) -> list[dict[str, object]]:
    rows = []
    ones = lambda x: torch.ones(len(x))  # noqa: E731
    for mode in MODES:
        seconds, drawn = [], []
        for _ in range(3):
            for hu in series.hu:
                pixels = []

                def look(x: Tensor, pixels=pixels) -> Tensor:
                    pixels.append(x.numel())
                    return x

                start = time.process_time()
                fuse_slice(
                    hu, padding=None, translate_patch=look, realness=ones, settings=FusionSettings(mode=mode), seed=0
                )
                seconds.append(time.process_time() - start)
                drawn.append(sum(pixels) / hu.size)
        rows.append(
            {
                "mode": mode,
                "CPU seconds a 512 x 512 slice": f"{np.median(seconds):.2f}",
                "pixels through the network / pixels of the slice": f"{np.mean(drawn):.1f}",
            }
        )
    return rows


def table(title: str, rows: list[dict[str, object]]) -> None:
    print(f"\n{title}\n", flush=True)
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")


def some_slices(name: str) -> Series:
    series = read_series(sorted((DATA / "ct" / name / "image").glob("*.dcm")))
    at = np.linspace(0, len(series.hu) - 1, SLICES + 2).round().astype(int)[1:-1]
    padding = None if series.padding is None else series.padding[at]
    return replace(series, hu=np.ascontiguousarray(series.hu[at]), padding=padding)


def simulated(cohort: Path, kernel: str) -> Series:
    """The first patient's 1 mm slices at full dose, by filtered back-projection."""
    rows = pd.read_csv(cohort)
    rows = rows[(rows["kernel"] == kernel) & (rows["slice_thickness_mm"] == 1) & (rows["iterative_strength"] == 0)]
    best = rows[rows["patient"] == rows["patient"].min()].sort_values("ctdivol_mgy").iloc[-1]
    return read_series(sorted((cohort.parent / best["path"]).glob("*.dcm")))


def main() -> None:
    folder = DATA / "paired" / "siemens-chest"
    siemens = {kernel: read_volume(folder / f"{kernel}.mha") for kernel in ("B10", "B30", "B50", "B70")}
    rows = [row for a, b in REAL for row in eq7_rows(f"{a} -> {b}, real", siemens[a], siemens[b])]
    if len(sys.argv) > 1:
        trial, target = Path(sys.argv[1]), None
        for kernel in ("Bl64", "Br40", "Bl57"):
            series = simulated(trial, kernel)
            target = target or series
            if series is not target:
                rows += eq7_rows(f"{kernel} -> Bl64, simulated", series, target)
    table("Eq 7 with a network that makes no error", rows)
    scans = {name: some_slices(name) for name in ("LIDC-IDRI-0314", "C3N-00249")}
    table(
        "Resizing with a network that changes nothing",
        [row for name, series in scans.items() for row in resize_rows(name, series)],
    )
    lidc = scans["LIDC-IDRI-0314"]
    table("The quality units against a network with known faults, LIDC-IDRI-0314", unit_rows(lidc))
    table(f"Time beside the network, {torch.get_num_threads()} thread(s)", time_rows(lidc))


if __name__ == "__main__":
    main()
