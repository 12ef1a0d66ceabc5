import pytest
import torch

from vgen.layers.cache import KVCache


@pytest.mark.parametrize("row_dtype", [None, torch.float8_e4m3fn], ids=["as the rest", "one byte"])
@pytest.mark.parametrize("where", ["consecutive", "scattered", "own"])
def test_rows_are_written_where_they_belong(where, row_dtype):
    cache = KVCache(
        layers=2,
        batch=2,
        heads=3,
        rows=7,
        head_dim=4,
        device=torch.device("cpu"),
        dtype=torch.float32,
        context_heads=1,
        context_rows=2,
        row_dtype=row_dtype,
    )
    assert cache.buffer.dtype == (row_dtype or torch.float32)
    assert cache.beside.dtype == torch.float32
    cache.clear()
    rows, start = {
        "consecutive": (torch.tensor([2, 3]), 2),
        "scattered": (torch.tensor([5, 1]), -1),
        "own": (torch.tensor([[0, 6], [3, 2]]), -1),
    }[where]
    key, value = torch.randn(2, 2, 2, 3, 4).transpose(2, 3)
    seen = cache.write(1, key, value, rows, start, 7)
    for got, given in zip(seen, (key, value), strict=True):
        expected = torch.zeros(2, 3, 7, 4)
        for sample in range(2):
            expected[sample, :, rows[sample] if rows.dim() == 2 else rows] = given[sample]
        assert torch.equal(got.float(), expected.to(cache.buffer.dtype).float())
    assert not cache.buffer[0].float().any()
