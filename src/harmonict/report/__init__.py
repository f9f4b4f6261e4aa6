"""Figures for people. The only importer of plotting."""
