"""One file for each method; METHODS names them for the command line."""

from __future__ import annotations

from pathlib import Path

from harmonict.core import HarmonictError
from harmonict.harmonizer import Harmonizer, read_config
from harmonict.methods.bridge import Bridge
from harmonict.methods.choe import Choe
from harmonict.methods.cvh_ct import CVHCT
from harmonict.methods.cyclegan import CycleGAN
from harmonict.methods.ddpm import DDPM
from harmonict.methods.diffusion_ct import DiffusionCT
from harmonict.methods.encoder_decoder import EncoderDecoderMethod
from harmonict.methods.ganai import GANai
from harmonict.methods.histogram import Histogram
from harmonict.methods.identity import Identity
from harmonict.methods.mtf_ratio import MTFRatio
from harmonict.methods.physics import Physics
from harmonict.methods.radiomic_gan import RadiomicGAN
from harmonict.methods.stan_ct import STANCT
from harmonict.methods.vgg_unet import VGGUNetAblation

METHODS: dict[str, type[Harmonizer]] = {
    m.name: m
    for m in (
        Identity,
        Histogram,
        MTFRatio,
        Choe,
        GANai,
        STANCT,
        CycleGAN,
        CVHCT,
        RadiomicGAN,
        Physics,
        VGGUNetAblation,
        EncoderDecoderMethod,
        DDPM,
        DiffusionCT,
        Bridge,
    )
}


def get_method(name: str) -> type[Harmonizer]:
    """The class of a method. Raises HarmonictError that lists the methods where there is none of that name."""
    try:
        return METHODS[name]
    except KeyError:
        raise HarmonictError(f"no method {name!r}; there are: {', '.join(METHODS)}") from None


def load_model(folder: str | Path) -> Harmonizer:
    """A saved model of whatever method."""
    return get_method(read_config(folder)["method"]).load(folder)
