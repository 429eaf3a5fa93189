"""Checkpoints small enough to travel with the package: paths only, nothing is loaded here."""

from pathlib import Path

TINY_RECALL = Path(__file__).parent / "tiny_recall"
"""A Granite-4 hybrid of 249 k parameters, trained on associative recall (a Hugging Face folder)."""
