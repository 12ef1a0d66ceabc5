"""Network building blocks shared by tokenizers and generators."""
