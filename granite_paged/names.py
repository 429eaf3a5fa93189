"""Names that both the command line and the modules behind it use. Imports nothing."""

MODES = ("default", "static", "paged")
"""transformers' SDPA with a DynamicCache, eager; StaticCache with torch.compile; ours."""
