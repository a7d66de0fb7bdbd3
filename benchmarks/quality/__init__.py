"""How well each score finds what was planted: `python -m benchmarks.quality`."""
