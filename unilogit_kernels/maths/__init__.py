"""States of rows, merges, rewrites and closed forms: functions of small tensors alone."""
