"""Equal coefficients of several layers become one tensor, until one of them changes."""

from __future__ import annotations

import gc

import torch

from megatron_fope.kernels import sharing
from megatron_fope.kernels.sharing import representative


def test_equal_tensors_have_one_representative() -> None:
    a, b, c = torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3)
    assert representative(a) is representative(b) is representative(a)
    assert torch.equal(representative(a), a) and torch.equal(representative(c), c)
    assert representative(torch.ones(3, 2)) is not representative(a)


def test_a_write_is_noticed_and_changes_no_representative() -> None:
    a, b = torch.full((4,), 2.0), torch.full((4,), 2.0)
    first = representative(a)
    b[0] = 3.0
    assert torch.equal(representative(b), b)
    b[0] = 2.0
    assert representative(b) is first
    a[0] = 5.0
    assert torch.equal(representative(a), a)
    assert representative(b) is first and torch.equal(first, b)


def test_values_are_read_once(monkeypatch) -> None:
    a = torch.arange(5.0)
    first = representative(a)
    monkeypatch.setattr(sharing.hashlib, "sha256", None)  # reading again would fail
    assert representative(a) is first
    monkeypatch.undo()
    sharing.forget(a)
    assert representative(a) is first, "equal values, one representative"


def test_tensors_of_inference_mode() -> None:
    """They do not count their writes; what stands for them serves training too."""
    with torch.inference_mode():
        a = torch.full((6,), 6.0)
        found = representative(a)
    assert not found.is_inference() and torch.equal(found, torch.full((6,), 6.0))


def test_nothing_is_kept_alive() -> None:
    gc.collect()
    before = len(sharing._representatives)
    representative(torch.full((7,), 7.0))
    gc.collect()
    assert len(sharing._representatives) == before
