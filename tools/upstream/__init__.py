"""transformers' own tests for this model and for generation, with every model patched."""
