"""A dataset as smaller images in Parquet shards, prepared once for many runs."""
