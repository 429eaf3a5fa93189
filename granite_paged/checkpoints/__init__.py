"""The embedded checkpoint and its task. This module holds paths only and loads nothing."""

from pathlib import Path

TINY_RECALL = Path(__file__).parent / "tiny_recall"
"""Hugging Face folder of a Granite-4 hybrid: 249 k parameters, trained on associative recall."""
