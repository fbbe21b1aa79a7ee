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

    from megatron_fope.cpu import cuda

    # OpenMP read the environment when torch was loaded, which may have been before.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _compile_nothing()
    cuda.install()
    _patch_megatron()
    logger.info("CPU runtime enabled: torch.cuda is replaced, Megatron %s", _megatron_version())


def _megatron_version() -> str:
    from megatron_fope import compat

    return str(compat.megatron_version())


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


def _compile_nothing() -> None:
    """Run functions under ``torch.compile`` eagerly.

    Megatron decorates small functions with it. A CPU would compile for minutes, needs a C++ compiler, and
    the compiler does not know the rewriting of devices.
    """
    import torch

    torch.compiler.set_stance("force_eager")


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
    compat.define_missing_router_kernel()
    compat.define_missing_latent_attention_library()


def _use_cpu_generator() -> None:
    """Let Megatron's per-rank random states drive the CPU generator.

    ``megatron.core.tensor_parallel.random`` sets the state of a GPU generator through a callback that
    torch delays until CUDA starts, so on a CPU nothing would happen and dropout would not differ between
    tensor-parallel ranks.
    """
    import megatron.core.tensor_parallel.random as random
    import torch

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


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
    """Keep the rewriting of devices while activations are recomputed during the backward pass.

    Without it a recomputed layer that makes its own causal mask asks for CUDA.
    """
    import megatron.core.tensor_parallel.random as random

    from megatron_fope.cpu.cuda import with_active_mode

    checkpoint = random.CheckpointFunction
    checkpoint.backward = staticmethod(with_active_mode(checkpoint.backward))
    without_output = random.CheckpointWithoutOutput
    without_output._recompute = with_active_mode(without_output._recompute)
    _recompute_modules(random)


def _recompute_modules(random: Any) -> None:
    """Let ``--recompute-modules`` name modules whose output is dropped, such as ``layernorm``.

    Megatron asks Transformer Engine whether FP8 is on, without which the names do not exist, and 0.19
    compiles C++ code that lets the dropped output and its recomputation share memory. Here the answer is no,
    and the memory is copied.
    """
    import torch

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

    optional = [
        parameter
        for parameter in inspect.signature(initialize_megatron).parameters.values()
        if parameter.default is not parameter.empty
    ]
    initialize_megatron.__defaults__ = tuple(
        True if parameter.name == "allow_no_cuda" else parameter.default for parameter in optional
    )


def _skip_jit_warm_up() -> None:
    """Leave out the warm-up of compiled functions.

    Nothing is compiled, and the warm-up draws random numbers, as many as the parallel layout makes its
    tensors large. GPU and CPU share one generator here, so initial weights would depend on the layout.
    """
    import megatron.training.initialize as initialize

    def no_warm_up(*args: Any, **kwargs: Any) -> None:
        pass

    initialize._warmup_jit_function = no_warm_up


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
