"""The tensors that FoPE's modules own: where they are made, what moves, casts, offloads and trains them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from models import fope_config, gpt, mla_model, run, since, tokens

pytestmark = [pytest.mark.launch, pytest.mark.ranks(1), pytest.mark.usefixtures("model_parallel")]


def _modules() -> dict[str, Callable[[], Any]]:
    """Every module of this package that owns tensors, in all its variants."""
    from megatron_fope.layers.anneal import Interpolation
    from megatron_fope.layers.embedding import FourierEmbedding
    from megatron_fope.layers.precision import KeepsDtype

    assert set(KeepsDtype.__subclasses__()) == {FourierEmbedding, Interpolation}
    config = gpt().config
    start = {"anneal_iters": 4, "clip": False, "drop_clipped": False}
    variants = {
        "frozen": {},
        "learnable": {"learnable": True},
        "shared heads": {"learnable": True, "separate_heads": False},
        "annealed": start,
        "annealed, exact angles": start | {"exact_angles": True, "learnable": True},
    }
    return {
        name: lambda v=v: FourierEmbedding(config, fope_config(**v), layer=2, head_dim=16, num_kv_heads=2)
        for name, v in variants.items()
    }


def _tensors(module: Any) -> dict[str, Any]:
    """Parameters and buffers, also those that no checkpoint holds."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _assert_same(found: Any, expected: Any, case: str) -> None:
    found, expected = _tensors(found), _tensors(expected)
    assert found.keys() == expected.keys(), case
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (case, name)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New memory is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_new_modules_do_not_depend_on_the_ambient_device_or_dtype() -> None:
    for name, make in _modules().items():
        with torch.device("meta"):
            on_meta = make()
        torch.set_default_dtype(torch.bfloat16)
        try:
            in_bfloat16 = make()
        finally:
            torch.set_default_dtype(torch.float32)
        _assert_same(on_meta, make(), name)
        _assert_same(in_bfloat16, make(), name)


def test_tensors_survive_materialisation() -> None:
    """``to_empty`` of modules that have their numbers, and of modules that never had any."""
    ways = {
        "to_empty": lambda m: m.to_empty(device="cpu"),
        "meta, to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
        "meta, bf16, to_empty": lambda m: m.to("meta").bfloat16().to_empty(device="cpu"),
        "half and back": lambda m: m.half().float(),
    }
    with _poisoned_memory():
        for (name, make), (way, materialise) in itertools.product(_modules().items(), ways.items()):
            module = materialise(make())
            _assert_same(module, make(), f"{name}, {way}")
            for tensor in _tensors(module).values():
                tensor.data.fill_(7)
            for part in module.modules():
                if hasattr(part, "reset_parameters"):  # as PyTorch's and Megatron's FSDP do
                    part.reset_parameters()
            _assert_same(module, make(), f"{name}, {way}, reset_parameters")
            if name == "learnable":
                with torch.no_grad():
                    module.sin_coef.add_(1)
                trained = module.sin_coef.detach().clone()
                assert torch.equal(module.to_empty(device="cpu").sin_coef, trained), "training is not undone"


@since(0, 17)  # 0.16 has no megatron.training
def test_models_built_without_memory_equal_ordinary_ones() -> None:
    """Megatron's own order under ``--init-model-with-meta-device``, and PyTorch's; then a checkpoint."""
    from megatron.core.transformer.module import Float16Module
    from megatron.training.utils import to_empty_if_meta_device

    half = {"bf16": True, "params_dtype": torch.bfloat16}
    for build in (gpt, mla_model):
        ordinary = build(fope_config(learnable=True), **half).eval()
        expected = run(ordinary, *tokens())
        for materialise in (
            lambda model: to_empty_if_meta_device(model, device=torch.device("cpu")),
            lambda model: model.to_empty(device="cpu"),
        ):
            with _poisoned_memory():
                with torch.device("meta"):
                    model = build(fope_config(learnable=True), **half).eval()
                materialise(Float16Module(model.config, model))
            model.load_state_dict(ordinary.state_dict())
            assert torch.equal(run(model, *tokens()), expected)


def test_every_learnable_coefficient_gets_a_gradient() -> None:
    """Megatron's data parallelism waits for all of them: with unrotated layers, and with all else frozen."""
    every = {"learnable": True}
    cases = {
        "unrotated layer": gpt(fope_config(**every), no_rope_freq=[0, 1]),
        "no rotated layer": gpt(fope_config(**every), no_rope_freq=[1, 1]),
        "shared heads": gpt(fope_config(**every, separate_heads=False), no_rope_freq=[1, 0]),
        "latent attention": mla_model(fope_config(**every)),
        "annealed": gpt(fope_config(**every, anneal_iters=4, clip=False, drop_clipped=False)),
    }
    for (name, model), frozen in itertools.product(cases.items(), (False, True)):
        plain = run(model, *tokens())
        model.zero_grad()
        model.requires_grad_(not frozen)
        for parameter, value in model.named_parameters():
            value.requires_grad_(not frozen or ".fope." in parameter)
        run(model, *tokens()).square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if ".fope." in n}
        assert gradients and all(g is not None for g in gradients.values()), (name, frozen)
        for layer, rotated in zip(model.decoder.layers, _rotated(model), strict=True):
            for coefficient in layer.self_attention.fope.parameters():
                if name != "annealed":  # whose weight is still 0
                    assert bool(coefficient.grad.any()) is rotated, (name, frozen)
        assert torch.equal(run(model, *tokens()), plain)


def _rotated(model: Any) -> list[bool]:
    return [layer.self_attention.fope_rotates for layer in model.decoder.layers]


def test_optimizers_treat_coefficients_of_every_shape_alike() -> None:
    """As no matrix, whose update Muon orthogonalises, and as nothing that grows with the model's width."""
    from megatron.core import optimizer as optimizers

    groups = []
    for overrides in ({}, {"separate_heads": False}, {"separate_basis": False, "separate_heads": False}):
        model = gpt(fope_config(learnable=True, **overrides))
        ours = {n: p for n, p in model.named_parameters() if ".fope." in n}
        assert ours
        for parameter in ours.values():
            # Through 0.17 Muon takes every parameter with two dimensions.
            assert parameter.dim() == 3 and parameter.is_embedding_parameter
            for managed, wanted in _muon_rules():
                assert managed(parameter) is wanted
        config = optimizers.OptimizerConfig(lr=1e-3, weight_decay=0.1, decoupled_lr=1e-2, decoupled_min_lr=0)
        overrides = optimizers.get_standard_config_overrides(config)
        found = []
        for group in optimizers._get_param_groups([model], config, overrides):
            if {id(p) for p in group["params"]} & {id(p) for p in ours.values()}:
                found.append({k: v for k, v in group.items() if k != "params"})
        groups.append(found)
    assert len(groups[0]) == 1 and groups[0] == groups[1] == groups[2]


def _muon_rules() -> list[tuple[Callable[[Any], bool], bool]]:
    """Megatron's own questions whether a parameter is a matrix (0.18 and later), and the right answers."""
    try:
        from megatron.core.optimizer.emerging_optimizers import _is_nonlinear_or_embedding
        from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer
    except ImportError:
        return []
    return [(_is_nonlinear_or_embedding, True), (is_managed_by_layer_wise_optimizer, False)]


def test_offloading_gives_the_same_gradients() -> None:
    """Megatron's own offloading of the core attention, on CPU tensors; it frees query, key and value."""
    shapes = [{}, {"num_query_groups": 4}, {"attention_output_gate": True}]
    settings = {
        "fine_grained_activation_offloading": True,
        "offload_modules": ["core_attn"],
        "min_offloaded_tensor_size": 1,
    }
    for build, shape in (*((gpt, shape) for shape in shapes), (mla_model, {})):
        fope = fope_config(learnable=True)
        expected = _gradients(build, fope, **shape)
        with _offloading_on_the_cpu():
            found = _gradients(build, fope, **shape, **settings)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@contextmanager
def _offloading_on_the_cpu() -> Iterator[None]:
    """Megatron asks for CUDA tensors, and for a switch of Transformer Engine."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload

    handler = offload.ChunkOffloadHandler
    offloadable = staticmethod(lambda tensor: not isinstance(tensor, torch.nn.Parameter))
    with (
        mock.patch.object(transformer_engine, "cpu_offload", SimpleNamespace()),
        mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None),
        mock.patch.object(torch.Tensor, "is_pinned", lambda tensor, *device: False),
        mock.patch.object(handler, "_can_manage_tensor_for_offload", offloadable, create=True),
    ):
        yield


def _gradients(build: Any, fope: Any, **settings: Any) -> dict[str, Any]:
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload

    offload.PipelineOffloadManager.reset_instance()
    model = build(fope, **settings).train()
    run(model, *tokens()).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
