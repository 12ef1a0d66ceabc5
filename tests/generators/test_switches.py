"""Every switch of the transformer works with every order it can serve: cached decoding equals teacher forcing."""

import pytest
import torch

from tests.generators.helpers import tiny_generator
from tests.schedules.test_every_order import VOCAB, random_orders, traced_decode
from vgen.errors import UserError
from vgen.generators.conditioning import ClassCondition, TextCondition
from vgen.generators.embedding import CodebookEmbedding, Directions
from vgen.generators.transformer import Transformer
from vgen.layers.mlp import GeluMLP
from vgen.layers.rope import Rotary, rope_table
from vgen.schedules.catalog import load_plan
from vgen.schedules.moves import moves_of

DIRECTION = {"adaln": ["condition", "direction"]}
SWITCHES = {
    "rope of both places": {"rope": "own_target", "rope_placeless": "identity"},
    "rope with its axes turned": {"rope": "own_target", "rope_axes": [3, 1, 0, 2]},
    "directions": DIRECTION,
    "steps and class": {"adaln": ["condition", "step"]},
    "codebook": {"codebook_dim": 3},
    "own places": {"rope": "none", "positions": "own"},
    "own and target places": {"positions": "own_target"},
    "vision transformer": {
        "ffn": "gelu",
        "norm": "layer",
        "bias": True,
        "head_bias": True,
        "qk_norm": "layer",
        "norm_affine": False,
        "final_norm_affine": False,
    },
    "normed queries": {"qk_norm": "rms", "kv_heads": 1},
    "BERT": {"norm": "layer", "norm_position": "post", "embedding_norm": True, "final_norm": False, "bias": True},
    "long skips": {"depth": 3, "long_skips": True, "ffn": "gelu", "bias": True, "qkv_bias": False},
}
ORDERS = ["raster", "diagonal", "neighboring", "parallel", "rar", "randar"]


def network(plan, options):
    """A tiny random network with the switches, or None where the order cannot have them."""
    options = dict(options)
    if "direction" in options.get("adaln", ()):
        if plan.random_order is not None:
            return None
        options["directions"] = moves_of(plan)
    if plan.has_queries and (options.get("rope", "own") != "own" or "step" in options.get("adaln", ())):
        return None
    if options.get("long_skips") and plan.num_heads > 1:
        return None
    if plan.any_order and not plan.has_queries and options.get("rope") != "own_target":
        options["positions"] = "own_target"
    generator = tiny_generator(plan, vocab_size=VOCAB, **options)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    if isinstance(generator.tok_embeddings, CodebookEmbedding):
        generator.tok_embeddings.load_codebook(torch.randn(VOCAB, 3), std=0.5)
    return generator.eval()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_cached_decoding_equals_teacher_forcing(switch, order):
    plan = load_plan(order, (4, 6), {})
    generator = network(plan, SWITCHES[switch])
    if generator is None:
        return
    labels = torch.tensor([0, 3])
    orders = random_orders(plan, 2) if plan.shuffled else None
    ids, logits = traced_decode(generator, plan, labels, order=orders)
    with torch.inference_mode():
        forced = generator.logits(ids, labels, plan, order=orders)
    torch.testing.assert_close(logits, forced, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_change_what_is_computed(switch):
    plan = load_plan("diagonal", (4, 6), {})
    ids, labels = torch.randint(VOCAB, (1, 24)), torch.tensor([1])
    plain = network(plan, {})
    changed = network(plan, SWITCHES[switch])
    shared = {name: value for name, value in plain.state_dict().items() if name in changed.state_dict()}
    changed.load_state_dict(
        {name: v for name, v in shared.items() if changed.state_dict()[name].shape == v.shape}, strict=False
    )
    assert not torch.allclose(plain.logits(ids, labels, plan), changed.logits(ids, labels, plan), atol=1e-3)


def test_modulated_blocks_start_as_the_identity():
    plan = load_plan("diagonal", (3, 3), {})
    condition = ClassCondition(num_classes=3, dim=16)
    generator = Transformer(
        vocab_size=8,
        grid=(3, 3),
        condition=condition,
        dim=16,
        depth=2,
        heads=2,
        ffn_multiple_of=16,
        adaln=["condition", "direction"],
        directions=moves_of(plan),
    ).eval()
    tensors = plan.on(torch.device("cpu"))
    ids = torch.randint(8, (1, 9))
    x, view = generator.enter(ids, condition(torch.tensor([1])), tensors.feed, tensors.order, causal=True, mask=None)
    assert torch.equal(generator.run_blocks(x, view)[0], x)


def test_few_direction_vectors_equal_one_per_slot():
    plan = load_plan("diagonal", (5, 5), {})
    generator = network(plan, DIRECTION)
    ids, labels = torch.randint(VOCAB, (2, 25)), torch.tensor([1, 2])
    shared = generator.logits(ids, labels, plan)
    moves = generator.directions
    # More vectors than slots: every slot gets its own.
    moves.embeddings = torch.nn.Embedding.from_pretrained(
        torch.cat([moves.embeddings.weight.detach(), torch.zeros(40, generator.dim)])
    )
    torch.testing.assert_close(generator.logits(ids, labels, plan), shared, atol=1e-5, rtol=1e-5)


def test_a_code_of_both_places_is_two_codes_of_half_the_head():
    rotary = Rotary(kind="own_target", grid=(3, 4), head_dim=16, base=100.0, placeless="zero", axes=None)
    half = rope_table((3, 4), 8, base=100.0)
    own, target = torch.tensor([12, 0, 5]), torch.tensor([0, 1, 12])
    assert torch.equal(rotary(own, target), torch.cat([half[own], half[target]], dim=1))
    turned = Rotary(kind="own", grid=(3, 4), head_dim=8, base=100.0, placeless="zero", axes=[1, 0])
    assert torch.equal(turned(own, target), half[own][:, [2, 3, 0, 1]])


def test_directions_number_the_moves():
    module = Directions(grid=(2, 3), moves=[(0, 1), (1, -2)], dim=2)
    own, target = torch.tensor([6, 0, 2, 0]), torch.tensor([0, 1, 3, 6])
    assert module.number(own, target).tolist() == [0, 1, 2, 0]


def test_the_frozen_codebook_is_not_trained_and_fills_the_wanted_spread():
    embedding = CodebookEmbedding(vocab_size=64, codebook_dim=4, dim=32)
    embedding.load_codebook(torch.randn(64, 4) * 7, std=0.3)
    assert [name for name, _ in embedding.named_parameters()] == ["projection.weight", "projection.bias"]
    assert embedding(torch.arange(64)).std().item() == pytest.approx(0.3, rel=0.01)
    with pytest.raises(UserError, match="codebook_dim=5"):
        embedding.load_codebook(torch.randn(64, 5), std=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "choose one of rms, layer"),
        ({"rope": "both"}, "choose one of own"),
        ({"adaln": ["colour"]}, "colour is unknown"),
        ({"adaln": ["direction"]}, "give both or neither"),
        ({"rope": "none", "rope_axes": [0, 1]}, "rope_axes"),
        ({"rope_axes": [0, 0]}, "each once"),
        ({"rope": "own_target", "dim": 36, "heads": 2}, "divisible by 4"),
        ({"rope": "none", "position_queries": True}, "rope=own"),
        ({"token_dropout_on": "words"}, "choose one of all, tokens"),
        ({"norm_position": "middle"}, "choose one of pre, post"),
        ({"norm_position": "post", "adaln": ["condition"]}, "pre-norm"),
        ({"long_skips": True, "depth": 2}, "odd generator.depth"),
        ({"long_skips": True, "num_readouts": 2}, "one output head"),
        ({"ffn_inner_dropout": 0.1}, "ffn=gelu"),
        ({"embedding_norm": True, "token_dropout_on": "tokens"}, "token_dropout_on=all"),
        ({"mask_token": True, "codebook_dim": 4}, "codebook_dim=null"),
    ],
)
def test_switches_that_do_not_fit_are_refused(options, message):
    sizes = {"dim": 32, "depth": 1, "heads": 2} | options
    with pytest.raises(UserError, match=message):
        Transformer(vocab_size=8, grid=(2, 2), condition=ClassCondition(num_classes=2, dim=sizes["dim"]), **sizes)


def test_dropout_stands_where_bert_has_it():
    """On the embedded sequence behind its norm, on attention and feed-forward outputs, not inside."""
    inner = GeluMLP(dim=4, hidden=8, dropout=0.0, inner_dropout=1.0)
    assert torch.equal(inner(torch.randn(3, 4)), inner.fc2.bias.expand(3, -1))
    plan = load_plan("raster", (2, 2), {})
    bert = SWITCHES["BERT"] | {"rope": "none", "positions": "own", "token_dropout": 1.0}
    generator, tensors = network(plan, bert).train(), plan.on(torch.device("cpu"))
    ids, condition = torch.zeros(1, 4, dtype=torch.int64), generator.condition(torch.tensor([0]))
    entered, _ = generator.enter(ids, condition, tensors.feed, tensors.order, causal=True, mask=None)
    assert (entered == 0).all(), "positions and the shift of the norm are dropped too"


def test_text_has_no_class_vector_to_modulate_with():
    condition = TextCondition(caption_dim=8, num_slots=3, dim=32)
    with pytest.raises(UserError, match="no class condition"):
        Transformer(vocab_size=8, grid=(2, 2), condition=condition, dim=32, depth=1, heads=2, adaln=["condition"])


def test_orders_of_unlisted_moves_are_refused():
    plan = load_plan("diagonal", (4, 4), {})
    generator = network(plan, DIRECTION)
    with pytest.raises(UserError, match=r"makes the move \[1, -3\]"):
        generator.check_plan(load_plan("raster", (4, 4), {}))
    queries = load_plan("randar", (4, 4), {})
    with pytest.raises(UserError, match="32 slots, more than the 17"):
        tiny_generator(queries, adaln=["step"]).check_plan(queries)
    random = load_plan("rar", (4, 4), {})
    with pytest.raises(UserError, match="not a fixed set"):
        tiny_generator(random, adaln=["direction"], directions=[(0, 1)]).check_plan(random)
