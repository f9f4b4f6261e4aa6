"""The scanner: true HU of one slice -> noisy line integrals, in parallel-beam (rebinned) geometry.

Physics that is in: focal-spot and detector blur (closed form), bow-tie, Poisson quanta set by the dose, electronic
noise, photon starvation (counts below one quantum are taken for one), the slice-sensitivity profile. What is left out:
beam hardening (one effective energy per kVp), scatter, cone angle, tube-current modulation, and the blur acts on line
integrals and not on intensities. `docs/simulator.md` gives the numbers and where they come from.

A view is one row of the Fourier transform of the slice (projection-slice theorem), so projection is one non-uniform FFT
(FINUFFT) from the pixels to polar frequencies, and its adjoint one back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import finufft
import numpy as np
from scipy import fft

from harmonict.core import HarmonictError, ScanProtocol
from harmonict.simulate.materials import mass_attenuation, mu_water_per_mm, spectrum

# FINUFFT's relative error; 1e-4 keeps noise-free water within 0.1 HU, and single precision gives no more.
_ACCURACY = 1e-4
_UPSAMPLING = 1.25


@dataclass(frozen=True)
class Scanner:
    """A CT scanner after rebinning to parallel rays. Lengths are mm at the isocentre.

    views: projections over 180 degrees. detectors, pitch_mm: samples of one view and the distance between them (a
        flying focal spot or quarter offset makes it smaller than the element). fov_mm: diameter that the rays cover.
    aperture_mm, focal_spot_mm: widths of the detector element and of the focal spot as seen at the isocentre.
    row_mm: width of a detector row, the ramp of the slice profile.
    bow_tie: 0 is none, 1 makes up for a water cylinder of radius `bow_tie_radius_mm` wholly.
    quanta_per_mgy_mm2: quanta in air that cross 1 mm^2 at the isocentre, summed over all views, for 1 mGy of CTDIvol at
        120 kVp; chosen so that the soft tissue of a chest at 6.5 mGy, 1 mm, Br40 shows about 15 HU of noise.
    electronic_quanta: SD of the electronic noise of one sample, in quanta; 0 switches it off.

    Raises HarmonictError where the numbers are no scanner.
    """

    views: int = 720
    detectors: int = 1280
    pitch_mm: float = 0.4
    fov_mm: float = 500.0
    aperture_mm: float = 0.6
    focal_spot_mm: float = 0.4
    row_mm: float = 0.5
    bow_tie: float = 0.4
    bow_tie_radius_mm: float = 160.0
    quanta_per_mgy_mm2: float = 3.5e7
    electronic_quanta: float = 3.0

    def __post_init__(self) -> None:
        for name in ("views", "detectors", "pitch_mm", "fov_mm", "row_mm", "bow_tie_radius_mm", "quanta_per_mgy_mm2"):
            if not getattr(self, name) > 0:
                raise HarmonictError(f"scanner: {name} must be above 0, got {getattr(self, name)}")
        for name in ("aperture_mm", "focal_spot_mm", "bow_tie", "electronic_quanta"):
            if not getattr(self, name) >= 0:
                raise HarmonictError(f"scanner: {name} must be 0 or more, got {getattr(self, name)}")
        if self.detectors * self.pitch_mm < self.fov_mm:
            raise HarmonictError(
                f"scanner: {self.detectors} samples of {self.pitch_mm:g} mm do not cover a field of {self.fov_mm:g} mm"
            )

    @property
    def nyquist_per_mm(self) -> float:
        """The highest frequency that the samples of a view hold."""
        return 0.5 / self.pitch_mm

    def blur_mtf(self, frequency_per_mm: np.ndarray | float) -> np.ndarray:
        """Focal spot x detector element at `frequency_per_mm`: two boxes, sinc x sinc, in closed form."""
        frequency = np.asarray(frequency_per_mm, float)
        return np.sinc(self.aperture_mm * frequency) * np.sinc(self.focal_spot_mm * frequency)


@dataclass(frozen=True, eq=False)
class Projections:
    """Raw data of one slice: what every reconstruction of it shares.

    line_integrals: float32 (views, detectors), dimensionless; view v is at v * 180 / views degrees, sample d at
        (d - detectors // 2) * pitch_mm.
    quanta: float32 (detectors,): expected quanta in air of each sample, which gives the noise.
    """

    line_integrals: np.ndarray
    quanta: np.ndarray
    scanner: Scanner
    kvp: float

    def variance(self) -> np.ndarray:
        """Variance of the line integrals as the counts tell it, (N + electronic^2) / N^2, float32, same shape."""
        counts = np.maximum(self.quanta * np.exp(-self.line_integrals), 1.0)
        return ((counts + self.scanner.electronic_quanta**2) / counts**2).astype(np.float32)


def dose_mgy(protocol: ScanProtocol) -> float:
    """CTDIvol of a protocol: its own, or from kVp and mAs. Raises HarmonictError where it is missing or not above 0."""
    if protocol.ctdivol_mgy is not None:
        dose, what = float(protocol.ctdivol_mgy), "CTDIvol in mGy"
    elif protocol.exposure_mas is not None:
        dose, what = float(protocol.exposure_mas) * mgy_per_mas(needed(protocol, "kvp")), "exposure in mAs"
    else:
        raise HarmonictError(f"protocol {protocol.label()}: a dose is needed, CTDIvol in mGy or exposure in mAs")
    if not (np.isfinite(dose) and dose > 0):
        raise HarmonictError(f"protocol {protocol.label()}: {what} must be above 0, got {dose:g}")
    return dose


def mgy_per_mas(kvp: float) -> float:
    """CTDIvol (32 cm phantom) per mAs: 0.065 at 120 kVp (20 and 100 mAs are 1.3 and 6.5 mGy), else by kVp^2.5."""
    mu_water_per_mm(kvp)  # a kVp off the table is refused there
    return 0.065 * (kvp / 120.0) ** 2.5


def needed(protocol: ScanProtocol, field: str) -> float:
    """A number that a scan cannot do without. Raises HarmonictError where it is missing or not above 0."""
    value = getattr(protocol, field)
    if value is None:
        raise HarmonictError(f"protocol {protocol.label()}: a scan needs {field}")
    if not (np.isfinite(value) and value > 0):
        raise HarmonictError(f"protocol {protocol.label()}: {field} must be above 0, got {value:g}")
    return float(value)


def quanta_per_sample(scanner: Scanner, protocol: ScanProtocol) -> np.ndarray:
    """Expected quanta in air of each sample of a view, float32 (detectors,).

    Dose x slice thickness x sample pitch, shared among the views, through the bow-tie.
    """
    kvp = needed(protocol, "kvp")
    per_mm2 = scanner.quanta_per_mgy_mm2 * _quanta_per_kerma(kvp) / _quanta_per_kerma(120.0)
    total = per_mm2 * dose_mgy(protocol) * needed(protocol, "slice_thickness_mm") * scanner.pitch_mm / scanner.views
    position = (np.arange(scanner.detectors) - scanner.detectors // 2) * scanner.pitch_mm
    radius = scanner.bow_tie_radius_mm
    shorter = 2.0 * (radius - np.sqrt(np.maximum(radius**2 - position**2, 0.0)))
    return (total * np.exp(-scanner.bow_tie * mu_water_per_mm(kvp) * shorter)).astype(np.float32)


@lru_cache(maxsize=16)
def _quanta_per_kerma(kvp: float) -> float:
    """Quanta per air kerma (any unit) of the beam that leaves the tube: 1 / sum of E mu_a(E) over the spectrum.

    mu_a of air goes as E^-3 plus a constant (the two meet at 60 keV, NIST 126), enough for a ratio between kVp.
    """
    energy, signal = spectrum(int(kvp))
    water = mass_attenuation({"H": 0.111898, "O": 0.888102}, energy)
    fluence = signal / energy * np.exp(20.0 * water)  # without the 200 mm of water that `spectrum` looks through
    absorption = 0.023 + 0.0075 * (energy / 60.0) ** -3.2
    return float(fluence.sum() / (fluence * energy * absorption).sum())


def noise_rng(seed: int, slice_index: int, protocol: ScanProtocol) -> np.random.Generator:
    """The noise generator of one slice at one dose, kVp and thickness, whatever order or process asks for it."""
    key = (seed, slice_index, round(1e6 * dose_mgy(protocol)), round(needed(protocol, "kvp")))
    return np.random.default_rng((*key, round(1e3 * needed(protocol, "slice_thickness_mm"))))


def slice_profile(sub_slice_mm: float, thickness_mm: float, scanner: Scanner) -> tuple[np.ndarray, np.ndarray]:
    """The slice-sensitivity profile on thin sub-slices: (offsets in mm from the slice's centre, weights that sum to 1).

    The profile is a box of the slice's thickness blurred by one detector row (never wider than the slice), so its full
    width at half maximum is the thickness; it is integrated over each sub-slice. Sub-slice centres lie at
    (n + 1/2) * sub_slice_mm from the slice's centre, so a slice edge falls between two sub-slices.

    Raises HarmonictError where the slice is thinner than a sub-slice.
    """
    if not thickness_mm > 0:
        raise HarmonictError(f"slice thickness must be above 0 mm, got {thickness_mm:g}")
    if thickness_mm < sub_slice_mm * (1 - 1e-6):
        raise HarmonictError(
            f"a slice of {thickness_mm:g} mm is thinner than the phantom's sampling of {sub_slice_mm:g} mm; "
            "make the phantom with thinner sub-slices"
        )
    ramp = min(scanner.row_mm, thickness_mm)
    count = int(np.ceil((thickness_mm + ramp) / 2 / sub_slice_mm - 1e-9))
    edges = np.arange(-count, count + 1) * sub_slice_mm
    # integral of the trapezoid = difference of two integrated ramps
    low, high = (thickness_mm - ramp) / 2, (thickness_mm + ramp) / 2

    def integral(z: np.ndarray) -> np.ndarray:
        a = np.abs(z)
        falling = np.clip(a, low, high)
        area = np.minimum(a, low) + (falling - low) - (falling - low) ** 2 / (2 * ramp)
        return np.sign(z) * area

    weights = np.diff(integral(edges))
    offsets = (edges[:-1] + edges[1:]) / 2
    return offsets, weights / weights.sum()


def line_integrals(
    hu: np.ndarray, *, pixel_mm: float, kvp: float, scanner: Scanner, area_averaged: bool = True
) -> np.ndarray:
    """Noise-free projections of one slice: float32 (views, detectors), focal spot and detector blur included.

    hu: (y, x) true HU at `kvp`, the field's centre in the middle of the array; below -1000 counts as air.
    area_averaged: True where a pixel holds the mean over its area (a rasterised phantom): that blur is then no part of
        the chain and is divided out. False where it holds a sample (a scan that serves as the object).

    Raises HarmonictError where the array is no slice or anything lies outside the scanner's field of view.
    """
    hu = np.asarray(hu)
    if hu.ndim != 2 or not np.all(np.isfinite(hu)):
        raise HarmonictError(f"the object's slice must be a finite array (y, x), got shape {hu.shape}")
    if not pixel_mm > 0:
        raise HarmonictError(f"the object's pixel must be above 0 mm, got {pixel_mm:g}")
    water = mu_water_per_mm(kvp)
    mu = np.maximum(hu.astype(np.float32) * (water / 1000.0) + water, 0.0).astype(np.float32)
    y, x = ((np.arange(n) - (n - 1) / 2) * pixel_mm for n in mu.shape)
    reach = scanner.fov_mm / 2
    if y[-1] ** 2 + x[-1] ** 2 > reach**2:
        outside = (y[:, None] ** 2 + x[None, :] ** 2) > reach**2
        if (mu[outside] > 0.1 * water).any():
            far = np.sqrt(((y[:, None] ** 2 + x[None, :] ** 2) * (outside & (mu > 0.1 * water))).max())
            raise HarmonictError(
                f"the object reaches {far:.0f} mm from the centre, outside the field of view of {scanner.fov_mm:g} mm "
                f"(radius {reach:g} mm); make it smaller or move it"
            )
        mu = np.where(outside, np.float32(0.0), mu)
    return polar_grid(scanner, mu.shape, pixel_mm).project(mu, _gain(scanner, mu.shape, pixel_mm, area_averaged))


@lru_cache(maxsize=2)
def _gain(scanner: Scanner, shape: tuple[int, int], pixel_mm: float, area_averaged: bool) -> np.ndarray:
    """The scanner's blur at the polar frequencies, over that of the object's pixels, float32."""
    polar = polar_grid(scanner, shape, pixel_mm)
    gain = scanner.blur_mtf(polar.frequency_per_mm)[None, :]
    if area_averaged:
        gain = gain / (np.sinc(polar.ky * pixel_mm) * np.sinc(polar.kx * pixel_mm))
    return gain.astype(np.float32)


def expose(
    integrals: np.ndarray, *, protocol: ScanProtocol, scanner: Scanner, rng: np.random.Generator | None
) -> Projections:
    """Measure noise-free line integrals at the protocol's dose: Poisson quanta, electronic noise, logarithm.

    rng: None gives the noise-free data.
    """
    quanta = quanta_per_sample(scanner, protocol)
    kvp = needed(protocol, "kvp")
    if rng is None:
        return Projections(integrals, quanta, scanner, kvp)
    counts = rng.poisson(quanta * np.exp(-integrals)).astype(np.float32)
    if scanner.electronic_quanta:
        counts += np.float32(scanner.electronic_quanta) * rng.standard_normal(counts.shape, np.float32)
    noisy = np.log(quanta) - np.log(np.maximum(counts, np.float32(1.0)))
    return Projections(noisy.astype(np.float32), quanta, scanner, kvp)


def scan(
    hu: np.ndarray,
    *,
    pixel_mm: float,
    protocol: ScanProtocol,
    scanner: Scanner,
    rng: np.random.Generator | None,
    area_averaged: bool = True,
) -> Projections:
    """Raw data of one slice of true HU: `line_integrals`, then `expose`."""
    dose_mgy(protocol)  # refuse before the work
    needed(protocol, "slice_thickness_mm")
    kvp = needed(protocol, "kvp")
    integrals = line_integrals(hu, pixel_mm=pixel_mm, kvp=kvp, scanner=scanner, area_averaged=area_averaged)
    return expose(integrals, protocol=protocol, scanner=scanner, rng=rng)


class PolarGrid:
    """Pixels <-> polar frequencies <-> samples of the views, for one scanner and one image grid.

    `project` and `back_project` are adjoint to each other; `synthesise` sums polar frequencies at the pixels.
    Radial frequencies run in steps of 1 / (padded detector) from 0 to the lower of the detector's and the grid's limit.
    """

    def __init__(self, scanner: Scanner, shape: tuple[int, int], pixel_mm: float, centre_mm: tuple[float, float]):
        self.scanner, self.shape, self.pixel_mm = scanner, shape, pixel_mm
        # twice the detector: views stay apart when they are convolved with the ramp
        self.padded = int(fft.next_fast_len(2 * scanner.detectors, real=True))
        self.step_per_mm = 1.0 / (self.padded * scanner.pitch_mm)
        highest = min(scanner.nyquist_per_mm, 0.5 / pixel_mm)
        count = int(np.ceil(highest / self.step_per_mm - 1e-6))
        self.frequency_per_mm = np.arange(count) * self.step_per_mm
        angle = np.arange(scanner.views) * np.pi / scanner.views
        self.ky = np.sin(angle)[:, None] * self.frequency_per_mm
        self.kx = np.cos(angle)[:, None] * self.frequency_per_mm
        self._points = tuple((2 * np.pi * pixel_mm * k).ravel().astype(np.float32) for k in (self.ky, self.kx))
        # FINUFFT counts pixels from n // 2, the object's centre is at (n - 1) / 2
        shift = [c + (pixel_mm / 2 if n % 2 == 0 else 0.0) for c, n in zip(centre_mm, shape, strict=True)]
        self._phase = np.exp(-2j * np.pi * (self.ky * shift[0] + self.kx * shift[1])).astype(np.complex64)
        self._plans: dict[int, finufft.Plan] = {}

    def _run(self, kind: int, values: np.ndarray) -> np.ndarray:
        if kind not in self._plans:
            plan = finufft.Plan(
                kind,
                self.shape,
                eps=_ACCURACY,
                isign=1 if kind == 1 else -1,
                dtype=np.complex64,
                nthreads=1,
                upsampfac=_UPSAMPLING,
            )
            plan.setpts(*self._points)
            self._plans[kind] = plan
        return self._plans[kind].execute(values)

    def analyse(self, image: np.ndarray) -> np.ndarray:
        """The Fourier transform (mm^2) of an image at the polar frequencies: complex64 (views, frequencies)."""
        values = self._run(2, image.astype(np.complex64)).reshape(self._phase.shape)
        return values * self._phase * np.float32(self.pixel_mm**2)

    def synthesise(self, strengths: np.ndarray) -> np.ndarray:
        """Sum over polar frequencies k of strength(k) exp(2 pi i k x) at the pixels, real part, float32 (y, x)."""
        values = (strengths * self._phase.conj()).astype(np.complex64)
        return np.ascontiguousarray(self._run(1, values.ravel()).real)

    def to_samples(self, polar: np.ndarray) -> np.ndarray:
        """Fourier transforms of the views -> their samples, float32 (views, detectors)."""
        n, half = self.scanner.detectors, self.scanner.detectors // 2
        padded = np.zeros((polar.shape[0], self.padded // 2 + 1), np.complex64)
        padded[:, : polar.shape[1]] = polar
        views = fft.irfft(padded, self.padded, axis=1) * np.float32(1.0 / self.scanner.pitch_mm)
        return np.concatenate([views[:, self.padded - half :], views[:, : n - half]], axis=1)

    def to_polar(self, views: np.ndarray) -> np.ndarray:
        """Samples of the views -> sum over the samples t of view(t) exp(-2 pi i k t), complex64."""
        n, half = self.scanner.detectors, self.scanner.detectors // 2
        padded = np.zeros((views.shape[0], self.padded), np.float32)
        padded[:, self.padded - half :] = views[:, :half]
        padded[:, : n - half] = views[:, half:]
        return fft.rfft(padded, axis=1)[:, : self.frequency_per_mm.size]

    def project(self, image: np.ndarray, gain: np.ndarray | float = 1.0) -> np.ndarray:
        """Line integrals of an image (1/mm), each polar frequency times `gain`."""
        return self.to_samples(self.analyse(image) * gain)

    def back_project(self, views: np.ndarray, gain: np.ndarray | float = 1.0) -> np.ndarray:
        """The adjoint of `project`."""
        twice = np.full(self.frequency_per_mm.size, 2.0 * self.step_per_mm * self.pixel_mm**2, np.float32)
        twice[0] /= 2  # a real view's transform counts once at 0 and twice, with its mirror, elsewhere
        return self.synthesise(self.to_polar(views) * (twice * gain))


@lru_cache(maxsize=4)
def polar_grid(
    scanner: Scanner, shape: tuple[int, int], pixel_mm: float, centre_mm: tuple[float, float] = (0.0, 0.0)
) -> PolarGrid:
    """The `PolarGrid` of a scanner and image grid, kept for the next slice; centre (y, x) in mm from the isocentre."""
    return PolarGrid(scanner, shape, pixel_mm, centre_mm)
