"""Golden cases of FlexTok: FSQ, both transformers, flow sampling and guidance, the VAE, and published layouts."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from adapters import EXACT, Case, Check, Tolerance, UnknownCase, compare_manifest, count_parameters
from torch import Tensor

from vgen.checkpoints.convert import load_strict
from vgen.checkpoints.flextok import to_ours, to_published, vae_config, vae_to_ours
from vgen.tokenizers.autoencoder_kl import AutoencoderKL
from vgen.tokenizers.flextok import FlexTok
from vgen.tokenizers.flextok_layers import PatchPositions, TimeEmbedding, sincos_table, visibility_mask
from vgen.tokenizers.flextok_networks import FlowDecoder, RegisterEncoder
from vgen.tokenizers.flow import FlowSampling, TimeSampler, integrate, noised
from vgen.tokenizers.flow_guidance import FlowGuidance, GuidedVelocity
from vgen.tokenizers.fsq import FSQ
from vgen.tokenizers.nested_dropout import kept_lengths

FLOATS, VELOCITY, LATENTS = Tolerance(1e-6, 1e-6), Tolerance(3e-5, 1e-6), Tolerance(2e-5, 1e-6)
SAMPLED, IMAGES, FREQUENCY = Tolerance(1e-4, 1e-6), Tolerance(3e-4, 1e-6), Tolerance(0.02, 0.0)


def run(case: Case) -> list[Check]:
    """Find out what a case is from its content and run it."""
    for known, runner in RUNNERS:
        if known(case):
            with torch.no_grad():
                return runner(case)
    raise UnknownCase("neither a manifest nor a part of FlexTok")


def stated(case: Case, topic: str, default: Tolerance) -> Tolerance:
    """Tolerance of a case, which may be one number, a number per topic, or words."""
    value = case.data.get("tolerance")
    if isinstance(value, Mapping):
        value = value.get(topic)
    return Tolerance(float(value), 1e-6) if isinstance(value, int | float) else default


# Published files


def run_manifest(case: Case) -> list[Check]:
    """A published file: the network is built from the shapes it states."""
    manifest = case.manifest
    if not any(name.startswith("encoder.module_dict.") for name in manifest):
        with torch.device("meta"):
            vae = AutoencoderKL(**arguments(vae_config(manifest, {"scaling_factor": 1.0}, image_size=256)))
        return compare_manifest(case, vae.state_dict(), count_parameters(vae))
    with torch.device("meta"):
        tokenizer = preset_of(manifest)
    # The original's fixed position tables are frozen parameters.
    networks = {name: getattr(tokenizer, name).state_dict() for name in ("encoder", "decoder", "vae")}
    parts = {name: sum(value.numel() for value in state.values()) for name, state in networks.items()}
    header = dict(case.data["__file__"]) if isinstance(case.data["__file__"], Mapping) else {}
    counts = header.pop("params", {})
    plain = Case(case.path, case.data | {"__file__": header})
    checks = compare_manifest(plain, to_published(tokenizer.state_dict()), sum(parts.values()))
    return checks + [
        Check(f"{k} parameters", abs(n - counts[k]), n == counts[k]) for k, n in parts.items() if k in counts
    ]


def preset_of(manifest: Mapping[str, tuple[int, ...]]) -> FlexTok:
    """The tokenizer whose tensors a manifest lists."""
    prefix = "vae.vae."
    shapes = {name.removeprefix(prefix): shape for name, shape in manifest.items() if name.startswith(prefix)}
    vae = arguments(vae_config(shapes, {"scaling_factor": 1.0}, image_size=256))
    dims = {part: manifest[f"{part}.module_dict.{key}.patch_proj.weight"] for part, key in PATCHES.items()}
    return FlexTok(
        vae=AutoencoderKL(**vae),
        num_tokens=manifest["encoder.module_dict.enc_register_module.registers"][0],
        patch=math.isqrt(dims["encoder"][1] // vae["latent_channels"]),
        encoder={"dim": dims["encoder"][0], "depth": depth(manifest, "enc_transformer")},
        decoder={"dim": dims["decoder"][0], "depth": depth(manifest, "dec_transformer")},
    )


PATCHES = {"encoder": "enc_patch_emb", "decoder": "dec_noise_patch_emb"}


def depth(names: Iterable[str], trunk: str) -> int:
    return 1 + max(int(name.split(".blocks.")[1].split(".")[0]) for name in names if f"{trunk}.blocks." in name)


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "_target_"}


# Networks


def network_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments for the original's."""
    assert config["patch"][0] == config["patch"][1], "patches are square here"
    return {
        "channels": config["channels"],
        "dim": config["dim"],
        "depth": config["depth"],
        "head_dim": config["head_dim"],
        "grid": tuple(config["max_grid"]),
        "num_registers": config["n_reg"],
        "code_dim": config["fsq_dim"],
        "patch": config["patch"][0],
    }


def decoder_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return network_options(config) | {"time_features": config["freq"], "max_time": config["max_t"]}


def loaded(part: str, network: torch.nn.Module, state: Mapping[str, Tensor], case: Case) -> Any:
    """Load a golden state dict that stands below encoder. or decoder. in a published file."""
    ours = to_ours({f"{part}.{name}": value for name, value in state.items()})
    load_strict(network, {name.removeprefix(f"{part}."): value for name, value in ours.items()}, what=case.name)
    return network.eval()


def numbered(case: Case, name: str) -> list[Tensor]:
    """Inputs name.0, name.1, ..."""
    return [case.inputs[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in case.inputs))]


def packed_mask(kind: str, samples: Iterable[tuple[int, int]], size: int | None = None) -> Tensor:
    """The original packs samples into one sequence, where they do not see each other, and pads it."""
    mask = torch.block_diag(*(visibility_mask(kind, p, k).long() for p, k in samples))
    size = size or len(mask)
    return F.pad(mask, (0, size - len(mask), 0, size - len(mask)))


def run_encoder(case: Case) -> list[Check]:
    network = loaded("encoder", RegisterEncoder(**network_options(case.config)), case.state, case)
    fsq, near = FSQ(levels=case.config["fsq_levels"]), stated(case, "latents", LATENTS)
    checks, trunk, sizes = [], [], []
    for i, latents in enumerate(numbered(case, "vae_latents")):
        embedded = network.embed(latents)
        trunk.append(network.features(latents))
        sizes.append((embedded.shape[1] * embedded.shape[2], len(network.registers)))
        registers = network(latents)
        codes, ids = fsq(registers)
        got = {"patch_embed": embedded, "patch_plus_pos": network.positions(embedded), "latents": registers}
        checks += [case.compare(f"{name}.{i}", value, near) for name, value in got.items()]
        checks += [case.compare(f"quant.{i}", codes, FLOATS), case.compare(f"tokens.{i}", ids, EXACT)]
        half = len(network.registers) // 2
        # Tokens do not depend on how many follow, so fewer registers give the same beginning.
        mask = visibility_mask("causal_last", *sizes[-1])
        assert not mask[-half - 1, -half:].any()
    checks.append(case.compare("packed_out", torch.cat(trunk, dim=1), near))
    checks.append(case.compare("attn_mask", packed_mask("causal_last", sizes), EXACT))
    return checks


def run_velocity(case: Case) -> list[Check]:
    network = loaded("decoder", FlowDecoder(**decoder_options(case.config)), case.state, case)
    near, taps = stated(case, "velocity", VELOCITY), case.config["repa_layers"]
    fsq, keep, time = FSQ(levels=case.config["fsq_levels"]), case.inputs["keep_k"], case.inputs["timesteps"]
    codes = fsq.codes(case.inputs["tokens"])
    checks = [case.compare("time_embedding", network.time(time), near)]
    for i, latents in enumerate(numbered(case, "noised_latents")):
        one, t, k = codes[i : i + 1], time[i : i + 1], keep[i : i + 1]
        null, flagged = torch.ones(1, dtype=torch.bool), torch.tensor([i % 2 == 1])
        plain = network(latents, t, network.condition(one, k), taps)
        checks += [
            case.compare(f"cond_registers.{i}", network.condition(one, k).registers, near),
            case.compare(f"velocity.{i}", plain.velocity, near),
            case.compare(f"repa_features.{i}", plain.features[0], near),
        ]
        for name, condition in (
            ("velocity", network.short_condition(one, k)),
            ("velocity", network.short_condition(one[:, : int(k)])),
            ("velocity_uncond", network.condition(one, k, null)),
            ("velocity_uncond", network.null_condition(1)),
            ("velocity_all_tokens", network.condition(one)),
            ("velocity_all_tokens", network.short_condition(one)),
            ("velocity_odd_samples_uncond", network.condition(one, k, flagged)),
        ):
            checks.append(case.compare(f"{name}.{i}", network(latents, t, condition).velocity, near))
    return checks


# Sampling


def run_flow(case: Case) -> list[Check]:
    """The four runs of the original's pipeline, each once with all registers and once with the short sequence."""
    network = loaded("decoder", FlowDecoder(**decoder_options(case.config)), case.state, case)
    codes, keep = FSQ(levels=case.config["fsq_levels"]).codes(case.inputs["tokens"]), case.inputs["keep_k"]
    everything = torch.ones(len(codes), dtype=torch.bool)
    steps, config = case.config["steps"], case.config
    guidances = {
        "plain": FlowGuidance(kind="none"),
        "cfg": FlowGuidance(kind="cfg", scale=config.get("cfg_scale", 3.0)),
        "apg": FlowGuidance(kind="apg", scale=config.get("apg_scale", 7.5)),
        "callable": FlowGuidance(kind="cfg", scale=lambda t: 1.0 + 2.0 * t),
    }
    pairs = {
        "all registers": (network.condition(codes, keep), network.condition(codes, null=everything)),
        "short": (network.short_condition(codes, keep), network.null_condition(len(codes))),
    }
    checks = []
    for name, guidance in guidances.items():
        for pair in pairs.values():
            checks += trajectory(case, name, network, pair, guidance, steps)
    return checks


def trajectory(case: Case, name: str, network: Any, pair: tuple, guidance: FlowGuidance, steps: int) -> list[Check]:
    seen: dict[str, list[Tensor]] = {"x_t": [], "v_cond": [], "v_uncond": [], "v_guided": [], "t": []}

    def velocity(key: str, condition: Any) -> Callable[[Tensor, float], Tensor]:
        def evaluate(x: Tensor, time: float) -> Tensor:
            result = network(x, torch.full((len(x),), time), condition).velocity
            seen[key].append(result)
            return result

        return evaluate

    guided = GuidedVelocity(velocity("v_cond", pair[0]), velocity("v_uncond", pair[1]), guidance)

    def recorded(x: Tensor, time: float) -> Tensor:
        seen["x_t"].append(x)
        seen["t"].append(torch.tensor(time))
        seen["v_guided"].append(guided(x, time))
        return seen["v_guided"][-1]

    final = integrate(recorded, case.inputs["noise"], steps=steps)
    got = {"final": final} | {key: torch.stack(values) for key, values in seen.items() if values}
    near = stated(case, "final", SAMPLED)
    return [case.compare(f"{name}.{key}", value, near) for key, value in got.items() if f"{name}.{key}" in case.outputs]


def run_guidance(case: Case) -> list[Check]:
    settings = {
        "apg": {"kind": "apg", "scale": 7.5, "momentum": -0.5, "eta": 0.0, "threshold": 2.5},
        "apg_eta": {"kind": "apg", "scale": 3.0, "momentum": -0.25, "eta": 0.5, "threshold": 0.0},
        "apg_nomom": {"kind": "apg", "scale": 7.5, "momentum": 0.0, "eta": 0.0, "threshold": 2.5},
        "cfg": {"kind": "cfg", "scale": 7.5},
    }
    checks = []
    for output in case.outputs:
        group, name = output.rsplit(".", 1)
        if name not in settings:
            raise UnknownCase(f"out.{output} is no known guidance")
        conditional, unconditional = case.inputs[f"{group}.cond"], case.inputs[f"{group}.uncond"]
        guided = GuidedVelocity(lambda x, t: x, lambda x, t: x, FlowGuidance(**settings[name]))
        got = torch.stack([guided.combine(c, u, 1.0) for c, u in zip(conditional, unconditional, strict=True)])
        checks.append(case.compare(output, got, stated(case, "", Tolerance(1e-5, 1e-6))))
    return checks


# Parts


def run_fsq(case: Case) -> list[Check]:
    checks = []
    for group in sorted({name.split(".")[0] for name in case.outputs}):
        fsq = FSQ(levels=case.inputs[f"{group}.levels"].tolist())
        z, lookup = case.inputs[f"{group}.z"], case.inputs[f"{group}.lookup_indices"]
        codes, ids = fsq(z)
        looked = fsq.codes(lookup)
        for name, value, tolerance in (
            ("bounded", fsq.bound(z), FLOATS),
            ("quant", codes, FLOATS),
            ("indices", ids, EXACT),
            ("lookup_codes", looked, FLOATS),
            ("lookup_back", fsq.ids(looked), EXACT),
            ("basis", fsq.basis, EXACT),
        ):
            checks.append(case.compare(f"{group}.{name}", value, tolerance))
    return checks


def run_masks(case: Case) -> list[Check]:
    samples = [tuple(pair) for pair in case.inputs["samples"].tolist()]
    return [case.compare(kind, packed_mask(kind, samples, len(want)), EXACT) for kind, want in case.outputs.items()]


def run_embeddings(case: Case) -> list[Check]:
    near, config = stated(case, "", LATENTS), case.config
    (rows, columns), crop, dim = config["max_sizes"], config["crop"], config["dim"]
    fixed = PatchPositions(dim=dim, grid=(rows, columns))
    fixed.table = sincos_table(rows, columns, dim, transposed=True)
    checks = [case.compare("sincos_table", fixed.table, near)]
    checks.append(case.compare("sincos_crop", fixed(torch.zeros(1, *crop, dim)), near))
    table = case.inputs["reg_posemb"]
    decoder = FlowDecoder(
        channels=1, dim=dim, depth=1, grid=(1, 1), num_registers=table.shape[-1], code_dim=dim, head_dim=dim, patch=1
    )
    decoder.register_positions.copy_(table)
    decoder.from_codes.weight.copy_(torch.eye(dim))
    checks.append(case.compare("reg_y", decoder.embed_codes(case.inputs["reg_x"]), near))
    tables, want = case.inputs["learn2d"], case.outputs["learn2d"]
    learned = PatchPositions(dim=tables.shape[2], grid=(tables.shape[3],) * 2, kind="learned")
    learned.table.copy_(tables)
    checks.append(case.compare("learn2d", learned(torch.zeros_like(want)), near))
    for name in (name.removeprefix("t_") for name in case.inputs if name.startswith("t_max")):
        embedding = TimeEmbedding(
            dim=config["time_dim"], features=config["frequency_embedding_size"], max_time=float(name[3:])
        )
        load_strict(embedding, case.state, what=case.name)
        time = case.inputs[f"t_{name}"]
        checks.append(case.compare(f"sinusoid_{name}", embedding.sinusoids(time), near))
        checks.append(case.compare(f"temb_{name}", embedding(time), near))
    return checks


def run_nested_dropout(case: Case) -> list[Check]:
    x = case.inputs["x"]
    most, dim = x.shape[1:]
    decoder = FlowDecoder(
        channels=1,
        dim=dim,
        depth=1,
        grid=(1, 1),
        num_registers=most,
        code_dim=dim,
        head_dim=dim,
        patch=1,
        positions="learned",
    )
    names = {"mask_token": ("mask", "dropout_mask_token"), "null_token": ("null",)}
    tokens = {name: value for name, value in (case.state | case.inputs).items()}
    for parameter, words in names.items():
        found = [v for k, v in tokens.items() if any(w in k for w in words) and v.shape == (dim,)]
        decoder.get_parameter(parameter).copy_(found[0])
    decoder.from_codes.weight.copy_(torch.eye(dim))
    decoder.register_positions.zero_()
    flags = case.inputs["null_flags"].bool()
    flagged = decoder.null_condition(int(flags.sum()))
    assert torch.allclose(flagged.bias.exp(), torch.tensor(float(most)))
    checks = [
        case.compare("eval_masked", decoder.condition(x, case.inputs["eval_keep_k"]).registers, EXACT),
        case.compare("eval_no_key", decoder.condition(x).registers, EXACT),
        case.compare("null", decoder.condition(x, null=flags).registers, EXACT),
        case.compare("null_single_token", flagged.registers, EXACT),
    ]
    for mode in sorted({name.split(".")[1] for name in case.outputs if name.startswith("train.")}):
        want = case.outputs[f"train.{mode}.keep_k"]
        kept = original_draws(mode, most, want.shape, case.data["seed"])
        checks.append(case.compare(f"train.{mode}.keep_k", kept, EXACT))
        checks.append(case.compare(f"train.{mode}.last", decoder.condition(x, kept[-1]).registers, EXACT))
    for mode in sorted({name.split(".")[1] for name in case.outputs if name.startswith("hist")}):
        group = next(name for name in case.outputs if name.startswith("hist") and name.split(".")[1] == mode)
        group = group.rsplit(".", 1)[0]
        u = (torch.arange(2**16) + 0.5).double() / 2**16
        values, counts = kept_lengths(u, int(group.split(".")[0][4:]), mode).unique(return_counts=True)
        checks.append(case.compare(f"{group}.value", values, EXACT))
        checks.append(case.compare(f"{group}.freq", counts / len(u), FREQUENCY))
    return checks


def original_draws(mode: str, most: int, shape: Iterable[int], seed: int) -> Tensor:
    """Lengths for the integers the original draws from NumPy's legacy generator, one per sample."""
    rng = np.random.RandomState(seed)
    choices = math.ceil(math.log2(most)) + 1 if mode == "pow2" else most
    draws = torch.tensor([rng.randint(choices) for _ in range(math.prod(shape))])
    return kept_lengths((draws + 0.5) / choices, most, mode).view(*shape)


def run_noise(case: Case) -> list[Check]:
    near, checks = stated(case, "", Tolerance(1e-5, 1e-6)), []
    for name in sorted({name.split(".")[0] for name in case.outputs}):
        if name.startswith("logit_normal"):
            sampler = TimeSampler(kind=name)
        else:
            scale = name.removeprefix("mode_").replace("p", ".") if name.startswith("mode") else "0"
            sampler = TimeSampler(kind="mode", mode_scale=float(scale))
        time = sampler.times(case.inputs[f"{name}.raw"])
        checks.append(case.compare(f"{name}.sigma", time, near))
        checks.append(case.compare(f"{name}.x_t", noised(case.inputs["clean"], case.inputs["noise"], time), near))
    return checks


def run_vae(case: Case) -> list[Check]:
    config, near = case.config, stated(case, "", SAMPLED)
    image = case.inputs["image"]
    channels = config["block_out_channels"]
    vae = AutoencoderKL(
        image_size=2 ** (len(channels) - 1),
        latent_channels=config["latent_channels"],
        block_channels=channels,
        layers_per_block=config["layers_per_block"],
        norm_groups=config["norm_num_groups"],
        scaling_factor=config["scaling_factor"],
    ).eval()
    load_strict(vae, vae_to_ours(case.state), what=case.name)
    posterior, latents = vae.posterior(image), vae.encode(image)
    got = {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "latents_mode": latents,
        "latents_sampled": vae.encode(image, case.inputs["eps"]),
        "kl": posterior.kl(mean_scale=vae.scaling_factor),
        "image": vae.decode(latents),
    }
    tolerances = {"kl": Tolerance(near.atol, 1e-5)}
    return [case.compare(name, value, tolerances.get(name, near)) for name, value in got.items()]


def run_whole(case: Case) -> list[Check]:
    """Pictures to tokens and prefixes of different lengths back to pictures, in the published layout."""
    config = case.config
    vae, encoder, decoder = config["vae"], config["encoder"], config["decoder"]
    stride = 2 ** (len(vae["blocks"]) - 1)
    tokenizer = FlexTok(
        vae=AutoencoderKL(
            image_size=encoder["max_grid"][0] * encoder["patch"][0] * stride,
            latent_channels=vae["latent_channels"],
            block_channels=vae["blocks"],
            layers_per_block=vae["layers"],
            norm_groups=vae["groups"],
            scaling_factor=vae["scaling"],
        ),
        num_tokens=encoder["n_reg"],
        levels=config["fsq_levels"],
        patch=encoder["patch"][0],
        encoder={"dim": 64, "depth": 1},
        decoder={"dim": 64, "depth": 1},
    )
    # Built apart, because a case may have a position table that is not square.
    tokenizer.encoder = RegisterEncoder(**network_options(encoder))
    tokenizer.decoder = FlowDecoder(**decoder_options(decoder))
    tokenizer.eval()
    load_strict(tokenizer, to_ours(case.state, tokenizer), what=case.name)
    ids = tokenizer.fsq(tokenizer.encoder(tokenizer.vae.encode(case.inputs["image"])))[1]
    checks, keep, noise = [case.compare("tokens", ids, EXACT)], case.inputs["keep_k"], case.inputs["noise"]
    near = stated(case, "images", IMAGES)
    for name, guidance in (
        ("image_apg", FlowGuidance(kind="apg", scale=config["guidance_scale"])),
        ("image_plain", FlowGuidance(kind="none")),
    ):
        decoding = FlowSampling(steps=config["steps"], guidance=guidance)
        for plain in (True, False):
            latents = tokenizer.decode_latents(ids, noise, keep=keep, decoding=decoding, plain=plain)
            checks.append(case.compare(name, tokenizer.vae.decode(latents), near))
        short = [
            tokenizer.vae.decode(tokenizer.decode_latents(row[None, :k], start[None], decoding=decoding))
            for row, k, start in zip(ids, keep.tolist(), noise, strict=True)
        ]
        checks.append(case.compare(name, torch.cat(short), near))
    return checks


def has(*outputs: str) -> Callable[[Case], bool]:
    """Whether a case holds outputs that end in the given names."""
    return lambda case: all(any(name == end or name.endswith(f".{end}") for name in case.outputs) for end in outputs)


RUNNERS: list[tuple[Callable[[Case], bool], Callable[[Case], list[Check]]]] = [
    (lambda case: case.is_manifest, run_manifest),
    (lambda case: "tokens" in case.outputs and any(n.startswith("image") for n in case.outputs), run_whole),
    (has("packed_out"), run_encoder),
    (has("velocity.0"), run_velocity),
    (has("final"), run_flow),
    (has("bounded", "lookup_codes"), run_fsq),
    (lambda case: set(case.outputs) <= {"full", "causal", "causal_last"} and bool(case.outputs), run_masks),
    (has("sincos_table"), run_embeddings),
    (has("eval_masked"), run_nested_dropout),
    (has("sigma", "x_t"), run_noise),
    (has("latents_mode"), run_vae),
    (lambda case: any(name.endswith(".uncond") for name in case.inputs), run_guidance),
]
