"""One rank of an evaluation; started by :mod:`megatron_fope.tools.evaluation.launching` under torchrun."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

from megatron_fope.common.errors import exit_on_user_error
from megatron_fope.tools.evaluation import progress
from megatron_fope.tools.evaluation.launching import Request


def main(folder: str) -> None:
    """Evaluate as ``folder/request`` says; rank 0 writes ``folder/results.json``."""
    request: Request = pickle.loads(Path(folder, "request").read_bytes())
    sys.argv = ["megatron-fope", *request.flags]
    from megatron_fope.training.launch import prepare

    prepare(cpu=request.cpu)
    import torch

    from megatron_fope.tools.evaluation.model import load_model

    if os.environ["RANK"] == "0":
        progress.count_in(Path(folder, "progress"))
    results = request.measure(load_model(request.checkpoint))
    if torch.distributed.get_rank() == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with exit_on_user_error():
        main(*sys.argv[1:])
