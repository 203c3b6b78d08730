"""Random views for training and fixed ones for evaluation: what is drawn, and three ways to render it."""
