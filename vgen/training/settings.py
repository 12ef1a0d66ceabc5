"""Reading the composed configuration: resolved once, checked before any work."""

import hashlib
import os
from inspect import signature
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vgen.errors import UserError

RUN_DIR_VARIABLE = "VGEN_RUN_DIR"
_LOCAL_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_LONGEST_NAME = 150
Node = dict[str, Any]


def resolve(config: DictConfig) -> Node:
    """Turn a composed configuration into plain containers without interpolations.

    Raises:
        UserError: naming a key that has no value yet.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise UserError(f"{getattr(error, 'full_key', None) or 'configuration'}: {message}; give it a value") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def make(node: Node, key: str, **arguments: Any) -> Any:
    """Instantiate a configuration node.

    Args:
        node: resolved, with ``_target_``.
        key: where it stands in the configuration, for messages.
        arguments: further keyword arguments.

    Raises:
        UserError: if the constructor refuses its arguments.
    """
    if "_target_" not in node:
        raise UserError(f"{key} has no _target_; choose one with {key}=<name> (python train.py --help lists them)")
    try:
        target = get_object(node["_target_"])
    except ImportError:
        target = None
    if target is not None:
        _check_switches(target, node, key)
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"{key}: {node['_target_']} cannot be built: {cause or error}") from error


def _check_switches(target: Any, node: Node, key: str) -> None:
    """Refuse words for the switches of a target: any of them would count as true."""
    for name, parameter in signature(target).parameters.items():
        if parameter.annotation in (bool, "bool") and not isinstance(node.get(name, False), bool):
            raise UserError(f"{key}.{name}={node[name]} must be true or false")


def check(config: Node) -> None:
    """Check what can be checked without building anything.

    Raises:
        UserError: naming the key and the fix.
    """
    task, trainer = config["task"], config["trainer"]
    if trainer["max_steps"] < 1:
        raise UserError(f"trainer.max_steps={trainer['max_steps']} must be at least 1")
    for name, interval in config["every"].items():
        least = 1 if name in ("log", "checkpoint") else 0
        if not isinstance(interval, int) or interval < least:
            raise UserError(f"every.{name}={interval} must be a whole number of steps, at least {least}")
    for name in ("batch_size", "accumulate"):
        if task[name] < 1:
            raise UserError(f"task.{name}={task[name]} must be at least 1")
    if task["clip"] < 0:
        raise UserError(f"task.clip={task['clip']} must not be negative (0 = no clipping)")
    if not 0 <= task["ema"]["decay"] < 1:
        raise UserError(f"task.ema.decay={task['ema']['decay']} must lie in [0, 1) (0 = none)")
    if config["keep_checkpoints"] < -1:
        raise UserError(f"keep_checkpoints={config['keep_checkpoints']} must be -1 (all), 0 (none) or a count")
    if config["matmul_precision"] not in ("highest", "high", "medium"):
        raise UserError(f"matmul_precision={config['matmul_precision']} must be highest, high or medium")
    if config["seed"] < 0:
        raise UserError(f"seed={config['seed']} must not be negative")
    scored = config["score"]["every_epochs"] or config["score"]["every_steps"]
    if scored and _shards(config):
        raise UserError(
            "score cannot be computed with trainer=fsdp, where no process holds the whole network; use trainer=ddp, or "
            "score the release with evaluate.py"
        )
    if task["name"] == "generator":
        _check_generator(config)
    else:
        _check_tokenizer(config)


def _shards(config: Node) -> bool:
    """Whether the trainer shards the network over processes."""
    strategy = config["trainer"]["strategy"]
    return isinstance(strategy, dict) and strategy["_target_"].startswith("vgen.training.sharding")


def _check_tokenizer(config: Node) -> None:
    task = config["task"]["name"]
    for group in ("generator", "schedule"):
        if config[group] is not None:
            raise UserError(f"{group} has no effect with task={task}; add ~{group} or set task=generator")
    if config["tokenizer"] is None:
        raise UserError(f"task={task} needs a network; choose one with tokenizer=<name>")
    if config["trainer"]["precision"] in ("16-mixed", "16-true", "16"):
        raise UserError(f"trainer.precision=16-mixed cannot scale the losses of task={task}; use bf16-mixed")
    if _shards(config):
        raise UserError("trainer=fsdp shards transformer blocks, which tokenizers lack; use trainer=ddp")


def _check_generator(config: Node) -> None:
    task = config["task"]
    if config["tokenizer"] is not None:
        raise UserError(
            "tokenizer=... has no effect with task=generator, which uses a trained one; add ~tokenizer and "
            "task.tokenizer=<release folder>"
        )
    for group in ("generator", "schedule"):
        if config[group] is None:
            raise UserError(f"task=generator needs {group}=<name> (python train.py --help lists them)")
    if not 0 <= task["condition_dropout"] <= 1:
        raise UserError(f"task.condition_dropout={task['condition_dropout']} must lie in [0, 1]")
    if not 0 <= task["label_smoothing"] < 1:
        raise UserError(f"task.label_smoothing={task['label_smoothing']} must lie in [0, 1)")
    if task["visible_weight"] is not None and not 0 <= task["visible_weight"] <= 1:
        raise UserError(f"task.visible_weight={task['visible_weight']} must lie in [0, 1], or be null")
    if config["score"]["every_epochs"] or config["score"]["every_steps"]:
        if task["given_frames"] is not None:
            raise UserError("score cannot give first frames; score frame prediction with sample.py and evaluate.py")
        if task["condition_dropout"] == 1 and config["score"]["labels"] != "unconditional":
            raise UserError("task.condition_dropout=1 trains without labels; set score.labels=unconditional")


def run_folder(config: Node) -> Path:
    """The folder of this run, the same in all its processes.

    The first process of a node fixes it in an environment variable for the processes it starts; a multirun job gets a
    folder named after its overrides.

    Raises:
        UserError: if a local multirun asks for several devices: the processes of a job would replay the whole sweep.
    """
    if "LOCAL_RANK" in os.environ and RUN_DIR_VARIABLE in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    folder = Path(config["run_dir"]).expanduser().absolute()
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        hydra = HydraConfig.get()
        if hydra.launcher._target_ == _LOCAL_LAUNCHER and config["trainer"]["devices"] not in (1, "1"):
            raise UserError("-m with trainer.devices > 1 works only with a cluster launcher; start the jobs one by one")
        folder = folder / _job_name(str(hydra.job.override_dirname))
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    return folder


def _job_name(overrides: str) -> str:
    """A file name for a job of a sweep: its overrides, or their hash where they are too many to read."""
    if len(overrides) <= _LONGEST_NAME:
        return overrides.replace("/", "_")
    return hashlib.sha256(overrides.encode()).hexdigest()[:16]
