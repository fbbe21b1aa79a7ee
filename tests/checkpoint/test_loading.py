"""Loading with arguments of other programs, and of earlier versions."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from synthetic import SyntheticCheckpoint

from megatron_fope.checkpoint.arguments import adopt_checkpoint_arguments
from megatron_fope.checkpoint.loading import load_base_checkpoint
from megatron_fope.common.errors import UserError
from megatron_fope.formula.config import FoPEConfig
from megatron_fope.tools.conversion.converter import convert


def test_arguments_that_say_nothing_of_positions() -> None:
    """As in Megatron-LM's own tests of its pipeline layouts."""
    stored = SimpleNamespace(position_embedding_type="rope")
    answer = ({"args": stored, "model": {}}, "name", False, None)
    for options in ({"rank0": True}, {"sharded_state_dict": {"model": {}}}):
        args = SimpleNamespace(data_parallel_size=1, ckpt_format="torch_dist")
        assert load_base_checkpoint(lambda *a, **k: answer, "folder", args, options) is answer


@pytest.mark.parametrize("name", ["fope_padding", "fope_implementation"])
def test_names_before_the_flags_were_renamed(name: str, tmp_path: Path) -> None:
    """Their values would be ignored: refused by the load, by ``--use-checkpoint-args`` and by ``convert``."""
    old = SyntheticCheckpoint(
        tmp_path / "old", fope=FoPEConfig.from_profile(train_length=64), **{name: "0,1"}
    )
    args = copy.copy(old.args)
    delattr(args, name)
    args.__dict__ |= {"data_parallel_size": 1, "finetune": False, "non_persistent_ckpt_type": "local"}
    answer = ({"args": old.args, "model": {}}, "name", False, None)
    message = (
        f"the checkpoint stores {name}: it was written by an earlier development version of megatron-fope"
    )
    for options in ({"rank0": True}, {"sharded_state_dict": {"model": {}}}):
        with pytest.raises(UserError, match=message):
            load_base_checkpoint(lambda *a, **k: answer, "folder", args, options)
    with pytest.raises(UserError, match=message):
        adopt_checkpoint_arguments(args, old.args, "folder", None, args)
    with pytest.raises(UserError, match=message):
        convert(old.folder, tmp_path / "new", train_length=256)
