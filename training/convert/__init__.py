"""Convert checkpoints of other MoCo code to a model directory, and back."""
