"""The one decoding loop: it walks the passes of a plan and knows no order by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vgen.errors import UserError
from vgen.generators.places import Located
from vgen.generators.transformer import Transformer
from vgen.random import keyed_uniform
from vgen.sampling.draw import draw_tokens, draws_here
from vgen.sampling.filters import filter_logits
from vgen.sampling.noise import KeyedNoise, Noise
from vgen.sampling.settings import Sampling, SpatialGuidance
from vgen.schedules.course import Course, StaticCourse
from vgen.schedules.plan import Plan

Trace = Callable[[int, Tensor], None]
Watch = Callable[[int, Tensor], None]


DIFFUSION_STEPS = 100
_ORDER_STREAM, _BLANK_STREAM = 301, 302


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
    order: Tensor | None = None,
    spatial: SpatialGuidance | None = None,
    num_passes: int | None = None,
    noise: Noise | None = None,
    trace: Trace | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Decode token ids, or continuous tokens.

    The order of operations in a pass: guidance on float32 logits, temperature, top-k, top-p, draw. Random numbers are
    keyed by (seed, sample index, raster position). The unconditional branch is computed only up to the last pass whose
    guidance weight differs from 1; without a cache only in such passes. Continuous tokens are drawn by the generator's
    latent head, guidance included; nothing of them can be given.

    Args:
        generator: the network, in eval mode, on the device to decode on.
        plan: decode order; must fit the generator.
        condition: see :meth:`vgen.generators.transformer.Transformer.embed_condition`.
        sampling: what to draw.
        sample_index: int64 [B], identity of each sample for the random numbers.
        padding: bool [B, num_condition], True = valid condition slot; null = all valid.
        known_ids: int64 [B, N], raster order, tokens that are given (inpainting, continuation).
        known: bool [B, N], raster order, where known_ids is to be used. A plan with ``num_known`` tokens needs exactly
            that many per sample.
        order: int64 [B, N], raster position of every order index, for plans of any order; null = the plan's own, or
            drawn per sample where the plan says so.
        spatial: guidance away from a branch that sees only a part of the given tokens; null = none.
        num_passes: stop after this many passes; tokens not decided are 0.
        noise: source of the draws; null = keyed.
        trace: called with (pass, guided logits float32 [B, D, V]) after every pass; with conditional states [B, D, dim]
            for continuous tokens.
        watch: called with (pass, ids int64 [B, N] in raster order, -1 where undecided) after every pass; with latents
            [B, N, C], NaN where undecided, for continuous tokens.

    Returns:
        int64 [B, N], raster order; float32 [B, N, C] for continuous tokens.

    Raises:
        UserError: if the plan does not fit the generator, or the known tokens do not fit the plan.
    """
    request = Request.make(
        condition, seed=sampling.seed, sample_index=sample_index, padding=padding, known_ids=known_ids, known=known
    )
    if order is not None:
        request = replace(request, order=order)
    check_request(generator, plan, request, sampling)
    return run_passes(
        generator,
        plan,
        request,
        sampling=sampling,
        spatial=spatial,
        num_passes=num_passes,
        noise=noise,
        trace=trace,
        watch=watch,
    )


@dataclass(frozen=True)
class Request:
    """What differs from batch to batch of one decoding, as tensors on the device of the network.

    Attributes:
        seed: int64 scalar; stands in for the seed of the sampling settings.
        condition: see :func:`decode`, like the following.
        sample_index: int64 [B].
        padding: bool [B, num_condition].
        known_ids: int64 [B, N].
        known: bool [B, N]; given together with known_ids.
        order: int64 [B, N].
    """

    seed: Tensor
    condition: Tensor
    sample_index: Tensor
    padding: Tensor | None = None
    known_ids: Tensor | None = None
    known: Tensor | None = None
    order: Tensor | None = None

    @staticmethod
    def make(
        condition: Tensor,
        *,
        seed: int,
        sample_index: Tensor,
        padding: Tensor | None = None,
        known_ids: Tensor | None = None,
        known: Tensor | None = None,
    ) -> "Request":
        """Bring everything to the device of the condition."""
        if known_ids is None or known is None:
            known = known_ids = None
        device = condition.device
        return Request(_number(seed, device), condition, sample_index.to(device), padding, known_ids, known)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are set, by name."""
        return {name: value for name, value in self.__dict__.items() if value is not None}


@lru_cache(maxsize=8)
def _number(value: int, device: torch.device) -> Tensor:
    """An int64 scalar, the same tensor if asked for again; nobody writes to it."""
    return torch.full((), value, dtype=torch.int64, device=device)


def check_request(generator: Transformer, plan: Plan, request: Request, sampling: Sampling) -> None:
    """Refuse what the network or the plan does not allow.

    Raises:
        UserError: if the plan or the sampling settings do not fit the generator, or the known tokens the plan.
    """
    check_sampling(generator, sampling)
    if generator.latent_head is not None and request.known is not None:
        raise UserError("continuous tokens cannot be given yet: leave edit and predict out with this generator")
    generator.check_plan(plan)
    assert not generator.training, "decode needs generator.eval()"
    assert request.order is None or plan.any_order, "an order per sample needs a plan of any order"
    _check_known(plan, request.known)


@torch.inference_mode()
def run_passes(
    generator: Transformer,
    plan: Plan,
    request: Request,
    *,
    sampling: Sampling,
    spatial: SpatialGuidance | None = None,
    num_passes: int | None = None,
    located: Sequence[Located] | None = None,
    noise: Noise | None = None,
    trace: Trace | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """The loop itself: :func:`decode` of a checked request, its seed instead of that of ``sampling``.

    For a plan without a policy it launches the same kernels whatever the request holds and never waits for the device,
    so that it can be recorded as a CUDA graph.

    Args:
        generator: the network.
        plan: decode order.
        request: what to decode.
        sampling: what to draw.
        spatial: see :func:`decode`, like the following.
        num_passes: stop after this many passes.
        located: per pass, what :meth:`Transformer.locate` gives for it, where the batch shares one order.
        noise: see :func:`decode`, like the following.
        trace: called after every pass.
        watch: called after every pass.

    Returns:
        As :func:`decode`.
    """
    condition, sample_index, padding = request.condition, request.sample_index, request.padding
    known, known_ids, seed = request.known, request.known_ids, request.seed
    device, batch, total = condition.device, len(condition), plan.num_tokens
    order = request.order
    if order is None:
        order = decoding_order(plan, seed, sample_index, known)

    # Only who can see that a token is open is told so: marks have to be replaced in front of every pass.
    marked = plan.policy is not None or plan.masking is not None or watch is not None
    # The last column takes what run-time passes write for lanes that decide nothing.
    head = generator.latent_head
    ids = generator.unknown(batch, total + 1, device)
    if not marked and head is None:
        ids.fill_(generator.unknown_id)
    given = torch.zeros(ids.shape[:2], dtype=torch.bool, device=device)
    fixed = torch.zeros_like(given, dtype=torch.int64)
    if known is not None and known_ids is not None:
        given[:, :total], fixed[:, :total] = _ordered(known, order), _ordered(known_ids, order)
        ids[:, : plan.num_known] = fixed[:, : plan.num_known]
        if plan.masking is not None:
            ids = torch.where(given, fixed, ids)
    noise = KeyedNoise(seed, sample_index, order) if noise is None else noise

    course = _course(plan, batch, device, noise, None if known is None else given[:, :total])
    by_pass, after = sampling.guidance.along == "passes", sampling.guidance.counted == "after"
    weights = _guidance_weights(plan, sampling)
    visited = _moments(plan, sampling, len(weights) - 1, num_passes)
    last_guided = max((moment for moment in visited if weights[moment] != 1.0), default=-1)
    branches = 3 if spatial is not None else 2 if last_guided >= 0 else 1
    blank = None if spatial is None else _blank(given[:, :total], spatial, order, seed, sample_index)
    by_moment = None if plan.policy is None else torch.tensor(weights, device=device)
    # Every branch has a copy of its own, so that no pass has to make one.
    ids = ids.repeat(branches, *([1] * (ids.dim() - 1)))
    places = order if order.dim() == 1 else order.repeat(branches, 1)

    embedded = _embed_condition(generator, condition, branches)
    if padding is not None:
        padding = padding.repeat(branches, 1)
    cache = None
    if plan.needs_cache:
        cache = generator.new_cache(len(embedded), plan.num_rows)
        if plan.sees_unwritten:
            cache.clear()
    # What the kernels of the draw can do, for the numbers they are given.
    plainly = generator.fused and plan.policy is None and spatial is None and trace is None
    plainly = plainly and not sampling.greedy and sampling.top_k == 0 and sampling.top_p == 1.0
    plainly = plainly and head is None and isinstance(noise, KeyedNoise)
    index = 0
    while index != num_passes and (forward := course.next()) is not None:
        decided = course.decided
        moment = index if by_pass else decided
        if after:
            moment = index + 1 if by_pass else _known_after(plan, moment + forward.targets.shape[-1])
        if branches == 2 and isinstance(moment, int) and moment > last_guided:
            branches = 1
            if cache is not None:
                cache.narrow(batch)
            embedded, ids = embedded[:batch], ids[:batch]
            padding = None if padding is None else padding[:batch]
        plain = cache is None and branches == 2 and isinstance(moment, int) and weights[moment] == 1.0
        live = 1 if plain else branches
        fed = ids[: live * batch]
        logits = generator.step(
            fed.masked_fill(fed < 0, generator.unknown_id) if marked and head is None else fed,
            embedded[: live * batch],
            forward.repeated(live),
            places if places.dim() == 1 else places[: live * batch],
            cache,
            padding=None if padding is None else padding[: live * batch],
            blank=blank,
            located=None if located is None else located[index],
        )
        targets = forward.targets.expand(batch, -1)
        weight: float | Tensor = 1.0
        if live > 1:
            if isinstance(moment, int):
                weight = weights[moment]
            else:
                assert by_moment is not None
                weight = by_moment[moment][:, None, None]
        by_kernels = plainly and isinstance(weight, float) and draws_here(logits)
        if not by_kernels:
            logits = logits.float()
        if head is not None:
            assert isinstance(weight, float)
            if trace is not None:
                trace(index, logits[:batch])
            tokens = head.draw(
                list(logits.chunk(live)),
                _ordered(order.expand(batch, -1), targets),
                weight,
                partial(noise.normal, targets, head.channels),
                steps=min(head.train_steps, sampling.diffusion_steps or DIFFUSION_STEPS),
                temperature=sampling.temperature,
            )
        elif by_kernels:
            assert isinstance(noise, KeyedNoise)
            assert isinstance(weight, float)
            # The kernel writes the tokens where the scatter below would.
            written = known is None and watch is None
            tokens = draw_tokens(
                logits,
                noise.first,
                targets,
                weight=weight,
                temperature=sampling.temperature,
                copies=ids.view(branches, batch, -1) if written else None,
            )
            if written:
                index += 1
                continue
        else:
            if live > 1:
                share = decided / total if isinstance(decided, int) else 0.0
                logits = guide(logits, live, weight, 0.0 if spatial is None else spatial.weight(share))
            if trace is not None:
                trace(index, logits)
            scores, tokens = _choose(logits, targets, sampling, course, noise)
            tokens = course.settle(tokens, scores)
        if known is not None:
            tokens = torch.where(given.gather(1, targets), fixed.gather(1, targets), tokens)
        where = targets if head is None else targets[..., None].expand_as(tokens)
        shape = (branches, *tokens.shape)
        ids.view(branches, batch, *ids.shape[1:]).scatter_(2, where.expand(shape), tokens.expand(shape))
        if watch is not None:
            watch(index, _in_raster(ids[:batch, :total], order))
        index += 1
    finished = _in_raster(ids[:batch, :total], order)
    return finished.clamp(min=0) if head is None else finished.nan_to_num()


def decoding_order(plan: Plan, seed: int | Tensor, sample_index: Tensor, known: Tensor | None = None) -> Tensor:
    """Raster position of every order index, int64 [N], or [B, N] where the plan draws an order per sample.

    Args:
        plan: decode order.
        seed: keys the draws, a number or an int64 scalar.
        sample_index: int64 [B].
        known: bool [B, N], raster order; given tokens come first in plans of any order.
    """
    order = plan.on(sample_index.device).order
    if plan.shuffled:
        order = keyed_uniform(
            seed, _ORDER_STREAM, sample_index[:, None], torch.arange(len(order), device=order.device)
        ).argsort(1)
    if plan.any_order and known is not None:
        order = order.expand(len(known), -1)
        order = order.gather(1, (~known.gather(1, order)).long().argsort(dim=1, stable=True))
    return order


def check_sampling(generator: Transformer, sampling: Sampling) -> None:
    """Refuse settings that have no effect on the tokens of a network.

    Raises:
        UserError: naming what to set.
    """
    if generator.latent_head is None:
        if sampling.diffusion_steps is not None:
            raise UserError("sampling.diffusion_steps has no effect: this generator draws token ids; set it to null")
        return
    if sampling.greedy or sampling.top_k or sampling.top_p != 1.0:
        raise UserError(
            "continuous tokens are drawn by diffusion; sampling.greedy, top_k and top_p have no effect on them: set "
            "greedy=false, top_k=0 and top_p=1 (sampling.temperature scales the noise)"
        )


def _check_known(plan: Plan, known: Tensor | None) -> None:
    if not plan.num_known:
        return
    counts = [] if known is None else known.sum(1).unique().tolist()
    if counts != [plan.num_known]:
        raise UserError(
            f"schedule '{plan.name}' expects {plan.num_known} given tokens in every sample, there are "
            f"{', '.join(map(str, counts)) or 'none'}; set schedule.num_known to that number"
        )


def _course(plan: Plan, batch: int, device: torch.device, noise: Noise, known: Tensor | None) -> Course:
    """Begin the walk through a plan."""
    forwards = plan.on(device).forwards
    if plan.policy is None:
        return StaticCourse(forwards, plan.decided_before())
    return plan.policy.start(forwards[0], batch, noise.uniform, known)


def _guidance_weights(plan: Plan, sampling: Sampling) -> list[float]:
    """Weights by number of tokens decided or passes done, whichever the guidance follows."""
    guidance = sampling.guidance
    moments = plan.num_tokens if guidance.along == "tokens" else plan.num_passes
    if moments is None:
        raise UserError(
            f"sampling.guidance.along=passes needs to know how many passes there will be; with this schedule "
            f"('{plan.name}') it depends on the samples: set along=tokens"
        )
    return [guidance.weight(moment, moments) for moment in range(moments + 1)]


def _moments(plan: Plan, sampling: Sampling, last: int, num_passes: int | None) -> Sequence[int]:
    """Numbers of tokens or passes by which the passes find their guidance weights; all that may occur."""
    guidance = sampling.guidance
    after = guidance.counted == "after"
    if guidance.along == "passes":
        return range(after, last + after)
    if plan.policy is None:
        before = plan.decided_before()
        later = [_known_after(plan, decided) for decided in [*before[1:], plan.num_tokens]]
        return (later if after else before)[:num_passes]
    if after:
        raise UserError(
            f"sampling.guidance.counted=after with along=tokens needs to know how many tokens a pass will decide; with "
            f"this schedule ('{plan.name}') the samples decide: set along=passes"
        )
    return range(last)


def _known_after(plan: Plan, decided: Any) -> Any:
    """Tokens known after a pass, by which it is guided; the last pass counts as leaving one open (MAR's code)."""
    return min(decided, max(1, plan.num_tokens - 1)) if isinstance(decided, int) else decided


def _ordered(values: Tensor, order: Tensor) -> Tensor:
    """Values [B, N] in raster order, brought into the order of decoding, int64 [N] or [B, N]."""
    return values[:, order] if order.dim() == 1 else values.gather(1, order)


def _in_raster(values: Tensor, order: Tensor) -> Tensor:
    """Values [B, N] or [B, N, C] in the order of decoding, brought into raster order."""
    places = order.expand(values.shape[:2])
    if values.dim() == 3:
        places = places[..., None].expand_as(values)
    return torch.empty_like(values).scatter_(1, places, values)


def _embed_condition(generator: Transformer, condition: Tensor, branches: int) -> Tensor:
    """Embed the condition, followed by the null condition for every further guidance branch."""
    if branches == 1:
        return generator.embed_condition(condition)
    drop = torch.zeros(branches * len(condition), dtype=torch.bool, device=condition.device)
    drop[len(condition) :] = True
    return generator.embed_condition(condition.repeat(branches, *([1] * (condition.dim() - 1))), drop)


def _blank(given: Tensor, spatial: SpatialGuidance, order: Tensor, seed: Tensor, sample_index: Tensor) -> Tensor:
    """Given tokens hidden from the third branch, bool [3 B, N] in the order of decoding."""
    hidden = keyed_uniform(seed, _BLANK_STREAM, sample_index[:, None], order).masked_fill(~given, 2.0)
    count = (given.sum(1, keepdim=True) * spatial.hidden).round()
    third = hidden.argsort(1).argsort(1) < count
    return torch.cat([torch.zeros_like(third), torch.zeros_like(third), third])


def guide(logits: Tensor, branches: int, weight: float | Tensor, spatial: float) -> Tensor:
    """Combine two or three guidance branches [branches B, D, V] into [B, D, V]; the weight is a number or [B, 1, 1]."""
    conditional, unconditional, *partial = logits.chunk(branches)
    if partial:
        return partial[0] + weight * (conditional - unconditional) + spatial * (unconditional - partial[0])
    if isinstance(weight, float) and weight == 1.0:
        return conditional
    return unconditional + weight * (conditional - unconditional)


def _choose(
    logits: Tensor, targets: Tensor, sampling: Sampling, course: Course, noise: Noise
) -> tuple[Tensor | None, Tensor]:
    """What the course wants to settle by, float [B, D, V] or None, and tokens int64 [B, D], from logits [B, D, V]."""
    if course.softmax_temperature != 1.0:
        logits = logits / course.softmax_temperature
    if not sampling.greedy:
        logits = filter_logits(logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    cold = sampling.greedy or course.draw_temperature == 0.0
    sharp = logits if cold or course.draw_temperature == 1.0 else logits / course.draw_temperature
    tokens = logits.argmax(-1) if cold else noise.pick(sharp, targets, course.trial)
    if course.needs_probabilities:
        return F.one_hot(tokens, logits.shape[-1]).float() if cold else sharp.double().softmax(-1), tokens
    return (logits if course.needs_logits else None), tokens
