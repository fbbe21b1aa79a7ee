"""Package metadata; the Python version and the Megatron-Core range belong together.

Upper bounds are what the tests ran with; ``make test-newest`` ignores them and ``.ci/constraints.txt``.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_fope" / "__init__.py").read_text()).group(1)

EXTRAS = {
    "demo": ["matplotlib>=3.8", "tensorboard>=2.16"],
    "hf": ["tokenizers>=0.22,<0.24", "transformers>=5.1,<5.25", "safetensors>=0.4,<0.9"],
    "deepspeed": ["deepspeed>=0.16.9,<0.20"],
    "te": ["transformer-engine[pytorch]>=2.0"],
    "docs": ["sphinx>=8", "myst-parser>=4", "furo>=2024.8.6"],
}
EXTRAS["dev"] = [
    *EXTRAS["demo"],
    *EXTRAS["deepspeed"],
    *EXTRAS["hf"],
    *EXTRAS["docs"],
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
]

setup(
    name="megatron-fope",
    version=VERSION,
    description="FoPE (Fourier Position Embedding) for Megatron-Core: length generalization with one flag",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["megatron", "position embedding", "long context", "pretraining", "FoPE", "RoPE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["megatron_fope", "megatron_fope.*"]),
    package_data={"megatron_fope": ["py.typed"]},
    python_requires=">=3.12,<3.14",
    install_requires=[
        "megatron-core>=0.17,<0.20",
        "torch>=2.6,<2.16",
        "numpy<3",
        "packaging",
        "psutil",  # so does writing of torch_dist checkpoints
        "pybind11>=2.12,<4",  # checkouts of Megatron-LM compile their data helpers with it
        "pyyaml",  # megatron.training needs it without declaring it
        "tqdm",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-fope=megatron_fope.tools.cli:main"]},
)
