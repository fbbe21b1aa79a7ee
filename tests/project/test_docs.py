"""What the documentation says against what is there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from launch import ROOT, torchrun
from packaging.requirements import Requirement
from test_guide import PAGES

from megatron_fope import __all__, __version__
from megatron_fope.arguments.flags import add_fope_arguments
from megatron_fope.formula.config import PROFILES, FoPEConfig

README = (ROOT / "README.md").read_text()
QUICK_START = (ROOT / "docs" / "quick-start.md").read_text()
ARGUMENTS = (ROOT / "docs" / "flags.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROWS = [line for line in ARGUMENTS.splitlines() if line.startswith("| `--fope-")]


def test_every_flag_is_in_the_argument_table() -> None:
    documented = {flag for row in ROWS for flag in re.findall(r"--fope-[a-z-]+", row.split("|")[1])}
    known = add_fope_arguments(argparse.ArgumentParser())._option_string_actions
    assert documented == {flag for flag in known if flag.startswith("--fope-")}


def show(value: object) -> str:
    """A default as the table writes it."""
    if value is None:
        return "by the floor"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def test_defaults_in_the_argument_table() -> None:
    for row in ROWS:
        names, default = row.split("|")[1:3]
        names = re.findall(r"--fope-([a-z-]+)", names)
        if len(names) != 1:
            continue
        name = names[0].replace("-", "_")
        if name not in {field.name for field in dataclasses.fields(FoPEConfig)}:  # a choice of one run
            continue
        values = [getattr(FoPEConfig.from_profile(p, train_length=512), name) for p in PROFILES]
        shown = [show(value) for value in values]
        expected = shown[0] if shown[0] == shown[1] else " / ".join(shown)
        if name not in ("profile", "train_length"):
            assert default.strip().strip("`") == expected, name


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for document in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            page = (document.parent / path) if path else document
            assert page.exists(), f"{document}: {target}"
            assert not anchor or anchor in anchors(page), f"{document}: {target}"


def test_the_demo_table_is_the_committed_report() -> None:
    """No number in the README or the quick start that the committed run did not produce."""
    report = json.loads((ROOT / "examples" / "demo" / "report.json").read_text())
    rope, fope = (report["checkpoints"][name]["results"] for name in ("RoPE", "FoPE"))
    expected = [
        [str(a["length"]), f"{a['perplexity']:.2f}", f"{b['perplexity']:.2f}"]
        for a, b in zip(rope, fope, strict=True)
    ]
    for page, shown in ((QUICK_START, expected), (README, expected[1::2])):
        table = page.split("<!-- demo-table -->")[1].split("##")[0]
        rows = [re.findall(r"[\d.]+", line) for line in table.splitlines() if re.match(r"\| *\d", line)]
        assert rows == shown
        assert report["run"]["commit"] in table and report["run"]["command"] in table


def test_the_readme_is_one_screen() -> None:
    assert len(README.splitlines()) <= 90 and len(README.split()) <= 650


def test_versions_agree() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names() -> None:
    """The public surface, on purpose written out: changing it is a decision."""
    assert set(__all__) == {
        "FoPEConfig", "FoPESelfAttention", "FourierEmbedding", "LayerReport", "UserError", "__version__",
        "add_fope_arguments", "assert_fope_active", "describe", "fope_config_from_args", "is_registered",
        "register", "unregister", "with_fope",
    }  # fmt: skip


def test_supported_megatron_range_is_stated_once() -> None:
    from megatron_fope.compat import SUPPORTED_MEGATRON

    (stated,) = (r.specifier for r in map(Requirement, PROJECT["dependencies"]) if r.name == "megatron-core")
    assert set(str(stated).split(",")) == set(str(SUPPORTED_MEGATRON).split(","))


def set_up(**variables: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up script."""
    command = ["bash", str(ROOT / ".ci" / "setup-env")]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def test_set_up_refuses_an_interpreter_that_does_not_fit(tmp_path: Path) -> None:
    done = set_up(PYTHON="/no/such/python", VENV=str(tmp_path / "venv"))
    assert done.returncode == 2
    assert (
        done.stderr == "setup: error: PYTHON is '/no/such/python'; allowed: a Python 3.12 or 3.13 with venv\n"
    )
    assert not (tmp_path / "venv").exists()


def test_set_up_leaves_what_it_did_not_make(tmp_path: Path) -> None:
    """A folder with files, an environment without our packages, and a complete one."""
    (tmp_path / "files" / "thesis").mkdir(parents=True)
    done = set_up(VENV=str(tmp_path / "files"))
    assert done.returncode == 2 and done.stderr.endswith("which is no Python environment; use a new folder\n")
    assert (tmp_path / "files" / "thesis").exists()

    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    done = set_up(VENV=str(bare))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "which lacks: megatron_fope pytest xdist; there: pip install -e '.[dev]'" in done.stderr
    (site_packages,) = bare.glob("lib/python*/site-packages")
    for name in ("megatron_fope", "pytest", "xdist"):
        (site_packages / f"{name}.py").touch()
    done = set_up(VENV=str(bare))
    assert done.returncode == 0 and "as it is" in done.stdout, done.stderr
    assert (site_packages / "xdist.py").exists()


@pytest.mark.launch
def test_layer_spec_example() -> None:
    done = torchrun(1, [str(ROOT / "examples" / "layer_spec.py"), "--cpu"])
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("FoPESelfAttention, sin_coef [2, 7, 7]") == 2
    first, second = (float(x) for x in re.findall(r"step \d: loss ([\d.]+)", done.stdout))
    assert second < first


def test_examples_are_importable_python() -> None:
    for script in (ROOT / "examples").rglob("*.py"):
        compile(script.read_text(), str(script), "exec")


def test_constraints_fit_what_the_project_allows() -> None:
    """Every requirement of ours is in the file; torch, which a platform may cap, with the whole range."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    kept = {r.name: r for r in map(Requirement, (line for line in lines if not line.startswith("#")))}
    extras = PROJECT["optional-dependencies"]
    (dev,) = map(Requirement, extras["dev"])
    assert dev.name == "megatron-fope" and dev.extras == extras.keys() - {"dev", "te"}
    for text in PROJECT["dependencies"] + [text for extra in dev.extras for text in extras[extra]]:
        ours = Requirement(text)
        if ours.name == "torch":
            assert kept["torch"].specifier == ours.specifier
            continue
        (pin,) = kept[ours.name].specifier
        assert pin.operator == "==" and ours.specifier.contains(pin.version), text


WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")
}


def test_workflows_make_what_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = set()
    for workflow in WORKFLOWS.values():
        for job in workflow["jobs"].values():
            (command,) = (step["run"] for step in job["steps"] if "run" in step)
            make, *words = command.replace("${{ matrix.target }}", " ".join(_matrix(job, "target"))).split()
            assert make == "make"
            asked |= {word for word in words if "=" not in word}
    beside = {path.stem for path in (ROOT / ".ci" / "extra").glob("*.txt")}
    assert asked == {"docs", "lint", "test", "test-fast", "test-newest"} | {f"test-{name}" for name in beside}
    assert asked <= targets


def test_workflows_cover_the_supported_versions() -> None:
    from megatron_fope.compat import SUPPORTED_MEGATRON

    fast = WORKFLOWS["test"]["jobs"]["test-fast"]
    assert {f"Programming Language :: Python :: {version}" for version in _matrix(fast, "python")} == {
        text for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.", text)
    }
    (others,) = re.findall(r'^other_releases="(.+?)"', (ROOT / ".ci" / "setup-env").read_text(), re.MULTILINE)
    pins = (ROOT / ".ci" / "constraints.txt").read_text()
    releases = [*others.split(), *re.findall(r"^megatron-core==(.+)$", pins, re.MULTILINE)]
    assert _matrix(fast, "megatron") == [name for name in releases if name in SUPPORTED_MEGATRON]


def _matrix(job: dict, name: str) -> list[str]:
    return job.get("strategy", {}).get("matrix", {}).get(name, [])
