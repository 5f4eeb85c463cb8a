"""Dictionaries as scikit-learn knows them: `SparseDictionary(k=32).fit(X).transform(X)`, for rows of any origin.

Knows arrays and scikit-learn's conventions; what is trained, and how, is `train`'s. No language model, no store, and
no file unless `save` is called.

    from sememe.estimator import SparseDictionary
    codes = SparseDictionary(d_sae=4096, k=32).fit_transform(embeddings)    # scipy CSR, 32 per row
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from sememe import artifact, dictionaries
from sememe.dictionaries import REGISTRY, TRAINABLE, ArchitectureConfig, Dictionary, Loss, Sites, Trainable
from sememe.encoded import Encoded
from sememe.errors import ArtifactError, ConfigError, nearest
from sememe.metrics import Reconstruction
from sememe.progress import track
from sememe.source import Batch, TensorSource, upcoming
from sememe.source.base import permutation
from sememe.train import TrainConfig
from sememe.train.crew import device_of
from sememe.train.dead import rows_wanted
from sememe.train.member import ALONE, Member, Spec
from sememe.train.objective import Objective
from sememe.train.run import N_SAMPLE_ROWS
from sememe.train.schedule import count_steps, make_plan

__all__ = ["KINDS", "SparseDictionary"]

KINDS = tuple(sorted(set(TRAINABLE) - {"cross_layer"}))
"""Architectures that reconstruct one place."""
LOOK_EVERY = 50
"""Steps between two looks for a loss that is not finite."""
BLOCK = 4096
"""Rows encoded at once."""
ENDLESS = 10**9
"""Steps of a run whose length is not known: `partial_fit`."""
RISE, RAMP = 50, 1000
"""Of `partial_fit`: steps over which the learning rate rises, and over which penalties do."""


class SparseDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Sparse dictionary learning with an encoder: each row of X as a few active latents out of many.

    Args:
        d_sae: Latents; 8 times the features if not given.
        k: Latents active per row, for architectures that keep a number of them; 32, or an eighth of the latents where
            that is fewer, if not given.
        architecture: One of KINDS, or the config of one with all its options.
        options: More options of that architecture by name, as `sememe train KIND --help` lists them. Not given,
            dead_after_tokens is a tenth of the rows that are trained on.
        max_iter: Training steps, a batch each.
        batch_size: Rows per step; rows are seen in a new random order each pass.
        lr: Learning rate; by the width and architecture if not given.
        sparse_output: Whether `transform` gives a scipy CSR matrix or a dense array, of rows x latents.
        random_state: Of the first weights and of the order of rows.
        device: Where it is trained: cpu, cuda, mps. The fitted dictionary is on the CPU.
        verbose: Whether to show progress.

    Attributes:
        dictionary_: The fitted dictionary: takes and gives rows in X's own units.
        components_: (latents, features): what each latent writes.
        intercept_: (features): what is there when no latent is active.
        n_iter_: Steps taken.
        n_features_in_, feature_names_in_: Of X, as everywhere in scikit-learn.

    Computes in float32 whatever X is; `transform` gives X's own float type back. Errors in the options are our
    `ConfigError`; errors in X are scikit-learn's `ValueError` and `TypeError`.
    """

    def __init__(
        self,
        d_sae: int | None = None,
        *,
        k: int | None = None,
        architecture: str | ArchitectureConfig = "topk",
        options: Mapping[str, Any] | None = None,
        max_iter: int = 2000,
        batch_size: int = 256,
        lr: float | None = None,
        sparse_output: bool = True,
        random_state: Any = None,
        device: str = "cpu",
        verbose: bool = False,
    ) -> None:
        self.d_sae, self.k, self.architecture, self.options = d_sae, k, architecture, options
        self.max_iter, self.batch_size, self.lr = max_iter, batch_size, lr
        self.sparse_output, self.random_state = sparse_output, random_state
        self.device, self.verbose = device, verbose

    # -- fitting -----------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on the rows of X, from the beginning.

        Args:
            X: (rows, features), dense and finite; two rows or more.
            y: Not used.

        Raises:
            ConfigError: an option is unknown, out of range, or without effect.
            ActivationError: the loss became NaN or infinite.
        """
        x = self._rows(X, reset=True)
        config = self._config(x.shape[1])
        source = TensorSource(x, seed=config.seed)
        member = self._member(config, count_steps(config, None))
        member.initialise(source.sample(N_SAMPLE_ROWS))
        n_steps = member.plan.n_steps
        self._train(member, n_steps, lambda: source.next_batch(config.batch_size), source)
        self._stream = member
        return self._finish(member)

    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Go on training with one pass over the rows of X; the first call begins.

        The length of such a run is not known: the learning rate rises over the first 50 steps and then stays, and
        latents are never resampled. The rows of the first call set the scale and the first weights.

        Args:
            X: (rows, features), dense and finite; in the first call two rows or more.
            y: Not used.

        Raises:
            ConfigError: the optimiser's state is not there: the estimator came out of a pickle after `fit`, or from
                `from_dictionary`; also as for `fit`.
        """
        stream: Member | None = self.__dict__.get("_stream")
        if stream is None and hasattr(self, "dictionary_"):
            raise ConfigError(
                "partial_fit must go on from fit or partial_fit in this process, or begin anew",
                "an estimator without its optimiser's state",
                "Call it on sklearn.base.clone(estimator).",
            )
        x = self._rows(X, reset=stream is None)
        if stream is None:
            config = self._config(x.shape[1]).replace(warmup=RISE / ENDLESS, decay=0.0)
            stream = self._member(config, ENDLESS, _ramped)
            rows = TensorSource(x, seed=config.seed).sample(N_SAMPLE_ROWS)
            stream.initialise(rows)
        if stream.plan.n_steps != ENDLESS:  # after `fit`
            stream.config = stream.config.replace(warmup=RISE / ENDLESS, decay=0.0)
            stream.plan = make_plan(stream.config, stream.dictionary, ENDLESS)
            stream.objective = _ramped
        config = stream.config
        order = permutation(x.shape[0], config.seed, stream.step)
        parts = iter(torch.split(order, config.batch_size))

        def following() -> Batch:
            rows = x[next(parts)]
            return Batch(rows, rows)

        self._train(stream, -(-x.shape[0] // config.batch_size), following)
        self._stream = stream
        return self._finish(stream)

    def _rows(self, X: Any, *, reset: bool) -> Tensor:
        """X checked as scikit-learn checks it, in float32."""
        least = 2 if reset else 1
        checked = validate_data(
            self, X, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=least
        )
        return torch.tensor(np.asarray(checked, dtype=np.float32))

    def _config(self, d_in: int) -> TrainConfig:
        """The options as `train` takes them."""
        for name in ("max_iter", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1", getattr(self, name), f"Raise {name}.")
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(np.iinfo(np.int32).max)
        return TrainConfig.build(
            {
                "architecture": self._architecture(d_in),
                "n_tokens": self.max_iter * self.batch_size,
                "batch_size": self.batch_size,
                "lr": self.lr,
                "seed": int(seed),
                "watch_rows": 0,
            },
            where="SparseDictionary",
        )

    def _architecture(self, d_in: int) -> Any:
        """The architecture with its options, unchecked where they come by name."""
        given = {name: value for name in ("d_sae", "k") if (value := getattr(self, name)) is not None}
        options = dict(self.options or {})
        configured = isinstance(self.architecture, ArchitectureConfig)
        kind = (
            self.architecture.kind if isinstance(self.architecture, ArchitectureConfig) else self.architecture
        )
        if kind not in KINDS:
            raise ConfigError(
                "architecture must be one of those that reconstruct one place",
                repr(kind),
                nearest(str(kind), KINDS),
            )
        if configured:
            if given or options:
                raise ConfigError(
                    "d_sae, k and options must be left out when the architecture is a config",
                    ", ".join([*given, *options]),
                    "Put them into the config.",
                )
            return self.architecture
        twice = sorted(set(given) & set(options))
        if twice:
            raise ConfigError("an option must be given once", ", ".join(twice), "Take it out of options.")
        known = TRAINABLE[kind].config_class.model_fields  # type: ignore[attr-defined]
        made = {"kind": kind, **options, **given}
        d_sae = made.get("d_sae") or 8 * d_in
        if "k" in known and "k" not in made:
            made["k"] = max(1, min(32, d_sae // 8))
        if "dead_after_tokens" in known and made.get("auxk_coefficient") != 0:
            made.setdefault("dead_after_tokens", max(1, self.max_iter * self.batch_size // 10))
        return made

    def _member(self, config: TrainConfig, n_steps: int, objective: Objective | None = None) -> Member:
        d_in = self.n_features_in_
        return Member(Spec(ALONE, config, d_in, d_in, None, None), n_steps, device_of(self.device), objective)

    def _train(
        self, member: Member, n_steps: int, following: Any, source: TensorSource | None = None
    ) -> None:
        """Steps, as `train.run` takes them, without its logs and checkpoints.

        Args:
            member: What is trained.
            n_steps: How many.
            following: Gives the next batch.
            source: Where it comes from, for those that look at rows ahead.
        """
        bar = track(f"fit {member.config.architecture.kind}", n_steps, "steps") if self.verbose else None
        progress = None if bar is None else bar.__enter__()
        try:
            for number in range(1, n_steps + 1):
                wanted = rows_wanted(member.config, member.plan, member.step)
                ahead = upcoming(source, wanted).to(member.device) if wanted and source else None
                member.train_step(following().to(member.device), ahead)
                if number % LOOK_EVERY == 0:
                    member.check()
                if progress is not None:
                    progress.advance()
        finally:
            if bar is not None:
                bar.__exit__(None, None, None)
        member.check()

    def _finish(self, member: Member) -> Self:
        """The dictionary as it stands, folded and on the CPU."""
        with member.optimiser.exported():
            folded = member.dictionary.fold()
        self.dictionary_ = folded.eval().cpu().requires_grad_(False)
        self.n_iter_ = member.step
        return self

    # -- using -------------------------------------------------------------------------------------

    def transform(self, X: Any) -> Any:
        """Each row's latent activations.

        Args:
            X: (rows, features), dense and finite.

        Returns:
            (rows, latents), of X's float type: a scipy CSR matrix without explicit zeros, or a dense array.
        """
        check_is_fitted(self)
        x = self._rows(X, reset=False)
        dtype = X.dtype if getattr(X, "dtype", None) == np.float32 else np.float64
        codes = scipy.sparse.vstack([_csr(part) for part in self._encoded(x)], format="csr", dtype=dtype)
        return codes if self.sparse_output else codes.toarray()

    def _encoded(self, x: Tensor) -> list[Encoded]:
        with torch.no_grad():
            return [self.dictionary_.encode(part) for part in torch.split(x, BLOCK)]

    def inverse_transform(self, X: Any) -> Any:
        """Rows from latent activations.

        Args:
            X: (rows, latents), sparse or dense, as `transform` gives them.

        Returns:
            (rows, features), of X's float type.

        Raises:
            ValueError: X has another number of latents.
        """
        check_is_fitted(self)
        codes = check_array(X, accept_sparse="csr", dtype=[np.float64, np.float32])
        if codes.shape[1] != self.dictionary_.d_sae:
            raise ValueError(
                f"X must have a column for each of the {self.dictionary_.d_sae} latents, got {codes.shape[1]}. "
                "Pass what transform gave."
            )
        sparse = scipy.sparse.csr_matrix(codes)
        with torch.no_grad():
            recon = [
                self.dictionary_.decode(_encoded_of(sparse[start : start + BLOCK]))
                for start in range(0, sparse.shape[0], BLOCK)
            ]
        return torch.cat(recon).numpy().astype(codes.dtype, copy=False)

    def score(self, X: Any, y: Any = None) -> float:
        """Explained variance: 1 - fvu, over all rows of X at once; higher is better, 0 is predicting their mean.

        Args:
            X: (rows, features), dense and finite.
            y: Not used.
        """
        check_is_fitted(self)
        x = self._rows(X, reset=False)
        close = Reconstruction()
        for rows, encoded in zip(torch.split(x, BLOCK), self._encoded(x), strict=True):
            with torch.no_grad():
                close.update(rows, self.dictionary_.decode(encoded))
        return float(close.compute()["explained_variance"].value)

    @property
    def components_(self) -> Float[np.ndarray, "latents features"]:
        """(latents, features): what each latent writes."""
        return self.dictionary_.decoder_directions().detach().numpy()

    @property
    def intercept_(self) -> Float[np.ndarray, " features"]:
        """(features): what is there when no latent is active."""
        nothing = _encoded_of(scipy.sparse.csr_matrix((1, self.dictionary_.d_sae), dtype=np.float32))
        with torch.no_grad():
            intercept: Float[np.ndarray, " features"] = self.dictionary_.decode(nothing)[0].numpy()
        return intercept

    @property
    def _n_features_out(self) -> int:
        return self.dictionary_.d_sae

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # -- in and out --------------------------------------------------------------------------------

    def save(self, path: str | Path, X: Any, *, fresh: bool = False) -> artifact.Artifact:
        """Write the dictionary as every other of ours: `evaluate`, `compare`, `geometry` and `publish` take it.

        Args:
            path: The folder to make.
            X: Rows of which the first 16 and their reconstructions are kept, and checked whenever it is opened.
            fresh: Replace whatever stands at the path.
        """
        check_is_fitted(self)
        return self.dictionary_.save(path, self._rows(X, reset=False), fresh=fresh)

    @classmethod
    def from_dictionary(cls, dictionary: Dictionary | str | Path, **params: Any) -> Self:
        """A fitted estimator from a dictionary that was trained elsewhere.

        Args:
            dictionary: One of ours, or its folder.
            params: The estimator's other parameters, such as sparse_output.

        Raises:
            ArtifactError: the folder holds no dictionary.
            ShapeError: it is a transcoder.
        """
        opened = dictionary if isinstance(dictionary, Dictionary) else dictionaries.load(dictionary)
        opened.check_autoencoder()
        folded = opened.fold().eval().cpu().requires_grad_(False)
        known = folded.config if isinstance(folded.config, ArchitectureConfig) else None
        made = cls(architecture=folded.kind if known is None or folded.kind not in KINDS else known, **params)
        made.dictionary_, made.n_features_in_, made.n_iter_ = folded, folded.d_in, 0
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "dictionary_" in state:
            state["dictionary_"] = _as_arrays(state["dictionary_"])
        stream = state.pop("_stream", None)
        if stream is not None and stream.plan.n_steps == ENDLESS:
            state["_stream"] = {"config": stream.config.resolved(), "state": _arrays(stream.state_dict())}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "dictionary_" in state:
            state["dictionary_"] = _from_arrays(state["dictionary_"])
        stream = state.pop("_stream", None)
        super().__setstate__(state)
        if stream is not None:
            member = self._member(TrainConfig.build(stream["config"]), ENDLESS, _ramped)
            member.load_state_dict(_tensors(stream["state"]))
            self._stream = member


def _ramped(dictionary: Trainable, batch: Batch, x: Tensor, target: Tensor, progress: float) -> Loss:
    """The dictionary's own loss in a run of unknown length: as at the end of one, once penalties have risen."""
    return dictionary.loss(x, target, min(1.0, progress * ENDLESS / RAMP))


# -- arrays ------------------------------------------------------------------------------------------------


def _csr(encoded: Encoded) -> scipy.sparse.csr_matrix:
    """Latent activations as scipy has them: columns in order, none twice, no zeros."""
    encoded = encoded.compact()
    parts = (encoded.acts.numpy(), encoded.indices.numpy(), encoded.row_ptr.numpy())
    codes = scipy.sparse.csr_matrix(parts, shape=(encoded.n_rows, encoded.d_sae))
    codes.sum_duplicates()
    codes.eliminate_zeros()
    return codes


def _encoded_of(codes: Any) -> Encoded:
    """And back."""
    return Encoded(
        torch.from_numpy(codes.data.astype(np.float32)),
        torch.from_numpy(codes.indices.astype(np.int32)),
        torch.from_numpy(codes.indptr.astype(np.int64)),
        int(codes.shape[1]),
    )


def _as_arrays(dictionary: Dictionary) -> dict[str, Any]:
    """A dictionary as plain values and arrays, which a pickle may hold without this package's classes."""
    return {
        "kind": dictionary.kind,
        "config": dictionary.config.resolved(),
        "shape": (dictionary.d_in, dictionary.d_out, dictionary.d_sae),
        "sites": None if dictionary.sites is None else dictionary.sites.resolved(),
        "tensors": _arrays(dictionary.state_dict()),
    }


def _from_arrays(state: Mapping[str, Any]) -> Dictionary:
    if state["kind"] not in REGISTRY:
        raise ArtifactError(
            "a pickled dictionary must be of a known architecture",
            repr(state["kind"]),
            nearest(state["kind"], sorted(REGISTRY)),
        )
    sites = None if state["sites"] is None else Sites.build(state["sites"])
    d_in, d_out, d_sae = state["shape"]
    dictionary = REGISTRY[state["kind"]].rebuild(state["config"], d_in, d_out, d_sae, sites)
    dictionary.load_state_dict(_tensors(state["tensors"]))
    return dictionary.eval().requires_grad_(False)


def _arrays(value: Any) -> Any:
    """Nested dictionaries with arrays for tensors."""
    if isinstance(value, Mapping):
        return {name: _arrays(inner) for name, inner in value.items()}
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Any:
    """And back; copies, for arrays may be mapped from a file that must not be written to."""
    if isinstance(value, Mapping):
        return {name: _tensors(inner) for name, inner in value.items()}
    return torch.tensor(value) if isinstance(value, np.ndarray) else value
