"""Read result files; write tables and figures."""
