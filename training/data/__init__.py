"""Open a dataset by its name, decode its images, and index, cache or stream them."""
