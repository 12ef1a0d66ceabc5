"""Training objectives of tokenizers and generators."""
