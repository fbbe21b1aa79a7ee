"""The study on a real model: its ways are accepted, and its small form runs from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_scripts import load
from launch import ROOT

from megatron_fope.arguments.flags import check_before_megatron, fope_config_from_args
from megatron_fope.arguments.parser import megatron_parser, parse
from megatron_fope.formula.geometry import Geometry

SCRIPT = ROOT / "examples" / "real_model" / "run.py"


def test_every_way_is_accepted() -> None:
    run = load("real_model/run.py")
    parser = megatron_parser("real-model")
    assert run.EXPORTED in run.WAYS and run.WAYS["rope"].converts is False
    for name in run.WAYS:
        flags = [*run._flags_of(name), "--seq-length", str(run.WINDOW), "--rotary-base", "100000"]
        args = parse(parser, [*flags, "--transformer-impl", "local"])
        if args.position_embedding_type == "fope":
            check_before_megatron(args)
            assert Geometry(fope_config_from_args(args), 64).d_out >= 20, name


def _run(out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"REAL_MODEL_SMALL": "1", "REAL_MODEL_OUT": str(out), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(SCRIPT)]
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, cwd=out.parent, timeout=900
    )


@pytest.mark.launch
def test_small_form_runs_and_goes_on(tmp_path: Path) -> None:
    """With ``REAL_MODEL_WHEEL`` on two layers of the real model, else on made-up weights."""
    out = tmp_path / "out"
    done = _run(out, REAL_MODEL_WAYS="preserving")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    ours, theirs = report["compared"]["megatron"], report["compared"]["transformers"]
    assert ours == pytest.approx(theirs, rel=2e-6)
    before, after = (report[moment]["perplexity"] for moment in ("before", "after"))
    assert [row["length"] for row in before["rope"]] == [row["length"] for row in after["preserving"]]
    assert len(report["losses"]["preserving"]) == 2 and report["written"]["text"]
    assert (out / "real_model.png").stat().st_size > 10_000

    # The last steps are lost: the others are not done again, and other settings are refused.
    model = out / "models" / "preserving" / "latest_checkpointed_iteration.txt"
    times = model.stat().st_mtime_ns
    (out / "report.json").unlink()
    (out / "steps" / "11-export.json").unlink()
    again = _run(out, REAL_MODEL_WAYS="preserving")
    assert again.returncode == 0 and model.stat().st_mtime_ns == times
    assert json.loads((out / "report.json").read_text())["written"] == report["written"]
    refused = _run(out, REAL_MODEL_ITERS="4")
    assert refused.returncode == 2 and "begun with iterations 2, not 4" in refused.stderr


def test_bad_settings(tmp_path: Path) -> None:
    for variables, text in (
        ({"REAL_MODEL_ITERS": "3"}, "REAL_MODEL_ITERS is 3; allowed: even numbers"),
        ({"REAL_MODEL_WAYS": "rope,pi"}, "REAL_MODEL_WAYS is 'pi'; allowed: rope, yarn"),
        ({"REAL_MODEL_WHEEL": str(SCRIPT)}, "has the SHA-256"),
    ):
        refused = _run(tmp_path / "out", **variables)
        assert refused.returncode == 2 and text in refused.stderr, refused.stderr
        assert refused.stderr.count("error: ") == 1
