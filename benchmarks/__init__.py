"""Measurements; run from the root of the checkout."""
