"""Window training (RadiomicGAN, Selim et al. 2021, Algorithm 1): a network learns a part of the HU range at a time.

    paper                                                  here
    clip(DS, start, end)                                   _clip: HU of source and target are clipped to the window
    fixed growing, lines 1-7                               kind "growing"
    DynamicSelection, lines 8-17, Grad-CAM                 kind "dynamic", grad_cam, failed_hu
    both, one after the other                              kind "both"
Symbols: w step_hu, th_acc accuracy, th_eta epochs, th_fail fail, th_win width_hu.

Any method trains so with one line changed: `window_batches(run, pairs, window, output=..., ...)` in place of
`run.batches(pairs, ...)`. The first part of the steps, at most `1 - last_share` of them, is a loop of its own whose
batches show the window alone; the rest of the same budget is the method's usual loop on the whole range, so a variant
costs what its base costs and the weights that are kept were chosen on the whole range.

Departures: 1. Algorithm 1, line 3 is never true as printed; the window grows until it covers hu_max. 2. "clip" could
also mean that pixels outside the window do not count in the loss; the paper says both that clip(.) selects pixels and
that min-max normalisation is the case of one window, and HU are clipped here because an adversarial loss cannot leave
pixels out. 3. Accuracy is not defined by the paper: here it is the share of the pixels inside the window whose error is
under `tolerance_hu`, which needs no discriminator. 4. The paper ends with the narrowest window; a network that ends so
has not seen most HU for a while, so the last `last_share` of the steps is on the whole range. 5. The rounds of dynamic
selection are capped: the window is min..max of many pixels and may never become narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from harmonict.core import HarmonictError
from harmonict.data import Batch, SlicePairs
from harmonict.train import Run

WindowKind = Literal["none", "growing", "dynamic", "both"]
Score = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]
EPOCHS = 30  # of a whole training (Sec. III-A)
LOOKS = 8  # steps at the end of an epoch whose batches are looked at: the random subset P of the training data
CRITIC_EVERY = 4  # steps between two steps of the critic that a method without one is given


@dataclass(frozen=True)
class WindowSettings:
    """kind: "none" trains as ever. hu_min, hu_max: the whole range (Sec. III-A). step_hu: by how much the window grows
    (Sec. II-B). An epoch is a thirtieth of the training (Sec. III-A: 30 epochs).

    accuracy (th_acc), tolerance_hu, epochs (th_eta), fail (th_fail), width_hu (th_win): not given. accuracy: the window
    grows when so large a share of its pixels is within tolerance_hu of the target, or after `epochs` epochs. fail:
    pixels whose class activation is above it count as failed. The window is chosen anew each epoch until it is at most
    width_hu wide, at most `rounds` times. last_share: the end of the training that is on the whole range (ours).
    """

    kind: WindowKind = "none"
    hu_min: float = -1024.0
    hu_max: float = 1000.0
    step_hu: float = 256.0
    accuracy: float = 0.8
    tolerance_hu: float = 20.0
    epochs: int = 1
    fail: float = 0.5
    width_hu: float = 256.0
    rounds: int = 6
    last_share: float = 0.4

    def __post_init__(self) -> None:
        if not self.hu_max - self.hu_min > self.step_hu > 0 or min(self.epochs, self.rounds) < 1:
            raise ValueError("a window grows by less than the HU range, and has at least one epoch and one round")
        whole = 1 if self.dynamic else 0  # D must have seen the whole range before it may judge
        if not 0 < self.last_share < 1 or self._growing_epochs + self._rounds + whole > self._room:
            raise ValueError(
                f"window training of up to {self._growing_epochs} + {self._rounds} epochs leaves less than "
                f"last_share {self.last_share:g} of {EPOCHS}: fewer epochs, fewer rounds or a wider step_hu"
            )

    @property
    def growing(self) -> bool:
        """Whether it begins with a narrow window."""
        return self.kind in ("growing", "both")

    @property
    def dynamic(self) -> bool:
        """Whether a discriminator chooses windows."""
        return self.kind in ("dynamic", "both")

    @property
    def first_epochs(self) -> int:
        """The most epochs before the last part, which is on the whole range."""
        return self._room if self.dynamic else self._growing_epochs

    @property
    def dynamic_from(self) -> int:
        """The epoch at whose end the first window is chosen."""
        return self.first_epochs - self._rounds

    @property
    def _room(self) -> int:
        return EPOCHS - math.ceil(self.last_share * EPOCHS)

    @property
    def _growing_epochs(self) -> int:
        narrower = math.ceil((self.hu_max - self.hu_min) / self.step_hu) - 1
        return narrower * self.epochs if self.growing else 0

    @property
    def _rounds(self) -> int:
        return self.rounds if self.dynamic else 0


def window_batches(
    run: Run,
    pairs: SlicePairs,
    window: WindowSettings,
    *,
    output: Callable[[Batch], Tensor],
    steps: int,
    epoch_steps: int | None = None,
    score: Score | None = None,
    **options: Any,
) -> Iterator[Batch]:
    """Batches for `steps` steps as `run.batches` gives them, the first of them clipped to the window of the moment.

    output: a batch -> what the method makes of it, (b, 1, h, w) in HU; the same that `run.check` is given. score: what
    the method's discriminator D says of such an image: (batch, image) -> (score (b,) of "non-standard" before the
    soft-max, D's last feature map (b, c, h', w') that it was computed from); a method without D is given a small
    critic, trained beside it. options: everything else that `run.batches` takes, `size`, `patch` and the state of the
    loop among them; the window's own state is kept with it. The held-out patients are looked at during the last part.
    Raises HarmonictError where there are too few steps for 30 epochs.
    """
    if window.kind == "none":
        yield from run.batches(pairs, steps=steps, epoch_steps=epoch_steps, **options)
        return
    if steps < EPOCHS:
        raise HarmonictError(f"window training needs at least {EPOCHS} steps, one an epoch; got {steps}")
    epoch = steps // EPOCHS
    networks = [part for part in options.values() if isinstance(part, nn.Module)]
    now = _first_window(window)
    own: dict[str, Any] = {"window": now}
    train_critic = None
    if window.dynamic and score is None:
        with run.seeded():
            critic = _Critic().to(run.device)
        adam = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999))
        own |= {"window_critic": critic, "window_adam": adam}
        score = lambda batch, image: critic(image)  # noqa: E731
        train_critic = lambda batch, made: run.step({"window critic": (1.0, critic.loss(batch.target, made))}, adam)  # noqa: E731
    # epoch_steps: no window is judged on the whole range, and the loop ends with the weights of its last step
    first = epoch * window.first_epochs
    for batch in run.batches(pairs, steps=first, epoch_steps=first, **own, **options):
        shown = _clip(batch, now["low"], now["high"])
        yield shown
        epochs, place = divmod(run.step_number, epoch)  # before this one, and this step's place in it
        looks = place >= epoch - LOOKS
        chooses = window.dynamic and epochs + 1 >= window.dynamic_from
        with _judging(networks):
            if looks and now["phase"] == "growing":
                _count_near(shown, _made(output, shown), now, window)
            elif train_critic is not None and run.step_number % CRITIC_EVERY == 0:
                train_critic(batch, _made(output, batch))
            if looks and chooses:
                whole = _clip(batch, window.hu_min, window.hu_max)
                _count_failed(whole, _made(output, whole), now, window, score)  # type: ignore[arg-type]
        if place == epoch - 1:
            _end_epoch(run, now, window, chooses)
    yield from run.batches(pairs, steps=steps - run.step_number, epoch_steps=epoch_steps, **options)


def _clip(batch: Batch, low: float, high: float) -> Batch:
    """What both images show in a window; the rest is as black or as white as its ends."""
    return replace(batch, source=batch.source.clamp(low, high), target=batch.target.clamp(low, high))


def _first_window(window: WindowSettings) -> dict[str, Any]:
    """phase: growing, whole or dynamic. epochs: in this window. near, pixels: that the accuracy is the ratio of.
    failed: the least and the largest HU where the discriminator sees what gives an image away, or None."""
    high = window.hu_min + window.step_hu if window.growing else window.hu_max
    now = {"phase": "growing" if window.growing else "whole", "low": window.hu_min, "high": high, "epochs": 0}
    return now | {"near": 0, "pixels": 0, "failed": None}


def _made(output: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    with torch.no_grad():
        return output(batch).float()


@contextmanager
def _judging(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, networks are what they are when a scan is harmonized: batch norm takes its running statistics."""
    training = [network.training for network in networks]
    for network in networks:
        network.eval()
    yield
    for network, was in zip(networks, training, strict=True):
        network.train(was)


def _end_epoch(run: Run, now: dict[str, Any], window: WindowSettings, chooses: bool) -> None:
    """Lines 5-6 and 8-17 of Algorithm 1: the window of the next epoch, or the end of this part of the training."""
    now["epochs"] += 1
    run.log("window low HU", now["low"])
    run.log("window high HU", now["high"])
    if now["phase"] == "growing":
        near, pixels = _over_ranks(run, [now["near"], now["pixels"]], "SUM")
        accuracy = near / max(pixels, 1)
        run.log("window accuracy", accuracy)
        if accuracy > window.accuracy or now["epochs"] >= window.epochs:
            now |= {"high": now["high"] + window.step_hu, "epochs": 0}
        if now["high"] >= window.hu_max:
            now |= {"phase": "whole", "high": window.hu_max}
            if not window.dynamic:
                run.stop()
    elif chooses:
        found = now["failed"] or [math.inf, -math.inf]
        minus_low, high = _over_ranks(run, [-found[0], found[1]], "MAX")
        if high + minus_low <= window.width_hu:
            run.stop()
        else:
            now |= {"phase": "dynamic", "low": -minus_low, "high": high, "epochs": 0}
    now |= {"near": 0, "pixels": 0, "failed": None}


def _over_ranks(run: Run, values: list[float], how: Literal["SUM", "MAX"]) -> list[float]:
    """Ranks see other batches but must choose the same window."""
    if run.world == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float32, device=run.device)
    torch.distributed.all_reduce(shared, op=getattr(torch.distributed.ReduceOp, how))
    return shared.tolist()


def _count_near(shown: Batch, made: Tensor, now: dict[str, Any], window: WindowSettings) -> None:
    inside = shown.measured & (shown.target > now["low"]) & (shown.target < now["high"])
    now["near"] += int(((made - shown.target).abs() < window.tolerance_hu)[inside].sum())
    now["pixels"] += int(inside.sum())


# -- dynamic selection -------------------------------------------------------------------------------------------------


def grad_cam(score: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017): where in an image the evidence for `score` lies, (b, 1, *size) in 0..1.

    score: (b,), computed from features (b, c, h', w'). Each map is divided by its largest value; 0 where none is above.
    """
    (gradient,) = torch.autograd.grad(score.sum(), features)
    cam = torch.relu((gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True)).detach().float()
    cam = cam / cam.amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return functional.interpolate(cam, size, mode="bilinear", align_corners=False)


def failed_hu(hu: Tensor, failed: Tensor) -> tuple[float, float] | None:
    """The least and the largest whole HU that occur more than once among the failed pixels of one image; None: none do.

    hu: (h, w). failed: bool (h, w). What occurs once is taken for noise (Sec. II-B).
    """
    values, counts = hu[failed].round().unique(return_counts=True)
    values = values[counts > 1]
    return (float(values[0]), float(values[-1])) if len(values) else None


def _count_failed(batch: Batch, made: Tensor, now: dict[str, Any], window: WindowSettings, score: Score) -> None:
    with torch.enable_grad():
        made = made.clone().requires_grad_()
        values, features = score(batch, made)
        cam = grad_cam(values.float(), features, made.shape[2:])  # type: ignore[arg-type]
    failed = (cam > window.fail) & batch.source_measured & (made >= window.hu_min) & (made <= window.hu_max)
    for image, where in zip(made.detach(), failed, strict=True):
        found = failed_hu(image[0], where[0])
        if found is not None:
            known = now["failed"] or found
            now["failed"] = [min(known[0], found[0]), max(known[1], found[1])]


class _Critic(nn.Module):
    """For methods without a discriminator: image (b, 1, h, w) in HU -> (score of "non-standard" (b,), last map)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((1, 16), (16, 32), (32, 64))
        self.body = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in sizes)
        self.last = nn.Conv2d(64, 1, 1)

    def forward(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        x = hu / 1000
        for layer in self.body:
            x = functional.leaky_relu(layer(x), 0.2)
        return self.last(x).mean((1, 2, 3)), x

    def loss(self, standard: Tensor, made: Tensor) -> Tensor:
        """Cross-entropy of telling them apart."""
        return functional.softplus(self(standard)[0]).mean() + functional.softplus(-self(made)[0]).mean()
