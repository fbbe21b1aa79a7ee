"""Megatron-Bridge with exported models, on the CPU; for ``tests/serving/test_bridge.py``.

``python bridge_checks.py CASES OUT`` on every tensor-parallel rank; ``CASES`` is a JSON object ``{name:
{"folder", "reference"}}`` as for ``vllm_checks.py``. Rank 0 writes ``{name: results}`` to the file ``OUT``.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

CASES, OUT = Path(sys.argv[1]), Path(sys.argv[2])
FUSIONS = (
    "gradient_accumulation_fusion", "bias_dropout_fusion", "bias_activation_fusion", "persist_layer_norm",
    "masked_softmax_fusion",
)  # fmt: skip
"""Of providers; they need a GPU."""


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Transformer Engine, which Bridge imports in any case; nothing of it is called."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] != "transformer_engine":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__, module.__file__ = "2.9.0", "stand-in"


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        return _Class.of(name)


class _Class(type):
    @classmethod
    def of(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls(name, (torch.nn.Module,), {})

    def __getattr__(cls, name: str) -> type:
        return _Class.of(name)


def check(case: dict[str, str], ranks: int) -> dict[str, Any]:
    """Import a folder through Bridge, compute, export it again."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
    from megatron.bridge.utils.instantiate_utils import instantiate
    from megatron.core.process_groups_config import ProcessGroupCollection
    from safetensors.torch import load_file

    from megatron_fope import FoPEConfig, assert_fope_active, register, unregister

    auto = AutoBridge.from_hf_pretrained(case["folder"], trust_remote_code=True)
    provider = auto.to_megatron_provider(load_weights=False)
    for name in FUSIONS:
        setattr(provider, name, False)
    provider.transformer_layer_spec = local_layer_spec
    provider.tensor_model_parallel_size = ranks
    provider.parallel_output = False
    provider.should_pad_vocab = True
    provider.use_cpu_initialization = True
    provider.finalize()
    stored = instantiate(_ConfigContainerBase._convert_value_to_dict(provider))
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = provider.provide(True, True).eval()
    layers = assert_fope_active(model)
    auto.load_hf_weights([model])

    references = torch.load(case["reference"])
    texts = [torch.cat((prompt, generated))[None] for prompt, _, generated in references]

    @torch.no_grad()
    def logits(text: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(text.size(1))[None]
        return model(text, positions, None)[0, :, : references[0][1].size(-1)].float()

    def difference(found: list[torch.Tensor]) -> float:
        pairs = zip(found, (expected for _, expected, _ in references), strict=True)
        return max((one - other).abs().max().item() for one, other in pairs)

    exported = {
        weight.param_name: weight.weight
        for weight in auto.export_hf_weights([model], cpu=True, show_progress=False)
    }
    source = load_file(Path(case["folder"]) / "model.safetensors")
    results = {
        "layers": len(layers),
        "difference": difference([logits(text) for text in texts]),
        "largest logit": max(expected.abs().max().item() for _, expected, _ in references),
        "same names": sorted(exported) == sorted(source),
        "same bits": [name for name, value in source.items() if not torch.equal(exported[name], value)],
        "stored": type(stored) is type(provider) and stored.fope == provider.fope,
    }

    # Without a folder: Bridge's own provider, and FoPE registered with the settings.
    register(FoPEConfig(**provider.fope))
    names = {field.name for field in dataclasses.fields(GPTModelProvider) if field.init}
    fields = {name: getattr(provider, name) for name in names} | {"position_embedding_type": "fope"}
    own = GPTModelProvider(**fields)
    own._pg_collection = provider._pg_collection
    results["own provider"] = len(assert_fope_active(own.provide(True, True)))
    unregister()
    results["refused"] = []
    for change in ({"fope": None}, {"position_embedding_type": "rope"}, {"mtp_num_layers": 1}):
        try:
            changed = dataclasses.replace(stored, **change)
            changed.provide(True, True)
        except ValueError as error:
            results["refused"].append(str(error))
    return results


def main() -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    sys.argv = ["bridge_checks"]
    from megatron_fope.training.launch import prepare

    prepare(cpu=True)
    sys.modules.pop("transformer_engine", None)
    sys.meta_path.insert(0, StandIn())
    logging.disable(logging.WARNING)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_fope import unregister
    from megatron_fope.tools.huggingface import bridge

    unregister()
    bridge.register()
    bridge.register()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)
    results = {name: check(case, ranks) for name, case in json.loads(CASES.read_text()).items()}
    if torch.distributed.get_rank() == 0:
        OUT.write_text(json.dumps(results))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
