"""Golden cases of evaluation that work on pictures and clips: resizes, crops, rounding, PSNR, SSIM, FVD preparation."""

from collections.abc import Callable

import torch
from adapters import EXACT, Case, Check, Tolerance, compare_all
from PIL import Image

from vgen.data.transforms import adm_center_crop
from vgen.data.video_transforms import ClipTransform
from vgen.evaluation.fvd import FVD_VARIANTS, prepare_clips
from vgen.evaluation.pixel_metrics import pooled_psnr, psnr, ssim
from vgen.evaluation.quantise import quantise
from vgen.evaluation.resize import resize_pictures

DECIBEL = Tolerance(1e-4, 0.0)
LIKENESS = Tolerance(1e-5, 0.0)


def run_psnr_ssim(case: Case) -> list[Check]:
    made, originals = (case.inputs[key].permute(0, 3, 1, 2) for key in ("rec", "gt"))
    values = psnr(made, originals)
    mean = values.mean()
    got = {
        "psnr_per_image": values,
        "psnr_skimage": values,
        "psnr_omni": values,
        "psnr_mean_of_images": mean[None],
        "psnr_larp": mean,
        "psnr_global_mse": torch.tensor([pooled_psnr(made, originals)], dtype=torch.float64),
    }
    likeness = {
        "ssim_skimage_gaussian": "gaussian",
        "ssim_opencv": "gaussian",
        "ssim_skimage_uniform7": "uniform",
        "ssim_llamagen": "llamagen",
        "ssim_torchmetrics": "torchmetrics",
    }
    found = {name: ssim(made, originals, convention=rule) for name, rule in likeness.items()}
    return compare_all(case, got, DECIBEL) + compare_all(case, found, LIKENESS)


def run_quantise(case: Case) -> list[Check]:
    rules = {"llamagen": "round", "adm": "adm", "mar": "mar", "titok": "titok", "save_image": "save_image"}
    return compare_all(case, {name: quantise(case.inputs["x"], rule) for name, rule in rules.items()}, EXACT)


def run_center_crop(case: Case) -> list[Check]:
    size = case.data["args"]["image_size"]
    got = {}
    for name, picture in case.inputs.items():
        cropped = adm_center_crop(Image.fromarray(picture.numpy()), size)
        got[name.replace("image", "crop")] = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8).view(
            size, size, 3
        )
    return compare_all(case, got, EXACT)


def run_resize(case: Case) -> list[Check]:
    pictures, size = case.inputs["images"].permute(0, 3, 1, 2), case.data["args"]["size"]
    names = {"legacy_pytorch": "legacy_pytorch", "clean": "clean", "torchmetrics_antialias": "antialias"}
    got = {name: resize_pictures(pictures, size, mode) for name, mode in names.items()}
    rounded = {"pil_bicubic_uint8": resize_pictures(pictures, size, "pil_bicubic").to(torch.uint8)}
    exact = {"tf1_bilinear": resize_pictures(pictures, size, "tf1_bilinear")}
    return (
        compare_all(case, exact, Tolerance(2e-4, 0.0))
        + compare_all(case, got, Tolerance(1e-2, 0.0))
        + compare_all(case, rounded, EXACT)
    )


def run_fvd_preparation(case: Case) -> list[Check]:
    clips, args = case.inputs["video"].permute(0, 4, 1, 2, 3), case.data["args"]
    names = {"tats": "tats", "styleganv": "common_styleganv", "videogpt": "common_videogpt"}
    got = {name: prepare_clips(clips, FVD_VARIANTS[rule], side=args["i3d_size"]) for name, rule in names.items()}
    loader = ClipTransform(image_size=args["larp_size"], crop="center", flip=False)
    got["larp_loader"] = torch.stack([loader(clip) for clip in case.inputs["video"]])
    got["larp_detector_input"] = prepare_clips(got["larp_loader"], FVD_VARIANTS["larp"])
    return compare_all(case, got, Tolerance(1e-5, 0.0))


PICTURE_CASES: dict[Callable[[Case], list[Check]], tuple[str, ...]] = {
    run_psnr_ssim: ("in.rec", "in.gt"),
    run_quantise: ("in.x", "out.llamagen"),
    run_center_crop: ("in.image0", "out.crop0"),
    run_resize: ("in.images", "out.tf1_bilinear"),
    run_fvd_preparation: ("in.video", "out.larp_loader"),
}
