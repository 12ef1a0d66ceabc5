"""Golden cases of the MaskGIT generators of TiTok: masking, logits, losses, unmasking, schedules, manifests."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import yaml
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare, compare_manifest, count_parameters
from adapters.orders import CONFIGS, same
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.maskgit import to_ours, to_published
from vgen.generators.conditioning import ClassCondition
from vgen.generators.transformer import Transformer
from vgen.losses.tokens import masked_cross_entropy, token_accuracy
from vgen.sampling.decode import decode
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.masked import masked
from vgen.schedules.masking import hidden_share
from vgen.schedules.plan import Plan
from vgen.schedules.unmasking import gumbel

LABEL_SMOOTHING, VISIBLE_WEIGHT = 0.1, 0.1
FIGURES = Tolerance(1e-9, 1e-6)
TYPES = "model.embeddings.token_type_embeddings.weight"


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    for known, runner in RUNNERS:
        if known(case):
            return runner(case)
    raise UnknownCase("neither a manifest, schedules, a forward pass nor unmasking")


def _preset(uvit: bool) -> dict[str, Any]:
    """Our preset of one of the two backbones, without what the run fills in."""
    options = yaml.safe_load((CONFIGS / "generator" / f"maskgit_{'uvit' if uvit else 'vit'}.yaml").read_text())
    return {name: value for name, value in options.items() if name != "defaults"}


def build(sizes: dict[str, Any], *, uvit: bool, tokens: int, vocab: int, classes: int) -> Transformer:
    """Our network with the switches of a preset and given sizes, without dropout."""
    switches = _preset(uvit) | sizes
    switches |= {name: 0.0 for name in switches if name.endswith("dropout")}
    condition = ClassCondition(num_classes=classes, dim=switches["dim"])
    return Transformer(vocab_size=vocab, grid=(tokens,), condition=condition, mask_token=True, **switches)


def _network(case: Case) -> Transformer:
    config, uvit = case.config, "pos_embed" in case.state
    layers = config["num_hidden_layers"]
    sizes = {
        "dim": config["hidden_size"],
        "depth": layers // 2 * 2 + 1 if uvit else layers,
        "heads": config["num_attention_heads"],
        "ffn_hidden": config["intermediate_size"],
    }
    generator = build(
        sizes,
        uvit=uvit,
        tokens=config["image_seq_len"],
        vocab=config["codebook_size"],
        classes=config["condition_num_classes"],
    )
    load_strict(generator, to_ours(case.state), what=case.name)
    return generator.eval()


def _relative(want: Tensor) -> Tolerance:
    """Rounding grows with the largest value of a tensor, as the cases state."""
    return Tolerance(1e-5 * max(1e-2, want.abs().max().item()), 1e-4)


def run_manifest(case: Case) -> list[Check]:
    """Our preset, on the meta device, has exactly the published names, shapes and number of parameters."""
    uvit = "pos_embed" in case.manifest
    words, head, places = (
        ("embeddings.weight", "lm_head.bias", "pos_embed")
        if uvit
        else (
            "model.embeddings.word_embeddings.weight",
            "model.lm_head.bias",
            "model.embeddings.position_embeddings.weight",
        )
    )
    vocab = case.manifest[head][0]
    rows, width = case.manifest[words]
    with torch.device("meta"):
        generator = build({}, uvit=uvit, tokens=case.manifest[places][-2] - 1, vocab=vocab, classes=rows - vocab - 2)
    ours = generator.state_dict()
    published = to_published(ours)
    checks = compare_manifest(case, published, sum(value.numel() for value in published.values()))
    # The two token types of BERT are part of our positions.
    spare = sum(value.numel() for value in published.values()) - count_parameters(generator)
    checks.append(same("token types", spare, 0 if uvit else 2 * width))
    return [*checks, Check("round trip", 0.0, set(to_ours(published)) == set(ours), "names do not survive")]


def run_forward(case: Case) -> list[Check]:
    """Masking from recorded draws, logits of both branches, loss, accuracy and gradients."""
    generator = _network(case)
    ids, labels = case.inputs["tokens"], case.inputs["classes"]
    plan = masked(grid=generator.grid, steps=1)
    assert plan.masking is not None
    hidden = plan.masking.hidden(case.inputs["timesteps"], case.inputs["rand"])
    fed = ids.masked_fill(hidden, generator.unknown_id)
    checks = [case.compare("masks", hidden.long(), EXACT), case.compare("masked_tokens", fed, EXACT)]
    checks.append(compare("input", fed, case.inputs["masked_tokens"], EXACT))

    logits = generator.logits(ids, labels, plan, hidden=hidden)
    with torch.no_grad():
        null = generator.logits(ids, labels, plan, hidden=hidden, drop=torch.ones_like(labels, dtype=torch.bool))
    loss = masked_cross_entropy(logits, ids, hidden, visible_weight=VISIBLE_WEIGHT, label_smoothing=LABEL_SMOOTHING)
    loss.backward()
    gradients = to_published({name: p.grad for name, p in generator.named_parameters() if p.grad is not None})
    if TYPES in gradients:
        # Row 0 is added at every position.
        gradients[TYPES][0] = gradients[TYPES.replace("token_type", "position")].sum(0)
    got = {
        "logits": logits,
        "logits_uncond": null,
        "loss": loss.reshape(1),
        "correct_tokens": token_accuracy(logits, ids, hidden).reshape(1),
        **{f"grad.{name}": value for name, value in gradients.items()},
    }
    wanted = [name for name in case.outputs if name not in ("masks", "masked_tokens")]
    return checks + [compare(name, got[name], case.outputs[name], _relative(case.outputs[name])) for name in wanted]


class RecordedNoise:
    """The uniform draws of a case: [S, B, N, V] for tokens, [S, B, N] for confidences."""

    def __init__(self, tokens: Tensor, confidence: Tensor) -> None:
        self._tokens, self._confidence = tokens, confidence

    def pick(self, logits: Tensor, targets: Tensor, trial: int) -> Tensor:
        return (logits + gumbel(self._tokens[trial])).argmax(-1)

    def uniform(self, index: Tensor, trial: Tensor, stream: int) -> Tensor:
        return self._confidence[int(trial[0, 0])]


def guidance_of(settings: dict[str, Any]) -> Guidance:
    """Constant and linear guidance count one less than ours, linear from 0; power-cosine is ours."""
    schedule = settings["guidance_decay"]
    return Guidance(
        scale=settings["guidance_scale"],
        schedule=schedule,
        convention="plain" if schedule == "power-cosine" else "one-plus",
        along="passes",
        initial=0.0,
        power=settings["guidance_scale_pow"],
    )


def plan_of(settings: dict[str, Any], tokens: int, steps: int) -> Plan:
    return masked(
        grid=(tokens,),
        steps=steps,
        noise_temperature=settings["randomize_temperature"],
        softmax_annealing=settings["softmax_temperature_annealing"],
    )


def run_generate(case: Case) -> list[Check]:
    """Every run of the case: ids and both logits of every step, final tokens, guidance, number of passes."""
    generator, checks = _network(case), []
    labels = case.inputs["classes"]
    for variant in case.data["runs"]:
        name, steps = variant["name"], variant["num_sample_steps"]
        noise = None
        if f"{name}.u_token" in case.inputs:
            noise = RecordedNoise(case.inputs[f"{name}.u_token"], case.inputs[f"{name}.u_conf"])
        fed, found = [], []

        def step(ids: Tensor, *args: Any, fed: list = fed, found: list = found, **options: Any) -> Tensor:
            fed.append(ids)
            found.append(Transformer.step(generator, ids, *args, **options))
            return found[-1]

        plan = plan_of(variant, generator.grid[0], steps)
        with mock.patch.object(generator, "step", step):
            ids = decode(
                generator,
                plan,
                labels,
                sampling=Sampling(guidance=guidance_of(variant)),
                sample_index=torch.arange(len(labels)),
                noise=noise,
            )
        batch = len(labels)
        both = [logits.split(batch) for logits in found]
        got = {
            "ids": ids,
            "step_ids": torch.stack([one[:batch, : generator.grid[0]] for one in fed]),
            "cond_logits": torch.stack([parts[0] for parts in both]),
            "uncond_logits": torch.stack(
                [
                    parts[1] if len(parts) > 1 else _null(generator, plan, one[:batch], labels, stated)
                    for parts, one, stated in zip(both, fed, variant["guidance_per_step"], strict=True)
                ]
            ),
        }
        for key, value in got.items():
            want = case.outputs[f"{name}.{key}"]
            checks.append(compare(f"{name}.{key}", value, want, EXACT if key.endswith("ids") else _relative(want)))
        weights = [guidance_of(variant).weight(k, steps) for k in range(steps)]
        checks.append(_guidance(f"{name} guidance", weights, variant["guidance_per_step"], variant))
        passes, wanted = sum(len(parts) for parts in both), variant["forward_passes"]
        needed = sum(1 if weight == 1.0 else 2 for weight in weights)
        checks.append(same(f"{name} passes", (passes, passes <= wanted), (needed, True)))
    return checks


def _null(generator: Transformer, plan: Plan, fed: Tensor, labels: Tensor, stated: float) -> Tensor:
    """Unconditional logits of a pass in which ours are left out because they do not count.

    The original computes them too, except at a guidance of 0.
    """
    fed = fed[:, : plan.num_tokens]
    hidden, drop = fed == generator.unknown_id, torch.ones_like(labels, dtype=torch.bool)
    with torch.inference_mode():
        logits = generator.logits(fed.masked_fill(hidden, 0), labels, plan, hidden=hidden, drop=drop)
    return logits if stated else torch.zeros_like(logits)


def _guidance(name: str, weights: list[float], stated: list[float], settings: dict[str, Any]) -> Check:
    """The original states its own convention; ours is w = 1 + g except for power-cosine."""
    offset = 0.0 if settings["guidance_decay"] == "power-cosine" else 1.0
    want = torch.tensor(stated, dtype=torch.float64) + offset
    return compare(name, torch.tensor(weights, dtype=torch.float64), want, FIGURES)


def run_schedules(case: Case) -> list[Check]:
    """Counts, guidance and temperatures of every pass, masks of training, ratio functions."""
    checks = []
    for name, stated in case.data["published"].items():
        tokens, steps, rows = stated["seq_len"], stated["steps"], stated["per_step"]
        plan = plan_of(stated, tokens, steps)
        course = plan.policy.start(plan.forwards[0], 1, lambda index, *_: torch.zeros(index.shape), None)
        opened, noise, softmax = [], [], []
        while course.next() is not None:
            opened.append(tokens - course.decided)
            noise.append(course.draw_temperature)
            softmax.append(course.softmax_temperature)
            course.settle(torch.zeros(1, tokens, dtype=torch.int64), torch.zeros(1, tokens, 2))
        checks.append(same(f"{name} masked before", opened, [row["masked_before"] for row in rows]))
        checks.append(same(f"{name} masked after", [*opened[1:], 0], [row["masked_after"] for row in rows]))
        for label, got, key in (
            ("noise", noise, "annealed_temperature"),
            ("softmax", softmax, "softmax_temperature"),
        ):
            want = torch.tensor([row[key] for row in rows], dtype=torch.float64)
            checks.append(compare(f"{name} {label}", torch.tensor(got, dtype=torch.float64), want, FIGURES))
        weights = [guidance_of(stated).weight(k, steps) for k in range(steps)]
        checks.append(_guidance(f"{name} guidance", weights, [row["guidance"] for row in rows], stated))
    for row in case.data["training_mask"]:
        plan = masked(grid=(row["seq_len"],), steps=1)
        hidden = plan.masking.hidden(torch.tensor([row["t"]]), torch.rand(1, row["seq_len"]))
        checks.append(same(f"masked at t={row['t']} of {row['seq_len']}", int(hidden.sum()), row["masked"]))
        share = max(1e-6, hidden_share("arccos", row["t"]))
        checks.append(compare("ratio", share, torch.tensor(row["ratio"]), Tolerance(1e-6, 1e-6)))
    for stated in case.data["ratio_functions"]:
        values = torch.tensor(stated["values"], dtype=torch.float64)
        got = hidden_share(stated["mode"], values[:, 0])
        checks.append(compare(f"ratio {stated['mode']}", got, values[:, 1], Tolerance(2e-6, 1e-6)))
    return checks


RUNNERS: list[tuple[Callable[[Case], bool], Callable[[Case], list[Check]]]] = [
    (lambda c: c.is_manifest and ("pos_embed" in c.data or TYPES in c.data), run_manifest),
    (lambda c: not c.state and "ratio_functions" in c.data, run_schedules),
    (lambda c: bool(c.state) and "timesteps" in c.inputs, run_forward),
    (lambda c: bool(c.state) and "runs" in c.data, run_generate),
]
