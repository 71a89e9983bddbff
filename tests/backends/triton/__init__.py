"""The Triton backend, tested on a machine without a GPU."""
