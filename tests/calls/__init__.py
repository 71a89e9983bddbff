"""What a call refuses, and how it says so."""
