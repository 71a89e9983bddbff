"""The Trainer, its data and its runs."""
