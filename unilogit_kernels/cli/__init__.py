"""The command `unilogit`."""
