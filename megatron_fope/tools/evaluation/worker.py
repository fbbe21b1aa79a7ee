"""One rank of an evaluation; started by :mod:`megatron_fope.tools.evaluation.launching` under torchrun."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

from megatron_fope.common.errors import exit_on_user_error
from megatron_fope.common.log import is_rank0
from megatron_fope.common.staging import write_text
from megatron_fope.tools.evaluation import progress
from megatron_fope.tools.evaluation.launching import Request


def main(folder: str) -> None:
    """Evaluate as ``folder/request`` says; rank 0 writes ``folder/0.json`` for the first checkpoint, ..."""
    request: Request = pickle.loads(Path(folder, "request").read_bytes())
    from megatron_fope.tools.evaluation import model
    from megatron_fope.training.launch import prepare

    if is_rank0():
        progress.count_in(Path(folder, "progress"))
    for number, (checkpoint, flags) in enumerate(request.checkpoints):
        if number:
            model.unload_models()
        sys.argv = ["megatron-fope", *flags]
        prepare(cpu=request.cpu)
        results = request.measure(model.load_model(checkpoint))
        if is_rank0():
            write_text(Path(folder, f"{number}.json"), json.dumps(results))
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
