"""Steps of a sampler against CCC and time, and how much faster it is than the chain of 1,000 steps in image space.

    python benchmarks/sampling_speed.py --model MODEL --cohort kt/cohort.csv --target-protocol Bl64
        [--source-protocol Br40] [--peer DDPM_MODEL] [--patches 8] [--size 128] [--out curve.csv]

MODEL: a trained `ddpm` or `diffusion-ct`; the peer is a trained `ddpm` (MODEL itself, if it is one) that goes through
all its steps with the sampler `ddpm`. Patches of the patients that a training with the same --seed holds out, the same
for all. CCC: mean over the tile features that trainings are judged by of their CCC over soft-tissue tiles. Times are
medians over the patches, drawn one at a time, of the processor's seconds on one thread. Bound: the default steps of
MODEL are at least 20 times as fast as the peer (R = peer / ours / 20), at a CCC less than 0.02 below the peer's; what
they lose to the best of the curve is printed too. At the end one slice of 512 x 512 is drawn at the default steps, for
its seconds and the memory of the process.
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from harmonict.core import HarmonictError
from harmonict.data import About, Batch, cohort_pairs
from harmonict.methods import load_model
from harmonict.nn.diffusion import check_steps
from harmonict.sampling import SampledHarmonizer
from harmonict.train import validation

STEPS = (1, 2, 4, 5, 6, 8, 10, 20, 50)
TIMES_FASTER, LOSS = 20, 0.02


def drawn(model: SampledHarmonizer, batches: list[Batch]) -> tuple[list[torch.Tensor], float]:
    """(images, seconds a patch)."""
    images, seconds = [], []
    with torch.inference_mode():
        for batch in batches:
            start = time.process_time()
            about = About((float(model.pixel_mm[0]), float(model.pixel_mm[1])))
            images.append(model.translate(batch.source, model.target, about))
            seconds.append(time.process_time() - start)
    return images, statistics.median(seconds)


def row(model: SampledHarmonizer, batches: list[Batch], sampler: str, steps: int) -> dict:
    model.adjust({"sampler": sampler, "steps_sampled": steps})
    images, seconds = drawn(model, batches)
    ccc, mae = validation(batches, images, None)
    return {"model": model.name, "sampler": sampler, "steps": steps, "ccc": ccc, "mae_hu": mae, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--cohort", type=Path, required=True)
    parser.add_argument("--target-protocol", required=True)
    parser.add_argument("--source-protocol", action="append", default=[])
    parser.add_argument("--patches", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    model = load_model(options.model)
    peer = load_model(options.peer or options.model)
    if not isinstance(model, SampledHarmonizer) or peer.name != "ddpm":
        raise SystemExit("--model must be a trained ddpm or diffusion-ct, and --peer a trained ddpm")
    default = model.config.sampler, model.config.steps_sampled
    pairs = cohort_pairs(
        options.cohort,
        target=options.target_protocol,
        sources=options.source_protocol,
        rng=np.random.default_rng(options.seed),
    )
    if pairs.held_out is None:
        raise SystemExit("the cohort has no held-out patients to measure on")
    batches = [pairs.held_out.batch((0, n), size=1, patch=options.size, augment=False) for n in range(options.patches)]
    source = validation(batches, [batch.source for batch in batches], None)

    rows = [{"model": "source as it is", "ccc": source[0], "mae_hu": source[1]}]
    drawn(model, batches[:1])  # MONAI is imported, memory is had
    for sampler, steps in sorted({default, *((s, n) for s in ("ddim", "dpm") for n in STEPS)}):
        try:
            check_steps(steps, model.config.steps_noise, sampler)
        except ValueError:
            continue
        rows.append(row(model, batches, sampler, steps))
        print(rows[-1], flush=True)
    slow = row(peer, batches, "ddpm", peer.config.steps_noise)
    table = pd.DataFrame([*rows, slow])
    print(table.to_string(index=False))
    if options.out is not None:
        table.to_csv(options.out, index=False)
    ours = next(r for r in rows[1:] if (r["sampler"], r["steps"]) == default)
    best = max(r["ccc"] for r in rows[1:])
    words = (
        f"{default[1]} steps of {default[0]}: CCC {ours['ccc']:.3f}; lost to the peer {slow['ccc'] - ours['ccc']:.3f}"
    )
    print(f"{words} (bound {LOSS}), to the best of the curve {best - ours['ccc']:.3f}")
    model.adjust({"sampler": default[0], "steps_sampled": default[1]})
    whole = [pairs.held_out.batch((0, 0), size=1, patch=512, augment=False)]
    _, seconds = drawn(model, whole)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"one slice of 512 x 512: {seconds:.2f} s; peak memory of the process {peak_gb:.2f} GB")
    ratio = slow["seconds"] / ours["seconds"] / TIMES_FASTER
    print(f"sampling_speed: ratio {ratio:.2f} (ours {ours['seconds']:.3f} s, peer {slow['seconds']:.3f} s)")


if __name__ == "__main__":
    try:
        main()
    except HarmonictError as error:
        raise SystemExit(str(error)) from None
