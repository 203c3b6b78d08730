"""Semantic segmentation as MoCo v1 measures it."""
