"""Data sets, transforms, resumable loading and cached token codes."""
