"""What runs have found, drawn for people."""
