"""Counted bytes and operations, and the speed benchmarks at tiny sizes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import decode as decode_benchmark
from benchmarks import end_to_end, train_tokenizer
from benchmarks import train as train_benchmark
from benchmarks.cost import Ceilings, decoding_cost, training_flops
from benchmarks.networks import make_generator, make_plan
from vgen.sampling.engine import Decoder
from vgen.sampling.settings import Guidance, Sampling

H200 = Ceilings(bytes_per_s=4.22e12, flops_per_s=805e12)


@pytest.mark.parametrize(
    ("order", "grid", "size", "forwards", "latency_ms", "images_per_s"),
    [
        ("raster", 16, "L", 256, 79, 509),
        ("neighboring", 16, "L", 31, 10, 1510),
        ("parallel-4", 16, "L", 67, 20, 1190),
        ("parallel-16", 16, "L", 31, 10, 1849),  # the issue says 1,600
        ("zipar-8", 16, "L", 144, 44, 770),
        ("raster", 24, "XL", 576, 335, 60),
    ],
)
def test_bounds_agree_with_an_independent_count(order, grid, size, forwards, latency_ms, images_per_s):
    """Figures counted by someone else with the same ceilings, but for the one that is marked."""
    plan = make_plan(order, (grid, grid))
    generator = make_generator(size, plan, device=torch.device("meta"), dtype=torch.bfloat16)
    one = decoding_cost(generator, plan, 1)
    assert one.forwards == forwards
    assert one.seconds(H200) * 1e3 == pytest.approx(latency_ms, rel=0.08)
    many = decoding_cost(generator, plan, 512)
    assert 512 / (many.cache / H200.bytes_per_s + many.flops / H200.flops_per_s) == pytest.approx(
        images_per_s, rel=0.08
    )


def idle_operations(generator, read, targets, rows):
    """Products with the zeros of targets that a head does not read, which the cost, a bound, does not count."""
    unread = sum(targets - len(slots) for slots in read.slots if len(slots))
    return 2 * rows * unread * generator.dim * generator.vocab_size


@pytest.mark.parametrize("order", ["raster", "neighboring", "parallel-4", "random-88"])
def test_operations_of_a_decode_are_those_pytorch_counts(order):
    plan = make_plan(order, (4, 4))
    generator = make_generator("tiny", plan, device=torch.device("cpu"), dtype=torch.float32, vocab_size=50)
    decoder = Decoder(generator, plan)
    sampling = Sampling(guidance=Guidance(scale=2.0))
    # The CPU's fused attention is not known to the counter.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(torch.arange(3), sampling=sampling, sample_index=torch.arange(3))
    assert counter.get_total_flops() == decoding_cost(generator, plan, 3).flops + sum(
        idle_operations(generator, forward.read, len(forward.targets), 2 * 3) for forward in plan.forwards
    )


def test_operations_of_a_training_step():
    plan = make_plan("neighboring", (4, 4))
    generator = make_generator("tiny", plan, device=torch.device("cpu"), dtype=torch.float32, vocab_size=50)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        generator.logits(torch.zeros(2, 16, dtype=torch.int64), torch.arange(2), plan)
    everywhere = 2 * 2 * len(generator.layers) * generator.dim * 2 * plan.num_slots**2
    seen = everywhere * float(plan.visible().float().mean())
    idle = idle_operations(generator, plan.on(torch.device("cpu")).read, plan.num_tokens, 2)
    assert training_flops(generator, plan, 2) == pytest.approx(
        3 * (counter.get_total_flops() - everywhere + seen - idle)
    )


def test_commands_print_a_row_per_measurement(capsys):
    tiny = ["--size", "tiny", "--vocab", "32", "--device", "cpu"]
    orders = ["--grid", "2x4", "--orders", "raster", "neighboring"]
    decode_benchmark.main([*tiny, *orders, "--batch", "1", "2", "--engines", "eager", "--repeats", "1"])
    assert capsys.readouterr().out.count("| eager |") == 4
    variants = ["--variants", "float32:logits:1", "bfloat16:fused:1"]
    train_benchmark.main([*tiny, *orders, "--batch", "2", "--steps", "1", "--eager", *variants])
    out = capsys.readouterr().out
    assert "| raster | causal | float32 | logits | 1 | 2 |" in out
    assert "| neighboring | dense | bfloat16 | fused | 1 | 2 |" in out
    small = ["--channels", "8", "--batch", "2", "--steps", "1", "--device", "cpu"]
    train_tokenizer.main([*small, "--variants", "eager"])
    assert "| vq_32 | 2 | eager |" in capsys.readouterr().out
    end_to_end.main([*tiny, "--image-size", "32", "--channels", "32", "--batch", "2", "--samples", "3", "--profile"])
    printed = capsys.readouterr()
    assert "| neighboring | 2 | auto | float32 |" in printed.out
    assert "aten::silu" in printed.err
    with pytest.raises(SystemExit):
        train_benchmark.main([*tiny, *orders, "--cudnn"])
    assert "--cudnn needs a GPU" in capsys.readouterr().err


def test_time_during_which_both_parts_ran():
    assert end_to_end.shared([(0.0, 2.0), (2.0, 5.0)], [(1.0, 3.0), (4.0, 9.0)]) == 3.0
    assert end_to_end.shared([(0.0, 1.0)], [(1.0, 2.0)]) == 0.0


def test_parts_are_noted_while_asked_for():
    class Parts:
        device = torch.device("cpu")

        def generate_ids(self, value):
            return value + 1

        def finish(self, value):
            return value * 2

    parts = Parts()
    with end_to_end.timed(parts) as spans:
        assert parts.finish(parts.generate_ids(3)) == 8
        tokens, pixels = spans()
    assert tokens[0][0] <= tokens[0][1] <= pixels[0][0] <= pixels[0][1]
    assert vars(parts) == {}


def test_clips_are_decoded_by_nar_l_for_video():
    plan = make_plan("neighboring", (4, 16, 16))
    meta, dtype = torch.device("meta"), torch.bfloat16
    generator = make_generator("L", plan, device=meta, dtype=dtype, vocab_size=8192, num_classes=101)
    assert sum(p.numel() for p in generator.parameters()) == 368_736_256
    passes = [len(make_plan(order, (5, 16, 16)).forwards) for order in ("raster", "neighboring", "parallel-4")]
    assert passes == [1280, 35, 323]
