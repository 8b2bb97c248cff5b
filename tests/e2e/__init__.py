"""Tests that drive a real installation in a browser."""
