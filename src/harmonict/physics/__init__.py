"""Physics of CT images: MTF, noise spectra, detectability. Pure functions; a spectrum travels with its axis."""

from harmonict.physics.kernel import Kernel, read_kernel, write_kernel
from harmonict.physics.mtf import FREQUENCIES_PER_MM, SkinMTF, skin_air_mtf
from harmonict.physics.nps import NoiseSpectrum, nps_2d, nps_radial, patient_nps, uniform_noise_sd

__all__ = [
    "FREQUENCIES_PER_MM",
    "Kernel",
    "NoiseSpectrum",
    "SkinMTF",
    "nps_2d",
    "nps_radial",
    "patient_nps",
    "read_kernel",
    "skin_air_mtf",
    "uniform_noise_sd",
    "write_kernel",
]
