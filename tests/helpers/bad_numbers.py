"""Numbers that no run can mean, for every flag that makes FoPE's numbers: ``{flags: start of the line}``."""

from __future__ import annotations

_WHOLE = "whole numbers"
_FINITE = "finite numbers"

_FOPE_WHOLE = ("train-length", "seed", "anneal-iters", "num-inv-freq", "basis-dim", "original-length")
_FOPE_FLOAT = (
    *("gain", "floor-ratio", "scaling-factor", "attention-scaling"),
    *("yarn-beta-fast", "yarn-beta-slow", "yarn-extrapolation-factor"),
)
_FROM_ONE = (
    *("seq-length", "num-layers", "hidden-size", "num-attention-heads", "num-query-groups"),
    *("max-position-embeddings", "micro-batch-size", "global-batch-size", "tensor-model-parallel-size"),
    *("pipeline-model-parallel-size", "context-parallel-size", "expert-model-parallel-size", "vocab-size"),
    *("rotary-seq-len-interpolation-factor", "qk-pos-emb-head-dim"),
)
_YARN = "--fope-scaling yarn --fope-scaling-factor 4 --fope-original-length 32"
_TOO_LARGE = f"1{'0' * 22}"

NUMBERS = {
    **{
        f"--fope-{name}={value}": f"--fope-{name} is {value!r}; allowed: {_WHOLE}"
        for name in _FOPE_WHOLE
        for value in ("nan", "inf", "1.5", "x", "")
    },
    **{
        f"--fope-{name}={_TOO_LARGE}": f"--fope-{name} is {_TOO_LARGE}; allowed: {_WHOLE}"
        for name in _FOPE_WHOLE
    },
    **{
        f"--fope-{name}={value}": f"--fope-{name} is {value}; allowed: {_FINITE}"
        for name in _FOPE_FLOAT
        for value in ("nan", "-inf", "1e400")
    },
    **{
        f"--fope-{name}={value}": f"--fope-{name} is {value!r}; allowed: {_FINITE}"
        for name in _FOPE_FLOAT
        for value in ("1,5", "")
    },
    **{
        f"--{name}={value}": f"--{name} is {value}; allowed: 1 or more"
        for name in _FROM_ONE
        for value in ("0", "-1")
    },
    **{
        f"--{name}={value}": f"--{name} is {value!r}; allowed: {_WHOLE}"
        for name in ("seq-length", "rotary-base", "seed", "num-layers", "kv-channels")
        for value in ("inf", "nan", "1.5", "two")
    },
    **{
        f"--{name}={_TOO_LARGE}": f"--{name} is {_TOO_LARGE}; allowed: less than 2^63"
        for name in ("seq-length", "rotary-base", "num-layers", "vocab-size", "global-batch-size")
    },
    **{
        f"--seed {value}": f"--seed is {value}; allowed: 1 to 2^32 - 1" for value in ("-1", "0", "4294967296")
    },
    **{
        f"--{name} {value}": f"--{name} is {value}; allowed: {_FINITE}"
        for name in ("lr", "init-method-std", "rope-scaling-factor", "weight-decay", "clip-grad")
        for value in ("nan", "inf")
    },
    "--rotary-base 0": "--rotary-base is 0; allowed: 1 or more",
    "--rotary-base -10000": "--rotary-base is -10000; allowed: 1 or more",
    "--fope-gain 1e39": "--fope-gain is 1e+39; allowed: finite numbers that float32 can hold",
    "--fope-floor-ratio -0.5": "--fope-floor-ratio is -0.5; allowed: 0 or more",
    "--fope-floor-ratio 1e38": "--fope-train-length is 64: no frequency completes 1e+38 cycle(s)",
    "--fope-basis-dim 1000000000000": "--fope-basis-dim is 1000000000000; allowed: even numbers",
    "--fope-basis-dim -2": "--fope-basis-dim is -2; allowed: even numbers from 0 to 65536",
    "--kv-channels 1000000000000": "--kv-channels (head dimension) is 1000000000000; FoPE rotates",
    "--fope-seed 9223372036854775808": "--fope-seed is 9223372036854775808; allowed: whole numbers",
    "--fope-anneal-iters -1": "--fope-anneal-iters is -1",
    "--fope-scaling-factor 4": "--fope-scaling-factor is 4.0, which --fope-scaling none does not read; use",
    "--fope-original-length 32": "--fope-original-length is 32, which --fope-scaling none does not read; use",
    "--fope-yarn-beta-fast 16": "--fope-yarn-beta-fast is 16.0, which --fope-scaling none does not read; use",
    "--fope-scaling linear --fope-scaling-factor 2 --fope-original-length 32": "--fope-original-length is "
    "32, which --fope-scaling linear does not read; use it with pi or yarn or llama3",
    "--fope-scaling pi --fope-original-length -1": "--fope-original-length is -1; allowed",
    f"{_YARN} --fope-yarn-beta-slow 0": "--fope-yarn-beta-slow is 0.0; allowed: greater than 0",
    f"{_YARN} --fope-yarn-beta-slow -1": "--fope-yarn-beta-slow is -1.0; allowed: greater than 0",
    f"{_YARN} --fope-yarn-beta-fast 0.5": "--fope-yarn-beta-fast is 0.5; allowed: at least the 1",
    f"{_YARN} --fope-yarn-extrapolation-factor 2": "--fope-yarn-extrapolation-factor is 2.0; allowed: ",
    f"{_YARN} --fope-scaling-factor 0": "--fope-scaling-factor is 0.0; allowed: at least 1",
}

MEGATRON = {
    "--no-such-flag": "unrecognized arguments: --no-such-flag; use those that --help lists",
    "--fope-gian 0.3": "unrecognized arguments: --fope-gian 0.3; use",
    "--fope-train 32": "unrecognized arguments: --fope-train 32; use",
    "--fope-gain": "--fope-gain requires one value",
    "--fope-clip=1": "--fope-clip/--no-fope-clip takes no value, but '1' is given",
    "--num-layers": "--num-layers requires one value",
    "--position-embedding-type fourier": "--position-embedding-type is 'fourier'; allowed: ",
    "--position-embedding-type FOPE": "--position-embedding-type is 'FOPE'; allowed: ",
    "--max-position-embeddings 32": "Megatron refuses the arguments (",
    "--hidden-size 63 --kv-channels 16 --num-attention-heads 4 --sequence-parallel --fp16 --bf16": "Megatron",
    "--expert-model-parallel-size 3": "Megatron refuses the arguments (",
    "--lr-decay-style quadratic": "--lr-decay-style is 'quadratic'; allowed: ",
}
"""What Megatron's own parser and validation refuse."""
