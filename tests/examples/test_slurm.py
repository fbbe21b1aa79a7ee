"""The launch scripts and ``slurm.sh``: nonsense is refused, a job is requeued only when that helps."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from example_scripts import EXAMPLES, error, executable, fake_slurm, script

DENSE, SMALL = "pretrain/dense_8b.sh", "pretrain/gpt_60m.sh"
MOCK = {"MOCK": "1", "MASTER_ADDR": "node0"}

VARIABLES = {
    "whole number, 1 or more": "NNODES GPUS_PER_NODE TP PP CP EP ETP SEQ_LENGTH TRAIN_ITERS MICRO_BATCH_SIZE "
    "GLOBAL_BATCH_SIZE SAVE_INTERVAL ROTARY_BASE EXIT_MINUTES CUDA_DEVICE_MAX_CONNECTIONS",
    "whole number, 0 or more": "EVAL_ITERS",
    "whole number, 0 to 3": "NODE_RANK SLURM_NODEID",
    "whole number, 1 to 65535": "MASTER_PORT",
    "number, more than 0": "LR GAIN",
    "number, 0 to less than 1": "WARMUP_FRACTION",
    "1 or 0": "DRY_RUN MOCK CPU SAVE_ON_TERM",
    "rope or fope": "POSITION",
    "pretrain, or a file": "SCRIPT",
    "immediate, function-preserving or clip-only": "START",
}
"""What is allowed, and the variables of the launch scripts."""


@pytest.mark.parametrize("allowed", VARIABLES)
def test_nonsense_in_every_variable(allowed: str, here: dict[str, str]) -> None:
    for name in VARIABLES[allowed].split():
        launched = "context_extension/dense_8b.sh" if name == "START" else DENSE
        for value in ("-1", "nan", "1 2") if name != "EXIT_MINUTES" else ("-1", "0", "1.5"):
            found = error(launched, **({"DRY_RUN": "1"} | here | {name: value}))
            assert found.startswith(f"{name} is '{value}'; allowed: ") and allowed in found


@pytest.mark.parametrize("given", ["SAMPLES=0", "SAMPLES=many", "LENGTHS=-1", "LENGTHS=1k", "TASK=haystack"])
def test_nonsense_in_an_evaluation(given: str) -> None:
    """Told before the first of its commands, which takes long."""
    name, value = given.split("=")
    found = error("pretrain/evaluate.sh", CHECKPOINTS="a", MOCK="1", **{name: value})
    assert found.startswith(f"{name} is '{value}'; allowed: ")


def test_nonsense_flags_of_a_script() -> None:
    for flags in (["--train-samples", "100"], ["--train-samples=100"], ["--yaml-cfg=a"]):
        assert "is given; use --train-iters" in error(SMALL, *flags, DRY_RUN="1", **MOCK)
    for flags in (["--exit-duration-in-mins", "-5"], ["--exit-duration-in-mins=-5"]):
        assert error(SMALL, *flags, **MOCK).startswith("EXIT_MINUTES is '-5'; allowed: a whole")


def test_missing_tools(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "basename", "awk", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    assert error(SMALL, PATH=str(tmp_path), **MOCK).startswith("torchrun is not on PATH")
    (tmp_path / "awk").unlink()
    assert error(SMALL, PATH=str(tmp_path), **MOCK).startswith("awk is not on PATH")
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "a", "PATH": str(tmp_path)}
    assert error("slurm.sh", str(EXAMPLES / SMALL), **job).startswith("srun is not on PATH")
    executable(tmp_path / "srun", "exit 0")
    assert error("slurm.sh", str(EXAMPLES / SMALL), **job).startswith("scontrol is not on PATH")


QUEUED = "slurm.sh: iteration {now} of {all}; back into the queue\n"
STUCK = (
    "slurm.sh: error: the run ended where it began, at iteration {now} of {all}; not back into the queue\n"
)
JOBS = {
    # flags, iteration before, iteration after, of how many, what the job says
    "finished": ([], "", "100", "100", ""),
    "over": ([], "", "120", "100", ""),
    "not finished": ([], "", "60", "100", QUEUED),
    "goes on": ([], "60", "80", "100", QUEUED),
    "of a converted model": ([], "release", "5", "100", QUEUED),
    "another flag, finished": (["--train-iters", "4"], "", "4", "4", ""),
    "with =, finished": (["--train-iters=4"], "", "4", "4", ""),
    "with =, not finished": (["--train-iters=4"], "", "3", "4", QUEUED),
    "the last one counts": (["--train-iters=4", "--train-iters", "8"], "", "4", "8", QUEUED),
    "the last one counts, with =": (["--train-iters", "4", "--train-iters=8"], "", "4", "8", QUEUED),
    "leading zero": (["--train-iters=010"], "", "9", "010", QUEUED),
    "another folder": (["--save={folder}/other"], "", "100", "100", ""),
    "stuck": ([], "60", "60", "100", STUCK),
    "stuck at the start": ([], "0", "0", "100", STUCK),
    "went back": ([], "60", "30", "100", STUCK),
    "nothing saved": (
        [],
        "",
        "",
        "100",
        "slurm.sh: error: there is no iteration in {tracker} after the run\n",
    ),
    "damaged": ([], "", "6O", "100", "slurm.sh: error: there is no iteration in {tracker} after the run\n"),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_goes_back_into_the_queue_only_when_that_helps(name: str, tmp_path: Path) -> None:
    """With a script in place of the training that only saves."""
    flags, before, now, of, said = JOBS[name]
    flags = [flag.replace("{folder}", str(tmp_path)) for flag in flags]
    folder = tmp_path / ("other" if name == "another folder" else "out")
    folder.mkdir()
    tracker = folder / "latest_checkpointed_iteration.txt"
    if before:
        tracker.write_text(before + "\n")
    executable(
        tmp_path / "train.sh",
        "if [[ ${DRY_RUN:-0} == 1 ]]; then "
        f'printf "%q " pretrain --train-iters 100 --save "{tmp_path}/out" "$@"\n'
        f'elif [[ -n "{now}" ]]; then echo "{now}" > "{tracker}"; fi',
    )
    done = script("slurm.sh", str(tmp_path / "train.sh"), *flags, **fake_slurm(tmp_path))
    assert done.stdout + done.stderr == said.format(now=now, all=of, tracker=tracker)
    assert done.returncode == (2 if "error" in said else 0)
    assert (tmp_path / "scontrol.log").exists() == (said == QUEUED)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"SLURM_JOB_END_TIME": "soon"}, "SLURM_JOB_END_TIME is 'soon'; allowed: seconds"),
        ({"SLURM_JOB_END_TIME": "1000"}, "the job ends in -"),
        ({"DRY_RUN": "yes"}, "DRY_RUN is 'yes'; allowed: 1 or 0"),
        ({"SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set"),
    ],
)
def test_nonsense_in_a_job(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    given = MOCK | fake_slurm(tmp_path) | variables
    assert error("slurm.sh", str(EXAMPLES / SMALL), **given).startswith(message)
    assert not (tmp_path / "task").exists(), "nothing was started"


def test_mistakes_of_a_job(here: dict[str, str], tmp_path: Path) -> None:
    assert error("slurm.sh").startswith("the first argument is ''; use a launch script")
    dense = str(EXAMPLES / DENSE)
    assert error("slurm.sh", dense, **here).startswith("SLURM_JOB_ID is not set; use sbatch --nodes N")
    job = fake_slurm(tmp_path) | {"SLURM_NNODES": "4", "DATA_PATH": "/no/data"}
    done = script("slurm.sh", dense, **(here | job))
    assert done.returncode == 2 and done.stdout == "", "nothing was started"
    assert done.stderr == "dense_8b.sh: error: DATA_PATH: /no/data.bin or /no/data.idx does not exist\n"


def test_term_reaches_the_ranks_and_needs_no_pkill(tmp_path: Path) -> None:
    """With shells in place of torchrun and two ranks; torchrun itself must not be told."""
    for tool in ("bash", "basename", "cat", "dirname", "awk", "sleep", "touch"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    saves = f"trap 'touch {tmp_path}/saved$RANK; exit 0' TERM; touch {tmp_path}/ready$RANK"
    executable(tmp_path / "rank", f"{saves}; while :; do sleep 0.1; done")
    executable(tmp_path / "agent", "trap 'exit 9' TERM; for RANK in 0 1; do RANK=$RANK rank & done; wait")
    process = subprocess.Popen(
        ["bash", "-c", f"source {EXAMPLES}/common.sh; _until_told agent"], env={"PATH": str(tmp_path)}
    )
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))
