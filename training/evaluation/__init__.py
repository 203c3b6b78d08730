"""What features are worth: kNN, the linear probe, fine-tuning."""
