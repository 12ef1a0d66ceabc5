"""Scores of samples and reconstructions, and the reports that carry them."""
