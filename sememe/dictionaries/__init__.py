"""Every architecture and baseline: one table, and how to load any of them from its folder.

Knows the list of kinds and nothing about how each works.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from sememe import artifact
from sememe.dictionaries.abs_topk import AbsTopK, AbsTopKConfig
from sememe.dictionaries.base import (
    ArchitectureConfig,
    Constraints,
    Dictionary,
    Loss,
    Resampling,
    Site,
    Sites,
    Trainable,
)
from sememe.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from sememe.dictionaries.cross_layer import CrossLayer, CrossLayerConfig
from sememe.dictionaries.gated import Gated, GatedConfig
from sememe.dictionaries.group_max import GroupMax, GroupMaxConfig
from sememe.dictionaries.ica import ICA
from sememe.dictionaries.identity import Identity
from sememe.dictionaries.jumprelu import JumpReLU, JumpReLUConfig
from sememe.dictionaries.lista import LISTA, LISTAConfig
from sememe.dictionaries.matching_pursuit import MatchingPursuit, MatchingPursuitConfig
from sememe.dictionaries.matryoshka import Matryoshka, MatryoshkaConfig
from sememe.dictionaries.mlp_encoder import MLPEncoder, MLPEncoderConfig
from sememe.dictionaries.multi_topk import MultiTopK, MultiTopKConfig
from sememe.dictionaries.neurons import Neurons
from sememe.dictionaries.nmf import NMF
from sememe.dictionaries.p_anneal import PAnneal, PAnnealConfig
from sememe.dictionaries.pca import PCA
from sememe.dictionaries.random_directions import RandomDirections
from sememe.dictionaries.relu import ReLU, ReLUConfig
from sememe.dictionaries.resampling import ResamplingConfig
from sememe.dictionaries.rica import RICA
from sememe.dictionaries.row_norm import RowNorm
from sememe.dictionaries.sparse_coder import SparseCoder
from sememe.dictionaries.tied import Tied, TiedConfig
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.dictionaries.variational import Variational, VariationalConfig
from sememe.errors import ArtifactError, nearest

__all__ = [
    "REGISTRY",
    "TRAINABLE",
    "Architecture",
    "ArchitectureConfig",
    "Constraints",
    "Dictionary",
    "Loss",
    "Resampling",
    "ResamplingConfig",
    "Site",
    "Sites",
    "Trainable",
    "build",
    "load",
]

Architecture = Annotated[
    TopKConfig
    | BatchTopKConfig
    | MatryoshkaConfig
    | MultiTopKConfig
    | AbsTopKConfig
    | GroupMaxConfig
    | MatchingPursuitConfig
    | MLPEncoderConfig
    | ReLUConfig
    | JumpReLUConfig
    | GatedConfig
    | TiedConfig
    | PAnnealConfig
    | LISTAConfig
    | VariationalConfig
    | CrossLayerConfig,
    Field(discriminator="kind"),
]
"""The config of any architecture that can be trained, told apart by `kind`."""

TRAINABLE: dict[str, type[Trainable]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "matryoshka": Matryoshka,
    "multi_topk": MultiTopK,
    "abs_topk": AbsTopK,
    "group_max": GroupMax,
    "matching_pursuit": MatchingPursuit,
    "mlp_encoder": MLPEncoder,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "tied": Tied,
    "p_anneal": PAnneal,
    "lista": LISTA,
    "variational": Variational,
    "cross_layer": CrossLayer,
}

REGISTRY: dict[str, type[Dictionary]] = {
    **TRAINABLE,
    "ica": ICA,
    "identity": Identity,
    "neurons": Neurons,
    "nmf": NMF,
    "pca": PCA,
    "random_directions": RandomDirections,
    "rica": RICA,
    "row_norm": RowNorm,
    "sparse_coder": SparseCoder,
}


def build(config: ArchitectureConfig, d_in: int, d_out: int, sites: Sites | None = None) -> Trainable:
    """A new dictionary, not yet initialised."""
    d_sae = config.width(d_in)
    return TRAINABLE[config.kind].rebuild(config.resolved(), d_in, d_out, d_sae, sites)


def load(path: str | Path) -> Dictionary:
    """A finished dictionary in raw units and eval mode, its weights and probe checked.

    Raises:
        ArtifactError: the folder is not a dictionary, or of an architecture that is not known here.
        CorruptError: a file changed.
        MismatchError: the weights no longer give the stored reconstructions.
    """
    saved = artifact.load(path, "dictionary")
    extra = saved.extra
    kind = extra["architecture"]["kind"]
    if kind not in REGISTRY:
        raise ArtifactError(
            f"the dictionary {path} must be of a known architecture",
            repr(kind),
            nearest(kind, sorted(REGISTRY)),
        )
    sites = None if extra["sites"] is None else Sites.build(extra["sites"])
    dictionary = REGISTRY[kind].rebuild(
        extra["architecture"], extra["d_in"], extra["d_out"], extra["d_sae"], sites
    )
    dictionary.load_folder(saved)
    return dictionary
