"""Tissues as materials: elements and density -> mu(E) -> the HU that a scanner at each kVp would show.

Sources. Mass attenuation coefficients: NIST Standard Reference Database 126 (Hubbell and Seltzer), with coherent
scattering. Compositions and densities: ICRU Report 44 (table 4.1) and Report 46, blood and contrast by mixing.
Spectrum: Kramers' law behind 6 mm Al and 200 mm water (a chest), energy-weighted as an energy-integrating detector sees
it; tungsten lines and a vendor's own filters are left out, so 1 mg/ml of iodine is 28 HU at 120 kVp where clinical
scanners show 25 to 26: high-Z contrast is right to about 10 %, soft tissue to a few HU. Water is 0 and air -1000 by
definition.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from harmonict.core import HarmonictError

KVP = (70, 80, 100, 120, 140)

# keV; mu/rho in cm^2/g at these energies. Iodine has its K edge at 33.17 keV and gets its own axis.
_ENERGY_KEV = (20.0, 30.0, 40.0, 50.0, 60.0, 80.0, 100.0, 150.0)
_MASS_ATTENUATION = {
    "H": (0.3695, 0.3570, 0.3458, 0.3355, 0.3260, 0.3091, 0.2944, 0.2651),
    "C": (0.4420, 0.2562, 0.2076, 0.1871, 0.1753, 0.1610, 0.1514, 0.1347),
    "N": (0.6178, 0.3066, 0.2288, 0.1980, 0.1817, 0.1639, 0.1529, 0.1353),
    "O": (0.8651, 0.3779, 0.2585, 0.2132, 0.1907, 0.1678, 0.1551, 0.1361),
    "Na": (2.057, 0.7197, 0.3969, 0.2804, 0.2268, 0.1796, 0.1585, 0.1335),
    "Mg": (2.763, 0.9306, 0.4881, 0.3292, 0.2570, 0.1951, 0.1686, 0.1394),
    "Al": (3.441, 1.128, 0.5685, 0.3681, 0.2778, 0.2018, 0.1704, 0.1378),
    "P": (5.352, 1.700, 0.8096, 0.4916, 0.3494, 0.2324, 0.1865, 0.1432),
    "S": (6.708, 2.113, 0.9872, 0.5849, 0.4053, 0.2585, 0.2020, 0.1506),
    "Cl": (7.739, 2.425, 1.117, 0.6483, 0.4395, 0.2696, 0.2050, 0.1480),
    "Ar": (8.629, 2.697, 1.228, 0.7012, 0.4664, 0.2760, 0.2043, 0.1427),
    "K": (10.93, 3.413, 1.541, 0.8679, 0.5678, 0.3251, 0.2345, 0.1582),
    "Ca": (13.06, 4.080, 1.830, 1.019, 0.6578, 0.3656, 0.2571, 0.1674),
    "Fe": (25.68, 8.176, 3.629, 1.958, 1.205, 0.5952, 0.3717, 0.1964),
}
_IODINE_KEV = (20.0, 30.0, 33.168, 33.170, 40.0, 50.0, 60.0, 80.0, 100.0, 150.0)
_IODINE = (25.43, 8.561, 6.553, 35.82, 22.10, 12.32, 7.579, 3.510, 1.942, 0.6978)

# name -> (density g/cm^3, mass fractions, written in parts per thousand). The plastics of the Lungman-like phantom are
# guesses fitted to its HU.
COMPOSITIONS: dict[str, tuple[float, dict[str, float]]] = {
    name: (density, dict(zip(mix.split()[::2], (float(v) / 1000 for v in mix.split()[1::2]), strict=True)))
    for name, density, mix in (
        ("air", 0.001205, "N 755 O 232 Ar 13"),
        ("water", 1, "H 111.898 O 888.102"),
        ("fat", 0.93, "H 116 C 681 N 2 O 198 Na 1 S 1 Cl 1"),
        ("muscle", 1.05, "H 102 C 143 N 34 O 710 Na 1 P 2 S 3 Cl 1 K 4"),
        ("skin", 1.09, "H 100 C 204 N 42 O 645 Na 2 P 1 S 2 Cl 3 K 1"),
        ("blood", 1.05, "H 102 C 110 N 33 O 745 Na 1 P 1 S 2 Cl 3 K 2 Fe 1"),
        ("lung_tissue", 1.05, "H 103 C 105 N 31 O 749 Na 2 P 2 S 3 Cl 3 K 2"),
        ("liver", 1.06, "H 102 C 139 N 30 O 716 Na 2 P 3 S 3 Cl 2 K 3"),
        ("spleen", 1.055, "H 103 C 113 N 32 O 741 Na 1 P 3 S 2 Cl 2 K 3"),
        ("gland", 1.02, "H 106 C 332 N 30 O 527 Na 1 P 1 S 2 Cl 1"),
        ("cartilage", 1.1, "H 96 C 99 N 22 O 744 Na 5 P 22 S 9 Cl 3"),
        ("cortical_bone", 1.92, "H 34 C 155 N 42 O 435 Na 1 Mg 2 P 103 S 3 Ca 225"),
        ("spongiosa", 1.18, "H 85 C 404 N 28 O 367 Na 1 Mg 1 P 34 S 2 Cl 2 K 1 Ca 74 Fe 1"),
        ("marrow", 1, "H 110 C 529 N 21 O 335 P 1 S 1.5 Cl 1.5 K 1"),
        ("csf", 1.007, "H 110.7 O 880 Na 4.5 Cl 4.8"),
        ("cord", 1.04, "H 107 C 145 N 22 O 712 Na 2 P 4 S 2 Cl 3 K 3"),
        ("carbon_fibre", 1.55, "H 20 C 880 N 30 O 70"),
        ("foam", 0.06, "H 80 C 600 O 320"),
        ("acrylic", 1.19, "H 80.5 C 599.8 O 319.6"),
        ("polyethylene", 0.92, "H 143.7 C 856.3"),
        ("delrin", 1.42, "H 67.1 C 400 O 532.9"),
        ("polyurethane", 1.06, "H 85 C 640 N 45 O 230"),
        ("epoxy_bone", 1.45, "H 55 C 520 N 20 O 290 Ca 115"),
        ("urethane_tumour", 1.11, "H 80 C 600 N 45 O 235 P 13 Ca 27"),
    )
}


def mass_attenuation(composition: dict[str, float], energy_kev: np.ndarray) -> np.ndarray:
    """mu/rho in cm^2/g of a mixture at `energy_kev` (20 to 150), log-log interpolated in the NIST table."""
    log_e = np.log(energy_kev)
    total = np.zeros(len(energy_kev))
    for element, fraction in composition.items():
        axis, values = (_IODINE_KEV, _IODINE) if element == "I" else (_ENERGY_KEV, _MASS_ATTENUATION[element])
        total += fraction * np.exp(np.interp(log_e, np.log(axis), np.log(values)))
    return total / sum(composition.values())


@lru_cache(maxsize=16)
def spectrum(kvp: int) -> tuple[np.ndarray, np.ndarray]:
    """Photon energies (keV) and the weight of each in the detector's signal behind a chest; the weights sum to 1."""
    energy = np.arange(20.0, kvp, 1.0) + 0.5
    water = mass_attenuation(COMPOSITIONS["water"][1], energy)
    path = 0.6 * 2.699 * mass_attenuation({"Al": 1.0}, energy) + 20.0 * water
    weight = (kvp / energy - 1.0) * energy * np.exp(-path)
    return energy, weight / weight.sum()


def mu_water_per_mm(kvp: float) -> float:
    """Effective linear attenuation coefficient of water, 1/mm. Raises HarmonictError for a kVp off the table."""
    energy, weight = spectrum(check_kvp(kvp))
    return float(weight @ mass_attenuation(COMPOSITIONS["water"][1], energy)) / 10.0


def tissue_hu(name: str, kvp: float) -> float:
    """True HU of a material of the table at `kvp`; "iodine" is the HU that 1 mg/ml of it adds.

    HU = 1000 (mu - mu_water) / (mu_water - mu_air), mu averaged over `spectrum(kvp)`.
    """
    if name == "iodine":
        return _iodine_hu(check_kvp(kvp))
    return _hu(check_kvp(kvp), *COMPOSITIONS[name])


def check_kvp(kvp: float) -> int:
    """The tabulated kVp, or HarmonictError naming those that are."""
    if round(float(kvp), 3) not in KVP:
        raise HarmonictError(f"materials are tabulated at {', '.join(map(str, KVP))} kVp, got {kvp:g}")
    return round(kvp)


def _mu(kvp: int, density: float, composition: dict[str, float]) -> float:
    energy, weight = spectrum(kvp)
    return float(weight @ mass_attenuation(composition, energy)) * density


def _hu(kvp: int, density: float, composition: dict[str, float]) -> float:
    water, air = _mu(kvp, *COMPOSITIONS["water"]), _mu(kvp, *COMPOSITIONS["air"])
    return 1000.0 * (_mu(kvp, density, composition) - water) / (water - air)


def _iodine_hu(kvp: int) -> float:
    water, air = _mu(kvp, *COMPOSITIONS["water"]), _mu(kvp, *COMPOSITIONS["air"])
    return 1000.0 * _mu(kvp, 0.001, {"I": 1.0}) / (water - air)


@lru_cache(maxsize=1)
def _spectral_basis() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """How HU move with kVp, in two numbers a material: HU(kvp) = HU(120) + s0 b0(kvp) + s1 b1(kvp).

    b0 is cortical bone's own move from 120 kVp and b1 iodine's; every other material is their least-squares mixture
    (two processes, photoelectric and Compton, make it exact to about a HU).
    """
    names = [*COMPOSITIONS, "iodine"]
    table = np.array([[tissue_hu(n, k) for k in KVP] for n in names])
    at120 = table[:, KVP.index(120)]
    move = table - at120[:, None]
    basis = np.stack([move[names.index("cortical_bone")] / 1000.0, move[names.index("iodine")]])
    share = np.linalg.lstsq(basis.T, move.T, rcond=None)[0].T
    values = {n: np.array([h, *s], np.float32) for n, h, s in zip(names, at120, share, strict=True)}
    values["water"][:] = 0.0
    values["air"][:] = (-1000.0, 0.0, 0.0)
    return basis[0], basis[1], values


def material_values(name: str) -> np.ndarray:
    """(HU at 120 kVp, s0, s1) of a material: what a phantom is painted with, float32 (3,)."""
    return _spectral_basis()[2][name].copy()


def spectral_shift(kvp: float) -> tuple[float, float]:
    """(b0, b1) at `kvp`: HU(kvp) = HU(120) + s0 b0 + s1 b1. (0, 0) at 120."""
    n = KVP.index(check_kvp(kvp))
    b0, b1, _ = _spectral_basis()
    return float(b0[n]), float(b1[n])


# (HU at 120 kVp, material) along which a voxel of unknown material moves with kVp; used for a scan as digital object
_CURVE = ("air", "fat", "water", "muscle", "spongiosa", "cortical_bone")


def spectral_from_hu120(hu120: np.ndarray) -> np.ndarray:
    """Spectral numbers (2, *shape), float32, of a scan at 120 kVp: each HU as the mixture of its two neighbours in

    air (lung), fat, water, muscle, spongiosa, cortical bone. Contrast-enhanced blood is taken for bone.
    """
    values = np.array([material_values(n) for n in _CURVE])
    # HU between air and -200 are lung: blood and air, which follow water
    points = np.vstack([values[:1], [[-200.0, 0.0, 0.0]], values[1:]])
    return np.stack([np.interp(hu120, points[:, 0], points[:, 1 + n]).astype(np.float32) for n in (0, 1)])
