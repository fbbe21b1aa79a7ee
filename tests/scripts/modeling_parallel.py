"""Checks of ``modeling_fope.py``: tensor parallelism of transformers and of serving engines.

``python modeling_parallel.py FOLDER`` is one of two ranks, which :func:`ask_two_ranks` starts.
"""

from __future__ import annotations

import ast
import copy
import inspect
import os
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from modeling_cases import FAMILIES, HEAD_DIM, HEADS, KV_HEADS, Case, coefficients
from torch import Tensor, fx, nn
from transformers import AutoConfig, AutoModel


class Sharded(nn.Module):
    """A rank's part of a projection, as the linear layers of serving engines: they know their rank, or, in
    SGLang from 0.5.23, their group."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int, size: int, group: Any = None) -> None:
        super().__init__()
        self.weight, self.bias, self.tp_rank, self.tp_size = weight, bias, rank, size
        self.tp_group = group

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def shard(attention: Any, rank: int, size: int, *, known_by: str) -> None:
    """Keep a rank's heads; each rank has one KV head at least, neighbours copies of it where they are few."""
    kept_kv = max(KV_HEADS // size, 1)
    first_kv = rank * KV_HEADS // size
    heads = HEADS // size
    ranges = {"q_proj": (rank * heads, heads), "k_proj": (first_kv, kept_kv), "v_proj": (first_kv, kept_kv)}
    for name, (start, count) in ranges.items():
        linear = getattr(attention, name)
        rows = slice(start * HEAD_DIM, (start + count) * HEAD_DIM)
        bias = None if linear.bias is None else linear.bias[rows]
        told = (rank, size) if known_by == name else (0, 1)
        group = SimpleNamespace(rank_in_group=rank, world_size=size) if known_by == "tp_group" else None
        setattr(attention, name, Sharded(linear.weight[rows], bias, *told, group))
    columns = slice(rank * heads * HEAD_DIM, (rank + 1) * heads * HEAD_DIM)
    told = (rank, size) if known_by == "o_proj" else (0, 1)
    attention.o_proj = Sharded(attention.o_proj.weight[:, columns], None, *told)
    attention.num_key_value_groups = heads // kept_kv


def attention_inputs(model: Any) -> dict[str, Any]:
    x = torch.rand(1, 20, 64, generator=torch.Generator().manual_seed(2))
    return {
        "hidden_states": x,
        "position_embeddings": model.model.rotary_emb(x, torch.arange(20)[None]),
        "attention_mask": None,
    }


def check_ranks_of_engines_take_their_heads(case: Case) -> None:
    """The sum over ranks is the layer; 4 ranks share 2 KV heads. What nobody knows is refused."""
    with torch.no_grad():
        model = case.load()
        inputs = attention_inputs(model)
        expected = model.model.layers[1].self_attn(**inputs)[0]
        for size in (2, 4):
            for known_by in ("k_proj", "o_proj", "qkv_proj", "tp_group"):
                total = torch.zeros_like(expected)
                for rank in range(size):
                    attention = copy.deepcopy(model.model.layers[1].self_attn)
                    shard(attention, rank, size, known_by=known_by)
                    if known_by == "qkv_proj":  # merged: the others are gone in vLLM
                        attention.qkv_proj = Sharded(torch.empty(0), None, rank, size)
                    total += attention(**inputs)[0]
                case.assert_close(total, expected)
        attention = copy.deepcopy(model.model.layers[1].self_attn)
        shard(attention, 0, 2, known_by="")
        if case.fope["num_heads"] > 1:
            try:
                attention(**inputs)
            except ValueError as error:
                assert "in a way that is not known" in str(error)
            else:
                raise AssertionError("a part of the heads without a rank was accepted")


def check_attention_of_engines_returns_no_batch(case: Case) -> None:
    """``[tokens, heads * head_dim]``."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS

    def without_batch(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return functions["sdpa"](*args, **kwargs)[0].flatten(0, 1).flatten(1), None

    functions.register("without batch", without_batch)
    with torch.no_grad():
        model = case.load(attn_implementation="sdpa")
        inputs = attention_inputs(model)
        expected = model.model.layers[1].self_attn(**inputs)[0]
        attention = copy.deepcopy(model.model.layers[1].self_attn)
        attention.config._attn_implementation = "without batch"
        case.assert_close(attention(**inputs)[0], expected)


def check_learnable_coefficients_are_buffers_in_engines(case: Case) -> None:
    for engine in ("vllm", "sglang"):
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register(engine, lambda *_, **__: None)
        config = AutoConfig.from_pretrained(case.folder, trust_remote_code=True)
        config._attn_implementation = engine
        model = AutoModel.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
        assert not [name for name, _ in model.named_parameters() if name.endswith("_coef")]
        assert {value.dtype for value in coefficients(model).values()} == {torch.float32}


def check_two_ranks(case: Case) -> None:
    """``tp_plan="auto"``: same logits on each rank, also in training; learnable coefficients are refused."""
    if case.name not in TWO_RANKS:
        raise AssertionError(f"no answer of two ranks:\n{TWO_RANKS['error'][-3000:]}")
    found = TWO_RANKS[case.name]
    assert found.get("error") is None, found["error"]
    for name in ("logits", "trained"):
        for rank in found[name]:
            case.assert_close(rank, case.expected)


TWO_RANKS: dict[str, Any] = {}


def ask_two_ranks(cases: list[Case], folder: Path, port: str) -> None:
    """Start this script twice and collect what it leaves."""
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    TWO_RANKS["error"] = "\n".join(errors)
    for case in cases:
        files = [folder / f"{case.name}.{rank}.pt" for rank in range(2)]
        if all(file.exists() for file in files):
            answers = [torch.load(file) for file in files]
            TWO_RANKS[case.name] = {
                "error": "\n".join(answer["error"] for answer in answers if answer["error"]) or None,
                "logits": [answer.get("logits") for answer in answers],
                "trained": [answer.get("trained") for answer in answers],
            }


def rank_main(folder: Path) -> None:
    """One of two ranks: every family, loaded with ``tp_plan="auto"``."""
    torch.set_num_threads(1)
    for name in FAMILIES:
        case, answer = Case(name, folder / name / "fope"), {"error": None}
        try:
            model = case.load(tp_plan="auto")
            with torch.no_grad():
                answer["logits"] = model(case.tokens).logits
            assert model.model.layers[0].self_attn.k_proj(torch.zeros(1, 1, 64)).size(-1) == HEAD_DIM
            if case.fope["learnable"]:
                try:
                    model.train()(case.tokens)
                except NotImplementedError as error:
                    assert "learnable coefficients are not trained with tensor parallelism" in str(error)
                else:
                    raise AssertionError("learnable coefficients were accepted")
                for coefficient, value in model.named_parameters():
                    if coefficient.endswith("_coef"):
                        value.requires_grad_(False)
            out = model.train()(case.tokens, labels=case.tokens)
            out.loss.backward()
            answer["trained"] = out.logits.detach()
        except Exception:
            answer["error"] = traceback.format_exc()
        torch.save(answer, folder / f"{name}.{os.environ['RANK']}.pt")


# What vLLM finds --------------------------------------------------------------------------------------


class EngineTracer(fx.Tracer):
    """As vLLM traces an attention layer: every child is a leaf, ``**kwargs`` is empty."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def iter(self, obj: fx.Proxy) -> Any:
        if obj.node.op == "placeholder" and str(obj.node.target).lstrip("*") == "kwargs":
            return iter(())
        return super().iter(obj)


def check_vllm_finds_projections_and_attention_function(case: Case) -> None:
    """Restated from vLLM's Transformers back end: it reads the source and traces what can be traced."""
    attention = case.load().model.layers[0].self_attn
    forward = inspect.unwrap(type(attention).forward)
    assert not forward.__code__.co_freevars
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    (function,) = tree.body
    names = {
        target.id for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
        for target in node.targets
    }  # fmt: skip
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if isinstance(node.func, ast.Name) and node.func.id in names)
    (scaling,) = (keyword.value for keyword in call.keywords if keyword.arg == "scaling")
    assert ast.unparse(scaling) == "self.scaling" and isinstance(attention.scaling, float)
    assert "scaling" not in vars(type(attention)) and isinstance(attention.layer_idx, int)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert sum(isinstance(node, ast.Attribute) and node.attr == name for node in ast.walk(tree)) == 1
        (projection,) = (node for node in calls if ast.unparse(node.func) == f"self.{name}")
        assert [ast.unparse(argument) for argument in projection.args] == ["hidden_states"]
        assert not projection.keywords
        assert any(projection in list(ast.walk(statement)) for statement in function.body)
    tracer = EngineTracer()
    try:
        tracer.trace(attention, concrete_args={"past_key_values": None})
    except Exception as error:
        print("traced in part:", error, file=sys.stderr)
    found = [
        node.target
        for node in tracer.graph.nodes
        if node.op == "call_module" and isinstance(attention.get_submodule(node.target), nn.Linear)
        and node.args and getattr(node.args[0], "op", None) == "placeholder"
    ]  # fmt: skip
    assert found == ["q_proj", "k_proj", "v_proj"]
    parameters = inspect.signature(type(case.model.model).forward).parameters
    assert {"input_ids", "inputs_embeds", "position_ids"} <= parameters.keys()  # marked as dynamic by name


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
