"""Which code rotates: the choice, its reason, and the comparison before Triton is trusted."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_fope import implementation, kernels, rotation
from megatron_fope.config import FoPEConfig
from megatron_fope.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget() -> None:
    implementation._choose.cache_clear()


def test_a_cpu_rotates_with_pytorch() -> None:
    chosen = implementation.choose("auto", CPU)
    assert (chosen.name, chosen.rotate) == ("torch", rotation.rotate)
    assert str(chosen) == "PyTorch, float32 arithmetic (on the CPU)"


def test_asking_for_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for check in (implementation.choose, implementation.check_available):
        with pytest.raises(
            UserError, match=r"--fope-implementation is 'triton', but .*; allowed here: auto, torch"
        ):
            check("triton", CPU)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="--fope-implementation is 'cuda'; allowed: auto, torch, triton"):
        FoPEConfig.from_profile("paper", train_length=64, implementation="cuda")


def test_the_name_does_not_change_a_model() -> None:
    a, b = (FoPEConfig.from_profile("paper", train_length=64, implementation=i) for i in ("auto", "torch"))
    assert not a.differences(b)


def slightly_wrong(*args, **kwargs):
    query, key = rotation.rotate(*args, **kwargs)
    return query, key + 0.01 * key.detach()


def wrong_backward(query, key, *args):
    return rotation.rotate(query, key.detach() + 0 * key, *args)


def failing(*args, **kwargs):
    raise RuntimeError("no such instruction\nmore")


@pytest.mark.parametrize(
    ("rotate", "said"),
    [
        (rotation.rotate, None),
        (slightly_wrong, "their results differ from PyTorch's by"),
        (wrong_backward, "their results differ from PyTorch's by"),
        (failing, "a first try failed with RuntimeError: no such instruction"),
    ],
)
def test_comparison(rotate, said: str | None) -> None:
    found = implementation._self_check(rotate, CPU)
    assert found is None if said is None else found.startswith(said)


@pytest.mark.parametrize("rotate", [rotation.rotate, slightly_wrong])
def test_a_gpu_takes_triton_only_when_it_agrees(
    rotate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The decision, with the comparison moved to the CPU."""
    check = implementation._self_check
    monkeypatch.setattr(kernels, "available", lambda device: None)
    monkeypatch.setattr(implementation, "_triton", lambda: rotate)
    monkeypatch.setattr(implementation, "_self_check", lambda rotate, device: check(rotate, CPU))
    with caplog.at_level(logging.WARNING):
        chosen = implementation.choose("auto", GPU)
    right = rotate is rotation.rotate
    assert chosen.name == ("triton" if right else "torch")
    assert chosen.rotate is rotation.rotate
    assert ("instead of its Triton kernels: their results differ" in caplog.text) is not right
