"""Write ``.ci/constraints.txt``: the versions in this interpreter's environment, which its tests passed with.

``make test-newest && make constraints VENV=.venv-newest``; then widen the bounds in ``pyproject.toml``.
"""

import tomllib
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# Versions that the tests passed with together; make, CI and pip install -c .ci/constraints.txt use them.
# Refreshed by: make test-newest && make constraints VENV=.venv-newest
# torch is a range, because not every platform has its newest release; it brings what only it needs.
"""


def main() -> None:
    """Walk from the project's own requirements; torch's are left to torch."""
    pinned: dict[str, str] = {}
    left = [Requirement("megatron-fope[dev]")]
    while left:
        requirement = left.pop()
        for text in requires(requirement.name) or []:
            needed = Requirement(text)
            name = canonicalize_name(needed.name)
            extras = requirement.extras or {""}
            if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            if name in pinned and not needed.extras:
                continue
            pinned[name] = f"{name}=={version(name)}"
            if name != "torch":
                left.append(needed)
    pinned.pop("megatron-fope")  # its extra "dev" names others of its extras
    # Each torch has bounds of its own for it.
    pinned.pop("setuptools", None)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pinned["torch"],) = (text for text in project["dependencies"] if Requirement(text).name == "torch")
    lines = sorted(pinned.values())
    (ROOT / ".ci" / "constraints.txt").write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
