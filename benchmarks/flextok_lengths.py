"""What a FlexTok keeps of a picture in 1, 2, 4 ... K tokens: PSNR and Frechet distance, a plot and a picture.

    python -m benchmarks.flextok_lengths RELEASE DATA OUT --features FEATURES.pt --scales 1,1.5,2
    python -m benchmarks.flextok_lengths runs/digits_flextok/release digits runs/digits_lengths

DATA is a Hugging-Face-layout folder or ``digits``; its held-out pictures are encoded once and every prefix is decoded
with the same noise per picture. OUT receives lengths.json, lengths.png (curves) and pictures.png: one row per picture,
coarse to fine, the original last. Without ``--features`` only PSNR is measured.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.frechet_sweep import open_data, pictures, statistics
from vgen.checkpoints.release import load_tokenizer
from vgen.data.digits import digits
from vgen.evaluation.features import Extractor, load_extractor
from vgen.evaluation.frechet import Gaussian, frechet_distance
from vgen.evaluation.pixel_metrics import psnr
from vgen.pixels import from_uint8, save_grid, to_uint8
from vgen.runtime import pick_device, track
from vgen.tokenizers.flextok import FlexTok

SHOWN = 12


def doubled_lengths(most: int) -> list[int]:
    """1, 2, 4 ... below `most`, then `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power < most} | {most})


def encode(network: FlexTok, batches: list[Tensor]) -> Tensor:
    """Ids int64 [n, K] of uint8 pictures."""
    with torch.inference_mode():
        return torch.cat(
            [network.encode(from_uint8(batch.to(device_of(network)))) for batch in track(batches, "encoding")]
        )


def device_of(network: FlexTok) -> torch.device:
    """Where the weights are."""
    return network.last_layer.device


def rebuild(network: FlexTok, ids: Tensor, length: int, scale: float, batch_size: int) -> Tensor:
    """Pictures uint8 [n, 3, H, W], on the CPU, from the first tokens, at one guidance scale."""
    decoding = network.with_decoding(guidance={"scale": scale})
    made = []
    index = torch.arange(len(ids), device=ids.device)
    for part in track(index.split(batch_size), f"{length} tokens, scale {scale:g}"):
        with torch.inference_mode():
            made.append(to_uint8(network.decode(ids[part, :length], sample_index=part, decoding=decoding)).cpu())
    return torch.cat(made)


def score(made: Tensor, originals: Tensor, extractor: Extractor | None, known: Gaussian | None) -> dict[str, float]:
    """PSNR and, with an extractor, the distance to the originals."""
    row = {"psnr": psnr(made, originals).mean().item()}
    if extractor is not None and known is not None:
        row["rfd"] = frechet_distance(statistics(extractor, iter(made.split(500))), known)
    return row


def plot(rows: list[dict], path: Path) -> None:
    """Curves over the length, one per guidance scale."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measures = [name for name in ("psnr", "rfd") if name in rows[0]]
    figure, axes = pyplot.subplots(1, len(measures), figsize=(5 * len(measures), 4), squeeze=False)
    for axis, measure in zip(axes[0], measures, strict=True):
        for scale in sorted({row["scale"] for row in rows}):
            points = [row for row in rows if row["scale"] == scale]
            axis.plot([row["k"] for row in points], [row[measure] for row in points], "o-", label=f"scale {scale:g}")
        axis.set(xscale="log", xlabel="tokens", ylabel={"psnr": "PSNR (dB)", "rfd": "Frechet distance"}[measure])
        axis.set_xticks(sorted({row["k"] for row in rows}), [str(k) for k in sorted({row["k"] for row in rows})])
        axis.legend()
    if "rfd" in measures:
        axes[0][-1].set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("release", "data", "out"):
        parser.add_argument(name)
    parser.add_argument("--features", help="TorchScript extractor, such as the features.pt of CIFAR-10")
    parser.add_argument("--scales", default=None, help="guidance scales; default: the tokenizer's own")
    parser.add_argument("--lengths", default=None, help="numbers of tokens; default: 1, 2, 4 ... K")
    parser.add_argument("--pictures", type=int, default=10000, help="held-out pictures to use")
    parser.add_argument("--batch-size", type=int, default=500)
    chosen = parser.parse_args()
    device, out = pick_device(), Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    network = load_tokenizer(chosen.release)
    if not isinstance(network, FlexTok):
        parser.error(f"{chosen.release} is no FlexTok")
    network = network.to(device)
    if chosen.data == "digits":
        source = digits(image_size=network.image_size, shift=0, val_fraction=0.165, seed=0)
    else:
        source = open_data(chosen.data)
    originals = torch.cat(list(pictures(source.val)))[: chosen.pictures]
    ids = encode(network, list(originals.split(chosen.batch_size)))
    extractor = known = None
    if chosen.features:
        extractor = load_extractor(chosen.features, name=None, weights=None, device=device)
        known = statistics(extractor, iter(originals.split(500)))
    lengths = [int(k) for k in chosen.lengths.split(",")] if chosen.lengths else doubled_lengths(network.num_tokens)
    stated = network.decoding.guidance.scale
    scales = (
        [float(s) for s in chosen.scales.split(",")] if chosen.scales else [stated if not callable(stated) else 1.0]
    )
    rows, columns = [], []
    for scale in scales:
        for length in lengths:
            made = rebuild(network, ids, length, scale, chosen.batch_size)
            rows.append({"k": length, "scale": scale, **score(made, originals, extractor, known)})
            print(json.dumps(rows[-1]), flush=True)
            if scale == scales[0]:
                columns.append(made[:SHOWN])
    (out / "lengths.json").write_text(json.dumps({"pictures": len(originals), "rows": rows}, indent=1))
    plot(rows, out / "lengths.png")
    shown = torch.stack([*columns, originals[:SHOWN]], dim=1).flatten(0, 1)
    save_grid(shown, out / "pictures.png", columns=len(columns) + 1, scale=max(1, 64 // shown.shape[-1]))


if __name__ == "__main__":
    main()
