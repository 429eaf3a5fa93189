"""The operators of a layer, and the choice of their implementation."""
