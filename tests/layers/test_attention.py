import torch

from vgen.layers.attention import Attention, View
from vgen.layers.cache import KVCache
from vgen.layers.drop_path import DropPath
from vgen.layers.mlp import swiglu_width
from vgen.layers.rope import rope_table


def make(heads=4, kv_heads=2):
    torch.manual_seed(0)
    return Attention(dim=32, heads=heads, kv_heads=kv_heads, dropout=0.0, residual_dropout=0.0).eval()


def test_grouped_query_attention_equals_repeated_key_value_heads():
    grouped = make(kv_heads=2)
    full = make(kv_heads=4)
    query, key, value = grouped.wqkv.weight.split([32, 16, 16])
    repeat = [part.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for part in (key, value)]
    full.wqkv.weight.data = torch.cat([query, *repeat])
    full.wo.weight.data = grouped.wo.weight.data.clone()
    x = torch.randn(2, 6, 32)
    view = View(causal=True, mask=None, rope=rope_table((6,), 8)[:6])
    torch.testing.assert_close(grouped(x, view, 0), full(x, view, 0), atol=1e-6, rtol=1e-5)


def test_mask_and_causal_flag_agree():
    attention, x, rope = make(), torch.randn(2, 6, 32), rope_table((6,), 8)[:6]
    causal = attention(x, View(causal=True, mask=None, rope=rope), 0)
    masked = attention(x, View(causal=False, mask=torch.ones(6, 6, dtype=torch.bool).tril(), rope=rope), 0)
    torch.testing.assert_close(causal, masked, atol=1e-6, rtol=1e-5)


def test_cache_writes_by_index_and_by_slice_alike():
    key, value = torch.randn(2, 1, 2, 3, 4)
    results = []
    for start in (2, -1):
        cache = KVCache(layers=1, batch=1, heads=2, rows=8, head_dim=4, device=torch.device("cpu"), dtype=torch.float32)
        cache.clear()
        got_key, got_value = cache.write(0, key, value, torch.tensor([2, 3, 4]), start, 5)
        assert torch.equal(got_key[:, :, 2:], key)
        assert torch.equal(got_value[:, :, 2:], value)
        assert got_key.shape[2] == 5
        results.append(cache.buffer.clone())
    assert torch.equal(*results)


def test_drop_path_keeps_the_mean_and_is_off_in_eval():
    torch.manual_seed(0)
    layer, x = DropPath(0.3), torch.ones(20000, 2)
    out = layer.train()(x)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert (out[:, 0] == out[:, 1]).all()
    assert abs(out.mean().item() - 1) < 0.02
    assert torch.equal(layer.eval()(x), x)


def test_swiglu_width_of_the_published_sizes():
    widths = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 2048: 5632, 2560: 6912, 3200: 8704, 4096: 11008}
    assert {dim: swiglu_width(dim) for dim in widths} == widths
