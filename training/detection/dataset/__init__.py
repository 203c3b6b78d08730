"""Images with annotated objects: from the name of a dataset to padded batches."""
