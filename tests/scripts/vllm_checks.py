"""vLLM's numbers for exported models, beside Megatron's; for ``tests/serving/test_vllm.py``.

``python vllm_checks.py CASES RANKS DTYPE OUT`` reads a JSON object ``{name: {"folder", "reference"}}``: the
folder of an export and a file of ``torch.save`` with ``[(prompt, logits, generated), ...]``. It writes
``{name: result}`` to the file ``OUT``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def coefficients(model: Any) -> dict[str, tuple[str, list[int], float]]:
    """Type, shape and sum of every tensor of coefficients on this rank."""
    tensors = list(model.named_parameters()) + list(model.named_buffers())
    return {
        name: (str(value.dtype), list(value.shape), value.double().sum().item())
        for name, value in tensors
        if name.endswith("_coef")
    }


def measure(folder: str, reference: str, ranks: int, dtype: str) -> dict[str, Any]:
    """Differences of the prompts' log-probabilities, and whether the same tokens follow."""
    import torch
    import vllm

    cases = torch.load(reference)
    model = vllm.LLM(
        model=folder,
        skip_tokenizer_init=True,
        trust_remote_code=True,
        dtype=dtype,
        enforce_eager=True,
        tensor_parallel_size=ranks,
        max_model_len=2 * max(len(prompt) for prompt, _, _ in cases),
        gpu_memory_utilization=0.2,
    )
    options = vllm.SamplingParams(
        max_tokens=len(cases[0][2]), temperature=0, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    outputs = model.generate([{"prompt_token_ids": prompt.tolist()} for prompt, _, _ in cases], options)
    differences, same = [], []
    for (prompt, logits, generated), output in zip(cases, outputs, strict=True):
        pairs = list(zip(prompt.tolist(), output.prompt_logprobs, strict=True))[1:]
        found = [by_token[token].logprob for token, by_token in pairs]
        expected = logits.log_softmax(-1)[: len(prompt) - 1].gather(1, prompt[1:, None])[:, 0]
        differences.append((torch.tensor(found) - expected).abs())
        same.append(list(output.outputs[0].token_ids) == generated.tolist())
    all_differences = torch.cat(differences)
    return {
        "largest": all_differences.max().item(),
        "mean": all_differences.mean().item(),
        "same text": same,
        "coefficients": model.apply_model(coefficients),
    }


def main() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    ranks, dtype = int(sys.argv[2]), sys.argv[3]
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, case in cases.items():
        results[name] = measure(case["folder"], case["reference"], ranks, dtype)
        cleanup_dist_env_and_memory()
    Path(sys.argv[4]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
