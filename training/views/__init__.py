"""Random views for training and fixed views for evaluation: `policy` samples their parameters, three backends render them."""
