"""How strongly latents fire in texts that are not the atlas's: texts written for them are run through the model.

Knows a language model and a dictionary; knows nothing of explanations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from sememe import artifact, dictionaries
from sememe import lm as language_models
from sememe.atlas import Atlas
from sememe.capture import captured_rows
from sememe.dictionaries import Dictionary
from sememe.errors import MismatchError
from sememe.lm import LanguageModel, ModelConfig
from sememe.progress import track
from sememe.shuffled import at_home, model_for
from sememe.text import TokenBlock, TokenPolicy

__all__ = ["Reader"]

BATCH = 16


class Reader:
    """A model and a dictionary that texts are run through.

    Args:
        atlas: Whose dictionary it must be.
        folder: The dictionary's; a null's lies inside its atlas, and is not checked again.
        model: The model that it reads; its weights are shuffled as the atlas's were where that is the null.
    Raises:
        MismatchError: dictionary or model is not the atlas's.
    """

    def __init__(self, atlas: Atlas, folder: Path, model: ModelConfig) -> None:
        saved = artifact.load(folder, "dictionary")
        wanted = str(atlas.meta["dictionary"]["fingerprint"])
        null = atlas.meta["dictionary"].get("null")
        if null is None and saved.fingerprint != wanted:
            raise MismatchError(
                f"the dictionary must be the atlas's (fingerprint {wanted[:16]})",
                f"{folder} ({saved.fingerprint[:16]})",
                "Pass the dictionary that the atlas was made from.",
            )
        self.policy = TokenPolicy.build(saved.extra["policy"]) if saved.extra.get("policy") else TokenPolicy()
        self.lm: LanguageModel = language_models.load(model_for(saved, model))
        dictionary: Dictionary = at_home(dictionaries.load(folder), saved, self.lm)
        assert dictionary.sites is not None
        self.sites = dictionary.sites.inputs
        for site in self.sites:
            if site.model_fingerprint != self.lm.fingerprint:
                raise MismatchError(
                    f"the dictionary must belong to the model {self.lm.name}",
                    f"one that reads {site.model}",
                    f"Name {site.model} as the model.",
                )
        self.dictionary = dictionary.eval().to(self.lm.device)

    @torch.no_grad()
    def largest(self, texts: Sequence[str], latents: Sequence[int]) -> Float[np.ndarray, "texts latents"]:
        """Each latent's largest absolute activation in each text, at the positions that the token policy keeps.

        0 for a text without any such position. Texts are cut at the policy's context length.

        Raises:
            ActivationError: an activation is NaN or infinite.
        """
        out = np.zeros((len(texts), len(latents)))
        column = torch.full((self.dictionary.d_sae,), -1, dtype=torch.int64)
        column[torch.tensor(list(latents))] = torch.arange(len(latents))
        limits: dict[str, float | None] = {site.hookpoint: site.max_norm for site in self.sites}
        with track("explain: written texts", len(texts), "texts") as progress:
            for rows in captured_rows(self.lm, self._blocks(texts), list(limits), BATCH, limits):
                x = torch.cat([rows.activations[site.hookpoint].float() for site in self.sites], dim=1)
                encoded = self.dictionary.encode(x.to(self.lm.device))
                at = column[encoded.indices.flatten().to("cpu", torch.int64)]
                text = rows.doc_ids[encoded.row_ids().to("cpu")].to(torch.int64)
                acts = encoded.acts.flatten().abs().to("cpu", torch.float64)
                kept = at >= 0
                np.maximum.at(out, (text[kept].numpy(), at[kept].numpy()), acts[kept].numpy())
                progress.advance(min(BATCH, len(texts) - progress.done))
        return out

    def _blocks(self, texts: Sequence[str]) -> Iterator[TokenBlock]:
        """A text to a row, padded at the end."""
        tokenizer, policy = self.lm.tokenizer, self.policy
        special = np.asarray(tokenizer.all_special_ids, dtype=np.int32)
        bos = [tokenizer.bos_token_id] if policy.bos else []
        for start in range(0, len(texts), BATCH):
            part = texts[start : start + BATCH]
            rows = [
                [*bos, *tokenizer(text, add_special_tokens=False)["input_ids"]][: policy.context_length]
                for text in part
            ]
            width = max(1, *(len(row) for row in rows))
            ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
            for i, row in enumerate(rows):
                ids[i, : len(row)], mask[i, : len(row)] = row, True
            numbers = np.arange(start, start + len(rows), dtype=np.int32)[:, None]
            keep = mask.copy()
            keep[:, : policy.drop_positions] = False
            if policy.drop_special:
                keep &= ~np.isin(ids, special)
            mask[:, 0] = True  # no row of padding alone: an empty text is run as one token that is not kept
            yield TokenBlock(
                ids,
                np.where(mask, numbers, -1).astype(np.int32),
                np.where(mask, np.arange(width, dtype=np.int32), -1).astype(np.int32),
                keep,
                mask,
                {},
            )
