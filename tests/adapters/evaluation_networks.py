"""Golden cases of evaluation that run a network: Inception, I3D, LPIPS, and a whole job against torch-fidelity."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from adapters import Case, Check, Tolerance, UnknownCase, compare_all, compare_manifest
from adapters.hashed import hashed_state, hashed_weight
from PIL import Image
from torch import Tensor, nn

from vgen.evaluation.features import network_extractor
from vgen.evaluation.frechet import frechet_distance, gaussian_of
from vgen.evaluation.fvd import FVD_VARIANTS, prepare_clips
from vgen.evaluation.i3d import I3D, load_i3d
from vgen.evaluation.inception import Inception
from vgen.evaluation.metrics import f_score, inception_score, kernel_distance, precision_recall, sliced_distance
from vgen.evaluation.readers import open_pictures
from vgen.losses.perceptual import LPIPS
from vgen.pixels import from_uint8

ACTIVATIONS = Tolerance(None, 1e-3)


def _meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _inception_shapes() -> dict[str, Tensor]:
    """Names and shapes of the Inception network."""
    return _meta(lambda: Inception(None)).state_dict()


def _lpips_shapes() -> dict[str, Tensor]:
    """LPIPS without the constants of its input scaling, which no file holds."""
    return {k: v for k, v in _meta(LPIPS).state_dict().items() if not k.startswith("scaling_layer.")}


def run_manifest(case: Case) -> list[Check]:
    names = case.manifest
    if "logits.conv3d.weight" in names:
        state = _meta(I3D).state_dict()
    elif "Mixed_6d.branch1x1.conv.weight" in names:
        state = _inception_shapes()
    elif "lin0.model.1.weight" in names:
        state = _lpips_shapes()
    elif "classifier.6.weight" in names:
        from torchvision.models import vgg16

        state = _meta(vgg16).state_dict()
    else:
        raise UnknownCase(f"manifest of {', '.join(sorted(names)[:3])}, ...")
    learned = [v for k, v in state.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    return compare_manifest(case, state, sum(v.numel() for v in learned))


def run_inception(case: Case) -> list[Check]:
    network = Inception(hashed_state(_inception_shapes(), case.data["args"]["salt"]))
    with torch.inference_mode():
        taps = network.taps(case.inputs["images"])
    taps["sfid_first7"] = taps.pop("spatial")
    return compare_all(case, taps, case.tolerance("rtol", default=ACTIVATIONS))


def run_i3d(case: Case) -> list[Check]:
    network = load_i3d(hashed_state(_meta(I3D).state_dict(), case.data["args"]["salt"]))
    clips = prepare_clips(case.inputs["video"].permute(0, 4, 1, 2, 3), FVD_VARIANTS["tats"])
    with torch.inference_mode():
        got = {"avg_pool": network.pooled(clips), "logits": network(clips)}
    return compare_all(case, got, case.tolerance("rtol", default=ACTIVATIONS))


def run_lpips(case: Case) -> list[Check]:
    model, salt = LPIPS(), case.data["args"]["salt"]
    state = {key: hashed_weight(key, tuple(value.shape), salt) for key, value in _lpips_shapes().items()}
    state = {key: value.abs() if key.startswith("lin") else value for key, value in state.items()}
    model.load_state_dict(model.scaling_layer.state_dict(prefix="scaling_layer.") | state)
    value = model(from_uint8(case.inputs["x"]), from_uint8(case.inputs["y"]))
    return compare_all(case, {"lpips": value}, case.tolerance("rtol", default=ACTIVATIONS))


class _GivenFeatures(LPIPS):
    """LPIPS whose trunk is replaced by given feature maps, with heads of their widths."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        for index in range(5):
            self.get_submodule(f"lin{index}").model[1] = nn.Identity()
        for key, weight in state.items():
            head = nn.Conv2d(weight.shape[1], 1, 1, bias=False).requires_grad_(False)
            head.weight.copy_(weight)
            self.get_submodule(key.split(".")[0]).model[1] = head

    def features(self, pixels: list[Tensor]) -> list[Tensor]:
        return pixels


def run_lpips_head(case: Case) -> list[Check]:
    layers = len(case.state)
    a, b = ([case.inputs[f"feats{side}_{i}"] for i in range(layers)] for side in (0, 1))
    parts = _GivenFeatures(case.state).layers(a, b)
    got = {f"layer{index}": part for index, part in enumerate(parts)} | {"lpips": torch.stack(parts).sum(0)}
    return compare_all(case, got, case.tolerance("rtol", default=Tolerance(None, 1e-5)))


class _TinyExtractor(nn.Module):
    """The extractor of the end-to-end case."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        sizes = [state[f"{name}.weight"].shape for name in ("c1", "c2", "fc")]
        self.c1 = nn.Conv2d(sizes[0][1], sizes[0][0], sizes[0][2], 2, 1)
        self.c2 = nn.Conv2d(sizes[1][1], sizes[1][0], sizes[1][2], 2, 1)
        self.fc = nn.Linear(sizes[2][1], sizes[2][0])
        self.load_state_dict(state)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        x = self.c2(self.c1(from_uint8(pictures)).relu()).relu().mean((2, 3))
        return x, self.fc(x)


def run_end_to_end(case: Case) -> list[Check]:
    """Folders of PNG files through our reader, extractor and scores, as torch-fidelity's own job scored them."""
    args = case.data["args"]
    extractor = network_extractor(_TinyExtractor(case.state), name="tiny-dev", device=torch.device("cpu"))
    arrays = np.load(case.path.with_suffix(".npz"))
    sets = {}
    with tempfile.TemporaryDirectory() as root:
        for part in ("a", "b"):
            folder = Path(root) / part
            folder.mkdir()
            for name, array in zip(arrays[f"names_{part}"], arrays[part], strict=True):
                Image.fromarray(array).save(folder / str(name))
            reader = open_pictures(folder, key="samples")
            batches = torch.arange(len(reader)).split(args["batch_size"])
            outputs = [extractor.extract(reader.read(batch.tolist())) for batch in batches]
            sets[part] = torch.cat([o.pool for o in outputs]), torch.cat([o.logits for o in outputs])
    (a, logits), (b, _) = sets["a"], sets["b"]
    close = Tolerance(None, 1e-4)
    checks = compare_all(case, {"feat_a": a, "feat_b": b, "logits_a": logits}, Tolerance(1e-5, 1e-5))
    return checks + _end_to_end_scores(case, a, b, logits, close)


def _end_to_end_scores(case: Case, a: Tensor, b: Tensor, logits: Tensor, close: Tolerance) -> list[Check]:
    args, seed = case.data["args"], case.data["args"]["rng_seed"]
    mean, std = inception_score(logits, splits=args["isc_splits"], seed=seed)
    plain_mean, plain_std = inception_score(logits, splits=args["isc_splits"], seed=seed, shuffle=False)
    options = {"subsets": args["kid_subsets"], "subset_size": args["kid_subset_size"], "seed": seed}
    kid = kernel_distance(a, b, **options)
    told = case.data.get("tensors", {}).get("out.rbf_kernel_inception_distance_mean", {}).get("meaning", "")
    sigma = re.search(r"sigma=([0-9.]+)", told)
    rbf = kernel_distance(a, b, **options, kid_kernel="rbf", kid_kernel_rbf_sigma=float(sigma[1]) if sigma else 0.5)
    directions = [int(name.removeprefix("mind_")) for name in case.outputs if name.startswith("mind_")]
    precision, recall = precision_recall(a, b, neighborhood=args["prc_neighborhood"])
    groups = [
        (
            {
                "inception_score_mean": mean,
                "inception_score_std": std,
                "noshuffle_inception_score_mean": plain_mean,
                "noshuffle_inception_score_std": plain_std,
            },
            Tolerance(1e-6, 1e-5),
        ),
        ({"frechet_inception_distance": frechet_distance(gaussian_of(a), gaussian_of(b))}, close),
        (
            {
                "kernel_inception_distance_mean": kid[0],
                "kernel_inception_distance_std": kid[1],
                "rbf_kernel_inception_distance_mean": rbf[0],
                "rbf_kernel_inception_distance_std": rbf[1],
            },
            Tolerance(1e-5, 1e-4),
        ),
        (
            {"precision": precision, "recall": recall, "f_score": f_score(precision, recall)},
            Tolerance(1e-6, 0.0),
        ),
        ({f"mind_{m}": sliced_distance(a, b, projections=m, seed=seed) for m in directions}, Tolerance(0.0, 1e-5)),
    ]
    got = [({name: torch.tensor([v], dtype=torch.float64) for name, v in g.items()}, t) for g, t in groups]
    return [check for values, tolerance in got for check in compare_all(case, values, tolerance)]


NETWORK_CASES: dict[Callable[[Case], list[Check]], tuple[str, ...]] = {
    run_inception: ("in.images", "out.sfid_first7"),
    run_i3d: ("in.video", "out.logits", "out.avg_pool"),
    run_lpips: ("in.x", "in.y", "out.lpips"),
    run_lpips_head: ("in.feats0_0", "in.feats1_0", "out.lpips"),
    run_end_to_end: ("sd.c1.weight", "out.feat_a", "out.inception_score_mean"),
}
