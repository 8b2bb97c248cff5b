"""One short driver for each operation."""
