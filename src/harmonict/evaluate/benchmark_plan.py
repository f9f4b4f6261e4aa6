"""The plan of a benchmark: a TOML file says which models are trained on which trial and what they are held against.

trial = "kentucky-small"            # a preset of `harmonict simulate`, or a cohort table beside this file
target = "Bl64"                     # protocols as everywhere: Bl64, "Bl64,thickness=1"
sources = ["Br40", "Bl57"]

[[model]]
name = "choe"
method = "choe"
size = "compact"
settings = { steps = 2000 }         # fields of the method's Config

[[model]]
name = "choe, window"
base = "choe"                       # a variant: everything of choe that is not said here
settings = { window = "both" }
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmonict.core import HarmonictError, parse_protocol
from harmonict.evaluate.real_pairs import LUNGMAN_KERNELS, SIEMENS_KERNELS
from harmonict.harmonizer import make_config
from harmonict.methods import get_method
from harmonict.simulate.trial import preset_names

EVALUATE_ON = ("test", "real-pairs")
EACH = ("all", "kernel", "protocol")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,:+()-]{0,47}")


@dataclass(frozen=True)
class ModelPlan:
    """One row of the tables.

    each: one model for "all" sources together, one for each source "kernel", or one for each source "protocol"
    (kernel, strength, dose and thickness). folder: a model that is there already. train: False takes the base's weights
    under other settings. problem: why it cannot be made, in words; its row says so.
    """

    name: str
    method: str
    size: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    each: str = "all"
    folder: Path | None = None
    base: str | None = None
    train: bool = True
    problem: str = ""

    @property
    def place(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^A-Za-z0-9.+-]+", "_", self.name).strip("_")

    def config(self) -> Any:
        """The method's Config. Raises HarmonictError where a setting is wrong."""
        kind = get_method(self.method)
        if self.size is not None and self.size not in kind.sizes:
            raise HarmonictError(
                f"{self.method} has no size {self.size!r}; it has: {', '.join(kind.sizes) or 'none to choose'}"
            )
        return make_config(kind.Config, {**kind.sizes.get(self.size or "", {}), **self.settings})


@dataclass(frozen=True)
class Comparison:
    """A paired t-test between two models of a table of its own."""

    table: str
    a: str
    b: str


@dataclass(frozen=True)
class Plan:
    """What a benchmark does.

    trial: a preset, or the path of a cohort table. rois: boxes for each HU range and test series (real pairs: 24, as
    elsewhere). slices: of each test series that are looked at. tumour: the test series of the one-tumour table, e.g.
    "Br40 1 mm 6.5 mGy" with the patient's name before it; the first with a nodule if it is not said.
    """

    trial: str
    target: str
    sources: tuple[str, ...]
    models: tuple[ModelPlan, ...]
    seed: int = 0
    evaluate_on: tuple[str, ...] = ("test",)
    rois: int = 16
    slices: int = 6
    tumour: str | None = None
    comparisons: tuple[Comparison, ...] = ()

    def model(self, name: str) -> ModelPlan:
        """The model of a name."""
        return next(model for model in self.models if model.name == name)


def load_plan(path: str | Path) -> Plan:
    """Read and check a plan. Raises HarmonictError in one line, before anything is computed."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HarmonictError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HarmonictError(f"{path} is not TOML: {error}") from None
    tables = values.pop("model", [])
    comparisons = values.pop("compare", [])
    known = {f.name for f in dataclasses.fields(Plan)} - {"models", "comparisons"}
    _check_keys(values, known, str(path))
    for key in ("trial", "target", "sources"):
        if key not in values:
            raise HarmonictError(f"{path}: {key} is missing")
    trial = str(values["trial"])
    if trial not in preset_names():
        if not trial.endswith((".csv", ".parquet")):
            raise HarmonictError(
                f"{path}: trial must be a cohort table (.csv) or one of {', '.join(preset_names())}; got {trial!r}"
            )
        values["trial"] = str((path.parent / trial).resolve())
    for name in ("sources", "evaluate_on"):
        if name in values:
            values[name] = tuple(_strings(values[name], f"{path}: {name}"))
    for protocol in (values["target"], *values["sources"]):
        parse_protocol(protocol)
    models = _models(tables, path)
    plan = Plan(
        **values,
        models=models,
        comparisons=tuple(_comparison(c, {m.name for m in models}, path) for c in comparisons),
    )
    _check(plan, path)
    return plan


def _models(tables: list[dict[str, Any]], path: Path) -> tuple[ModelPlan, ...]:
    if not tables:
        raise HarmonictError(f"{path}: no [[model]] to benchmark")
    found: dict[str, ModelPlan] = {}
    raw: dict[str, dict[str, Any]] = {}
    for table in tables:
        name = table.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise HarmonictError(
                f"{path}: a model needs a name of letters, digits, blanks and . , : + ( ) -; got {name!r}"
            )
        where = f"{path}: model {name!r}"
        _check_keys(table, {"name", "method", "size", "settings", "each", "model", "base", "train"}, where)
        if any(name == other or _place(name) == _place(other) for other in found):
            raise HarmonictError(f"{where}: there are two of this name")
        whole = dict(table)
        base = table.get("base")
        if base is not None:
            if base not in raw:
                raise HarmonictError(f"{where}: its base {base!r} must stand before it")
            inherited = {k: v for k, v in raw[base].items() if k not in ("name", "base", "model", "train")}
            whole = {**inherited, **table}
            whole["settings"] = {**inherited.get("settings", {}), **table.get("settings", {})}
        raw[name] = whole
        found[name] = _model(whole, where, path)
    return tuple(found.values())


def _model(table: dict[str, Any], where: str, path: Path) -> ModelPlan:
    method = table.get("method")
    if not isinstance(method, str):
        raise HarmonictError(f"{where}: method is missing")
    each, train, base = table.get("each", "all"), table.get("train", True), table.get("base")
    if each not in EACH:
        raise HarmonictError(f"{where}: each must be one of {', '.join(EACH)}; got {each!r}")
    if not isinstance(train, bool) or (not train and base is None):
        raise HarmonictError(f"{where}: train = false needs a base whose weights it takes")
    folder = table.get("model")
    if folder is not None:
        folder = (path.parent / folder).resolve()
    plan = ModelPlan(table["name"], method, table.get("size"), table.get("settings", {}), each, folder, base, train)
    try:
        plan.config()
    except HarmonictError as error:
        return dataclasses.replace(plan, problem=str(error))
    return plan


def _comparison(table: dict[str, Any], names: set[str], path: Path) -> Comparison:
    _check_keys(table, {"table", "a", "b"}, f"{path}: compare")
    try:
        comparison = Comparison(**table)
    except TypeError:
        raise HarmonictError(f"{path}: compare needs table, a and b") from None
    for name in (comparison.a, comparison.b):
        if name not in names:
            raise HarmonictError(f"{path}: compare names {name!r}, which is no model of the plan")
    return comparison


def _check(plan: Plan, path: Path) -> None:
    for name in plan.evaluate_on:
        if name not in EVALUATE_ON:
            raise HarmonictError(f"{path}: evaluate_on takes {', '.join(EVALUATE_ON)}; got {name!r}")
    for name in ("seed", "rois", "slices"):
        value = getattr(plan, name)
        if not isinstance(value, int) or value < (0 if name == "seed" else 1):
            raise HarmonictError(
                f"{path}: {name} must be a whole number from {0 if name == 'seed' else 1} on, got {value!r}"
            )
    if "real-pairs" in plan.evaluate_on:
        kernels = [parse_protocol(p).kernel for p in (plan.sources[0], plan.target)]
        if len(plan.sources) != 1 or not any(set(kernels) <= set(k) for k in (SIEMENS_KERNELS, LUNGMAN_KERNELS)):
            raise HarmonictError(f"{path}: real pairs need one source and a target kernel of one real scanner")


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise HarmonictError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise HarmonictError(f"{where} must be a list of strings, got {value!r}")
    return value


def _place(name: str) -> str:
    return ModelPlan(name, "").place
