"""Coefficients that grow with the training length."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from trainer import FOPE, TP2, Run, Trainer

from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.formula.geometry import Geometry
from megatron_fope.formula.growth import grow_coefficients

HEADS = 4

CHAINS = {
    "60M": (64, {}, (512, 1024, 4096)),
    "180M": (128, {"gain": 0.4}, (512, 1024, 2048)),
    "from outputs without identity": (64, {}, (1024, 1536, 8192)),
    "8B to a million": (128, {"rotary_base": 5e5, "gain": 0.6}, (8192, 32768, 131072, 1048576)),
    "shared heads": (64, {"separate_heads": False, "gain": 0.4}, (512, 1024, 2048)),
    "one matrix": (64, {"separate_basis": False}, (512, 1024, 2048)),
    "intern-s1-pro": (128, {"profile": "intern-s1-pro", "gain": 0.5}, (4096, 32768, 262144)),
}


def config(train_length: int, **settings: object) -> FoPEConfig:
    return FoPEConfig.from_profile(**{"train_length": train_length} | settings)


def fresh(settings: FoPEConfig, head_dim: int, layer: int = 1) -> dict[str, Tensor]:
    return Geometry(settings, head_dim, HEADS).make_coefficients(layer=layer)


def grow(old: dict[str, Tensor], *settings: FoPEConfig, head_dim: int, layer: int = 1) -> dict[str, Tensor]:
    before, after = (Geometry(config, head_dim, HEADS) for config in settings)
    return grow_coefficients(old, before, after, layer=layer)


def identities(coefficients: dict[str, Tensor]) -> list[int]:
    """How many entries near one every output has."""
    mean = torch.stack([v.reshape(-1, *v.shape[-2:]).mean(0) for v in coefficients.values()]).mean(0)
    return (mean > 0.5).sum(0).tolist()


@pytest.mark.parametrize("chain", CHAINS)
def test_every_output_has_one_frequency(chain: str) -> None:
    """In every stage; what has one keeps it, and every trained output keeps all its numbers."""
    head_dim, settings, lengths = CHAINS[chain]
    stages = [config(length, **settings) for length in lengths]
    coefficients = fresh(stages[0], head_dim)
    for old, new in itertools.pairwise(stages):
        before = identities(coefficients)
        grown = grow(coefficients, old, new, head_dim=head_dim)
        assert identities(grown) == [1] * Geometry(new, head_dim).d_out
        for name, value in grown.items():
            assert tuple(value.shape) == Geometry(new, head_dim, HEADS).coefficient_shape
            rows = coefficients[name].size(-2)
            owners = [j for j, count in enumerate(before) if count]
            assert torch.equal(value[..., :rows, owners], coefficients[name][..., owners])
            # What is new has the spread that it would have in a fresh model of this length.
            noise = torch.cat([(v - v.round())[..., rows:, :].flatten() for v in grown.values()])
            expected = torch.cat([(v - v.round()).flatten() for v in fresh(new, head_dim).values()])
            torch.testing.assert_close(noise.std(), expected.std(), rtol=0.25, atol=0)
        coefficients = grown


def test_the_authors_rule_does_not() -> None:
    """The measured weaknesses that the default is there for."""
    settings = {"growth": "upstream"}
    counts = {}
    for head_dim, gain in ((64, 0.3), (128, 0.4)):
        old, new = (config(length, gain=gain, **settings) for length in (512, 1024))
        counts[head_dim] = identities(grow(fresh(old, head_dim), old, new, head_dim=head_dim))
    assert [j for j, n in enumerate(counts[64]) if n == 2] == [8]
    assert [j for j, n in enumerate(counts[128]) if n == 2] == [16, 17] and counts[128][31] == 0
    zeros = dataclasses.replace(new, growth="upstream-zeros")
    erased = grow(fresh(old, 128), old, zeros, head_dim=128)
    assert all(not value[..., 31].any() and value.shape == (HEADS, 36, 32) for value in erased.values())


def test_new_outputs_get_new_frequencies_up_to_the_slowest() -> None:
    old, new = config(512), config(8192)
    assert Geometry(old, 128).coefficient_shape[1:] == (31, 31)
    assert Geometry(new, 128).coefficient_shape[1:] == (50, 32)
    grown = grow(fresh(old, 128), old, new, head_dim=128)["cos_coef"].mean(0)
    assert (grown > 0.5).nonzero().tolist() == [*([i, i] for i in range(31)), [49, 31]]
    old, new = config(512), config(640)
    grown = grow(fresh(old, 80), old, new, head_dim=80)["cos_coef"].mean(0)
    assert (grown > 0.5).nonzero().tolist() == [[i, i] for i in range(20)], "where they fit, the identity"


def test_outputs_without_frequency_get_those_that_no_output_has() -> None:
    """``step_eye`` gave every other of 18 frequencies to 9 of 16 outputs."""
    old, new = config(1024), config(1536)
    assert (Geometry(old, 64).d_in, Geometry(new, 64).d_in, Geometry(new, 64).d_out) == (18, 20, 16)
    grown = grow(fresh(old, 64), old, new, head_dim=64)["cos_coef"].mean(0)
    rows = [*range(0, 18, 2), 9, 11, 13, 15, 17, 18, 19]
    assert (grown.T > 0.5).nonzero().tolist() == [[j, row] for j, row in enumerate(rows)]


def test_numbers_depend_on_seed_and_layer_and_nothing_else() -> None:
    old, new = config(512), config(2048)
    coefficients = fresh(old, 64)
    first = grow(coefficients, old, new, head_dim=64)
    state = torch.manual_seed(7).get_state()
    again = grow(coefficients, old, new, head_dim=64)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    rows = slice(Geometry(old, 64).d_in, None)
    draws = [first["sin_coef"][:, rows], first["cos_coef"][:, rows]]
    draws.append(grow(coefficients, old, new, head_dim=64, layer=2)["sin_coef"][:, rows])
    other_seed = dataclasses.replace(new, seed=5)
    draws.append(grow(coefficients, old, other_seed, head_dim=64)["sin_coef"][:, rows])
    draws.append(fresh(new, 64)["sin_coef"][:, rows])
    for i, draw in enumerate(draws):
        noise = draw - draw.round()
        assert not any(torch.allclose(noise, other - other.round(), atol=1e-5) for other in draws[:i])
    shared = [config(length, profile="intern-s1-pro") for length in (512, 2048)]
    layers = [grow(fresh(shared[0], 64), *shared, head_dim=64, layer=layer) for layer in (1, 2)]
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])


def test_without_new_frequencies_nothing_changes() -> None:
    for settings in ({"num_inv_freq": 16}, {"drop_clipped": False}, {"clip": False}):
        old, new = config(512, **settings), config(4096, **settings)
        coefficients = fresh(old, 64)
        grown = grow(coefficients, old, new, head_dim=64)
        assert all(torch.equal(grown[name], value) for name, value in coefficients.items())


def test_a_larger_base_may_take_frequencies_away() -> None:
    """Outputs whose frequency goes with the last rows get one of those that stay."""
    old, new = config(8192), config(32768, rotary_base=5e5)
    assert (Geometry(old, 128).d_in, Geometry(new, 128).d_in) == (50, 42)
    grown = grow(fresh(old, 128), old, new, head_dim=128)
    assert identities(grown) == [1] * 32


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind,extra", [("pi", {}), ("yarn", {"scaling_factor": 4.0})])
def test_scaled_frequencies(kind: str, extra: dict, before: bool) -> None:
    """The spec's example: before the clip D_in stays 16, after it becomes what the new floor keeps."""
    scaled = {"scaling": kind, "original_length": 512, "scaling_before_clip": before, **extra}
    old, new = config(512), config(2048, **scaled, attention_scaling=1.1386)
    grown = grow(fresh(old, 64), old, new, head_dim=64)
    assert next(iter(grown.values())).shape[-2] == (16 if before else 21)
    assert identities(grown) == [1] * 16


@pytest.mark.parametrize(
    "new,message",
    [
        ({"train_length": 256}, "--fope-train-length is 256, but the model was trained"),
        ({"profile": "intern-s1-pro"}, "--fope-profile is 'intern-s1-pro'"),
        ({"pad_value": "0,1"}, "--fope-pad-value is '0,1'"),
        ({"scaling": "none"}, "--fope-scaling is 'none', but the model was trained with"),
        ({"separate_basis": False}, "--fope-separate-basis is False"),
    ],
)
def test_refusals(new: dict, message: str) -> None:
    old = {"train_length": 512, "scaling": "linear", "scaling_factor": 2.0}
    new = {**old, "train_length": 1024, **new}
    settings = [FoPEConfig.from_profile(**values) for values in (old, new)]
    with pytest.raises(UserError) as error:
        grow(fresh(settings[0], 64), *settings, head_dim=64)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_coefficients_of_another_shape() -> None:
    old, new = config(512), config(1024)
    with pytest.raises(
        ValueError, match=r"sin_coef is \(4, 18, 16\); the old configuration says \(4, 16, 16\)"
    ):
        grow(fresh(new, 64), old, new, head_dim=64)


GROW = "--fope-grow"
LONGER = (*FOPE, "--fope-train-length", "256")


@pytest.fixture(scope="module")
def short(trainer: Trainer) -> Run:
    return trainer.base(*FOPE)


@pytest.mark.launch
def test_a_checkpoint_grows_while_it_is_loaded(trainer: Trainer, short: Run) -> None:
    """On two ranks as on one, resumed exactly with the flag and without, by the numbers of the function."""
    flags = (*LONGER, GROW, *TP2, "--load", str(short.folder), "--ckpt-step", "2", "--save-interval", "1")
    run = trainer.run("grown", *flags, nproc=2)
    assert run.says("the coefficients grow (aligned) from train length 64 to 256, 3 x 3 to 4 x 4")
    old, new = (Geometry(config(length), 16, 2) for length in (64, 256))
    for index, layer in enumerate(range(1, 5)):
        coefficients = {name: value[index] for name, value in short.coefficients(2).items()}
        grown = grow_coefficients(coefficients, old, new, layer=layer)
        for name, value in grown.items():
            assert torch.equal(run.coefficients(3)[name][index], value)
            assert torch.equal(run.coefficients(4)[name][index], value)
    again = ("--load", str(run.folder), "--ckpt-step", "3")
    with_flag = trainer.run("grown, resumed with the flag", *LONGER, GROW, *TP2, *again, nproc=2, save=False)
    without = trainer.run("grown, resumed", *LONGER, *TP2, *again, nproc=2, save=False)
    assert with_flag.says(f"{GROW} has no effect: {run.folder} has train length 256 already")
    assert with_flag.curve() == without.curve() == {4: run.curve()[4]}


@pytest.mark.launch
def test_what_cannot_grow(trainer: Trainer, short: Run) -> None:
    load = ("--load", str(short.folder), "--no-load-optim")
    for flags, message in {
        LONGER: "; --fope-grow grows the coefficients",
        (*FOPE, "--fope-train-length", "32", GROW): "coefficients only grow; allowed: at least 64",
        (*LONGER, GROW, "--fope-profile", "intern-s1-pro"): "growth keeps the profile",
        (*LONGER, GROW, "--rotary-base", "500"): "--fope-change-rotary-base accepts the change",
        (*LONGER, GROW, "--fope-learnable"): "--fope-learnable is True, but the checkpoint in",
    }.items():
        assert message in trainer.run("refused growth", *flags, *load, check=False).error


@pytest.mark.launch
def test_growth_with_yarn_and_another_base(trainer: Trainer, short: Run) -> None:
    yarn = ("--fope-scaling", "yarn", "--fope-scaling-factor", "4", "--fope-original-length", "64")
    base = ("--rotary-base", "20000", "--fope-change-rotary-base", "--fope-attention-scaling", "1.1386")
    run = trainer.run(
        "yarn", *LONGER, GROW, *yarn, *base, "--load", str(short.folder), "--ckpt-step", "2",
        "--use-checkpoint-args",
    )  # fmt: skip
    assert run.says("the rotary base changes from 10000 to 20000")
    assert run.says("scaled (yarn) after the clip, sin and cos times 1.1386")
    new = config(256, rotary_base=20000.0, scaling="yarn", scaling_factor=4.0, original_length=64)
    assert run.coefficients()["sin_coef"].shape[-2:] == (Geometry(new, 16).d_in, Geometry(new, 16).d_out)
