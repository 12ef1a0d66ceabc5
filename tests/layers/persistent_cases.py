"""The kernel of a whole pass against the plain layers; test_persistent.py runs this file under Triton's interpreter.

Half precision is float16 here: the interpreter has no bfloat16 products. There is one program, so nobody waits.
"""

import copy

import pytest
import torch

from tests.generators.helpers import tiny_generator
from tests.layers.fused_cases import assert_as_good
from vgen.layers import persistent
from vgen.layers.attention import View, additive_mask
from vgen.layers.persistent import Cut, PersistentBlocks, use_cuts
from vgen.layers.tiles import Tile
from vgen.schedules.neighboring import neighboring
from vgen.schedules.raster import raster

BY_ROW = Tile("by_row", 4, 32, 4)
HELD = Tile("held", 8, 8, 4, 1, parts=4)
CUTS = {
    "by_row": Cut(dict.fromkeys(("project", "wo", "gate", "w2"), BY_ROW), warps=4, programs=2),
    "held": Cut(dict.fromkeys(("project", "wo", "gate", "w2"), HELD), warps=4, programs=1),
    "mixed": Cut(
        {"project": HELD, "wo": Tile("held", 16, 16, 4, 2), "gate": Tile("held", 16, 32, 4, 2), "w2": HELD},
        warps=8,
        programs=1,
    ),
}


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def case(dtype, *, batch, fed, settled, rope="shared", rows="consecutive", masked=False, plan=None, **options):
    """A generator, a view on a filled cache and a stream."""
    plan = plan or raster(grid=(4, 4))
    generator = tiny_generator(plan, depth=3, **options).to(dtype)
    attention = generator.layers[0].attention
    cache = generator.new_cache(batch + 1, 40)
    cache.narrow(batch)
    cache.buffer.copy_(torch.randn(cache.buffer.shape))
    angles = torch.rand(*([batch] if rope == "own" else []), fed, attention.head_dim // 2) * 6
    table = None if rope == "none" else torch.stack([angles.cos(), angles.sin()], -1)
    where = torch.arange(settled, settled + fed)
    if rows == "own":
        where = torch.stack([settled + torch.randperm(fed) for _ in range(batch)])
    prefix = settled + fed
    mask = None
    if masked:
        seen = torch.rand(fed, prefix) > 0.4
        seen[:, -1] = True
        mask = additive_mask(seen, dtype)
    view = View(
        causal=False, mask=mask, rope=table, cache=cache, rows=where, row_start=-1, prefix=prefix, settled=settled
    )
    return generator, view, torch.randn(batch, fed, 32).to(dtype)


def plain(generator, view, x, states):
    """The streams and the cache of the plain layers."""
    view = View(**vars(view) | {"cache": copy.copy(view.cache)})
    view.cache.buffer = view.cache.buffer.to(x.dtype, copy=True)
    if view.mask is not None:
        view = View(**vars(view) | {"mask": view.mask.to(x.dtype)})
    streams = []
    for index, block in enumerate(generator.layers):
        x = block(x, view, index)
        streams.append(x)
    return streams[-states:], view.cache.buffer


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize(
    ("batch", "fed", "settled", "options"),
    [
        (2, 1, 0, {}),
        (2, 1, 17, {"rope": "own", "rows": "own"}),
        (1, 3, 5, {"masked": True, "rope": "none"}),
        (2, 4, 30, {"masked": True, "kv_heads": 1, "rows": "own"}),
        (2, 9, 11, {"plan": neighboring(grid=(4, 4))}),
    ],
)
def test_a_whole_pass_is_as_good_as_the_plain_layers(name, batch, fed, settled, options):
    if name == "by_row" and batch * fed > 4:
        pytest.skip("products by rows are for four of them")
    generator, view, x = case(torch.float16, batch=batch, fed=fed, settled=settled, **options)
    states = generator.num_readouts
    low, low_cache = plain(generator, view, x, states)
    exact, exact_cache = plain(copy.deepcopy(generator).float(), view, x.float(), states)
    before = persistent.cuts_in_use()
    generator.fuse_decoding()
    try:
        use_cuts(((32, (CUTS[name],)),))
        got = PersistentBlocks([block.plain() for block in generator.layers]).run(x, view, states)
    finally:
        use_cuts(before)
    assert len(got) == states
    for mine, theirs, best in zip(got, low, exact, strict=True):
        assert_as_good(mine, theirs, best)
    assert_as_good(view.cache.buffer, low_cache, exact_cache)
