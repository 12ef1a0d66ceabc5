"""Tiny generators for tests."""

import torch

from vgen.generators.conditioning import ClassCondition
from vgen.generators.joint_text import Captions, JointText
from vgen.generators.latent_head import LatentHead
from vgen.generators.transformer import Transformer
from vgen.schedules.plan import Plan


def tiny_generator(plan: Plan, *, vocab_size: int = 23, num_classes: int = 5, seed: int = 0, **options) -> Transformer:
    """A random network that fits a plan, with an output head that is not zero, in eval mode."""
    torch.manual_seed(seed)
    sizes = {"dim": 32, "depth": 2, "heads": 2, "ffn_multiple_of": 16} | options
    if plan.any_order and not plan.has_queries:
        sizes.setdefault("positions", "own_target")
    generator = Transformer(
        vocab_size=vocab_size,
        grid=plan.grid,
        condition=ClassCondition(num_classes=num_classes, dim=sizes["dim"]),
        num_readouts=plan.num_heads,
        num_learned=plan.num_learned,
        position_queries=plan.has_queries,
        mask_token=plan.masking is not None,
        **sizes,
    )
    for parameter in generator.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return generator.eval()


def captions(count: int, *, features: int = 3, width: int = 6, pooled: int = 5, decoder: tuple[int, int] | None = None):
    """Random features of ``count`` captions and of the empty string."""
    draw = torch.Generator().manual_seed(count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count + 1, *shape, generator=draw)

    told = None if decoder is None else normal(*decoder)
    return Captions(normal(features, width), normal(pooled), told)


def tiny_joint(plan: Plan, *, vocab_size: int = 23, count: int = 5, latent_channels: int = 0, **options) -> Transformer:
    """A random network of joint streams that knows ``count`` captions, in eval mode; with channels of latents."""
    torch.manual_seed(0)
    settings = {"dim": 32, "depth": 2, "heads": 2, "ffn": "gelu_tanh", "norm": "layer", "bias": True} | options
    settings = {"rope": "none", "positions": "tokens", "adaln": ["condition"], "norm_affine": False} | settings
    settings |= {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0, "mask_token": True}
    dim = settings["dim"]
    head = None
    if latent_channels:
        head = LatentHead(channels=latent_channels, num_tokens=plan.num_tokens, dim=dim, width=dim, depth=2)
    condition = JointText(caption_dim=6, num_features=plan.num_condition, pooled_dim=5, dim=dim, score_dim=8)
    condition.attach(captions(count, features=plan.num_condition))
    generator = Transformer(
        vocab_size=0 if latent_channels else vocab_size,
        grid=plan.grid,
        condition=condition,
        latent_head=head,
        tied_output=not latent_channels,
        **settings,
    )
    for parameter in generator.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return generator.eval()
