"""Losses of `hidden @ weight.T` without its logits: the plan, and the chunk loops that run it."""
