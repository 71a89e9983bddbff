"""Plans, chunk loops and options of fused linear calls."""
