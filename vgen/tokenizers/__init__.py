"""Tokenizers: pixels to token ids and back."""
