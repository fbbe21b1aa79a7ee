"""Programs that call Megatron's loading by themselves, with arguments of their own."""

from __future__ import annotations

from types import SimpleNamespace

from megatron_fope.checkpoint.loading import load_base_checkpoint


def test_arguments_that_say_nothing_of_positions() -> None:
    """As in Megatron-LM's own tests of its pipeline layouts."""
    stored = SimpleNamespace(position_embedding_type="rope")
    answer = ({"args": stored, "model": {}}, "name", False, None)
    for options in ({"rank0": True}, {"sharded_state_dict": {"model": {}}}):
        args = SimpleNamespace(data_parallel_size=1, ckpt_format="torch_dist")
        assert load_base_checkpoint(lambda *a, **k: answer, "folder", args, options) is answer
