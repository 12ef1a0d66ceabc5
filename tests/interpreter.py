"""Triton's interpreter, in less time."""

import inspect
from types import SimpleNamespace


def list_language_once():
    """Have the interpreter list the functions of its language once, not at every call of every kernel's function."""
    from triton.language import core
    from triton.runtime import interpreter

    known = {}

    def members(package):
        if id(package) not in known:
            known[id(package)] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        return [(name, getattr(package, name)) for name in known[id(package)]]

    # While a kernel runs none of these is what it was, so that what is listed first holds for later calls.
    interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": members})
