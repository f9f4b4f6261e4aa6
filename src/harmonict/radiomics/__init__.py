"""Radiomic features: masks and HU in, named numbers out. No torch, no file formats."""

from harmonict.radiomics.discretise import crop_to_mask
from harmonict.radiomics.features import FeatureSettings, check_features, extract_features

__all__ = ["FeatureSettings", "check_features", "crop_to_mask", "extract_features"]
