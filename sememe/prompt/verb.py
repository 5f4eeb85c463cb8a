"""One text through a dictionary: the forwards, the latents that fire, and what each does there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe import artifact, dictionaries
from sememe import lm as language_models
from sememe.atlas import Atlas, dictionary_of, open_atlas
from sememe.dictionaries.base import Dictionary
from sememe.downstream import Changes, Predictions, Reruns, Unedited, kept_positions, prompt_ids
from sememe.errors import ConfigError, MismatchError
from sememe.lm import LanguageModel
from sememe.progress import track
from sememe.prompt.config import PromptConfig
from sememe.prompt.view import LatentRow, OutputToken, PromptView, TokenRow
from sememe.shuffled import at_home, model_for
from sememe.text import TokenPolicy

__all__ = ["Known", "prompt"]


def prompt(
    config: PromptConfig,
    *,
    lm: LanguageModel | None = None,
    dictionary: Dictionary | None = None,
    known: Known | None = None,
) -> PromptView:
    """What a dictionary's latents do on one text.

    Args:
        config: The text, and how much is shown.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        dictionary: The one at config.dictionary, if it is loaded already.
        known: What config.atlas and config.explanations say, if they are read already.
    Raises:
        ArtifactError: there is no dictionary, atlas or explanations where they should be.
        ConfigError: a latent does not exist, or the text has no token that is looked at.
        MismatchError: the dictionary belongs to another model, or the atlas to another dictionary.
        ModelError: the text is longer than the model's context.
        ActivationError: an activation is NaN or infinite.
    """
    saved = artifact.load(config.dictionary, "dictionary")
    dictionary = dictionary if dictionary is not None else dictionaries.load(config.dictionary)
    for latent in config.latents:
        if not 0 <= latent < dictionary.d_sae:
            raise ConfigError(f"a latent must be in [0, {dictionary.d_sae - 1}]", latent, "Change --latents.")
    known = known if known is not None else Known.of(config.atlas, config.explanations, saved)
    lm = lm if lm is not None else language_models.load(model_for(saved, config.model))
    reruns = Reruns(lm, at_home(dictionary, saved, lm))
    policy = TokenPolicy.build(saved.extra["policy"]) if saved.extra.get("policy") else TokenPolicy()
    ids = prompt_ids(lm, config.prompt, policy.bos)
    with torch.inference_mode():
        run = reruns.unedited(ids)
        kept = _kept(lm, dictionary, run, policy)
        if not bool(kept.any()):
            raise ConfigError(
                "the prompt must have a token that the dictionary's policy keeps",
                f"{len(kept)} tokens, none kept ({policy.resolved()})",
                "Write a longer text.",
            )
        firing = _firing(config, reruns, run, kept)
        predictions = Predictions(lm, ids, run.base.hidden, torch.ones(ids.shape, dtype=torch.bool))
        changes = _changes(config, reruns, run, predictions, firing) if config.ablate else None
        tokens = _tokens(lm, ids, predictions, kept, firing)
    view = PromptView(
        prompt=config.prompt,
        model=lm.name,
        hookpoints=tuple(dict.fromkeys(site.hookpoint for site in reruns.inputs)),
        dictionary=config.dictionary.name,
        tokens=tokens,
        rows=_rows(lm, firing, known, changes, tokens),
        ablated=config.ablate,
    )
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_json(config.out, view.as_json())
    if config.page is not None:
        config.page.parent.mkdir(parents=True, exist_ok=True)
        config.page.write_text(view.page(), encoding="utf-8")
    return view


def _kept(
    lm: LanguageModel, dictionary: Dictionary, run: Unedited, policy: TokenPolicy
) -> Bool[Tensor, " seq"]:
    assert dictionary.sites is not None
    found = {name: value[0] for name, value in run.base.activations.items()}
    return kept_positions(lm, run.base.ids[0], dictionary.sites.inputs, found, policy)


class _Firing(NamedTuple):
    """The latents that are shown, ordered by position and then by how much they write."""

    positions: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    acts: Float[Tensor, " n"]
    writes: Float[Tensor, " n"]
    """|activation| times the decoder direction's norm."""
    kept: Int[Tensor, " seq"]
    """How many latents fire at each position, shown or not; -1 where the dictionary is not asked."""


def _firing(config: PromptConfig, reruns: Reruns, run: Unedited, kept: Bool[Tensor, " seq"]) -> _Firing:
    places = torch.nonzero(kept)[:, 0]
    encoded = reruns.encode(run, torch.zeros_like(places), places).to("cpu")
    norms = reruns.directions.norm(dim=1).cpu()
    counts = torch.full(kept.shape, -1)
    counts[places] = encoded.l0()
    positions = places[encoded.row_ids()]
    latents, acts = encoded.indices.long(), encoded.acts.float()
    writes = acts.abs() * norms[latents]
    order = torch.from_numpy(np.lexsort((latents.numpy(), -writes.numpy(), positions.numpy())))
    order = order[acts[order] != 0]
    if config.latents:
        order = order[torch.isin(latents[order], torch.tensor(config.latents))]
    elif not config.every:
        at = positions[order]
        place = torch.arange(len(at)) - torch.searchsorted(at, at)
        order = order[place < config.n_latents]
    return _Firing(positions[order], latents[order], acts[order], writes[order], counts)


def _changes(
    config: PromptConfig, reruns: Reruns, run: Unedited, predictions: Predictions, firing: _Firing
) -> Changes | None:
    n = len(firing.positions)
    if n == 0:
        return None
    n_tokens = run.base.ids.shape[1]
    parts = []
    with track("prompt", n, "ablations") as progress:
        start = 0
        while start < n:
            # Rows of one forward run as far as the first of them, which has most tokens after it.
            left = n_tokens - 1 - int(firing.positions[start])
            n_after = left if config.n_after is None else min(config.n_after, left)
            part = slice(start, start + reruns.rows_at_once(n_after + 1))
            positions = firing.positions[part]
            rows = torch.zeros_like(positions)
            hidden = reruns.ablated(run, rows, positions, firing.latents[part], firing.acts[part], n_after)
            scored = positions[:, None] + torch.arange(n_after + 1) < n_tokens - 1
            parts.append(
                predictions.changes(
                    hidden, rows, positions, scored, n_shown=config.n_shown, n_likeliest=config.n_likeliest
                )
            )
            progress.advance(len(positions))
            start += len(positions)
    return Changes(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _tokens(
    lm: LanguageModel, ids: Tensor, predictions: Predictions, kept: Bool[Tensor, " seq"], firing: _Firing
) -> tuple[TokenRow, ...]:
    losses = predictions.losses()[0].tolist()
    return tuple(
        TokenRow(
            position=i,
            token=token,
            text=lm.token_text(token),
            kept=bool(kept[i]),
            n_active=int(firing.kept[i]) if bool(kept[i]) else None,
            loss_of_next=losses[i] if i + 1 < len(losses) else None,
            bytes=_part_of_a_letter(lm.token_bytes(token)),
        )
        for i, token in enumerate(ids[0].tolist())
    )


def _part_of_a_letter(raw: bytes) -> str | None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.hex()
    return None


def _rows(
    lm: LanguageModel, firing: _Firing, known: Known, changes: Changes | None, tokens: tuple[TokenRow, ...]
) -> tuple[LatentRow, ...]:
    rows = []
    for i, (position, latent, act) in enumerate(
        zip(firing.positions.tolist(), firing.latents.tolist(), firing.acts.tolist(), strict=True)
    ):
        effect: dict[str, object] = {}
        if changes is not None:
            scored = bool(changes.scored[i])
            effect = {
                "loss_change": float(changes.loss_change[i]) if scored else None,
                "loss_change_after": float(changes.loss_change_after[i]) if scored else None,
                "n_after": int(changes.n_after[i]),
                "kl": float(changes.kl[i]),
                "raised": _named(lm, changes.raised[i], changes.raised_by[i], 1),
                "lowered": _named(lm, changes.lowered[i], changes.lowered_by[i], -1),
            }
        rows.append(
            LatentRow(
                position=position,
                text=tokens[position].text,
                latent=latent,
                act=act,
                writes=float(firing.writes[i]),
                **known.about(latent, act),  # type: ignore[arg-type]
                **effect,  # type: ignore[arg-type]
            )
        )
    return tuple(rows)


def _named(lm: LanguageModel, tokens: Tensor, changes: Tensor, sign: int) -> tuple[OutputToken, ...]:
    return tuple(
        OutputToken(token, lm.token_text(token), change)
        for token, change in zip(tokens.tolist(), changes.tolist(), strict=True)
        if change * sign > 0
    )


class Known(NamedTuple):
    """What an atlas and explanations say of the latents; empty without them."""

    latents: dict[int, tuple[float, float, np.ndarray]]
    """density, max_act and the histogram's cumulative counts."""
    edges: np.ndarray
    labels: dict[int, str]

    @classmethod
    def of(cls, path: Path | None, explanations: Path | None, dictionary: artifact.Artifact) -> Known:
        """Read what is known of a dictionary's latents; nothing without an atlas.

        Raises:
            ArtifactError: there is no atlas, or there are no explanations, where they should be.
            MismatchError: the atlas is of another dictionary.
        """
        if path is None:
            return cls({}, np.zeros(0), {})
        atlas = open_atlas(path, explanations=explanations)
        try:
            wanted = dictionary_of(atlas)
            if wanted != dictionary.fingerprint:
                raise MismatchError(
                    f"the atlas {path} must be of the dictionary {dictionary.path} "
                    f"(fingerprint {dictionary.fingerprint[:16]})",
                    f"an atlas of {wanted[:16]}",
                    "Name the atlas of this dictionary, or make one with `sememe interpret`.",
                )
            return cls._of(atlas, explanations is not None)
        finally:
            atlas.close()

    @classmethod
    def _of(cls, atlas: Atlas, explained: bool) -> Known:
        rows = atlas.query("SELECT id, density, max_act, histogram FROM latents")
        about = {
            row["id"]: (row["density"], row["max_act"], np.cumsum([0, *row["histogram"]])) for row in rows
        }
        labels: dict[int, str] = {}
        if explained:
            found = atlas.query("SELECT latent, label FROM explanations WHERE label IS NOT NULL")
            labels = {row["latent"]: row["label"] for row in found}
        return cls(about, np.array([0.0, *atlas.meta["histogram_edges"]]), labels)

    def largest(self, latent: int) -> float | None:
        """A latent's largest activation on the atlas's text; None of one that the atlas does not know."""
        return float(self.latents[latent][1]) if latent in self.latents else None

    def about(self, latent: int, act: float) -> dict[str, float | str | None]:
        """Of one latent and one of its activations: density, share of the largest, quantile, label."""
        if latent not in self.latents:
            return {}
        density, largest, below = self.latents[latent]
        found: dict[str, float | str | None] = {"density": density, "label": self.labels.get(latent)}
        if below[-1] == 0:  # it never fired on the atlas's text
            return found
        share = abs(act) / largest
        return found | {
            "share_of_max": share,
            "quantile": float(np.interp(share, self.edges, below / below[-1])),
        }
