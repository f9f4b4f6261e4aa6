"""Weight files of feature networks: found, fetched, checked, read.

A file from outside is believed only after the SHA-256 that its name promises (`vgg19-dcbb9e9d.pth`: the first eight hex
digits, torch hub's convention) and is read as plain tensors, never as a pickled program. The networks of our own that
come with the package stand in `weights/`, each beside its card (`NAME.json`), which holds the SHA-256.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import wrap_file
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from harmonict.core import HarmonictError
from harmonict.core.files import write_whole

SHIPPED = Path(__file__).parent / "weights"
TIMEOUT_S = 30.0
CHUNK_BYTES = 1 << 20
RANDOM_WIDTH = 16
Network = TypeVar("Network", bound=nn.Module)


def cache_folder() -> Path:
    """`$HARMONICT_CACHE`, else `harmonict` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("HARMONICT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "harmonict"


def published(url: str) -> dict[str, Tensor]:
    """The tensors of a published file: from the cache folder, else downloaded into it, whole or not at all.

    Raises HarmonictError, with the three ways on, where it is neither cached nor to be had.
    """
    path = cache_folder() / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HarmonictError(f"cannot make the cache folder {path.parent}: {error.strerror}") from None
        write_whole(path, lambda name: _download(url, path, Path(name)))
    return read_tensors(path)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a `.safetensors` or a torch `.pth` file; the latter needs its SHA-256's first digits in its name.

    Raises HarmonictError where the file is missing, damaged, does not match its digest or holds anything but tensors.
    """
    path = Path(path)
    promised = _promised(path)
    is_safetensors = path.suffix == ".safetensors"
    if not is_safetensors and promised is None:
        raise HarmonictError(
            f"{path}: expected .safetensors, or a .pth that has the first 8 hex digits of its SHA-256 in its name "
            "(vgg19-dcbb9e9d.pth)"
        )
    try:
        if promised is not None:
            _check_digest(path, promised)
        state = load_tensors(path.read_bytes()) if is_safetensors else _read_pth(path)
    except OSError as error:
        raise HarmonictError(f"cannot read the feature weights {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise HarmonictError(f"{path} is not a whole .safetensors file: {' '.join(str(error).split())}") from None
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise HarmonictError(f"{path}: expected a table of named tensors (a state dict), and nothing else in the file")
    return state


def feature_network(
    kind: Callable[[int], Network],
    weights: str | Path,
    *,
    of: str,
    url: str,
    trial: str,
    first: str,
    belongs: Callable[[str], bool],
) -> Network:
    """A frozen feature network `kind(width)` in eval mode, with the weights of that name or path: see `vgg19`.

    of: its name for messages. url: its published file. trial: the name of ours. first: the first convolution's key,
    whose size tells the width. belongs: which keys of a file are the network's; the others are ignored.
    """
    name, _, width = str(weights).partition(":")
    if name == "random":
        if width and not (width.isdecimal() and int(width) > 0):
            raise HarmonictError(f"feature_weights=random:WIDTH needs a whole number of channels, got {width!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = kind(int(width or RANDOM_WIDTH))
    else:
        if weights == "imagenet":
            state = published(url)
        else:
            state = shipped(trial) if weights == "trial" else read_tensors(weights)
        state = {key: value for key, value in state.items() if belongs(key)}
        if first not in state or state[first].ndim != 4:
            raise HarmonictError(f"feature weights {weights} hold no {of}: {first} is missing")
        network = kind(len(state[first]))
        load_strictly(network, state, of=f"feature weights {weights}")
    network.eval().requires_grad_(False)  # for looking only; a gradient for the image still flows
    return network


def shipped(name: str) -> dict[str, Tensor]:
    """Our own network NAME, float32. Raises HarmonictError where the installed file is not the one of its card."""
    try:
        content = (SHIPPED / f"{name}.safetensors").read_bytes()
        sha256 = shipped_card(name)["sha256"]
    except OSError as error:
        raise HarmonictError(f"{error.filename} is missing: install harmonict again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise HarmonictError(f"{name}.safetensors does not match its SHA-256: install harmonict again")
    return {key: value.float() for key, value in load_tensors(content).items()}


def shipped_card(name: str) -> dict[str, Any]:
    """How our own network NAME was trained and how well it did on patients it had not seen."""
    return json.loads((SHIPPED / f"{name}.json").read_text())


def load_strictly(network: nn.Module, state: dict[str, Tensor], *, of: str) -> None:
    """Fill `network` with exactly its own tensors. Raises HarmonictError naming what is missing, extra or misshapen."""
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    # files from before batch normalisation counted its batches lack the counter, which eval() never reads
    counters = {key: value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}
    state = {**counters, **state}
    for problem, keys in (
        ("lacks", wanted.keys() - state.keys()),
        ("has the unknown", state.keys() - wanted.keys()),
        ("has another shape of", {k for k in wanted.keys() & state.keys() if wanted[k] != tuple(state[k].shape)}),
    ):
        if keys:
            first = min(keys)
            raise HarmonictError(f"{of} is no {type(network).__name__}: it {problem} {first} ({len(keys)} in all)")
    network.load_state_dict(state)


def _promised(path: Path) -> str | None:
    found = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", path.name)
    return found and found[1]


def _check_digest(path: Path, promised: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(promised):
        raise HarmonictError(
            f"{path}: its SHA-256 begins with {digest[: len(promised)]}, not with the {promised} in its name; "
            "delete it and fetch it again"
        )


def _read_pth(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile archive makes the reader raise
        reason = type(error).__name__
        raise HarmonictError(f"{path} is not a torch file of plain tensors ({reason}); nothing in it was run") from None


def _download(url: str, path: Path, temporary: Path) -> None:
    digest = hashlib.sha256()
    ways = f"put the file at {path}, or --set feature_weights=PATH, or --set feature_weights=trial (or random)"
    with temporary.open("wb") as file:
        received = _received(url, path.name)
        while True:
            try:
                chunk = next(received, None)
            except (OSError, http.client.HTTPException) as error:  # the network's; the disk's is write_whole's to tell
                reason = getattr(error, "reason", None) or error
                raise HarmonictError(f"cannot fetch {url} ({reason}): {ways}") from None
            if chunk is None:
                break
            digest.update(chunk)
            file.write(chunk)
    if not digest.hexdigest().startswith(_promised(path) or "-"):
        raise HarmonictError(
            f"{url}: what came has SHA-256 {digest.hexdigest()[:8]}..., not that of its name, and was not kept: {ways}"
        )


def _received(url: str, name: str) -> Iterator[bytes]:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        size = int(response.headers.get("Content-Length") or 0)
        console = Console(stderr=True)
        with wrap_file(response, size, description=f"fetching {name}", console=console, transient=True) as body:
            while chunk := body.read(CHUNK_BYTES):
                yield chunk
