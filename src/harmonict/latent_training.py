"""Training an encoder-decoder to give every image back through its latent: `encoder-decoder`, and the first loop of
`diffusion-ct` (Selim et al. 2023, sec. 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from harmonict.data import SlicePairs
from harmonict.nn.latent import HU_UNIT, EncoderDecoder
from harmonict.train import Run

COMPONENT_BATCHES = 40  # of eight pairs, which the principal components are taken of


def learn_to_rebuild(network: EncoderDecoder, c: Any, pairs: SlicePairs, run: Run) -> None:
    """The training of the encoder-decoder, which is also the first loop of `diffusion-ct`. c: the Config of either."""
    network.use_features(c.feature_weights)
    if network.linear:
        network.find_components(_images(pairs, run.seed, c.patch))
    adam = torch.optim.Adam(network.parameters(), lr=c.rate)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: c.rate_end ** (n / c.steps))
    for batch in run.batches(
        pairs,
        size=c.batch,
        patch=c.patch,
        steps=c.steps,
        epoch_steps=c.check_every,
        network=network,
        adam=adam,
        rate=rate,
    ):
        x = torch.cat([batch.source, batch.target])
        seen = torch.cat([batch.source_measured, batch.target_measured])
        with run.inside():
            x_hat = network(x)
        run.step({"L2": (1.0, ((x_hat - x) / HU_UNIT).square()[seen].mean())}, adam)
        rate.step()
        run.check(pairs.held_out, lambda batch: network(batch.target))


def _images(pairs: SlicePairs, seed: int, patch: int) -> Iterator[Tensor]:
    """Patches of the training, sources and targets alike."""
    for n in range(COMPONENT_BATCHES):
        batch = pairs.batch((seed, 2**31 + 2, n), size=8, patch=patch)
        yield torch.cat([batch.source, batch.target])
