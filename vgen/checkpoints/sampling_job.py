"""From the configuration of sample.py to a finished folder of samples."""

from omegaconf import DictConfig, OmegaConf

from vgen.checkpoints.release import WEIGHTS, build, file_sha256, load_pipeline, read_config
from vgen.processes import joined
from vgen.runtime import pick_cache_dtype, pick_device, pick_dtype
from vgen.sampling.engine import pick_engine
from vgen.sampling.job import run_sampling
from vgen.sampling.pixels import PixelSettings

_OPTIONAL = ("cache_dtype", "edit", "extrapolate", "num_tokens", "predict", "num_frames", "overlap")
_USUAL_FPS, _FASTEST = 8.0, 50.0


def frame_rate(fps: float | None, checkpoint: str) -> float:
    """Frames per second of clips: as asked for, else those of the data the generator was trained on."""
    if fps is not None:
        return fps
    data = read_config(checkpoint, "generator").get("data") or {}
    return min(_FASTEST, data.get("fps", _USUAL_FPS))


def sample(config: DictConfig) -> None:
    """Run the sampling job that configs/sample.yaml describes and print the files written.

    Raises:
        UserError: for anything wrong in the configuration, the checkpoint or the output folder.
    """
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    device = pick_device(plain["device"])
    sampling = build(plain["sampling"])
    pixels = PixelSettings(**plain["pixels"])
    pipeline = load_pipeline(
        plain["checkpoint"],
        device=device,
        dtype=pick_dtype(plain["dtype"]),
        cache_dtype=pick_cache_dtype(plain["cache_dtype"]),
        schedule=plain.get("schedule"),
        picture_size=plain["picture_size"],
        edit=build(plain["edit"]) if plain.get("edit") else None,
        extrapolation=build(plain["extrapolate"]) if plain.get("extrapolate") else None,
        num_tokens=plain["num_tokens"],
        text_features=plain["text_features"],
        predict=plain.get("predict"),
        num_frames=plain["num_frames"],
        overlap=plain["overlap"],
        engine=plain["engine"],
        pixels=pixels,
    )
    # Where pixels are decoded changes none.
    pixel_identity = {name: value for name, value in plain["pixels"].items() if name != "beside_tokens"}
    identity = {
        "checkpoint_sha256": file_sha256(f"{plain['checkpoint']}/{WEIGHTS}"),
        "sampling": plain["sampling"],
        "schedule": plain.get("schedule"),
        "dtype": plain["dtype"],
        "picture_size": pipeline.picture_size,
        **{name: plain[name] for name in _OPTIONAL if plain.get(name) is not None},
        **({"engine": "fused"} if pick_engine(plain["engine"], device) == "fused" else {}),
        **({"pixels": pixel_identity} if PixelSettings(**pixel_identity) != PixelSettings() else {}),
    }
    if plain["text_features"] is not None:
        identity["text_features_sha256"] = file_sha256(plain["text_features"])
    with joined(device) as peers:
        files = run_sampling(
            pipeline,
            sampling,
            peers=peers,
            identity=identity,
            out=plain["out"],
            num_samples=plain["num_samples"],
            labels=str(plain["labels"]),
            batch_size=plain["batch_size"],
            fmt=plain["format"],
            grid_pictures=plain["grid_pictures"],
            animated=plain["animate"],
            fps=frame_rate(plain["fps"], plain["checkpoint"]),
            split_batches=plain["split_batches"],
        )
        if peers.rank == 0:
            print("\n".join(str(path) for path in files))
