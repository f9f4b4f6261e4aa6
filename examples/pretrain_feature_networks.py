"""Pre-train a feature network on virtual patients: which kernel, dose, slice thickness and tissue does this patch show?

harmonict simulate kentucky-small --out kt && harmonict simulate real-pairs-small --out rp
harmonict simulate duke-small --out duke --slices 4
python examples/pretrain_feature_networks.py kt rp duke --network vgg19 --out weights/

Only patients of the training split are read; the last of every group of three or more is held out, and the printed
accuracies are theirs. A patch is asked for its kernel among those that its own patient was reconstructed with, so that
knowing the trial by its pixels or its anatomy does not help; likewise dose and thickness. Tissue is the share of each
class of HU in the noise-free truth. Each of the five levels answers on its own, from the mean of its maps: so every
level learns texture, not the deepest alone. Writes NETWORK-trial.safetensors (float16) and its card, a .json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import Tensor, nn

from harmonict.core.cohort import read_cohort
from harmonict.dicom.read import read_series
from harmonict.nn.losses import gram
from harmonict.nn.resnet import ResNet18
from harmonict.nn.vgg import VGG19, prepare
from harmonict.simulate.kernels import get_kernel

TISSUES = ("air", "emphysema", "lung", "fat", "soft", "bone")
TISSUE_EDGES_HU = (-990.0, -950.0, -500.0, -20.0, 150.0)
QUESTIONS = ("kernel", "dose", "thickness")
TEXTURE_LAYERS = tuple(f"relu{n}_1" for n in range(1, 6))
NOISE_HU = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0)


@dataclass(frozen=True)
class Scan:
    """hu, truth: (z, y, x) int16. says: question -> answer; nothing where it has none (the truth has no dose)."""

    hu: np.ndarray
    truth: np.ndarray
    patient: str
    held_out: bool
    says: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="+", type=Path, help="folders that `harmonict simulate` made")
    parser.add_argument("--network", choices=("vgg19", "resnet18"), required=True)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    start = time.monotonic()
    scans = [scan for trial in chosen.trials for scan in read_trial(trial)]
    print(f"{len(scans)} series of {len({s.patient for s in scans})} patients, {time.monotonic() - start:.0f} s")
    torch.manual_seed(chosen.seed)
    network = VGG19(chosen.width) if chosen.network == "vgg19" else ResNet18(chosen.width)
    results = train(network, scans, chosen)
    if isinstance(network, VGG19):
        torch.manual_seed(chosen.seed + 1)
        random = VGG19(chosen.width)
        results["texture"] = {"trial": texture_table(network, scans), "random": texture_table(random, scans)}
        print(json.dumps(results["texture"], indent=1))
    write(network, results, scans, chosen)


# -- data ------------------------------------------------------------------------------------------------------------


def read_trial(folder: Path) -> list[Scan]:
    """Every series of the training split, with the truth on its grid."""
    table = read_cohort(folder / "cohort.csv")
    table = table[(table["split"] == "train") & (table["state"] == "done")]
    held_out = set()
    for _, subjects in table.groupby("group")["subject"]:
        if len(names := sorted(subjects.unique())) >= 3:
            held_out.add(names[-1])
    scans = []
    for (patient, _), rows in table.groupby(["patient", "slice_thickness_mm"]):
        truth = _read(rows[rows["model"] == "truth"].iloc[0]["path"])
        for _, row in rows.iterrows():
            is_truth = row["model"] == "truth"
            strength = f"({row['iterative_strength']:g})" if row["iterative_strength"] > 0 else ""
            says = {"kernel": "truth" if is_truth else f"{row['kernel']}{strength}"}
            says["thickness"] = f"{row['slice_thickness_mm']:g} mm"
            if not is_truth:
                says["dose"] = f"{row['ctdivol_mgy']:g} mGy"
            hu = truth if is_truth else _read(row["path"])
            scans.append(Scan(hu, truth, str(patient), row["subject"] in held_out, says))
    return scans


def _read(folder: str) -> np.ndarray:
    return np.round(read_series(sorted(Path(folder).glob("*.dcm"))).hu).astype(np.int16)


class Patches:
    """Draws patches: a patient, one of its kernels, a series, a slice, a place with at least half of it in the body."""

    def __init__(self, scans: list[Scan], names: dict[str, list[str]], side: int, seed: int) -> None:
        self._side, self._names, self._rng = side, names, np.random.default_rng(seed)
        by_patient: dict[str, dict[str, list[Scan]]] = defaultdict(lambda: defaultdict(list))
        for scan in scans:
            by_patient[scan.patient][scan.says["kernel"]].append(scan)
        self._patients = [list(kernels.values()) for kernels in by_patient.values()]
        self._choices = {
            patient: {q: {s.says[q] for k in kernels.values() for s in k if q in s.says} for q in QUESTIONS}
            for patient, kernels in by_patient.items()
        }

    def draw(self, count: int) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """HU (b, 1, h, w), tissue shares (b, tissues), and of each question the answer (b,), -1 where there is none,
        and which answers were possible (b, n)."""
        hu, shares = [], []
        answer = {q: torch.full((count,), -1) for q in QUESTIONS}
        possible = {q: torch.zeros(count, len(self._names[q]), dtype=torch.bool) for q in QUESTIONS}
        for n in range(count):
            scan, image, truth = self._one()
            hu.append(torch.from_numpy(image.astype(np.float32)))
            classes = np.digitize(truth, TISSUE_EDGES_HU)
            shares.append(torch.from_numpy(np.bincount(classes.ravel(), minlength=len(TISSUES)) / classes.size))
            for q in QUESTIONS:
                choices = self._choices[scan.patient][q]
                possible[q][n, [self._names[q].index(name) for name in choices]] = True
                if q in scan.says and len(choices) > 1:
                    answer[q][n] = self._names[q].index(scan.says[q])
        return torch.stack(hu)[:, None], torch.stack(shares).float(), {q: (answer[q], possible[q]) for q in QUESTIONS}

    def _one(self) -> tuple[Scan, np.ndarray, np.ndarray]:
        pick, side = self._rng.integers, self._side
        kernels = self._patients[pick(len(self._patients))]
        series = kernels[pick(len(kernels))]
        scan = series[pick(len(series))]
        while True:
            z, y, x = (pick(n - m + 1) for n, m in zip(scan.hu.shape, (1, side, side), strict=True))
            truth = scan.truth[z, y : y + side, x : x + side]
            if (truth > TISSUE_EDGES_HU[0]).mean() >= 0.5:
                break
        turn, flip = int(pick(4)), slice(None, None, int(1 - 2 * pick(2)))
        image = scan.hu[z, y : y + side, x : x + side]
        return scan, np.rot90(image, turn)[:, flip].copy(), truth


# -- training --------------------------------------------------------------------------------------------------------


def levels(network: VGG19 | ResNet18, x: Tensor) -> list[Tensor]:
    """The mean of each map at the end of each of the five levels."""
    means = []
    for block in network.groups() if isinstance(network, VGG19) else network.blocks():
        x = block(x)
        means.append(x.float().mean(dim=(2, 3)))
    return means


class Heads(nn.Module):
    """One linear map a level, from its means to all answers."""

    def __init__(self, channels: list[int], sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.linear = nn.ModuleList(nn.Linear(c, sum(sizes.values())) for c in channels)

    def forward(self, means: list[Tensor]) -> list[dict[str, Tensor]]:
        return [
            dict(zip(self.sizes, linear(mean).split(list(self.sizes.values()), dim=1), strict=True))
            for linear, mean in zip(self.linear, means, strict=True)
        ]


def train(network: VGG19 | ResNet18, scans: list[Scan], chosen: argparse.Namespace) -> dict:
    names = {q: sorted({s.says[q] for s in scans if q in s.says}) for q in QUESTIONS}
    seen = Patches([s for s in scans if not s.held_out], names, chosen.patch, chosen.seed)
    unseen = Patches([s for s in scans if s.held_out], names, chosen.patch, chosen.seed + 1)
    network.to(memory_format=torch.channels_last)
    with torch.no_grad():
        channels = [m.shape[1] for m in levels(network, prepare(seen.draw(2)[0]))]
    heads = Heads(channels, {**{q: len(n) for q, n in names.items()}, "tissue": len(TISSUES)})
    adam = torch.optim.AdamW([*network.parameters(), *heads.parameters()], lr=chosen.rate, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, chosen.rate, total_steps=chosen.steps, pct_start=0.1)
    start = time.monotonic()
    for step in range(1, chosen.steps + 1):
        hu, shares, asked = seen.draw(chosen.batch)
        with torch.autocast("cpu", torch.bfloat16):
            means = levels(network, prepare(hu).to(memory_format=torch.channels_last))
        losses = [
            _choice_loss(said["tissue"], shares, None)
            + sum(_choice_loss(said[q], answer, possible) for q, (answer, possible) in asked.items())
            for said in heads(means)
        ]
        loss = torch.stack(losses).mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        rate.step()
        if step % max(1, chosen.steps // 30) == 0:
            shown = " ".join(f"{value.item():.2f}" for value in losses)
            print(f"step {step}: loss by level {shown}, {time.monotonic() - start:.0f} s", flush=True)
    seconds = time.monotonic() - start
    # what is shipped is what is judged: float16
    network.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    )
    network.eval()
    return {"train_seconds": round(seconds), "held_out_accuracy": judge(network, heads, unseen)}


def _choice_loss(said: Tensor, answer: Tensor, possible: Tensor | None) -> Tensor:
    if possible is None:  # shares, not one answer
        return -(answer * said.log_softmax(dim=1)).sum(dim=1).mean()
    known = answer >= 0
    if not known.any():
        return said.sum() * 0
    return nn.functional.cross_entropy(said[known].masked_fill(~possible[known], -1e4), answer[known])


@torch.inference_mode()
def judge(network: VGG19 | ResNet18, heads: Heads, patches: Patches, batches: int = 32, size: int = 64) -> dict:
    """Of each question: patches asked, accuracy by chance and of the commonest answer, accuracy of each level.
    Tissue: the largest share."""
    right: dict[str, list[list[Tensor]]] = defaultdict(lambda: [[] for _ in heads.linear])
    chance: dict[str, list[Tensor]] = defaultdict(list)
    answers: dict[str, list[Tensor]] = defaultdict(list)
    for _ in range(batches):
        hu, shares, asked = patches.draw(size)
        every = {**asked, "tissue": (shares.argmax(dim=1), torch.ones(size, len(TISSUES), dtype=torch.bool))}
        said_by_level = heads(levels(network, prepare(hu).to(memory_format=torch.channels_last)))
        for q, (answer, possible) in every.items():
            known = answer >= 0
            if not known.any():
                continue
            chance[q].append(1.0 / possible[known].sum(dim=1))
            answers[q].append(answer[known])
            for level, said in enumerate(said_by_level):
                best = said[q].masked_fill(~possible, -1e4).argmax(dim=1)
                right[q][level].append((best == answer)[known])
    result = {}
    for q, by_level in right.items():
        result[q] = {
            "patches": int(sum(len(part) for part in by_level[0])),
            "chance": round(float(torch.cat(chance[q]).mean()), 3),
            "commonest": round(float(torch.cat(answers[q]).bincount().max() / len(torch.cat(answers[q]))), 3),
            "by_level": [round(float(torch.cat(level).float().mean()), 3) for level in by_level],
        }
        print(f"{q}: {result[q]}")
    return result


# -- does it see texture ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def texture_table(network: VGG19, scans: list[Scan], *, patches: int = 48, side: int = 64, seed: int = 7) -> dict:
    """Per layer, on held-out patients with at least six FBP kernels at one dose, patches in the body.

    sharpness: Spearman correlation of the kernel's f50 with the distance from the softest kernel, mean over patches.
    noise: likewise with the HU of added noise. kernel_found: leave one patch out, nearest mean Gram matrix among the
    kernels, each patch elsewhere in the body: texture told from anatomy. separation: mean distance between kernels over
    that between patches of one kernel.
    """
    network.eval()
    by_patient: dict[str, dict[str, Scan]] = defaultdict(dict)
    for scan in scans:
        kernel = scan.says["kernel"]
        if scan.held_out and kernel != "truth" and "(" not in kernel and scan.says["dose"] == "6.5 mGy":
            by_patient[scan.patient][kernel] = scan
    sets = [kernels for kernels in by_patient.values() if len(kernels) >= 6]
    if not sets:
        return {}
    f50 = {kernel: get_kernel(kernel).f50_per_mm for kernels in sets for kernel in kernels}
    order = sorted(f50, key=lambda kernel: f50[kernel])
    rng = np.random.default_rng(seed)
    sharp, noisy = defaultdict(list), defaultdict(list)
    all_grams = defaultdict(list)
    for _ in range(patches):
        kernels = sets[rng.integers(len(sets))]
        truth = kernels[order[0]].truth
        while True:
            z, y, x = (rng.integers(n - m + 1) for n, m in zip(truth.shape, (1, side, side), strict=True))
            if (truth[z, y : y + side, x : x + side] > TISSUE_EDGES_HU[0]).mean() >= 0.9:
                break
        images = [kernels[kernel].hu[z, y : y + side, x : x + side].astype(np.float32) for kernel in order]
        noise = gaussian_filter(rng.standard_normal((side, side)), 0.7)
        noise /= noise.std()
        images += [images[0] + hu * noise for hu in NOISE_HU]
        maps = network(prepare(torch.from_numpy(np.stack(images)).float()[:, None]), TEXTURE_LAYERS)
        for layer, features in zip(TEXTURE_LAYERS, maps, strict=True):
            g = gram(features).flatten(1)
            g = g / g.norm(dim=1, keepdim=True)
            by_kernel, by_noise = g[: len(order)], g[len(order) :]
            all_grams[layer].append(by_kernel)
            sharp[layer].append(spearmanr((by_kernel - by_kernel[0]).norm(dim=1), range(len(order))).statistic)
            noisy[layer].append(spearmanr((by_noise - by_noise[0]).norm(dim=1), range(len(NOISE_HU))).statistic)
    table = {}
    for layer in TEXTURE_LAYERS:
        g = torch.stack(all_grams[layer])  # (patches, kernels, features)
        mean = (g.sum(dim=0) - g) / (len(g) - 1)  # of the other patches
        found = torch.cdist(g, mean).argmin(dim=2) == torch.arange(len(order))
        within = (g - g.mean(dim=0)).norm(dim=2).mean()
        between = torch.cdist(g.mean(dim=0), g.mean(dim=0)).sum() / (len(order) * (len(order) - 1))
        table[layer] = {
            "sharpness": round(float(np.mean(sharp[layer])), 3),
            "noise": round(float(np.mean(noisy[layer])), 3),
            "kernel_found": round(float(found.float().mean()), 3),
            "separation": round(float(between / within), 3),
        }
    table["kernels"] = order
    return table


# -- files -----------------------------------------------------------------------------------------------------------


def write(network: VGG19 | ResNet18, results: dict, scans: list[Scan], chosen: argparse.Namespace) -> None:
    name = f"{chosen.network}-trial"
    state = {k: v.half().contiguous() for k, v in sorted(network.state_dict().items()) if v.is_floating_point()}
    content = save(state)
    card = {
        "network": chosen.network,
        "width": chosen.width,
        "parameters": sum(p.numel() for p in network.parameters()),
        "sha256": hashlib.sha256(content).hexdigest(),
        "made_by": (
            f"python examples/pretrain_feature_networks.py {' '.join(t.name for t in chosen.trials)}"
            f" --network {chosen.network} --width {chosen.width} --steps {chosen.steps} --batch {chosen.batch}"
            f" --patch {chosen.patch} --rate {chosen.rate:g} --seed {chosen.seed}"
        ),
        "data": "virtual patients of the training split; no image of a person",
        "trained_on": sorted({s.patient for s in scans if not s.held_out}),
        "judged_on": sorted({s.patient for s in scans if s.held_out}),
        "series": len(scans),
        **results,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / f"{name}.safetensors").write_bytes(content)
    (chosen.out / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"wrote {chosen.out / name}.safetensors ({len(content) / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
