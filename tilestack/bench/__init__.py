"""Benchmarks: every figure in the documentation comes from a file that one of these wrote (bench/results/)."""
