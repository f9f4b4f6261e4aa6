"""Harmonizer: what every method inherits. HU in, HU out, save, load, and the promises that hold for all of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from harmonict import __version__
from harmonict.core import HarmonictError, ScanProtocol, Series
from harmonict.core.padding import clip_floor, fill_padding
from harmonict.core.resample import resample_plane, resample_series
from harmonict.data import About, SlicePairs
from harmonict.physics.kernel import Kernel
from harmonict.tiles import MemoryWatch, in_tiles, is_out_of_memory, smaller_tile

CONFIG_FILE, WEIGHTS_FILE = "config.json", "weights.safetensors"
CARD_FILE, CARD_PAGE = "card.json", "card.md"
LEARNED_IN_PIXELS = "Learned in pixels: another pixel size than that of the training is another task."  # for `limits`
PIXEL_TOLERANCE = 0.05  # relative: a series within it counts as one of the pixel size that was trained


class Harmonizer(nn.Module):
    """A method that turns a series into one that looks as if made with the target protocol.

    A method writes a frozen dataclass `Config`, `fit`, `translate` and, where it needs one, `describe` and `like`.
    Learned state is parameters and buffers only. `translate` treats every slice on its own: what else is in the batch
    changes nothing.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    paired: ClassVar[str] = "paired"  # what `fit` learns from: "paired", "unpaired" or "none"
    Config: ClassVar[Any]
    uses_source_mtf: ClassVar[bool] = False  # whether `describe` measures it or takes the user's
    changes: ClassVar[tuple[str, ...]] = ("kernel",)  # the fields of ScanProtocol that it translates
    window_hu: ClassVar[tuple[float, float] | None] = None  # outside of it the source's HU stay
    tile: ClassVar[int | None] = None  # the largest side in pixels that its network takes; larger slices go in tiles
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # name -> the settings that make it
    limits: ClassVar[tuple[str, ...]] = ()  # sentences for the model card
    adjustable: ClassVar[tuple[str, ...]] = ()  # fields of Config that what was learned does not depend on

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__()
        self.config = self.Config() if config is None else config
        self.target = target or ScanProtocol()
        self.card: dict[str, Any] = {}  # what it was trained on and how well that went; `Run.card` fills it

    # -- what a method writes ------------------------------------------------------------------------------------

    def fit(self, pairs: SlicePairs, run: Any = None) -> Self:
        """Learn from pairs of slices; `run` is the loop's servant where there is a loop. Returns itself."""
        raise NotImplementedError

    @classmethod
    def like(cls, examples: Sequence[Series], config: Any = None) -> Self:
        """A model from example series of the target protocol alone, where the method can do that."""
        raise HarmonictError(
            f"{cls.name} must be fitted first: `harmonict fit {cls.name} --out MODEL ...`, then --model MODEL"
        )

    def describe(self, series: Series, *, source_mtf: Kernel | None = None) -> About:
        """What `translate` must know about the source; `source_mtf`: the user's own curve instead of a measurement.

        Raises HarmonictError where it cannot be found out, or where a method has no use for a source MTF.
        """
        if source_mtf is not None:
            raise HarmonictError(f"{self.name} does not use the source's MTF: leave --source-mtf out")
        return About(series.pixel_mm, series.protocol, outside=self.outside(series))

    def outside(self, series: Series) -> tuple[str, ...]:
        """Why the series is outside what the model was trained on, a sentence each; `harmonize --strict` refuses it.

        Here: other pixels than those of the training.
        """
        trained = self.trained_pixel_mm
        if trained is None or np.allclose(series.pixel_mm, trained, rtol=PIXEL_TOLERANCE):
            return ()
        return (f"trained on pixels of {trained[1]:.3g} mm, these are of {series.pixel_mm[1]:.3g} mm",)

    @property
    def trained_side(self) -> str:
        """Which images of the training are like those to translate: "target" in a model that was turned round."""
        return "source"

    @property
    def trained_pixel_mm(self) -> tuple[float, float] | None:
        """In-plane spacing (y, x) that a network has learned; None where none was, or where it does not matter."""
        return None

    def aim(self, wanted: ScanProtocol) -> None:
        """Make `wanted` the target. Raises HarmonictError where the model cannot go there: most have one target."""
        self._check_target(wanted)

    def adjust(self, settings: Mapping[str, Any]) -> None:
        """Change `adjustable` settings of a trained model. Raises HarmonictError at any other."""
        for key in settings:
            if key not in self.adjustable:
                free = f"free: {', '.join(self.adjustable)}" if self.adjustable else "none is free"
                raise HarmonictError(f"a saved {self.name} model keeps the {key} that it was fitted with; {free}")
        self.config = make_config(self.Config, {**dataclasses.asdict(self.config), **settings})

    def spread(self, series: Series, target: ScanProtocol | None = None, *, about: About | None = None) -> Series:
        """The spread of several results in HU (standard deviation per voxel), of a method that draws samples."""
        raise HarmonictError(f"{self.name} gives one result and draws no samples: leave --uncertainty out")

    def translate(self, x: Tensor, target: ScanProtocol, about: About) -> Tensor:
        """Slices (b, 1, h, w) in HU, float32 -> the same slices in HU as the target protocol would show them."""
        raise NotImplementedError

    # -- what it inherits ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def harmonize(
        self,
        series: Series,
        target: ScanProtocol | None = None,
        *,
        about: About | None = None,
        slices_at_once: int = 8,
        qc: dict[str, Any] | None = None,
    ) -> Series:
        """The series as the target protocol (default: the one that the model was fitted for) would show it.

        Padding is filled before and restored exactly after; outside `window_hu` the source's HU stay; a file that clips
        air (at -1024, say) clips it again at the same value, as its scanner would. Needs one more copy of the HU and a
        few slices. slices_at_once: at most so many; fewer where memory is short. Where it does not hold one slice, a
        network gets tiles, and the notes say so. qc: a dict to fill with plain values that say what was done, which
        `harmonize --qc` writes; its "notes" are lines for the user. A method that overrides this takes the same
        arguments and puts its own values under its own name.
        """
        target = target or self.target
        about = about or self.describe(series)
        out = np.empty_like(series.hu)
        device = self._to_device()
        floor = clip_floor(series.hu, series.padding)
        notes: list[str] = []
        start, at_once, most, tile = 0, 1, slices_at_once, self.tile
        while start < len(out):  # the first slice goes alone, to see how much memory one needs
            part = slice(start, start + at_once)
            source = series.hu[part]
            padding = None if series.padding is None else series.padding[part]
            filled = source if padding is None else fill_padding(source, padding)
            try:
                with MemoryWatch(device) as memory:
                    result = self._translated(filled, part, tile, target, about, device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if at_once > 1:
                    most = at_once = at_once // 2
                    continue
                tile = smaller_tile(tile, series.hu.shape[1:]) if any(True for _ in self.parameters()) else None
                if tile is None:
                    words = f"not enough memory on {device.type} for {self.name} of one slice"
                    raise HarmonictError(f"{series.name}: {words}; end other programs or use fewer --jobs") from None
                notes = [f"not enough memory for whole slices: translated in blended tiles of {tile} pixels"]
                start = 0  # a series is of one make
                continue
            if not np.isfinite(result).all():
                raise HarmonictError(f"{series.name}: {self.name} gave NaN or infinite HU from slice {start} on")
            keep = padding
            if self.window_hu is not None:
                outside = (source < self.window_hu[0]) | (source > self.window_hu[1])
                keep = outside if keep is None else keep | outside
            np.maximum(result, floor, out=out[part])
            if keep is not None:
                np.copyto(out[part], source, where=keep)
            if start == 0:
                at_once = memory.slices(most)
            start = part.stop
        if notes and qc is not None:
            qc.setdefault("notes", []).extend(notes)
        changed = {name: getattr(target, name) for name in self.changes}
        # an unknown target kernel makes the result's unknown; another open field is left as the source has it
        changed = {name: value for name, value in changed.items() if name == "kernel" or value is not None}
        return series.with_hu(out, protocol=series.protocol.with_(**changed))

    def _translated(
        self, hu: np.ndarray, part: slice, tile: int | None, target: ScanProtocol, about: About, device: torch.device
    ) -> np.ndarray:
        """The slices `part` of a series, whose filled HU (n, h, w) are given."""
        x = torch.from_numpy(np.array(hu[:, None])).to(device)
        if tile is None:
            result = self.translate(x, target, about)
        else:
            result = in_tiles(x, tile, lambda part: self.translate(part, target, about))
        return result[:, 0].cpu().numpy()

    def _check_target(self, wanted: ScanProtocol) -> None:
        if not self.target.matches(wanted):
            raise HarmonictError(f"this model was fitted for {self.target.label()}, not for {wanted.label()}")

    @property
    def digest(self) -> str:
        """SHA-256 of method, configuration, target and learned state: same digest, same HU."""
        return hashlib.sha256(json.dumps(self._config_json(), sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `config.json`, `weights.safetensors` and the model card into `folder`, whole or not at all."""
        folder = Path(folder)
        check_model_place(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            try:
                (temporary / WEIGHTS_FILE).write_bytes(self._weights())
                (temporary / CONFIG_FILE).write_text(json.dumps(self._config_json(), indent=2) + "\n")
                (temporary / CARD_FILE).write_text(json.dumps(self.card, indent=2) + "\n")
                (temporary / CARD_PAGE).write_text(self._card_page())
                os.chmod(temporary, 0o755)
                if folder.exists():
                    shutil.rmtree(folder)
                os.replace(temporary, folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        except OSError as error:
            raise HarmonictError(f"cannot write the model {folder}: {error.strerror}") from None

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote. Raises HarmonictError where a file is missing or its SHA-256 does not match."""
        saved = read_config(folder)
        if saved["method"] != cls.name:
            raise HarmonictError(f"{folder} holds a model of {saved['method']}, not of {cls.name}")
        try:
            weights = (Path(folder) / WEIGHTS_FILE).read_bytes()
            if hashlib.sha256(weights).hexdigest() != saved["weights_sha256"]:
                raise HarmonictError(f"{folder}: {WEIGHTS_FILE} does not match its SHA-256; copy the model again")
            model = cls(make_config(cls.Config, saved["config"]), target=ScanProtocol(**saved["target"]))
            state = load_tensors(weights)
            card = Path(folder) / CARD_FILE
            model.card = json.loads(card.read_text()) if card.exists() else {}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise HarmonictError(f"{folder} is not a whole model: {' '.join(str(error).split())}") from None
        for key, value in state.items():  # buffers that `fit` creates have no shape before it
            owner, _, leaf = key.rpartition(".")
            module = model.get_submodule(owner)
            if leaf in module._buffers:
                module.register_buffer(leaf, value)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            words = " ".join(str(error).split())
            raise HarmonictError(f"{folder}: weights and config.json do not fit: {words}") from None
        return model.eval()

    def _to_device(self) -> torch.device:
        """A network computes on the GPU where there is one, and always in one memory format: the order of its sums, and
        with it the last bit, depends on that. What has no network stays on the CPU."""
        parameter = next(self.parameters(), None)
        if parameter is None:
            return torch.device("cpu")
        device = torch.device("cuda") if torch.cuda.is_available() else parameter.device
        self.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return device

    def _card_page(self) -> str:
        """The model card for people: data, protocols, training, numbers, limits."""
        paper = f" ({self.paper})" if self.paper else ""
        lines = [f"# {self.name}{paper}", "", f"Translates to: {self.target.label()}.", ""]
        settings = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(self.config).items())
        lines += [f"Settings: {settings}.", ""] if settings else []
        for side, data in self.card.get("data", {}).items():
            lines.append(f"- {side}: {data['slice_pairs']} slices of {data['patients']} patients")
        for pair in self.card.get("protocol_pairs", []):
            lines.append(f"- {pair['source']} -> {pair['target']}: {pair['slice_pairs']} slices")
        for part in self.card.get("resampled", []):
            lines.append(
                f"- {part['series']} series resampled in the plane, from pixels of {part['from_mm']:.3g} mm to "
                f"{part['to_mm']:.3g} mm"
            )
        for loop in self.card.get("training", []):
            lines.append(f"- trained for {loop['steps']} of {loop['of']} steps, {loop['seconds']:.0f} s")
            if "validation_ccc" in loop:
                lines.append(
                    f"- on the validation patients: CCC {loop['validation_ccc']:.3f} (source as it is "
                    f"{loop['source_ccc']:.3f}), mean absolute error {loop['validation_mae_hu']:.1f} HU "
                    f"({loop['source_mae_hu']:.1f}), kept from step {loop['kept_step']}"
                )
        if not self.card:
            lines.append("No training.")
        elif "validation" not in self.card.get("data", {}):
            lines.append("- no patients were held out: how well it does on others is not known")
        lines += ["", "Limits:", "", *(f"- {text}" for text in self.limits)] if self.limits else []
        lines += ["", "Not for diagnosis. Judge it on your own data: `harmonict evaluate`, `harmonict reproduce`."]
        return "\n".join(lines) + "\n"

    def _weights(self) -> bytes:
        return save_tensors({k: v.detach().cpu().contiguous() for k, v in sorted(self.state_dict().items())})

    def _config_json(self) -> dict[str, Any]:
        return {
            "format": "harmonict-model-1",
            "method": self.name,
            "config": dataclasses.asdict(self.config),
            "target": {k: v for k, v in self.target.as_dict().items() if v is not None},
            "weights_sha256": hashlib.sha256(self._weights()).hexdigest(),
            "harmonict": __version__,
        }


def in_trained_pixels(model: Harmonizer, series: Series) -> Series:
    """The series in pixels of the size that the model was trained on; itself where it has them, or where that does not
    matter to the model."""
    pixel_mm = model.trained_pixel_mm
    if pixel_mm is None or np.allclose(series.pixel_mm, pixel_mm, rtol=PIXEL_TOLERANCE):
        return series
    return resample_series(series, pixel_mm)


def on_own_grid(model: Harmonizer, series: Series, work: Series, result: Series) -> Series:
    """What `harmonize` made of `work`, the series in the trained pixels, on the series' own grid.

    What the model changed is resampled back and added to the series, so that detail finer than the trained pixels
    stays. Padding, clipped air and HU outside the model's window are the series' own, as after `harmonize`.
    """
    hu, shape = np.empty_like(series.hu), series.hu.shape[1:]
    floor = clip_floor(series.hu, series.padding)
    for z, source in enumerate(series.hu):
        change = resample_plane(result.hu[z] - work.hu[z], work.pixel_mm, series.pixel_mm, shape)  # type: ignore[arg-type]
        np.maximum(source + change, floor, out=hu[z])
        keep = np.zeros(shape, bool) if series.padding is None else series.padding[z]
        if model.window_hu is not None:
            keep = keep | (source < model.window_hu[0]) | (source > model.window_hu[1])
        np.copyto(hu[z], source, where=keep)
    return series.with_hu(hu, protocol=result.protocol)


class NetworkHarmonizer(Harmonizer):
    """A method whose network is trained: it knows one target, and images of one pixel size."""

    pixel_mm: Tensor  # (2,) pixels (y, x) that it was trained on; empty before it was

    def __init__(self, config: Any = None, *, target: ScanProtocol | None = None) -> None:
        super().__init__(config, target=target)
        self.register_buffer("pixel_mm", torch.zeros(0))

    @property
    def trained_pixel_mm(self) -> tuple[float, float] | None:
        return (float(self.pixel_mm[0]), float(self.pixel_mm[1])) if len(self.pixel_mm) else None

    def check_fitted(self, target: ScanProtocol | None = None) -> None:
        """Raise HarmonictError where it has no weights yet, or none for `target`."""
        if not len(self.pixel_mm):
            raise HarmonictError(
                f"{self.name} has no weights yet: `harmonict fit {self.name} --out MODEL ...`, then --model MODEL"
            )
        if target is not None:
            self._check_target(target)


def check_model_place(folder: str | Path) -> None:
    """Raise HarmonictError where `folder` holds anything but a model, which alone may be replaced by another."""
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG_FILE).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise HarmonictError(f"{folder} is there and is no model; choose another --out")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a saved model. Raises HarmonictError where there is none or it is of another kind."""
    path = Path(folder) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):
        raise HarmonictError(f"{folder} is no model: {CONFIG_FILE} is missing or not JSON") from None
    if not isinstance(saved, dict) or saved.get("format") != "harmonict-model-1":
        raise HarmonictError(f"{path} is not the configuration of a harmonict model")
    return saved


def make_config(kind: Any, values: Mapping[str, Any]) -> Any:
    """A method's Config from KEY -> VALUE; strings are read as the field's type.

    Raises HarmonictError on an unknown key (the known ones are listed) or a value of the wrong kind.
    """
    types = typing.get_type_hints(kind)
    read = {}
    for key, value in values.items():
        if key not in types:
            raise HarmonictError(
                f"unknown setting {key!r}; known: {', '.join(f.name for f in dataclasses.fields(kind))}"
            )
        read[key] = _as_type(key, value, types[key])
    try:
        return kind(**read)
    except ValueError as error:
        raise HarmonictError(str(error)) from None


def _as_type(key: str, value: Any, wanted: Any) -> Any:
    options = [t for t in typing.get_args(wanted) if t is not type(None)]
    if typing.get_origin(wanted) is typing.Literal:
        if value not in options:
            raise HarmonictError(f"{key} must be one of {', '.join(map(str, options))}; got {value!r}")
        return value
    if typing.get_origin(wanted) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(_as_type(key, part, options[0]) for part in parts)
    if type(None) in typing.get_args(wanted):
        return None if value in (None, "none", "None") else _as_type(key, value, options[0])
    try:
        if wanted is bool and isinstance(value, str):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if wanted is int and float(value) != int(float(value)):
            raise ValueError
        return int(float(value)) if wanted is int else wanted(value)
    except (ValueError, TypeError, KeyError):
        raise HarmonictError(f"{key} must be {wanted.__name__}, got {value!r}") from None
