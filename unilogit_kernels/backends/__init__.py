"""The row kernels: their contract, the registry, and one folder or file for each backend."""
