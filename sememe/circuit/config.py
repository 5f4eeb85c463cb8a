"""What can be chosen about a circuit. Knows options and their ranges; reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.lm import ModelConfig

__all__ = ["CircuitConfig"]


class CircuitConfig(Config):
    """Which prompt, which transcoders, which logits, and how much of the graph is kept."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "dictionaries", "explanations", "batch_rows"})

    _opens = opens("dictionaries")

    prompt: str
    """The text; the prediction after its last token is explained."""
    dictionaries: tuple[Path, ...] = Field(default=(Path("artifacts/dictionary"),), min_length=1)
    """Folders of transcoders of one model (mlp_in.L to mlp_out.L, one for each layer that has one), or of one
    cross-layer transcoder."""
    out: Path = Path("artifacts/circuit")
    """Where the graph goes."""
    model: ModelConfig = ModelConfig()
    """The language model, the one the dictionaries were trained on; in float32 unless a dtype is given, for sums over
    paths have to agree with the model."""
    tokens: tuple[str, ...] = ()
    """Explain the logits of these tokens; the likeliest, if none are named."""
    n_logits: int = Field(default=10, ge=1)
    """Likeliest tokens that are explained, at most."""
    probability: float = Field(default=0.95, gt=0, le=1)
    """No more of them than hold this much probability together."""
    n_latents: int = Field(default=2048, ge=1)
    """Active latents whose inputs are looked for, those with most influence first; a backward's row each."""
    keep_nodes: float = Field(default=0.8, ge=0, le=1)
    """The share of the nodes' influence that is kept when the graph is pruned."""
    keep_edges: float = Field(default=0.98, ge=0, le=1)
    """The share of the kept nodes' edges' influence that is kept."""
    n_checked: int = Field(default=64, ge=0)
    """Latents that are also taken out of the real model, to compare: half of them the strongest, half drawn."""
    n_checked_edges: int = Field(default=64, ge=0)
    """Edges between latents in the graph that are compared with the real model, too: half of them the heaviest."""
    batch_rows: int = Field(default=32, ge=1)
    """Rows of one backward or forward."""
    atlases: tuple[Path, ...] = ()
    """Atlases of the dictionaries, to say on what tokens latents fire, and for links in the browser."""
    explanations: tuple[Path, ...] = ()
    """Explanations of the atlases, in the same order, for the latents' labels."""
    seed: int = 0
    """Of what is drawn."""

    @field_validator("model")
    @classmethod
    def _exact(cls, model: ModelConfig) -> ModelConfig:
        return model.replace(dtype="float32") if model.dtype == "auto" else model

    @model_validator(mode="after")
    def _no_inert_option(self) -> CircuitConfig:
        if self.tokens:
            self.check_inert("n_logits", "probability", without="tokens are named")
        if self.n_checked == 0 and self.n_checked_edges == 0:
            self.check_inert("seed", without="nothing is checked")
        if self.explanations and len(self.explanations) != len(self.atlases):
            raise ConfigError(
                "explanations must be one for each atlas",
                f"{len(self.explanations)} for {len(self.atlases)} atlases",
                "Name them in the order of the atlases.",
            )
        return self
