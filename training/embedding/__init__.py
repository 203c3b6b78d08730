"""Embedded sets: a row an image in Parquet shards, searched, looked through for duplicates, and published."""
