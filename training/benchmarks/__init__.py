"""Benchmarks of this project's claims about speed and memory."""
