"""The fused kernels against the plain layers; test_fused.py runs this file under Triton's interpreter.

Half precision is float16 here: the interpreter has no bfloat16 products.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from benchmarks import kernels as kernel_benchmark
from benchmarks.tiles import candidates, read_tiles
from tests.generators.helpers import tiny_generator
from vgen.errors import UserError
from vgen.generators.block import Block
from vgen.generators.conditioning import TextCondition
from vgen.generators.transformer import Transformer
from vgen.layers import attention, few_rows, fused, many_rows
from vgen.layers.attention import Attention, View
from vgen.layers.cache import KVCache
from vgen.layers.handoff import Handoff
from vgen.layers.norm import RMSNorm
from vgen.layers.tiles import FEW, MEASURED, Tile, best_tile, tiles_for, use_tiles
from vgen.sampling.decode import decode
from vgen.sampling.engine import Decoder
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.neighboring import neighboring
from vgen.schedules.randar import randar
from vgen.schedules.raster import raster
from vgen.schedules.zipar import zipar

ROWS = [(2, torch.float16), (3, torch.float16), (4, torch.float32), (7, torch.float16), (17, torch.float32)]
ROWS += [(64, torch.float16)]
TILES = [
    Tile("by_row", 4, 32, 4),
    Tile("held", 16, 32, 4, 1),
    Tile("held", 8, 8, 4, 2, parts=4),
    Tile("held", 4, 8, 4, 1, parts=8),
    Tile("streamed", 16, 16, 2, 3),
    Tile("streamed", 8, 32, 4, 3, parts=2),
]


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def norm_of(dim, *, affine=True):
    norm = RMSNorm(dim, affine=affine)
    if affine:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm.requires_grad_(False)


def assert_as_good(got, plain, exact):
    """As near to the exact result as the plain layers are, give or take half."""
    ours, theirs, size = (t.pow(2).mean().sqrt() for t in (got.float() - exact, plain.float() - exact, exact))
    assert ours <= 1.5 * theirs + 1e-6 * size, (ours, theirs)


def tiles(rows):
    return [tile for tile in TILES if tile.kind != "by_row" or rows <= 4]


@pytest.mark.parametrize(("rows", "dtype"), ROWS)
@pytest.mark.parametrize(("width", "outer"), [(64, 16), (40, 12)])
def test_products_of_few_rows(rows, dtype, width, outer):
    norm = norm_of(width, affine=rows != 2)
    x, weight, second, residual = (
        torch.randn(*shape) for shape in [(1, rows, width), (outer, width), (outer, width), (1, rows, outer)]
    )
    low = [t.to(dtype) for t in (x, weight, second, residual)]
    exact = [t.float() for t in low]
    low_norm = copy.deepcopy(norm).to(dtype)
    exact_norm = copy.deepcopy(low_norm).float()

    def plain(norm, x, weight, second, residual):
        normal = norm(x)
        return residual + F.linear(x, weight), F.silu(F.linear(normal, weight)) * F.linear(normal, second)

    for tile in tiles(rows):
        got = (
            few_rows.add_rows(low[0], low[1], low[3], tile)[0],
            few_rows.gate_rows(low[0], low_norm, torch.cat([low[1], low[2]]), tile),
        )
        for mine, theirs, best in zip(got, plain(low_norm, *low), plain(exact_norm, *exact), strict=True):
            assert mine.dtype == dtype
            assert_as_good(mine, theirs, best)


@pytest.mark.parametrize(
    ("rows", "width", "tile"),
    [
        (3, 96, Tile("held", 16, 16, 4, 2, parts=2, splits=2)),
        (20, 128, Tile("held", 8, 16, 4, 2, splits=4)),
        (20, 80, Tile("held", 4, 16, 4, 2, parts=2, splits=2)),  # 20 numbers per part: two steps, one not full
        (9, 128, Tile("streamed", 16, 16, 2, 3, splits=4)),
    ],
)
def test_programs_that_share_the_inner_axis(rows, width, tile):
    x, weight, residual = (torch.randn(*shape).half() for shape in [(1, rows, width), (12, width), (1, rows, 12)])
    got, _ = few_rows.add_rows(x, weight, residual, tile)
    plain = residual + F.linear(x, weight)
    assert_as_good(got, plain, residual.float() + F.linear(x.float(), weight.float()))
    assert torch.equal(got, few_rows.add_rows(x, weight, residual, tile)[0])


def test_a_block_whose_products_share_the_inner_axis_is_right_again_and_again(monkeypatch):
    block = tiny_generator(raster(grid=(2, 2))).half().layers[0]
    x, seen = (torch.randn(3, 1, 32).half() for _ in range(2))
    given = (x, seen, block.ffn_norm, block.attention, block.feed_forward)
    expected, _ = fused.behind(*given)
    # What the counters hold at first must not matter.
    monkeypatch.setattr(fused, "arrivals_of", lambda *given, make=few_rows.arrivals_of: make(*given).fill_(7))
    shared = Tile("held", 8, 16, 4, 2, splits=2)
    try:
        use_tiles({product: ((64, replace(shared, splits=2 if product == "w2" else 1)),) for product in MEASURED})
        assert best_tile("w2", 3, block.feed_forward.w2.in_features).splits == 2
        for _ in range(2):
            torch.testing.assert_close(fused.behind(*given)[0], expected, rtol=1e-2, atol=1e-2)
    finally:
        use_tiles(None)
    with pytest.raises(ValueError, match="splits=1"):
        Tile("by_row", 4, 512, 2, splits=2)


def attention_case(dtype, *, batch, fed, heads, kv_heads, head_dim, rope, rows):
    dim = heads * head_dim
    attention = Attention(dim=dim, heads=heads, kv_heads=kv_heads, dropout=0.0, residual_dropout=0.0)
    attention = attention.requires_grad_(False).eval().to(dtype)
    norm = norm_of(dim).to(dtype)
    cache = KVCache(
        layers=2, batch=batch + 1, heads=kv_heads, rows=40, head_dim=head_dim, device=torch.device("cpu"), dtype=dtype
    )
    cache.narrow(batch)
    angles = torch.rand(*([batch] if rope == "own" else []), fed, head_dim // 2) * 6
    table = None if rope == "none" else torch.stack([angles.cos(), angles.sin()], -1)
    start, where = -1, torch.randperm(40)[:fed]
    if rows == "consecutive":
        start, where = 3, torch.arange(3, 3 + fed)
    elif rows == "own":
        where = torch.stack([torch.randperm(40)[:fed] for _ in range(batch)])
    view = View(causal=False, mask=None, rope=table, cache=cache, rows=where, row_start=start, prefix=40)
    return norm, attention, view, torch.randn(batch, fed, dim).to(dtype)


@pytest.mark.parametrize(
    ("batch", "fed", "dtype", "heads", "kv_heads", "head_dim", "rope", "rows"),
    [
        (1, 1, torch.float16, 2, 2, 16, "shared", "consecutive"),
        (3, 1, torch.float32, 2, 1, 12, "own", "own"),
        (2, 5, torch.float16, 2, 1, 12, "own", "own"),
        (2, 1, torch.float32, 2, 1, 8, "none", "scattered"),
        (3, 3, torch.float32, 2, 2, 16, "shared", "scattered"),
    ],
)
def test_projections_reach_the_cache(batch, fed, dtype, heads, kv_heads, head_dim, rope, rows):
    norm, attention, view, x = attention_case(
        dtype, batch=batch, fed=fed, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, rows=rows
    )
    places = (view.rows, view.row_start, 40)

    def plain(norm, attention, x):
        query, key, value = attention.project(norm(x), view.rope)
        store = copy.copy(view.cache)
        store.buffer = torch.zeros_like(view.cache.buffer, dtype=x.dtype)
        store.write(1, key, value, *places)
        return query, store.buffer

    exact = plain(copy.deepcopy(norm).float(), copy.deepcopy(attention).float(), x.float())
    low = plain(norm, attention, x)
    query = x.new_empty(batch, fed, heads, head_dim)
    keys, values = view.cache.buffer[1]
    rotate = (query, keys, values, view.rope, view.rows)
    for tile in tiles(batch * fed):
        view.cache.buffer.zero_()
        few_rows.project_rows(x, norm, attention.wqkv.weight, *rotate, tile)
        assert_as_good(query.transpose(1, 2), low[0], exact[0])
        assert_as_good(view.cache.buffer, low[1], exact[1])
    view.cache.buffer.zero_()
    many_rows.rotate_many(F.linear(many_rows.norm_many(x, norm)[1], attention.wqkv.weight), *rotate)
    torch.testing.assert_close(query.transpose(1, 2), low[0])
    torch.testing.assert_close(view.cache.buffer, low[1])


@pytest.mark.parametrize(("rows", "affine", "splits"), [(2, True, 1), (3, False, 2), (20, True, 2)])
def test_half_a_norm_is_done_where_its_input_is_made(rows, affine, splits):
    norm, attention, view, seen = attention_case(
        torch.float16, batch=rows, fed=1, heads=2, kv_heads=1, head_dim=20, rope="shared", rows="consecutive"
    )
    norm = norm if affine else norm_of(40, affine=False)
    tile = Tile("held", 8, 16, 4, 2, splits=splits)
    x, ready = few_rows.add_rows(seen, attention.wo.weight, torch.randn_like(seen), tile, following=norm)
    assert ready.of is x
    assert ready.squares.shape == (5, rows)
    torch.testing.assert_close(ready.squares.sum(0), x.flatten(0, 1).float().square().sum(1))
    torch.testing.assert_close(ready.scaled, x * norm.weight if affine else x, rtol=1e-3, atol=1e-3)
    gates = torch.randn(2 * 12, 40).half()
    normal = norm(x.float())
    query = x.new_empty(rows, 1, 2, 20)
    targets = (query, *view.cache.buffer[1], view.rope, view.rows)
    for tile in tiles(rows):
        # What is ready is taken: the input itself is not looked at.
        blind = torch.full_like(x, torch.nan)
        got = few_rows.gate_rows(blind, norm, gates, tile, ready=ready)
        a, b = F.linear(normal, gates.float()).chunk(2, -1)
        torch.testing.assert_close(got.float(), F.silu(a) * b, rtol=2e-2, atol=2e-2)
        few_rows.project_rows(blind, norm, attention.wqkv.weight, *targets, tile, ready=ready)
        expected = attention.project(norm(x), view.rope)[0]
        torch.testing.assert_close(query.transpose(1, 2), expected, rtol=1e-2, atol=1e-2)


def test_what_was_left_for_one_tensor_does_not_count_for_another():
    norm, attention, view, x = attention_case(
        torch.float16, batch=2, fed=1, heads=2, kv_heads=1, head_dim=16, rope="shared", rows="consecutive"
    )
    expected = fused.before(x, norm, attention, view, 1)
    void = torch.full_like(x, torch.nan)
    squares = torch.full((1, 2), torch.nan)
    view.relay.last = Handoff(x.clone(), void, squares)
    assert torch.equal(fused.before(x, norm, attention, view, 1), expected)
    view.relay.last = Handoff(x, void, squares)
    assert fused.before(x, norm, attention, view, 1).isnan().all()


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("batch", [2, 30])
def test_tokens_become_vectors(batch, own):
    table, ids = torch.randn(11, 24).half(), torch.randint(11, (batch, 7))[:, :6]
    index = torch.randint(6, (batch, 3)) if own else torch.tensor([4, 0, 5])
    expected = table[ids.gather(1, index) if own else ids[:, index]]
    norm = norm_of(24).half()
    got, ready = fused.embed(table, ids, index, following=norm)
    assert torch.equal(got, expected)
    if batch * 3 > FEW:
        assert ready is None
    else:
        assert ready.of is got
        assert torch.equal(ready.scaled, expected * norm.weight)
        torch.testing.assert_close(ready.squares[0], expected.flatten(0, 1).float().square().sum(1))
    assert fused.embed(table, ids, index)[1] is None
    assert fused.can_embed(torch.nn.Embedding(3, 4))
    assert not fused.can_embed(torch.nn.Embedding(3, 4, max_norm=1.0))
    with torch.enable_grad():
        assert not fused.can_embed(torch.nn.Embedding(3, 4))


@pytest.mark.parametrize("rope", ["shared", "own"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (4, 2, 12)])
@torch.enable_grad()
def test_training_cuts_and_rotates_projections(heads, kv_heads, head_dim, rope, monkeypatch):
    layer = Attention(dim=heads * head_dim, heads=heads, kv_heads=kv_heads, dropout=0.0, residual_dropout=0.0)
    angles = torch.rand(*([3] if rope == "own" else []), 5, head_dim // 2) * 6
    table = torch.stack([angles.cos(), angles.sin()], -1)
    table[..., 0, :, :] = 0.0  # a slot without a place
    x, runs = torch.randn(3, 5, heads * head_dim), []
    for layer.fused_rotation in (False, True):
        view, given = View(causal=True, mask=None, rope=table), x.clone().requires_grad_()
        parts = layer.project(given, table)
        (layer(given, view, 0).sin().sum() + sum(part.square().sum() for part in parts)).backward()
        runs.append([*parts, given.grad, layer.wqkv.weight.grad])
        layer.zero_grad()
    for plain, ours in zip(*runs, strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-5)
    monkeypatch.setattr(attention, "split_and_rotate", None)
    with torch.no_grad():
        torch.testing.assert_close(layer.project(x, table)[0], runs[0][0], atol=1e-6, rtol=1e-6)


@torch.enable_grad()
def test_the_rotation_is_an_operator_that_compilers_know():
    table = torch.randn(5, 4, 2)
    projected = torch.randn(2, 5, 64, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vgen.split_and_rotate.default, (projected, table, 4, 2), test_utils=checks)
    gradients = [torch.randn(2, heads, 5, 8) for heads in (4, 2, 2)]
    torch.library.opcheck(torch.ops.vgen.join_rotated.default, (*gradients, table), test_utils=checks)
    layer = Attention(dim=32, heads=4, kv_heads=2, dropout=0.0, residual_dropout=0.0)
    layer.fused_rotation = True
    x, runs = torch.randn(2, 5, 32), []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        given = x.clone().requires_grad_()
        run(given, View(causal=True, mask=None, rope=table), 0).square().sum().backward()
        runs.append(given.grad)
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3, 10, 25], ids=lambda batch: f"{3 * batch} rows")
def test_heads_are_read_in_turn(batch, heads):
    states = [torch.randn(batch, 2, 48).half() for _ in range(heads)]
    norms = [norm_of(48).half() for _ in range(heads)]
    weights = [(torch.randn(70, 48) / 7).half() for _ in range(heads)]
    sources, shares = torch.tensor([[0, 1, -1], [-1, 1, 0]]), torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]])
    if heads == 1:
        sources, shares = torch.tensor([[1, 0, 1]]), torch.ones(1, 3)
    got = fused.read(states, norms, weights, list(sources), None if heads == 1 else list(shares))
    total = torch.zeros(batch, 3, 70)
    for state, norm, weight, source, share in zip(states, norms, weights, sources, shares, strict=True):
        normal = copy.deepcopy(norm).float()(state.float())[:, source.clamp(min=0)] * share[:, None]
        total += normal @ weight.float().T
    assert got.dtype == (torch.float32 if 3 * batch <= 32 else torch.float16)
    torch.testing.assert_close(got.float(), total, atol=6e-3, rtol=2e-3)


def test_every_norm_of_a_pass_finds_what_was_left_for_it(monkeypatch):
    plan = raster(grid=(1, 3))
    generator = tiny_generator(plan).half()
    generator.fuse_decoding()
    found = []
    for name in ("project_rows", "gate_rows"):
        run = getattr(fused, name)
        monkeypatch.setattr(
            fused, name, lambda *given, run=run, **more: found.append(more["ready"] is not None) or run(*given, **more)
        )
    decode(generator, plan, torch.tensor([1, 2]), sampling=Sampling(), sample_index=torch.arange(2))
    # The first pass feeds the condition, which no kernel of ours made.
    first = [False, True, True, True]
    assert found == first + [True] * 4 * (plan.num_tokens - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_lies_between_products_of_many_rows(dtype):
    x, delta, both = (torch.randn(5, 14, width).to(dtype) for width in (48, 48, 40))
    for norm in (norm_of(48).to(dtype), norm_of(48, affine=False)):
        total, normal = many_rows.norm_many(x, norm, delta)
        torch.testing.assert_close(total, x + delta, rtol=0, atol=0)
        torch.testing.assert_close(normal, norm(x + delta))
        torch.testing.assert_close(many_rows.norm_many(x, norm)[1], norm(x))
    torch.testing.assert_close(many_rows.gate_many(both), F.silu(both[..., :20]) * both[..., 20:])


@pytest.mark.parametrize("batch", [3, 65])
def test_results_do_not_change_from_run_to_run(batch):
    block = tiny_generator(raster(grid=(2, 2))).half().layers[0]
    x, seen = (torch.randn(batch, 1, 32).half() for _ in range(2))
    runs = [fused.behind(x, seen, block.ffn_norm, block.attention, block.feed_forward)[0] for _ in range(2)]
    assert torch.equal(*runs)


PLANS = {
    "raster": raster(grid=(2, 3)),
    "neighboring": neighboring(grid=(3, 3)),
    "zipar": zipar(grid=(2, 3), window=2),
    "adaptive": zipar(grid=(2, 3), window=2, adaptive=True),
    "randar": randar(grid=(2, 3), steps=3),
}


@pytest.mark.parametrize("name", PLANS)
def test_decoding_draws_the_tokens_of_the_plain_network(name):
    plan = PLANS[name]
    generator = tiny_generator(plan, kv_heads=1, depth=1)
    labels = torch.tensor([1, 2])
    shared = {"sampling": Sampling(seed=1, guidance=Guidance(scale=2.0, end=4)), "sample_index": torch.arange(2)}
    expected = decode(generator, plan, labels, **shared)
    calls, asked = [], []
    before, short = fused.before, attention.short_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "before", lambda *given: calls.append(1) or before(*given))
        patch.setattr(attention, "short_attention", lambda *given, **more: asked.append(1) or short(*given, **more))
        decoder = Decoder(generator, plan, engine="fused", record=lambda run, device: run)
        assert torch.equal(decoder(labels, **shared), expected)
    assert calls
    assert len(asked) == len(calls)
    assert not generator.fused
    assert torch.equal(decode(generator, plan, labels, **shared), expected)


@pytest.mark.parametrize("rows", ["consecutive", "own"])
def test_projections_reach_a_cache_of_one_byte_per_number(rows):
    sizes = {"batch": 2, "fed": 3, "heads": 2, "kv_heads": 1, "head_dim": 16, "rope": "own"}
    norm, layer, view, x = attention_case(torch.float16, **sizes, rows=rows)
    query, buffer = x.new_empty(2, 3, 2, 16), view.cache.buffer.to(torch.float8_e4m3fn).zero_()
    view.cache.buffer = buffer
    _, key, value = layer.project(norm(x), view.rope)
    view.cache.write(1, key, value, view.rows, view.row_start, 40)
    plain = buffer[1].float()
    targets = (query, *buffer[1], view.rope, view.rows)
    for tile in (*tiles(6), None):
        buffer.zero_()
        if tile:
            few_rows.project_rows(x, norm, layer.wqkv.weight, *targets, tile)
        else:
            many_rows.rotate_many(F.linear(many_rows.norm_many(x, norm)[1], layer.wqkv.weight), *targets)
        # The interpreter rounds a few in a hundred wrongly, where a carry runs through to the exponent.
        assert (buffer[1].float() == plain).float().mean() > 0.95


def test_padded_captions_reach_the_attention_kernel():
    plan = raster(grid=(2, 3), num_condition=4)
    condition = TextCondition(caption_dim=6, num_slots=4, dim=32)
    generator = Transformer(vocab_size=11, grid=(2, 3), condition=condition, dim=32, depth=1, heads=2).eval()
    for weight in generator.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    shared = {"sampling": Sampling(guidance=Guidance(scale=2.0)), "sample_index": torch.arange(2)}
    shared["padding"] = torch.tensor([[False, False, True, True], [False, True, True, True]])
    text, asked, short = torch.randn(2, 4, 6), [], attention.short_attention
    expected = decode(generator, plan, text, **shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "short_attention", lambda *given, **more: asked.append(1) or short(*given, **more))
        assert torch.equal(
            Decoder(generator, plan, engine="fused", record=lambda run, _: run)(text, **shared), expected
        )
    assert len(asked) == plan.num_passes
    other = shared | {"padding": torch.ones(2, 4, dtype=torch.bool)}
    assert not torch.equal(decode(generator, plan, text, **other), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_of_half_precision_are_as_good_as_those_of_the_plain_network(batch):
    plan = neighboring(grid=(1, 2))
    generator = tiny_generator(plan, depth=1).half()
    network = copy.deepcopy(generator).float()
    ids = torch.randint(23, (batch, plan.num_tokens))

    def passes(generator):
        embedded = generator.embed_condition(torch.arange(batch) % 5)
        cache = generator.new_cache(batch, plan.num_rows)
        return [generator.step(ids, embedded, forward, plan.order, cache).float() for forward in plan.forwards]

    exact, plain = passes(network), passes(generator)
    generator.fuse_decoding()
    for mine, theirs, best in zip(passes(generator), plain, exact, strict=True):
        ours, others = ((logits - best).pow(2).mean().sqrt() for logits in (mine, theirs))
        assert 0 < ours <= 2 * others


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"qk_norm": "rms"},
        {"norm": "layer"},
        {"ffn": "gelu"},
        {"norm_position": "post"},
        {"adaln": ["condition"]},
        {"long_skips": True, "depth": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_blocks_run_as_before(options):
    plan = raster(grid=(1, 2))
    generator = tiny_generator(plan, **({"depth": 1} | options))
    shared = {"sampling": Sampling(greedy=True), "sample_index": torch.arange(2)}
    expected = decode(generator, plan, torch.tensor([0, 1]), **shared)
    decoder = Decoder(generator, plan, engine="fused", record=lambda run, device: run)
    assert torch.equal(decoder(torch.tensor([0, 1]), **shared), expected)


def test_only_passes_without_gradients_are_fused():
    generator = tiny_generator(raster(grid=(2, 2)))
    block = generator.layers[0]
    assert isinstance(block, Block)
    cache = generator.new_cache(1, 5)
    x, rows = torch.randn(1, 1, 32), torch.zeros(1, dtype=torch.int64)
    view = View(causal=False, mask=None, rope=None, cache=cache, rows=rows, row_start=0, prefix=1)
    assert fused.can_run(x, block.attention, view)
    assert not fused.can_run(x.bfloat16(), block.attention, view)
    assert not fused.can_run(x, block.attention, View(causal=True, mask=None, rope=None))
    with torch.autocast("cpu"):
        assert not fused.can_run(x, block.attention, view)
    with torch.enable_grad():
        assert not fused.can_run(x, block.attention, view)
    block.train()
    assert not fused.can_run(x, block.attention, view)


def test_the_benchmark_prints_a_line_per_step(capsys, monkeypatch):
    # The interpreter takes its time for every row and column.
    monkeypatch.setattr(kernel_benchmark, "FEW", 2)
    monkeypatch.setattr(kernel_benchmark, "swiglu_width", lambda dim: 48)
    tiny = ["--size", "tiny", "--layers", "1", "--device", "cpu", "--dtype", "float16", "--vocab", "40"]
    kernel_benchmark.main([*tiny, "--rows", "1", "3"])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 ", "| 3 "))]
    assert [line[2].strip() for line in lines] == [
        *("project", "add (wo)", "gate", "add (w2)", "read", "layer"),
        *("project", "gate", "layer"),
    ]
    assert all(float(line[8]) < 3e-3 for line in lines if "layer" not in line[2])


def test_the_best_of_a_sweep_becomes_the_table(capsys, tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    # The interpreter takes a second for three tiles.
    monkeypatch.setattr(kernel_benchmark, "swiglu_width", lambda dim: 48)
    monkeypatch.setattr(kernel_benchmark, "candidates", lambda product, rows: candidates(product, rows)[:1])
    monkeypatch.setattr(kernel_benchmark, "TRIED", 1)
    tiny = ["--size", "tiny", "--layers", "1", "--device", "cpu", "--dtype", "float16", "--vocab", "40"]
    kernel_benchmark.main([*tiny, "--rows", "7", "--sweep", "--choose", str(path)])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| 7 ")]
    errors = [float(line[8]) for line in lines if line[2].strip() != "layer"]
    assert len(errors) > 8
    assert max(errors) < 3e-3
    assert tiles_for("wo", 1024) is MEASURED["wo"]
    try:
        use_tiles(read_tiles(path, 1024))
        for product in MEASURED:
            entries = tiles_for(product, 5000)
            assert [most for most, _ in entries] == [2, 4, 8, 16, 32, 64]
            own, given = dict(MEASURED[product]), dict(entries)
            assert all(given[most] == own[most] for most in own if most != 8)
            known = {tile.columns for tile in (own[8], *candidates(product, 7)) if tile}
            assert given[8] is None or given[8].columns in known
    finally:
        use_tiles(None)
    # What the file does not have is that of the network's width.
    long = read_tiles(path, 1280)
    assert [long[product][0] for product in MEASURED] == [tiles_for(product, 9000)[0] for product in MEASURED]
    path.write_text("[]")
    with pytest.raises(UserError, match="not a table of tiles"):
        read_tiles(path, 1024)


@pytest.mark.parametrize("vendor", [("project", "gate"), ("wo", "w2"), ("wo",), ("gate",), ("w2",)], ids="-".join)
def test_products_by_the_library_mix_with_our_own(vendor):
    block = tiny_generator(raster(grid=(2, 2))).half().layers[0]
    x, seen = (torch.randn(5, 1, 32).half() for _ in range(2))
    given = x.clone()
    expected, _ = fused.behind(x, seen, block.ffn_norm, block.attention, block.feed_forward)
    try:
        use_tiles(MEASURED | {product: ((64, None),) for product in vendor})
        mixed, _ = fused.behind(x, seen, block.ffn_norm, block.attention, block.feed_forward)
    finally:
        use_tiles(None)
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(x, given)


def test_long_rows_get_tiles_that_fit():
    assert best_tile("wo", 32, 2816).kind == "held"
    assert best_tile("wo", 32, 20480).kind == "streamed"
    # Eight warps took half as long again for the same product: what is held in shared memory asks for no more of them.
    for width in (1024, 1536, 3200):
        for rows in (4, 8, 16, 32):
            tile = best_tile("project", rows, width)
            assert (tile.kind, tile.warps) == ("held", 4)
            assert tile.columns * tile.parts == 64
    assert best_tile("w2", 32, 2816, shared_bytes=101376).kind == "held"
    assert best_tile("wo", 32, 8704, shared_bytes=101376).kind == "streamed"
    # Steps that would be filled up by more than a sixth are narrower, like those for which there is no room.
    assert [best_tile("gate", 8, width).inner for width in (1024, 1280, 1536)] == [512, 128, 256]
    assert [best_tile("wo", 32, width).inner for width in (1024, 1280, 1536)] == [1024, 256, 256]
    assert best_tile("read", 2, 2048).warps < best_tile("read", 2, 16384).warps
    # All that is in flight leaves no room for a step more, which anything else needs.
    assert [best_tile("project", 32, width).stages for width in (1024, 1280, 1536)] == [1, 3, 1]
    assert best_tile("w2", 5, 40).inner == 16
    assert best_tile("wo", 65, 40) is None
