"""Draw computational patients, their diseases and the Lungman-like phantom, beside real CT where it is at hand.

    python examples/phantom_montage.py [FOLDER]

writes phantom-montage.png, patients.png, disease.png and, with $HARMONICT_DATA set, beside_ct.png to FOLDER (default: a
temporary one), and prints the emphysema index of truth and of three stand-ins for kernels, the time of a slice and the
reach of 80 patients. phantom-montage.png went through harmonict's scanner and reconstruction; in the others blur and
noise are a plain Gaussian and ramp-coloured noise, as a look at the shapes needs.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

from harmonict.core import ScanProtocol
from harmonict.simulate import anatomy, phantom
from harmonict.simulate.disease import EmphysemaSpec, NoduleSpec
from harmonict.simulate.phantom import Patient, make_patient
from harmonict.simulate.reconstruct import scan_and_reconstruct
from harmonict.simulate.scanner import Scanner

FOV_MM, PIXELS = 440.0, 512
WINDOWS = {"lung": (-1350, 150), "soft": (-160, 240)}


def look(patient: Patient, share: float, *, thickness_mm: float = 2.0, noise_hu: float = 10.0) -> np.ndarray:
    """One slice at a share of the lung's height, averaged over its thickness, blurred and noisy like a B40 image."""
    z = share * patient.lung_height_mm + np.arange(-thickness_mm / 2 + 0.25, thickness_mm / 2, 0.5)
    thin = patient.slab(z, 0.5, shape=(PIXELS, PIXELS), fov_mm=FOV_MM, allow_crop=True)
    pixel = FOV_MM / PIXELS
    image = gaussian_filter(thin.hu120.mean(0), 0.6 / pixel)
    f = np.hypot(np.fft.fftfreq(PIXELS)[:, None], np.fft.fftfreq(PIXELS)[None, :]) / pixel
    white = np.random.default_rng([patient.seed, int(1000 * share)]).standard_normal(image.shape)
    grain = np.fft.ifft2(np.fft.fft2(white) * f * np.exp(-((f / 0.28) ** 2))).real
    return image + noise_hu * grain / grain.std()


def draw(rows: list[list[np.ndarray]], titles: list[str], path: Path) -> None:
    """Rows of images, each row drawn twice: lung and soft-tissue window."""
    fig, axes = plt.subplots(2 * len(rows), len(rows[0]), figsize=(3.2 * len(rows[0]), 6.0 * len(rows)), squeeze=False)
    fig.subplots_adjust(0, 0, 1, 1, 0.01, 0.01)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            for k, (low, high) in enumerate(WINDOWS.values()):
                axis = axes[2 * r + k, c]
                axis.imshow(image, cmap="gray", vmin=low, vmax=high)
                axis.axis("off")
        axes[2 * r, 0].text(6, 24, titles[r], fontsize=8, color="white")
    fig.savefig(path, dpi=70)
    plt.close(fig)
    print(path)


def scanned(path: Path) -> None:
    """Five patients through the scanner (B30, 3 mm, 120 kVp, 6.5 mGy), lung window above, soft-tissue window below."""
    protocol = ScanProtocol(kernel="B30", slice_thickness_mm=3.0, kvp=120.0, ctdivol_mgy=6.5, fov_mm=430.0)
    columns = []
    for seed, share in ((4, 0.42), (8, 0.35), (3, 0.5), (11, 0.6), (12, 0.72)):
        patient = make_patient(seed)
        z = share * patient.lung_height_mm
        series = scan_and_reconstruct(patient, [protocol], z_range_mm=(z, z + 3.0), scanner=Scanner(), seed=seed)[0]
        small = zoom(series.hu[0][70:442], 0.58, order=1)
        columns.append(np.vstack([np.clip((small - low) / (high - low), 0, 1) * 255 for low, high in WINDOWS.values()]))
    Image.fromarray(np.hstack(columns).astype(np.uint8)).save(path, optimize=True)
    print(path)


def reach() -> None:
    """How far the skin of the first 80 seeds lies from the centre of the field of view."""
    far = []
    for seed in range(80):
        made = phantom._anatomy(make_patient(seed))
        far.append(anatomy.reach_mm(made, np.linspace(*made.patient.z_range_mm, 9)))
    print(f"80 patients reach {min(far):.0f} to {max(far):.0f} mm from the centre")


def real_slices(folder: Path) -> list[list[np.ndarray]]:
    """Four slices of each public chest CT."""
    import pydicom

    rows = []
    for name in ("LUNG1-001", "C3N-00249", "LIDC-IDRI-0314"):
        files = [pydicom.dcmread(p) for p in sorted((folder / "ct" / name / "image").iterdir())]
        files.sort(key=lambda f: float(f.ImagePositionPatient[2]))
        row = []
        for share in (0.3, 0.5, 0.7, 0.85):
            f = files[int(share * len(files))]
            row.append(f.pixel_array * float(f.RescaleSlope) + float(f.RescaleIntercept))
        rows.append(row)
    return rows


def indices() -> None:
    """LAA-950 (%) and Perc15 (HU) of the truth and of blurred, noisy copies, mean of seeds 1 and 2."""
    looks = {"truth": (0.0, 0.0, 0.0), "soft": (0.75, 8.0, 0.6), "medium": (0.6, 15.0, 0.6), "sharp": (0.0, 60.0, 0.0)}
    print(f"{'emphysema':28s}" + "".join(f"{name:>16s}" for name in looks))
    for spec in (None, EmphysemaSpec(0.05), EmphysemaSpec(0.15), EmphysemaSpec(0.30, "diffuse")):
        line = f"{spec.share if spec else 0:g} {spec.distribution if spec else 'none':24s}"
        found: dict[str, list[np.ndarray]] = {name: [] for name in looks}
        for seed in (1, 2):
            patient = make_patient(seed, emphysema=spec)
            for share in np.linspace(0.1, 0.9, 7):
                z = share * patient.lung_height_mm + np.array([-0.5, 0.0, 0.5])
                thin = patient.slab(z, 0.5, shape=(512, 512), fov_mm=FOV_MM, allow_crop=True)
                rng = np.random.default_rng([seed, int(100 * share)])
                for name, (blur_mm, noise_hu, grain_mm) in looks.items():
                    image = gaussian_filter(thin.hu120.mean(0), blur_mm / (FOV_MM / 512))
                    noise = gaussian_filter(rng.standard_normal(image.shape), grain_mm / (FOV_MM / 512))
                    found[name].append((image + noise_hu * noise / noise.std())[thin.masks["lung"][1]])
        for name in looks:
            hu = np.concatenate(found[name])
            line += f"{100 * (hu < -950).mean():9.1f} {np.percentile(hu, 15):6.0f}"
        print(line)


def seconds() -> None:
    """Time of one slice by grid."""
    patient = make_patient(1)
    for n in (512, 1024):
        patient.slab([100.0], shape=(n, n))
        start = time.perf_counter()
        patient.slab([100.0, 100.5, 101.0, 101.5], 0.5, shape=(n, n))
        print(f"{n}x{n}: {(time.perf_counter() - start) / 4:.2f} s a slice")


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="phantoms-"))
    out.mkdir(parents=True, exist_ok=True)
    scanned(out / "phantom-montage.png")
    shares = (0.1, 0.3, 0.45, 0.6, 0.75, 0.9)
    patients = [make_patient(s) for s in (1, 2, 3, 4)] + [make_patient(5, kind="lungman")]
    titles = [f"{p.name}, {p.sex}" for p in patients]
    draw([[look(p, s) for s in shares] for p in patients], titles, out / "patients.png")
    ill = [
        ("healthy", {}),
        ("mild, upper", {"emphysema": EmphysemaSpec(0.05)}),
        ("moderate, upper", {"emphysema": EmphysemaSpec(0.15)}),
        ("severe, diffuse, 10 mm holes", {"emphysema": EmphysemaSpec(0.30, "diffuse", 10.0)}),
    ]
    images, names = [], []
    for name, disease in ill:
        patient = make_patient(6, **disease)
        images.append([look(patient, s, thickness_mm=1.0) for s in (0.45, 0.6, 0.75, 0.85)])
        names.append(name)
    kinds = [("solid", 0.0), ("solid", 0.9), ("part-solid", 0.5), ("ground-glass", 0.3)]
    row = []
    for density, rough in kinds:
        patient = make_patient(6, nodules=[NoduleSpec(18.0, density, rough)])
        (centre, _), *_ = patient.placed_nodules()
        row.append(look(patient, centre[2] / patient.lung_height_mm, thickness_mm=1.0))
    images.append(row)
    names.append("nodules: solid smooth, solid spiculated, part-solid, ground-glass")
    draw(images, names, out / "disease.png")
    indices()
    seconds()
    reach()
    data = os.environ.get("HARMONICT_DATA")
    if data:
        rows = real_slices(Path(data))
        rows += [[look(p, s) for s in (0.3, 0.5, 0.7, 0.85)] for p in patients[:3]]
        draw(rows, ["LUNG1-001", "C3N-00249", "LIDC-IDRI-0314", *titles[:3]], out / "beside_ct.png")


if __name__ == "__main__":
    main()
