"""The model file that travels with exported weights: every family, newest and oldest transformers."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT
from ports import free_port

MODELING = ROOT / "megatron_fope" / "tools" / "huggingface" / "modeling_fope.py"
SCRIPTS = [ROOT / "tests" / "scripts" / name for name in ("modeling_checks.py", "modeling_parallel.py")]
CHECKS = [
    name for path in SCRIPTS for name in re.findall(r"^def (check_\w+)", path.read_text(), re.MULTILINE)
]
FAMILIES = 5
OLDEST = "5.1.0"
"""The oldest transformers that pyproject.toml allows."""


@pytest.fixture(scope="module", params=["installed", OLDEST])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str | None]:
    """Every check of every family with one release of transformers."""
    made = tmp_path_factory.mktemp("models")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if request.param == OLDEST:
        folder = Path(sys.prefix) / "transformers" / OLDEST
        assert (folder / "transformers").is_dir(), f"transformers {OLDEST} is not in {folder}; use make setup"
        paths.insert(0, str(folder))
    done = subprocess.run(
        [sys.executable, SCRIPTS[0], made, str(free_port())],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(made / "modules"), "PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    installed = importlib.metadata.version("transformers")
    assert answer["transformers"] == (OLDEST if request.param == OLDEST else installed)
    print(f"largest difference of a logit with transformers {answer['transformers']}: ", end="")
    print(f"{answer['largest difference']:.1e} of the largest")
    return answer["results"]


@pytest.mark.launch
@pytest.mark.parametrize("check", CHECKS)
def test_model_file(check: str, results: dict[str, str | None]) -> None:
    outcomes = {name: result for name, result in results.items() if name.startswith(f"{check}[")}
    assert len(outcomes) == FAMILIES
    failed = {name: result for name, result in outcomes.items() if result is not None}
    assert not failed, "\n".join(f"{name}\n{result}" for name, result in failed.items())


def test_it_travels_alone() -> None:
    """It imports PyTorch, transformers and Python's own modules."""
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(MODELING.read_text()))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or "."] if isinstance(node, ast.ImportFrom)
            else []
        )
    }  # fmt: skip
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


def attention_calls(forward: ast.FunctionDef) -> list[ast.Call]:
    """Calls of what ``forward`` looks up in ``ALL_ATTENTION_FUNCTIONS``, as vLLM finds them.

    vLLM 0.32.0, ``vllm/model_executor/models/transformers/fusers/attention.py``, ``interface_call``: a local
    name is assigned from ``ALL_ATTENTION_FUNCTIONS.<method>(...)`` or ``ALL_ATTENTION_FUNCTIONS[...]``, with
    nothing around it; a class with exactly one call of such names gets vLLM's attention, others are refused.
    """

    def is_lookup(value: ast.expr | None) -> bool:
        value = value.func if isinstance(value, ast.Call) else value
        if not isinstance(value, ast.Attribute | ast.Subscript):
            return False
        return isinstance(value.value, ast.Name) and value.value.id == "ALL_ATTENTION_FUNCTIONS"

    names = set()
    for node in ast.walk(forward):
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_lookup(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


def attention_forwards(source: str) -> list[ast.FunctionDef]:
    """``forward`` of every class of attention in the file."""
    return [
        function
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Attention")
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "forward"
    ]


def test_vllm_finds_the_attention_and_the_projections() -> None:
    """By its source, without vLLM; ``make test-vllm`` runs it."""
    (forward,) = attention_forwards(MODELING.read_text())  # all families inherit it
    (call,) = attention_calls(forward)
    assert [ast.unparse(keyword) for keyword in call.keywords if keyword.arg == "scaling"] == [
        "scaling=self.scaling"
    ]  # vLLM takes the scale from this expression
    # ``fusers/qkv.py`` there: three projections of the same parameter, each called once, in this order.
    projections = [
        ast.unparse(node)
        for node in ast.walk(forward)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("self.q_", "self.k_", "self.v_"))
        and ast.unparse(node.func).endswith("_proj")
    ]  # fmt: skip
    assert projections == [f"self.{name}_proj(hidden_states)" for name in "qkv"]
    assigned = {name.id for name in ast.walk(forward) if isinstance(name, ast.Name) and is_stored(name)}
    assert "hidden_states" not in assigned


def is_stored(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


@pytest.mark.parametrize(
    "before,after",
    [
        ("= ALL_ATTENTION_FUNCTIONS.get_interface(", "= attention_functions().get_interface("),
        ("= ALL_ATTENTION_FUNCTIONS.get_interface(", "= eager or ALL_ATTENTION_FUNCTIONS.get_interface("),
        ("output, weights = attention_interface(", "output, weights = (attention_interface or None)("),
        ("return self.o_proj(", "attention_interface(self)\n        return self.o_proj("),
    ],
)
def test_vllm_finds_no_attention_in_other_words(before: str, after: str) -> None:
    source = MODELING.read_text()
    assert source.count(before) == 1
    (forward,) = attention_forwards(source.replace(before, after))
    assert len(attention_calls(forward)) != 1


def test_transformers_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys; from megatron_fope.tools.huggingface import register; "
        "assert 'transformers' not in sys.modules; register(); register(); "
        "from transformers import AutoConfig; print(AutoConfig.for_model('fope_qwen3_moe').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fope_qwen3_moe", done.stderr
