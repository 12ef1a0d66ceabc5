"""Building the parts of a run from its resolved configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor, nn

from vgen.checkpoints.release import load_tokenizer, load_vae, make_plan_for, read_config
from vgen.checkpoints.titok import add_pixel_decoder
from vgen.data.codes import tokenizer_fingerprint
from vgen.data.extract import cache_codes
from vgen.data.frame_prediction import cache_conditioned_codes, check_given_frames
from vgen.data.source import CodeSource, DataSource, ImageDataset
from vgen.errors import UserError
from vgen.generators.conditioning import TextContext, TokenCondition
from vgen.generators.embedding import CodebookEmbedding
from vgen.generators.joint_text import Captions, JointText
from vgen.runtime import pick_device, rank, world_size
from vgen.sampling.decode import check_sampling
from vgen.sampling.pipeline import check_compatible, check_decoder_text
from vgen.schedules.check import check_plan
from vgen.schedules.moves import moves_of
from vgen.schedules.plan import Grid, Plan
from vgen.tokenizers.autoencoder_kl import AutoencoderKL
from vgen.tokenizers.base import Autoencoder, Tokenizer
from vgen.tokenizers.flextok import FlexTok
from vgen.tokenizers.titok import TiTok
from vgen.training.flextok_module import FlexTokModule
from vgen.training.generator_inputs import check_tokens, read_texts
from vgen.training.generator_module import GeneratorModule
from vgen.training.latent_module import LatentModule
from vgen.training.module import TrainingModule
from vgen.training.proxy_module import ProxyModule
from vgen.training.settings import Node, make
from vgen.training.titok_parts import (
    complete_from_release,
    complete_with_teacher,
    load_start,
    load_teacher,
    load_text_features,
)
from vgen.training.tokenizer_module import TokenizerModule

Source = DataSource | CodeSource


@dataclass(frozen=True)
class Parts:
    """What a run trains and how its result is released.

    Attributes:
        module: the training module.
        source: the data, as given by the user.
        network: resolved constructor arguments of the network, for the release.
        extra: further entries of the release.
        tokenizer_release: folder of the frozen tokenizer of a generator, or None.
    """

    module: TrainingModule
    source: Source
    network: Node
    extra: Node
    tokenizer_release: Path | None


def build_parts(config: Node) -> Parts:
    """Build data, networks and training module, and check that they fit each other.

    Raises:
        UserError: for parts that do not fit.
    """
    builders = {
        "tokenizer": build_tokenizer,
        "vae": build_tokenizer,
        "flextok": build_flextok,
        "generator": build_generator,
    }
    return builders[config["task"]["name"]](config)


def build_tokenizer(config: Node) -> Parts:
    """Parts of ``task=tokenizer`` and ``task=vae`` and, where a teacher is named, of ``task=titok_stage1``."""
    if "teacher" in config["task"]:
        return build_first_stage(config)
    task, network = config["task"], config["tokenizer"]
    if task["init_from"] is not None:
        network = complete_from_release(network, task["init_from"])
    tokenizer = _network(config, network, AutoencoderKL if task["name"] == "vae" else Tokenizer)
    source = _pictures(config, tokenizer)
    if task["init_from"] is not None:
        load_start(tokenizer, task["init_from"])
    loss = make(task["loss"], "task.loss")
    discriminator = make(task["discriminator"], "task.discriminator") if loss.needs_discriminator else None
    discriminator_lr = task["discriminator_lr_schedule"]
    module = TokenizerModule(
        tokenizer=tokenizer,
        discriminator=discriminator,
        loss=loss,
        optimizer=make(task["optimizer"], "task.optimizer"),
        discriminator_optimizer=make(task["discriminator_optimizer"], "task.discriminator_optimizer"),
        discriminator_lr_schedule=discriminator_lr and make(discriminator_lr, "task.discriminator_lr_schedule"),
        text_features=load_text_features(task["text_features"], tokenizer, source.num_classes),
        accumulate=task["accumulate"],
        compile_network=task["compile"],
        train_only=task["train_only"],
        kind=task["name"],
        **_shared(config),
    )
    return Parts(module, source, network, _extra(config, source), None)


def build_first_stage(config: Node) -> Parts:
    """Parts of ``task=titok_stage1``."""
    task = config["task"]
    teacher = load_teacher(task["teacher"])
    network = complete_with_teacher(config["tokenizer"], teacher)
    tokenizer = _network(config, network, TiTok)
    assert isinstance(tokenizer, TiTok)
    source = _pictures(config, tokenizer)
    add_pixel_decoder(tokenizer, teacher)
    module = ProxyModule(
        tokenizer=tokenizer,
        teacher=teacher,
        quantizer_weight=task["quantizer_weight"],
        optimizer=make(task["optimizer"], "task.optimizer"),
        accumulate=task["accumulate"],
        compile_network=task["compile"],
        **_shared(config),
    )
    return Parts(module, source, network, _extra(config, source), None)


def build_flextok(config: Node) -> Parts:
    """Parts of ``task=flextok``: the VAE comes from its release, with the spread of its latents measured."""
    task, network = config["task"], {**config["tokenizer"]}
    device = pick_device("cpu" if config["trainer"]["accelerator"] == "cpu" else "auto")
    if "vae" not in network:
        raise UserError("task=flextok trains a FlexTok; choose one with tokenizer=flextok_<size>")
    vae, stated = load_vae(task["vae"])
    network["vae"] = _same_vae(network["vae"], stated)
    source = _pictures(config, vae)
    if task["measure_scale"]:
        network["vae"]["scaling_factor"] = measured_scale(vae, source.train, device=device)
    tokenizer = _network(config, network, FlexTok)
    assert isinstance(tokenizer, FlexTok)
    tokenizer.vae.load_state_dict(vae.state_dict())
    if task["measure_codes"]:
        spread_codes(tokenizer, source.train, device=device)
    repa = make(task["repa"], "task.repa", dim=tokenizer.decoder.dim) if task["repa"]["weight"] > 0 else None
    module = FlexTokModule(
        tokenizer=tokenizer,
        optimizer=make(task["optimizer"], "task.optimizer"),
        encoder_lr_scale=task["encoder_lr_scale"],
        times=make(task["times"], "task.times"),
        lengths=task["lengths"],
        null_probability=task["null_probability"],
        saturation_weight=task["saturation_weight"],
        unrounded_probability=task["unrounded_probability"],
        sample_posterior=task["sample_posterior"],
        repa=repa,
        compile_network=task["compile"],
        **_shared(config),
    )
    return Parts(module, source, network, _extra(config, source), None)


def measured_scale(
    vae: AutoencoderKL, dataset: ImageDataset, pixels: int = 2**20, device: str | torch.device = "cpu"
) -> float:
    """The factor that gives the latents of a VAE a standard deviation of 1, from the first pictures of a set.

    Args:
        vae: on the CPU, where it is again afterwards.
        dataset: seen without augmentation.
        pixels: how many are looked at, for example 16 pictures of 256 x 256.
        device: where the latents are computed.
    """
    vae.to(device)
    with torch.no_grad():
        latents = [vae.encode(part) / vae.scaling_factor for part in _first(dataset, pixels, vae.image_size, device)]
    vae.cpu()
    # Rounded, so that a resumed run on another machine states the same number.
    return float(f"{1.0 / torch.cat(latents).std().item():.3g}")


def spread_codes(
    tokenizer: FlexTok, dataset: ImageDataset, pixels: int = 2**20, device: str | torch.device = "cpu"
) -> None:
    """Let every channel of the codes begin with all of its levels in use; arguments as in :func:`measured_scale`.

    Registers of an untrained encoder share a mean that lies anywhere. Where that is in the flat part of FSQ's bound,
    the channel has one level and no gradient.
    """
    tokenizer.to(device)
    latents = [tokenizer.latents(part) for part in _first(dataset, pixels, tokenizer.image_size, device)]
    tokenizer.encoder.spread_outputs(torch.cat(latents))
    tokenizer.cpu()


def _first(dataset: ImageDataset, pixels: int, image_size: int, device: str | torch.device) -> Iterator[Tensor]:
    """The first pictures of a set, that many pixels of them, in batches."""
    count = min(max(1, pixels // image_size**2), len(dataset))
    for part in torch.arange(count).split(64):
        yield torch.stack([dataset[int(index)]["pixels"] for index in part]).to(device)


def _same_vae(configured: Node, released: Node) -> Node:
    """The configuration of the released VAE, if it is the one the tokenizer was configured for."""
    for key in sorted(configured.keys() | released.keys()):
        if key not in ("scaling_factor", "kl_weight") and configured.get(key) != released.get(key):
            raise UserError(
                f"tokenizer.vae.{key}={configured.get(key)} does not fit task.vae, whose {key} is {released.get(key)}; "
                "choose the tokenizer made for that VAE, or set the key"
            )
    return {**released}


def _network(config: Node, arguments: Node, wanted: Any) -> Autoencoder:
    network = make(arguments, "tokenizer")
    if not isinstance(network, wanted):
        raise UserError(
            f"task={config['task']['name']} trains a {wanted.__name__}, tokenizer._target_ is a "
            f"{type(network).__name__}; choose another tokenizer=<name> or task=<name>"
        )
    return network


def _pictures(config: Node, network: Autoencoder) -> DataSource:
    source = make(config["data"], "data")
    if isinstance(source, CodeSource):
        raise UserError("data=codes holds token ids; a tokenizer is trained on pictures")
    _check_image_size(source, network)
    return source


def build_generator(config: Node) -> Parts:
    """Parts of ``task=generator``."""
    task = config["task"]
    release = Path(task["tokenizer"])
    if not release.is_dir():
        raise UserError(f"task.tokenizer={release} does not exist; train a tokenizer first and give its release folder")
    read_config(release, "tokenizer")
    tokenizer = load_tokenizer(release)
    check_tokens(config["generator"], task, tokenizer)
    source = make(config["data"], "data")
    _check_data(source, tokenizer)
    texts = read_texts(config["generator"], task)
    network = complete_generator(
        config["generator"],
        config["schedule"],
        vocab_size=tokenizer.codebook_size,
        grid=tokenizer.grid,
        num_classes=source.num_classes,
        codebook_dim=tokenizer.codebook.shape[1] if tokenizer.codebook_size else 0,
        latent_channels=tokenizer.latent_channels,
        texts=texts,
    )
    generator = make(network, "generator")
    if texts is not None:
        generator.condition.attach(texts)
    if isinstance(generator.tok_embeddings, CodebookEmbedding):
        generator.tok_embeddings.load_codebook(tokenizer.codebook, std=task["codebook_std"])
    _check_condition(task, generator.condition, source, tokenizer)
    if isinstance(generator.condition, JointText):
        check_decoder_text(generator.condition, tokenizer)
    plan = make_plan_for(generator, config["schedule"])
    check_compatible(generator, tokenizer)
    check_sampling(generator, make(config["sampling"], "sampling"))
    generator.check_plan(plan)
    check_plan(plan)
    module = (LatentModule if tokenizer.latent_channels else GeneratorModule)(
        generator=generator,
        tokenizer=tokenizer,
        plan=plan,
        optimizer=make(task["optimizer"], "task.optimizer"),
        condition_dropout=task["condition_dropout"],
        label_smoothing=task["label_smoothing"],
        visible_weight=task["visible_weight"],
        given_frames=task["given_frames"],
        compile_network=task["compile"],
        compile_group=task["compile_group"],
        attention=task["attention"],
        residual=task["residual"],
        fused_loss=task["fused_loss"],
        fused_rotation=task["fused_rotation"],
        **_shared(config),
    )
    extra = {"schedule": config["schedule"], "given_frames": task["given_frames"], **_extra(config, source)}
    return Parts(module, source, network, extra, release)


def complete_generator(
    generator: Node,
    schedule: Node,
    *,
    vocab_size: int,
    grid: Grid,
    num_classes: int,
    codebook_dim: int = 0,
    latent_channels: int = 0,
    texts: Tensor | Captions | None = None,
) -> Node:
    """Fill in what a generator takes from its tokenizer, its data and its schedule.

    Args:
        generator: resolved configuration of the network.
        schedule: resolved configuration of the decode order.
        vocab_size: codes of the tokenizer.
        grid: token grid of the tokenizer.
        num_classes: classes of the data.
        codebook_dim: width of the tokenizer's codes, for ``generator.codebook_dim=auto``.
        latent_channels: channels of the tokenizer's continuous tokens, 0 for ids.
        texts: features of the caption of every class, [num_classes, T, E], for a generator conditioned on text; with
            joint streams those of every class and of the empty string.

    Returns:
        Complete constructor arguments.

    Raises:
        UserError: if the configuration states another value than the part it comes from.
    """
    condition = dict(generator["condition"])
    kind = get_class(condition["_target_"])
    if texts is not None and kind not in (TextContext, JointText):
        raise UserError("task.text_features has no effect on this generator; choose one such as flextok_ar_text_d12")
    if kind in (TextContext, JointText):
        _fill_text(condition, texts, num_classes)
    elif kind is TokenCondition:
        _fill(condition, "num_tokens", prod(grid), "generator.condition", "the tokens of the first frames")
    else:
        _fill(condition, "num_classes", num_classes, "generator.condition", "the data's classes")
    network = {**generator, "condition": condition}
    _fill(network, "vocab_size", vocab_size, "generator", "the tokenizer's codebook")
    _fill(network, "grid", list(grid), "generator", "the tokenizer's token grid")
    if network.get("latent_head") is not None:
        head = {**network["latent_head"]}
        _fill(head, "channels", latent_channels, "generator.latent_head", "the tokenizer's latents")
        _fill(head, "num_tokens", prod(grid), "generator.latent_head", "the tokenizer's token grid")
        network["latent_head"] = head
    slots = make(condition, "generator.condition").num_slots
    plan: Plan = make(schedule, "schedule")(grid=grid, num_condition=slots)
    _fill(network, "num_readouts", plan.num_heads, "generator", "the schedule's output heads")
    _fill(network, "num_learned", plan.num_learned, "generator", "the schedule's learned slots")
    _fill(network, "position_queries", plan.has_queries, "generator", "the schedule's position queries")
    _fill(network, "mask_token", plan.masking is not None, "generator", "the schedule's mask token")
    if network.get("codebook_dim") == "auto":
        network["codebook_dim"] = codebook_dim
    if "direction" in network.get("adaln", ()) and network.get("directions") is None:
        network["directions"] = [list(move) for move in moves_of(plan)]
    return network


def _fill_text(condition: Node, texts: Tensor | Captions | None, num_classes: int) -> None:
    if texts is None or len(texts) != num_classes:
        found = "none is given" if texts is None else f"the file has {len(texts)} captions"
        also = " and, last, of the empty string" if isinstance(texts, Captions) else ""
        raise UserError(
            f"this generator is conditioned on text: task.text_features must name a safetensors file with the features "
            f"of one caption for each of the {num_classes} classes of the data{also}; {found}"
        )
    features = texts.features if isinstance(texts, Captions) else texts
    _fill(condition, "num_features", features.shape[1], "generator.condition", "task.text_features")
    _fill(condition, "caption_dim", features.shape[2], "generator.condition", "task.text_features")
    if isinstance(texts, Captions):
        _fill(condition, "pooled_dim", texts.pooled.shape[1], "generator.condition", "task.text_features")


def _fill(node: Node, name: str, value: Any, key: str, owner: str) -> None:
    stated = node.get(name)
    if stated is not None and stated != value:
        raise UserError(f"{key}.{name}={stated} does not fit {owner}: {value}; leave it out, it is filled in")
    node[name] = value


def training_data(config: Node, parts: Parts, device: torch.device) -> Source:
    """The data a run reads batches from: the user's, or codes cached from it (encoded now if need be)."""
    task, module = config["task"], parts.module
    if task["name"] != "generator" or isinstance(parts.source, CodeSource) or not task["cache_codes"]:
        return parts.source
    assert isinstance(module, GeneratorModule)
    source, augmentation, given_frames = parts.source, task["cache_augmentation"], task["given_frames"]
    tokenizer = tokenizer_fingerprint(module.tokenizer)
    name = f"{source.name}-{source.train.fingerprint()[:8]}-{tokenizer[:12]}-{augmentation}"
    cache = cache_codes if given_frames is None else partial(cache_conditioned_codes, given_frames=given_frames)
    return cache(
        source,
        module.tokenizer,
        Path(config["paths"]["cache"]) / "codes" / name,
        augmentation=augmentation,
        batch_size=task["cache_batch_size"],
        device=device,
        seed=config["seed"],
        crop_ratios=tuple(task["cache_crop_ratios"]),
        num_workers=task["num_workers"],
        # Not the trainer's figures: where the trainer starts its own processes they do not exist yet.
        rank=rank(),
        world_size=world_size(),
    )


def _shared(config: Node) -> dict[str, Any]:
    task = config["task"]
    return {
        "lr_schedule": make(task["lr_schedule"], "task.lr_schedule"),
        "clip": task["clip"],
        "ema_decay": task["ema"]["decay"],
        "ema_warmup": task["ema"]["warmup"],
        "seed": config["seed"],
        "config": config,
    }


def _extra(config: Node, source: Source) -> Node:
    data = {"name": source.name, "num_classes": source.num_classes, "class_names": list(source.class_names)}
    if isinstance(source, DataSource) and source.fps is not None:
        data["fps"] = source.fps
    training = {name: config[name] for name in ("data", "task", "seed")}
    training["max_steps"] = config["trainer"]["max_steps"]
    return {"data": data, "training": training}


def _check_image_size(source: DataSource, tokenizer: Autoencoder) -> None:
    if source.image_size != tokenizer.image_size:
        raise UserError(
            f"data.image_size={source.image_size} differs from tokenizer.image_size={tokenizer.image_size}; "
            "make them equal"
        )
    if source.num_frames != tokenizer.num_frames:
        what = "pictures" if source.num_frames is None else f"clips of {source.num_frames} frames"
        raise UserError(
            f"the data are {what} but tokenizer.num_frames={tokenizer.num_frames}; choose data and tokenizer of one "
            "kind and length"
        )


def _check_condition(task: Node, condition: nn.Module, source: Source, tokenizer: Tokenizer) -> None:
    """Frame prediction: the network, the task and the data must all know of it."""
    given_frames = task["given_frames"]
    if (given_frames is not None) != isinstance(condition, TokenCondition):
        raise UserError(
            "frame prediction takes both condition@generator.condition=frames and task.given_frames=<number>; give "
            "both or neither"
        )
    if given_frames is None or not isinstance(condition, TokenCondition):
        return
    check_given_frames(tokenizer, given_frames)
    if isinstance(source, CodeSource):
        raise UserError("data=codes does not hold the codes of first frames; frame prediction needs the clips as data")
    if task["condition_dropout"] > 0 and condition.null is None:
        raise UserError(
            f"task.condition_dropout={task['condition_dropout']} needs a null condition; set "
            "generator.condition.droppable=true, or task.condition_dropout=0"
        )


def _check_data(source: Source, tokenizer: Tokenizer) -> None:
    if isinstance(source, DataSource):
        _check_image_size(source, tokenizer)
    elif source.tokenizer_hash != tokenizer_fingerprint(tokenizer):
        raise UserError(
            "the cached codes of data.path were made by another tokenizer than task.tokenizer; choose the one that "
            "made them, or encode again"
        )
