"""The study of longer contexts: its flags are Megatron's and ours, and its page has the committed numbers."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
from example_scripts import load
from launch import ROOT

from megatron_fope.arguments.flags import check_before_megatron, fope_config_from_args
from megatron_fope.arguments.parser import megatron_parser, parse
from megatron_fope.formula.geometry import Geometry

FOLDER = ROOT / "examples" / "extend"
STUDIES = ("starts", "growth")


@pytest.mark.parametrize("study", STUDIES)
def test_every_way_is_accepted(study: str) -> None:
    run = load("extend/run.py", study)
    parser = megatron_parser("extend")
    assert len(run.WAYS) == {"starts": 9, "growth": 4}[study]
    for way in run.WAYS:
        flags = [*run.MODEL, *run.TRAINING, *way.flags.split(), "--seq-length", str(run.LONG)]
        flags += ["--transformer-impl", "local"]  # as --cpu makes it
        args = parse(parser, flags)
        if args.position_embedding_type == "fope":
            check_before_megatron(args)
            Geometry(fope_config_from_args(args), 64)


def test_the_rules_differ_in_the_second_study() -> None:
    """More frequencies than outputs after the growth, as many before."""
    run = load("extend/run.py", "growth")
    parser = argparse.ArgumentParser()
    parser.add_argument("--rotary-base", type=float)
    base, _ = parser.parse_known_args(run.MODEL)
    args = argparse.Namespace(rotary_base=base.rotary_base, seq_length=run.LENGTH)
    short, long = (
        fope_config_from_args(argparse.Namespace(**vars(args) | {"seq_length": n}))
        for n in (run.LENGTH, run.LONG)
    )
    short, long = Geometry(short, 64), Geometry(long, 64)
    assert short.d_in == short.d_out and long.d_in > long.d_out > short.d_out


@pytest.mark.parametrize("study", STUDIES)
def test_the_page_has_the_numbers_of_the_report(study: str, tmp_path: Path) -> None:
    shutil.copy(FOLDER / study / "report.json", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    text = load("extend/write_up.py").write(report, tmp_path)
    assert text == (FOLDER / study / "results.md").read_text()
    assert text.strip() in (FOLDER / "README.md").read_text()
    assert all(
        (tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("loss", "recall", "perplexity")
    )
