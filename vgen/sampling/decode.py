"""The one decoding loop: it walks the passes of a plan and knows no order by name."""

from collections.abc import Callable

import torch
from torch import Tensor

from vgen.generators.transformer import Transformer
from vgen.random import keyed_uniform
from vgen.sampling.filters import filter_logits, pick_tokens
from vgen.sampling.settings import Sampling
from vgen.schedules.plan import Plan

Trace = Callable[[int, Tensor], None]


@torch.inference_mode()
def decode(
    generator: Transformer,
    plan: Plan,
    condition: Tensor,
    *,
    sampling: Sampling,
    sample_index: Tensor,
    padding: Tensor | None = None,
    known_ids: Tensor | None = None,
    known: Tensor | None = None,
    num_passes: int | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Decode token ids.

    The order of operations in a pass: guidance on float32 logits, temperature, top-k, top-p, draw. Random numbers are
    keyed by (seed, sample index, raster position). The unconditional branch is computed only up to the last pass whose
    guidance weight differs from 1.

    Args:
        generator: the network, in eval mode, on the device to decode on.
        plan: decode order; must fit the generator.
        condition: class labels int64 [B] or text features [B, num_condition, caption_dim].
        sampling: what to draw.
        sample_index: int64 [B], identity of each sample for the random numbers.
        padding: bool [B, num_condition], True = valid condition slot; null = all valid.
        known_ids: int64 [B, N], raster order, tokens that are given (inpainting, continuation).
        known: bool [B, N], raster order, where known_ids is to be used.
        num_passes: stop after this many passes; tokens not decided are 0.
        trace: called with (pass, guided logits float32 [B, D, V]) after every pass.

    Returns:
        int64 [B, N], raster order.

    Raises:
        UserError: if the plan does not fit the generator.
    """
    generator.check_plan(plan)
    assert not generator.training, "decode needs generator.eval()"
    device = condition.device
    tensors = plan.on(device)
    batch, total = len(condition), plan.num_tokens
    weights = [sampling.guidance.weight(decided, total) for decided in plan.decided_before()]
    passes = len(weights) if num_passes is None else num_passes
    last_guided = max((index for index, weight in enumerate(weights[:passes]) if weight != 1.0), default=-1)

    embedded = _embed_condition(generator, condition, both=last_guided >= 0)
    if padding is not None and last_guided >= 0:
        padding = padding.repeat(2, 1)
    cache = generator.new_cache(len(embedded), plan.num_rows)
    uniform = keyed_uniform(sampling.seed, sample_index.to(device)[:, None], tensors.order)
    ids = torch.zeros(batch, total, dtype=torch.int64, device=device)
    if known is not None and known_ids is not None:
        known, known_ids = known[:, tensors.order], known_ids[:, tensors.order]

    for index, forward in enumerate(tensors.forwards[:passes]):
        if index == last_guided + 1 and len(embedded) > batch:
            cache.narrow(batch)
            embedded = embedded[:batch]
            padding = None if padding is None else padding[:batch]
        fed = ids if len(embedded) == batch else ids.repeat(2, 1)
        logits = generator.step(fed, embedded, forward, tensors.order, cache, padding=padding)
        if len(embedded) > batch:
            logits = _guide(logits, weights[index])
        if trace is not None:
            trace(index, logits)
        tokens = _choose(logits, uniform[:, forward.targets], sampling)
        if known is not None and known_ids is not None:
            tokens = torch.where(known[:, forward.targets], known_ids[:, forward.targets], tokens)
        ids[:, forward.targets] = tokens

    raster = torch.empty_like(ids)
    raster[:, tensors.order] = ids
    return raster


def _embed_condition(generator: Transformer, condition: Tensor, *, both: bool) -> Tensor:
    """Embed the condition, followed by the null condition when both guidance branches run."""
    if not both:
        return generator.condition(condition)
    drop = torch.zeros(2 * len(condition), dtype=torch.bool, device=condition.device)
    drop[len(condition) :] = True
    return generator.condition(torch.cat([condition, condition]), drop)


def _guide(logits: Tensor, weight: float) -> Tensor:
    """Combine both guidance branches [2 B, D, V] into [B, D, V]."""
    conditional, unconditional = logits.chunk(2)
    return conditional if weight == 1.0 else unconditional + weight * (conditional - unconditional)


def _choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Tokens int64 [B, D] from logits [B, D, V]."""
    if sampling.greedy:
        return logits.argmax(-1)
    filtered = filter_logits(logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    return pick_tokens(filtered, uniform)
