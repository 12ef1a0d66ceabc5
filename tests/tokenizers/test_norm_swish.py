import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from tests.paths import ROOT
from vgen.tokenizers.convnet import AttnBlock, Decoder, ResBlock
from vgen.tokenizers.norm_swish import GroupNorm, group_norm

BF16 = torch.bfloat16


def fuse(module):
    for part in module.modules():
        if isinstance(part, GroupNorm):
            part.fused = True
    return module


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.to(memory_format=torch.channels_last)


def channels_last(*shape, scale=1.0, shift=0.0):
    return (torch.randn(shape) * scale + shift).contiguous(memory_format=torch.channels_last)


def compare_kernels(device="cpu"):
    """Kernels against the plain layers, with gradients on, which those take."""
    torch.manual_seed(0)
    for channels, groups, size in ((32, 32, (5, 7)), (64, 32, (24, 24)), (8, 4, (3, 1)), (512, 32, (4, 4))):
        norm = randomised(group_norm(channels, groups)).to(device)
        x = channels_last(3, channels, *size, scale=2.0, shift=1.5).to(device)
        bias = torch.randn(channels, device=device)
        plain, swish, biased = norm(x), norm.swish(x), norm.swish(x, bias)
        assert torch.equal(plain, F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
        fuse(norm)
        with torch.no_grad():
            assert norm.takes(x)
            torch.testing.assert_close(norm(x), plain, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(norm.swish(x), swish, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(norm.swish(x, bias), biased, atol=2e-5, rtol=2e-5)
            assert torch.equal(norm.swish(x[1:2]), norm.swish(x)[1:2])
            assert norm.swish(x).is_contiguous(memory_format=torch.channels_last)
    for module in (ResBlock(32, 64), ResBlock(32, 32), AttnBlock(32)):
        x = channels_last(2, 32, 6, 6).to(device)
        randomised(module).to(device)
        expected = module(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(fuse(module)(x), expected, atol=1e-4, rtol=1e-4)
    sizes = {"num_res_blocks": 1, "z_channels": 8, "groups": 32, "dropout": 0.0, "gradient_checkpointing": False}
    decoder = randomised(Decoder(base_channels=32, multipliers=[1, 2], **sizes)).to(device).eval()
    z = channels_last(2, 8, 4, 4).to(device)
    expected = decoder(z).detach()
    half = fuse(decoder.to(BF16))
    with torch.no_grad():
        error = (half(z.to(BF16)).float() - expected).norm()
        for part in decoder.modules():
            if isinstance(part, GroupNorm):
                part.fused = False
        plain = (decoder(z.to(BF16)).float() - expected).norm()
        assert 0 < error < 1.5 * plain < 0.1 * expected.norm()


def test_kernels_equal_the_plain_layers():
    pytest.importorskip("triton")
    # Triton decides at import whether it interprets.
    command = [sys.executable, "-c", "from tests.tokenizers.test_norm_swish import compare_kernels as c; c()"]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_equal_the_plain_layers_on_a_gpu():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        compare_kernels("cuda")
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_numbers_than_32_bits_count_on_a_gpu():
    norm = fuse(group_norm(128, 32)).to("cuda", BF16)
    x = torch.randn(130, 128, 364, 364, dtype=BF16, device="cuda").to(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    with torch.no_grad():
        assert torch.equal(norm.swish(x)[-1:], norm.swish(x[-1:]))


def test_what_the_kernels_are_not_for():
    norm, x = fuse(group_norm(32, 32)), channels_last(1, 32, 4, 4)
    with torch.no_grad():
        assert not norm.takes(x)
        torch.testing.assert_close(norm.swish(x), F.silu(torch.nn.GroupNorm(32, 32, eps=1e-6)(x)))


def test_kernels_compile_for_hopper_without_spilling():
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vgen.tokenizers import norm_swish_kernels as kernels

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted")
    floats = dict.fromkeys(("sums", "scales"), "*fp32") | {"eps": "fp32"}
    halves = dict.fromkeys(("x", "out", "bias", "weight", "shift", "branch"), "*bf16")
    for channels in (128, 512):
        constants = {"CHANNELS": channels, "GROUPS": 32, "ROWS": 8192 // channels, "BIASED": True, "CHUNKS": 64}
        constants |= {"STEPS": 16, "TILES": 4, "SWISH": True, "BLOCK": 8192}
        for kernel in (kernels.sum_groups, kernels.make_scales, kernels.apply_scales, kernels.add_biased):
            names = kernel.arg_names
            types = {n: "constexpr" if n in constants else (floats | halves).get(n, "i32") for n in names}
            values = {(names.index(n),): v for n, v in constants.items() if n in names}
            whole = [i for i, n in enumerate(names) if types[n].startswith("*") or n == "count"]
            even = {(i,): [["tt.divisibility", 16]] for i in whole}
            source = ASTSource(kernel, types, values, even)
            code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
            assert ".local" not in code
            if kernel in (kernels.sum_groups, kernels.apply_scales, kernels.add_biased):
                assert "ld.global.v4.b32" in code
            if kernel in (kernels.apply_scales, kernels.add_biased):
                assert "st.global.v4.b32" in code
