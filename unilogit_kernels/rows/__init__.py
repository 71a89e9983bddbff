"""Rows of one model's logits or of two: which kernel call gives values, slopes, gradients."""
