"""Images with a mask of classes: where they are, and views of them."""
