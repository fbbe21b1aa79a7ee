"""Checks of what surrounds a model: graph capture's writes, threads; ``model_checks.py`` runs them."""

from __future__ import annotations

import threading
from typing import Any

from mla_checks import mla_model
from model_checks import fope_config, gpt, run, tokens


def check_layers_whose_buffers_are_written_back() -> None:
    """What Megatron's graph runner does to a layer between the captures of its forward and backward pass."""
    import torch

    recompute = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
    for build, settings in ((gpt, {}), (mla_model, {}), (mla_model, recompute)):
        found = []
        for written in (False, True):
            model = build(fope_config(), **settings)
            model.train()
            logits = run(model, *tokens())
            if written:
                for buffer in model.buffers():
                    buffer.copy_(buffer.clone())
            logits.square().mean().backward()
            found.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), build


def check_threads_have_their_own_positions() -> None:
    """Two threads inside the same layer at the same moment, with other documents."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    model = gpt(fope_config(gain=1.0))
    ids, positions = tokens(length=24, batch=1)

    def logits(cut: int) -> Any:
        lengths = torch.tensor([0, cut, 24], dtype=torch.int32)
        packed = PackedSeqParams("thd", lengths, lengths, max_seqlen_q=24, max_seqlen_kv=24)
        with torch.no_grad():
            return model(ids, positions, None, packed_seq_params=packed)

    cuts = (3, 10, 17)
    expected = [logits(cut) for cut in cuts]
    found: dict[int, Any] = {}
    together = threading.Barrier(len(cuts), timeout=60)

    def wait(*_: Any) -> None:
        together.wait()

    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.register_forward_hook(wait)

    def work(cut: int) -> None:
        found[cut] = logits(cut)

    threads = [threading.Thread(target=work, args=(cut,)) for cut in cuts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cut, alone in zip(cuts, expected, strict=True):
        torch.testing.assert_close(found[cut], alone, rtol=0, atol=1e-6)
