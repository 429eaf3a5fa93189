"""Benchmarks, the performance gate, kernel tuning and profiles."""
