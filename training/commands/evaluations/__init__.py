"""Commands that measure an encoder, frozen or fine-tuned."""
