"""Diffusion (Ho et al., NeurIPS 2020): the schedule, a U-Net that predicts noise, sampling, and noise that has a place.

Schedule and DDIM's step are MONAI's. Symbols: x_0 what is learned (an image, a latent), x_t the same with noise of step
t of T, eps the noise, a_t the share of x_0's variance left at t (alpha bar).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Sampler = Literal["ddpm", "ddim", "dpm"]
Predicts = Literal["noise", "velocity"]
NOISE_BLOCK_PX = 64  # noise is drawn in squares of so many pixels, each from its own counter
_PREDICTION_TYPE = {"noise": "epsilon", "velocity": "v_prediction"}


# -- settings ----------------------------------------------------------------------------------------------------------


def check_steps(steps_sampled: int, steps_noise: int, sampler: Sampler) -> None:
    """Raise ValueError, in words for a user, where a sampler cannot go through `steps_noise` in `steps_sampled`."""
    if steps_noise < 1:
        raise ValueError(f"steps_noise must be at least 1, got {steps_noise}")
    if steps_sampled < 1:
        raise ValueError(f"steps_sampled must be at least 1, got {steps_sampled}")
    if steps_sampled > steps_noise:
        raise ValueError(
            f"steps_sampled must be at most the {steps_noise} steps that were trained, got {steps_sampled}"
        )
    if steps_noise % steps_sampled and sampler != "dpm":
        known = [n for n in range(1, steps_noise + 1) if steps_noise % n == 0]
        near = sorted(sorted(known, key=lambda n: abs(math.log(n / steps_sampled)))[:3])
        raise ValueError(
            f"steps_sampled of {sampler} must divide the {steps_noise} steps that were trained, got {steps_sampled}; "
            f"near it: {', '.join(map(str, near))}"
        )


# -- noise that has a place --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Standard normal noise that follows from (key, place, draw) alone, whatever is computed beside it.

    key: of the series and the sample, 128 bits. planes: ((plane, weight), ...) that are joined; the squares of the
    weights sum to 1. Slices nearer to each other than one plane to the next share noise, as overlapping slices of a
    scanner do. corner: pixel (y, x) of the slice where the field begins. Counter-based (Philox, Salmon et al. 2011).
    """

    key: int = 0
    planes: tuple[tuple[int, float], ...] = ((0, 1.0),)
    corner: tuple[int, int] = (0, 0)

    def at(self, y: int, x: int) -> Noise:
        """The same field, seen from pixel (y, x) of the slice on."""
        return replace(self, corner=(y, x))

    def field(self, draw: int, shape: Sequence[int], *, pixels: int = 1) -> Tensor:
        """(1, c, h, w) float32; one value for every `pixels` x `pixels` of the slice. draw: which field of many."""
        total = sum(weight * self._plane(draw, plane, shape, pixels) for plane, weight in self.planes)
        return torch.from_numpy(np.asarray(total, np.float32))[None]

    def _plane(self, draw: int, plane: int, shape: Sequence[int], pixels: int) -> np.ndarray:
        c, h, w = shape
        side = max(1, NOISE_BLOCK_PX // pixels)
        y0, x0 = (at // pixels for at in self.corner)
        rows = range(y0 // side, (y0 + h - 1) // side + 1)
        columns = range(x0 // side, (x0 + w - 1) // side + 1)
        blocks = [[self._block(draw, plane, row, column, c, side) for column in columns] for row in rows]
        whole = np.concatenate([np.concatenate(line, axis=2) for line in blocks], axis=1)
        top, left = y0 - rows[0] * side, x0 - columns[0] * side
        return whole[:, top : top + h, left : left + w]

    def _block(self, draw: int, plane: int, row: int, column: int, c: int, side: int) -> np.ndarray:
        counter = np.array([0, row << 32 | column, draw, plane % 2**64], np.uint64)
        count = c * side * side
        bits = np.random.Philox(counter=counter, key=self.key).random_raw((count + 1) // 2)
        radius = np.sqrt(-2 * np.log(((bits >> np.uint64(32)) + 1) / 2**32))  # Box and Muller: bits of all NumPy alike
        angle = 2 * math.pi * (bits & np.uint64(2**32 - 1)) / 2**32
        pair = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return pair.reshape(c, side, side)


# -- schedule and sampling ---------------------------------------------------------------------------------------------


@cache
def schedule(steps_noise: int, predicts: Predicts = "noise", clip: float | None = None) -> Any:
    """MONAI's DDIM scheduler with Ho et al.'s schedule: betas from 1e-4 to 2e-2 over 1,000 steps, in proportion for
    another number of them. clip: x_0 is kept within [-clip, clip] while sampling."""
    from monai.networks.schedulers.ddim import DDIMScheduler  # takes seconds to import

    scale = 1000 / steps_noise
    limit = clip or 1.0
    with torch.inference_mode(False):  # it is kept, and a training may need it later
        return DDIMScheduler(
            num_train_timesteps=steps_noise,
            schedule="linear_beta",
            beta_start=min(scale * 1e-4, 0.999),
            beta_end=min(scale * 2e-2, 0.999),
            clip_sample=clip is not None,
            clip_sample_min=-limit,
            clip_sample_max=limit,
            prediction_type=_PREDICTION_TYPE[predicts],
        )


def noised(x_0: Tensor, steps_noise: int, predicts: Predicts, generator: torch.Generator) -> tuple[Tensor, ...]:
    """For a step of training: (x_t, t (b,), what the network should predict), t drawn uniformly for every item.

    generator: on the CPU, so that every device sees the same noise.
    """
    ddim = schedule(steps_noise)
    t = torch.randint(steps_noise, (len(x_0),), generator=generator).to(x_0.device)
    eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    wanted = eps if predicts == "noise" else ddim.get_velocity(x_0, eps, t)
    return ddim.add_noise(x_0, eps, t), t, wanted


def noise_of_velocity(x_t: Tensor, velocity: Tensor, t: Tensor, steps_noise: int) -> Tensor:
    """The noise that a predicted velocity means: eps = sqrt(1 - a_t) x_t + sqrt(a_t) v (Salimans and Ho, ICLR 2022)."""
    left = schedule(steps_noise).alphas_cumprod.to(x_t.device)[t].view(-1, *[1] * (x_t.ndim - 1))
    return (1 - left).sqrt() * x_t + left.sqrt() * velocity


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    draw: Callable[[int], Tensor],
    *,
    sampler: Sampler,
    steps: int,
    steps_noise: int,
    predicts: Predicts = "noise",
    clip: float | None = None,
) -> Tensor:
    """x_0 from noise. predict: (x_t, t (b,)) -> what the network was trained to say. draw: n -> the n-th noise field,
    in the shape of x_0, on its device; n = 0 is x_T.

    sampler: "ddpm" (Ho et al.: noise at every step), "ddim" (Song et al., ICLR 2021, eta 0: noise once, at the start)
    or "dpm" (DPM-Solver++ 2M, Lu et al. 2022: as DDIM, of second order, at times spread evenly over the logarithm of
    the signal to noise). steps: the first two take every (steps_noise / steps)-th, so it must divide steps_noise.
    """
    check_steps(steps, steps_noise, sampler)
    ddim = schedule(steps_noise, predicts, clip)
    ddim.num_inference_steps = steps  # its own choice of times does not agree with the stride that its step takes
    times = log_snr_times(steps_noise, steps) if sampler == "dpm" else _even_times(steps_noise, steps)
    left = ddim.alphas_cumprod
    x, before = draw(0), None
    for n, (t, previous) in enumerate(pairwise([*times, -1])):
        output = predict(x, torch.full((len(x),), t, device=x.device))
        x_previous, x_0 = ddim.step(output.float(), t, x)
        if previous < 0:
            return x_0
        if sampler == "ddim":
            x = x_previous
        elif sampler == "ddpm":
            x = posterior(ddim, x_0, x, t, previous, draw(n + 1))
        else:
            a_t, a_p = float(left[t]), float(left[previous])
            guess = x_0
            if before is not None:
                ratio = (_log_snr(a_p) - _log_snr(a_t)) / (_log_snr(a_t) - before[1])
                guess = x_0 + ratio / 2 * (x_0 - before[0])
            before = x_0, _log_snr(a_t)
            eps = (x - math.sqrt(a_t) * guess) / math.sqrt(1 - a_t)
            x = math.sqrt(a_p) * guess + math.sqrt(1 - a_p) * eps
    raise AssertionError("a schedule has at least one step")


def log_snr_times(steps_noise: int, steps: int) -> list[int]:
    """From the last time to the first, evenly over the logarithm of the signal to noise; where two fall on the same of
    the trained times, it is taken once."""
    left = schedule(steps_noise).alphas_cumprod.double()
    values = np.array([_log_snr(float(a)) for a in left])
    wanted = np.linspace(values[-1], values[0], steps)
    return sorted({int(np.abs(values - value).argmin()) for value in wanted}, reverse=True)


def _even_times(steps_noise: int, steps: int) -> list[int]:
    return list(range(steps_noise - 1, -1, -(steps_noise // steps)))


def _log_snr(left: float) -> float:
    return 0.5 * math.log(left / (1 - left))


def posterior(scheduler: Any, x_0: Tensor, x_t: Tensor, t: int, previous: int, eps: Tensor) -> Tensor:
    """A draw of x at an earlier step, given x_0 and x_t (Ho et al., eq 6-7, for any stride)."""
    a_t, a_p = float(scheduler.alphas_cumprod[t]), float(scheduler.alphas_cumprod[previous])
    alpha = a_t / a_p
    mean = math.sqrt(a_p) * (1 - alpha) / (1 - a_t) * x_0 + math.sqrt(alpha) * (1 - a_p) / (1 - a_t) * x_t
    return mean + math.sqrt((1 - alpha) * (1 - a_p) / (1 - a_t)) * eps


# -- the network -------------------------------------------------------------------------------------------------------


class DenoisingUNet(nn.Module):
    """(b, c_in, *size) and t (b,) -> (b, c_out, *size), float32; along one or two axes.

    Residual blocks of two convolutions whose channels a map of t scales and shifts; `levels` sizes, each half of the
    one before and `widths` channels wide, joined by skips. Channels are normalised at every position by themselves:
    group norm, which such networks usually have, takes statistics of the whole image, so that a tile or a patch would
    be denoised in another way than the slice around it. The last layer starts at 0.
    """

    def __init__(self, axes: Literal[1, 2], c_in: int, c_out: int, widths: tuple[int, ...], *, blocks: int = 1) -> None:
        super().__init__()
        conv = nn.Conv1d if axes == 1 else nn.Conv2d
        self.width = widths[0]
        features = 4 * self.width
        self.of_time = nn.Sequential(nn.Linear(self.width, features), nn.SiLU(), nn.Linear(features, features))
        self.first = conv(c_in, widths[0], 3, padding=1)
        self.down = nn.ModuleList(_Level(conv, a, a, features, blocks) for a in widths)
        self.smaller = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.larger = nn.ModuleList(conv(b, a, 3, padding=1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_Level(conv, 2 * a, a, features, blocks) for a in widths[:-1])
        self.last = conv(widths[0], c_out, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.of_time(time_waves(t, self.width))
        x, skips = self.first(x), []
        for n, level in enumerate(self.down):
            x = level(x, time)
            if n < len(self.smaller):
                skips.append(x)
                x = self.smaller[n](x)
        for n in reversed(range(len(self.up))):
            x = self.larger[n](functional.interpolate(x, skips[n].shape[2:], mode="nearest"))
            x = self.up[n](torch.cat([x, skips[n]], dim=1), time)
        with torch.autocast(x.device.type, enabled=False):
            return self.last(x.float())


def time_waves(t: Tensor, count: int) -> Tensor:
    """(b,) -> (b, count): cosines and sines of t, periods from 2 pi to 10,000 times as long (Vaswani et al. 2017)."""
    half = (count + 1) // 2
    phase = t[:, None].float() * torch.exp(-math.log(1e4) / half * torch.arange(half, device=t.device))
    return torch.cat([phase.cos(), phase.sin()], dim=1)[:, :count]


class _Level(nn.Module):
    def __init__(self, conv: Any, c_in: int, c_out: int, features: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(conv, a, c_out, features) for a in [c_in, *[c_out] * (blocks - 1)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time)
        return x


class _Block(nn.Module):
    def __init__(self, conv: Any, c_in: int, c_out: int, features: int) -> None:
        super().__init__()
        self.one, self.two = conv(c_in, c_out, 3, padding=1), conv(c_out, c_out, 3, padding=1)
        self.by_time = nn.Linear(features, 2 * c_out)
        self.around = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)
        nn.init.zeros_(self.two.weight)  # a new block changes nothing

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.by_time(time).reshape(len(x), -1, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        y = self.one(functional.silu(_normal(x)))
        y = self.two(functional.silu(_normal(y) * (1 + scale) + shift))
        return self.around(x) + y


def _normal(x: Tensor) -> Tensor:
    """Channels of each position with a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)
