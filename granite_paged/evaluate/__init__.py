"""Tasks to measure answers by."""
