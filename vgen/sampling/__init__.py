"""The one decoding loop, guidance, filters and the labels-to-pixels pipeline."""
