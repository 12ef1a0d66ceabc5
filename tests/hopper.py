"""Triton kernels as they would run on an H100; no GPU is needed to compile them."""

from collections.abc import Mapping
from typing import Any


def compiled_for_hopper(
    kernel: Any,
    constants: Mapping[str, Any],
    types: Mapping[str, str],
    *,
    usual: str = "*bf16",
    odd: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """What Triton makes of a kernel.

    Args:
        kernel: the function.
        constants: its compile-time constants; those it does not have are left out.
        types: of other arguments, as Triton writes them.
        usual: the type of all the rest.
        odd: arguments that are not known to be multiples of 16.
        options: warps, stages and the like.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, usual) for name in names}
    even = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith(("*", "i")) and name not in odd
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, even)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
