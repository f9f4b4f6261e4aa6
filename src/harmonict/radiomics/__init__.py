"""Radiomic features: masks and HU in, named numbers out. No torch, no file formats."""

from harmonict.radiomics.discretise import crop_to_mask
from harmonict.radiomics.features import FeatureSettings, extract_features
from harmonict.radiomics.ibsi import ibsi_features

__all__ = ["FeatureSettings", "crop_to_mask", "extract_features", "ibsi_features"]
