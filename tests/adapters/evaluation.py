"""Golden cases of evaluation: scores of feature sets here, pictures and networks in the files beside this one."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from adapters import EXACT, Case, Check, Tolerance, UnknownCase
from adapters.evaluation_networks import NETWORK_CASES, run_manifest
from adapters.evaluation_pictures import PICTURE_CASES
from torch import Tensor

from vgen.evaluation.adm import adm_inception_score, adm_precision_recall
from vgen.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance, gaussian_of
from vgen.evaluation.inception import spatial_features
from vgen.evaluation.manifold import precision_recall_density_coverage, radii, squared_distances
from vgen.evaluation.metrics import (
    StreamingInceptionScore,
    codebook_scores,
    f_score,
    inception_score,
    kernel_distance,
    precision_recall,
    sliced_distance,
    sliced_distance_along,
    squared_mmd,
)

FRACTION = Tolerance(1e-6, 0.0)  # shares of a set, stored in float32 by torch-fidelity


def scalar(case: Case, name: str, value: float, tolerance: Tolerance) -> Check:
    """Compare a number with a golden tensor of one element, whatever its shape."""
    return case.compare(name, torch.tensor(value, dtype=torch.float64).reshape(case.outputs[name].shape), tolerance)


def scalars(case: Case, values: Mapping[str, float], tolerance: Tolerance) -> list[Check]:
    """Compare several numbers under one tolerance; only those the case holds."""
    return [scalar(case, name, value, tolerance) for name, value in values.items() if name in case.outputs]


# How each tool's distance is related to ours: divisor of the covariance, and what its arithmetic allows.
_FRECHET_TOOLS = {
    "exact_unbiased": (1, Tolerance(None, 1e-9)),
    "exact_biased": (0, Tolerance(None, 1e-9)),
    "torch_fidelity": (1, Tolerance(1e-5, 1e-6)),
    "adm": (1, Tolerance(1e-5, 1e-6)),
    "clean_fid": (1, Tolerance(1e-5, 1e-6)),
    "styleganv_common": (1, Tolerance(1e-5, 1e-6)),
    "stylegan_v": (0, Tolerance(1e-5, 1e-6)),
    "larp": (0, Tolerance(1e-5, 1e-6)),
    "tats": (1, Tolerance(1e-5, 2e-3)),
    "videogpt": (1, Tolerance(1e-5, 2e-3)),
}


def _frechet_checks(case: Case, x: Tensor, y: Tensor) -> list[Check]:
    """Our one distance against every tool's."""
    checks = []
    for name, (ddof, default) in _FRECHET_TOOLS.items():
        if name not in case.outputs:
            continue
        fits = gaussian_of(x, ddof=ddof), gaussian_of(y, ddof=ddof)
        stated = case.tolerance(name, name.split("_")[0] + "_*", name.split("_")[0] + "/", default=default)
        if stated == EXACT:  # a tolerance in words, in which the name of the output is taken for "exact"
            stated = default
        # A distance is a difference of traces: rounding is relative to them, also where the distance is 0.
        trace = float(fits[0].covariance.trace() + fits[1].covariance.trace())
        floor = trace * (1e-6 if name in ("tats", "videogpt") else 1e-12)
        tolerance = Tolerance(max(stated.atol or 0.0, floor), stated.rtol or 0.0)
        checks.append(scalar(case, name, frechet_distance(*fits), tolerance))
    return checks


def run_frechet(case: Case) -> list[Check]:
    x, y = case.inputs["x1"], case.inputs["x2"]
    checks = _frechet_checks(case, x, y)
    stored = []
    for number, features in (("1", x), ("2", y)):
        fit = gaussian_of(features)
        checks.append(case.compare(f"mu{number}", fit.mean, Tolerance(1e-12, 1e-12)))
        checks.append(case.compare(f"sigma{number}", fit.covariance, Tolerance(1e-11, 1e-9)))
        stored.append(Gaussian(len(features), case.outputs[f"mu{number}"], case.outputs[f"sigma{number}"]))
    value = frechet_distance(*stored)
    want = float(case.outputs["exact_unbiased"])
    error, trace = abs(value - want), float(stored[0].covariance.trace() + stored[1].covariance.trace())
    allowed = 1e-9 * abs(want) + 1e-10 * trace
    return [*checks, Check("exact value from mu and sigma", error, error <= allowed, f"{value} instead of {want}")]


def run_fvd_formula(case: Case) -> list[Check]:
    fake, real = case.inputs["fake"], case.inputs["real"]
    checks = _frechet_checks(case, fake, real)
    return checks + scalars(case, {"tats_kvd": squared_mmd(fake, real)}, Tolerance(1e-5, 2e-5))


def run_kid(case: Case) -> list[Check]:
    args = dict(case.data["args"])
    x, y, idx1, idx2 = (case.inputs[key] for key in ("x1", "x2", "idx1", "idx2"))
    subsets, size, seed = (args.pop(key) for key in ("kid_subsets", "kid_subset_size", "rng_seed"))
    args.pop("verbose", None)
    kernel = {
        "degree": args.get("kid_kernel_poly_degree", 3),
        "gamma": args.get("kid_kernel_poly_gamma"),
        "coef0": args.get("kid_kernel_poly_coef0", 1.0),
        "rbf_sigma": args.get("kid_kernel_rbf_sigma", 10.0) if args.get("kid_kernel") == "rbf" else None,
    }
    ours = torch.tensor(
        [squared_mmd(x[i], y[j], **kernel) for i, j in zip(idx1, idx2, strict=True)], dtype=torch.float64
    )
    theirs, exact = Tolerance(1e-6, 2e-5), Tolerance(1e-14, 1e-10)
    mean, std = kernel_distance(x, y, subsets=subsets, subset_size=size, seed=seed, **args)
    checks = [
        case.compare("mmd2_per_subset", ours, theirs),
        case.compare("float64_mmd2_per_subset", ours, exact),
        *scalars(case, {"kid_mean": mean, "kid_std": std}, theirs),
        *scalars(
            case,
            {"float64_kid_mean": float(ours.mean()), "float64_kid_std": float(ours.std(correction=0))},
            exact,
        ),
    ]
    if "full_mmd2_float64" in case.outputs:
        checks.append(scalar(case, "full_mmd2_float64", squared_mmd(x, y, **kernel), exact))
    if "clean_fid_kid" in case.outputs:
        checks.append(scalar(case, "clean_fid_kid", _clean_fid_kid(x, y, subsets, size, seed), theirs))
    return checks


def _clean_fid_kid(x: Tensor, y: Tensor, subsets: int, size: int, seed: int) -> float:
    """clean-fid's draws: the second set first, always its default kernel."""
    rng = np.random.RandomState(seed)
    size = min(len(x), len(y), size)
    values = []
    for _ in range(subsets):
        chosen_y = rng.choice(len(y), size, replace=False)
        chosen_x = rng.choice(len(x), size, replace=False)
        values.append(squared_mmd(x[chosen_x], y[chosen_y]))
    return float(np.mean(values))


def run_isc(case: Case) -> list[Check]:
    logits, args = case.inputs["logits"], case.data["args"]
    splits, seed = args["splits"], args["rng_seed"]
    mean, std = inception_score(logits, splits=splits, seed=seed)
    plain_mean, plain_std = inception_score(logits, splits=splits, seed=seed, shuffle=False)
    streaming = StreamingInceptionScore(logits.shape[1])
    for batch in logits.split(17):
        streaming.update(batch)
    values = {
        "torch_fidelity_mean": mean,
        "torch_fidelity_std": std,
        "noshuffle_mean": plain_mean,
        "noshuffle_std": plain_std,
        "one_split": inception_score(logits, splits=1, seed=seed)[0],
        "titok_streaming": streaming.score(),
    }
    checks = scalars(case, values, Tolerance(1e-12, 1e-9))
    if "adm" in case.outputs:
        adm = adm_inception_score(logits, split_size=args["adm_split_size"])
        checks.append(scalar(case, "adm", adm, Tolerance(0.0, 1e-5)))
    return checks


def run_precision_recall(case: Case) -> list[Check]:
    x, y, args = case.inputs["x1"], case.inputs["x2"], case.data["args"]
    k = args["neighborhood"]
    precision, recall = precision_recall(x, y, neighborhood=k)
    values = {}
    for kind in ("tf_full", "tf_part"):
        values |= {f"{kind}_precision": precision, f"{kind}_recall": recall}
        values[f"{kind}_f_score"] = f_score(precision, recall)
    adm = adm_precision_recall(x, y, k=k)
    values |= {"adm_precision": adm[0], "adm_recall": adm[1]}
    named = precision_recall_density_coverage(x, y, k=args["prdc_nearest_k"], block=48)
    checks = scalars(case, values | {f"prdc_{name}": value for name, value in named.items()}, FRACTION)
    for name, features in (("adm_radii_real_sq", y), ("adm_radii_fake_sq", x)):
        if name in case.outputs:
            got = radii(features, k=k, distance=squared_distances, block=32)
            checks.append(case.compare(name, got, Tolerance(1e-6, 1e-5)))
    return checks


def run_adm_suite(case: Case) -> list[Check]:
    inputs, args = case.inputs, case.data["args"]
    spatial = {key: spatial_features(inputs[f"spatial_{key}"]) for key in ("ref", "gen")}
    fits = {key: gaussian_of(features) for key, features in spatial.items()}
    logits = inputs["pool_gen"] @ inputs["fc_weight"].T
    precision, recall = adm_precision_recall(inputs["pool_gen"], inputs["pool_ref"], k=args["nhood"])
    fid = frechet_distance(gaussian_of(inputs["pool_gen"]), gaussian_of(inputs["pool_ref"]))
    distances = {"fid": fid, "sfid": frechet_distance(fits["gen"], fits["ref"])}
    score = adm_inception_score(logits, split_size=args["split_size"])
    return [
        case.compare("mu_s", fits["ref"].mean, Tolerance(1e-6, 1e-6)),
        case.compare("sigma_s_diag", fits["ref"].covariance.diagonal(), Tolerance(1e-12, 1e-9)),
        *scalars(case, distances, case.tolerance("FID", default=Tolerance(None, 1e-6))),
        *scalars(case, {"inception_score": score}, case.tolerance("IS rtol", default=Tolerance(None, 1e-5))),
        *scalars(case, {"precision": precision, "recall": recall}, Tolerance(1e-12, 0.0)),
    ]


def run_mind(case: Case) -> list[Check]:
    x, y, args = case.inputs["x1"], case.inputs["x2"], case.data["args"]
    close = case.tolerance("rtol", default=Tolerance(None, 1e-5))
    given = sliced_distance_along(x[case.inputs["idx1"]], y[case.inputs["idx2"]], case.inputs["directions"])
    drawn = sliced_distance(x, y, projections=args["mind_num_projections"], seed=args["rng_seed"])
    return [scalar(case, "mind", given, close), scalar(case, "mind", drawn, close)]


def run_streamed_statistics(case: Case) -> list[Check]:
    """Batches into one state per process, states merged into one."""
    dim, scale = case.outputs["mu"].numel(), float(case.outputs["mu"].abs().max()) ** 2 + 1
    total = FeatureStatistics(dim)
    for name in sorted(key for key in case.inputs if key.startswith("x_r")):
        part = FeatureStatistics(dim)
        for batch in case.inputs[name].split(9):
            part.update(batch)
        total.merge(part)
    sums = total.mean * total.count
    covariance = Tolerance(1e-9 * scale, 0.0)
    return [
        case.compare("n", torch.tensor([total.count]), EXACT),
        case.compare("sum", sums, Tolerance(1e-9, 1e-12)),
        case.compare("outer", total.scatter + torch.outer(sums, sums) / total.count, Tolerance(1e-9, 1e-11)),
        case.compare("mu", total.mean, Tolerance(1e-12, 1e-12)),
        case.compare("sigma_unbiased", total.gaussian().covariance, covariance),
        case.compare("sigma_biased", total.gaussian(ddof=0).covariance, covariance),
    ]


def run_titok_evaluator(case: Case) -> list[Check]:
    batch = case.data["args"]["batch"]
    fits = []
    for name in ("real", "fake"):
        statistics = FeatureStatistics(case.inputs[name].shape[1])
        for part in case.inputs[name].split(batch):
            statistics.update(part)
        fits.append(statistics.gaussian())
    score = StreamingInceptionScore(case.inputs["logits_fake"].shape[1])
    for part in case.inputs["logits_fake"].split(batch):
        score.update(part)
    counts = torch.bincount(case.inputs["codes"].flatten(), minlength=case.data["args"]["num_codebook_entries"])
    codes = codebook_scores(counts, log_eps=1e-8)
    values = {
        "InceptionScore": score.score(),
        "rFID": frechet_distance(*fits),
        "CodebookUsage": codes["codebook_usage"],
        "CodebookEntropy": codes["codebook_entropy_bits"],
    }
    return scalars(case, values, case.tolerance("rtol", default=Tolerance(None, 1e-6)))


# The tensors by which a case of this file is recognised.
_FEATURE_CASES: dict[Callable[[Case], list[Check]], tuple[str, ...]] = {
    run_adm_suite: ("in.pool_ref", "in.spatial_ref", "in.fc_weight"),
    run_mind: ("in.directions", "out.mind"),
    run_kid: ("in.idx1", "out.kid_mean"),
    run_fvd_formula: ("in.fake", "in.real", "out.exact_biased"),
    run_frechet: ("in.x1", "in.x2", "out.exact_unbiased"),
    run_isc: ("in.logits", "out.torch_fidelity_mean"),
    run_precision_recall: ("in.x1", "in.x2", "out.tf_part_precision"),
    run_streamed_statistics: ("in.x_r0", "out.sum"),
    run_titok_evaluator: ("in.codes", "in.logits_fake"),
}


def run(case: Case) -> list[Check]:
    """Run one golden case of the evaluation sheet."""
    if case.is_manifest:
        return run_manifest(case)
    for function, needed in (_FEATURE_CASES | PICTURE_CASES | NETWORK_CASES).items():
        if all(name in case.tensors for name in needed):
            return function(case)
    raise UnknownCase(f"tensors {', '.join(sorted(case.tensors)[:8])}")
