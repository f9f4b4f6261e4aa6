"""Run: the servant of a training loop. Batches, seeds, device, precision, log, exact resume; the loop is the method's.

    run = Run("model.run", seed=0)
    with run.seeded():
        self.network = build(self.config)
    adam = torch.optim.Adam(self.network.parameters(), lr=1e-4)
    for batch in run.batches(pairs, size=8, patch=96, steps=4000, network=self.network, adam=adam):
        run.step({"L2": (1.0, mse(self(batch.source), batch.target))}, adam)
        run.check(pairs.held_out, output)

Two phases are two loops; a finished one is not run again when a killed training goes on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor, nn
from torch.optim import Optimizer

from harmonict import __version__
from harmonict.abstention import trained_on
from harmonict.core import HarmonictError
from harmonict.data import About, Batch, Scan, SlicePairs, SoftTissue, is_soft_tissue
from harmonict.metrics import ccc
from harmonict.nn.losses import Losses, total_loss

CHECK_PATCHES, CHECK_SLICES, TILE = 32, 4, 64  # what a training is judged on, and the tiles that features are taken of
SHEET_HU = (-1000.0, 400.0)
SHEET_ROWS = 4
_CHECKPOINTS_KEPT = 2


class Run:
    """What a training needs beside its mathematics. One Run serves one `fit`."""

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        seed: int = 0,
        identity: Mapping[str, Any] | None = None,
        accelerator: str = "auto",
        devices: int = 1,
        precision: Literal["auto", "bf16", "float32"] = "auto",
        patience: int = 10,
        save_every_s: float = 60.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """folder: where checkpoints, log and contact sheets go and where a killed training goes on; None keeps nothing.

        seed: of weights, batches and noise. identity: what makes this training itself (method, settings, data); a
        folder that holds another one is refused. accelerator: "auto" takes a GPU where there is one, else the CPU.
        devices: how many; the batch is divided among them and the gradients are averaged. precision: of networks
        inside `inside()`; "auto" is bf16 where the processor computes with it. patience: a loop ends after so many
        checks without a better validation CCC. save_every_s: seconds between checkpoints. say: gets a line at each
        check (default: standard error).
        """
        from lightning_fabric import Fabric

        bf16 = precision == "bf16" or (precision == "auto" and _computes_bf16(accelerator))
        strategy = "ddp" if devices > 1 else "auto"
        self._fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy)
        if devices > 1:
            self._fabric.launch()
        self.seed, self.patience = seed, patience
        self.precision = "bf16" if bf16 else "float32"
        self.device: torch.device = self._fabric.device
        self.rank, self.world = self._fabric.global_rank, self._fabric.world_size
        self._folder = None if folder is None else Path(folder)
        self._save_every_s = save_every_s
        self._say = say or (lambda line: print(line, file=sys.stderr))
        self._loops: list[dict[str, Any]] = []  # what is known of each loop: see _new_loop
        self._check_batches: list[Batch] | None = None
        self._state: dict[str, Any] = {}
        self._stopped = self._ends_epoch = False
        if self._folder is not None and self.is_first:
            _open_folder(self._folder, {**(identity or {}), "seed": seed})
        self._log = _Log(self._folder if self.is_first else None)

    @property
    def is_first(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0

    @property
    def step_number(self) -> int:
        """Steps that the loop has finished."""
        return self._loops[-1]["step"]

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Inside, torch's own random numbers (the first weights of a network) follow from the seed alone."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            yield

    def inside(self) -> AbstractContextManager[Any]:
        """Where a network computes in bf16, if it does. What leaves it is cast back with `.float()`."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def stop(self) -> None:
        """End the loop after this step."""
        self._stopped = True

    # -- the loop --------------------------------------------------------------------------------------------------

    def batches(
        self,
        pairs: SlicePairs,
        *,
        size: int,
        steps: int,
        patch: int | None = None,
        epoch_steps: int | None = None,
        augment: bool = True,
        tissue: SoftTissue | None = None,
        describe: Callable[[Any], About] | None = None,
        **state: Any,
    ) -> Iterator[Batch]:
        """Batches of `size` pairs for `steps` steps, on the device.

        Batch and noise of a step follow from (seed, loop, step, rank) and from nothing else. state: everything that the
        loop changes: networks, optimizers, schedulers (`state_dict`), and dicts of plain values, which are changed in
        place. All of it is in every checkpoint; networks are moved to the device. epoch_steps: steps between two
        checks; default a twentieth of all. describe: gives each source's About, once a series.

        When the loop ends, the networks hold the weights of the best check, or the last where nothing was checked or
        `check` keeps the last.
        """
        if steps < 1 or size < 1:
            raise HarmonictError(f"steps and batch size must be at least 1, got {steps} and {size}")
        self._epoch_steps = epoch_steps or max(1, steps // 20)
        self._pairs, self._state = pairs, state
        self._patch, self._tissue, self._describe = patch, tissue, _once_a_series(describe)
        number = len(self._loops)
        loop = _new_loop(steps)
        self._loops.append(loop)
        networks = [part for part in state.values() if isinstance(part, nn.Module)]
        for network in networks:
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            network.train()
        self._stopped = self._ends_epoch = False
        self._check_batches = None
        place = None if self._folder is None else self._folder / f"loop-{number}"
        if place is not None:
            self._restore(place, loop)
        self._fabric.barrier()  # nobody writes before all have read
        self._log.open_loop(number, loop["step"])
        if loop["finished"]:
            self._use_best(loop)
            return
        rank_size = max(1, size // self.world)

        def draw(step: int) -> Batch:
            seed = (self.seed, number, step, self.rank)
            return self._draw(pairs, seed, rank_size, augment).to(self.device)

        saved_at = started = time.monotonic()
        before = loop["seconds"]
        with _Bar(steps, self._log) as bar, ThreadPoolExecutor(1) as reader:
            coming = reader.submit(draw, loop["step"])
            while loop["step"] < steps and not self._stopped:
                batch = coming.result()
                if loop["step"] + 1 < steps:
                    coming = reader.submit(draw, loop["step"] + 1)
                torch.manual_seed(
                    int(np.random.SeedSequence([self.seed, number, loop["step"], self.rank, 1]).generate_state(1)[0])
                )
                self._ends_epoch = (loop["step"] + 1) % self._epoch_steps == 0 or loop["step"] + 1 == steps
                yield batch
                loop["step"] += 1
                loop["seconds"] = before + time.monotonic() - started
                bar(loop)
                if time.monotonic() - saved_at >= self._save_every_s and loop["step"] < steps and not self._stopped:
                    self._save(place, loop)
                    saved_at = time.monotonic()
        loop["finished"] = True
        self._save(place, loop)
        self._use_best(loop)

    def step(self, losses: Losses, optimizer: Optimizer, *, gradient_norm: float = math.inf) -> None:
        """One step of an optimizer down the weighted sum of the losses; logs each loss unweighted.

        gradient_norm: a longer gradient is shortened to this.
        Raises HarmonictError at a loss or gradient that is NaN or infinite, before anything is changed by it.
        """
        values = torch.stack([raw.detach().float() for _, raw in losses.values()])
        if self.world > 1:
            values = self._fabric.all_reduce(values, reduce_op="mean")  # type: ignore[assignment]
        for name, value in zip(losses, values.tolist(), strict=True):
            if not np.isfinite(value):
                raise self._broken(f"the loss {name!r} became {value}")
            self._log.add(self.step_number + 1, name, value)
        optimizer.zero_grad(set_to_none=True)
        total_loss(losses).backward()
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.world > 1:
            flat = torch.cat([g.flatten() for g in grads])
            flat = self._fabric.all_reduce(flat, reduce_op="mean")  # type: ignore[assignment]
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))
        norm = float(torch.nn.utils.get_total_norm(grads))
        if not np.isfinite(norm):
            raise self._broken("a gradient became NaN or infinite")
        if norm > gradient_norm:
            for g in grads:
                g.mul_(gradient_norm / norm)
        optimizer.step()

    def mean_of_ranks(self, values: Tensor) -> Tensor:
        """The mean over all processes, on the CPU: what a loop decides by must be the same in each."""
        if self.world > 1:
            values = self._fabric.all_reduce(values, reduce_op="mean")  # type: ignore[assignment]
        return values.cpu()

    def log(self, name: str, value: float) -> None:
        """Put a number beside the losses of this step."""
        self._log.add(self.step_number + 1, name, value)

    @property
    def ends_epoch(self) -> bool:
        """Whether this step is followed by a look at the held-out patients."""
        return self._ends_epoch

    def check(
        self, held_out: SlicePairs | None, output: Callable[[Batch], Tensor], *, keep: Literal["best", "last"] = "best"
    ) -> None:
        """At the end of an epoch: judge the state on patients that it does not learn from, and draw a contact sheet.

        output: a batch -> what the method makes of it, (b, 1, h, w) in HU. The validation CCC is the mean over the
        features of `tile_features` of their CCC over the tiles of fixed patches; it decides which state is kept and
        when to stop. Without held-out patients, or without pairs, there is the sheet alone. keep: "last" for a rate
        that falls to 0 along the loop: it goes to its end, and its last state is the model.
        """
        if not self._ends_epoch:
            return
        loop = self._loops[-1]
        judged = held_out is not None and held_out.paired
        if self._check_batches is None:
            self._check_batches = self._draw_check(held_out if held_out is not None else self._pairs)
        networks = {name: part for name, part in self._state.items() if isinstance(part, nn.Module)}
        training = {name: part.training for name, part in networks.items()}
        for network in networks.values():
            network.eval()
        with torch.inference_mode():
            images = [output(batch.to(self.device)).float().cpu() for batch in self._check_batches]
        for name, network in networks.items():
            network.train(training[name])
        step = loop["step"] + 1
        self._sheet(images, step)
        if not judged:
            return
        score, mae = validation(self._check_batches, images, self._tissue)
        if loop["identity"] is None:
            loop["identity"] = validation(self._check_batches, [b.source for b in self._check_batches], self._tissue)
        score, mae = self._fabric.broadcast((score, mae))
        loop["checks"] += 1
        for name, value in (("validation CCC", score), ("validation MAE HU", mae)):
            self._log.add(step, name, value)
        if keep == "last" or loop["best"] is None or score > loop["best"]["ccc"]:
            weights = {name: _copy(part.state_dict()) for name, part in networks.items()}
            loop["best"] = {"ccc": score, "mae_hu": mae, "step": step, "check": loop["checks"], "weights": weights}
        elif loop["checks"] - loop["best"]["check"] >= self.patience:
            self._stopped = True
        better = loop["best"]["step"] == step
        kept = "kept" if keep == "last" else "best so far"
        if self.is_first:
            words = f"{kept} (source as it is: {loop['identity'][0]:.3f})" if better else "no better"
            end = ", stopping" if self._stopped else ""
            self._say(f"step {step}: {self._log.last()}, {words}{end}")

    def card(self, pairs: SlicePairs) -> dict[str, Any]:
        """What a model card says of data and training, as plain values."""
        loops = []
        for loop in self._loops:
            best = loop["best"] or {}
            row = {"steps": loop["step"], "of": loop["steps"], "seconds": round(loop["seconds"], 1)}
            if best:
                row |= {"kept_step": best["step"], "validation_ccc": best["ccc"], "validation_mae_hu": best["mae_hu"]}
                row |= dict(zip(("source_ccc", "source_mae_hu"), loop["identity"], strict=True))
            loops.append(row)
        sides = {"training": pairs} | ({"validation": pairs.held_out} if pairs.held_out is not None else {})
        return {
            "data": {
                name: {"patients": len(side.subjects), "slice_pairs": len(side), "digest": side.digest}
                for name, side in sides.items()
            },
            "paired": pairs.paired,
            "protocol_pairs": [
                {"source": source, "target": target, "slice_pairs": count}
                for (source, target), count in pairs.protocol_counts().items()
            ],
            "pixel_mm": list(pairs.pixel_mm),
            "trained_on": trained_on(pairs),
            **({"resampled": resampled} if (resampled := pairs.resampled()) else {}),
            "training": loops,
            "seed": self.seed,
            "precision": self.precision,
            "device": f"{self.world} x {self.device.type}",
            "torch": torch.__version__,
            "harmonict": __version__,
        }

    # -- what it does behind the loop --------------------------------------------------------------------------------

    def _draw(self, pairs: SlicePairs, seed: tuple[int, ...], size: int, augment: bool) -> Batch:
        options = {"patch": self._patch, "tissue": self._tissue, "describe": self._describe}
        return pairs.batch(seed, size=size, augment=augment, **options)  # type: ignore[arg-type]

    def _draw_check(self, pairs: SlicePairs) -> list[Batch]:
        """The same for every check of a seed. One image a batch: a check must fit where a training step did."""
        count = CHECK_SLICES if self._patch is None else CHECK_PATCHES
        return [self._draw(pairs, (self.seed, 2**31, n), 1, False) for n in range(count)]

    def _sheet(self, images: list[Tensor], step: int) -> None:
        if self._folder is None or not self.is_first or self._check_batches is None:
            return
        rows = [
            torch.cat([batch.source[0, 0], image[0, 0], batch.target[0, 0]], dim=1).numpy()
            for batch, image in zip(self._check_batches[:SHEET_ROWS], images, strict=False)
        ]
        low, high = SHEET_HU
        gray = np.clip((np.concatenate(rows) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
        path = self._folder / "sheets" / f"loop-{len(self._loops) - 1}-step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(gray))

    def _use_best(self, loop: dict[str, Any]) -> None:
        if loop["best"] is not None:
            for name, weights in loop["best"]["weights"].items():
                self._state[name].load_state_dict(weights)

    def _broken(self, what: str) -> HarmonictError:
        self._log.flush()
        kept = _whole_checkpoints(self._folder / f"loop-{len(self._loops) - 1}") if self._folder is not None else []
        where = f"the last good state is kept: {kept[0]}" if kept else "no state was kept: no checkpoint was due yet"
        return HarmonictError(
            f"training stopped at step {self.step_number + 1}: {what}; {where}; a lower learning rate may help"
        )

    def _save(self, place: Path | None, loop: dict[str, Any]) -> None:
        if place is None or not self.is_first:
            return
        self._log.flush()
        state = {name: part if isinstance(part, dict) else part.state_dict() for name, part in self._state.items()}
        save_checkpoint(place, {"loop": loop, "state": state}, step=loop["step"])

    def _restore(self, place: Path, loop: dict[str, Any]) -> None:
        saved = load_checkpoint(place)
        if saved is None:
            return
        if set(saved["state"]) != set(self._state):
            raise HarmonictError(f"{place}: its checkpoint is of another training; choose another folder")
        for name, part in self._state.items():
            try:
                put_back(part, saved["state"][name])
            except (RuntimeError, ValueError, KeyError) as error:
                words = " ".join(str(error).split())[:200]
                raise HarmonictError(f"{place}: its checkpoint is of another training ({name}: {words})") from None
        steps = loop["steps"]
        loop.update(saved["loop"])
        if loop["steps"] != steps:
            raise HarmonictError(f"{place}: its checkpoint is of a training of {loop['steps']} steps, not of {steps}")
        if self.is_first and not loop["finished"]:
            self._say(f"going on from step {loop['step']} of {steps}")


def _new_loop(steps: int) -> dict[str, Any]:
    return {"step": 0, "steps": steps, "seconds": 0.0, "finished": False, "checks": 0, "best": None, "identity": None}


def _computes_bf16(accelerator: str) -> bool:
    """Whether the processor that will be used has instructions for bf16; without them it is slower than float32."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def _once_a_series(describe: Callable[[Any], About] | None) -> Callable[[Scan], About] | None:
    known: dict[int, About] = {}

    def about(scan: Scan) -> About:
        if id(scan) not in known:
            known[id(scan)] = describe(scan.read())  # type: ignore[misc]
        return known[id(scan)]

    return None if describe is None else about


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def put_back(part: Any, saved: Any) -> None:
    """Restore one piece of a loop's state (network, optimizer, scheduler, dict) in place, to the last bit."""
    if isinstance(part, dict):
        part.clear()
        part.update(saved)
        return
    part.load_state_dict(saved)
    if isinstance(part, Optimizer):  # loading makes them contiguous; sums over other strides round differently
        for parameter, values in part.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


# -- how a training is judged ----------------------------------------------------------------------------------------


def tile_features(hu: np.ndarray) -> np.ndarray:
    """(5,) mean HU, SD, and the logarithm of the SD in three octave bands (differences of Gaussians of 0, 1, 2, 4
    pixels) of a tile (h, w): quick relatives of the first-order and texture features that radiomics measures."""
    image = hu.astype(np.float64)
    levels = [image, *(ndimage.gaussian_filter(image, sigma, mode="reflect") for sigma in (1, 2, 4))]
    bands = [np.log(max((a - b).std(), 1e-3)) for a, b in pairwise(levels)]
    return np.array([image.mean(), image.std(), *bands])


def validation(batches: list[Batch], images: list[Tensor], tissue: SoftTissue | None) -> tuple[float, float]:
    """(mean over the tile features of their CCC over all soft-tissue tiles, mean absolute error in HU there)."""
    tissue = tissue or SoftTissue()
    found, wanted, errors = [], [], []
    for batch, image in zip(batches, images, strict=True):
        target, seen, result = batch.target[0, 0].numpy(), batch.measured[0, 0].cpu().numpy(), image[0, 0].numpy()
        h, w = target.shape
        for y in range(0, h - min(h, TILE) + 1, TILE):
            for x in range(0, w - min(w, TILE) + 1, TILE):
                part = np.s_[y : y + TILE, x : x + TILE]
                if is_soft_tissue(target[part], seen[part], tissue):
                    found.append(tile_features(result[part]))
                    wanted.append(tile_features(target[part]))
                    errors.append(np.abs(result[part] - target[part]).mean())
    if len(found) < 2:
        raise HarmonictError("the held-out patients show too little soft tissue to judge a training by")
    scores = [ccc(a, b) for a, b in zip(np.transpose(wanted), np.transpose(found), strict=True)]
    return float(np.mean(scores)), float(np.mean(errors))


# -- checkpoints: JSON and safetensors, whole or not at all ----------------------------------------------------------


def save_checkpoint(place: Path, state: Mapping[str, Any], *, step: int) -> Path:
    """Write nested dicts, lists, tuples, plain values and tensors below `place`; keeps the last two.

    It is filled under another name, flushed to the disk and renamed, so that a killed run leaves the one before.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    try:
        part = place / ".part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(tensors or {"": torch.zeros(0)}, part / "tensors.safetensors")
        digest = hashlib.sha256((part / "tensors.safetensors").read_bytes()).hexdigest()
        (part / "state.json").write_text(json.dumps({"tensors_sha256": digest, "state": tree}))
        for file in part.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        final = place / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
    except OSError as error:
        raise HarmonictError(f"cannot write the checkpoint {place}: {error.strerror}") from None
    for old in _whole_checkpoints(place)[_CHECKPOINTS_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(place: Path) -> dict[str, Any] | None:
    """What the last whole checkpoint below `place` holds; None where there is none."""
    for path in _whole_checkpoints(place):
        try:
            saved = json.loads((path / "state.json").read_text())
            data = (path / "tensors.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() == saved["tensors_sha256"]:
                return _unpack(saved["state"], load_file(path / "tensors.safetensors"))
        except (OSError, ValueError, KeyError):
            continue  # damaged by a power cut: the one before it counts
    return None


def _whole_checkpoints(place: Path) -> list[Path]:
    return sorted(place.glob("step-*"), reverse=True)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{name}/{n}", tensors) for n, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint")


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in value}
    items = [_unpack(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


def _open_folder(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / "run.json"
    identity = json.loads(json.dumps(identity))
    try:
        if path.exists():
            known = json.loads(path.read_text())
            differ = sorted(k for k in {*known, *identity} if known.get(k) != identity.get(k))
            if differ and any(folder.glob("loop-*/step-*")):
                raise HarmonictError(
                    f"{folder} holds another training (it differs in {', '.join(differ)}); "
                    "choose another --out or delete it"
                )
            if not differ:
                return
            shutil.rmtree(folder)  # it never came as far as its first checkpoint
        if folder.exists() and any(folder.iterdir()):
            raise HarmonictError(f"{folder} is not empty and holds no training; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(".run.json.part")
        part.write_text(json.dumps(identity, indent=2) + "\n")
        os.replace(part, path)
    except (OSError, ValueError) as error:
        raise HarmonictError(f"cannot use {folder} for the training: {error}") from None


# -- log -------------------------------------------------------------------------------------------------------------


class _Log:
    """log.csv (loop, step, name, value) and a TensorBoard file, written at checks and checkpoints."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._loop = folder, 0
        self._rows: list[tuple[int, int, str, float]] = []
        self._latest: dict[str, float] = {}
        self._events: Path | None = None

    def open_loop(self, loop: int, step: int) -> None:
        """What a killed run logged after its last checkpoint is taken out again."""
        self._loop, self._latest = loop, {}
        if self._folder is None or not (self._folder / "log.csv").exists():
            return
        with (self._folder / "log.csv").open(newline="") as stream:
            header, *rows = csv.reader(stream)
        kept = [row for row in rows if len(row) == 4 and (int(row[0]) != loop or int(row[1]) <= step)]
        part = self._folder / ".log.csv.part"
        with part.open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *kept])
        os.replace(part, self._folder / "log.csv")

    def add(self, step: int, name: str, value: float) -> None:
        self._latest[name] = value
        if self._folder is not None:
            self._rows.append((self._loop, step, name, value))

    def last(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self._latest.items())

    def flush(self) -> None:
        if self._folder is None or not self._rows:
            return
        path = self._folder / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as stream:
            if new:
                csv.writer(stream).writerow(("loop", "step", "name", "value"))
            csv.writer(stream).writerows(self._rows)
        if self._events is None:
            self._events = self._folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}"
            self._events.write_bytes(_record(_event(b"\x1a\x0dbrain.Event:2")))
        with self._events.open("ab") as stream:  # type: ignore[assignment]
            for loop, step, name, value in self._rows:
                stream.write(_record(_event(_scalar(f"loop-{loop}/{name}", value), step)))  # type: ignore[arg-type]
        self._rows.clear()


class _Bar:
    """A progress bar on standard error with the losses and the time left; nothing where it is no terminal."""

    def __init__(self, steps: int, log: _Log) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task, self._log = self._bar.add_task("", total=steps), log

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, loop: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=loop["step"], description=self._log.last())


def png(gray: np.ndarray) -> bytes:
    """A PNG file of a uint8 image (h, w)."""
    h, w = gray.shape
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(gray))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


# TensorBoard's file: TFRecords (length, its masked CRC-32C, data, its masked CRC-32C) of protobuf `Event`s
# (1 time double, 2 step int64, 3 file_version string, 5 summary { 1 value { 1 tag string, 2 simple_value float}}).


def _event(body: bytes, step: int = 0) -> bytes:
    return b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + body


def _scalar(tag: str, value: float) -> bytes:
    name = tag.encode()
    one = b"\x0a" + _varint(len(name)) + name + b"\x15" + struct.pack("<f", value)
    summary = b"\x0a" + _varint(len(one)) + one
    return b"\x2a" + _varint(len(summary)) + summary


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 255] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc32c_entry(n: int) -> int:
    for _ in range(8):
        n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    return n


_CRC32C = [_crc32c_entry(n) for n in range(256)]
