"""The kernels of the draw on the CPU by Triton's interpreter (in a process of its own), compiled, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks import attention as attention_benchmark
from tests.generators.helpers import tiny_generator
from tests.hopper import compiled_for_hopper
from tests.paths import ROOT
from vgen.sampling.decode import decode, guide
from vgen.sampling.draw import draw_tokens, draws_here
from vgen.sampling.engine import Decoder
from vgen.sampling.filters import filter_logits, pick_tokens
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.parallel import parallel
from vgen.schedules.randar import randar
from vgen.schedules.raster import raster

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


@compiled
def test_nothing_follows_a_draw_before_the_pass_is_over():
    from vgen.sampling.draw_kernels import pick_in_chunks, weigh_chunks

    constants = {"V": 16384, "CHUNK": 128, "CHUNKS": 16, "TILES": 8, "ALL": 128, "BRANCHES": 2}
    constants |= {"GUIDED": True, "HEATED": False, "EARLY": True}
    types = dict.fromkeys(("logits", "peaks"), "*fp32") | dict.fromkeys(("sums", "uniform"), "*fp64")
    types |= dict.fromkeys(("targets", "tokens", "copies"), "*i64") | dict.fromkeys(("weight", "temperature"), "fp32")
    first, second = (
        compiled_for_hopper(kernel, constants, types, usual="i32").asm["ptx"]
        for kernel in (weigh_chunks, pick_in_chunks)
    )
    # So what an earlier pass wrote, like rows of the cache, need not be waited for.
    assert first.index("griddepcontrol.wait") < first.index("griddepcontrol.launch_dependents")
    assert second.index("griddepcontrol.launch_dependents") < second.index("griddepcontrol.wait")


def usual(logits, uniform, targets, *, weight=1.0, temperature=1.0):
    """The same draw by the plain functions."""
    branches = len(logits) // len(targets)
    guided = guide(logits.float(), branches, weight, 0.0) if branches > 1 else logits.float()
    return pick_tokens(filter_logits(guided, temperature=temperature), uniform.gather(1, targets))


def draws(batch, decided, size, *, branches=2, dtype=torch.float32, device="cpu"):
    torch.manual_seed(size)
    logits = (3 * torch.randn(branches * batch, decided, size, device=device)).to(dtype)
    uniform = torch.rand(batch, 40, device=device, dtype=torch.float64)
    return logits, uniform, torch.randint(40, (batch, decided), device=device)


@interpreted
@pytest.mark.parametrize(
    ("batch", "decided", "size", "weight", "temperature"),
    [
        (5, 3, 23, 2.0, 1.0),
        (3, 2, 2048, 1.0, 1.0),
        (2, 3, 2049, 4.5, 0.7),
        (1, 1, 16384, 2.0, 1.0),
        (2, 1, 5000, 0, 1e-7),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_draws_what_the_plain_functions_draw(batch, decided, size, weight, temperature, dtype):
    logits, uniform, targets = draws(batch, decided, size, dtype=dtype)
    settings = {"weight": weight, "temperature": temperature}
    tokens = draw_tokens(logits, uniform, targets, **settings)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, usual(logits, uniform, targets, **settings))
    assert torch.equal(tokens[:1], draw_tokens(logits[[0, batch]], uniform[:1], targets[:1], **settings))


@interpreted
def test_one_branch_and_targets_shared_by_the_batch():
    logits, uniform, _ = draws(4, 3, 300, branches=1)
    targets = torch.tensor([7, 0, 3]).expand(4, -1)
    assert torch.equal(draw_tokens(logits, uniform, targets), usual(logits, uniform, targets))


@interpreted
def test_draws_follow_the_distribution_and_never_take_what_cannot_be():
    probabilities = torch.zeros(3000)
    probabilities[[3, 127, 128, 2047, 2048, 2999]] = torch.tensor([0.3, 0.1, 0.1, 0.2, 0.05, 0.25])
    logits = probabilities.log().expand(1, 60, -1)
    uniform = (torch.arange(60, dtype=torch.float64)[None] + 0.5) / 60
    tokens = draw_tokens(logits, uniform, torch.arange(60)[None])
    assert torch.bincount(tokens[0], minlength=3000).tolist() == (60 * probabilities).round().long().tolist()
    ends = torch.tensor([[0.0, 1.0 - 2.0**-53, 1.0 - 2.0**-48]], dtype=torch.float64)
    logits = torch.full((1, 3, 5000), float("-inf"))
    logits[..., 2500], logits[..., 2600] = 0.0, 1.0
    assert draw_tokens(logits, ends, torch.arange(3)[None]).tolist() == [[2500, 2600, 2600]]
    logits[..., 2500:2601] = float("nan")
    assert int(draw_tokens(logits, ends, torch.arange(3)[None]).min()) >= 0
    assert int(draw_tokens(logits, ends, torch.arange(3)[None]).max()) < 5000


@interpreted
@pytest.mark.parametrize(
    "plan", [parallel(grid=(2, 4), regions=4), randar(grid=(2, 3), steps=3)], ids=lambda plan: plan.name
)
def test_fused_decoding_gives_the_tokens_of_the_plain_loop(plan, monkeypatch):
    generator, labels = tiny_generator(plan, depth=1), torch.tensor([0, 1])
    sampling = Sampling(seed=2, temperature=0.9, guidance=Guidance(scale=2.0, end=4))
    shared = {"sampling": sampling, "sample_index": torch.arange(2)}
    expected = decode(generator, plan, labels, **shared)
    monkeypatch.setattr("vgen.sampling.noise.pick_tokens", None)
    assert torch.equal(Decoder(generator, plan, engine="fused")(labels, **shared), expected)


@interpreted
def test_logits_of_half_precision_are_drawn_from_as_they_are(monkeypatch):
    plan, labels, seen = parallel(grid=(2, 4), regions=4), torch.arange(5), []

    def watched(logits, *given, **options):
        seen.append(logits.dtype)
        return draw_tokens(logits, *given, **options)

    monkeypatch.setattr("vgen.sampling.decode.draw_tokens", watched)
    generator = tiny_generator(plan, depth=1).half()
    shared = {"sampling": Sampling(guidance=Guidance(scale=2.0)), "sample_index": torch.arange(5)}
    Decoder(generator, plan, engine="fused")(labels, **shared)
    # Products of up to 32 rows are summed and kept in float32; those of more come from the library.
    assert set(seen) == {torch.float32, torch.float16}


@interpreted
@pytest.mark.parametrize("sampling", [Sampling(top_k=5), Sampling(top_p=0.8), Sampling(greedy=True)])
def test_filters_and_known_tokens_of_a_fused_network(sampling):
    plan = raster(grid=(2, 3))
    generator, labels = tiny_generator(plan), torch.tensor([0, 1])
    known = torch.tensor([[True, False, False, True, False, False]] * 2)
    shared = {"sample_index": torch.arange(2), "known": known, "known_ids": torch.full((2, 6), 4)}
    plain = [decode(generator, plan, labels, sampling=each, **shared) for each in (sampling, Sampling())]
    generator.fused = True
    fused = [decode(generator, plan, labels, sampling=each, **shared) for each in (sampling, Sampling())]
    assert all(map(torch.equal, plain, fused))
    traced = []
    decode(
        generator, plan, labels, sampling=Sampling(), **shared, trace=lambda index, logits: traced.append(logits.shape)
    )
    assert traced == [(2, 1, 23)] * 6


@interpreted
def test_the_benchmark_prints_a_row_per_measurement(capsys):
    sizes = ["--samples", "2", "--heads", "2", "--kv-heads", "2", "--width", "8", "--fed", "1", "3", "--prefix", "10"]
    more = ["--masked-prefix", "10", "--vocab", "50", "--draws", "1x1", "2x3", "--pool-mib", "1", "--variants"]
    attention_benchmark.main([*sizes, *more, "--device", "cpu", "--dtype", "float32", "--varied-fed", "1"])
    out = capsys.readouterr().out
    assert out.count("| PyTorch |") == 3 + 4
    assert out.count("| short: ") == 3
    assert out.count("| variant: ") == 1
    assert out.count("| 100.00% |") == 8


def test_without_a_device_the_plain_functions_draw():
    assert draws_here(torch.zeros(1)) == INTERPRETED


@compiled
@pytest.mark.parametrize("size", [16384, 1000])
def test_it_compiles_for_hopper_with_wide_loads(size):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vgen.sampling.draw_kernels import pick_in_chunks, weigh_chunks

    tiles = -(-size // 2048)
    constants = {"V": size, "CHUNK": 128, "CHUNKS": 16, "GUIDED": True, "HEATED": True, "EARLY": True}
    types = {"logits": "*fp32", "peaks": "*fp32", "sums": "*fp64", "weight": "fp32", "temperature": "fp32"}
    types |= {"uniform": "*fp64", "targets": "*i64", "tokens": "*i64", "copies": "*i64"}
    codes = []
    for kernel, own in (
        (weigh_chunks, {}),
        (pick_in_chunks, {"TILES": tiles, "ALL": max(16, 16 * tiles), "BRANCHES": 2}),
    ):
        names, given = kernel.arg_names, constants | own
        signature = {name: "constexpr" if name in given else types.get(name, "i32") for name in names}
        even = {
            (index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if signature[name].startswith("*")
        }
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in given.items()}, even)
        codes.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"])
    assert codes[0].count("ld.global.v4.b32") == 8
    assert not any(".local" in code for code in codes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "decided"), [(1, 1), (256, 1), (64, 16)])
def test_on_a_gpu(batch, decided, dtype):
    logits, uniform, targets = draws(batch, decided, 16384, dtype=dtype, device="cuda")
    tokens = draw_tokens(logits, uniform, targets, weight=2.0, temperature=0.9)
    right = usual(logits, uniform, targets, weight=2.0, temperature=0.9)
    assert (tokens != right).sum() <= 1
    assert torch.equal(tokens, draw_tokens(logits, uniform, targets, weight=2.0, temperature=0.9))
