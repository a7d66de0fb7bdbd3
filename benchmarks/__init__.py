"""Benchmarks of fastpie; results are committed under `results/`."""
