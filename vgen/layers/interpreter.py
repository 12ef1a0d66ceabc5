"""Triton's interpreter, which runs kernels on the CPU for tests."""

import os


def interpreted() -> bool:
    """Whether kernels run in it; Triton decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
