"""The verb that runs a language model over a text and stores its activations.

Knows models, text and stores; knows no dictionary. Interrupted and started again, it goes on with the next
shard; the finished store has the same bits as one made in a single run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from sememe import artifact
from sememe import lm as language_models
from sememe.capture import PositionChoice, Rows, captured_rows, first_norms
from sememe.config import Config
from sememe.errors import ConfigError, TextError
from sememe.lm import LanguageModel, ModelConfig
from sememe.progress import track
from sememe.store import (
    DOCUMENTS,
    HookpointInfo,
    Shard,
    Store,
    StoreInfo,
    open_store,
    write_documents,
    write_shard,
)
from sememe.text import Split, TextConfig, TokenBlock, TokenPolicy, fetch, fingerprint, token_blocks

__all__ = ["HarvestConfig", "harvest", "parents_of"]

VERSION = 1
PROGRESS = "progress.json"


class HarvestConfig(Config):
    """What to read, where, and how much."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "batch_rows"})

    out: Path = Path("artifacts/store")
    """The folder to make."""
    model: ModelConfig = ModelConfig()
    """The language model."""
    text: TextConfig = TextConfig()
    """The corpus."""
    policy: TokenPolicy = TokenPolicy()
    """Which positions are kept."""
    hookpoints: tuple[str, ...] = ("resid_post.8",)
    """Where to read; globs such as resid_post.* give many."""
    n_tokens: int = Field(default=1_000_000, ge=1)
    """Tokens that go through the model; a little fewer are kept."""
    split: Split = "train"
    """Which documents: train, heldout, or all."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts per forward."""
    shard_contexts: int = Field(default=512, ge=1)
    """Contexts whose rows are shuffled together into one shard."""
    positions_per_context: int | None = Field(default=None, ge=1)
    """Keep only so many random positions of each context; all if not given."""
    positions: tuple[int, ...] | None = None
    """Keep only these positions of each context; all if not given."""
    seed: int = 0
    """Of the shuffle and of the random positions."""

    @model_validator(mode="after")
    def _positions_lie_in_the_context(self) -> Self:
        length, dropped = self.policy.context_length, self.policy.drop_positions
        outside = [p for p in self.positions or () if not dropped <= p < length]
        if outside or self.positions == ():
            raise ConfigError(
                f"positions must name at least one position, each in [{dropped}, {length}): the policy's context "
                f"without its {dropped} dropped ones",
                outside or "none",
                "Name others, or change context_length or drop_positions.",
            )
        n_kept = length - dropped if self.positions is None else len(set(self.positions))
        if self.positions_per_context is not None and self.positions_per_context > n_kept:
            raise ConfigError(
                f"positions_per_context must be <= {n_kept}, the positions there are to choose from",
                self.positions_per_context,
                "Lower it, or leave it out to keep all.",
            )
        if self.batch_rows > self.shard_contexts:
            raise ConfigError(
                f"batch_rows must be <= shard_contexts={self.shard_contexts}",
                self.batch_rows,
                "Lower batch_rows.",
            )
        return self


def parents_of(config: HarvestConfig, lm_fingerprint: str) -> dict[str, str]:
    """Fingerprints of what a store is made from."""
    return {"model": lm_fingerprint, "text": fingerprint(config.text)}


def harvest(config: HarvestConfig, *, lm: LanguageModel | None = None, fresh: bool = False) -> Store:
    """Make a store, or open it if it is there.

    Args:
        config: What to read, where, and how much.
        lm: The model, if it is loaded already; else it is loaded from config.model.
        fresh: Replace whatever stands at config.out.

    Raises:
        HookpointError: the model lacks a hookpoint.
        TextError: the text is empty or shorter than one context.
        ActivationError: an activation is NaN or infinite.
        MismatchError: another store stands at config.out.
    """
    fetch(config.text)
    parents = parents_of(config, lm.fingerprint if lm else language_models.fingerprint_of(config.model))
    identity = artifact.identity_of("store", VERSION, config, parents)
    if not fresh and artifact.find(config.out, "store", identity):
        return open_store(config.out)
    lm = lm if lm is not None else language_models.load(config.model)
    hookpoints = lm.expand(config.hookpoints)
    with artifact.building(
        config.out,
        kind="store",
        version=VERSION,
        config=config,
        parents=parents,
        resumable=True,
        fresh=fresh,
        leave_out=(PROGRESS,),
    ) as work:
        _fill(config, lm, hookpoints, parents, work)
    return open_store(config.out)


class _State:
    """What a run that goes on has to know; written after each shard."""

    def __init__(
        self, work: artifact.Work, lm: LanguageModel, config: HarvestConfig, hookpoints: tuple[str, ...]
    ) -> None:
        self.path = work.path / PROGRESS
        self.shard_rows: list[int] = []
        self.n_tokens = self.n_outliers = 0
        if work.resumed and self.path.is_file():
            saved = json.loads(self.path.read_text())
            self.medians: dict[str, float] = saved["medians"]
            self.shard_rows, self.n_tokens = saved["shard_rows"], saved["n_tokens"]
            self.n_outliers = saved["n_outliers"]
            work.hashes = saved["hashes"]
        else:
            self.medians = first_norms(
                lm, config.text, config.policy, hookpoints, config.batch_rows, config.split
            )

    def write(self, work: artifact.Work) -> None:
        artifact.write_json(
            self.path,
            {
                "medians": self.medians,
                "shard_rows": self.shard_rows,
                "n_tokens": self.n_tokens,
                "n_outliers": self.n_outliers,
                "hashes": work.hashes,
            },
        )


def _fill(
    config: HarvestConfig,
    lm: LanguageModel,
    hookpoints: tuple[str, ...],
    parents: dict[str, str],
    work: artifact.Work,
) -> None:
    state = _State(work, lm, config, hookpoints)
    ratio = config.policy.max_norm_ratio
    max_norms = {name: None if ratio is None else ratio * state.medians[name] for name in hookpoints}
    documents: dict[int, dict[str, Any]] = {}
    n_done = len(state.shard_rows)
    choice = PositionChoice(config.positions_per_context, config.positions, config.seed)

    def finish(index: int, parts: list[Rows]) -> None:
        shard = _shuffled(parts, hookpoints, config.seed, index)
        if shard.token_ids.shape[0] == 0:
            raise ConfigError("the policy must keep some positions", "none of a shard", "Change the policy.")
        name = _shard_name(index)
        write_shard(work.path / name, shard)
        work.hashes[name] = artifact.file_sha256(work.path / name)
        state.shard_rows.append(int(shard.token_ids.shape[0]))
        state.n_tokens += sum(rows.n_tokens for rows in parts)
        state.n_outliers += sum(rows.n_outliers for rows in parts)
        state.write(work)

    # Shards are written beside the model's forwards, one at a time; leaving the block waits for the last.
    with (
        ThreadPoolExecutor(1, "sememe-harvest") as writer,
        track("harvest", config.n_tokens, "tokens", done=state.n_tokens) as progress,
    ):
        written: Future[None] | None = None
        for index, blocks in enumerate(_shard_blocks(config, lm, documents)):
            if index < n_done:
                continue
            parts = []
            for rows in captured_rows(lm, blocks, hookpoints, config.batch_rows, max_norms, choice=choice):
                parts.append(rows)
                progress.advance(rows.n_tokens)
            if written is not None:
                written.result()
            written = writer.submit(finish, index, parts)
        if written is not None:
            written.result()
    if not state.shard_rows:
        raise TextError("the text must hold at least one context", "none", "Give more text.")
    write_documents(work.path / DOCUMENTS, documents.values())
    info = StoreInfo(
        model=lm.name,
        model_fingerprint=lm.fingerprint,
        hookpoints={
            name: HookpointInfo(
                width=lm.width(name), median_norm=state.medians[name], max_norm=max_norms[name]
            )
            for name in hookpoints
        },
        policy=config.policy,
        text_fingerprint=parents["text"],
        n_rows=sum(state.shard_rows),
        n_tokens_read=state.n_tokens,
        n_norm_outliers=state.n_outliers,
        shards=tuple(_shard_name(index) for index in range(len(state.shard_rows))),
        shard_rows=tuple(state.shard_rows),
    )
    work.extra = info.resolved()


def _shard_name(index: int) -> str:
    return f"shard-{index:05}.safetensors"


def _shard_blocks(
    config: HarvestConfig, lm: LanguageModel, documents: dict[int, dict[str, Any]]
) -> Iterator[list[TokenBlock]]:
    """The text in blocks of one shard's contexts each; every document met is added to the table."""
    blocks = token_blocks(
        config.text,
        lm.tokenizer,
        config.policy,
        split=config.split,
        n_tokens=config.n_tokens,
        block_rows=config.shard_contexts,
    )
    for block in blocks:
        for doc_id, document in block.documents.items():
            documents[doc_id] = {
                "id": doc_id,
                "source": document.source,
                "language": document.language,
                "title": document.title,
                "tags": json.dumps(document.tags, ensure_ascii=False, sort_keys=True),
            }
        yield [block]


def _shuffled(parts: list[Rows], hookpoints: tuple[str, ...], seed: int, index: int) -> Shard:
    """The rows of a shard in random order. Written into place part by part: only one copy is held.

    In numpy, on one thread: torch's would wait for the cores that the model is running on.
    """
    n_rows = sum(part.token_ids.shape[0] for part in parts)
    order = np.random.default_rng((seed, index)).permutation(n_rows)
    activations = {
        name: torch.empty(n_rows, parts[0].activations[name].shape[1], dtype=torch.bfloat16)
        for name in hookpoints
    }
    columns = [torch.empty(n_rows, dtype=torch.int32) for _ in range(3)]
    start = 0
    for part in parts:
        stop = start + part.token_ids.shape[0]
        places = order[start:stop]
        for name in hookpoints:
            bits = part.activations[name].view(torch.int16).numpy()
            activations[name].view(torch.int16).numpy()[places] = bits
        for column, values in zip(columns, (part.token_ids, part.doc_ids, part.positions), strict=True):
            column.numpy()[places] = values.numpy()
        start = stop
    return Shard(activations, *columns)
