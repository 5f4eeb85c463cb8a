"""BatchTopK: k latents per row on average while training, and a threshold afterwards."""

from __future__ import annotations

from typing import Literal, final

from sememe.dictionaries.selection import BatchSelection, BatchSelectionConfig

__all__ = ["BatchTopK", "BatchTopKConfig"]


class BatchTopKConfig(BatchSelectionConfig):
    """Options of a BatchTopK dictionary; k is the average number of latents per row."""

    kind: Literal["batch_topk"] = "batch_topk"
    """Name of the architecture."""


@final
class BatchTopK(BatchSelection):
    """Training: the k x batch largest positive pre-activations of the batch. Else: those above the threshold.

    Source: Bussmann, Leask & Nanda 2024, arXiv:2412.06410, eqs. 4-6. Differs: the threshold is an exponential
    moving average of the batches' smallest kept activations, not an average over extra batches at the end.
    """

    kind = "batch_topk"
    config_class = BatchTopKConfig
    config: BatchTopKConfig
