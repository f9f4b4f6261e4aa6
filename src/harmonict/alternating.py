"""Fully optimised alternative training (GANai, Liang et al. 2018; STAN-CT, Background), for any GAN here.

    paper                                                       here
    G-phase, D-phase: until an accuracy or t_max steps          Rules, end_step
    several copies of G and D compete                           Contest
    a component that cannot fool its counterpart goes back      end_step (rollback)
    prediction thresholds for fake and real, 0.01 and 0.99      Rules.fake_below, Rules.real_above

A method's loop stays its own:

    contest, phase = Contest(generators, discriminators), new_phase()
    adam = {"G": Adam(contest.generators...), "D": Adam(contest.discriminators...)}
    for batch in run.batches(..., contest=contest, adam_g=adam["G"], adam_d=adam["D"], phase=phase):
        side = begin_step(contest, adam, phase)
        ...                                           # the method's losses of that side; run.step(losses, adam[side])
        end_step(run, rules, contest, adam, phase, real, fake)

The papers contradict themselves on one point: a phase ends at t_max, and a phase that fails within t_max starts again.
Here a side that at t_max is no worse than at the phase's start has done its phase; one that lost ground goes back to
the start and tries again on other data, at most `retries` times; then the turn is the other side's. Which side begins
is not said: D, so that G never learns from a D that has seen nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harmonict.train import Run, put_back

SIDES = ("G", "D")


@dataclass(frozen=True)
class Rules:
    """When a phase ends. t_max: steps of a phase. window: steps that an accuracy is the mean of. Probabilities are D's,
    that an image is of the target protocol: G is done where its images reach `real_above`, D where it gives real
    images that and made ones `fake_below`. slack: by how much a score may fall in a phase before the side goes back.
    retries: attempts of a phase after the first."""

    t_max: int
    window: int = 8
    fake_below: float = 0.01
    real_above: float = 0.99
    slack: float = 0.25
    retries: int = 1

    def __post_init__(self) -> None:
        if self.t_max < 1 or self.window < 1 or self.retries < 0 or self.slack < 0:
            raise ValueError("t_max and window must be at least 1, retries and slack at least 0")
        if not 0 <= self.fake_below < self.real_above <= 1:
            raise ValueError("0 <= fake_below < real_above <= 1")


class Contest(nn.Module):
    """The copies that compete, and which of each won its last phase."""

    best: Tensor  # (2,) places of the leading G and D

    def __init__(self, generators: list[nn.Module], discriminators: list[nn.Module]) -> None:
        super().__init__()
        self.generators, self.discriminators = nn.ModuleList(generators), nn.ModuleList(discriminators)
        self.register_buffer("best", torch.zeros(2, dtype=torch.long))

    @property
    def generator(self) -> Any:
        """The leading G, of the method's own kind."""
        return self.generators[int(self.best[0])]

    @property
    def discriminator(self) -> Any:
        """The leading D."""
        return self.discriminators[int(self.best[1])]

    def side(self, side: str) -> nn.ModuleList:
        return self.generators if side == "G" else self.discriminators


def new_phase() -> dict[str, Any]:
    """Plain values and the tensors to roll back to; a part of the loop's state."""
    return {"side": "D", "number": 0, "step": 0, "attempt": 0, "rollbacks": 0, "scores": [], "first": None, "start": {}}


def begin_step(contest: Contest, adam: Mapping[str, Optimizer], phase: dict[str, Any]) -> str:
    """The side whose turn it is, "G" or "D"; the other one is frozen. At a phase's start its state is kept."""
    side = phase["side"]
    for name in SIDES:
        contest.side(name).requires_grad_(name == side)
    if phase["step"] == 0 and phase["attempt"] == 0:
        networks = {k: v.detach().clone() for k, v in contest.side(side).state_dict().items()}
        phase["start"] = {"networks": networks, "adam": copy.deepcopy(adam[side].state_dict())}
    return side


def scores(side: str, real: Tensor, fake: Tensor) -> Tensor:
    """How well each copy of a side does, from 0 to 1: (copies,).

    real: (discriminators,) probability of being real that each gives to real images (not used in the G-phase). fake:
    (generators, discriminators), to made ones. A G is as good as it fools the strictest D; a D as it knows real images
    and the made ones of the best G.
    """
    if side == "G":
        return fake.amin(dim=1)
    return torch.minimum(real, 1 - fake.amax(dim=0))


def end_step(
    run: Run,
    rules: Rules,
    contest: Contest,
    adam: Mapping[str, Optimizer],
    phase: dict[str, Any],
    real: Tensor | None,
    fake: Tensor,
) -> None:
    """Count the step, and end or restart the phase where the rules say so. real, fake: see `scores`, before the step;
    real may be None in the G-phase. Logs the phase's number and the leader's score.

    In several processes all see the same mean, so that all turn at the same step.
    """
    side = phase["side"]
    g, d = fake.shape
    real = fake.new_zeros(d) if real is None else real
    means = run.mean_of_ranks(torch.cat([real.detach().float(), fake.detach().float().flatten()]))
    now = scores(side, means[:d], means[d:].reshape(g, d)).tolist()
    run.log("phase", phase["number"])
    run.log(f"score {side}", max(now))
    phase["step"] += 1
    phase["scores"] = [*phase["scores"], now][-rules.window :]
    mean = torch.tensor(phase["scores"]).mean(dim=0)
    leader, score = int(mean.argmax()), float(mean.max())
    if phase["step"] == min(rules.window, rules.t_max):
        phase["first"] = score
    if phase["first"] is None:
        return
    goal = rules.real_above if side == "G" else min(rules.real_above, 1 - rules.fake_below)
    if score >= goal or (phase["step"] >= rules.t_max and score >= phase["first"] - rules.slack):
        contest.best[SIDES.index(side)] = leader
        _turn(phase)
    elif phase["step"] >= rules.t_max:
        put_back(contest.side(side), phase["start"]["networks"])
        put_back(adam[side], copy.deepcopy(phase["start"]["adam"]))  # Adam goes on inside what it is given
        phase["rollbacks"] += 1
        if phase["attempt"] < rules.retries:
            phase.update(step=0, attempt=phase["attempt"] + 1, scores=[], first=None)
        else:
            _turn(phase)


def _turn(phase: dict[str, Any]) -> None:
    other = "D" if phase["side"] == "G" else "G"
    phase.update(side=other, number=phase["number"] + 1, step=0, attempt=0, scores=[], first=None, start={})
