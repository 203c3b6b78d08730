"""The command that runs a table of a paper, and what it is to run."""
