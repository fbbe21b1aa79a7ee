"""Text to Megatron datasets: the library behind ``megatron-fope prepare-data``."""

from __future__ import annotations

from megatron_fope.tools.data.output import WrittenDataset, read_sidecar
from megatron_fope.tools.data.prepare import PreparedData, prepare_data

__all__ = ["PreparedData", "WrittenDataset", "prepare_data", "read_sidecar"]
