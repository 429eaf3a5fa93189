"""Everything that follows the releases of Hugging Face transformers."""
