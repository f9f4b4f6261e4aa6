"""What a harmonization did: tables of image quality, reproducibility and biology. Draws nothing."""
