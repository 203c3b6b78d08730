"""Measure what this project claims."""
