import copy
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.generators.helpers import tiny_generator
from tests.hopper import compiled_for_hopper
from tests.paths import ROOT
from vgen.errors import UserError
from vgen.layers import availability, few_rows
from vgen.layers.mlp import SwiGLU
from vgen.layers.tiles import MEASURED, Tile, best_tile, use_tiles
from vgen.sampling.decode import decode
from vgen.sampling.engine import Decoder, pick_engine
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.neighboring import neighboring
from vgen.schedules.raster import raster

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_agree_with_the_plain_layers():
    # Triton decides when it is imported whether it interprets, so this needs a process of its own.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/layers/fused_cases.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def halves(layer):
    return torch.cat([layer.w1.weight, layer.w3.weight])


def test_merged_weights_follow_whatever_changes_them(tmp_path):
    layer = SwiGLU(dim=8, hidden=6, dropout=0.0)
    expected = halves(layer).clone()
    with torch.inference_mode():
        merged = layer.merged()
    assert torch.equal(merged, expected)
    assert torch.equal(halves(layer), expected)
    assert layer.merged() is merged
    assert merged.data_ptr() == layer.w1.weight.data_ptr()

    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
    assert torch.equal(merged, halves(layer))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert layer.merged() is merged
    assert torch.equal(merged, halves(layer))

    save_file(layer.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w3.weight"], layer.w3.weight)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.merged(), halves(layer))
    assert copied.merged().data_ptr() != merged.data_ptr()
    layer.to(torch.float64)
    assert layer.merged().dtype == torch.float64
    assert torch.equal(layer.merged(), halves(layer))
    layer.w3.weight.data = torch.zeros_like(layer.w3.weight)
    assert torch.equal(layer.merged(), halves(layer))


def test_the_engine_that_auto_stands_for(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert pick_engine("auto", cpu) == "eager"
    with pytest.raises(UserError, match="need a CUDA device"):
        pick_engine("fused", cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    try:
        for present, expected in ((True, "fused"), (False, "graph")):
            availability.why_not.cache_clear()
            monkeypatch.setattr(availability, "find_spec", lambda name, present=present: present or None)
            assert pick_engine("auto", gpu) == expected
        with pytest.raises(UserError, match="pip install triton"):
            pick_engine("fused", gpu)
    finally:
        availability.why_not.cache_clear()


SHAPES = {
    "L": {"project": (3072, 1024), "wo": (1024, 1024), "gate": (2816, 1024), "w2": (1024, 2816)},
    "XL": {"project": (3840, 1280), "w2": (1280, 3456)},
}


def compiled_product(product, shape, rows, tile):
    """The kernel of a product for Hopper."""
    from vgen.layers import few_row_kernels

    kernel = {"project": few_row_kernels.project_rows, "gate": few_row_kernels.gate_rows}.get(
        product, few_row_kernels.add_rows
    )
    constants = few_rows.kernel_constants(torch.empty(*shape, device="meta"), tile, rows) | {"EARLY": True}
    heads = shape[1] // 64
    constants |= {"HEADS": heads, "KV_HEADS": heads, "HEAD_DIM": 64, "ROPE": True, "ADD": True}
    constants |= {"SPLITS": tile.splits, "CLEARED": 64, "SQUARED": True, "NEXT_SCALED": True, "PARTIALS": 16}
    types = dict.fromkeys(("rope", "shares", "squares"), "*fp32")
    types |= {"cache_rows": "*i64", "eps": "fp32", "arrivals": "*i32"}
    types |= dict.fromkeys(("rows", "fed", "rope_batch", "rows_batch", "cache_batch", "cache_head"), "i32")
    odd = ("rows", "fed", "rows_batch")
    return compiled_for_hopper(
        kernel, constants, types, odd=odd, num_warps=tile.warps, num_stages=tile.stages, launch_pdl=True
    )


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@needs_triton
@pytest.mark.parametrize(
    ("size", "product", "rows"),
    [*(("L", product, rows) for product in SHAPES["L"] for rows in (2, 8, 32)), *(("XL", p, 32) for p in SHAPES["XL"])],
)
def test_products_compile_for_hopper_without_spills(size, product, rows, tmp_path):
    shape = SHAPES[size][product]
    compiles_without_spills(product, shape, rows, best_tile(product, rows, shape[1]), tmp_path)


@needs_triton
@pytest.mark.parametrize("splits", [2, 4])
def test_shared_products_compile_for_hopper_without_spills(splits, tmp_path):
    tile = Tile("held", 32, 64, 4, 2, parts=2, splits=splits)
    code = compiles_without_spills("w2", SHAPES["L"]["w2"], 32, tile, tmp_path)
    # What a program wrote is there before it is counted, and is not read from a cache that may be older.
    assert "bar.sync" in code[code.rindex("st.global", 0, code.index("atom.")) : code.index("atom.")]
    assert "atom.global.gpu.acq_rel.add" in code
    assert "ld.global.cg" in code[code.index("atom.") :]


def compiles_without_spills(product, shape, rows, tile, tmp_path):
    import triton

    tile = tile or Tile("streamed", 8, 64, 4, 3)
    compiled = compiled_product(product, shape, rows, tile)
    code = compiled.asm["ptx"]
    assert ("wgmma.mma_async" in code) == (tile.kind == "held")
    assert ("cp.async.cg.shared.global" if tile.kind == "streamed" else "ld.global.v4.b32") in code
    assert compiled.metadata.shared <= 232448
    (tmp_path / "kernel.ptx").write_text(code)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", os.devnull, "kernel.ptx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
    return code


@needs_triton
@pytest.mark.parametrize(("product", "rows"), [("project", 32), ("wo", 8), ("wo", 32), ("w2", 32)])
def test_all_of_x_is_asked_for_before_anything_is_waited_for(product, rows):
    shape = SHAPES["L"][product]
    tile = best_tile(product, rows, shape[1])
    code = compiled_product(product, shape, rows, tile).asm["ptx"]
    behind = code[code.index("griddepcontrol.wait") :]
    asking = behind[: behind.index("st.shared")]
    # By 128 threads, 8 numbers at a time; ptxas moves no load over the barrier.
    assert asking.count("ld.global.v4.b32") >= rows * shape[1] // tile.splits / (128 * 8)
    assert "bar.sync" in asking


@needs_triton
@pytest.mark.parametrize(
    ("product", "rows"), [("project", 2), ("wo", 2), ("gate", 8), ("w2", 8), ("wo", 32), ("gate", 32), ("w2", 32)]
)
def test_sums_need_few_exchanges_between_threads(product, rows):
    shape = SHAPES["L"][product]
    code = compiled_product(product, shape, rows, best_tile(product, rows, shape[1])).asm["ptx"]
    behind = code[code.rindex("wgmma.wait_group") :]
    # One for the sum itself and one or two for squares and shares; left to itself the compiler takes 16 to 40 turns.
    assert behind.count("bar.sync") <= 8
    assert behind.count("shfl.sync") <= 6


@needs_triton
def test_projections_and_their_gradients_move_in_wide_pieces():
    from vgen.layers import many_row_kernels

    constants = {"HEADS": 16, "KV_HEADS": 16, "HEAD_DIM": 64, "COLUMNS": 1024, "ROWS": 1, "ROPE": True, "EARLY": False}
    types = {"rope": "*fp32", "cache_rows": "*i64"} | dict.fromkeys(
        ("projected", "query", "key", "value", "out"), "*bf16"
    )
    for kernel in (many_row_kernels.rotate_many, many_row_kernels.join_rotated):
        odd = ("rows", "fed")
        code = compiled_for_hopper(kernel, constants, types, usual="i32", odd=odd, num_warps=4).asm["ptx"]
        assert "st.global.v4.b32" in code
        assert "ld.global.v4.b32" in code
        assert ".local" not in code


@needs_triton
def test_eight_warps_wait_for_each_other_before_rows_are_stored_over():
    tile = Tile("held", 64, 128, 8, 2)
    code, beside = compiled_product("project", SHAPES["L"]["project"], 32, tile).asm["ptx"], False
    assert code.count("wgmma.wait_group") > 4
    for line in code.splitlines():
        if "wgmma.wait_group" in line:
            beside = True
        elif "bar.sync" in line:
            beside = False
        assert not (beside and "st.shared" in line)


@on_gpu
def test_training_rotates_alike_on_a_gpu():
    generator = tiny_generator(raster(grid=(4, 4)), dim=128).cuda().train()
    ids, labels = torch.randint(23, (3, 16), device="cuda"), torch.arange(3, device="cuda")
    gradients = []
    for fuse in (lambda: None, generator.fuse_rotation):
        fuse()
        generator.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            torch.manual_seed(0)
            generator.logits(ids, labels, raster(grid=(4, 4))).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in generator.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() <= 0.02 * gradients[0].norm()


@on_gpu
@pytest.mark.parametrize("plan", [raster(grid=(4, 4)), neighboring(grid=(4, 4))], ids=["raster", "neighboring"])
@pytest.mark.parametrize("batch", [1, 40])
def test_on_a_gpu_fused_float32_draws_the_tokens_of_eager(plan, batch):
    generator = tiny_generator(plan, dim=128).cuda()
    labels = torch.arange(batch, device="cuda") % 5
    shared = {
        "sampling": Sampling(seed=1, guidance=Guidance(scale=2.0)),
        "sample_index": torch.arange(batch, device="cuda"),
    }
    expected = decode(generator, plan, labels, **shared)
    decoder = Decoder(generator, plan, engine="fused")
    for _ in range(3):
        assert torch.equal(decoder(labels, **shared), expected)


def as_good_as_the_plain_layers(batch, cache_dtype=None):
    plan = raster(grid=(4, 4))
    generator = tiny_generator(plan, dim=768, heads=12).cuda().bfloat16()
    for parameter in generator.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.03)
        else:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    generator.cache_dtype = cache_dtype
    network = copy.deepcopy(generator).float()
    ids = torch.randint(23, (batch, 16), device="cuda")
    tensors = plan.on(torch.device("cuda"))

    @torch.inference_mode()
    def passes(generator):
        embedded = generator.embed_condition(torch.arange(batch, device="cuda") % 5)
        cache = generator.new_cache(batch, plan.num_rows)
        return [generator.step(ids, embedded, forward, tensors.order, cache).float() for forward in tensors.forwards]

    exact, plain = passes(network), passes(generator)
    generator.fuse_decoding()
    runs = [passes(generator) for _ in range(2)]
    assert all(map(torch.equal, *runs))
    # Over all passes: the two dozen logits of a single one are too few to compare the spread of rounding errors.
    ours, others = ((torch.cat(each) - torch.cat(exact)).pow(2).mean().sqrt() for each in (runs[0], plain))
    assert 0 < ours <= 1.3 * others


@on_gpu
@pytest.mark.parametrize("batch", [1, 2, 4, 7, 8, 15, 30, 60, 200])
def test_on_a_gpu_half_precision_is_as_good_as_the_plain_layers(batch):
    as_good_as_the_plain_layers(batch)


@on_gpu
@pytest.mark.parametrize("batch", [1, 30, 200])
def test_on_a_gpu_a_cache_of_one_byte_is_read_and_written_as_the_plain_layers_do(batch):
    as_good_as_the_plain_layers(batch, torch.float8_e4m3fn)


@on_gpu
@pytest.mark.parametrize(
    ("batch", "tile"),
    [
        (5, Tile("held", 16, 256, 4, 4)),
        (16, Tile("held", 8, 128, 4, 2, parts=8)),
        (4, Tile("held", 16, 128, 4, 1, parts=4)),
        (17, Tile("streamed", 16, 128, 2, 4)),
        (30, Tile("streamed", 32, 64, 4, 3, parts=2, early=False)),
        (12, Tile("held", 32, 64, 4, 2, parts=2, splits=4)),
        (60, Tile("held", 16, 128, 8, 4)),
        (60, Tile("held", 32, 128, 8, 1, parts=2)),
    ],
    ids=str,
)
def test_on_a_gpu_every_kind_of_tile_is_as_good_as_the_plain_layers(batch, tile):
    try:
        use_tiles({product: ((64, tile if product == "w2" else replace(tile, splits=1)),) for product in MEASURED})
        as_good_as_the_plain_layers(batch)
    finally:
        use_tiles(None)
