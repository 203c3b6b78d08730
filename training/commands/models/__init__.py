"""Commands that bring models to other places and formats, and from there."""
