"""Bridge (ours): from the filtered source to the target, on a path that a small network bends where filters fail.

    idea                                                            here
    start of the path: source times regularised ratio of MTFs       ratio_gain, Bridge._told, x_0
    what no filter can know, by frequency                           free_share, epsilon
    bridge x_t between x_0 and x_1 (Delbracio and Milanfar 2023;    Bridge.fit
      Albergo et al. 2023), noise only within epsilon
    conditional mean of x_1, nonlinear                              loss "bridge"
    as much texture as the target has, in every octave and place    loss "texture"
    few steps from t = 0 to t = 1                                   Bridge._walk
    how noisy the source is beside the target                       Bridge._louder
Symbols: S, T the MTFs of source and target; G the gain; x_0 filtered source, x_1 target, x_t between them, x_hat_1 what
the network thinks of x_1; n noise; epsilon(f) the share of a frequency that the network may change.

Why so: where source and target agree by the coherence gamma, least error shrinks a frequency to gamma^2 of its power
(too smooth), adding texture of its own brings the power back at an error of 2 (1 - gamma^2), and scaling up what is
known at 2 (1 - gamma), which is less. So the path starts at the scaled source, and the loss asks for the error and the
power at once. Where G <= 1 the source shows all that the target does: there epsilon is 0 and the filter stands alone,
so that sharp -> soft is the filter's, and means (lung density, say) are the source's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

from harmonict.core import HarmonictError, ScanProtocol, Series
from harmonict.data import About, Batch, Scan, SlicePairs
from harmonict.harmonizer import LEARNED_IN_PIXELS
from harmonict.nn.bridge_network import MULTIPLE, BridgeNetwork, band_powers, filtered
from harmonict.nn.diffusion import Noise
from harmonict.physics.kernel import Kernel, crossing
from harmonict.physics.mtf import FREQUENCIES_PER_MM, skin_air_mtf
from harmonict.physics.mtf import source_mtf as known_mtf
from harmonict.physics.nps import NoiseSpectrum, patient_nps
from harmonict.sampling import SampledHarmonizer
from harmonict.tiles import to_multiple
from harmonict.train import Run
from harmonict.window_training import WindowKind, WindowSettings, window_batches

FLOOR = 0.05  # below this a measured MTF is mostly its own noise
FINE_PER_MM = 0.0025  # step of the curves that filter: straight lines between 0.02 would leave ghosts at 50 mm
TOLD_PER_MM = np.arange(1, 10) * 0.1  # where the network is told the MTFs
TOLD_BESIDE = 3  # loudness, slice thickness, pixel size
TIMES = 3  # cosines of t that it is told
LOUDER = 1.25  # a filtered source may be so much louder than the target before the network may denoise all of it
SCALE_BATCHES = 32  # of one patch, that the unit is measured on
MEAN_OF = 0.998  # the running mean of the weights forgets in 1 / (1 - this) steps
SPREAD_STEPS = 4  # at least, of the samples whose spread is asked for
GRADIENT_NORM = 1.0  # of a step at most: at the full rate a hard batch threw the network far
EDGE_PX = 8  # of a patch, that do not count: mirrored borders reach in


@dataclass(frozen=True)
class Config:
    """All ours. channels: at half size, twice as many at a quarter; blocks: of two convolutions, before, at and after
    the quarter. start: where the path begins, "filter" (the regularised ratio of MTFs) or "source" (no filter at all,
    and the network may change every frequency). gain_cap: highest gain of the filter.

    texture: weight of the band powers beside the squared error, which counts in units of the filter's own. Above 2
    power comes before error (docs/methods/bridge.md). direct: share of the training at t = 0; the rest lies between 0
    and 1. refilter: share of the training whose source is the target itself, filtered to the MTF of a source or one
    between (or somewhat beyond); it needs no pair. mtf_noise: SD that is added to the MTFs that the network is told.
    source_noise_hu: white noise of an SD between 0 and this, smaller ones more often, is added to the sources, for real
    files lose more of the highest frequencies (rounding, compression, interpolation) than simulated ones.
    patch, batch, steps, rate: Adam's highest; it falls to 0 along a half cosine.

    steps_sampled: network evaluations along the path. temperature: strength of the noise that the path is given, 0 =
    none; one step has none either. samples: how many a spread is taken of; in at least 4 steps, and where temperature
    is 0, at 1. check_every: steps between two looks at the held-out patients. window: RadiomicGAN's window training.
    """

    channels: int = 64
    blocks: int = 2
    start: Literal["filter", "source"] = "filter"
    gain_cap: float = 6.0
    texture: float = 3.0
    direct: float = 0.7
    refilter: float = 0.25
    mtf_noise: float = 0.01
    source_noise_hu: float = 1.5
    patch: int = 128
    batch: int = 16
    steps: int = 40_000
    rate: float = 5e-4
    steps_sampled: int = 1
    temperature: float = 0.5
    samples: int = 8
    check_every: int = 1000
    window: WindowKind = "none"

    def __post_init__(self) -> None:
        if min(self.channels, self.blocks, self.check_every, self.steps_sampled) < 1:
            raise ValueError("channels, blocks, check_every and steps_sampled must be at least 1")
        if self.patch % MULTIPLE or self.patch < 4 * EDGE_PX:
            raise ValueError(f"patch must be a multiple of {MULTIPLE} and at least {4 * EDGE_PX}, got {self.patch}")
        if not (self.gain_cap >= 1 and self.rate > 0):
            raise ValueError("gain_cap must be at least 1 and rate above 0")
        if min(self.texture, self.mtf_noise, self.source_noise_hu, self.temperature) < 0:
            raise ValueError("texture, mtf_noise, source_noise_hu and temperature must be at least 0")
        if not (0 <= self.direct <= 1 and 0 <= self.refilter <= 1):
            raise ValueError("direct and refilter are shares: 0 to 1")


@dataclass(frozen=True)
class Told:
    """What is known of each image of a batch: condition (b, k) without the time, curves gain and free (b, n) at
    multiples of FINE_PER_MM, pixel_mm (b, 2)."""

    condition: Tensor
    gain: Tensor
    free: Tensor
    pixel_mm: Tensor


class Bridge(SampledHarmonizer):
    """A path from the filtered source to the target."""

    name = "bridge"
    uses_source_mtf = True
    Config = Config
    changes = ("kernel", "iterative_strength", "ctdivol_mgy", "exposure_mas")
    adjustable = ("steps_sampled", "temperature", "samples")
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "full": {},
        "compact": {
            "channels": 32,
            "patch": 96,
            "batch": 6,
            "steps": 6000,
            "rate": 2e-3,
            "check_every": 300,
        },
    }
    limits = (
        "Texture beyond what the source passes is of the right strength, not of the right place: no proof of a lesion.",
        LEARNED_IN_PIXELS,
    )
    unit: Tensor  # (1,) HU: root mean square error of the filtered sources of the training
    target_mtf: Tensor  # (64,) at FREQUENCIES_PER_MM: the median of the training's targets at their skin
    target_noise_hu: Tensor  # (1,) their median noise SD; infinite where none shows uniform tissue
    strengths: Tensor  # (n, 2) iterative strengths of the training, and their noise SD over that of FBP
    source_f50: Tensor  # (2,) lowest and highest f50 of the training's sources, 1/mm

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self._build()
        self.register_buffer("unit", torch.ones(1))
        for name in ("pixel_mm", "target_mtf", "target_noise_hu", "strengths", "source_f50"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))

    def _build(self) -> None:
        c = self.config
        self.network = BridgeNetwork(c.channels, c.blocks, 2 * len(TOLD_PER_MM) + TOLD_BESIDE + TIMES)

    # -- training ------------------------------------------------------------------------------------------------------

    def fit(self, pairs: SlicePairs, run: Run | None = None) -> Self:
        c, run = self.config, run or Run()
        self.target = pairs.target_protocol
        with run.seeded():
            self._build()
        self._measure(pairs, run)
        unit = self.unit.to(run.device)
        trained = deepcopy(self.network)  # `self.network` is its running mean: steadier than any of its states
        adam = torch.optim.Adam(trained.parameters(), lr=c.rate)
        rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: _rate(n / c.steps))
        for batch in window_batches(
            run,
            pairs,
            WindowSettings(c.window),
            output=self._judged,
            size=c.batch,
            patch=c.patch,
            steps=c.steps,
            epoch_steps=c.check_every,
            describe=self.describe,
            network=trained,
            mean=self.network,
            adam=adam,
            rate=rate,
        ):
            source, about = self._varied(batch)
            told = self._told(about, batch.source.device, generator=batch.generator)
            x_0, x_1 = filtered(source, told.gain, FINE_PER_MM, told.pixel_mm), batch.target
            t, n = _drawn(x_1.shape, c.direct, batch.generator)
            n = unit * filtered(n.to(source.device), told.free, FINE_PER_MM, told.pixel_mm)
            t = t.to(source.device)
            x_t = torch.lerp(x_0, x_1, t) + (t * (1 - t)).sqrt() * n
            with run.inside():
                x_hat_1 = self._estimate(x_t, x_0, source, t, told, network=trained)
            inner = np.s_[..., EDGE_PX:-EDGE_PX, EDGE_PX:-EDGE_PX]
            seen = batch.measured[inner]
            texture = (band_powers(x_hat_1[inner]) - band_powers(x_1[inner])).abs()
            losses = {
                "bridge": (1.0, ((x_hat_1 - x_1)[inner][seen] / unit).square().mean()),
                "texture": (c.texture, texture.mean()),
            }
            run.step(losses, adam, gradient_norm=GRADIENT_NORM)
            rate.step()
            share = max(1 - MEAN_OF, 1 / (rate.last_epoch + 1))
            with torch.no_grad():
                for mean, new in zip(self.network.parameters(), trained.parameters(), strict=True):
                    mean.lerp_(new, share)
            run.check(pairs.held_out, self._judged, keep="last")
        self.pixel_mm = torch.tensor(pairs.pixel_mm)
        self.card = run.card(pairs)
        return self.eval()

    def _measure(self, pairs: SlicePairs, run: Run) -> None:
        """Before the first step: the targets' MTF and noise, the sources' range, and the filter's own error."""
        sources, targets = pairs.scans
        seen = [scan.read() for scan in targets]
        self.target_mtf = torch.from_numpy(np.median([skin_air_mtf(series).kernel.mtf for series in seen], axis=0))
        sds = [noise.sd_hu for series in seen if (noise := _noise(series)) is not None]
        self.target_noise_hu = torch.tensor([np.median(sds) if sds else np.inf], dtype=torch.float64)
        looked = [(scan, *self._look(scan.read())) for scan in sources]
        self.strengths = torch.from_numpy(
            strength_factors([(a.protocol, after) for _, a, after in looked], self.target)
        )
        f50 = [_f50(a.measured["source_mtf"]) for _, a, _ in looked]
        self.source_f50 = torch.tensor([min(f50), max(f50)], dtype=torch.float64)
        about = {id(scan): self._known(a, after) for scan, a, after in looked}
        squares = 0.0

        def known(scan: Scan) -> About:
            return about[id(scan)]

        with torch.no_grad():
            for n in range(SCALE_BATCHES):
                seed = (run.seed, 2**31 + 1, n)
                batch = pairs.batch(seed, size=1, patch=self.config.patch, augment=False, describe=known)
                told = self._told(batch.about, batch.source.device)
                error = filtered(batch.source, told.gain, FINE_PER_MM, told.pixel_mm) - batch.target
                squares += float(error[batch.measured].square().mean()) / SCALE_BATCHES
        self.unit = torch.tensor([max(squares, 1.0) ** 0.5])

    def _varied(self, batch: Batch) -> tuple[Tensor, tuple[About, ...]]:
        """The batch's sources and what is known of them: some are the target times (S / T)^a, all are a bit noisier."""
        source, about = batch.source.clone(), list(batch.about)
        target_mtf = clean_tail(self.target_mtf.cpu().numpy())
        draws = torch.rand(len(source), 2, generator=batch.generator).tolist()
        for k, (chance, power) in enumerate(draws):
            ratio = (clean_tail(about[k].measured["source_mtf"]) / target_mtf) ** (1.2 * power)
            if chance >= self.config.refilter or ratio.max() > 1.1:  # a sharper source is not in the target
                continue
            mtf = target_mtf * ratio
            pixel_mm = torch.tensor([about[k].pixel_mm], device=source.device)
            one = filtered(batch.target[k : k + 1], _fine(ratio, source.device), FINE_PER_MM, pixel_mm)
            source[k : k + 1] = one.round()  # as a file keeps it
            about[k] = self._known(replace(about[k], protocol=self.target, measured={"source_mtf": mtf}), None)
        sd = self.config.source_noise_hu * torch.rand(len(source), 1, 1, 1, generator=batch.generator).square()
        noise = sd * torch.randn(source.shape, generator=batch.generator)
        return source + noise.to(source.device), tuple(about)

    # -- what is known of a source -------------------------------------------------------------------------------------

    def describe(self, series: Series, *, source_mtf: Kernel | None = None) -> About:
        """The source's MTF, given or measured at its own skin, and its noise; with them the filters for it.

        Raises HarmonictError for a series that shows no clean skin beside air, where no MTF is given.
        """
        about, after = self._look(series, source_mtf)
        return self._known(about, after) if len(self.target_mtf) else about

    def _look(self, series: Series, source_mtf: Kernel | None = None) -> tuple[About, float | None]:
        """What is measured of a source: its MTF, and the SD in HU of its noise after the filter (None where no uniform
        tissue shows it)."""
        about = super().describe(series)
        mtf = known_mtf(series, source_mtf)
        about = replace(about, measured={"source_mtf": mtf})
        if not len(self.target_mtf):
            return about, None
        noise = _noise(series)
        return about, None if noise is None else _sd_after(noise, self._gain(mtf))

    def _known(self, about: About, noise_after_hu: float | None) -> About:
        """With the filters for the source, and how loud it is."""
        mtf = about.measured["source_mtf"]
        gain, louder = self._gain(mtf), self._louder(about.protocol, noise_after_hu)
        free = free_share(gain, louder)
        if self.config.start == "source":
            gain, free = np.ones_like(gain), np.ones_like(gain)
        measured = {"source_mtf": mtf, "louder": np.array([louder]), "gain": gain, "free": free}
        low, high = self.source_f50.tolist()
        if not 0.85 * low <= _f50(mtf) <= 1.15 * high:
            words = f"trained on sources with f50 {low:.2f} to {high:.2f}/mm, this one has {_f50(mtf):.2f}/mm"
            about = replace(about, outside=(*about.outside, words))
        return replace(about, measured=measured)

    def _gain(self, source_mtf: np.ndarray) -> np.ndarray:
        return ratio_gain(source_mtf, self.target_mtf.cpu().numpy(), gain_cap=self.config.gain_cap)

    def _louder(self, protocol: ScanProtocol, noise_after_hu: float | None) -> float:
        """Noise SD of the filtered source over that of the target: from dose, slice thickness and iterative strength.
        Where the doses are not known: as measured, if that is much louder than the training's targets."""
        ratio = raw_noise_ratio(protocol, self.target)
        if ratio is None:
            measured = (noise_after_hu or 0.0) / float(self.target_noise_hu)
            return measured if measured > LOUDER else 1.0
        strengths, factors = self.strengths.cpu().numpy().T
        return float(np.interp(protocol.iterative_strength or 0.0, strengths, factors)) / ratio

    def _told(
        self, about: tuple[About, ...], device: torch.device, *, generator: torch.Generator | None = None
    ) -> Told:
        """generator: of a training, where the MTFs that the network is told are made less sure."""
        both = np.stack([np.stack([a.measured["source_mtf"], self.target_mtf.cpu().numpy()]) for a in about])
        places = np.searchsorted(FREQUENCIES_PER_MM, TOLD_PER_MM - 1e-9)
        mtfs = torch.from_numpy(both[:, :, places].clip(0, 2).astype(np.float32)).flatten(1)
        if generator is not None:
            mtfs = mtfs + self.config.mtf_noise * torch.randn(mtfs.shape, generator=generator)
        # not the noise as measured, which would tell the few patients of a training apart
        thick = [slice_thickness_ratio(a.protocol, self.target) for a in about]
        beside = np.log([[float(a.measured["louder"][0]), t] for a, t in zip(about, thick, strict=True)])
        pixels = np.array([a.pixel_mm for a in about])
        rest = np.concatenate([beside, np.log(pixels.mean(1, keepdims=True))], axis=1).astype(np.float32)
        return Told(
            condition=torch.cat([mtfs, torch.from_numpy(rest)], dim=1).to(device),
            gain=torch.cat([_fine(a.measured["gain"], device) for a in about]),
            free=torch.cat([_fine(a.measured["free"], device) for a in about]),
            pixel_mm=torch.from_numpy(pixels.astype(np.float32)).to(device),
        )

    # -- the path ------------------------------------------------------------------------------------------------------

    def draw(self, x: Tensor, target: ScanProtocol, about: About, noise: Noise) -> Tensor:
        self.check_fitted(target)
        told = self._told((about,), x.device)
        return to_multiple(x, MULTIPLE, lambda hu: self._walk(hu, told, noise))

    def _walk(self, source: Tensor, told: Told, noise: Noise) -> Tensor:
        """From x_0 to x_1 in equal steps. Noise comes in at the first; from then on it is what of x_t is neither x_0
        nor what the network thinks x_1 is, as in DDIM (Song et al. 2021)."""
        c = self.config
        x_0 = filtered(source, told.gain, FINE_PER_MM, told.pixel_mm)
        n = torch.zeros_like(x_0)
        if c.temperature > 0 and c.steps_sampled > 1:
            field = noise.field(0, x_0.shape[1:]).to(x_0)
            n = c.temperature * self.unit.to(x_0) * filtered(field, told.free, FINE_PER_MM, told.pixel_mm)
        x_t, t = x_0, 0.0
        for step in range(1, c.steps_sampled + 1):
            x_hat_1 = self._estimate(x_t, x_0, source, torch.full((len(x_0), 1, 1, 1), t, device=x_0.device), told)
            if t > 0:
                n = (x_t - torch.lerp(x_0, x_hat_1, t)) / (t * (1 - t)) ** 0.5
            t = step / c.steps_sampled
            x_t = torch.lerp(x_0, x_hat_1, t) + (t * (1 - t)) ** 0.5 * n
        return x_t

    def _estimate(
        self, x_t: Tensor, x_0: Tensor, source: Tensor, t: Tensor, told: Told, *, network: nn.Module | None = None
    ) -> Tensor:
        """x_hat_1 (b, 1, h, w): x_0, changed where no filter knows."""
        time = torch.cat([torch.cos(np.pi * k * t[:, :, 0, 0]) for k in range(1, TIMES + 1)], dim=1)
        change = (network or self.network)(
            torch.cat([x_t, x_0, source], dim=1), torch.cat([told.condition, time], dim=1)
        )
        return x_0 + filtered(self.unit.to(x_0) * change, told.free, FINE_PER_MM, told.pixel_mm)

    def _judged(self, batch: Batch) -> Tensor:
        told = self._told(batch.about, batch.source.device)
        return to_multiple(batch.source, MULTIPLE, lambda hu: self._walk(hu, told, Noise()))

    def spread(self, series: Series, target: ScanProtocol | None = None, *, about: About | None = None) -> Series:
        """See SampledHarmonizer. A path of fewer than 4 steps, or without noise, has little spread or none: then it is
        that of 4 steps, or of temperature 1, and its samples are not what `harmonize` gives."""
        if self.config.temperature > 0 and self.config.steps_sampled >= SPREAD_STEPS:
            return super().spread(series, target, about=about)
        noisy = copy(self)
        steps = max(self.config.steps_sampled, SPREAD_STEPS)
        noisy.config = replace(self.config, temperature=self.config.temperature or 1.0, steps_sampled=steps)
        return noisy.spread(series, target, about=about)


# -- two curves from two MTFs ------------------------------------------------------------------------------------------


def ratio_gain(source_mtf: np.ndarray, target_mtf: np.ndarray, *, gain_cap: float) -> np.ndarray:
    """G at FREQUENCIES_PER_MM: T / S, at most `gain_cap`.

    Where S is under FLOOR, the source does not say what S is: there G is held if it sharpens, and falls no more slowly
    than it did if it smooths.
    """
    source, target = clean_tail(source_mtf), clean_tail(target_mtf)
    gain = target / source
    lost = np.nonzero(source < FLOOR)[0]
    if len(lost):
        first = lost[0]
        gain[first:] = gain[first] if gain[first] >= 1 else np.minimum.accumulate(gain[first:])
    return np.minimum(gain, gain_cap)


def clean_tail(mtf: np.ndarray) -> np.ndarray:
    """A measured MTF whose tail, from the first value under FLOOR on, goes on as the Gaussian of the fall before it:
    above 0 everywhere."""
    below = np.nonzero(mtf < FLOOR)[0]
    if not len(below):
        return mtf.copy()
    f, end = FREQUENCIES_PER_MM, max(int(below[0]), 1)
    half = min(int(np.argmax(mtf < 0.5)), end - 1)
    fall = slice(half, end + 1)
    slope = np.polyfit(f[fall] ** 2, np.log(np.maximum(mtf[fall], FLOOR / 2)), 1)[0]
    out = mtf.copy()
    out[end:] = mtf[end - 1] * np.exp(min(slope, -1.0) * (f[end:] ** 2 - f[end - 1] ** 2))
    return np.maximum(out, 1e-6)


def free_share(gain: np.ndarray, louder: float) -> np.ndarray:
    """epsilon at FREQUENCIES_PER_MM: the share of each frequency that the network may change.

    1 - 1 / G^2 where the filter amplifies, 0 where it does not. louder: noise SD of the filtered source over that of
    the target; above LOUDER some of every frequency but the lowest is noise, and the network may take it away.
    """
    amplified = 1 - 1 / np.maximum(gain, 1.0) ** 2
    noise = max(0.0, 1 - (LOUDER / louder) ** 2)
    return np.maximum(amplified, noise * -np.expm1(-((FREQUENCIES_PER_MM / 0.05) ** 2)))


def raw_noise_ratio(source: ScanProtocol, target: ScanProtocol) -> float | None:
    """Noise SD of the target's raw data over that of the source's: the root of the inverse ratio of dose and slice
    thickness. None where the files do not say the dose of both."""
    doses = (
        (source.ctdivol_mgy, target.ctdivol_mgy),
        (source.exposure_mas, target.exposure_mas if source.kvp == target.kvp else None),
    )
    known = [s / t for s, t in doses if s and t]
    if not known:
        return None
    return float(np.sqrt(known[0] * slice_thickness_ratio(source, target)))


def slice_thickness_ratio(source: ScanProtocol, target: ScanProtocol) -> float:
    """1 where one of them is not known."""
    one, other = source.slice_thickness_mm, target.slice_thickness_mm
    return one / other if one and other else 1.0


def strength_factors(sources: Sequence[tuple[ScanProtocol, float | None]], target: ScanProtocol) -> np.ndarray:
    """(n, 2): iterative strengths, and their noise SD over that of filtered back-projection (the least strength there).

    sources: protocols, and the noise SD in HU after the filter; what dose and slice thickness make of it counts not.
    """
    found: dict[float, list[float]] = {}
    for protocol, sd in sources:
        if sd is not None and (ratio := raw_noise_ratio(protocol, target)) is not None:
            found.setdefault(protocol.iterative_strength or 0.0, []).append(sd * ratio)
    if not found:
        return np.array([[0.0, 1.0]])
    sds = {strength: float(np.median(found[strength])) for strength in sorted(found)}
    least = sds[min(sds)]
    return np.array([[strength, sd / least] for strength, sd in sds.items()])


def _sd_after(noise: NoiseSpectrum, gain: np.ndarray) -> float:
    """Noise SD in HU after the filter."""
    f = noise.frequency_per_mm
    power = f * noise.nps_hu2_mm2
    after = power * np.interp(f, FREQUENCIES_PER_MM, gain) ** 2
    return noise.sd_hu * float(np.sqrt(np.trapezoid(after, f) / max(np.trapezoid(power, f), 1e-9)))


def _noise(series: Series) -> NoiseSpectrum | None:
    """None where no uniform tissue shows it."""
    try:
        return patient_nps(series)
    except HarmonictError:
        return None


def _f50(mtf: np.ndarray) -> float:
    f50 = crossing(FREQUENCIES_PER_MM, mtf, 0.5)
    return float(FREQUENCIES_PER_MM[-1]) if np.isnan(f50) else f50


def _fine(curve: np.ndarray, device: torch.device) -> Tensor:
    """(1, n) at multiples of FINE_PER_MM."""
    f = np.arange(0, FREQUENCIES_PER_MM[-1], FINE_PER_MM)
    return torch.from_numpy(PchipInterpolator(FREQUENCIES_PER_MM, curve)(f).astype(np.float32)[None]).to(device)


def _rate(done: float) -> float:
    """Share of the rate: up in the first twentieth, for want of norms in the network, then down a half cosine to 0."""
    return min(1.0, 20 * done + 0.02) * (0.5 + 0.5 * float(np.cos(np.pi * min(done, 1.0))))


def _drawn(shape: torch.Size, direct: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t (b, 1, 1, 1) of a training step, and white noise."""
    t = torch.rand(shape[0], 2, generator=generator)
    t = torch.where(t[:, 0] < direct, 0.0, t[:, 1])
    return t[:, None, None, None], torch.randn(shape, generator=generator)
