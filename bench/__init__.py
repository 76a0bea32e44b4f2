"""Benchmarks: each is a module to run, and keeps what it printed in `results/`."""
