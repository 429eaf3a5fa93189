"""Continuous batching over pages and rows: many requests, one model."""
