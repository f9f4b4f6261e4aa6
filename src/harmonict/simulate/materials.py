"""Tissues as materials: elements and density -> mu(E) -> the HU that a scanner at each kVp would show.

Sources. Mass attenuation coefficients: NIST Standard Reference Database 126 (Hubbell and Seltzer), total attenuation with
coherent scattering. Compositions and densities: ICRU Report 44 (table 4.1) and Report 46, blood and contrast by mixing.
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
AIR = "air"

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

# name: (density g/cm^3, mass fractions)
COMPOSITIONS: dict[str, tuple[float, dict[str, float]]] = {
    "air": (0.001205, {"N": 0.755, "O": 0.232, "Ar": 0.013}),
    "water": (1.0, {"H": 0.111898, "O": 0.888102}),
    "fat": (0.93, {"H": 0.116, "C": 0.681, "N": 0.002, "O": 0.198, "Na": 0.001, "S": 0.001, "Cl": 0.001}),
    "muscle": (
        1.05,
        {"H": 0.102, "C": 0.143, "N": 0.034, "O": 0.710, "Na": 0.001, "P": 0.002, "S": 0.003, "Cl": 0.001, "K": 0.004},
    ),
    "skin": (
        1.09,
        {"H": 0.100, "C": 0.204, "N": 0.042, "O": 0.645, "Na": 0.002, "P": 0.001, "S": 0.002, "Cl": 0.003, "K": 0.001},
    ),
    "blood": (
        1.05,
        # fmt: off
        {
            "H": 0.102,
            "C": 0.110,
            "N": 0.033,
            "O": 0.745,
            "Na": 0.001,
            "P": 0.001,
            "S": 0.002,
            "Cl": 0.003,
            "K": 0.002,
            "Fe": 0.001,
        },
        # fmt: on
    ),
    "lung_tissue": (
        1.05,
        {"H": 0.103, "C": 0.105, "N": 0.031, "O": 0.749, "Na": 0.002, "P": 0.002, "S": 0.003, "Cl": 0.003, "K": 0.002},
    ),
    "liver": (
        1.06,
        {"H": 0.102, "C": 0.139, "N": 0.030, "O": 0.716, "Na": 0.002, "P": 0.003, "S": 0.003, "Cl": 0.002, "K": 0.003},
    ),
    "spleen": (
        1.055,
        {"H": 0.103, "C": 0.113, "N": 0.032, "O": 0.741, "Na": 0.001, "P": 0.003, "S": 0.002, "Cl": 0.002, "K": 0.003},
    ),
    "gland": (1.02, {"H": 0.106, "C": 0.332, "N": 0.030, "O": 0.527, "Na": 0.001, "P": 0.001, "S": 0.002, "Cl": 0.001}),
    "cartilage": (
        1.10,
        {"H": 0.096, "C": 0.099, "N": 0.022, "O": 0.744, "Na": 0.005, "P": 0.022, "S": 0.009, "Cl": 0.003},
    ),
    "cortical_bone": (
        1.92,
        {"H": 0.034, "C": 0.155, "N": 0.042, "O": 0.435, "Na": 0.001, "Mg": 0.002, "P": 0.103, "S": 0.003, "Ca": 0.225},
    ),
    # vertebral and rib marrow space: ICRU 44 "spongiosa" at two densities
    "spongiosa": (
        1.18,
        # fmt: off
        {
            "H": 0.085,
            "C": 0.404,
            "N": 0.028,
            "O": 0.367,
            "Na": 0.001,
            "Mg": 0.001,
            "P": 0.034,
            "S": 0.002,
            "Cl": 0.002,
            "K": 0.001,
            "Ca": 0.074,
            "Fe": 0.001,
        },
        # fmt: on
    ),
    "marrow": (
        1.0,
        {"H": 0.110, "C": 0.529, "N": 0.021, "O": 0.335, "P": 0.001, "S": 0.0015, "Cl": 0.0015, "K": 0.001},
    ),
    "csf": (1.007, {"H": 0.1107, "O": 0.880, "Na": 0.0045, "Cl": 0.0048}),
    "cord": (
        1.04,
        {"H": 0.107, "C": 0.145, "N": 0.022, "O": 0.712, "Na": 0.002, "P": 0.004, "S": 0.002, "Cl": 0.003, "K": 0.003},
    ),
    "carbon_fibre": (1.55, {"H": 0.02, "C": 0.88, "N": 0.03, "O": 0.07}),
    "foam": (0.06, {"H": 0.08, "C": 0.60, "O": 0.32}),
    "acrylic": (1.19, {"H": 0.0805, "C": 0.5998, "O": 0.3196}),
    "polyethylene": (0.92, {"H": 0.1437, "C": 0.8563}),
    "delrin": (1.42, {"H": 0.0671, "C": 0.4000, "O": 0.5329}),
    "polyurethane": (1.06, {"H": 0.085, "C": 0.640, "N": 0.045, "O": 0.230}),
    "epoxy_bone": (1.45, {"H": 0.055, "C": 0.52, "N": 0.02, "O": 0.29, "Ca": 0.115}),
    "urethane_tumour": (1.11, {"H": 0.080, "C": 0.60, "N": 0.045, "O": 0.235, "P": 0.013, "Ca": 0.027}),
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
    return int(round(kvp))


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
