"""What can be chosen about concepts. Knows options and their ranges; measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.labelled import LabelledConfig
from sememe.lm import ModelConfig
from sememe.text import TokenPolicy

__all__ = ["ConceptsConfig"]


class ConceptsConfig(LabelledConfig):
    """Which dictionary, which labels, and what is asked of them."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "dictionary", "labelled", "corpus", "batch_rows"}
    )

    _opens = opens("dictionary")

    dictionary: Path
    """The dictionary to ask."""
    first_letter: bool = False
    """Instead of files or corpora: words of the model's own vocabulary, labelled by their first letter."""
    out: Path = Path("artifacts/concepts")
    """The folder to make."""
    spurious_field: str | None = None
    """Where a second, binary label is that the first shall not be confused with; both must have two classes."""
    group_field: str | None = None
    """Where it stands what a text is of, a document's name, say: no fold and no half splits the texts of one. If not
    given, texts that are equal are of one."""
    model: ModelConfig = ModelConfig()
    """The language model that the dictionary belongs to."""
    policy: TokenPolicy | None = None
    """The token policy, for dictionaries that do not say which they were trained with."""
    pooling: Literal["auto", "mean", "last"] = "auto"
    """Rows are means over a text's kept positions, or its last one; auto: mean, and last for first letters."""
    ks: tuple[int, ...] = (1, 2, 5, 10)
    """Latents of the sparse probes."""
    n_ablated: tuple[int, ...] = (2, 5, 10, 20, 50, 100)
    """Latents ablated for targeted perturbation and spurious removal."""
    max_classes: int | None = Field(default=None, ge=2)
    """So many of the most frequent classes are taken; if not given 12, and with first_letter all of them."""
    batch_rows: int = Field(default=16, ge=1)
    """Texts per forward."""
    n_folds: int = Field(default=5, ge=2)
    """Outer folds of the probes."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of texts for the 95% intervals; 0 gives none."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("labelled", "corpus", "first_letter") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                "labels must come from files, from corpora, or be first letters",
                " and ".join(given) or "none of them",
                "Name a JSONL file (--labelled) or a corpus (--corpus), or pass --first-letter.",
            )
        if self.corpus:
            self.check_inert("text_field", without="texts are a corpus's documents")
        fields = ("text_field", "label_field", "spurious_field", "group_field")
        for name in fields if self.first_letter else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"{name} must be left out with first_letter: it has no effect then",
                    getattr(self, name),
                    "Drop it.",
                )
        for name in ("ks", "n_ablated"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(
                    f"{name} must be numbers of at least 1", getattr(self, name), f"Change {name}."
                )
        return self
