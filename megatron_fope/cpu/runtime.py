"""Turns the CPU runtime on: the remaining patches of Megatron, and the order of all of them."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
from types import SimpleNamespace
from typing import Any

from megatron_fope.cpu.environment import prepare_environment

logger = logging.getLogger(__name__)

_CUDA_ONLY_LIBRARIES = ("transformer_engine", "transformer_engine_torch", "apex")

_enabled = False


def enable() -> None:
    """Make this process train on the CPU, whether or not a GPU is there.

    Call it before anything imports Megatron, in every rank. It changes ``torch`` and Megatron for the
    whole process and cannot be undone; calling it again does nothing. The thread that calls it is the one
    that trains. Works with the wheel and with any unmodified script of a Megatron-LM checkout (put the
    checkout on ``sys.path`` first).
    """
    global _enabled
    if _enabled:
        return
    _enabled = True

    prepare_environment()
    _hide_cuda_libraries()

    import torch

    from megatron_fope import compat
    from megatron_fope.cpu import cuda

    # OpenMP read the environment when torch was loaded, which may have been before.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # Megatron compiles small functions. On a CPU that takes minutes and a C++ compiler, and the compiler does
    # not know the rewriting of devices.
    torch.compiler.set_stance("force_eager")
    cuda.install()
    _patch_megatron()
    logger.info("CPU runtime enabled: torch.cuda is replaced, Megatron %s", compat.megatron_version())


def _hide_cuda_libraries() -> None:
    """Make ``import transformer_engine`` and ``import apex`` fail.

    Megatron prefers their kernels, norms and optimizers where they are installed, and those only exist
    for CUDA. A None in ``sys.modules`` is Python's way to block an import.
    """
    for name in _CUDA_ONLY_LIBRARIES:
        if name in sys.modules and sys.modules[name] is not None:
            logger.warning("%s was imported before the CPU runtime was enabled; it may need CUDA", name)
        else:
            sys.modules[name] = None  # type: ignore[assignment]


def _patch_megatron() -> None:
    """Apply every patch of Megatron, in no particular order."""
    from megatron_fope import compat
    from megatron_fope.cpu import attention, norm, optimizer, saving

    _use_cpu_generator()
    _start_data_loaders_without_randomness()
    if compat.has_training_loop():
        _allow_no_cuda()
        _skip_jit_warm_up()
    _move_split_sizes()
    _recompute_on_cpu()
    norm.install()
    attention.install()
    optimizer.install()
    saving.install()
    compat.prepare_dataset_helpers()
    compat.repair_checkpoint_metadata_reader()
    compat.repair_models_without_transformer_engine()


def _use_cpu_generator() -> None:
    """Let Megatron's per-rank random states drive the CPU generator.

    ``megatron.core.tensor_parallel.random`` sets the state of a GPU generator through a callback that
    torch delays until CUDA starts, so on a CPU nothing would happen and dropout would not differ between
    tensor-parallel ranks.
    """
    import megatron.core.tensor_parallel.random as random

    from megatron_fope.cpu import cuda

    random._get_cuda_rng_state = cuda.get_rng_state
    random._set_cuda_rng_state = cuda.set_rng_state


def _start_data_loaders_without_randomness() -> None:
    """Leave the random state alone when a data loader starts.

    It draws a seed for its workers from the CPU generator, which is the one that dropout uses here. A run
    that resumes starts its loaders after it has restored the random state, and would go on with other
    numbers than the run that it continues.
    """
    import torch

    start = torch.utils.data.DataLoader.__iter__

    def __iter__(self: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            return start(self)

    torch.utils.data.DataLoader.__iter__ = __iter__


def _recompute_on_cpu() -> None:
    """Recompute activations on the CPU, also those of ``--recompute-modules`` whose output is dropped.

    A recomputed layer that makes its own causal mask asks for CUDA during the backward pass. For the modules,
    Megatron asks Transformer Engine whether FP8 is on, without which the names do not exist, and 0.19
    compiles C++ code that lets the dropped output and its recomputation share memory. Here the answer is no,
    and the memory is copied.
    """
    import megatron.core.tensor_parallel.random as random
    import torch

    from megatron_fope.cpu.cuda import with_cuda_as_cpu

    checkpoint, without_output = random.CheckpointFunction, random.CheckpointWithoutOutput
    checkpoint.backward = staticmethod(with_cuda_as_cpu(checkpoint.backward))
    without_output._recompute = with_cuda_as_cpu(without_output._recompute)

    def share_storage(dropped: torch.Tensor, recomputed: torch.Tensor) -> None:
        source, target = recomputed.untyped_storage(), dropped.untyped_storage()
        target.resize_(source.nbytes())
        target.copy_(source)

    def no_context(*args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext()

    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = no_context
    random.fp8_autocast = no_context
    random._get_share_storage = lambda: share_storage


def _allow_no_cuda() -> None:
    """Turn the default of ``initialize_megatron(allow_no_cuda=...)`` to True.

    The argument exists upstream, but ``pretrain`` does not pass it on. Changing the default reaches
    modules that imported the function by name.
    """
    from megatron.training.initialize import initialize_megatron

    initialize_megatron.__defaults__ = tuple(
        True if parameter.name == "allow_no_cuda" else parameter.default
        for parameter in inspect.signature(initialize_megatron).parameters.values()
        if parameter.default is not parameter.empty
    )


def _skip_jit_warm_up() -> None:
    """Leave out the warm-up of compiled functions.

    Nothing is compiled, and the warm-up draws random numbers, as many as the parallel layout makes its
    tensors large. GPU and CPU share one generator here, so initial weights would depend on the layout.
    """
    import megatron.training.initialize as initialize

    initialize._warmup_jit_function = lambda **options: None


def _move_split_sizes() -> None:
    """Hand split sizes of the mixture-of-experts all-to-all to gloo as numbers.

    The token dispatcher converts them to numpy while it copies them from the GPU. A tensor that already
    is on the CPU would stay a tensor, which ``all_to_all_single`` refuses.
    """
    import megatron.core.transformer.moe.token_dispatcher as dispatcher
    import torch

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.detach().numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_cpu
