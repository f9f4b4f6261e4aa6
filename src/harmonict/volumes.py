"""NIfTI, NRRD and MetaImage files in and out: the only home of SimpleITK."""

from __future__ import annotations

import gzip
import math
import os
import shutil
import struct
import tempfile
import zlib
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from harmonict.core import Geometry, HarmonictError, Series
from harmonict.core.padding import find_padding

FORMATS = {".nii": "nifti", ".nii.gz": "nifti", ".nrrd": "nrrd", ".nhdr": "nrrd", ".mha": "mha", ".mhd": "mha"}
HIGHEST_HU = 1e5  # metal in files with an extended range reaches 30,000

sitk.ProcessObject.SetGlobalWarningDisplay(False)


@dataclass(frozen=True)
class VolumeSource:
    """What a volume file said: its pixel type (numpy), whether it is 2-D, and its grid as written."""

    path: Path
    dtype: str
    dimension: int
    geometry: Geometry


def volume_format(path: Path) -> str | None:
    """ "nifti", "nrrd" or "mha" by the file's name, None for anything else."""
    name = Path(path).name.lower()
    return next((kind for ending, kind in FORMATS.items() if name.endswith(ending)), None)


def volume_stem(path: Path) -> str:
    """The file's name without its ending, ".nii.gz" whole."""
    name = Path(path).name
    ending = next((e for e in sorted(FORMATS, key=len, reverse=True) if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)] if ending else name


def volume_grid(path: Path) -> tuple[tuple[int, ...], Geometry, str]:
    """Shape (z, y, x), geometry and pixel type (as numpy names it) from the header alone.

    Raises HarmonictError as `read_volume` does.
    """
    reader = _open(Path(path))
    size = [*reader.GetSize(), 1][:3]
    geometry = _geometry(reader.GetOrigin(), reader.GetSpacing(), reader.GetDirection(), Path(path))
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())  # "16-bit signed integer"
    bits = kind.split("-")[0]
    return (
        tuple(size[::-1]),
        geometry,
        f"{'u' if 'unsigned' in kind else ''}{'int' if 'integer' in kind else 'float'}{bits}",
    )


def read_volume(path: str | Path, *, spacing_mm: float | tuple[float, float] | None = None) -> Series:
    """Read .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd with values in HU -> Series; a 2-D image becomes z = 1.

    spacing_mm: in-plane spacing, one number or (y, x), which overrides a header that lies.
    Raises HarmonictError for a file that is not there or damaged, for NaN and infinity, for colour, vector and 4-D
    images, for values that are no HU, and where the grid is not orthogonal.
    """
    path = Path(path)
    reader = _open(path)
    image = _execute(reader, path)
    array = sitk.GetArrayViewFromImage(image)
    dtype, dimension = array.dtype.name, image.GetDimension()
    hu = np.array(array, np.float32).reshape((1, *array.shape) if dimension == 2 else array.shape)
    low, high = float(hu.min()), float(hu.max())
    if HIGHEST_HU < max(-low, high) < np.inf:  # NaN and infinity are Series' to refuse
        raise HarmonictError(f"{path}: values from {low:g} to {high:g} are no HU, which lie within {HIGHEST_HU:g} of 0")
    written = _geometry(image.GetOrigin(), image.GetSpacing(), image.GetDirection(), path)
    return Series(
        hu=hu,
        geometry=_override(written, spacing_mm),
        padding=find_padding(hu),
        patient=volume_stem(path),
        name=path.name,
        source=VolumeSource(path=path, dtype=dtype, dimension=dimension, geometry=written),
    )


def write_volume(series: Series, path: str | Path) -> None:
    """Write HU as NIfTI, NRRD or MetaImage by the ending of `path`, whole or not at all.

    The pixel type is the source file's where every rounded value fits it; else int16 where they fit that, else float32.
    A source of floats stays float32. A series that was 2-D in its file is 2-D again. The source is never written to.
    """
    path = Path(path)
    if volume_format(path) is None:
        raise HarmonictError(f"{path}: expected a name ending in {', '.join(FORMATS)}")
    source = series.source if isinstance(series.source, VolumeSource) else None
    if source is not None and path.exists() and path.samefile(source.path):
        raise HarmonictError(f"{path} is the source file; choose another name")
    image = sitk.GetImageFromArray(_typed(series.hu, source.dtype if source else "int16"))
    rows = np.asarray(series.geometry.direction)
    image.SetOrigin(series.geometry.origin_mm)
    image.SetSpacing(series.geometry.spacing_mm[::-1])
    image.SetDirection(rows[::-1].T.ravel().tolist())
    if source is not None and source.dimension == 2 and series.hu.shape[0] == 1:
        image = image[:, :, 0]
    _write(image, path)


def write_mask(mask: np.ndarray, geometry: Geometry, path: str | Path) -> None:
    """Write a bool mask (z, y, x) as 0 and 1 (uint8), whole or not at all."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(mask, np.uint8))
    image.SetOrigin(geometry.origin_mm)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetDirection(np.asarray(geometry.direction)[::-1].T.ravel().tolist())
    _write(image, Path(path))


def read_mask(path: str | Path, *, label: int | None = None, like: Series) -> np.ndarray:
    """Read a label image on the grid of `like` -> bool (z, y, x), True where it holds `label`.

    label: may be left out where the file holds one label besides 0.
    Raises HarmonictError where the grids differ (size, spacing, place) or the label is not there; it lists the labels.
    """
    path = Path(path)
    image = _execute(_open(path), path)
    array = sitk.GetArrayViewFromImage(image)
    labels = array.reshape((1, *array.shape) if image.GetDimension() == 2 else array.shape)
    geometry = _geometry(image.GetOrigin(), image.GetSpacing(), image.GetDirection(), path)
    if labels.shape != like.hu.shape:
        raise HarmonictError(f"{path}: the mask is {labels.shape} (z, y, x), the image {like.name} {like.hu.shape}")
    grids = [like.geometry, *([like.source.geometry] if isinstance(like.source, VolumeSource) else [])]
    if not any(geometry.same_grid(grid, tolerance_mm=0.05) for grid in grids):
        raise HarmonictError(
            f"{path}: the mask lies on another grid than {like.name}: spacing {_mm(geometry.spacing_mm)} and "
            f"{_mm(like.geometry.spacing_mm)}, origin {_mm(geometry.origin_mm)} and {_mm(like.geometry.origin_mm)}; "
            "resample the mask to the image"
        )
    present = [v for v in np.unique(labels).tolist() if v != 0]
    known = ", ".join(f"{v:g}" for v in present[:20]) or "none"
    if label is None:
        if len(present) != 1:
            raise HarmonictError(f"{path}: expected one label, found {known}; say which (--label)")
        label = present[0]
    elif label not in present:
        raise HarmonictError(f"{path}: no label {label}; there are: {known}")
    return np.asarray(labels == label)


def _open(path: Path) -> sitk.ImageFileReader:
    if not path.is_file():
        raise HarmonictError(f"no image file at {path}")
    if volume_format(path) is None:
        raise HarmonictError(f"{path}: expected a name ending in {', '.join(FORMATS)}")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise HarmonictError(f"{path}: damaged or not a {volume_format(path)} image ({_reason(error)})") from None
    if reader.GetNumberOfComponents() != 1:
        raise HarmonictError(f"{path}: {reader.GetNumberOfComponents()} values a voxel; expected one, in HU")
    if reader.GetDimension() not in (2, 3):
        raise HarmonictError(f"{path}: a {reader.GetDimension()}-D image; expected one volume or one slice")
    return reader


def _execute(reader: sitk.ImageFileReader, path: Path) -> sitk.Image:
    if volume_format(path) == "nifti":
        _check_nifti(path, int(np.prod(reader.GetSize())))
    try:
        image = reader.Execute()
    except (RuntimeError, MemoryError) as error:
        raise HarmonictError(f"{path}: damaged image file ({_reason(error)})") from None
    if "complex" in image.GetPixelIDTypeAsString() or 0 in image.GetSize():
        raise HarmonictError(f"{path}: {image.GetPixelIDTypeAsString()} voxels; expected whole or real numbers in HU")
    return image


def _check_nifti(path: Path, voxels: int) -> None:
    """ITK fills in zeros for what is cut off a NIfTI file, and for NaN and infinity: both are looked for here."""
    packed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            head = file.read(352)
            order = "<" if int.from_bytes(head[:4], "little") in (348, 540) else ">"
            nifti2 = head[:4] == struct.pack(f"{order}i", 540)
            kind, bits = struct.unpack_from(f"{order}2h", head, 12 if nifti2 else 70)
            (start,) = struct.unpack_from(f"{order}q" if nifti2 else f"{order}f", head, 168 if nifti2 else 108)
            real = {16: f"{order}f4", 64: f"{order}f8"}.get(kind)
            needed, length = 352 + voxels * bits // 8, len(head)
            if not packed:
                length = path.stat().st_size
            if real and math.isfinite(start):
                file.seek(int(start))
                length, finite = _finite_values(file, voxels, np.dtype(real))
                length += int(start)
            else:
                finite = True
                while packed and (chunk := file.read(1 << 24)):
                    length += len(chunk)
    except (OSError, EOFError, ValueError, struct.error, zlib.error):
        raise HarmonictError(f"{path}: truncated or damaged; get a fresh copy") from None
    if length < needed:
        raise HarmonictError(f"{path}: truncated, {length} of at least {needed} bytes; get a fresh copy")
    if not finite:
        raise HarmonictError(f"{path}: NaN or infinite values; expected HU: give air (-1000) where there is no image")


def _finite_values(file: gzip.GzipFile | BufferedReader, voxels: int, dtype: np.dtype) -> tuple[int, bool]:
    """Bytes of up to `voxels` values from here on, and whether all of them are finite."""
    length, finite, left = 0, True, voxels * dtype.itemsize
    while left and (chunk := file.read(min(left, 1 << 24))):
        values = np.frombuffer(chunk[: len(chunk) // dtype.itemsize * dtype.itemsize], dtype)
        finite = finite and bool(np.isfinite(values).all())
        length, left = length + len(chunk), left - len(chunk)
    return length, finite


def _geometry(origin: tuple, spacing: tuple, direction: tuple, path: Path) -> Geometry:
    n = len(origin)
    axes = np.eye(3)
    axes[:n, :n] = np.reshape(direction, (n, n)).T  # SimpleITK keeps the axes in columns, x first
    if n == 2:
        axes[2] = np.cross(axes[0], axes[1])
    z, y, x = [(float(a[0]), float(a[1]), float(a[2])) for a in axes[::-1]]
    ox, oy, oz = [float(v) for v in (*origin, 0.0)[:3]]
    sx, sy, sz = [float(v) for v in (*spacing, 1.0)[:3]]
    try:
        return Geometry(origin_mm=(ox, oy, oz), spacing_mm=(sz, sy, sx), direction=(z, y, x))
    except HarmonictError as error:
        raise HarmonictError(f"{path}: {error}") from None


def _override(geometry: Geometry, spacing_mm: float | tuple[float, float] | None) -> Geometry:
    if spacing_mm is None:
        return geometry
    y, x = np.broadcast_to(np.asarray(spacing_mm, float), 2).tolist()
    return Geometry(geometry.origin_mm, (geometry.spacing_mm[0], y, x), geometry.direction)


def _typed(hu: np.ndarray, wanted: str) -> np.ndarray:
    if np.dtype(wanted).kind not in "iu":
        return hu
    low, high = np.rint(hu.min()), np.rint(hu.max())
    for name in (wanted, "int16"):
        limits = np.iinfo(name)
        if limits.min <= low and high <= limits.max:
            return np.rint(hu).astype(name)
    return hu


def _write(image: sitk.Image, path: Path) -> None:
    """Write beside the target in a folder of its own, then move: a header may have a data file beside it."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        sitk.WriteImage(image, str(folder / path.name), useCompression=path.suffix in (".gz", ".nrrd"))
        files = sorted(folder.iterdir(), key=lambda f: f.name == path.name)  # the header last
        for file in files:
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise HarmonictError(f"cannot write {path}: {error.strerror}") from None
    except RuntimeError as error:
        raise HarmonictError(f"cannot write {path}: {_reason(error)}") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:160]


def _mm(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ") mm"
