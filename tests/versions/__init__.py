"""The ends of the matrix of versions, each in an environment of its own: `make test-versions`."""
