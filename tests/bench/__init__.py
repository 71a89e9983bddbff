"""The harness that measures."""
