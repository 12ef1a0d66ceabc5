"""The one autoregressive transformer and its conditioning."""
