"""ScanProtocol: the one description of how a CT image was made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from harmonict.core.errors import HarmonictError


@dataclass(frozen=True)
class ScanProtocol:
    """How an image was (or shall be) made. `None` means "not known" in a source and "leave as it is" in a target.

    iterative_strength: 0 is filtered back-projection; 1-5 the vendor's strength. Lengths mm, exposure mAs, dose mGy.
    """

    manufacturer: str | None = None
    model: str | None = None
    kernel: str | None = None
    iterative_strength: float | None = None
    slice_thickness_mm: float | None = None
    kvp: float | None = None
    exposure_mas: float | None = None
    ctdivol_mgy: float | None = None
    fov_mm: float | None = None

    def with_(self, **changes: object) -> ScanProtocol:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, object]:
        """Field name -> value, in the order of the cohort table's columns."""
        return asdict(self)

    def matches(self, wanted: ScanProtocol) -> bool:
        """True where every field that `wanted` states has that value here (names without case, numbers to 1 %)."""
        return all(_equal(getattr(self, f.name), getattr(wanted, f.name)) for f in fields(self))

    def label(self) -> str:
        """A short name for tables: "Bl64 1 mm 6.5 mGy"."""
        parts = [self.kernel or "?"]
        if self.iterative_strength:
            parts[0] += f"({self.iterative_strength:g})"
        if self.slice_thickness_mm is not None:
            parts.append(f"{self.slice_thickness_mm:g} mm")
        if self.ctdivol_mgy is not None:
            parts.append(f"{self.ctdivol_mgy:g} mGy")
        return " ".join(parts)


PROTOCOL_COLUMNS = tuple(f.name for f in fields(ScanProtocol))

_KEYS = {
    "kernel": "kernel",
    "manufacturer": "manufacturer",
    "vendor": "manufacturer",
    "model": "model",
    "strength": "iterative_strength",
    "thickness": "slice_thickness_mm",
    "kvp": "kvp",
    "mas": "exposure_mas",
    "dose": "ctdivol_mgy",
    "fov": "fov_mm",
} | {name: name for name in PROTOCOL_COLUMNS}


def parse_protocol(text: str) -> ScanProtocol:
    """ "Bl64" or "Bl64,thickness=1,strength=0" -> the fields of a protocol that are to change.

    Keys: kernel, vendor, model, strength, thickness (mm), kvp, mas, dose (mGy), fov (mm), or the full field names.
    Raises HarmonictError on an unknown key or a value that is not a number.
    """
    values: dict[str, object] = {}
    for n, part in enumerate(p.strip() for p in text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            if n != 0 or not part:
                raise HarmonictError(f"protocol {text!r}: expected KEY=VALUE, got {part!r}")
            key, value = "kernel", part
        field = _KEYS.get(key.strip().lower())
        if field is None:
            raise HarmonictError(f"protocol {text!r}: unknown key {key!r}; known: {', '.join(sorted(_KEYS))}")
        if field in values:
            raise HarmonictError(f"protocol {text!r}: {key!r} is given twice")
        if field in ("manufacturer", "model", "kernel"):
            values[field] = value.strip()
        else:
            number = re.fullmatch(r"\s*([-+0-9.eE]+)\s*(mm|mGy|mAs|kV|kVp)?\s*", value)
            try:
                values[field] = float(number[1] if number else value)
            except ValueError:
                raise HarmonictError(f"protocol {text!r}: {key} must be a number, got {value!r}") from None
    return ScanProtocol(**values)  # type: ignore[arg-type]


def choose_protocol(wanted: ScanProtocol, present: Sequence[ScanProtocol]) -> ScanProtocol:
    """The one protocol in `present` that `wanted` names.

    Raises HarmonictError where none matches (the known kernels are listed) or where several do (the candidates are).
    """
    found = list(dict.fromkeys(p for p in present if p.matches(wanted)))
    if not found:
        known = sorted({p.label() for p in present})
        raise HarmonictError(f"no series has the protocol {wanted.label()}; there are: {', '.join(known) or 'none'}")
    if len(found) > 1:
        names = sorted({p.label() for p in found})
        raise HarmonictError(f"protocol {wanted.label()} is ambiguous; say more, candidates: {', '.join(names)}")
    return found[0]


def _equal(have: object, want: object) -> bool:
    if want is None:
        return True
    if have is None:
        return False
    if isinstance(want, str):
        return str(have).casefold() == want.casefold()
    return abs(float(have) - float(want)) <= 0.01 * abs(float(want)) + 1e-9  # type: ignore[arg-type]
