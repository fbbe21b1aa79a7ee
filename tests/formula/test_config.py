"""The settings: geometry of published models, seeds, round trips and refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import PROFILES, FoPEConfig
from megatron_fope.formula.geometry import Geometry


@pytest.mark.parametrize(
    "head_dim,train_length,d_in,d_out,identities",
    [(64, 512, 16, 16, 16), (64, 1024, 18, 16, 9), (128, 512, 31, 31, 31), (128, 1024, 36, 32, 18)],
)
def test_geometry_of_the_papers_models(
    head_dim: int, train_length: int, d_in: int, d_out: int, identities: int
) -> None:
    config = FoPEConfig.from_profile(train_length=train_length, init="eye")
    geometry = Geometry(config, head_dim)
    assert (geometry.d_in, geometry.d_out) == (d_in, d_out)
    assert geometry.num_clipped == head_dim // 2 - d_in
    coefficients = geometry.make_coefficients(layer=1)["sin_coef"]
    assert int(coefficients.sum()) == identities


def test_geometry_of_intern_s1_pro() -> None:
    config = FoPEConfig.from_profile("intern-s1-pro", train_length=262144, rotary_base=5e6, gain=0.5)
    assert Geometry(config, 128, 4).coefficient_shape == (4, 45, 45)


def test_layers_stacks_and_seeds_draw_different_numbers() -> None:
    config = FoPEConfig.from_profile(train_length=512)
    other_seed = dataclasses.replace(config, seed=config.seed + 1)
    draws = [
        Geometry(c, 64, 2).make_coefficients(layer=layer, stack=stack)[name]
        for c in (config, other_seed)
        for stack in ("decoder", "mtp")
        for layer in (1, 2)
        for name in ("sin_coef", "cos_coef")
    ]
    for i, a in enumerate(draws):
        assert not any(torch.equal(a, b) for b in draws[i + 1 :])
    shared = FoPEConfig.from_profile("intern-s1-pro", train_length=512)
    first, second = (Geometry(shared, 64, 2).make_coefficients(layer=layer) for layer in (1, 7))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_coefficients_do_not_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    config = FoPEConfig.from_profile(train_length=512)
    first = Geometry(config, 64, 2).make_coefficients(layer=1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again = Geometry(config, 64, 2).make_coefficients(layer=1)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("profile", PROFILES)
def test_round_trip_through_json(profile: str) -> None:
    config = FoPEConfig.from_profile(profile, train_length=333, gain=0.7, pad_value="0,1", scaling="linear")
    again = FoPEConfig.from_profile(**json.loads(json.dumps(config.to_dict())))
    assert again == config and not again.differences(config)
    assert hash(again) == hash(config)


def test_differences_ignore_what_only_fresh_coefficients_need() -> None:
    config = FoPEConfig.from_profile(train_length=512)
    assert not config.differences(FoPEConfig.from_profile(train_length=512, gain=0.9, seed=7))
    other = FoPEConfig.from_profile(train_length=256, pad_value="0,1")
    assert config.differences(other) == {"train_length": (512, 256), "pad_value": ("1,1", "0,1")}


YARN = {"scaling": "yarn", "scaling_factor": 4.0, "original_length": 128}


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"gain": 0.0}, "--fope-gain is 0.0; allowed: greater than 0"),
        ({"train_length": 1}, "--fope-train-length is 1; allowed: at least 2 tokens"),
        ({"init": "ones"}, "--fope-init is 'ones'"),
        ({"pad_value": "1,0"}, "--fope-pad-value is '1,0'; allowed: 1,1, 0,1"),
        ({"scaling": "clex"}, "--fope-scaling is 'clex'"),
        ({"scaling": "yarn", "scaling_factor": 4.0}, "--fope-original-length is 0"),
        ({"scaling": "linear", "scaling_factor": 0.5}, "--fope-scaling-factor is 0.5"),
        ({"floor_ratio": -0.5}, "--fope-floor-ratio is -0.5; allowed: 0 or more"),
        ({"floor_ratio": 1e39}, "--fope-floor-ratio is 1e+39; allowed: finite numbers that float32 can hold"),
        ({"rotary_base": 1e39}, "--rotary-base is 1e+39; allowed: finite numbers that float32 can hold"),
        ({"basis_dim": 10**12}, "--fope-basis-dim is 1000000000000; allowed: even numbers from 0 to 65536"),
        (YARN | {"yarn_beta_slow": 0.0}, "--fope-yarn-beta-slow is 0.0; allowed: greater than 0"),
        (YARN | {"yarn_beta_fast": 0.5}, "--fope-yarn-beta-fast is 0.5; allowed: at least the 1"),
        (YARN | {"yarn_extrapolation_factor": -1.0}, "--fope-yarn-extrapolation-factor is -1.0"),
        ({"seed": -1}, "--fope-seed is -1"),
        ({"learnable": True, "shared_layers": True}, "--no-fope-shared-layers"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        FoPEConfig.from_profile(**{"train_length": 512} | settings)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings,head_dim,message",
    [
        ({"train_length": 6}, 64, "--fope-train-length is 6: no frequency completes 1 cycle"),
        ({}, 63, "--kv-channels (head dimension) is 63"),
        ({"num_inv_freq": 33}, 64, "--fope-num-inv-freq is 33; allowed: 1 to 32"),
        ({"square": True, "basis_dim": 256}, 64, "--fope-basis-dim is 256"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict, head_dim: int, message: str) -> None:
    config = FoPEConfig.from_profile(**{"train_length": 512} | settings)
    with pytest.raises(UserError) as error:
        Geometry(config, head_dim)
    assert message in str(error.value)


def test_shortest_train_length_that_works() -> None:
    """The message's advice must be right: 7 tokens hold one cycle of the fastest frequency."""
    Geometry(FoPEConfig.from_profile(train_length=7), 64)
