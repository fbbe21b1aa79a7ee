"""Position ids in real models.

A sample with padding in front, whose position ids start behind it, must get the logits it has without the
padding: what RoPE gives by itself, because it sees differences of positions only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import fope_config, gpt, mla_model, refused, run, tokens, transformer_config

pytestmark = [pytest.mark.launch, pytest.mark.ranks(1), pytest.mark.usefixtures("model_parallel")]


PADS = (0, 6, 3)
LENGTH = 24
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def left_padded(pads: tuple[int, ...] = PADS) -> tuple[Any, Any, Any]:
    """Token ids, position ids and mask (True: hidden) of samples with so many pads in front."""
    ids, _ = tokens(LENGTH, len(pads))
    front = torch.tensor(pads)[:, None]
    positions = (torch.arange(LENGTH) - front).clamp(min=0)
    column = torch.arange(LENGTH)
    hidden = (column[None, :] > column[:, None])[None] | (column < front)[:, None]
    hidden = hidden & ~torch.eye(LENGTH, dtype=torch.bool)  # a row without anything to see would be nan
    return ids, positions, hidden[:, None]


def assert_pads_do_not_matter(model: Any, tolerance: float = 2e-5) -> None:
    ids, positions, mask = left_padded()
    together = model(ids, positions, mask)
    for row, pads in enumerate(PADS):
        alone = run(model, ids[row : row + 1, pads:], positions[row : row + 1, pads:])
        difference = (together[row, pads:] - alone[0]).abs().max()
        assert difference < tolerance, (type(model).__name__, row, difference)


def hybrid(fope: Any, pattern: str = "*-*-", **overrides: Any) -> Any:
    from megatron_fope import compat, with_fope
    from megatron_fope.training.hybrid_model import LOCAL_STACK

    model_class, (spec, *_) = compat.model_classes()[-1]
    torch.manual_seed(3)
    return model_class(
        transformer_config(num_layers=len(pattern.split("/")[0]), **overrides),
        **{spec: with_fope(LOCAL_STACK, fope)},
        vocab_size=128,
        max_sequence_length=64,
        hybrid_layer_pattern=pattern,
        position_embedding_type="none",
    )


def models() -> Iterator[tuple[str, Callable[..., Any]]]:
    from megatron_fope import compat

    yield "gpt", lambda **o: gpt(fope_config(), **o)
    yield "intern-s1-pro", lambda **o: gpt(fope_config(profile="intern-s1-pro"), **o)
    yield "mla", lambda **o: mla_model(fope_config(), **o)
    if compat.megatron_version().release >= (0, 17):
        yield "hybrid", lambda **o: hybrid(fope_config(), **o)


def test_position_ids_are_honoured() -> None:
    for _, build in models():
        model = build().eval()
        assert_pads_do_not_matter(model)
        ids, positions, mask = left_padded()
        wrong = model(ids, positions * 0, mask)
        assert (wrong - model(ids, positions, mask)).abs().max() > 1e-2, "the model must notice positions"


def test_position_ids_reach_prediction_layers() -> None:
    """Their loss is a sum over real tokens only, which must not change with padding in front."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    from megatron_fope import with_fope

    config = transformer_config(mtp_num_layers=1)
    spec = get_gpt_mtp_block_spec(config, get_gpt_layer_local_spec(), use_transformer_engine=False)
    model = gpt(fope_config(), mtp=with_fope(spec, fope_config()), mtp_num_layers=1).train()
    layer = next(m for name, m in model.mtp.named_modules() if type(m).__name__ == "FoPESelfAttention")
    seen: list[Any] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    ids, positions, mask = left_padded((6,))
    labels = torch.zeros_like(ids)
    model(ids, positions, mask, labels=labels)
    model(ids[:, 6:], positions[:, 6:], None, labels=labels[:, 6:])
    model(ids, torch.arange(LENGTH)[None], mask, labels=labels)
    padded, alone, plain = (tensor[-18:-1] for tensor in seen)  # the last token's successor is unknown
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)
    assert (plain - padded).abs().max() > 1e-3


def test_position_ids_stay_with_their_micro_batch() -> None:
    """Layers run again in the backward pass, after another micro-batch's forward pass."""
    for name, build in models():
        gradients = []
        for settings in ({}, FULL):
            model = build(**settings).train()
            ids, positions, mask = left_padded()
            losses = [
                model(ids, places, mask).square().mean() for places in (positions, positions.flip(0) + 1)
            ]
            losses.reverse()
            for loss in losses:
                loss.backward()
            gradients.append({key: p.grad for key, p in model.named_parameters()})
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


def test_plain_position_ids_take_the_fast_path() -> None:
    from megatron_fope.layers.embedding import FourierEmbedding

    given: list[Any] = []
    forward = FourierEmbedding.forward

    def watch(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        given.append(position_ids)
        return forward(self, *args, position_ids=position_ids, **kwargs)

    FourierEmbedding.forward = watch
    try:
        model = gpt(fope_config())
        ids, positions = tokens()
        run(model, ids, positions)
        run(model, ids, positions.clone())
        run(model, ids, None)
        assert given == [None] * 6
        run(model, ids, (positions[0] + 3).expand(2, -1))
        assert [tuple(g.shape) for g in given[6:]] == [(1, 24)] * 2, "one row for equal samples"
        shifted = torch.stack([positions[0], positions[0] + 1])
        run(model, ids, shifted)
        assert all(g is shifted for g in given[8:]) and len(given) == 10
    finally:
        FourierEmbedding.forward = forward


def test_layers_share_one_basis_of_position_ids() -> None:
    from megatron_fope.formula import functional

    built: list[int] = []
    original = functional.fourier_basis
    functional.fourier_basis = lambda *args: built.append(1) or original(*args)
    try:
        model = gpt(fope_config(), **FULL).train()
        ids, positions, mask = left_padded()
        model(ids, positions, mask).sum().backward()
        assert len(built) == 1, "recomputation takes the same"
        positions += 1
        model(ids, positions, mask)
        assert len(built) == 2
    finally:
        functional.fourier_basis = original


def test_models_without_fope_are_left_alone() -> None:
    model = gpt(position="rope")
    assert not model._forward_pre_hooks and not model.decoder._forward_pre_hooks
    ids, positions, mask = left_padded()
    model(ids, positions, mask)


def test_an_error_leaves_no_position_ids_behind() -> None:
    model = gpt(fope_config())
    ids, positions, mask = left_padded()
    with contextlib.suppress(Exception):
        model(ids, positions, mask[..., 1:])
    run(model, *tokens(LENGTH + 1))
    model.decoder(torch.randn(30, 1, 64), None)


def test_unusable_position_ids_are_refused() -> None:
    model = gpt(fope_config())
    ids, positions = tokens()
    cases = {
        "position_ids has shape (24,); requires [b, s]": positions[0],
        "position_ids has shape (2, 23); requires [b, s], here [2, 24]": positions[:, :23],
        "position_ids has shape (1, 23)": positions[:1, 1:],
        "position_ids has shape (2, 25)": torch.arange(25).expand(2, -1),
        "position_ids has shape (3, 24)": positions[0] + torch.arange(3)[:, None],
        "position_ids is float32; requires": positions.float(),
        "position_ids is bool": positions > 3,
        "position_ids is list": positions.tolist(),
        "negative positions": positions - 1,
    }
    for text, case in cases.items():
        refused(lambda case=case: run(model, ids, case), text)


def test_rotary_tables_are_refused() -> None:
    """A model with its own position embedding beside FoPE's rotates twice, or adds positions."""
    from megatron_fope import assert_fope_active

    for position in ("rope", "yarn", "learned_absolute"):
        yarn = dict.fromkeys(
            ("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast"), 1.0
        )
        more = yarn | {"yarn_beta_slow": 1.0, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}
        model = double(position, more | {"yarn_correction_range_round_to_int": True})
        try:
            assert_fope_active(model)
        except RuntimeError as error:
            assert "position embedding" in str(error) and "\n" not in str(error), error
        else:
            raise AssertionError(f"{position} passed")
        if position != "learned_absolute":
            refused(lambda model=model: run(model, *tokens()), "rotate queries and keys twice")
    model = mla_model(fope_config())
    attention = model.decoder.layers[0].self_attention
    tables = torch.zeros(8, 1, 1, 16)
    refused(lambda: attention(torch.randn(8, 1, 64), None, rotary_pos_emb=tables), "twice")
    attention = gpt(fope_config()).decoder.layers[0].self_attention
    refused(lambda: attention(torch.randn(8, 1, 64), None, None, None, (tables, tables)), "twice")


def double(position: str, yarn: dict[str, Any]) -> Any:
    """A model from a FoPE spec in whose configuration another position embedding is set."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_fope import with_fope

    config = transformer_config()
    argument = position
    if position == "yarn":  # as Megatron-Bridge does: the field wins over the argument
        vars(config).update(yarn, position_embedding_type=position)
        argument = "none"
    torch.manual_seed(3)
    return GPTModel(
        config,
        with_fope(get_gpt_layer_local_spec(), fope_config()),
        vocab_size=128,
        max_sequence_length=64,
        position_embedding_type=argument,
    )
