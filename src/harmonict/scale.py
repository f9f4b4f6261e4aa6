"""map_series: one function over many series, on several processes, where one bad series never stops the rest."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from harmonict.core import HarmonictError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_series(
    fn: Callable[[Item], Result], items: Sequence[Item], *, jobs: int = 1
) -> Iterator[tuple[int, Result | HarmonictError]]:
    """Yield (index, fn(items[index])) in the order in which they finish.

    What `fn` raises comes back as a HarmonictError in place of the result; so does a worker that was killed (no memory,
    a crash in a decoder). jobs: number of processes; 1 works in this one. `fn` and the items must be importable and
    picklable for jobs > 1.
    """
    if jobs < 1:
        raise HarmonictError(f"--jobs must be at least 1, got {jobs}")
    if jobs == 1 or len(items) <= 1:
        for n, item in enumerate(items):
            yield n, _guarded(fn, item)
        return
    left = list(range(len(items)))
    try:
        with _pool(min(jobs, len(items))) as pool:
            futures = {pool.submit(_guarded, fn, items[n]): n for n in left}
            for future in as_completed(futures):
                result = future.result()
                left.remove(futures[future])
                yield futures[future], result
        return
    except BrokenProcessPool:
        pass
    for n in list(left):  # a worker died: nobody knows over which item, so each gets a process of its own
        try:
            with _pool(1) as pool:
                yield n, pool.submit(_guarded, fn, items[n]).result()
        except BrokenProcessPool:
            yield n, HarmonictError("the worker process was killed (no memory left, or a crash in a decoder)")


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_limit_threads, initargs=(threads,))


def _limit_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _guarded(fn: Callable[[Item], Result], item: Item) -> Result | HarmonictError:
    try:
        return fn(item)
    except HarmonictError as error:
        return error
    except MemoryError:
        return HarmonictError("not enough memory for this series")
    except Exception as error:  # a defect of ours must cost one series, not the cohort
        return HarmonictError(
            f"internal error, please report it: {type(error).__name__}: {' '.join(str(error).split())}"
        )
