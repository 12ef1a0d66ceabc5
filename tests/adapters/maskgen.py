"""Manifests of MaskGen, the text-to-image generators of TA-TiTok: our presets under the published names."""

from collections.abc import Mapping
from typing import Any

import torch
from adapters import Case, Check, compare_manifest, count_parameters
from adapters.orders import same

from vgen.checkpoints.__main__ import generator_preset
from vgen.checkpoints.maskgen import SPARE_ROWS, to_ours, to_published
from vgen.checkpoints.release import build
from vgen.generators.transformer import Transformer

PRESETS = ("maskgen_vq_l", "maskgen_vq_xl", "maskgen_kl_l", "maskgen_kl_xl")


def is_maskgen(names: set[str]) -> bool:
    """Whether names of a manifest are those of a MaskGen."""
    return bool(names & {"cond_pooled_proj.weight", "text_pooled_emb.weight"})


def options(preset: str, *, tokens: int, vocab: int = 0, channels: int = 0, **sizes: int) -> dict[str, Any]:
    """Constructor arguments of a preset, with what its tokenizer and its schedule fill in."""
    config = generator_preset(preset) | sizes
    dim = config["dim"]
    config |= {"_target_": "vgen.generators.transformer.Transformer", "vocab_size": vocab, "grid": [tokens]}
    config["condition"] = {**config["condition"], "dim": dim}
    if "latent_head" in config:
        config["latent_head"] = {
            **config["latent_head"],
            "dim": dim,
            "width": dim,
            "channels": channels,
            "num_tokens": tokens,
        }
    return config | {"mask_token": True}


def _built(manifest: Mapping[str, tuple[int, ...]], preset: str) -> Transformer:
    continuous = "z_proj.weight" in manifest
    places = manifest["decoder_pos_embed_learned" if continuous else "pos_embed"]
    vocab = 0 if continuous else manifest["embeddings.weight"][0] - SPARE_ROWS - 1
    channels = manifest["z_proj.weight"][1] if continuous else 0
    with torch.device("meta"):
        return build(options(preset, tokens=places[1], vocab=vocab, channels=channels))


def run_manifest(case: Case) -> list[Check]:
    """The preset with the manifest's shapes has every published name, shape and parameter, both ways."""
    kind = "maskgen_kl" if "z_proj.weight" in case.manifest else "maskgen_vq"
    for preset in PRESETS:
        if not preset.startswith(kind):
            continue
        generator = _built(case.manifest, preset)
        published = to_published(generator.state_dict())
        if {name: tuple(value.shape) for name, value in published.items()} == case.manifest:
            break
    else:
        return [Check("names and shapes", 1.0, False, "no preset of configs/generator has these names and shapes")]
    # Ours has no rows of the token table that nothing uses, and counts a tied head once, as the manifests do.
    spare = SPARE_ROWS * generator.dim if kind == "maskgen_vq" else 0
    ours = {name: tuple(value.shape) for name, value in generator.state_dict().items()}
    returned = {name: tuple(value.shape) for name, value in to_ours(published).items()}
    return [
        *compare_manifest(case, published, count_parameters(generator) + spare),
        same("round trip", returned == ours, True),
    ]
