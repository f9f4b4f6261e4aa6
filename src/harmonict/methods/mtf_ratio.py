"""MTF ratio (Ohkubo et al., Med Phys 38, 3915, 2011): one kernel's image is another's, filtered by the ratio of MTFs.

    paper (Zarei et al., "Physics-informed", eq 1-2)        here
    I_b = F^-1[F[I_a] F[PSF_b] / F[PSF_a]]        (eq 1)    fit=fir: the ratio of two-dimensional PSFs, least squares
    I_b = F^-1[F[I_a] MTF_ratio(w)]               (eq 2)    MTFRatio.translate
    MTF_ratio(w), measured on a phantom           (Ohkubo)  amplitude_ratio (pairs), mtf_ratio (two MTFs)
Symbols: f radial frequency in cycles per mm, S and T the MTFs of source and target, G(f) the gain.
Departures: 1. the MTFs may be measured at the patients' own skin, without phantom or pair. 2. A measured ratio is known
only where S stands above its noise: beyond it the gain is held, and capped. 3. `fit=wiener` weighs the ratio with the
coherence of the pair, or with what is uncertain in S: least error, less noise texture. 4. `fit=fir` drops the
isotropy: taps in pixels, applied at another pixel size through their transfer function in cycles per mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from scipy import fft, ndimage
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from harmonict.core import HarmonictError, ScanProtocol, Series
from harmonict.core.padding import clip_floor
from harmonict.data import SlicePair, SlicePairs
from harmonict.harmonizer import About, Harmonizer
from harmonict.physics.kernel import Kernel, crossing
from harmonict.physics.mtf import FREQUENCIES_PER_MM, in_threads, skin_air_mtf
from harmonict.physics.mtf import source_mtf as known_mtf
from harmonict.physics.nps import NoiseSpectrum, patient_nps

PAIR_FREQUENCIES_PER_MM = np.arange(131) * 0.01  # up to the corner of 0.54 mm pixels
MARGIN_MM = 24.0  # reflected border around a slice: longer than any kernel's PSF
FLOOR = 0.05  # below this a measured MTF is mostly its own noise


@dataclass(frozen=True)
class Config:
    """fit: "ratio" (amplitude ratio: right noise texture), "wiener" (least error) or "fir" (least squares taps; pairs
    only). gain_cap: highest gain where only MTFs say what the gain is (ours: 6; see docs/methods/mtf-ratio.md).
    noise_limit: without pairs, the noise SD after sharpening is at most this many times the larger of the source's and
    the target's (ours). taps: side of the FIR filter in pixels, odd.
    """

    fit: Literal["ratio", "wiener", "fir"] = "ratio"
    gain_cap: float = 6.0
    noise_limit: float = 1.5
    taps: int = 21

    def __post_init__(self) -> None:
        if self.taps < 3 or self.taps % 2 == 0:
            raise ValueError(f"taps must be an odd number from 3 on, got {self.taps}")
        if not self.gain_cap >= 1:
            raise ValueError(f"gain_cap must be at least 1, got {self.gain_cap:g}")
        if not self.noise_limit >= 1:
            raise ValueError(f"noise_limit must be at least 1, got {self.noise_limit:g}")


class MTFRatio(Harmonizer):
    """A radial Fourier filter from one kernel to another."""

    name = "mtf-ratio"
    paper = "Ohkubo et al. 2011"
    uses_source_mtf = True
    Config = Config
    gain: Tensor  # (131,) at PAIR_FREQUENCIES_PER_MM: fitted on pairs ("ratio", "wiener")
    taps: Tensor  # (k, k): fitted on pairs ("fir"), with
    taps_pixel_mm: Tensor  # (2,) the pixels (y, x) that they were fitted on
    target_mtf: Tensor  # (64,) at FREQUENCIES_PER_MM: the target of a model without pairs
    target_nps: Tensor  # (3, n) frequency, HU^2 mm^2 of the target's noise and of its rounding; may be missing
    source_mtf: Tensor  # (64,) the source's MTF where a file says it; else every series is measured at its own skin

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        for name in ("gain", "taps", "taps_pixel_mm", "target_mtf", "target_nps", "source_mtf"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))
        self._kept: tuple[About, tuple[int, int], np.ndarray] | None = None

    # -- three ways to a model -----------------------------------------------------------------------------------

    def fit(self, pairs: SlicePairs, run: Any = None) -> Self:
        """From pairs of slices of the same raw data, on one grid and of one source and one target kernel."""
        if len(pairs.source_kernels) > 1:
            raise HarmonictError(
                f"mtf-ratio is one filter for one source kernel, the pairs have {', '.join(pairs.source_kernels)}; "
                "choose one with --source-protocol, or by its folder"
            )
        self.target = pairs.target_protocol
        if self.config.fit == "fir":
            pixel = pairs[0].pixel_mm
            if any(not np.allclose(pair.pixel_mm, pixel, rtol=1e-3) for pair in pairs):
                raise HarmonictError("fit=fir needs pairs of one pixel size; use fit=wiener for pairs of several")
            self.taps = torch.from_numpy(least_squares_taps(pairs, self.config.taps))
            self.taps_pixel_mm = torch.tensor(pixel, dtype=torch.float64)
        else:
            self.gain = torch.from_numpy(pair_gain(pairs, self.config.fit))
        return self

    @classmethod
    def like(cls, examples: Sequence[Series], config: Any = None) -> Self:
        """No pairs: the target's MTF (and noise spectrum) measured on the examples, the median of several."""
        target = _known_in_common(examples)
        mtf = np.median([skin_air_mtf(series).kernel.mtf for series in examples], axis=0)
        model = cls.from_mtfs(Kernel("target", FREQUENCIES_PER_MM, mtf), config=config, target=target)
        if len(examples) == 1:
            noise = _noise_or_none(examples[0])
            if noise is not None:
                model.target_nps = torch.from_numpy(noise)
        return model

    @classmethod
    def from_mtfs(
        cls,
        target_mtf: Kernel,
        source_mtf: Kernel | None = None,
        *,
        config: Any = None,
        target: ScanProtocol | None = None,
    ) -> Self:
        """No pairs: two MTFs, or the target's alone (each source is then measured at its own skin)."""
        model = cls(config, target=target)
        if model.config.fit == "fir":
            raise HarmonictError("fit=fir needs pairs; without pairs use --set fit=ratio or fit=wiener")
        model.target_mtf = torch.from_numpy(target_mtf.at(FREQUENCIES_PER_MM))
        if source_mtf is not None:
            model.source_mtf = torch.from_numpy(source_mtf.at(FREQUENCIES_PER_MM))
        return model

    # -- translate -----------------------------------------------------------------------------------------------

    def describe(self, series: Series, *, source_mtf: Kernel | None = None) -> About:
        """The source's MTF: given, from the model, or measured at its skin; with it, its noise spectrum."""
        if not len(self.target_mtf):
            return super().describe(series, source_mtf=source_mtf)
        about = super().describe(series)
        in_model = source_mtf is None and len(self.source_mtf)
        measured = {"source_mtf": self.source_mtf.numpy() if in_model else known_mtf(series, source_mtf)}
        noise = _noise_or_none(series) if len(self.target_nps) else None
        if noise is not None:
            measured["source_nps"] = noise
        about = replace(about, measured=measured)
        return replace(about, note=self._shortfall(about))

    def transfer(self, about: About) -> tuple[np.ndarray, np.ndarray]:
        """The radial gain for a source that `describe` has seen: (frequency in 1/mm, gain). Not for fit=fir."""
        if len(self.gain):
            return PAIR_FREQUENCIES_PER_MM, self.gain.numpy()
        if not len(self.target_mtf):
            raise HarmonictError("mtf-ratio has no filter yet: fit it on pairs, or give --like or MTF files")
        source_nps = about.measured.get("source_nps")
        target_nps = self.target_nps.numpy() if len(self.target_nps) else None
        known = source_nps is not None and target_nps is not None
        witness = noise_ratio(source_nps, target_nps) if known else None  # type: ignore[arg-type]
        gain = mtf_ratio(
            about.measured["source_mtf"], self.target_mtf.numpy(), witness=witness, gain_cap=self.config.gain_cap
        )
        if known:
            gain = limit_noise(gain, source_nps, target_nps, self.config.noise_limit)  # type: ignore[arg-type]
        if self.config.fit == "wiener":
            gain = gain * sure_share(about.measured["source_mtf"], source_nps)
        return FREQUENCIES_PER_MM, gain

    def _shortfall(self, about: About) -> str:
        """One line where the filtered source will not reach the target's f50."""
        frequency, gain = self.transfer(about)
        source = about.measured["source_mtf"]
        start, wanted = crossing(frequency, source, 0.5), crossing(frequency, self.target_mtf.numpy(), 0.5)
        reached = crossing(frequency, source * gain, 0.5)
        if not start < wanted or not reached < 0.95 * wanted:
            return ""
        return f"target f50 {wanted:.2f}/mm not reached: {reached:.2f}/mm is what the source's noise allows"

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        py, px = about.pixel_mm
        h, w = x.shape[-2:]
        my, mx = min(h - 1, round(MARGIN_MM / py)), min(w - 1, round(MARGIN_MM / px))
        shape = fft.next_fast_len(h + 2 * my, real=True), fft.next_fast_len(w + 2 * mx, real=True)
        response = self._response(shape, about)
        source = x.cpu().numpy()
        out = np.empty_like(source)

        def filtered(n: int) -> None:  # slice by slice: the same numbers whatever the batch
            wide = np.empty(shape, np.float32)
            _reflect(source[n, 0], my, mx, out=wide)
            spectrum = fft.rfft2(wide, overwrite_x=True)
            spectrum *= response
            out[n, 0] = fft.irfft2(spectrum, s=shape, overwrite_x=True)[my : my + h, mx : mx + w]

        in_threads(filtered, range(len(source)))
        return torch.from_numpy(out).to(x.device)

    def _response(self, shape: tuple[int, int], about: About) -> np.ndarray:
        """The filter on the grid of `rfft2`, kept from one batch of a series to the next."""
        if self._kept is not None and self._kept[0] is about and self._kept[1] == shape:
            return self._kept[2]
        py, px = about.pixel_mm
        fy, fx = np.fft.fftfreq(shape[0], py), np.fft.rfftfreq(shape[1], px)
        if len(self.taps):
            response = tap_response(self.taps.numpy(), tuple(self.taps_pixel_mm.tolist()), fy, fx)
        else:
            frequency, gain = self.transfer(about)
            # Smooth between samples: corners in the gain would leave ghosts 1 / step (50 mm) away.
            half = np.minimum(np.hypot(fy[: shape[0] // 2 + 1, None], fx[None, :]), frequency[-1])
            response = PchipInterpolator(frequency, gain)(half)
            response = np.concatenate([response, response[1 : (shape[0] + 1) // 2][::-1]])
        self._kept = about, shape, response.astype(np.float32)
        return self._kept[2]


def _reflect(image: np.ndarray, my: int, mx: int, *, out: np.ndarray) -> None:
    """`image` in the middle of `out`, mirrored at its border to at least the margins; the last row and column of the
    mirror image fill what is left."""
    h, w = image.shape
    core = out[my : my + h]
    core[:, mx : mx + w] = image
    core[:, :mx] = image[:, mx:0:-1]
    core[:, mx + w : w + 2 * mx] = image[:, w - 1 - mx : w - 1][:, ::-1]
    core[:, w + 2 * mx :] = core[:, w + 2 * mx - 1 : w + 2 * mx]
    out[:my] = out[2 * my : my : -1]
    out[my + h : h + 2 * my] = out[h - 1 : my + h - 1][::-1]
    out[h + 2 * my :] = out[h + 2 * my - 1]


# -- the gain from two MTFs ----------------------------------------------------------------------------------------


def mtf_ratio(
    source_mtf: np.ndarray,
    target_mtf: np.ndarray,
    *,
    witness: np.ndarray | None,
    gain_cap: float,
) -> np.ndarray:
    """The gain at FREQUENCIES_PER_MM from two MTFs there (eq 2, regularised).

    witness: square root of the ratio of the noise spectra, up to a factor (NaN where unknown), or None. It replaces
    the ratio above 0.2 per mm where the two agree in shape (SD of their logarithms' difference 0.12 at most).
    gain_cap: no gain above it. Where the source's MTF is under FLOOR, a gain above 1 is held: no further sharpening.
    """
    f = FREQUENCIES_PER_MM
    source, target = clean_tail(source_mtf), clean_tail(target_mtf)
    ratio = target / source
    known = int(np.argmax(source < FLOOR)) if np.any(source < FLOOR) else len(f) - 1
    # Past it the source is not known: no further sharpening, whatever two extrapolated tails make of each other.
    ratio[known:] = ratio[known] if ratio[known] >= 1 else np.minimum(ratio[known:], ratio[known])
    joined = _join_witness(ratio, witness, np.minimum(source, target))
    return np.minimum(joined, gain_cap)


def clean_tail(mtf: np.ndarray) -> np.ndarray:
    """A measured MTF with its noisy tail (from the first value under FLOOR on) continued as a Gaussian.

    The Gaussian's width is that of the fall from 0.5 to FLOOR. Always above 0.
    """
    f = FREQUENCIES_PER_MM
    if not np.any(mtf < FLOOR):
        return mtf
    end = int(np.argmax(mtf < FLOOR))
    half = int(np.argmax(mtf < 0.5))
    fall = slice(half, max(end, half + 2))
    logs = np.log(np.maximum(mtf[fall], FLOOR / 2))
    slope = min(float(np.polyfit(f[fall] ** 2, logs, 1)[0]), -1.0)
    out = mtf.copy()
    level = max(float(mtf[end - 1]), FLOOR)
    out[end:] = np.maximum(level * np.exp(slope * (f[end:] ** 2 - f[end - 1] ** 2)), 1e-6)
    return out


def noise_ratio(source_nps: np.ndarray, target_nps: np.ndarray) -> np.ndarray:
    """sqrt(target noise power / source noise power) at FREQUENCIES_PER_MM; NaN beyond either axis."""
    curves = [
        np.interp(FREQUENCIES_PER_MM, frequency, power, left=np.nan, right=np.nan)
        for frequency, power, _ in (source_nps, target_nps)
    ]
    return np.sqrt(curves[1] / curves[0])


def _join_witness(ratio: np.ndarray, witness: np.ndarray | None, lower_mtf: np.ndarray) -> np.ndarray:
    if witness is None:
        return ratio
    f = FREQUENCIES_PER_MM
    strong = (f >= 0.14) & np.isfinite(witness) & np.cumprod(lower_mtf > 0.15).astype(bool)
    if strong.sum() < 4:
        return ratio
    difference = np.log(ratio[strong] / witness[strong])
    if difference.std() > 0.12:
        return ratio
    end = int(np.nonzero(np.isfinite(witness))[0][-1])
    scaled = np.where(np.isfinite(witness), witness, witness[end]) * np.exp(difference.mean())
    share = np.clip((f - 0.16) / 0.10, 0, 1)
    return np.exp((1 - share) * np.log(ratio) + share * np.log(scaled))


def limit_noise(gain: np.ndarray, source_nps: np.ndarray, target_nps: np.ndarray, limit: float) -> np.ndarray:
    """The gain, capped so far that the noise SD after it is at most `limit` times the larger of source and target SD.

    SDs are taken from the spectra above 0.1 per mm, where patients hold little anatomy. Never below 1 where the gain
    is above 1: smoothing is not what noise asks for here.
    """
    allowed = limit * max(_noise_sd(source_nps), _noise_sd(target_nps))
    for cap in np.geomspace(max(gain.max(), 1.0), 1.0, 60):
        capped = np.minimum(gain, cap)
        if _noise_sd(source_nps, capped) <= allowed:
            return capped
    return capped


def _noise_sd(nps: np.ndarray, gain: np.ndarray | None = None) -> float:
    frequency, power = nps[:2]
    factor = 1.0 if gain is None else np.interp(frequency, FREQUENCIES_PER_MM, gain) ** 2
    return float(np.sqrt(np.trapezoid(np.where(frequency > 0.1, 2 * np.pi * frequency * power * factor, 0), frequency)))


def sure_share(source_mtf: np.ndarray, source_nps: np.ndarray | None) -> np.ndarray:
    """What least error leaves of the ratio at FREQUENCIES_PER_MM: S^2 / (S^2 + 0.02^2), times the share of the source's
    noise power that is not rounding.

    0.02 is what a measured MTF is uncertain by. Quantum noise went through the kernel and is converted with the image;
    rounding did not, and only adds error.
    """
    source = clean_tail(source_mtf)
    share = source**2 / (source**2 + 0.02**2)
    if source_nps is None:
        return share
    frequency, power, rounding = source_nps[0], source_nps[1], source_nps[2, 0]
    return share * np.interp(FREQUENCIES_PER_MM, frequency, power / (power + rounding))


def _noise_or_none(series: Series) -> np.ndarray | None:
    """(3, n) frequency, noise power less that of rounding to whole HU, and the latter; None without uniform tissue."""
    try:
        noise: NoiseSpectrum = patient_nps(series)
    except HarmonictError:
        return None
    rounding = float(np.prod(series.pixel_mm)) / 12
    power = np.maximum(noise.nps_hu2_mm2 - rounding, 0.05 * rounding)
    return np.stack([noise.frequency_per_mm, power, np.full_like(power, rounding)])


def _known_in_common(examples: Sequence[Series]) -> ScanProtocol:
    first, *rest = [series.protocol for series in examples]
    differs = {k: None for k, v in first.as_dict().items() if any(p.as_dict()[k] != v for p in rest)}
    return first.with_(**differs)


# -- the gain from pairs -------------------------------------------------------------------------------------------


def pair_gain(pairs: SlicePairs, fit: str, *, patch: int = 128) -> np.ndarray:
    """The gain at PAIR_FREQUENCIES_PER_MM from the spectra of overlapping Hann-windowed patches (Welch).

    fit="ratio": sqrt(P_target / P_source); "wiener": Re(P_cross) / P_source. Patches that hold padding, or more than
    2 % of pixels at the floor at which a file clips, are left out where others remain.
    """
    n = len(PAIR_FREQUENCIES_PER_MM)
    total = np.zeros((3, n))
    for strict in (True, False):
        for pair in pairs:
            total += _pair_power(pair, patch, strict)
        if total[0].any():
            break
    else:
        raise HarmonictError(f"the pairs hold no measured patch of {patch} pixels: fit on larger or whole slices")
    seen = total[0] > 0
    source, target, cross = total[:, seen]
    gain = np.sqrt(target / source) if fit == "ratio" else np.maximum(cross / source, 0)
    gain = np.interp(PAIR_FREQUENCIES_PER_MM, PAIR_FREQUENCIES_PER_MM[seen], gain)
    return gain


def _pair_power(pair: SlicePair, patch: int, strict: bool) -> np.ndarray:
    """(3, n) power of source, of target, and cross power, summed in rings."""
    h, w = pair.source.shape
    size = min(patch, h, w)
    window = np.outer(np.hanning(size + 1)[:size], np.hanning(size + 1)[:size])
    good = pair.measured.copy()
    if strict:
        clipped = np.zeros((h, w), bool)
        for hu in (pair.source, pair.target):
            clipped |= hu <= clip_floor(hu)
    radius = np.hypot(
        np.fft.fftfreq(size, pair.pixel_mm[0])[:, None], np.fft.rfftfreq(size, pair.pixel_mm[1])[None, :]
    ).ravel()
    n = len(PAIR_FREQUENCIES_PER_MM)
    ring = np.rint(radius / PAIR_FREQUENCIES_PER_MM[1]).astype(int)
    out = np.zeros((3, n))
    for y in range(0, h - size + 1, size // 2):
        for x in range(0, w - size + 1, size // 2):
            part = np.s_[y : y + size, x : x + size]
            if not good[part].all() or (strict and clipped[part].mean() > 0.02):
                continue
            s, t = (hu[part].astype(np.float64) for hu in (pair.source, pair.target))
            a, b = np.fft.rfft2((s - s.mean()) * window), np.fft.rfft2((t - t.mean()) * window)
            for k, power in enumerate((np.abs(a) ** 2, np.abs(b) ** 2, (a.conj() * b).real)):
                out[k] += np.bincount(ring, power.ravel(), max(n, ring.max() + 1))[:n]
    return out


def least_squares_taps(pairs: SlicePairs, taps: int) -> np.ndarray:
    """(taps, taps) float64: the point-symmetric filter with least squared error over the measured pixels.

    Point symmetry (a PSF is even) halves what must be learned from few slices. A ridge of 1e-7 of the mean power keeps
    the frequencies that the source does not pass from blowing up. Where more than 0.5 % of the pixels within the
    filter's reach are clipped (air noise at -1024), no linear filter holds: such pixels weigh a tenth.
    """
    half = taps // 2
    offsets = [(dy, dx) for dy in range(-half, 1) for dx in range(-half, half + 1) if (dy, dx) <= (0, 0)]
    n = len(offsets)
    a, b = np.zeros((n, n)), np.zeros(n)
    for pair in pairs:
        centre = float(pair.source[pair.measured].mean())
        source = np.pad(np.where(pair.measured, pair.source - centre, 0).astype(np.float32), half, mode="reflect")
        target = np.where(pair.measured, pair.target - pair.source, 0)
        use = ndimage.binary_erosion(pair.measured, np.ones((3, 3)), iterations=half, border_value=1)
        clipped = (pair.source <= clip_floor(pair.source)) | (pair.target <= clip_floor(pair.target))
        weight = np.where(ndimage.uniform_filter(clipped.astype(np.float32), taps) > 0.005, 0.1, 1.0)
        h, w = pair.source.shape
        for rows in np.array_split(np.arange(h), max(1, h // 32)):
            y = np.s_[rows[0] : rows[-1] + 1]
            chosen = use[y]
            columns = [
                (
                    source[rows[0] + half + dy : rows[-1] + 1 + half + dy, half + dx : half + dx + w]
                    + source[rows[0] + half - dy : rows[-1] + 1 + half - dy, half - dx : half - dx + w]
                )[chosen]
                for dy, dx in offsets
            ]
            block = np.stack(columns).astype(np.float64)
            weighted = block * weight[y][chosen]
            a += weighted @ block.T
            b += weighted @ target[y][chosen]
    solution = np.linalg.solve(a + 1e-7 * np.trace(a) / n * np.eye(n), b)
    out = np.zeros((taps, taps))
    out[half, half] = 1.0
    for (dy, dx), value in zip(offsets, solution, strict=True):
        out[half + dy, half + dx] += value
        out[half - dy, half - dx] += value
    return out


def tap_response(
    taps: np.ndarray, taps_pixel_mm: tuple[float, float], fy_per_mm: np.ndarray, fx_per_mm: np.ndarray
) -> np.ndarray:
    """Transfer function of point-symmetric taps at frequencies in cycles per mm: (len(fy), len(fx)), real.

    Beyond the Nyquist frequency of the fitted pixels it is held at its value there.
    """
    half = taps.shape[0] // 2
    place = np.arange(-half, half + 1)
    waves = []
    for f, pixel in ((fy_per_mm, taps_pixel_mm[0]), (fx_per_mm, taps_pixel_mm[1])):
        cycles = np.clip(f * pixel, -0.5, 0.5)
        waves.append(np.exp(-2j * np.pi * cycles[:, None] * place))
    return (waves[0] @ taps @ waves[1].T).real
