"""The MTF at the skin of simulated patients against the kernels that were asked for.

    OMP_NUM_THREADS=1 python examples/skin_mtf_of_trial.py [--patients 3] [--figure docs/figures/skin_mtf_of_trial.png]

Every named kernel at 6.5 and 1.3 mGy, 1 mm slices in the middle of the lung, pixels of 0.69 mm. What is asked for is
the f50 of the whole chain in closed form (filter x focal spot x detector), and no more than 0.9 of Nyquist is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from harmonict.core import ScanProtocol
from harmonict.physics import skin_air_mtf
from harmonict.simulate.kernels import get_kernel, kernel_names
from harmonict.simulate.phantom import make_patient
from harmonict.simulate.reconstruct import scan_and_reconstruct, system_mtf
from harmonict.simulate.scanner import Scanner

BAR_PERCENT = {6.5: 10.0, 1.3: 15.0}


def measure(seed: int, fov_mm: float, slices: int) -> list[dict[str, object]]:
    """f50 asked for and found, for every kernel and dose, of one patient."""
    scanner = Scanner()
    patient = make_patient(seed)
    cap = 0.9 * 0.5 / (fov_mm / 512)
    low = 0.5 * patient.lung_height_mm
    protocols = [
        ScanProtocol(kernel=k, kvp=120, ctdivol_mgy=d, slice_thickness_mm=1.0, fov_mm=fov_mm)
        for d in BAR_PERCENT
        for k in kernel_names()
    ]
    rows = []
    scans = scan_and_reconstruct(patient, protocols, z_range_mm=(low, low + slices), scanner=scanner, seed=seed)
    for protocol, series in zip(protocols, scans, strict=True):
        asked = min(system_mtf(get_kernel(str(protocol.kernel)), scanner).f50_per_mm, cap)
        found = skin_air_mtf(series)
        rows.append(
            {
                "patient": patient.name,
                "kernel": protocol.kernel,
                "dose_mgy": protocol.ctdivol_mgy,
                "asked": asked,
                "found": min(found.f50_per_mm, cap),
                "percent": 100 * (min(found.f50_per_mm, cap) / asked - 1),
                "border_used": found.sectors_used / found.sectors,
            }
        )
    return rows


def draw(table: pd.DataFrame, path: Path) -> None:
    """f50 found over f50 asked for, and the differences kernel by kernel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=(1, 1.8))
    line = np.array([0.2, 0.7])
    left.plot(line, line, "k-", lw=0.8, label="as asked")
    left.plot(line, 0.9 * line, "k:", lw=0.8, label="10 %")
    left.plot(line, 1.1 * line, "k:", lw=0.8)
    order = sorted(kernel_names(), key=lambda k: get_kernel(k).f50_per_mm)
    for dose, colour in zip(BAR_PERCENT, ("tab:blue", "tab:red"), strict=True):
        part = table[table["dose_mgy"] == dose]
        left.plot(part["asked"], part["found"], ".", color=colour, label=f"{dose:g} mGy")
        shift = 0.12 if dose == 6.5 else -0.12
        right.plot([order.index(k) + shift for k in part["kernel"]], part["percent"], ".", color=colour)
    left.set(xlabel="f50 asked for (1/mm)", ylabel="f50 at the skin (1/mm)", title="each patient, kernel and dose")
    left.legend(fontsize=8)
    for level, style in ((10, ":"), (15, "--")):
        right.axhline(level, color="k", ls=style, lw=0.8)
        right.axhline(-level, color="k", ls=style, lw=0.8)
    right.set(ylabel="found - asked (%)", title="f50 at the skin, kernels from soft to sharp", ylim=(-18, 18))
    right.set_xticks(range(len(order)), order, rotation=90, fontsize=8)
    right.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=3)
    parser.add_argument("--slices", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of the first patient")
    parser.add_argument("--fov-mm", type=float, default=355.0)
    parser.add_argument("--figure", type=Path)
    chosen = parser.parse_args()
    rows = []
    for n in range(chosen.patients):
        rows += measure(chosen.seed + n, chosen.fov_mm, chosen.slices)
        print(f"patient {n + 1} of {chosen.patients} done", flush=True)
    table = pd.DataFrame(rows)
    print("f50 at the skin, found - asked (%), and the share of the border that was clean:")
    shown = table.pivot_table(index=["kernel", "asked"], columns=["dose_mgy", "patient"], values="percent", sort=False)
    print(shown.round(1).to_string())
    print(table.groupby("patient")["border_used"].mean().round(2).to_string())
    for dose, bar in BAR_PERCENT.items():
        worst = table[table["dose_mgy"] == dose]["percent"].abs().max()
        print(f"{dose:g} mGy: at most {worst:.1f} % off (bar {bar:g} %)")
    if chosen.figure:
        draw(table, chosen.figure)


if __name__ == "__main__":
    main()
