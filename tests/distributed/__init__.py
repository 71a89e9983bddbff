"""Several processes: models that are sharded or copied, runs that share their rows."""
