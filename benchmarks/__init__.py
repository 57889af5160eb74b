"""Studies and measurements; `python -m benchmarks.suite` is the one of speed and memory."""
