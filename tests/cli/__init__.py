"""The commands, from the outside."""
