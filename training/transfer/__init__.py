"""Training an encoder further for another task, in steps: what detection and segmentation share."""
