"""STAN-CT's figures 3 and 5: texture error over the first iterations beside GANai, latent loss over G- and D-phases.

harmonict simulate kentucky-small --out kt
python examples/stan_ct_figures.py kt/cohort.csv --steps 100 --figure-3 glcm.png > glcm.md
harmonict fit stan-ct --size compact --cohort kt/cohort.csv --target-protocol Bl64 --out model
python examples/stan_ct_figures.py --log model.run/log.csv --figure-5 latent.png

Figure 3: an iteration of the paper is a round of its alternative training; here it is `--steps` steps of it. The same
seed gives the same batches, so training anew for one, two, three and four iterations shows one training at four points.
The error is that of the held-out patients' slices (eq 8), mean over slices; iteration 0 is the source as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from harmonict.data import About, SlicePairs, cohort_pairs
from harmonict.evaluate.texture import FEATURES, texture_errors
from harmonict.harmonizer import make_config
from harmonict.methods import get_method
from harmonict.train import Run

METHODS = ("ganai", "stan-ct")
ITERATIONS = 4
SLICES = 12  # of the held-out patients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", nargs="?", type=Path)
    parser.add_argument("--source", default="Br40")
    parser.add_argument("--target", default="Bl64")
    parser.add_argument("--steps", type=int, default=100, help="steps of an iteration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure-3", type=Path)
    parser.add_argument("--log", type=Path, help="log.csv of a training of stan-ct")
    parser.add_argument("--figure-5", type=Path)
    chosen = parser.parse_args()
    if chosen.figure_3:
        table = first_iterations(chosen.cohort, chosen.source, chosen.target, chosen.steps, chosen.seed)
        print("| method | iteration | " + " | ".join(FEATURES) + " |\n" + "|---" * (2 + len(FEATURES)) + "|")
        for row in table.itertuples(index=False):
            print(f"| {row[0]} | {row[1]} | " + " | ".join(f"{value:.3f}" for value in row[2:]) + " |")
        draw_errors(table, chosen.figure_3)
    if chosen.figure_5:
        draw_latent(latent_by_phase(pd.read_csv(chosen.log)), chosen.figure_5)


def first_iterations(cohort: Path, source: str, target: str, steps: int, seed: int) -> pd.DataFrame:
    """Columns method, iteration and the five features of eq 8, errors against the target."""
    pairs = cohort_pairs(cohort, target=target, sources=[source], rng=np.random.default_rng(seed))
    held_out = pairs.held_out
    assert held_out is not None
    chosen = held_out.subset(np.linspace(0, len(held_out) - 1, SLICES).round().astype(int).tolist())
    pairs.held_out = None  # nothing is chosen by it: the state of the last step is shown
    rows = []
    for name in METHODS:
        kind = get_method(name)
        rows.append((name, 0, *errors(chosen, None)))
        for iteration in range(1, ITERATIONS + 1):
            config = make_config(kind.Config, {**kind.sizes["compact"], "steps": iteration * steps})
            model = kind(config).fit(pairs, Run(seed=seed, say=lambda line: None))
            rows.append((name, iteration, *errors(chosen, model)))
    return pd.DataFrame(rows, columns=["method", "iteration", *FEATURES])


@torch.inference_mode()
def errors(pairs: SlicePairs, model) -> list[float]:
    """Mean over slices of the five texture errors inside what both images measured."""
    found = []
    for pair in pairs:
        image = pair.source
        if model is not None:
            x = torch.from_numpy(np.array(image))[None, None]
            image = model.translate(x, model.target, About(pair.pixel_mm, pair.source_protocol))[0, 0].numpy()
        found.append(texture_errors(image, pair.target, mask=pair.measured & (pair.target > -1000)))
    return pd.concat(found).mean()[list(FEATURES)].tolist()


def latent_by_phase(log: pd.DataFrame) -> pd.DataFrame:
    """Mean latent loss of each phase of a training: columns phase, side, step (its last), latent."""
    wide = log.pivot_table(index="step", columns="name", values="value", aggfunc="last")
    side = np.where(wide["adversarial D"].notna(), "D", "G")
    new = np.concatenate([[True], (side[1:] != side[:-1]) | (np.diff(wide["phase"].to_numpy()) != 0)])
    wide = wide.assign(side=side, number=np.cumsum(new), at=wide.index)
    return wide.groupby("number").agg(side=("side", "first"), step=("at", "last"), latent=("latent", "mean"))


def draw_errors(table: pd.DataFrame, path: Path) -> None:
    figure, axes = plt.subplots(1, len(FEATURES), figsize=(2.6 * len(FEATURES), 2.6))
    for axis, feature in zip(axes, FEATURES, strict=True):
        for name, part in table.groupby("method"):
            axis.plot(part["iteration"], part[feature], marker="o", label=name)
        axis.set_title(feature, fontsize=9)
        axis.set_xlabel("iteration")
        axis.set_xticks(range(ITERATIONS + 1))
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("relative error")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_latent(phases: pd.DataFrame, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 2.8))
    axis.plot(phases["step"], phases["latent"], color="0.8", zorder=0)
    for side, part in phases.groupby("side"):
        axis.scatter(part["step"], part["latent"], s=14, label=f"{side}-phase")
    axis.set_xlabel("step")
    axis.set_ylabel("latent loss, mean of the phase")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
