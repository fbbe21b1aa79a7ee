"""Text to Megatron datasets: the library behind ``megatron-fope prepare-data``."""

from __future__ import annotations

from megatron_fope.tools.data.prepare import PreparedData, WrittenDataset, prepare_data, read_sidecar

__all__ = ["PreparedData", "WrittenDataset", "prepare_data", "read_sidecar"]
