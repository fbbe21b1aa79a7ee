"""FoPE's flags in Megatron's own parser, validation and checkpoints, with FoPE registered."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron_arguments import FOPE, ROPE, fope_values, plain, save_checkpoint, start
from registered import unregistered  # noqa: F401

pytestmark = [pytest.mark.launch, pytest.mark.ranks(1), pytest.mark.usefixtures("unregistered")]


def test_other_position_embeddings_are_left_alone() -> None:
    from megatron_fope import register, unregister

    command_lines = [
        ROPE,
        [],
        ["--position-embedding-type", "none"],
        [*ROPE, "--rotary-percent", "0.5", "--rotary-interleaved", "--rotary-base", "5000"],
        [*ROPE, "--use-rope-scaling", "--seq-length", "128", "--max-position-embeddings", "128"],
    ]
    for flags in command_lines:
        without = plain(start(flags))
        register()
        args = start(flags)
        unregister()
        assert without == plain(args), (flags, set(without.items()) ^ set(plain(args).items()))
        assert set(fope_values(args).values()) == {None}


def test_fope_is_resolved_to_plain_values() -> None:
    from megatron_fope import FoPEConfig, fope_config_from_args, register
    from megatron_fope.formula.geometry import Geometry

    register()
    without_flags = start([*ROPE, "--no-rope-fusion"])
    for flags, config in [
        ([], FoPEConfig.from_profile(train_length=64)),
        (
            ["--fope-profile", "intern-s1-pro", "--fope-train-length", "32", "--rotary-base", "5000"],
            FoPEConfig.from_profile("intern-s1-pro", train_length=32, rotary_base=5000.0),
        ),
        (
            ["--fope-gain", "0.4", "--no-fope-clip", "--fope-learnable", "--fope-pad-value", "0,1"],
            FoPEConfig.from_profile(train_length=64, gain=0.4, clip=False, learnable=True, pad_value="0,1"),
        ),
    ]:
        args = start([*FOPE, *flags])
        values = fope_values(args)
        assert args.position_embedding_type == "fope" and args.apply_rope_fusion is False
        assert all(type(value) in (int, float, bool, str, type(None)) for value in values.values()), values
        expected, geometry = config.to_dict(), Geometry(config, 16)
        base = expected.pop("rotary_base")
        assert values == expected | {
            "kept_frequencies": geometry.d_in,
            "clipped_frequencies": geometry.num_clipped,
            "series": geometry.d_out,
            "grow": None,
            "change_rotary_base": None,
            "backend": values["backend"],
            "start_from_rope": None,
        }
        assert values["backend"] and float(args.rotary_base) == base
        assert fope_config_from_args(args) == config
    # Megatron's own arguments are those of RoPE, apart from the type and the base of the last command line.
    differing = {n for n, v in plain(args).items() if v != plain(without_flags)[n]}
    assert differing <= {"position_embedding_type", "add_position_embedding"}, differing


def test_rope_fusion_is_switched_off_for_fope_alone() -> None:
    """Megatron's default is on; the CPU's flags would hide what FoPE does about it."""
    from megatron_fope import cpu, register

    register()
    flags = [flag for flag in cpu.add_argument_defaults([]) if flag != "--no-rope-fusion"]
    assert start([*ROPE, *flags], complete=False).apply_rope_fusion is True
    assert start([*FOPE, *flags], complete=False).apply_rope_fusion is False


def test_rope_scaling_means_llama3() -> None:
    from megatron_fope import register

    register()
    names = ("scaling", "scaling_factor", "original_length")
    flags = [*FOPE, "--use-rope-scaling", "--rope-scaling-factor", "4"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        values = fope_values(start(flags))
    # Up to 0.19 Megatron's builders drop the factor, and RoPE uses the model's default.
    assert [values[name] for name in names] == ["llama3", 8.0, 8192]
    assert "--rope-scaling-factor is 4, but RoPE uses 8 in this Megatron, and so does FoPE" in said.getvalue()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        values = fope_values(start([*FOPE, "--use-rope-scaling"]))
    assert values["scaling_factor"] == 8.0 and "RoPE uses" not in said.getvalue()
    own = ["--fope-scaling", "llama3", "--fope-scaling-factor", "4", "--fope-original-length", "8192"]
    values = fope_values(start([*flags, *own]))
    assert values["scaling_factor"] == 4.0
    values = fope_values(start([*FOPE, "--use-rope-scaling", "--fope-scaling", "none"]))
    assert [values[name] for name in names] == ["none", 1.0, 0]
    values = fope_values(start(FOPE))
    assert [values[name] for name in names] == ["none", 1.0, 0]


def test_a_factor_that_megatron_passes_on_is_used() -> None:
    """As soon as a builder hands the factor to the model, RoPE and FoPE follow it."""
    from unittest import mock

    from megatron_fope import compat, register

    register()
    real = compat.rope_arguments

    def forwarding(args: Any, *, hybrid: bool) -> dict[str, Any]:
        return real(args, hybrid=hybrid) | {"rope_scaling_factor": args.rope_scaling_factor}

    with mock.patch.object(compat, "rope_arguments", forwarding):
        values = fope_values(start([*FOPE, "--use-rope-scaling", "--rope-scaling-factor", "32"]))
    assert values["scaling_factor"] == 32.0


def test_a_yaml_file_with_fope_is_refused() -> None:
    from types import SimpleNamespace

    from megatron.training import yaml_arguments

    from megatron_fope import register

    register()
    model = SimpleNamespace(position_embedding_type="fope")
    for args in (
        SimpleNamespace(yaml_cfg="a.yaml", language_model=model),
        SimpleNamespace(yaml_cfg="a.yaml", position_embedding_type="fope"),
    ):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                yaml_arguments.validate_yaml(args)
                raise AssertionError("accepted")
            except SystemExit as stop:
                assert stop.code == 2
        (line,) = said.getvalue().splitlines()
        assert "--yaml-cfg is 'a.yaml'" in line, line


def test_every_setting_has_a_documented_flag() -> None:
    import dataclasses

    from megatron.training import arguments

    from megatron_fope import FoPEConfig, register
    from megatron_fope.arguments.flags import flag
    from megatron_fope.formula.config import PROFILES

    register()
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    actions = parser._option_string_actions
    fields = {field.name for field in dataclasses.fields(FoPEConfig)} - {"rotary_base"}
    of_the_run = {"--fope-start-from-rope", "--fope-grow", "--fope-change-rotary-base"}
    assert {flag(name) for name in fields} | of_the_run == {o for o in actions if o.startswith("--fope-")}
    configs = {name: FoPEConfig.from_profile(name, train_length=64).to_dict() for name in PROFILES}
    assert configs["paper"]["profile"] == "paper"
    elsewhere = {"train_length": "--seq-length", "num_inv_freq": "by the floor"}
    elsewhere |= dict.fromkeys(("anneal_clip", "anneal_padding", "anneal_series"), "all")
    for name in fields:
        action = actions[flag(name)]
        assert action.default is None and action.dest == f"fope_{name}"
        text = action.help
        if name in elsewhere:
            assert f"Default: {elsewhere[name]}." in text, text
        elif name == "profile" or configs["paper"][name] == configs["intern-s1-pro"][name]:
            assert text.endswith(f" Default: {configs['paper'][name]}."), text
        else:
            both = ", ".join(f"{profile}: {config[name]}" for profile, config in configs.items())
            assert text.endswith(f" Default (profile): {both}."), text
        if name in ("train_length", "original_length"):
            assert "tokens" in text
    for name, value in configs["paper"].items():
        if isinstance(value, bool):
            assert f"--no-fope-{name.replace('_', '-')}" in actions


def test_help_lists_the_flags() -> None:
    from megatron.training import arguments

    from megatron_fope import register
    from megatron_fope.formula.config import PROFILES

    register()
    sys.argv = ["train", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            arguments.parse_args()
        except SystemExit as stop:
            assert stop.code == 0
        else:
            raise AssertionError("--help did not exit")
    text = re.sub(r"\s+", " ", out.getvalue())
    assert "--fope-gain X" in text and "--fope-exact-angles, --no-fope-exact-angles" in text
    assert "'fope'" in text or ",fope}" in text
    assert all(name in text for name in PROFILES) and "Fourier position embedding" in text


def test_every_flag_reaches_its_setting(tmp_path: Path) -> None:
    from megatron_fope import FoPEConfig, register
    from megatron_fope.arguments.flags import flag

    register()
    given: dict[str, Any] = {
        "profile": "intern-s1-pro",
        "train_length": 48,
        "gain": 0.25,
        "seed": 77,
        "init": "xavier_norm",
        "growth": "upstream",
        "anneal_iters": 7,
        "anneal_order": "slowest-first",
        "anneal_clip": "0:4",
        "anneal_padding": "4:6",
        "anneal_series": "5:7",
        "floor_ratio": 1.5,
        "num_inv_freq": 4,
        "clip": False,
        "drop_clipped": False,
        "strict_floor": False,
        "square": False,
        "basis_dim": 24,
        "separate_heads": False,
        "separate_basis": False,
        "shared_layers": False,
        "normalize": True,
        "learnable": True,
        "pad_value": "0,1",
        "scaling": "yarn",
        "scaling_factor": 4.0,
        "original_length": 16,
        "scaling_before_clip": False,
        "yarn_beta_fast": 30.0,
        "yarn_beta_slow": 2.0,
        "yarn_extrapolation_factor": 0.5,
        "attention_scaling": 1.1,
        "exact_angles": True,
        "backend": "torch",
    }
    default = FoPEConfig.from_profile("intern-s1-pro", train_length=64).to_dict()
    # The padding that test_folding.py folds is not the one of this test.
    assert given.keys() == default.keys() - {"rotary_base", "fold_padding"}
    assert [name for name in given if name != "profile" and given[name] == default[name]] == []
    flags, of_a_start = [], []
    for name, value in given.items():
        words = of_a_start if name in FoPEConfig.START else flags
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            words += [flag(name), str(value)]
    # The settings that need something to load.
    save_checkpoint(tmp_path, start([*FOPE, *flags]), "torch")
    flags += of_a_start
    flags += ["--fope-start-from-rope", "function-preserving", "--load", str(tmp_path), "--no-load-optim"]
    values = fope_values(start([*FOPE, *flags]))
    assert {name: values[name] for name in given} == given


def test_checkpoint_arguments_are_restored(tmp_path: Path) -> None:
    from megatron_fope import register

    register()
    flags = (
        "--fope-profile intern-s1-pro --fope-train-length 48 --fope-gain 0.4 --fope-seed 9 --rotary-base 5000"
    )
    stored = start([*FOPE, *flags.split(), "--fope-pad-value", "0,1", "--no-fope-shared-layers"])
    for form in ("torch", "torch_dist"):
        folder = tmp_path / form
        save_checkpoint(folder, stored, form)
        load = ["--load", str(folder), "--use-checkpoint-args"]
        for more in ([], FOPE, ["--fope-train-length", "48"], ["--fope-gain", "0.9"]):
            args = start([*load, *more])
            assert args.position_embedding_type == "fope" and float(args.rotary_base) == 5000.0
            assert args.apply_rope_fusion is False
            assert fope_values(args) == fope_values(stored), more
        args = start([*load, "--seq-length", "128", "--max-position-embeddings", "128"])
        assert (args.seq_length, args.fope_train_length) == (128, 48)


def test_checkpoint_arguments_of_rope_stay_rope(tmp_path: Path) -> None:
    from megatron_fope import register, unregister

    stored = start(ROPE)
    folder = tmp_path / "rope"
    save_checkpoint(folder, stored, "torch")
    load = ["--load", str(folder), "--use-checkpoint-args"]
    without = plain(start(load))
    register()
    args = start(load)
    unregister()
    assert args.position_embedding_type == "rope"
    assert plain(args) == without and set(fope_values(args).values()) == {None}
