"""States of rows, and what follows from them."""
