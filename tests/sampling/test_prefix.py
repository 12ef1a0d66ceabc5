import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from tests.checkpoints.helpers import GENERATOR, tiny_release
from tests.paths import CONFIGS
from vgen.checkpoints.release import build, load_pipeline, save_release
from vgen.checkpoints.sampling_job import sample
from vgen.errors import UserError
from vgen.evaluation.job import evaluate
from vgen.pixels import to_uint8
from vgen.processes import Processes
from vgen.sampling.animation import animate
from vgen.sampling.extrapolate import Extrapolation
from vgen.sampling.job import run_sampling
from vgen.sampling.prefix import passes_for
from vgen.sampling.settings import Guidance, Sampling
from vgen.schedules.diagonal import diagonal
from vgen.schedules.parallel import parallel
from vgen.schedules.randar import randar
from vgen.schedules.rar import rar
from vgen.schedules.raster import raster
from vgen.schedules.zipar import zipar

CPU = torch.device("cpu")
TOKENIZER = {
    "_target_": "vgen.tokenizers.flextok.FlexTok",
    "vae": {
        "_target_": "vgen.tokenizers.autoencoder_kl.AutoencoderKL",
        "image_size": 8,
        "latent_channels": 2,
        "block_channels": [4, 8],
        "layers_per_block": 1,
        "norm_groups": 4,
    },
    "num_tokens": 6,
    "levels": [3, 5],
    "encoder": {"dim": 16, "depth": 1, "head_dim": 8},
    "decoder": {"dim": 16, "depth": 1, "head_dim": 8, "time_features": 16},
    "decoding": {"_target_": "vgen.tokenizers.flow.FlowSampling", "steps": 2},
}
NETWORK = GENERATOR | {"vocab_size": 15, "grid": [6], "rope": "none", "positions": "own"}
LABELS, INDEX = torch.tensor([0, 1, 2, 1]), torch.tensor([3, 1, 9, 4])
GUIDED = Sampling(seed=5, guidance=Guidance(scale=1.5))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flextok")
    torch.manual_seed(0)
    tokenizer, generator = build(TOKENIZER), build(NETWORK)
    for parameter in [*tokenizer.decoder.parameters(), *generator.outputs.parameters()]:
        if parameter.count_nonzero() == 0:
            torch.nn.init.normal_(parameter, std=0.5)
    tokens = save_release(folder / "tokenizer", tokenizer, TOKENIZER, kind="tokenizer")
    schedule = {"_target_": "vgen.schedules.raster.raster", "_partial_": True}
    return save_release(
        folder / "generator", generator, NETWORK, kind="generator", extra={"schedule": schedule}, tokenizer=tokens
    )


@pytest.mark.parametrize("count", [1, 4, 6])
def test_the_first_tokens_are_those_of_the_whole_sample_in_fewer_passes(release, count):
    whole = load_pipeline(release, device=CPU).generate_ids(LABELS, INDEX, GUIDED)
    short = load_pipeline(release, device=CPU, num_tokens=count)
    passes = []
    ids = short.generate_ids(LABELS, INDEX, GUIDED, watch=lambda number, _: passes.append(number))
    assert torch.equal(ids, whole[:, :count])
    assert len(passes) == short.num_passes == count


def test_pictures_of_every_length_do_not_depend_on_the_batch(release):
    pictures = {}
    for count in (1, 3, 6):
        pipeline = load_pipeline(release, device=CPU, num_tokens=count)
        pictures[count] = pipeline.generate(LABELS, INDEX, GUIDED)
        alone = torch.cat([pipeline.generate(LABELS[[i]], INDEX[[i]], GUIDED) for i in range(4)])
        # Batched matrix products may round differently, by one grey level after rounding.
        assert (pictures[count].int() - alone.int()).abs().max() <= 1
    assert not torch.equal(pictures[1], pictures[3])
    assert not torch.equal(pictures[3], pictures[6])


def test_the_noise_of_the_decoder_belongs_to_seed_and_sample(release):
    pipeline = load_pipeline(release, device=CPU, num_tokens=2)
    ids = pipeline.generate_ids(LABELS, INDEX, GUIDED)
    expected = to_uint8(pipeline.tokenizer.decode(ids, sample_index=INDEX, seed=GUIDED.seed))
    assert torch.equal(pipeline.generate(LABELS, INDEX, GUIDED), expected)
    greedy = [Sampling(seed=seed, greedy=True) for seed in (0, 1)]
    one, two = (pipeline.generate(LABELS, INDEX, sampling) for sampling in greedy)
    assert not torch.equal(one, two)


def test_a_job_of_short_samples_is_told_apart(release, tmp_path):
    def run(count):
        pipeline = load_pipeline(release, device=CPU, num_tokens=count)
        run_sampling(
            pipeline,
            Sampling(),
            peers=Processes(),
            identity={"num_tokens": count},
            out=str(tmp_path / "out"),
            num_samples=4,
            labels="balanced",
            batch_size=3,
            fmt="npz",
            grid_pictures=4,
            animated=2,
        )

    run(3)
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (4, 8, 8, 3)
    with Image.open(tmp_path / "out" / "decode.gif") as animation:
        assert animation.n_frames == 3
    with pytest.raises(UserError, match="num_tokens"):
        run(2)


def test_sample_and_evaluate_take_the_number_of_tokens(release, tmp_path):
    def configured(name, *overrides):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(name, [f"checkpoint={release}", f"out={tmp_path / name}", "device=cpu", *overrides])

    sample(configured("sample", "num_samples=5", "num_tokens=2", "sampling.seed=3"))
    drawn = np.load(tmp_path / "sample" / "samples.npz")
    pipeline = load_pipeline(release, device=CPU, num_tokens=2)
    expected = pipeline.generate(torch.from_numpy(drawn["arr_1"]), torch.arange(5), Sampling(seed=3))
    assert np.array_equal(drawn["arr_0"], expected.permute(0, 2, 3, 1).numpy())
    scored = configured("evaluate", f"samples={tmp_path / 'sample'}", "checkpoint=null", "data=digits", "num_tokens=2")
    with pytest.raises(UserError, match="num_tokens has no effect on stored samples"):
        evaluate(scored)
    scored = configured("evaluate", f"checkpoint={release.parent / 'tokenizer'}", "data=digits", "num_tokens=2")
    with pytest.raises(UserError, match="num_tokens and text_features are for generators"):
        evaluate(scored)
    settings = configured("evaluate", "num_tokens=2", "num_samples=4", "data=digits", "data.image_size=8")
    report = evaluate(OmegaConf.merge(settings, {"metrics": ["nearest"]}))
    assert report["sampling"]["num_tokens"] == report["sampling"]["forward_passes"] == 2


def test_the_animation_shows_the_prefix_decided_so_far(release, tmp_path, monkeypatch):
    pipeline = load_pipeline(release, device=CPU)
    lengths, decode = [], pipeline.tokenizer.decode_samples

    def counting(ids, *arguments):
        lengths.append(ids.shape[1])
        return decode(ids, *arguments)

    monkeypatch.setattr(pipeline.tokenizer, "decode_samples", counting)
    animate(pipeline, LABELS, INDEX, GUIDED, tmp_path / "decode.gif")
    assert lengths == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("count", [0, 7, -1, 2.5])
def test_numbers_out_of_range_are_named(release, count):
    with pytest.raises(UserError, match=rf"num_tokens={count} must lie in 1\.\.6"):
        load_pipeline(release, device=CPU, num_tokens=count)


def test_what_cannot_stop_early_is_refused(release, tmp_path):
    with pytest.raises(UserError, match="needs all its 16 tokens"):
        load_pipeline(tiny_release(tmp_path), device=CPU, num_tokens=4)
    with pytest.raises(UserError, match="leave num_tokens out"):
        load_pipeline(release, device=CPU, num_tokens=4, extrapolation=Extrapolation())


def test_plans_whose_first_passes_decide_other_tokens_are_refused(release):
    tokenizer = load_pipeline(release, device=CPU).tokenizer
    assert passes_for(4, raster(grid=(6,)), tokenizer) == 4
    with pytest.raises(UserError, match="known only while"):
        passes_for(4, randar(grid=(6,)), tokenizer)
    in_order = randar(grid=(6,), steps=2, order="raster")
    first = len(in_order.forwards[0].targets)
    assert passes_for(first, in_order, tokenizer) == 1
    with pytest.raises(UserError, match="no number of passes"):
        passes_for(first + 1, in_order, tokenizer)


@pytest.mark.parametrize(
    ("order", "options"),
    [
        (parallel, {"regions": 4}),
        (diagonal, {}),
        (zipar, {}),
        (rar, {"scan": "alternate"}),
        (rar, {"scan": "spiral-in"}),
    ],
    ids=["parallel", "diagonal", "zipar", "alternate", "spiral"],
)
def test_orders_of_a_plane_refuse_tokens_in_a_row(order, options):
    with pytest.raises(UserError, match=r"\(6,\) (has not both|is not \(H, W\))"):
        order(grid=(6,), **options)
