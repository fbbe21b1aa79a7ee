"""Check ``register()`` and ``unregister()`` against the real Megatron, every function below in one process.

Prints ``{function: traceback or None}`` as the last line of standard output. Every check starts and ends
unregistered.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_input_cases import save_checkpoint, start

FOPE = ["--position-embedding-type", "fope"]
ROPE = ["--position-embedding-type", "rope"]
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Make a function one of the checks."""
    CHECKS[function.__name__] = function
    return function


def symbols() -> dict[str, Any]:
    """Everything that registration may replace."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.training import arguments, checkpointing, initialize

    found = {
        f"{owner.__name__}.{name}": vars(owner).get(name)
        for owner, name in [
            (arguments, "add_megatron_arguments"),
            (arguments, "validate_args"),
            (arguments, "_print_args"),
            (initialize, "validate_args"),  # Megatron 0.17
            (checkpointing, "_load_base_checkpoint"),
            (checkpointing, "load_args_from_checkpoint"),
            (initialize, "load_args_from_checkpoint"),  # Megatron 0.17
            (GPTModel, "__init__"),
            (hybrid_model(), "__init__"),
        ]
    }
    return {name: value for name, value in found.items() if value is not None}


def hybrid_model() -> type:
    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:
        from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel
    return HybridModel


def changed(before: dict[str, Any]) -> list[str]:
    """Names whose object is no longer the same one."""
    now = symbols()
    assert now.keys() == before.keys()
    return [name for name in before if now[name] is not before[name]]


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments without FoPE's own, comparable."""
    return {name: repr(value) for name, value in vars(args).items() if not name.startswith("fope_")}


def fope_values(args: argparse.Namespace) -> dict[str, Any]:
    return {name.removeprefix("fope_"): v for name, v in vars(args).items() if name.startswith("fope_")}


def raises(kind: type[Exception], action: Callable[[], Any]) -> str:
    """The message of the exception that must come."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


@check
def importing_patches_nothing() -> None:
    import megatron_fope
    from megatron_fope.training import registration

    files = {name: value.__code__.co_filename for name, value in symbols().items()}
    assert len(files) >= 6
    assert not any(
        Path(file).is_relative_to(Path(megatron_fope.__file__).parent) for file in files.values()
    ), files
    assert not megatron_fope.is_registered() and not registration._patches


@check
def every_symbol_is_wrapped_once() -> None:
    from megatron_fope import is_registered, register

    before = symbols()
    register()
    assert is_registered()
    assert changed(before) == list(before)
    wrapped = symbols()
    assert all(wrapped[name].__wrapped__ is before[name] for name in before)
    register()
    register(None)
    assert changed(wrapped) == []


@check
def unregister_restores_the_same_functions() -> None:
    from megatron_fope import is_registered, register, unregister

    before = symbols()
    for _ in range(2):
        register()
        unregister()
        assert changed(before) == [] and not is_registered()
    unregister()  # harmless
    assert changed(before) == []


@check
def unregister_takes_the_flags_away() -> None:
    from megatron.training import arguments

    from megatron_fope import register, unregister

    def options() -> tuple[set[str], list[str]]:
        actions = arguments.add_megatron_arguments(argparse.ArgumentParser())._option_string_actions
        return set(actions), list(actions["--position-embedding-type"].choices)

    before = options()
    register()
    names, choices = options()
    assert {name for name in names - before[0] if "fope" not in name} == set()
    assert "--fope-gain" in names and choices == [*before[1], "fope"]
    unregister()
    assert options() == before


@check
def other_configuration_is_refused() -> None:
    from megatron_fope import FoPEConfig, UserError, register, unregister

    before = symbols()
    first = FoPEConfig.from_profile(train_length=64, gain=0.4)
    register(first)
    wrapped = symbols()
    register(FoPEConfig.from_profile(train_length=64, gain=0.4))  # equal
    register()  # keeps it
    other = FoPEConfig.from_profile(train_length=64, gain=0.5)
    message = raises(UserError, lambda: register(other))
    assert "another configuration" in message and "unregister()" in message and "\n" not in message
    assert changed(wrapped) == []
    assert fope_values(start(FOPE))["gain"] == 0.4
    unregister()
    register(FoPEConfig.from_profile(train_length=64, gain=0.5))
    unregister()
    assert changed(before) == []


@check
def configuration_may_come_after_the_registration() -> None:
    """As under Megatron-Bridge, where a plugin registers and the recipe knows the settings."""
    from megatron_fope import FoPEConfig, UserError, register, unregister

    config = FoPEConfig.from_profile(train_length=64, gain=0.4)
    register()
    wrapped = symbols()
    register(config)
    register()
    assert changed(wrapped) == [] and fope_values(start([*FOPE, "--fope-gain", "0.7"]))["gain"] == 0.4
    register(config)
    unregister()

    register()
    start(ROPE)
    register(config)  # those arguments have no settings
    unregister()

    register()
    assert fope_values(start([*FOPE, "--fope-gain", "0.7"]))["gain"] == 0.7
    message = raises(UserError, lambda: register(config))  # a checkpoint would record the other settings
    assert "validated" in message and "\n" not in message
    unregister()
    register(config)
    unregister()


@check
def configuration_replaces_the_flags() -> None:
    from megatron_fope import FoPEConfig, register

    config = FoPEConfig.from_profile("intern-s1-pro", train_length=48, gain=0.7)
    register(config)
    values = fope_values(start([*FOPE, "--fope-gain", "0.4"]))
    assert {name: values[name] for name in ("profile", "train_length", "gain", "square")} == {
        "profile": "intern-s1-pro",
        "train_length": 48,
        "gain": 0.7,
        "square": True,
    }


@check
def missing_symbol_is_named_and_nothing_stays_patched() -> None:
    from megatron.training import arguments, checkpointing

    from megatron_fope import compat, is_registered, register, unregister

    before = symbols()
    for owner, name in [
        (arguments, "add_megatron_arguments"),
        (arguments, "validate_args"),
        (arguments, "_print_args"),
        (checkpointing, "_load_base_checkpoint"),
        (checkpointing, "load_args_from_checkpoint"),
    ]:
        original = getattr(owner, name)
        delattr(owner, name)
        try:
            message = raises(ImportError, register)
            assert f"{owner.__name__}.{name}" in message and str(compat.megatron_version()) in message
            assert not is_registered()
        finally:
            setattr(owner, name, original)
        assert changed(before) == [], name

    class WithoutConstructor:
        __init__ = None

    def moved() -> None:
        raise ImportError("cannot import name 'GPTModel'")

    classes = compat.model_classes
    for replacement, name in [
        (lambda: [*classes(), (WithoutConstructor, ())], "WithoutConstructor.__init__"),
        (moved, "GPTModel"),
    ]:
        compat.model_classes = replacement
        try:
            assert name in raises(ImportError, register)
        finally:
            compat.model_classes = classes
        assert changed(before) == [] and not is_registered(), name
    register()
    unregister()
    assert changed(before) == []


@check
def unsupported_megatron_is_refused_before_anything_is_patched() -> None:
    from megatron_fope import UserError, compat, is_registered, register

    before = symbols()
    version = compat.versions.megatron_version
    compat.versions.megatron_version = lambda: compat.versions.Version("0.21.1")
    try:
        message = raises(UserError, register)
    finally:
        compat.versions.megatron_version = version
    assert "0.21.1" in message and not is_registered() and changed(before) == []


@check
def patch_on_top_survives_unregister_with_a_warning() -> None:
    from megatron.training import arguments

    from megatron_fope import register, unregister

    before = symbols()
    register()
    ours = arguments.validate_args

    def theirs(*positional: Any, **named: Any) -> Any:
        return ours(*positional, **named)

    arguments.validate_args = theirs
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("megatron_fope.training.registration")
    logger.addHandler(handler)
    try:
        unregister()
        assert arguments.validate_args is theirs
        assert changed(before) == ["megatron.training.arguments.validate_args"]
        assert len(messages) == 1 and "megatron.training.arguments.validate_args" in messages[0]
        through_ours = plain(start(ROPE))
        # What is below the other plugin stays without effect when FoPE is registered again on top of it.
        register()
        again = fope_values(start([*FOPE, "--fope-gain", "0.7"]))
        unregister()
        register()
        twice = fope_values(start([*FOPE, "--fope-gain", "0.7"]))
        unregister()
        assert arguments.validate_args is theirs
    finally:
        logger.removeHandler(handler)
        arguments.validate_args = ours.__wrapped__
    assert through_ours == plain(start(ROPE))
    register()
    assert again == twice == fope_values(start([*FOPE, "--fope-gain", "0.7"]))
    unregister()


@check
def every_wrapper_that_is_left_over_only_calls_the_original() -> None:
    from megatron_fope import register, unregister
    from megatron_fope.training import registration

    register()
    patches = list(registration._patches)
    unregister()
    for again in (False, True):
        if again:
            register()
        for patch in patches:
            original, patch.original = patch.original, lambda *given, **named: (given, named)
            assert patch.wrapper(1, 2, three=3) == ((1, 2), {"three": 3}), patch.name
            patch.original = original
    unregister()


@check
def other_position_embeddings_are_left_alone() -> None:
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


@check
def fope_is_resolved_to_plain_values() -> None:
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


@check
def rope_fusion_is_switched_off_for_fope_alone() -> None:
    """Megatron's default is on; the CPU's flags would hide what FoPE does about it."""
    from megatron_fope import cpu, register

    register()
    flags = [flag for flag in cpu.add_argument_defaults([]) if flag != "--no-rope-fusion"]
    assert start([*ROPE, *flags], complete=False).apply_rope_fusion is True
    assert start([*FOPE, *flags], complete=False).apply_rope_fusion is False


@check
def rope_scaling_means_llama3() -> None:
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


@check
def a_factor_that_megatron_passes_on_is_used() -> None:
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


@check
def a_yaml_file_with_fope_is_refused() -> None:
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


@check
def every_setting_has_a_documented_flag() -> None:
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


@check
def help_lists_the_flags() -> None:
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


@check
def every_flag_reaches_its_setting() -> None:
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
    assert given.keys() == default.keys() - {"rotary_base"}
    assert [name for name in given if name != "profile" and given[name] == default[name]] == []
    flags, of_a_start = [], []
    for name, value in given.items():
        words = of_a_start if name == "anneal_iters" else flags
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            words += [flag(name), str(value)]
    with tempfile.TemporaryDirectory() as name:
        # The one setting that needs something to load.
        save_checkpoint(Path(name), start([*FOPE, *flags]), "torch")
        flags += of_a_start
        flags += ["--fope-start-from-rope", "function-preserving", "--load", name, "--no-load-optim"]
        values = fope_values(start([*FOPE, *flags]))
    assert {name: values[name] for name in given} == given


@check
def checkpoint_arguments_are_restored() -> None:
    from megatron_fope import register

    register()
    flags = (
        "--fope-profile intern-s1-pro --fope-train-length 48 --fope-gain 0.4 --fope-seed 9 --rotary-base 5000"
    )
    stored = start([*FOPE, *flags.split(), "--fope-pad-value", "0,1", "--no-fope-shared-layers"])
    with tempfile.TemporaryDirectory() as name:
        for form in ("torch", "torch_dist"):
            folder = Path(name) / form
            save_checkpoint(folder, stored, form)
            load = ["--load", str(folder), "--use-checkpoint-args"]
            for more in ([], FOPE, ["--fope-train-length", "48"], ["--fope-gain", "0.9"]):
                args = start([*load, *more])
                assert args.position_embedding_type == "fope" and float(args.rotary_base) == 5000.0
                assert args.apply_rope_fusion is False
                assert fope_values(args) == fope_values(stored), more
            args = start([*load, "--seq-length", "128", "--max-position-embeddings", "128"])
            assert (args.seq_length, args.fope_train_length) == (128, 48)


@check
def checkpoint_arguments_of_rope_stay_rope() -> None:
    from megatron_fope import register, unregister

    stored = start(ROPE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "rope"
        save_checkpoint(folder, stored, "torch")
        load = ["--load", str(folder), "--use-checkpoint-args"]
        without = plain(start(load))
        register()
        args = start(load)
        unregister()
    assert args.position_embedding_type == "rope"
    assert plain(args) == without and set(fope_values(args).values()) == {None}


def main() -> None:
    """Run every check, print the outcomes."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    from megatron_fope import cpu, unregister

    cpu.enable()
    outcomes: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        before = symbols()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                function()
            outcomes[name] = None
        except BaseException:
            outcomes[name] = traceback.format_exc()
        unregister()
        if changed(before) and outcomes[name] is None:
            outcomes[name] = f"left behind: {changed(before)}"
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
