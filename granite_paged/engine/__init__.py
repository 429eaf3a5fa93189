"""Continuous batching: scheduling, execution, outputs."""
