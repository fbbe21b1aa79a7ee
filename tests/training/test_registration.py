"""``register()`` and ``unregister()`` against the real Megatron; every test starts and ends unregistered."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron_arguments import FOPE, ROPE, fope_values, plain, start
from registered import changed, symbols, unregistered  # noqa: F401


def on_a_rank(test: Callable[[], None]) -> Callable[[], None]:
    """Megatron is imported there, and nobody else's."""
    return pytest.mark.launch(pytest.mark.ranks(1)(pytest.mark.usefixtures("unregistered")(test)))


def raises(kind: type[Exception], action: Callable[[], Any]) -> str:
    """The message of the exception that must come."""
    with pytest.raises(kind) as error:
        action()
    return str(error.value)


@on_a_rank
def test_importing_patches_nothing() -> None:
    import megatron_fope
    from megatron_fope.training import registration

    files = {name: value.__code__.co_filename for name, value in symbols().items()}
    assert len(files) >= 6
    assert not any(
        Path(file).is_relative_to(Path(megatron_fope.__file__).parent) for file in files.values()
    ), files
    assert not megatron_fope.is_registered() and not registration._patches


@on_a_rank
def test_every_symbol_is_wrapped_once() -> None:
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


@on_a_rank
def test_unregister_restores_the_same_functions() -> None:
    from megatron_fope import is_registered, register, unregister

    before = symbols()
    for _ in range(2):
        register()
        unregister()
        assert changed(before) == [] and not is_registered()
    unregister()  # harmless
    assert changed(before) == []


@on_a_rank
def test_unregister_takes_the_flags_away() -> None:
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


@on_a_rank
def test_other_configuration_is_refused() -> None:
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


@on_a_rank
def test_configuration_may_come_after_the_registration() -> None:
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


@on_a_rank
def test_configuration_replaces_the_flags() -> None:
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


@on_a_rank
def test_missing_symbol_is_named_and_nothing_stays_patched() -> None:
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


@on_a_rank
def test_unsupported_megatron_is_refused_before_anything_is_patched() -> None:
    from megatron_fope import UserError, compat, is_registered, register

    before = symbols()
    version = compat.versions.megatron_version
    compat.versions.megatron_version = lambda: compat.versions.Version("0.21.1")
    try:
        message = raises(UserError, register)
    finally:
        compat.versions.megatron_version = version
    assert "0.21.1" in message and not is_registered() and changed(before) == []


@on_a_rank
def test_patch_on_top_survives_unregister_with_a_warning() -> None:
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


@on_a_rank
def test_every_wrapper_that_is_left_over_only_calls_the_original() -> None:
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


@pytest.mark.parametrize("module", ["megatron_fope", "megatron_fope.tools.cli", "megatron_fope.cpu"])
def test_import_loads_neither_torch_nor_megatron(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'megatron', 'numpy'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "[]\n", "")


def test_every_public_name_exists() -> None:
    import megatron_fope

    assert [name for name in megatron_fope.__all__ if not hasattr(megatron_fope, name)] == []
    with pytest.raises(AttributeError, match="'nothing'"):
        megatron_fope.nothing  # noqa: B018
