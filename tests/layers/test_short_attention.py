"""The kernels on the CPU by Triton's interpreter (in a process of its own), compiled for Hopper, and on a GPU."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.hopper import compiled_for_hopper
from tests.paths import ROOT
from vgen.layers.attention import Attention, View, additive_mask, attend
from vgen.layers.cache import KVCache
from vgen.layers.short_attention import WAY_ROWS, Tile, pick_tile, runs_here, short_attention

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by the test of the interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@compiled
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def case(batch, heads, kv_heads, fed, prefix, width, dtype=torch.float32, masked=False, device="cpu"):
    """Queries and cache as in a network: strided, with rows beyond the prefix that are not numbers."""
    torch.manual_seed(fed + prefix)
    query = torch.randn(batch, fed, heads, width, device=device).transpose(1, 2).to(dtype)
    cache = torch.full((2, batch, kv_heads, prefix + 3, width), float("nan"), device=device, dtype=dtype)
    cache[:, :, :, :prefix] = torch.randn(2, batch, kv_heads, prefix, width, device=device)
    bias = None
    if masked:
        visible = torch.rand(*([batch, 1] if masked == "own" else []), fed, prefix, device=device) < 0.6
        visible[..., -1] = True
        bias = additive_mask(visible, dtype)
    return query, cache[0, :, :, :prefix], cache[1, :, :, :prefix], bias


def expected(query, key, value, bias):
    bias = None if bias is None else bias.float()
    out = attend(query.float(), key.float(), value.float(), causal=False, mask=bias, dropout=0.0)
    return out.transpose(1, 2).flatten(2)


FEW = Tile(rows=16, shared=1, queries=16, warps=4, stages=2)


@interpreted
@pytest.mark.parametrize(
    ("sizes", "masked", "tile"),
    [
        ((1, 2, 2, 1, 1, 16), False, None),
        ((2, 4, 4, 1, 10, 16), False, None),
        ((2, 4, 2, 3, 70, 8), True, None),
        ((1, 6, 2, 5, 37, 12), True, FEW),  # 15 of 16 rows used
        ((1, 4, 1, 5, 40, 16), True, FEW),  # 20 queries in two blocks
        ((3, 2, 2, 2, 20, 16), "own", None),
        ((3, 4, 4, 2, 33, 16), "own", Tile(16, 4, 16, 2, 2)),
        ((2, 4, 4, 4, 33, 16), True, Tile(16, 4, 16, 2, 2)),
        ((2, 8, 4, 2, 33, 16), False, Tile(16, 4, 16, 2, 1)),
        ((1, 8, 8, 1, 70, 16), False, Tile(32, 8, 16, 2, 3)),
        ((2, 2, 2, 31, 90, 16), True, Tile(64, 1, 32, 4, 3)),
        ((1, 2, 1, 3, 150, 16), True, Tile(16, 1, 16, 4, 2, span=2)),  # five splits
        ((1, 2, 2, 1, 600, 16), False, None),
        ((1, 1, 1, 70, 70, 16), True, None),
    ],
)
def test_it_equals_attention(sizes, masked, tile):
    query, key, value, bias = case(*sizes, masked=masked)
    out = short_attention(query, key, value, bias=bias, tile=tile)
    torch.testing.assert_close(out, expected(query, key, value, bias), atol=2e-6, rtol=1e-5)
    assert torch.equal(out, short_attention(query, key, value, bias=bias, tile=tile))


HELD = Tile(rows=32, shared=1, queries=16, warps=2, stages=2, held=2)


@interpreted
@pytest.mark.parametrize(
    ("sizes", "settled", "masked", "tile"),
    [
        ((2, 4, 2, 3, 70, 8), 67, True, None),
        ((2, 4, 4, 1, 2, 16), 1, False, None),
        ((1, 2, 2, 5, 57, 12), 20, True, HELD),  # 37 rows in two steps
        ((1, 4, 1, 5, 150, 16), 145, True, HELD),  # five tiles of which two are held, 20 queries in two blocks
        ((1, 2, 1, 3, 300, 16), 290, True, replace(HELD, span=2)),  # five splits
        ((1, 2, 1, 3, 300, 16), 225, False, replace(HELD, held=1, span=2)),  # 75 rows in three steps
        ((1, 2, 2, 1, 600, 16), 599, False, None),
        ((2, 2, 2, 31, 231, 16), 200, True, None),
        ((2, 2, 2, 50, 120, 16), 70, True, None),
        ((3, 2, 1, 3, 60, 16), 50, "own", HELD),
    ],
)
def test_settled_rows_are_read_apart(sizes, settled, masked, tile):
    query, key, value, bias = case(*sizes, masked=masked)
    out = short_attention(query, key, value, bias=bias, settled=settled, tile=tile)
    torch.testing.assert_close(out, expected(query, key, value, bias), atol=2e-6, rtol=1e-5)
    assert torch.equal(out, short_attention(query, key, value, bias=bias, settled=settled, tile=tile))


@interpreted
@pytest.mark.parametrize("tile", [None, FEW, HELD])
def test_rows_of_one_byte_are_read_as_what_they_are(tile):
    query, key, value, bias = case(2, 4, 2, 3, 70, 16, torch.float16, masked=True)
    key, value = (rows.to(torch.float8_e4m3fn) for rows in (key, value))
    with torch.no_grad():
        assert runs_here(query, key, bias)
    out = short_attention(query, key, value, bias=bias, settled=67, tile=tile)
    assert out.dtype == torch.float16
    right = expected(query, key.float(), value.float(), bias)
    torch.testing.assert_close(out.float(), right, atol=2e-3, rtol=2e-3)


@interpreted
def test_half_precision_rounds_weights_and_result_once():
    query, key, value, bias = case(2, 4, 2, 3, 70, 16, torch.float16, masked=True)
    out = short_attention(query, key, value, bias=bias)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected(query, key, value, bias), atol=2e-3, rtol=2e-3)


@interpreted
def test_large_scores_masks_of_other_strides_and_queries_that_see_nothing():
    query, key, value, _ = case(1, 2, 2, 2, 20, 16)
    torch.testing.assert_close(
        short_attention(100 * query, key, value), expected(100 * query, key, value, None), atol=2e-5, rtol=1e-4
    )
    bias = torch.zeros(20, 2).masked_fill(torch.rand(20, 2) < 0.5, float("-inf")).T
    bias[0, 3], bias[1] = 0.0, float("-inf")
    out = short_attention(query, key, value, bias=bias, tile=FEW)
    torch.testing.assert_close(out[:, 0], expected(query, key, value, bias)[:, 0], atol=2e-6, rtol=1e-5)
    assert (out[:, 1] == 0).all()


@interpreted
@pytest.mark.parametrize("masked", [False, True])
def test_the_attention_layer_takes_it_for_cached_passes_only(masked, monkeypatch):
    layer = Attention(dim=32, heads=4, kv_heads=2, dropout=0.0, residual_dropout=0.0).eval()
    calls = []
    monkeypatch.setattr(
        "vgen.layers.attention.short_attention",
        lambda *arguments, **keywords: calls.append(1) or short_attention(*arguments, **keywords),
    )
    visible = torch.tensor([[True] * 6, [True, False] * 3])
    mask = additive_mask(visible, torch.float32) if masked else None
    results = []
    for fused in (False, True):
        layer.fused = fused
        torch.manual_seed(0)
        cache = KVCache(layers=1, batch=2, heads=2, rows=8, head_dim=8, device=torch.device("cpu"), dtype=torch.float32)
        cache.clear()
        view = View(causal=False, mask=mask, rope=None, cache=cache, rows=torch.tensor([4, 5]), row_start=4, prefix=6)
        with torch.inference_mode():
            results.append(layer(torch.randn(2, 2, 32), view, 0))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    assert len(calls) == 1
    with torch.inference_mode():
        layer(torch.randn(2, 2, 32), View(causal=True, mask=None, rope=None), 0)
        boolean = View(causal=False, mask=visible, rope=None, cache=cache, rows=torch.tensor([4, 5]), prefix=6)
        layer(torch.randn(2, 2, 32), boolean, 0)
    assert len(calls) == 1


def test_what_goes_to_pytorch():
    query, key, _, bias = case(1, 4, 2, 3, 20, 16, masked=True)
    with torch.inference_mode():
        assert runs_here(query, key, bias) == INTERPRETED
        assert not runs_here(query, key, bias > -1)
        assert not runs_here(query.expand(1, 4, 3, 16).repeat(1, 1, 11, 1), key, None)
    assert not runs_here(query, key, bias)


@pytest.mark.parametrize("batch", [2, 16, 64, 1024])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (20, 20), (16, 4), (12, 12), (16, 1)])
@pytest.mark.parametrize("width", [8, 48, 64, 128, 256])
def test_every_cut_fits_the_device(batch, heads, kv_heads, width):
    for fed in (1, 3, 4, 8, 16, 31, 32):
        for prefix in (1, 10, 64, 65, 256, 576, 2304):
            tile = pick_tile(heads=heads, kv_heads=kv_heads, batch=batch, fed=fed, prefix=prefix, width=width)
            asked = tile.shared * heads // kv_heads * fed
            assert kv_heads % tile.shared == 0
            assert tile.shared == 1 or asked <= tile.queries
            assert 16 <= tile.rows * tile.shared <= 128
            buffers = max(1, tile.stages - 1) * 2 * tile.rows * tile.shared * max(32, 1 << (2 * width - 1).bit_length())
            assert buffers <= 64 * 1024


SIGNATURE = dict.fromkeys(("query", "key", "value", "bias", "out", "peaks", "sums"), "*bf16") | {"scale": "fp32"}


@compiled
@pytest.mark.parametrize("kept", ["*bf16", "*fp8e4nv"])
@pytest.mark.parametrize(
    ("rows", "shared", "queries", "warps", "stages", "biased", "held"),
    [
        (64, 1, 16, 2, 3, False, 0),
        (64, 1, 32, 4, 3, True, 0),
        (128, 1, 16, 8, 3, False, 2),
        (128, 1, 32, 8, 3, True, 2),
        (16, 4, 16, 2, 2, False, 0),
        (16, 1, 32, 1, 2, False, 0),
    ],
)
def test_it_compiles_for_hopper_with_wide_loads(rows, shared, queries, warps, stages, biased, held, kept):
    from vgen.layers.short_attention_kernels import attend_prefix

    constants = {"KV_HEADS": 16, "GROUP": 1, "WIDTH": 64, "DIM": 64, "SHARED": shared, "QUERIES": queries}
    constants |= {"ROWS": rows, "WAY_ROWS": WAY_ROWS, "BIASED": biased, "SPLIT": False}
    constants |= {"EARLY": rows == 128, "HELD": held}
    types, odd = SIGNATURE | {"key": kept, "value": kept}, ("fed", "prefix", "settled", "span")
    code = compiled_for_hopper(
        attend_prefix, constants, types, usual="i32", odd=odd, num_warps=warps, num_stages=stages
    ).asm["ptx"]
    assert "mma.sync.aligned.m16n8k16" in code
    assert ".local" not in code
    if held:
        held = code[code.index("griddepcontrol.wait") :]
        held = held[: held.index("bra")]
        together = held[: held.index("st.shared")]
        # All of the pass and the bias in one round trip; then one exchange between warps at the end.
        assert together.count("ld.global.v4.b32") >= (12 if kept == "*bf16" else 8)
        assert "bar.sync" in together
        assert "ld.global" not in held[len(together) :]
        assert biased or held.count("bar.sync") <= 16
        return
    assert ("cvt.rn.f16x2.e4m3x2" in code) == (kept == "*fp8e4nv")
    assert not any(word in code for word in ("ld.global.b16", "ld.global.b32", "ld.shared.b8", "cvt.bf16.f16"))
    # Rows of one byte of a narrow tile are half of the widest load.
    assert "cp.async.ca" not in code or (kept == "*fp8e4nv" and rows * shared < 64)
    assert "cp.async.cg.shared.global" in code


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sizes", [(2, 16, 16, 1, 256, 64), (2, 16, 16, 31, 700, 64), (2, 16, 16, 4, 1, 64)])
@pytest.mark.parametrize("copies", [1, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(sizes, copies, masked):
    batch, *rest = sizes
    query, key, value, bias = case(batch * copies, *rest, torch.bfloat16, masked=masked, device="cuda")
    out = short_attention(query, key, value, bias=bias)
    right = expected(query, key, value, bias)
    usual = attend(query, key, value, causal=False, mask=bias, dropout=0.0).transpose(1, 2).flatten(2)
    assert (out.float() - right).abs().max() <= 1.5 * (usual.float() - right).abs().max() + 1e-3
    assert torch.equal(out, short_attention(query, key, value, bias=bias))
