"""Files of requests: JSON lines in, one answer per line out, in the same order."""
