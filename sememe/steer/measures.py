"""What is made of a continuation: how much of what is looked for it holds, and how likely the unsteered model finds it.

Knows a model, a dictionary and texts; steers nothing. Everything is a sum for each prompt, divided once: a share of
positions, words or continuations over all prompts, drawn prompt by prompt for an interval.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe import metrics
from sememe.dictionaries.base import Dictionary
from sememe.lm import LanguageModel
from sememe.splice import Splicer
from sememe.steer.config import SteerConfig
from sememe.steer.lexical import Lexical

__all__ = ["MEANINGS", "Measures", "Written"]

MEANINGS = {
    "latent": "mean activation of the latents on the continuation, over the largest, read by the unsteered model",
    "tokens": "probability of the target tokens under the steered model, mean over the continuation's positions",
    "words": "share of the continuation's words that are looked for",
    "pattern": "share of continuations in which the pattern is found",
    "classifier": "mean probability of the label, by a bag of words trained on the labelled texts",
}
Share = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""For each continuation, what is counted and out of how much."""


class Written(NamedTuple):
    """Continuations of one prompt at one dose."""

    rows: Int[Tensor, "samples seq"]
    """The prompt, without a text before it, and what follows."""
    n_prompt: int
    texts: list[str]
    masses: Float[np.ndarray, " samples"] | None
    """Probability of the target tokens under the model that wrote them, summed over positions."""


class Measures:
    """What is asked of every continuation.

    Args:
        config: What is looked for.
        lm: The model, unsteered while this is asked.
        dictionary: On its device.
        largest: The latents with their largest activations.
        lexical: Knows the words of the label, if there are labelled texts.
    """

    def __init__(
        self,
        config: SteerConfig,
        lm: LanguageModel,
        dictionary: Dictionary,
        largest: Sequence[tuple[int, float]],
        lexical: Lexical | None,
    ) -> None:
        assert dictionary.sites is not None
        self.config, self.lm, self.dictionary, self.lexical = config, lm, dictionary, lexical
        self.sites, self.largest = dictionary.sites, tuple(largest)
        hookpoints = [site.hookpoint for site in self.sites.inputs]
        self.splicer = Splicer(lm, hookpoints, hookpoints)
        asked = {"tokens": config.target_tokens, "words": config.words, "pattern": config.pattern}
        given = [name for name, value in asked.items() if value]
        self.names = ("latent", *given, *(("classifier",) if lexical is not None else ()))
        words = "|".join(re.escape(word.strip().lower()) for word in config.words)
        self._words = re.compile(rf"(?<!\w)(?:{words})(?!\w)") if config.words else None

    @torch.inference_mode()
    def of(self, written: Written) -> dict[str, Share]:
        """Every measure, and the losses (nats) of the continuation under the unsteered model after the prompt alone."""
        run = self.splicer.base(written.rows)
        n_new = written.rows.shape[1] - written.n_prompt
        counts = np.full(len(written.rows), float(n_new))
        found: dict[str, Share] = {"loss": (self._losses(run.hidden, written), counts)}
        found["latent"] = (self._activations(run.activations, written.n_prompt), counts)
        if written.masses is not None:
            found["tokens"] = (written.masses, counts)
        lower = [text.lower() for text in written.texts]
        if self._words is not None:
            hits = [float(len(self._words.findall(text))) for text in lower]
            found["words"] = (
                np.array(hits),
                np.array([float(len(re.findall(r"\w+", one))) for one in lower]),
            )
        ones = np.ones(len(written.texts))
        if self.config.pattern is not None:
            hits = [float(re.search(self.config.pattern, text) is not None) for text in written.texts]
            found["pattern"] = (np.array(hits), ones)
        if self.lexical is not None:
            found["classifier"] = (self.lexical.chances(written.texts), ones)
        return found

    def _losses(
        self, hidden: Float[Tensor, "samples seq d"], written: Written
    ) -> Float[np.ndarray, " samples"]:
        chances = self.lm.logits(hidden[:, written.n_prompt - 1 : -1]).float().log_softmax(-1)
        targets = written.rows[:, written.n_prompt :, None].to(chances.device)
        return -chances.gather(-1, targets)[..., 0].sum(1).double().cpu().numpy()

    def _activations(self, activations: Mapping[str, Tensor], n_prompt: int) -> Float[np.ndarray, " samples"]:
        """Of the latents on the new positions, each over its largest, their mean summed over positions."""
        parts = [activations[site.hookpoint][:, n_prompt:] for site in self.sites.inputs]
        x = torch.cat([part.float().to(parts[0].device) for part in parts], dim=-1)
        device = self.dictionary.decoder_directions().device
        latents = [latent for latent, _ in self.largest]
        acts = self.dictionary.encode_latents(x.flatten(0, 1).to(device), latents)
        over = acts / acts.new_tensor([act for _, act in self.largest])
        return over.mean(1).reshape(x.shape[:2]).sum(1).double().cpu().numpy()

    def statistics(self, by_prompt: Sequence[dict[str, Share]]) -> dict[str, Any]:
        """Perplexity and every measure over all prompts, with intervals."""
        sums = metrics.Sums()
        for number, found in enumerate(by_prompt):
            n = len(found["loss"][0])
            values = {"n": torch.ones(n, dtype=torch.float64)}
            for name, (counted, out_of) in found.items():
                values |= {f"{name}": torch.from_numpy(counted), f"of_{name}": torch.from_numpy(out_of)}
            sums.add(torch.full((n,), number), values)
        formulas: dict[str, Any] = {"perplexity": lambda t: np.exp(t["loss"] / t["of_loss"])}
        for name in self.names:
            formulas[name] = lambda t, name=name: t[name] / t[f"of_{name}"]
        causes = {"perplexity": "the unsteered model finds it impossible", "words": "there are no words"}
        drawn = metrics.bootstrap(
            sums.arrays(), formulas, n=self.config.n_bootstrap, seed=self.config.seed, causes=causes
        )
        told = {
            name: one._replace(cause=one.cause.replace("documents", "prompts")) for name, one in drawn.items()
        }
        return {
            "perplexity": told["perplexity"].to_json(),
            "measures": {name: told[name].to_json() for name in self.names},
        }
