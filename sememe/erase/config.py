"""What can be chosen about erasure. Knows options and their ranges; erases nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.labelled import LabelledConfig
from sememe.lm import ModelConfig
from sememe.text import TextConfig, TokenPolicy

__all__ = ["EraseConfig"]


class EraseConfig(LabelledConfig):
    """Which concept to take out of which activations, and where its cost is counted."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "dictionary", "labelled", "corpus", "batch_rows"}
    )

    _opens = opens("dictionary")

    dictionary: Path
    """The dictionary whose latents are taken out; its output hookpoint is where everything is."""
    out: Path = Path("artifacts/erasure")
    """The folder to make."""
    task: Literal["names", "occupations"] | None = None
    """Instead of files or corpora: sentences that end before a pronoun, after names or occupations."""
    group_field: str | None = None
    """Where a line says what its text is of (a document, a person): all of that is chosen on, or all held out."""
    model: ModelConfig = ModelConfig()
    """The language model that the dictionary belongs to."""
    policy: TokenPolicy | None = None
    """The token policy, for dictionaries that do not say which they were trained with."""
    pooling: Literal["mean", "last"] = "mean"
    """Rows are means over a text's kept positions, or its last one."""
    latents: tuple[int, ...] = ()
    """Instead of choosing: these latents, in this order."""
    ns: tuple[int, ...] = (1, 2, 5, 10, 20)
    """How many latents are taken out: the first so many."""
    ablation: Literal["zero", "mean"] = "zero"
    """What a latent that is taken out is set to: 0, or its mean over the classes of the training texts."""
    n_random: int = Field(default=2, ge=0)
    """Draws of random latents (for each of ns) and of random directions: the nulls."""
    tokens_for: tuple[str, ...] = ()
    """What the model may say next, by the first token of each: logits of these, less those of tokens_against."""
    tokens_against: tuple[str, ...] = ()
    """The other side."""
    heldout_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of the labelled texts that are held out, by a hash of what each is of."""
    text: TextConfig = TextConfig()
    """Neutral text, where the cost is counted: its held-out documents."""
    n_tokens: int = Field(default=4096, ge=1)
    """Of neutral text."""
    batch_rows: int = Field(default=16, ge=1)
    """Texts per forward."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of documents for the 95% intervals; 0 gives none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("labelled", "corpus", "task") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                "labels must come from files, from corpora, or from a task",
                " and ".join(given) or "none of them",
                "Name a JSONL file (--labelled) or a corpus (--corpus), or pass --task names.",
            )
        if self.corpus:
            self.check_inert("text_field", without="texts are a corpus's documents")
        if self.task:
            inert = ("text_field", "label_field", "group_field", "tokens_for", "tokens_against")
            self.check_inert(*inert, without="a task is given")
        if bool(self.tokens_for) != bool(self.tokens_against):
            raise ConfigError(
                "tokens_for and tokens_against must go together",
                f"{len(self.tokens_for)} and {len(self.tokens_against)}",
                "Give both, or neither.",
            )
        if not self.ns or min(self.ns) < 1 or list(self.ns) != sorted(set(self.ns)):
            raise ConfigError("ns must be growing numbers of at least 1", self.ns, "Change --ns.")
        if len(set(self.latents)) != len(self.latents):
            raise ConfigError("each latent must be named once", self.latents, "Leave the repeats out.")
        return self
