"""Prints the numbers of docs/simulator.md and draws its figures: water, noise, NPS, wire MTF, exact pairs, strengths.

OMP_NUM_THREADS=1 python examples/scanner_checks.py [--figures docs/figures]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from harmonict.core import ScanProtocol
from harmonict.physics import nps_radial
from harmonict.simulate.kernels import get_kernel, kernel_names
from harmonict.simulate.materials import mu_water_per_mm
from harmonict.simulate.phantom import make_patient
from harmonict.simulate.reconstruct import ramp_image, reconstruct, render_slice, system_mtf
from harmonict.simulate.scanner import Projections, Scanner, expose, line_integrals, noise_rng, slice_profile

PIXEL = 500 / 1024
CHEST = ScanProtocol(kernel="Br40", kvp=120, ctdivol_mgy=6.5, slice_thickness_mm=1.0, fov_mm=500.0)
QUIET = Scanner(electronic_quanta=0.0)


def radius_mm(matrix: int, fov_mm: float) -> np.ndarray:
    """Distance of each pixel from the centre, (matrix, matrix)."""
    x = (np.arange(matrix) - (matrix - 1) / 2) * fov_mm / matrix
    return np.hypot(x[:, None], x)


def cylinder(radius: float, hu: float, under: np.ndarray | float = -1000.0) -> np.ndarray:
    """A disc of `hu` over `under`, area-averaged on the object's grid."""
    cover = np.clip((radius - radius_mm(1024, 500.0)) / PIXEL + 0.5, 0, 1)
    return (under + (hu - under) * cover).astype(np.float32)


def project(hu: np.ndarray, scanner: Scanner = QUIET, **options: bool) -> np.ndarray:
    """Noise-free line integrals on the object's grid at 120 kVp."""
    return line_integrals(hu, pixel_mm=PIXEL, kvp=120.0, scanner=scanner, **options)


def measure(
    integrals: np.ndarray, seed: int | None, protocol: ScanProtocol = CHEST, scanner: Scanner = QUIET
) -> Projections:
    """Raw data of one scan."""
    rng = None if seed is None else noise_rng(seed, 0, protocol)
    return expose(integrals, protocol=protocol, scanner=scanner, rng=rng)


def water(integrals: np.ndarray) -> None:
    """Noise-free HU."""
    hu = reconstruct(measure(integrals, None), get_kernel("Br40"), fov_mm=500.0)
    r = radius_mm(512, 500.0)
    rings = [hu[(r >= a) & (r < a + 5)].mean() for a in range(0, 121, 5)]
    hole = reconstruct(measure(project(cylinder(40, -1000, cylinder(130, 0))), None), get_kernel("Br40"), fov_mm=500.0)
    print(
        f"water, centre {hu[r < 20].mean():.2f} HU, spread of 5 mm rings out to 125 mm {np.ptp(rings):.2f} HU;", end=" "
    )
    print(f"air in the centre of water {hole[r < 20].mean():.2f} HU")


def noise(integrals: np.ndarray) -> None:
    """Noise against dose and thickness."""
    inside = radius_mm(512, 250.0) < 60
    for scanner in (QUIET, Scanner()):
        table = {}
        for dose in (0.65, 1.3, 6.5, 26.0):
            for thickness in (1.0, 3.0):
                protocol = CHEST.with_(ctdivol_mgy=dose, slice_thickness_mm=thickness)
                a, b = (
                    reconstruct(measure(integrals, s, protocol, scanner), get_kernel("Br40"), fov_mm=250.0)
                    for s in (0, 1)
                )
                table[dose, thickness] = ((a - b) / np.sqrt(2))[inside].std()
        print(f"noise SD in 260 mm of water, Br40, electronic noise {scanner.electronic_quanta:g} quanta:")
        for (dose, thickness), sd in table.items():
            law = table[6.5, 1.0] * np.sqrt(6.5 / dose / thickness)
            print(f"  {dose:5g} mGy {thickness:g} mm: {sd:6.1f} HU, {100 * (sd / law - 1):+.1f} % from the root law")


def spectra(axes) -> None:
    """NPS of white projection noise against |f| x response^2."""
    rng = np.random.default_rng(0)
    pixel, sd = 200 / 512, 0.01
    f = None
    for name in ("Br32", "Br40", "B70"):
        patches = []
        for _ in range(4):
            white = rng.normal(0, sd, (QUIET.views, QUIET.detectors)).astype(np.float32)
            image = reconstruct(
                Projections(white, np.ones(QUIET.detectors, np.float32), QUIET, 120.0), get_kernel(name), fov_mm=200.0
            )
            patches += [image[y : y + 128, x : x + 128] for y in range(64, 384, 64) for x in range(64, 384, 64)]
        found = nps_radial(np.array(patches), pixel_mm=(pixel, pixel), detrend=0, window=True)
        f = found.frequency_per_mm
        response = get_kernel(name).at(f) / QUIET.blur_mtf(f)
        closed = np.pi / QUIET.views * QUIET.pitch_mm * sd**2 * (1000 / mu_water_per_mm(120)) ** 2 * f * response**2
        held = (f > 0.05) & (closed > 0.1 * closed.max())
        worst = np.abs(found.nps_hu2_mm2[held] / closed[held] - 1).max()
        print(f"NPS of white projection noise, {name}: at most {100 * worst:.1f} % from |f| x response^2")
        axes.plot(f, found.nps_hu2_mm2 / closed.max(), ".", label=name)
        axes.plot(f, closed / closed.max(), "k-", lw=0.7)
    axes.set(
        xlabel="frequency (1/mm)",
        ylabel="NPS (own maximum)",
        title="white projection noise; line: closed form",
        xlim=(0, 1.1),
    )
    axes.legend()


def wires(axes) -> None:
    """MTF of a Gaussian wire of 0.45 mm against the chain in closed form."""
    place, sd = (5.13, 7.71), 0.45
    x = (np.arange(1024) - 511.5) * PIXEL
    hu = 2000 * np.exp(-(((x[:, None] - place[0]) ** 2 + (x - place[1]) ** 2) / (2 * sd**2))) - 1000
    raw = measure(project(hu, area_averaged=False), None)
    worst = 0.0
    pixel = 130 / 512
    for name in kernel_names():
        kernel = get_kernel(name)
        image = reconstruct(raw, kernel, fov_mm=130.0) + 1000.0
        y0, x0 = (round(v / pixel + 255.5) for v in place)
        patch = image[y0 - 98 : y0 + 99, x0 - 98 : x0 + 99].astype(float)
        f = np.linspace(0, kernel.f10_per_mm, 30)
        line = np.abs(np.exp(-2j * np.pi * np.outer(f, np.arange(-98, 99) * pixel)) @ patch.sum(0))
        mtf = line / line[0] / np.exp(-2 * (np.pi * sd * f) ** 2)
        worst = max(worst, np.abs(mtf - system_mtf(kernel, QUIET).at(f)).max())
        if name in ("B10", "B30", "Br40", "B50", "B70", "Bl64", "LUNG"):
            axes.plot(f, mtf, ".", ms=3, label=name)
            axes.plot(f, kernel.at(f), "k-", lw=0.7)
    print(f"wire MTF of all {len(kernel_names())} kernels up to f10: at most {worst:.4f} from the chain")
    axes.set(xlabel="frequency (1/mm)", ylabel="MTF", title="wire; line: the requested chain")
    axes.legend()


def pairs(integrals: np.ndarray) -> None:
    """Two kernels of one acquisition without aliasing."""
    ramp = ramp_image(measure(integrals, 0), fov_mm=500.0)
    f = np.hypot(np.fft.fftfreq(512, 500 / 512)[:, None], np.fft.rfftfreq(512, 500 / 512))
    body = radius_mm(512, 500.0) < 200
    for sharp, soft in (("B70", "B30"), ("Bl64", "Br40"), ("FC51", "FC13"), ("Br59", "Br32")):
        a, b = (reconstruct(ramp, get_kernel(k), aliasing=False).astype(float) for k in (sharp, soft))
        top, bottom = get_kernel(soft).at(f), get_kernel(sharp).at(f)
        made = np.fft.irfft2(np.fft.rfft2(a) * np.where(bottom > 0.02, top / np.maximum(bottom, 0.02), 0), a.shape)
        error = np.linalg.norm((made - b)[body]) / np.linalg.norm((b - b[body].mean())[body])
        print(f"exact pair {sharp} -> {soft}: relative RMSE {100 * error:.3f} %")


def strengths(axes) -> None:
    """Noise, texture and edges over the iterative strengths."""
    pixel, runs = 350 / 512, 4
    r = radius_mm(512, 350.0)
    bins = np.arange(-8, 8.01, 0.2)
    index = np.digitize(r - 40, bins)
    f50_axis = np.fft.rfftfreq(4000, 0.2)
    for name in ("Br40", "Br69"):
        print(f"iterative, {name}, 6.5 mGy, 1 mm: strength, noise, NPS centroid, f50 of an edge of -1000, 300, 100 HU")
        rows = {s: [] for s in range(6)}
        for contrast in (-1000.0, 300.0, 100.0):
            integrals = project(cylinder(40, contrast, cylinder(130, 0)))
            images = {s: [] for s in rows}
            for seed in range(runs):
                ramp = ramp_image(measure(integrals, seed), fov_mm=350.0)
                for s, kept in images.items():
                    kept.append(reconstruct(ramp, get_kernel(name), iterative_strength=s))
            for s, kept in images.items():
                if contrast == -1000.0:
                    difference = np.array([kept[0] - kept[1], kept[2] - kept[3]]) / np.sqrt(2)
                    sd = difference[:, (r > 60) & (r < 110)].std()
                    found = nps_radial(difference[:, 350:414, 224:288], pixel_mm=(pixel, pixel), detrend=0)
                    f, power = found.frequency_per_mm, found.nps_hu2_mm2
                    rows[s] += [sd, (f * f * power).sum() / (f * power).sum()]
                    if name == "Br40" and s in (0, 1, 3, 5):
                        axes.plot(f, power / power.max(), label=f"strength {s}")
                mean = np.mean(kept, 0)
                spread = np.array([mean[index == n].mean() for n in range(1, len(bins))])
                mtf = np.abs(np.fft.rfft(np.diff(spread) * np.hanning(len(spread) - 1), 4000))
                mtf /= mtf[0] * np.sinc(f50_axis * 0.2) ** 2
                rows[s].append(f50_axis[np.argmax(mtf < 0.5)])
        for s, (sd, centroid, *f50) in rows.items():
            print(
                f"  {s}: {sd:5.1f} HU ({sd / rows[0][0]:.2f}), {centroid:.3f}/mm, " + " ".join(f"{v:.3f}" for v in f50)
            )
    axes.set(xlabel="frequency (1/mm)", ylabel="NPS (own maximum)", title="Br40, iterative strengths")
    axes.legend()


def chest() -> None:
    """Noise in the soft tissue of a computational patient, at mid-lung and at the shoulders."""
    patient, scanner = make_patient(1), Scanner()
    offsets, weights = slice_profile(0.5, 1.0, scanner)
    protocols = [CHEST.with_(kernel=k, ctdivol_mgy=d) for d in (6.5, 1.3) for k in ("Br40", "B70")]
    for place, z in (("mid-lung", 121.0), ("shoulders", 227.0)):
        hu = patient.slab(z + offsets, 0.5, shape=(1024, 1024), fov_mm=500.0).hu(120.0)
        clean, noisy = (
            render_slice(hu, weights, pixel_mm=PIXEL, protocols=protocols, scanner=scanner, seed=s, slice_index=0)
            for s in (None, 1)
        )
        soft = (clean[0] > 20) & (clean[0] < 90)
        found = [f"{p.label()} {(b - a)[soft].std():.0f}" for p, a, b in zip(protocols, clean, noisy, strict=True)]
        print(f"noise SD in soft tissue of {patient.name}, {place}, HU: {', '.join(found)}")


def curves(axes) -> None:
    """All named kernels."""
    for name in kernel_names():
        kernel = get_kernel(name)
        axes.plot(kernel.frequency_per_mm, kernel.mtf, "-" if kernel.note.startswith("measured") else ":", label=name)
    axes.set(xlabel="frequency (1/mm)", ylabel="MTF", title="named kernels; dotted: emulations")
    axes.legend(ncol=3, fontsize=6)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path)
    folder = parser.parse_args().figures
    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    integrals = project(cylinder(130, 0))
    water(integrals)
    noise(integrals)
    spectra(axes[0, 1])
    wires(axes[1, 0])
    pairs(project(cylinder(40, -1000, cylinder(130, 0))))
    strengths(axes[1, 1])
    chest()
    curves(axes[0, 0])
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        figure.tight_layout()
        figure.savefig(folder / "scanner_checks.png", dpi=80)
        print(f"wrote {folder / 'scanner_checks.png'}")


if __name__ == "__main__":
    main()
