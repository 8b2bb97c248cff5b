"""Benchmarks and studies: measured side by side in one process, written to docs/benchmarks with command, commit, hardware and seed."""
