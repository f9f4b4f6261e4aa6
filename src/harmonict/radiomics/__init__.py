"""Radiomic features: masks and HU in, named numbers out. No torch, no file formats."""

from harmonict.radiomics.discretise import crop_to_mask
from harmonict.radiomics.features import FeatureSettings, extract_features
from harmonict.radiomics.ibex import IbexSettings, ibex_features, ibex_table
from harmonict.radiomics.ibsi import ibsi_features

__all__ = [
    "FeatureSettings",
    "IbexSettings",
    "crop_to_mask",
    "extract_features",
    "ibex_features",
    "ibex_table",
    "ibsi_features",
]
