"""Every checkpoint of every parallel layout on 1, 2 and 4 ranks, loaded by every other: ``make reshard``.

Three families of a small model: dense with fewer KV heads than tensor-parallel ranks, mixture of experts, and
dense with learnable coefficients and the distributed optimizer. In each, one rank makes a checkpoint, every
layout loads it and saves its own, and then every layout loads what every layout has saved. What is asked of
each pair: all weights and buffers, filled with NaN before, come from the file; the coefficients on every
rank equal those of the first checkpoint bit for bit; the loss equals that of the loading layout from its own
file bit for bit, and that of one rank within 1e-5; with an optimizer, saving again gives every tensor of
the first checkpoint bit for bit. Writes the table ``tests/reshard.md`` and exits with 1 if a pair fails.

    python tests/reshard.py [--quick] [FAMILY ...]     some layouts or families only; no table is written
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().with_name("helpers")))

from forks import ROOT, import_megatron, run_ranks

LAYERS, HEADS, KV_HEADS, LENGTH, BATCH = 4, 4, 2, 32, 2
FAMILIES = ("dense", "experts", "learnable")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; ``ep`` ranks share the experts."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "CP": self.cp, "DP": self.dp, "EP": self.ep}
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one rank"


def layouts(family: str, *, quick: bool) -> list[Layout]:
    """Every layout up to 4 ranks, the one rank first; or a few of each kind."""
    if quick:
        return {
            "dense": [Layout(), Layout(tp=4), Layout(pp=2, cp=2), Layout(tp=2, dp=2)],
            "experts": [Layout(), Layout(dp=2, ep=2), Layout(tp=2, pp=2)],
            "learnable": [Layout(), Layout(dp=2), Layout(tp=2, pp=2)],
        }[family]
    sizes = [s for s in itertools.product((1, 2, 4), repeat=4) if math.prod(s) in (1, 2, 4)]
    found = [Layout(*s, ep=ep) for s in sizes for ep in (1, 2, 4) if _allowed(Layout(*s, ep=ep), family)]
    return sorted(found, key=lambda layout: layout.ranks)


def _allowed(layout: Layout, family: str) -> bool:
    return layout.ep == 1 if family != "experts" else layout.ranks // layout.pp % layout.ep == 0


# In a rank


class Model:
    """The model of a family on this rank, with the process groups of a layout."""

    def __init__(self, family: str, layout: Layout) -> None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        self.family, self.layout = family, layout
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=1,
        )
        model_parallel_cuda_manual_seed(1)
        self.state = parallel_state
        self.gpt = self._build()
        self.chunk, self.optimizer = self._with_optimizer() if family == "learnable" else (self.gpt, None)

    def _build(self) -> Any:
        import torch
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.transformer_config import TransformerConfig

        from megatron_fope import FoPEConfig, with_fope

        experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall"}
        config = TransformerConfig(
            num_layers=LAYERS,
            hidden_size=64,
            num_attention_heads=HEADS,
            num_query_groups=KV_HEADS,
            tensor_model_parallel_size=self.layout.tp,
            sequence_parallel=self.layout.tp > 1,
            pipeline_model_parallel_size=self.layout.pp,
            context_parallel_size=self.layout.cp,
            expert_model_parallel_size=self.layout.ep,
            expert_tensor_parallel_size=1,
            pipeline_dtype=torch.float32,
            add_bias_linear=self.family != "experts",
            use_cpu_initialization=True,
            init_method_std=0.2,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
            **(experts if self.family == "experts" else {}),
        )
        spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
        fope = FoPEConfig.from_profile(train_length=LENGTH, gain=1.0, learnable=self.family == "learnable")
        torch.manual_seed(3)
        return GPTModel(
            config,
            with_fope(spec, fope),
            vocab_size=128,
            max_sequence_length=LENGTH,
            pre_process=self.state.is_pipeline_first_stage(),
            post_process=self.state.is_pipeline_last_stage(),
        )

    def _with_optimizer(self) -> tuple[Any, Any]:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
        chunk = DistributedDataParallel(self.gpt.config, ddp, self.gpt)
        self.gpt.config.finalize_model_grads_func = finalize_model_grads
        config = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True)
        return chunk, get_megatron_optimizer(config, [chunk])

    def state_dict(self, *, is_loading: bool) -> dict[str, Any]:
        """What Megatron's training saves of a model and its optimizer."""
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": self.state.get_data_parallel_group(with_context_parallel=True),
        }
        state = {"model": self.gpt.sharded_state_dict(metadata=metadata)}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.sharded_state_dict(
                state, is_loading=is_loading, metadata=metadata
            )
        return state

    def save(self, folder: Path) -> None:
        import torch
        from megatron.core import dist_checkpointing

        if torch.distributed.get_rank() == 0:
            folder.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(self.state_dict(is_loading=False), str(folder))

    def load(self, folder: Path) -> None:
        """Load over a model that holds nothing but NaN."""
        import torch
        from megatron.core import dist_checkpointing

        with torch.no_grad():
            for tensor in self._own_tensors():
                tensor.fill_(math.nan)
        state = dist_checkpointing.load(self.state_dict(is_loading=True), str(folder))
        self.gpt.load_state_dict(state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        assert not any(tensor.isnan().any() for tensor in self._own_tensors())

    def _own_tensors(self) -> list[Any]:
        tensors = [t for t in self.gpt.state_dict().values() if hasattr(t, "is_floating_point")]
        if self.optimizer is not None:
            for inner in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
                states = inner.optimizer.state.values()
                tensors += [value for state in states for name, value in state.items() if name != "step"]
        return [tensor for tensor in tensors if tensor.is_floating_point()]

    def coefficients_equal(self, reference: dict[str, Any]) -> bool:
        """Whether all layers of this rank hold the first checkpoint's numbers, bit for bit."""
        import torch

        return all(
            torch.equal(getattr(layer.self_attention.fope, name), whole[layer.layer_number - 1])
            for layer in self.gpt.decoder.layers
            for name, whole in reference.items()
        )

    def step(self, *, train: bool) -> float:
        """Mean loss of the same tokens in every layout; with ``train`` the optimizer makes a step."""
        import torch
        from megatron.core.pipeline_parallel import get_forward_backward_func

        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(0, 128, (BATCH, LENGTH + 1), generator=generator)
        rank, size = self.state.get_context_parallel_rank(), self.layout.cp
        chunks = torch.arange(LENGTH).chunk(2 * size)
        mine = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])  # Megatron's balanced cut
        inputs, labels = tokens[:, mine], tokens[:, mine + 1]
        positions = mine.expand(BATCH, -1)
        sums: list[Any] = []

        def forward(_: Any, model: Any) -> tuple[Any, Any]:
            output = model(inputs, positions, None, labels=labels)

            def loss(losses: Any) -> tuple[Any, dict[str, Any]]:
                sums.append(losses.detach().double().sum())
                return losses.mean(), {}

            return output, loss

        if train:
            self.chunk.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=None,
            model=[self.chunk],
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=not train,
        )
        if train:
            self.optimizer.step()
        total = sums[0] if sums else torch.zeros((), dtype=torch.float64)  # other stages have none
        torch.distributed.all_reduce(total)
        return float(total) / (BATCH * LENGTH * self.layout.dp * self.layout.tp)


def whole_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, unsharded."""
    import torch
    from torch.distributed import checkpoint

    entries = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state


def coefficients(folder: Path) -> dict[str, Any]:
    """``{sin_coef, cos_coef: [layers, KV heads, D_in, D_out]}`` of a checkpoint."""
    prefix = "decoder.layers.self_attention.fope."
    return {n.removeprefix(prefix): v for n, v in whole_tensors(folder).items() if n.startswith(prefix)}


def make_first(family: str, folder: Path) -> None:
    """The checkpoint from which all others come; an optimizer has made a step."""
    model = Model(family, Layout())
    if model.optimizer is not None:
        model.step(train=True)
    model.save(folder)


def save_own(family: str, layout: Layout, first: Path, folder: Path) -> None:
    """What a layout saves of the first checkpoint."""
    model = Model(family, layout)
    model.load(first)
    model.save(folder)


def load_all(family: str, layout: Layout, first: Path, folders: dict[str, Path], result: Path) -> None:
    """Load every checkpoint; rank 0 writes ``{name: [coefficients equal, other tensors, loss]}``."""
    import torch

    model = Model(family, layout)
    reference, tensors = coefficients(first), whole_tensors(first)
    found = {}
    for name, folder in folders.items():
        model.load(folder)
        equal = torch.tensor(int(model.coefficients_equal(reference)))
        torch.distributed.all_reduce(equal, op=torch.distributed.ReduceOp.MIN)
        others: list[str] = []
        if model.optimizer is not None:
            again = result.with_suffix(".again")
            model.save(again)
            if torch.distributed.get_rank() == 0:
                others = differing(whole_tensors(again), tensors)
                shutil.rmtree(again)
            torch.distributed.barrier()
        found[name] = [bool(equal), others, model.step(train=False)]
    if torch.distributed.get_rank() == 0:
        result.write_text(json.dumps(found))


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the tensors that are not in both, bit for bit."""
    import torch

    names = one.keys() & other.keys()
    return sorted((one.keys() ^ other.keys()) | {n for n in names if not torch.equal(one[n], other[n])})


# In the process that forks the ranks


def check_family(family: str, folder: Path, *, quick: bool) -> tuple[int, list[str], list[str]]:
    """Try all pairs of a family: their number, the failures, and rows for the table."""
    names = {str(layout): layout for layout in layouts(family, quick=quick)}
    folder = folder / family
    folder.mkdir()
    first, log = folder / "first", folder / "log"

    def run(ranks: int, action: Any) -> bool:
        return run_ranks(ranks, action, log, timeout=1800) == 0

    if not run(1, lambda: make_first(family, first)):
        raise RuntimeError(log.read_text()[-3000:])
    failures, rows, saved = [], [], {}
    for name, layout in names.items():
        own = folder / name.replace(" ", "-")
        if run(layout.ranks, lambda layout=layout, own=own: save_own(family, layout, first, own)):
            saved[name] = own
        else:
            failures.append(f"{family}: {name} cannot save: {log.read_text()[-1500:]}")
    target, result = None, folder / "result.json"
    for name, layout in names.items():
        start = time.monotonic()
        if not run(layout.ranks, lambda layout=layout: load_all(family, layout, first, saved, result)):
            failures.append(f"{family}: {name} cannot load: {log.read_text()[-1500:]}")
            rows.append(f"| {family} | {name} | {layout.ranks} | 0 of {len(names)} | |")
            continue
        found = json.loads(result.read_text())
        losses = {source: loss for source, (_, _, loss) in found.items()}
        target = losses[name] if target is None else target
        bad = [
            source
            for source, (coefficients_equal, others, loss) in found.items()
            if not coefficients_equal or others or loss != losses[name] or abs(loss - target) > 1e-5
        ]
        failures += [f"{family}: {source} -> {name}: {found[source]}" for source in bad]
        good, off = len(found) - len(bad), abs(losses[name] - target)
        rows.append(f"| {family} | {name} | {layout.ranks} | {good} of {len(names)} | {off:.1e} |")
        print(f"{rows[-1]} {time.monotonic() - start:.0f} s", flush=True)
    return len(names) ** 2, failures, rows


def document(rows: list[str], pairs: int, failed: int) -> str:
    """The committed table."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT)
    versions = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch"))
    return "\n".join(
        [
            "# Checkpoints from every layout into every other",
            "",
            f"`make reshard`, {datetime.date.today()}, commit {commit.stdout.strip()},",
            f"{platform.machine()} CPU, gloo, {versions}.",
            f"{pairs - failed} of {pairs} pairs agree.",
            "",
            f"{LAYERS} layers, {HEADS} query and {KV_HEADS} KV heads; sequence parallelism wherever TP is",
            'above 1. "from": how many layouts\' checkpoints this layout loads with coefficients equal on',
            "every rank bit for bit and with the same loss bit for bit; with learnable coefficients also the",
            'distributed optimizer\'s state. "loss": difference from one rank, limit 1e-5.',
            "",
            "| model | into | ranks | from | loss |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main(argv: list[str]) -> int:
    """Run the families; returns the exit code."""
    quick = "--quick" in argv
    wanted = [word for word in argv if word != "--quick"] or list(FAMILIES)
    import_megatron()
    pairs, failures, rows = 0, [], []
    with tempfile.TemporaryDirectory() as temporary:
        for family in wanted:
            tried, failed, found = check_family(family, Path(temporary), quick=quick)
            pairs, failures, rows = pairs + tried, failures + failed, rows + found
    for failure in failures:
        print(failure, file=sys.stderr)
    if not quick and wanted == list(FAMILIES):
        (ROOT / "tests" / "reshard.md").write_text(document(rows, pairs, len(failures)))
    print(f"{pairs - len(failures)} of {pairs} pairs of layouts agree")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
