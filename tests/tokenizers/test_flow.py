import pytest
import torch

from vgen.errors import UserError
from vgen.tokenizers.flow import FlowSampling, TimeSampler, integrate, noised
from vgen.tokenizers.flow_guidance import FlowGuidance, GuidedVelocity, classifier_free, projected


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_straight_path_is_followed_exactly(solver):
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    got = integrate(lambda x, t: noise - clean, noise, steps=3, solver=solver)
    assert torch.allclose(got, clean, atol=1e-5)
    assert torch.equal(noised(clean, noise, torch.ones(2)), noise)
    assert torch.equal(noised(clean, noise, torch.zeros(2)), clean)


def test_heun_is_of_higher_order():
    x = torch.ones(1, 1, 1, 1)

    def run(solver):
        calls = []

        def velocity(x, t):
            calls.append(t)
            return x  # dx/dt = x, from 1 at time 1 to 1 / e at time 0

        return abs(integrate(velocity, x, steps=4, solver=solver).item() - 1 / torch.e), calls

    (euler, euler_calls), (heun, heun_calls) = run("euler"), run("heun")
    assert euler_calls == [1.0, 0.75, 0.5, 0.25]
    assert heun_calls == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert heun < euler / 2


@pytest.mark.parametrize("kind", ["mode", "logit_normal", "logit_normal_stratified"])
def test_times_are_increasing_functions_onto_the_unit_interval(kind):
    raw = torch.linspace(-4, 4, 101) if kind == "logit_normal" else torch.arange(101) / 101
    times = TimeSampler(kind=kind, mode_scale=0.5).times(raw)
    assert times.min() >= 0
    assert times.max() <= 1
    steps = times.diff()
    assert (steps > 0).all() or (steps < 0).all()


def test_shifted_times_are_closer_to_the_noise():
    raw = torch.tensor([0.0, 0.25, 0.5, 0.75])
    shifted = TimeSampler(mode_scale=0.0, shift=3.0).times(raw)
    assert torch.allclose(shifted, torch.tensor([0.0, 0.5, 0.75, 0.9]))
    # The signal-to-noise ratio (1 - t) / t of every time falls by the same factor, whatever the distribution.
    normal = torch.linspace(-2, 2, 5)
    plain, moved = (TimeSampler(kind="logit_normal", shift=shift).times(normal) for shift in (1.0, 3.0))
    assert torch.allclose((1 - plain) / plain, 3 * (1 - moved) / moved)


def test_stratified_times_fill_every_stratum():
    u = torch.rand(64)
    times = TimeSampler(kind="logit_normal_stratified").times(u)
    quantiles = torch.special.ndtr(torch.logit(times.double()))
    assert torch.equal((quantiles * 64).long(), torch.arange(64))


def test_guidance_of_one_changes_nothing_and_skips_the_unconditional_pass():
    calls = []
    guided = GuidedVelocity(lambda x, t: x, lambda x, t: calls.append(t), FlowGuidance(kind="apg", scale=1.0))
    x = torch.randn(1, 2, 2, 2)
    assert torch.equal(guided(x, 0.5), x)
    assert not calls


def test_the_interval_limits_guidance():
    calls = []

    def unconditional(x, t):
        calls.append(t)
        return torch.zeros_like(x)

    guidance = FlowGuidance(kind="cfg", scale=2.0, interval=(0.3, 0.8))
    integrate(GuidedVelocity(lambda x, t: x, unconditional, guidance), torch.randn(1, 1, 2, 2), steps=4)
    assert calls == [0.75, 0.5]


def test_projected_guidance_without_projection_and_limit_is_classifier_free():
    conditional, unconditional = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    got = projected(conditional, conditional - unconditional, 4.0, eta=1.0)
    assert torch.allclose(got, classifier_free(conditional, unconditional, 4.0), atol=1e-5)


def test_projected_guidance_limits_each_sample():
    conditional = torch.randn(2, 3, 4, 4)
    difference = torch.stack([torch.full((3, 4, 4), 0.01), torch.full((3, 4, 4), 9.0)])
    update = projected(conditional, difference, 2.0, eta=1.0, threshold=1.0) - conditional
    assert torch.allclose(update[0], difference[0], atol=1e-6)
    assert torch.allclose(update[1].norm(), torch.tensor(1.0), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "decoding.steps=0"),
        ({"solver": "rk4"}, "decoding.solver=rk4"),
        ({"guidance": {"kind": "pag"}}, "guidance.kind=pag"),
        ({"guidance": {"scale": -1.0}}, "guidance.scale"),
        ({"guidance": {"momentum": 1.0}}, "guidance.momentum"),
        ({"guidance": {"interval": (0.8, 0.3)}}, "guidance.interval"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        FlowSampling(**{**settings, "guidance": FlowGuidance(**settings.get("guidance", {}))})


@pytest.mark.parametrize("options", [{"kind": "cosine"}, {"mode_scale": 2.0}, {"shift": 0.0}])
def test_bad_times(options):
    with pytest.raises(UserError, match=r"times\."):
        TimeSampler(**options)
