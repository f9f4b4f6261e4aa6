"""Slices that do not fit: sizes that a network's stride does not divide, slices too large for it or for the memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

OVERLAP = 0.5  # of neighbouring tiles: every pixel lies within a quarter tile of some tile's centre
SMALLEST_TILE = 64


def to_multiple(x: Tensor, multiple: int, convert: Callable[[Tensor], Tensor]) -> Tensor:
    """`convert` of images (b, c, h, w) whose sides its strides do not divide: (b, k, h, w).

    The images are mirrored at their lower and right edge up to the next multiple, and the result is cropped again.
    """
    h, w = x.shape[-2:]
    down, right = -h % multiple, -w % multiple
    if not down and not right:
        return convert(x)
    mirrored = "reflect" if down < h and right < w else "replicate"  # an image smaller than what it lacks has no mirror
    return convert(functional.pad(x, (0, right, 0, down), mode=mirrored))[..., :h, :w]


def in_tiles(x: Tensor, tile: int, convert: Callable[[Tensor], Tensor]) -> Tensor:
    """`convert` of images (b, 1, h, w), tile by tile, one at a time: (b, 1, h, w).

    Tiles of `tile` x `tile` pixels overlap by half and are joined with Gaussian weights (SD a twelfth of a tile), so
    that what a network makes within a twelfth of a tile of its edge counts for less than 1e-5. The same numbers
    whatever the batch. Images that are no larger than a tile are converted whole.
    """
    h, w = x.shape[-2:]
    if h <= tile and w <= tile:
        return convert(x)
    from monai.inferers.utils import sliding_window_inference  # takes seconds to import

    size = (min(tile, h), min(tile, w))
    rows, columns = (torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 12)).square()) for n in size)
    weight = torch.outer(rows, columns)
    weight /= weight.min()  # weights under 0.001 would be raised to it: along the image's edge, all of them
    result = sliding_window_inference(x, size, 1, convert, overlap=OVERLAP, roi_weight_map=weight.to(x.device))
    return result  # type: ignore[return-value]


def smaller_tile(tile: int | None, shape: tuple[int, int]) -> int | None:
    """The next tile to try where slices of `shape`, or such tiles, need too much memory; None where there is none."""
    side = max(shape) if tile is None else min(tile, max(shape))
    half = side // 2 // 16 * 16
    return half if half >= SMALLEST_TILE else None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a computation failed because its device has not enough memory."""
    words = ("not enough memory", "can't allocate memory")  # the CPU's allocator raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in words)


class MemoryWatch:
    """How many slices fit: measures what one needs, `with MemoryWatch(device) as watch: ...one slice...`.

    On a GPU the need is exact. On the CPU it is an upper bound: the process's highest memory so far less what it had
    before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> MemoryWatch:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _resident_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        highest = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _highest_bytes()
        self.need_bytes = max(highest - self._before, 1)

    def slices(self, most: int) -> int:
        """1 to `most`: as many as half the free memory holds (other processes may want the rest)."""
        free = free_bytes(self._device)
        return most if free is None else max(1, min(most, int(0.5 * free / self.need_bytes)))


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device, or in a container; None where the system does not say."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return 0


def _highest_bytes() -> int:
    try:
        import resource  # not on every system
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
