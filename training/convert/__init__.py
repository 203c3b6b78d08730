"""Checkpoints of other MoCo code, in and out."""
