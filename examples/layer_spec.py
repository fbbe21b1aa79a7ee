"""FoPE without any patching: a Megatron-Core model from a layer spec.

    torchrun --nproc-per-node 1 examples/layer_spec.py          # on a GPU
    torchrun --nproc-per-node 1 examples/layer_spec.py --cpu

Prints what every attention layer holds and takes two optimizer steps. Needs only ``megatron.core``.
"""

from __future__ import annotations

import sys

import torch

CPU = "--cpu" in sys.argv
VOCABULARY, LENGTH = 512, 256


def main() -> None:
    """Build, describe, train two steps."""
    if CPU:  # replaces torch.cuda, so before Megatron is imported
        from megatron_fope import cpu

        cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_fope import FoPEConfig, assert_fope_active, with_fope

    torch.distributed.init_process_group("gloo" if CPU else "nccl")
    if not CPU:
        torch.cuda.set_device(torch.distributed.get_rank() % torch.cuda.device_count())
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)

    config = TransformerConfig(
        num_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=CPU,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
    )
    fope = FoPEConfig.from_profile("paper", train_length=LENGTH, gain=0.3)
    model = GPTModel(
        config,
        with_fope(get_gpt_layer_local_spec(), fope),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="none",
    ).cuda()
    print(*assert_fope_active(model), sep="\n")

    tokens = torch.randint(0, VOCABULARY, (2, LENGTH)).cuda()
    positions = torch.arange(LENGTH).expand_as(tokens).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        loss = model(tokens, positions, None, labels=tokens.roll(-1, dims=1)).mean()
        print(f"step {step}: loss {loss.item():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
