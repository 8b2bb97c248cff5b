"""Bonsai's training engine: recipes in, numbered events and certified artifacts out. It knows nothing of the web."""

__version__ = "0.1.0"
