"""The public functions, on every backend, against float64."""
