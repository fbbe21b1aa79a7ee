"""Equal coefficients of several layers become one tensor, until one of them changes."""

from __future__ import annotations

import gc
import weakref

import torch

from megatron_fope.kernels import cache
from megatron_fope.kernels.cache import canonical


def test_equal_tensors_have_one_canonical_copy() -> None:
    a, b, c = torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3)
    assert canonical(a) is canonical(b) is canonical(a)
    assert torch.equal(canonical(a), a) and torch.equal(canonical(c), c)
    assert canonical(torch.ones(3, 2)) is not canonical(a)


def test_a_write_is_noticed_and_changes_no_canonical_copy() -> None:
    a, b = torch.full((4,), 2.0), torch.full((4,), 2.0)
    first = canonical(a)
    b[0] = 3.0
    assert torch.equal(canonical(b), b)
    b[0] = 2.0
    assert canonical(b) is first
    a[0] = 5.0
    assert torch.equal(canonical(a), a)
    assert canonical(b) is first and torch.equal(first, b)


def test_values_are_read_once(monkeypatch) -> None:
    a = torch.arange(5.0)
    first = canonical(a)
    monkeypatch.setattr(cache.hashlib, "sha256", None)  # reading again would fail
    assert canonical(a) is first
    monkeypatch.undo()
    cache.forget(a)
    assert canonical(a) is first, "equal values, one copy"


def test_tensors_of_inference_mode() -> None:
    """They do not count their writes; what stands for them serves training too."""
    with torch.inference_mode():
        a = torch.full((6,), 6.0)
        found = canonical(a)
    assert not found.is_inference() and torch.equal(found, torch.full((6,), 6.0))


def test_nothing_is_kept_alive() -> None:
    found = weakref.ref(canonical(torch.full((7,), 7.0)))
    gc.collect()
    assert found() is None
