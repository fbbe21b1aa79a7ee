"""The patches of Megatron-LM: they fit, they train, and ``apply.sh`` does all or nothing.

Wheels come from the folders that ``.ci/setup-env`` makes, else from ``pip download`` into ``MEGATRON_WHEELS``
(a temporary folder where it is not set).
``MEGATRON_LM=/path/to/Megatron-LM`` adds a checkout, which alone has Megatron-LM's scripts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from forks import Launcher
from launch import ROOT, TINY_MODEL, losses, prepared_release, torchrun
from trainer import TP2

from megatron_fope.compat import SUPPORTED_CHECKOUTS

PATCHES = ROOT / "patches"
SCRIPTS = ROOT / "tests" / "scripts"
RELEASES = ("0.17.1", "0.18.2", "0.19.0")
"""The wheels of the releases that the patches were made against; main has none."""
INSTALLED = importlib.metadata.version("megatron-core")
CHECKOUT = os.environ.get("MEGATRON_LM", "")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM does not name a Megatron-LM checkout")

ARGUMENTS = "megatron/training/arguments.py"
VERSION = "megatron/core/package_info.py"
FOPE = ("--position-embedding-type", "fope", "--fope-gain", "0.6")
ROPE = ("--position-embedding-type", "rope")


def apply(*words: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``apply.sh``; its output, at most one line, is in ``stdout`` or ``stderr``."""
    done = subprocess.run(
        [str(PATCHES / "apply.sh"), *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert len((done.stdout + done.stderr).splitlines()) == 1, done.stdout + done.stderr
    return done


def refused(*words: str | Path) -> str:
    """The one line with which ``apply.sh`` refuses."""
    done = apply(*words)
    assert done.returncode == 2 and done.stderr.startswith("apply.sh: error: ") and not done.stdout
    return done.stderr.removeprefix("apply.sh: error: ")


def said(*words: str | Path) -> str:
    """The one line that ``apply.sh`` prints when all is well."""
    done = apply(*words)
    assert done.returncode == 0 and done.stdout.startswith("apply.sh: ")
    return done.stdout.removeprefix("apply.sh: ")


def wheel(release: str, folder: Path) -> Path:
    """The folder with ``megatron`` of a wheel."""
    if release == INSTALLED:
        return Path(importlib.util.find_spec("megatron.core").origin).parents[2]
    prepared = prepared_release(release)
    if (prepared / ARGUMENTS).is_file():
        return prepared
    kept = Path(os.environ.get("MEGATRON_WHEELS", folder))
    if not list(kept.glob(f"megatron_core-{release}-*.whl")):
        command = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(kept)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command, f"megatron-core=={release}"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"the wheel of Megatron-Core {release}: {done.stderr.strip()[-200:]}"
    (file,) = kept.glob(f"megatron_core-{release}-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / release)
    return folder / release


def copy_of(source: Path, target: Path, *files: str) -> Path:
    """Copy two files, or what a tree needs to train."""
    if files:
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, target / file)
        return target
    if not (source / "pretrain_gpt.py").is_file():  # next to a wheel's folder there are other packages
        shutil.copytree(source / "megatron", target / "megatron")
        return target
    unneeded = shutil.ignore_patterns(".git", "tests", "docs", "images")
    shutil.copytree(source, target, ignore=unneeded, dirs_exist_ok=True)
    return target


def made_against(patch: Path) -> str:
    """The git hash of ``arguments.py`` that a patch was made from."""
    return re.search(r"^index ([0-9a-f]{40})\.\.", patch.read_text(), re.MULTILINE).group(1)


def git_hash(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The two files of the installed Megatron that ``apply.sh`` looks at."""
    return copy_of(wheel(INSTALLED, tmp_path), tmp_path / "tree", ARGUMENTS, VERSION)


@pytest.mark.parametrize(
    "patch", sorted((PATCHES / "megatron-lm").glob("*.patch")), ids=lambda path: path.stem
)
def test_header(patch: Path) -> None:
    """Reason, commit and drop condition in each; the table of the README names the same commit."""
    header = patch.read_text().partition("diff --git")[0]
    commit = re.search(
        rf"^Made against: NVIDIA/Megatron-LM {patch.stem}, commit ([0-9a-f]{{40}})$", header, re.M
    )
    assert "\nReason: " in header and "\nDrop when: " in header
    (row,) = [
        line for line in (PATCHES / "README.md").read_text().splitlines() if f"[`{patch.name}`]" in line
    ]
    assert commit.group(1)[:12] in row


def test_every_supported_release_has_a_patch() -> None:
    """All but 0.16; a new release fails here until it has one."""
    cases = re.findall(r"^0\.(\d+)\) name=(\S+) ;;$", (PATCHES / "apply.sh").read_text(), re.MULTILINE)
    assert [int(minor) for minor, _ in cases] == [m for m in range(17, 99) if f"0.{m}" in SUPPORTED_CHECKOUTS]
    files = {path.stem for path in (PATCHES / "megatron-lm").iterdir()}
    assert {name for _, name in cases} == files == {"main", *(f"core_v{release}" for release in RELEASES)}


@pytest.mark.parametrize("release", RELEASES)
def test_fits_the_release(release: str, tmp_path: Path) -> None:
    """The wheel has the very file that the patch was made from, and the patch takes."""
    tree = copy_of(wheel(release, tmp_path), tmp_path / "tree", ARGUMENTS, VERSION)
    patch = PATCHES / "megatron-lm" / f"core_v{release}.patch"
    assert git_hash(tree / ARGUMENTS) == made_against(patch)
    assert f"{patch.name} is applied" in said(tree)
    compile((tree / ARGUMENTS).read_text(), ARGUMENTS, "exec")


def test_twice_and_back(tree: Path) -> None:
    before = (tree / ARGUMENTS).read_bytes()
    assert "fits" in said("--check", tree) and "not applied" in said("--reverse", tree)
    assert (tree / ARGUMENTS).read_bytes() == before
    assert "is applied" in said(tree)
    patched = (tree / ARGUMENTS).read_bytes()
    assert patched != before
    assert "already applied" in said(tree) and "is applied" in said("--check", tree)
    assert (tree / ARGUMENTS).read_bytes() == patched
    assert "taken out" in said("--reverse", tree)
    assert (tree / ARGUMENTS).read_bytes() == before


def test_inside_another_repository(tree: Path) -> None:
    """There ``git apply`` alone skips the patch and reports success."""
    subprocess.run(["git", "init", "--quiet", str(tree.parent)], check=True)
    before = (tree / ARGUMENTS).read_bytes()
    assert apply(tree.name, folder=tree.parent).returncode == 0
    assert (tree / ARGUMENTS).read_bytes() != before
    assert "already applied" in said(tree)


def test_wrong_trees(tree: Path) -> None:
    arguments, version = tree / ARGUMENTS, tree / VERSION
    original, release = arguments.read_text(), version.read_text()

    version.write_text(re.sub(r"MINOR = \d+", "MINOR = 16", release))
    assert "is Megatron-Core 0.16; allowed: 0.17, 0.18, 0.19, 0.20" in refused(tree)
    version.write_text(release)

    # The first place fits and the second does not: neither may change.
    changed = original.replace("    # Relative position embeddings arguments\n", "")
    assert changed != original
    arguments.write_text(changed)
    line = refused(tree)
    assert "does not fit" in line and "nothing was changed" in line
    assert arguments.read_text() == changed

    arguments.unlink()
    assert f"has no {ARGUMENTS}; use a Megatron-LM checkout" in refused(tree)
    assert "has no megatron/core/package_info.py" in refused(ROOT)
    assert "is no folder" in refused(tree / "missing")
    assert "0 folders are given" in refused()
    assert "2 folders are given" in refused("--undo", tree)


def patched_copy(source: Path, target: Path) -> Path:
    tree = copy_of(source, target)
    assert "is applied" in said(tree)
    return tree


def environment(*folders: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT]))}


@pytest.fixture(scope="module")
def installed_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched copy of the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    return patched_copy(wheel(INSTALLED, folder), folder / "tree")


@pytest.fixture(scope="module")
def unpatched(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses on the installed wheel: RoPE, and FoPE by the launcher."""
    folder, found = tmp_path_factory.mktemp("unpatched"), {}
    for name, flags in (("rope", ROPE), ("fope", FOPE)):
        found[name] = losses(launcher.output(1, ["--cpu", "pretrain", *TINY_MODEL, *flags], folder / name))
    return found


@pytest.mark.launch
@pytest.mark.parametrize("release", [*RELEASES[:2], "installed"])
def test_patched_wheel_trains(
    release: str, installed_tree: Path, unpatched: dict[str, list[float]], tmp_path: Path
) -> None:
    tree = (
        installed_tree
        if release == "installed"
        else patched_copy(wheel(release, tmp_path), tmp_path / "tree")
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "patch_checks.py")],
        env=os.environ | environment(tree),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"] == str(tree / ARGUMENTS)

    ends = found["without the package"]
    assert ends["rope"] == ""
    for case in ("fope", "fope=", "fope flag"):
        assert ends[case].startswith("--position-embedding-type fope needs megatron-fope (pip install "), case
        assert "\n" not in ends[case]
    assert ends["checkpoint"].endswith("give --position-embedding-type fope on the command line too")

    for name in ("fope", "launched", "rope"):
        assert found[name]["code"] == 0, found[name]["log"][-4000:]
    assert len(found["fope"]["losses"]) == 3 and found["fope"]["losses"] == found["launched"]["losses"]
    assert "gain 0.6" in found["fope"]["log"] and "> registered: True" in found["fope"]["log"]
    assert found["rope"]["losses"] != found["fope"]["losses"]
    assert "> FoPE" not in found["rope"]["log"] and "> registered: False" in found["rope"]["log"]
    if release != "0.17.1":  # which draws its initial weights in another order
        assert {name: found[name]["losses"] for name in unpatched} == unpatched


@pytest.mark.launch
def test_plain_torchrun(installed_tree: Path, unpatched: dict[str, list[float]]) -> None:
    env = environment(SCRIPTS / "cpu_by_environment", installed_tree)
    done = torchrun(1, [str(SCRIPTS / "plain_pretrain.py"), *TINY_MODEL, *FOPE], env=env)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{installed_tree}/megatron/core/" in done.stdout and "> registered: True" in done.stdout
    assert losses(done.stdout) == unpatched["fope"]


@needs_checkout
@pytest.mark.launch
def test_patched_checkout_trains(tmp_path: Path) -> None:
    """Megatron-LM's own ``pretrain_gpt.py``, patched, against the unpatched one and the launcher."""
    source = Path(CHECKOUT).resolve()
    if "is Megatron-Core 0.16" in apply("--check", source).stderr:
        pytest.skip("there is no patch for Megatron-LM 0.16")
    tree = patched_copy(source, tmp_path)

    def train(checkout: Path, *command: str, nproc: int = 1) -> list[float]:
        env = (
            environment(checkout)
            if "-m" in command
            else environment(SCRIPTS / "cpu_by_environment", checkout)
        )
        done = torchrun(nproc, [*command, *TINY_MODEL], env=env)
        assert done.returncode == 0, done.stdout[-4000:]
        assert f"{checkout}/megatron/core/" in done.stdout and "site-packages/megatron/" not in done.stdout
        assert ("> FoPE: profile paper, train length 64" in done.stdout) == ("fope" in command)
        return losses(done.stdout)

    by_patch = train(tree, str(tree / "pretrain_gpt.py"), *FOPE)
    by_launcher = train(source, "-m", "megatron_fope", "--cpu", str(source / "pretrain_gpt.py"), *FOPE)
    assert len(by_patch) == 3 and by_patch == by_launcher
    two_ranks = train(tree, str(tree / "pretrain_gpt.py"), *FOPE, *TP2, nproc=2)
    assert two_ranks == pytest.approx(by_patch, abs=1e-5)
    scripts = [checkout / "pretrain_gpt.py" for checkout in (tree, source)]
    patched, unpatched = (train(script.parent, str(script), *ROPE) for script in scripts)
    assert patched == unpatched != by_patch
