"""What can be chosen about traces. Knows options and their ranges; runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.foreign import opens
from sememe.lm import ModelConfig
from sememe.text import TextConfig

__all__ = ["Ablation", "MetricName", "PathName", "TraceConfig", "TracedModel"]

Ablation = Literal["zero", "mean", "patch"]
MetricName = Literal["logit_difference", "logit", "log_prob", "loss", "kl"]
PathName = Literal["groups", "layers", "inputs"]


class TracedModel(ModelConfig):
    """Which language model, in float32 unless said otherwise."""

    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "float32"
    """float32: small differences of bfloat16 logits are mostly rounding. auto: bfloat16 where the device multiplies it
    natively."""


class TraceConfig(Config):
    """Which dictionaries, which prompts, which number is traced back to latents, and how."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "dictionaries", "explanations", "batch_rows"})

    _opens = opens("dictionaries")

    out: Path = Path("artifacts/trace")
    """The folder to make."""
    dictionaries: tuple[Path, ...] = Field(default=(Path("artifacts/dictionary"),), min_length=1)
    """Folders of dictionaries of one model, each at a hookpoint of its own."""
    atlases: tuple[Path, ...] = ()
    """Atlases of the dictionaries, where there are any: the page of a node links to its latent's."""
    explanations: tuple[Path, ...] = ()
    """Explanations of these atlases, in the same order: nodes are labelled with them."""
    model: TracedModel = TracedModel()
    """The language model, the one the dictionaries were trained on."""
    prompts: tuple[str, ...] = (
        "When Mary and John went to the store, John gave a drink to",
        "When Anna and Paul went to the park, Paul gave a flower to",
    )
    """Texts that end where the metric is looked at. Effects are means over them."""
    patched: tuple[str, ...] = ()
    """With ablation patch: each prompt's counterpart, of as many tokens, whose latents take the place of its own."""
    metric: MetricName = "logit_difference"
    """logit_difference: of answer and wrong. logit, log_prob: of answer. loss: mean over the prompt's tokens, in nats.
    kl: from the predictions of the unedited prompt (with ablation patch: of its counterpart)."""
    answers: tuple[str, ...] = (" Mary", " Anna")
    """The token that the metric is about: one for all prompts, or one for each."""
    wrong: tuple[str, ...] = (" John", " Paul")
    """The token it is compared with by logit_difference: one for all prompts, or one for each."""
    position: int = -1
    """Whose prediction the metric reads, counted from the end where negative; loss reads all of them."""
    ablation: Ablation = "mean"
    """What a latent is set to when it is taken out: its mean over the text; zero; or what it is in the counterpart."""
    method: Literal["gradient", "ig"] = "ig"
    """gradient: attribution patching, one backward in all. ig: gradients averaged over n_steps points of a path."""
    path: PathName = "groups"
    """Of ig. groups: the nodes that matter most are moved half way, some at a time. inputs: the embeddings go to
    their counterparts. layers: every hookpoint on its own, n_steps times: slow, the reference."""
    n_steps: int = Field(default=10, ge=2)
    """Forward and backward passes of ig, for all hookpoints together (of the path layers: for each)."""
    n_grouped: int = Field(default=256, ge=1)
    """With the path groups: how many nodes are moved; the others keep the unmoved gradient."""
    reach: float = Field(default=1.0, gt=0, le=1)
    """With the paths inputs and layers: how far along them gradients are taken; a single node moves less than all."""
    by_position: bool = True
    """Nodes are latents at a position; if not, latents over all positions, and prompts may be of any length."""
    max_nodes: int = Field(default=200, ge=1)
    """Nodes in the graph: those with the largest effects."""
    node_threshold: float = Field(default=0.0, ge=0)
    """The smallest |effect| of a node in the graph, in units of the metric."""
    max_edges: int = Field(default=2000, ge=0)
    """Edges in the graph: the heaviest; 0 computes none."""
    edge_threshold: float = Field(default=0.0, ge=0)
    """The smallest |weight| of an edge, in units of the metric."""
    edges: Literal["direct", "total"] = "direct"
    """direct: what goes through a dictionary in between does not count. total: it does."""
    n_checked: int | None = Field(default=None, ge=0)
    """Nodes, of the largest effects, that are really taken out one at a time, to see how well effects are predicted. If
    not given 200, and with latent 50 for each latent that is traced back."""
    n_checked_random: int = Field(default=50, ge=0)
    """Further nodes, drawn at random, that are."""
    n_checked_edges: int = Field(default=30, ge=0)
    """Edges that are: half of them the heaviest, half drawn at random."""
    n_random: int = Field(default=3, ge=0)
    """Random circuits of each size, beside the one of the largest effects; 0 leaves the curves out."""
    latent: int | None = None
    """Instead of prompts: this latent of the last hookpoint's dictionary, traced back through those before it."""
    depth: int = Field(default=2, ge=1)
    """With latent: how many hookpoints back."""
    width: int = Field(default=3, ge=1)
    """With latent: how many of the latents before it each is traced back to."""
    n_contexts: int = Field(default=20, ge=1)
    """With latent: contexts of each latent, drawn from those in which it reaches half of its largest activation."""
    text: TextConfig = TextConfig()
    """Where means are taken, and contexts of latents looked for; not read for ablation zero and patch."""
    split: Literal["train", "heldout", "all"] = "heldout"
    """Which documents of it."""
    n_tokens: int = Field(default=20_000, ge=1)
    """How many of its tokens."""
    seed: int = Field(default=0, ge=0)
    """Of random circuits and samples."""
    batch_rows: int = Field(default=16, ge=1)
    """Rows of tokens in a forward."""

    @property
    def n_largest(self) -> int:
        """Nodes of the largest effects that are really taken out: `n_checked`, or what stands for it."""
        if self.n_checked is not None:
            return self.n_checked
        return 200 if self.latent is None else 50

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.dictionaries)) != len(self.dictionaries):
            raise ConfigError(
                "each dictionary must be named once", _list(self.dictionaries), "Drop the repetition."
            )
        for name in ("atlases", "explanations"):
            if len(getattr(self, name)) > len(self.dictionaries):
                raise ConfigError(
                    f"{name} must be of the {len(self.dictionaries)} dictionaries",
                    f"{len(getattr(self, name))} folders",
                    "Name as many or fewer, in the same order.",
                )
        if len(self.explanations) > len(self.atlases):
            raise ConfigError(
                "explanations must go with their atlases",
                f"{len(self.explanations)} for {len(self.atlases)}",
                "Name --atlases.",
            )
        if self.latent is not None:
            self._check_latent(self.latent)
        else:
            self.check_inert("depth", "width", "n_contexts", without="no latent is named")
            self._check_prompts()
        if self.method == "gradient":
            self.check_inert("path", "n_steps", "n_grouped", "reach", without="the method is gradient")
        elif self.path == "groups":
            self.check_inert("reach", without="the path is groups")
        else:
            self.check_inert("n_grouped", without=f"the path is {self.path}")
        if self.latent is None:
            self._check_kl()
        return self

    def _check_latent(self, latent: int) -> None:
        if latent < 0:
            raise ConfigError("a latent must be >= 0", latent, "Change --latent.")
        if len(self.dictionaries) < 2:
            raise ConfigError(
                "a latent is traced back to those of an earlier hookpoint: there must be at least 2 dictionaries",
                1,
                "Name another.",
            )
        if self.path == "inputs":
            raise ConfigError("the path inputs leads to patched prompts", "a latent", "Set --path groups.")
        inert = ("prompts", "patched", "metric", "answers", "wrong", "position", "ablation", "by_position")
        graph = ("max_nodes", "node_threshold", "max_edges", "edge_threshold", "edges", "n_random")
        checks = ("n_checked_random", "n_checked_edges")
        self.check_inert(*inert, *graph, *checks, without="a latent is traced back")

    def _check_prompts(self) -> None:
        if not self.prompts or not all(self.prompts) or not all(self.patched):
            raise ConfigError("prompts must be texts, at least one", _list(self.prompts), "Write a text.")
        if (self.ablation == "patch") != bool(self.patched):
            raise ConfigError(
                "ablation patch must go with patched prompts",
                f"{self.ablation} with {len(self.patched)}",
                "Give one counterpart for each prompt (--patched), or set --ablation.",
            )
        if self.patched and len(self.patched) != len(self.prompts):
            raise ConfigError(
                f"there must be a patched text for each of the {len(self.prompts)} prompts",
                len(self.patched),
                "Give as many.",
            )
        if self.path == "inputs" and self.ablation != "patch":
            raise ConfigError(
                "the path inputs leads to patched prompts",
                f"ablation {self.ablation}",
                "Give --patched, or set --path groups.",
            )
        needed = {"logit_difference": ("answers", "wrong"), "logit": ("answers",), "log_prob": ("answers",)}
        for name in needed.get(self.metric, ()):
            if len(getattr(self, name)) not in (1, len(self.prompts)):
                raise ConfigError(
                    f"{name} must be one for all {len(self.prompts)} prompts, or one for each",
                    len(getattr(self, name)),
                    f"Change --{name}.",
                )
        for name in ("answers", "wrong"):
            if name not in needed.get(self.metric, ()):
                self.check_inert(name, without=f"the metric is {self.metric}")
        if self.metric == "loss":
            self.check_inert("position", without="the metric is loss")
        if self.ablation != "mean":
            self.check_inert("split", "n_tokens", without=f"the ablation is {self.ablation}")
        if not self.max_edges:
            self.check_inert("edges", "edge_threshold", "n_checked_edges", without="max_edges is 0")
        if not (self.n_random or self.n_checked_random or (self.max_edges and self.n_checked_edges > 1)):
            self.check_inert("seed", without="nothing is drawn")

    def _check_kl(self) -> None:
        if self.metric != "kl" or self.ablation == "patch":
            return
        if self.method == "gradient" or self.path == "groups" or self.max_edges:
            way = "method gradient" if self.method == "gradient" else f"path {self.path}"
            raise ConfigError(
                "kl from the unedited predictions is least where nothing is edited: its gradient is 0 there, which "
                "method gradient, path groups and edges go by",
                f"{way}, max_edges {self.max_edges}",
                "Set --path layers --max-edges 0, or compare with a counterpart (--ablation patch --patched).",
            )


def _list(values: tuple[object, ...]) -> str:
    return " ".join(map(str, values)) or "none"
