"""Physics of CT images: MTF, noise spectra, detectability. Pure functions; a spectrum travels with its axis."""

from harmonict.physics.detectability import detectability, disc_task, eye_filter
from harmonict.physics.kernel import Kernel, read_kernel, write_kernel
from harmonict.physics.mtf import FREQUENCIES_PER_MM, SkinMTF, edge_mtf, mtf_2d, skin_air_mtf, wire_mtf
from harmonict.physics.nps import NoiseSpectrum, nps_2d, nps_radial, patient_nps, uniform_noise_sd

__all__ = [
    "FREQUENCIES_PER_MM",
    "Kernel",
    "NoiseSpectrum",
    "SkinMTF",
    "detectability",
    "disc_task",
    "edge_mtf",
    "eye_filter",
    "mtf_2d",
    "nps_2d",
    "nps_radial",
    "patient_nps",
    "read_kernel",
    "skin_air_mtf",
    "uniform_noise_sd",
    "wire_mtf",
    "write_kernel",
]
