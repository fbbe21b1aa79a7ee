"""pytest plugin for Megatron-LM's own unit tests: on the CPU, with FoPE in RoPE's place.

``run.py`` loads it in every rank, before anything of the checkout is imported. Every ``SelfAttention``
becomes FoPE's, however a test builds it, and drops the rotary embedding that it is handed; a GPT model that
asks for ``rope`` gets ``fope`` through the same registration as in training. Layer specs of Transformer
Engine become Megatron's local ones, and CUDA is reported as available, so that tests which skip without it
run.

What FoPE really did is counted per test, because a test in which it did nothing proves nothing.
"""

from __future__ import annotations

import datetime
import functools
import inspect
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

POSITION = os.environ.get("EXAM_POSITION", "fope")
"""``fope``, or ``rope``: everything the same except that RoPE stays, to tell whose fault a failure is."""

TRAIN_LENGTH = 64
"""Tokens; decides the clipped frequencies, of which even the tests' smallest heads must keep one."""

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=90)
"""A rank whose test failed leaves the others waiting: they must fail, not hang."""

ROTARY_ARGUMENTS = ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "rotary_pos_cos_sin")

counts = {"layers": 0, "rotations": 0, "states": 0, "rope": 0}
"""Since the test began: FoPE layers built, FoPE's rotations, FoPE's states handed to a checkpoint, RoPE's
rotations."""


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Prepare the process before the checkout's ``conftest.py`` imports Megatron."""
    from megatron_fope import cpu

    cpu.enable()
    _stub_download()
    _pretend_cuda()
    _count_rope()
    _use_local_layers()
    _widen_heads()
    _stub_gpu_libraries()
    if POSITION == "fope":
        _put_fope_in_place()


def _stub_download() -> None:
    """The checkout's fixture downloads data that none of the selected tests reads."""
    name = "tests.test_utils.python_scripts.download_unit_tests_dataset"
    stub = ModuleType(name)
    stub.download_and_extract_asset = lambda **kwargs: None  # type: ignore[attr-defined]
    sys.modules[name] = stub


def _stub_gpu_libraries() -> None:
    """Answer the two questions that test modules ask while they are imported; the libraries stay absent."""
    fp8 = ModuleType("transformer_engine.pytorch.fp8")
    fp8.check_fp8_support = lambda: (False, "no Transformer Engine")  # type: ignore[attr-defined]
    sys.modules.setdefault(fp8.__name__, fp8)
    flash_attention = ModuleType("flash_attn")
    flash_attention.__version__ = "0.0.0"  # type: ignore[attr-defined]
    sys.modules.setdefault("flash_attn", flash_attention)


def _pretend_cuda() -> None:
    """CUDA as far as the tests ask for it; its work is done by the CPU runtime's stand-ins."""
    import torch
    from megatron.core import parallel_state

    def is_available() -> bool:
        return not sys._getframe(1).f_globals["__name__"].startswith("megatron_fope")  # it gets the truth

    torch.cuda.is_available = is_available
    torch.cuda.random.manual_seed = torch.cuda.manual_seed
    for name in ("init_process_group", "new_group"):
        setattr(torch.distributed, name, _on_gloo(getattr(torch.distributed, name)))

    forget = parallel_state.destroy_model_parallel

    @functools.wraps(forget)
    def destroy_model_parallel() -> None:
        """Megatron only forgets its groups; dozens per test slow gloo down until it times out."""
        forget()
        world = torch.distributed.distributed_c10d._world
        for group in [group for group in world.pg_map if group is not world.default_pg]:
            torch.distributed.destroy_process_group(group)

    parallel_state.destroy_model_parallel = destroy_model_parallel


def _on_gloo(original: Callable) -> Callable:
    @functools.wraps(original)
    def start(*args: Any, **kwargs: Any) -> Any:
        if "nccl" in str(kwargs.get("backend")):
            kwargs["backend"] = "gloo"
        kwargs["timeout"] = COLLECTIVE_TIMEOUT
        return original(*args, **kwargs)

    return start


def _use_local_layers() -> None:
    """Transformer Engine's GPT layer specs become the local ones, also where they were imported already."""
    from megatron.core.models.gpt import gpt_layer_specs

    local = gpt_layer_specs.get_gpt_layer_local_spec
    accepted = set(inspect.signature(local).parameters)

    def replacement(original: Callable, wants_submodules: bool) -> Callable:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def local_layer(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            spec = local(**{name: value for name, value in given.items() if name in accepted})
            return spec.submodules if wants_submodules else spec

        return local_layer

    for name in (
        "get_gpt_layer_with_transformer_engine_spec",
        "get_gpt_layer_with_transformer_engine_submodules",
    ):
        original = getattr(gpt_layer_specs, name, None)
        if original is not None:
            _replace_everywhere(name, original, replacement(original, name.endswith("submodules")))


def _widen_heads() -> None:
    """Give heads of 2 or 3 channels 8: enough for a rotary embedding; nothing that a test compares with."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    check = TransformerConfig.__post_init__

    @functools.wraps(check)
    def __post_init__(self: Any) -> None:
        if self.kv_channels is None and self.num_attention_heads:
            channels = self.hidden_size // self.num_attention_heads
            if channels % 2 or channels < 4:
                self.kv_channels = 8
        check(self)

    TransformerConfig.__post_init__ = __post_init__


def _replace_everywhere(name: str, original: Any, new: Any) -> None:
    """Replace a name in every module of Megatron that holds it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megatron.") and vars(module).get(name) is original:
            setattr(module, name, new)


def _count_rope() -> None:
    """Count the calls of RoPE's rotation by attention layers."""
    from megatron.core.transformer import attention

    attention.apply_rotary_pos_emb = _counting("rope", attention.apply_rotary_pos_emb)


def _counting(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return counted


def _put_fope_in_place() -> None:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.attention import SelfAttention

    from megatron_fope import FoPEConfig, FoPESelfAttention, FourierEmbedding, register

    config = FoPEConfig.from_profile("paper", train_length=TRAIN_LENGTH)
    register(config)
    with_registration = GPTModel.__init__
    signature = inspect.signature(with_registration)

    @functools.wraps(with_registration)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        if bound.arguments.get("position_embedding_type") == "rope":
            bound.arguments["position_embedding_type"] = "fope"
        with_registration(*bound.args, **bound.kwargs)

    GPTModel.__init__ = build

    forward_signature = inspect.signature(SelfAttention.forward)

    class SelfAttentionWithFoPE(FoPESelfAttention):
        """What ``SelfAttention(...)`` makes; a class of the host's name, with FoPE's settings filled in."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"fope": config} | kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            bound = forward_signature.bind(self, *args, **kwargs)
            for name in ROTARY_ARGUMENTS:
                bound.arguments.pop(name, None)
            return super().forward(*bound.args[1:], **bound.kwargs)

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(SelfAttentionWithFoPE if cls is SelfAttention else cls)

    SelfAttention.__new__ = new
    FourierEmbedding.__init__ = _counting("layers", FourierEmbedding.__init__)
    FourierEmbedding.forward = _counting("rotations", FourierEmbedding.forward)
    FourierEmbedding.sharded_state_dict = _counting("states", FourierEmbedding.sharded_state_dict)


# Outcomes --------------------------------------------------------------------------------------------------


class Recorder:
    """Writes one JSON line per test and rank, at its start and at its end: a hang leaves the start."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._outcome: dict[str, Any] = {}

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        for name in counts:
            counts[name] = 0
        self._outcome = {"outcome": "passed", "reason": ""}
        self.write({"test": item.nodeid, "event": "start"})
        began = time.monotonic()
        result = yield
        seconds = round(time.monotonic() - began, 1)
        self.write({"test": item.nodeid, "event": "end", "seconds": seconds, **self._outcome, **counts})
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self._outcome["outcome"] != "failed":
            self._outcome = {"outcome": "failed", "reason": _last_line(report.longrepr)}
        elif report.skipped and self._outcome["outcome"] == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._outcome = {"outcome": "skipped", "reason": reason.removeprefix("Skipped: ")}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            reason = _last_line(report.longrepr)
            self.write(
                {"test": report.nodeid, "event": "end", "outcome": "failed", "reason": reason, **counts}
            )
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = reason.removeprefix("Skipped: ")
            self.write(
                {"test": report.nodeid, "event": "end", "outcome": "skipped", "reason": reason, **counts}
            )


def _last_line(longrepr: Any) -> str:
    """The line of a failure that says most: the exception's."""
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if crash is not None:
        return lines[0][:300] if lines else ""
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (errors or lines or [""])[-1][:300]


def _ranks_needed(item: pytest.Item) -> int:
    """What the parallel sizes among a test's parameters ask for; found out early, it costs no hang."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    sizes = [
        math.prod(value)
        for name, value in parameters.items()
        if ("pp" in name or "parallel" in name)
        and isinstance(value, tuple)
        and all(type(size) is int for size in value)
    ]
    return max(sizes, default=1)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what ``selection.py`` excludes, with its reason, and keep to the tests that ``run.py`` names."""
    excluded = json.loads(os.environ.get("EXAM_EXCLUDED", "{}"))
    only = os.environ.get("EXAM_ONLY")
    if only:
        wanted = set(Path(only).read_text().splitlines())
        items[:] = [item for item in items if item.nodeid in wanted]
    for item in items:
        reasons = [reason for pattern, reason in excluded.items() if re.search(pattern, item.nodeid)]
        needed = _ranks_needed(item)
        if needed > int(os.environ.get("WORLD_SIZE", "1")):
            reasons.append(f"needs {needed} ranks")
        if reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[0]))
    recorder = config.pluginmanager.get_plugin("exam-recorder")
    for item in items:
        recorder.write({"test": item.nodeid, "event": "collected"})


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Start recording."""
    rank = os.environ.get("RANK", "0")
    recorder = Recorder(Path(os.environ["EXAM_OUTCOMES"]) / f"rank{rank}.jsonl")
    config.pluginmanager.register(recorder, "exam-recorder")
