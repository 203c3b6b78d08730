"""How weights follow gradients: the optimizers that transformers lacks, and the learning rate of every step."""
