"""From the name of a dataset to rows, and from rows to images."""
