"""The choice between a dense mask and FlexAttention; the kernel itself trains on a GPU only."""

from types import SimpleNamespace

import pytest
import torch

from tests.generators.helpers import tiny_generator
from tests.training.helpers import GENERATOR, run
from vgen.errors import UserError
from vgen.schedules.neighboring import neighboring
from vgen.schedules.parallel import parallel
from vgen.schedules.randar import randar
from vgen.schedules.raster import raster
from vgen.training.generator_module import GeneratorModule, check_attention

PLANS = {
    "neighboring": neighboring(grid=(4, 6)),
    "parallel": parallel(grid=(4, 4), regions=4),
    "clips": parallel(grid=(2, 4, 4), regions=4),
    "raster": raster(grid=(3, 5)),
    "randar": randar(grid=(3, 4), steps=4),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("options", [{}, {"heads": 4, "kv_heads": 2}], ids=["heads", "grouped"])
@pytest.mark.parametrize("name", PLANS)
def test_block_masks_see_what_the_dense_mask_sees(name, options):
    plan = PLANS[name]
    generator = tiny_generator(plan, **options)
    ids, labels = torch.randint(23, (2, plan.num_tokens)), torch.tensor([1, 4])
    with torch.no_grad():
        dense = generator.logits(ids, labels, plan)
        flex = generator.logits(ids, labels, plan, flex=True)
    torch.testing.assert_close(flex, dense, atol=2e-5, rtol=2e-5)


def test_a_kind_that_cannot_train_is_refused():
    plan = PLANS["neighboring"]
    with pytest.raises(UserError, match=r"task\.attention=fast"):
        check_attention("fast", tiny_generator(plan))
    with pytest.raises(UserError, match=r"generator\.attention_dropout"):
        check_attention("flex", tiny_generator(plan, attention_dropout=0.1))
    check_attention("auto", tiny_generator(plan, attention_dropout=0.1))


@pytest.mark.parametrize(
    ("attention", "device", "slots", "compiled", "dropout", "causal", "expected"),
    [
        ("auto", "cuda", 2048, True, 0.0, False, True),
        ("auto", "cuda", 256, True, 0.0, False, False),
        ("auto", "cuda", 2048, False, 0.0, False, False),
        ("auto", "cuda", 2048, True, 0.1, False, False),
        ("auto", "cuda", 2048, True, 0.0, True, False),
        ("auto", "cpu", 2048, True, 0.0, False, False),
        ("flex", "cuda", 256, False, 0.0, False, True),
        ("flex", "cuda", 256, False, 0.0, True, False),
        ("dense", "cuda", 2048, True, 0.0, False, False),
    ],
)
def test_when_training_runs_flex_attention(attention, device, slots, compiled, dropout, causal, expected):
    module = SimpleNamespace(
        attention=attention,
        compiled=compiled,
        device=SimpleNamespace(type=device),
        generator=SimpleNamespace(drops_attention=dropout > 0),
        plan=SimpleNamespace(num_slots=slots, on=lambda _: SimpleNamespace(causal=causal)),
    )
    assert GeneratorModule.flex.fget(module) is expected


def test_flex_on_a_cpu_is_refused_before_the_first_step(tokenizer_release, tmp_path):
    words = [*GENERATOR, f"task.tokenizer={tokenizer_release}", "task.attention=flex", "trainer.max_steps=1"]
    with pytest.raises(UserError, match=r"task\.attention=flex trains on a GPU"):
        run(tmp_path / "run", *words)
