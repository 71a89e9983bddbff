"""Unlearning with the Hugging Face Trainer: data, methods, runs, evaluation."""
