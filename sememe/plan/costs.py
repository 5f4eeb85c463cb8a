"""What each stage takes, in bytes and seconds. Pure arithmetic: opens no file, asks no machine.

Floating-point operations are counted from shapes; what comes on top of them (element-wise work, sparse entries,
text, start-up) is bytes or seconds per unit, fitted once to measurements on the demo (docs/plan.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sememe.lm import Outline
from sememe.needs import BASE, FAST, FLOAT32, SPARSE, Bytes, Dictionary
from sememe.plan.machine import Speed

__all__ = [
    "BASE",
    "Arms",
    "Bytes",
    "Dictionary",
    "EffectsWork",
    "FitRows",
    "checkpoint_seconds",
    "directions_bytes",
    "directions_seconds",
    "effects_bytes",
    "effects_seconds",
    "evaluate_bytes",
    "evaluate_seconds",
    "explain_bytes",
    "explain_seconds",
    "export_bytes",
    "export_seconds",
    "forward_seconds",
    "harvest_bytes",
    "harvest_seconds",
    "head_seconds",
    "interpret_bytes",
    "interpret_seconds",
    "prompts_bytes",
    "prompts_seconds",
    "reading_seconds",
    "train_seconds",
    "watch_ce_seconds",
    "watch_seconds",
]

ROW_IDS = 12
"""Bytes of a stored row beside its activations: token, document, position."""
FORWARD_BYTES = 420
"""Element-wise bytes per token, layer and feature of the residual."""
LOGIT_BYTES = 48
"""Element-wise bytes per prediction and vocabulary entry: softmax, cross-entropy, KL."""
FAST_PRODUCTS = 1.2
"""Encoder products per step of a fast architecture, and of a sparse one."""
DENSE_PRODUCTS = 8.0
"""Float32 products per step of the others."""
SETTLING_PRODUCTS = 14.0
"""Float32 products per step of a sparse architecture while it is dense: measured with half of the latents active."""
SPARSE_ENTRY_BYTES = 7.5
"""As ENTRY_BYTES, of entries above a threshold: the slope between l0 30, 91 and 320 (docs/benchmarks.md)."""
ENTRY_BYTES = 24
"""Bytes per active latent and feature in a training step: decoding and both sparse gradients."""
PARAMETER_BYTES = 145
"""Bytes per parameter and step: gradient and optimiser."""
TEXT_SECONDS = 1.5e-5
"""Per token: reading, tokenising and packing."""
COLLECT_SECONDS = 6e-7
"""Per active latent and token: the atlas's statistics and examples."""
MODEL_START = 8.0
"""Seconds to import and load a small language model and its tokenizer."""
START = 3.0
"""Seconds of imports and of opening artifacts."""
EXPORT_PER_LATENT = 1 / 1500
EXPLAIN_PER_LATENT = 1 / 60
DIRECTIONS_BLOCK = 4e8
"""Memory of a block of cosines."""
COMPARISON_BYTES = 2e6
"""On disk: the page of a comparison."""
ATLAS_BYTES = 6500
"""On disk, per latent."""
MAP_START, MAP_SECONDS = 12.0, 1.5e-3
"""Of the map's library to load and compile, and of each latent on it."""
SAMPLE_ROWS = 8192
"""Rows from which dictionaries, and their untrained nulls, start."""
MEDIAN_STEPS = 40
"""Passes over these until their geometric median has settled."""
FIT_BYTES = 24.0
"""Per feature of rows whose covariance is summed: as they are stored, in float32, in float64, centred."""
MEASURED_BYTES = 200.0
"""Per feature and row of each arm: squared errors and spreads in float64, of kept rows and of all."""
WATCHED_BYTES = 60.0
"""Per feature and held-out row: the error in float64."""
READ_BYTES = 20.0
"""Per feature and training row: gathered from a shuffled group, widened, scaled."""
LOGGED_BYTES = 40.0
"""Per feature and row of a step that is logged: how far its targets spread."""
HASHED = 1e9
"""Bytes per second of checking a file's hash."""
TWIN_ROWS = 8192
"""Rows of the shuffled model of which a twin's mean is taken."""
PAIR_COUNTS = 2**26
"""Pairs of latents counted at once."""
SITE_BYTES = 4000
"""On disk, per latent."""


def forward_seconds(lm: Outline, speed: Speed, first: int, last: int, context_length: int) -> float:
    """Per token, of layers first to last - 1."""
    elementwise = FORWARD_BYTES * lm.d_model * (last - first) / speed.bandwidth
    return lm.flops(first, last, context_length) / speed.model + elementwise


def head_seconds(lm: Outline, speed: Speed) -> float:
    """Per prediction: the unembedding and what is made of its logits."""
    return lm.head_flops / speed.model + LOGIT_BYTES * lm.vocab_size / speed.bandwidth


def _model_bytes(lm: Outline, n_positions: int) -> tuple[float, float]:
    """Weights and a forward's activations: in host memory, on the GPU."""
    held = lm.n_bytes + 4.0 * n_positions * (3 * lm.d_inner + 6 * lm.d_model)
    return (held, 0.0) if lm.device == "cpu" else (0.2 * lm.n_bytes, held)


def _encode_seconds(dictionary: Dictionary, speed: Speed) -> float:
    """Per row."""
    rate = speed.encoder if dictionary.kind in FAST | SPARSE else speed.dense
    return 1.3 * dictionary.product / rate


# -- harvest ---------------------------------------------------------------------------------------


def harvest_bytes(
    lm: Outline, widths: int, n_rows: int, shard_rows: int, batch_rows: int, context_length: int
) -> Bytes:
    """Args: widths: features of all hookpoints together; n_rows: rows kept; shard_rows: rows of one shard."""
    host, gpu = _model_bytes(lm, batch_rows * context_length)
    # The parts of one shard and their shuffled copy, while the next one's parts are made.
    shard = 3.0 * min(shard_rows, n_rows) * (2 * widths + ROW_IDS)
    return Bytes(BASE + host + shard, float(n_rows) * (2 * widths + ROW_IDS), gpu)


def harvest_seconds(
    lm: Outline, speed: Speed, n_layers: int, n_tokens: int, context_length: int, n_bytes: float
) -> float:
    """Args: n_layers: layers that run; n_bytes: size of the store."""
    forward = forward_seconds(lm, speed, 0, n_layers, context_length)
    writing = 4 * n_bytes / speed.bandwidth
    return MODEL_START + n_tokens * (forward + TEXT_SECONDS) + writing


# -- train -----------------------------------------------------------------------------------------


def train_seconds(
    sizes: Sequence[Dictionary], speed: Speed, batch_size: int, n_steps: int, log_every: int = 50
) -> float:
    """The start from a sample, and every step: reading, products, sparse entries, parameters, the log."""
    step = 0.0
    width = max((size.d_in + size.d_out for size in sizes), default=0) / 2
    read = READ_BYTES * width
    start = START
    for size in sizes:
        l0s = size.l0s()
        step += sum(batch_size * _row_seconds(size, speed, l0) for l0 in l0s) / len(l0s)
        step += PARAMETER_BYTES * size.n_parameters / speed.bandwidth
        step += batch_size * LOGGED_BYTES * size.d_out / log_every / speed.bandwidth
        # the median of the inputs and that of the targets; of an architecture with thresholds, a product
        start += 2 * MEDIAN_STEPS * 12.0 * SAMPLE_ROWS * width / speed.bandwidth
        start += SAMPLE_ROWS / 2 * size.product / speed.dense if size.kind in SPARSE else 0.0
    return start + n_steps * (step + batch_size * read / speed.bandwidth)


def reading_seconds(held: float, n_passes: float, speed: Speed) -> float:
    """Hashes are checked once. Args: held: bytes of a store at the hookpoints that are read; n_passes: over it."""
    return held / HASHED + n_passes * 6 * held / speed.bandwidth


def checkpoint_seconds(sizes: Sequence[Dictionary], speed: Speed, seconds: float, every: float) -> float:
    """Weights and moments written and hashed. Args: seconds: of the run; every: seconds between two of them."""
    n = seconds / max(every, 1.0)
    return n * sum(3 * size.n_bytes * (1 / HASHED + 4 / speed.bandwidth) for size in sizes)


def _row_seconds(size: Dictionary, speed: Speed, l0: float) -> float:
    """Products and entries of a training row at some l0."""
    if size.dense(l0):
        products = (SETTLING_PRODUCTS if size.kind in SPARSE else DENSE_PRODUCTS) / speed.dense
        per_entry = 0.0 if size.kind in SPARSE else ENTRY_BYTES  # the former take all of them at once
    else:
        products = FAST_PRODUCTS / (speed.dense if size.kind in FLOAT32 else speed.encoder)
        per_entry = SPARSE_ENTRY_BYTES if size.kind in SPARSE else ENTRY_BYTES
    entries = per_entry * l0 * (size.d_in + size.d_out) / 2
    return products * size.product + entries / speed.bandwidth


def watch_seconds(sizes: Sequence[Dictionary], speed: Speed, n_rows: int) -> float:
    """Encoding and decoding held-out rows, and their errors, of all looks together."""
    decoded = sum((8.0 * size.l0 + WATCHED_BYTES) * size.d_out for size in sizes) / speed.bandwidth
    return n_rows * (sum(_encode_seconds(size, speed) for size in sizes) + decoded)


def watch_ce_seconds(
    lm: Outline, speed: Speed, n_tokens: int, n_layers_above: Sequence[int], context_length: int
) -> float:
    """Splicing reconstructions in. Args: n_tokens: of all looks together; n_layers_above: for each dictionary."""
    per_token = 0.0
    for above in n_layers_above:
        per_token += forward_seconds(lm, speed, lm.n_layers - above, lm.n_layers, context_length)
        per_token += head_seconds(lm, speed)
    return MODEL_START + n_tokens * per_token


# -- evaluate --------------------------------------------------------------------------------------


class Arms(NamedTuple):
    """What is measured beside one another, as numbers of dictionaries."""

    n_whole: int
    """With weights of their own: the ones in question and their nulls."""
    n_parts: int = 0
    """Some latents of one of those: no weights, but a forward and activations each."""
    n_twins: int = 0
    """Of the model with its weights shuffled, which is held beside the model, once; each on forwards of its own."""
    n_unmeasured: int = 0
    """Held for their directions alone."""

    @property
    def n_spliced(self) -> int:
        """Spliced into the model itself."""
        return self.n_whole + self.n_parts


class FitRows(NamedTuple):
    """The training rows that the mean and the nulls of an evaluation are fitted on."""

    n_rows: int
    at_once: int
    """Of a store, those of a shard; else of a forward."""
    n_layers: int
    """Layers of the language model that run for them; 0 where a store is read."""


def evaluate_bytes(
    lm: Outline, dictionary: Dictionary, arms: Arms, batch_rows: int, context_length: int, fit: FitRows
) -> Bytes:
    """Either fitting, or the pass. Args: arms: what is measured; all are taken to be of the dictionary's size."""
    n_positions = batch_rows * context_length
    host, gpu = _model_bytes(lm, n_positions)
    n_held = arms.n_whole + arms.n_twins + arms.n_unmeasured
    held = (
        n_held * dictionary.n_bytes
        + 4.0 * n_positions * (2 + arms.n_spliced) * dictionary.d_out
        + 4.0 * 3 * n_positions * dictionary.d_sae
    )
    logits = 4.0 * 256 * lm.vocab_size * 8
    moments = 8.0 * 3 * dictionary.d_out**2 + 4.0 * SAMPLE_ROWS * (dictionary.d_in + dictionary.d_out)
    fitting = FIT_BYTES * min(fit.at_once, fit.n_rows) * dictionary.d_out + dictionary.n_bytes
    if arms.n_twins:
        more_host, more_gpu = _model_bytes(lm, 0)
        host, gpu = host + more_host, gpu + more_gpu
    if lm.device != "cpu":
        return Bytes(BASE + host + moments, 2e6, gpu + max(held + logits, fitting))
    return Bytes(BASE + host + max(held + logits, fitting) + moments, 2e6)


def evaluate_seconds(
    lm: Outline,
    dictionary: Dictionary,
    speed: Speed,
    n_tokens: int,
    arms: Arms,
    n_layers_above: int,
    context_length: int,
    fit: FitRows,
) -> float:
    """Args: arms: what is measured; n_layers_above: layers that run again for each arm; fit: what comes before."""
    base = forward_seconds(lm, speed, 0, lm.n_layers, context_length) + head_seconds(lm, speed)
    first = lm.n_layers - n_layers_above
    spliced = forward_seconds(lm, speed, first, lm.n_layers, context_length) + head_seconds(lm, speed)
    encode = _encode_seconds(dictionary, speed)
    # The two: zero and mean ablation.
    own = encode + MEASURED_BYTES * dictionary.d_out / speed.bandwidth  # as well as sums over its rows
    per_token = base + (arms.n_spliced + 2) * spliced + arms.n_spliced * own + TEXT_SECONDS
    per_token += arms.n_twins * (base + 3 * spliced + own + TEXT_SECONDS)
    eigen = 30.0 * dictionary.d_out**3 / speed.dense
    start = MODEL_START
    if arms.n_twins:  # another model, and the mean of its rows for each
        start += MODEL_START + arms.n_twins * TWIN_ROWS * (base + TEXT_SECONDS)
    row = FIT_BYTES * dictionary.d_out / speed.bandwidth + 2 * 2.0 * dictionary.d_out**2 / speed.dense
    if fit.n_layers:
        row += forward_seconds(lm, speed, 0, fit.n_layers, context_length) + TEXT_SECONDS
    return start + eigen + fit.n_rows * row + n_tokens * per_token


# -- interpret, explain, export --------------------------------------------------------------------


def interpret_bytes(
    lm: Outline,
    dictionary: Dictionary,
    n_tokens: int,
    slots: int,
    n_random: int,
    batch_rows: int,
    context_length: int,
    shard: float,
    n_nulls: int = 0,
    coactive_tokens: int = 0,
) -> Bytes:
    """Args: slots: examples kept per latent; shard: bytes of a store's shard, if one is read; n_nulls: controls, which
    share a pass of their own; coactive_tokens: those whose active latents go to disk."""
    host, gpu = _model_bytes(lm, batch_rows * context_length)
    # The bound in the docstring of `collect`, with three active tokens per window.
    collector = float(dictionary.d_sae) * (
        4 * 1024 + 16 * 256 + 12 * 16 + (36 + 2 * 6 * 3) * slots + 22 * n_random
    )
    rows = min(batch_rows * context_length, max(2**25 // dictionary.d_sae, 64))
    encoding = 8.0 * rows * dictionary.d_sae
    database = 4.0 * 512 * lm.vocab_size * 2 + 0.3e9
    followed = max(1, n_nulls) * (collector + dictionary.n_bytes)
    pairs = min(4.0 * PAIR_COUNTS, 4.0 * dictionary.d_sae**2)
    memory = BASE + host + followed + encoding + max(database, pairs) + 2 * shard
    entries = 4.0 * dictionary.l0 * min(n_tokens, coactive_tokens)
    disk = (1 + n_nulls) * ATLAS_BYTES * dictionary.d_sae + 8.0 * n_tokens
    return Bytes(memory, disk + max(1, n_nulls) * (collector + entries), gpu)


def interpret_seconds(
    lm: Outline,
    dictionary: Dictionary,
    speed: Speed,
    n_tokens: int,
    n_layers: tuple[int, ...],
    context_length: int,
    n_nulls: int = 0,
) -> float:
    """Args: n_layers: layers of the language model that run, of each pass; 0 where a store is read."""
    forward = sum(forward_seconds(lm, speed, 0, n, context_length) + TEXT_SECONDS for n in n_layers)
    own = _encode_seconds(dictionary, speed) + COLLECT_SECONDS * dictionary.l0
    logits = 2.0 * dictionary.d_sae * lm.d_model * lm.vocab_size / speed.model
    written = logits + dictionary.d_sae / 1000 + MAP_SECONDS * dictionary.d_sae
    return MODEL_START + MAP_START + n_tokens * (forward + (1 + n_nulls) * own) + (1 + n_nulls) * written


def directions_bytes(sizes: Sequence[Dictionary]) -> Bytes:
    """Args: sizes: the dictionaries whose directions are compared, all of them held."""
    return Bytes(BASE + sum(size.n_bytes for size in sizes) + DIRECTIONS_BLOCK, COMPARISON_BYTES)


def directions_seconds(sizes: Sequence[Dictionary], speed: Speed) -> float:
    """Every dictionary's directions with every other's, both ways."""
    width, total = max(size.d_out for size in sizes), sum(size.d_sae for size in sizes)
    products = 2.0 * width * (total**2 - sum(size.d_sae**2 for size in sizes))
    return START + products / speed.dense


class EffectsWork(NamedTuple):
    """What `effects` has to do."""

    n_latents: int
    n_examples: int
    """Ablated of each latent."""
    n_new: int
    """Tokens that run again for each: the position and those after it."""
    n_removals: int
    """Examples that are read again without each token before their peak."""
    before: int
    """Tokens of a window before its peak."""
    n_contexts: int
    """That the atlas's text has."""


def effects_bytes(
    lm: Outline, dictionary: Dictionary, batch_rows: int, context_length: int, n_ablations: int
) -> Bytes:
    """Args: n_ablations: rows of the table."""
    host, gpu = _model_bytes(lm, batch_rows * context_length)
    keys = 4.0 * batch_rows * context_length * lm.d_model * lm.n_layers
    logits = LOGIT_BYTES / 8 * batch_rows * context_length * lm.vocab_size
    held = dictionary.n_bytes + keys + logits + 400.0 * n_ablations
    if lm.device != "cpu":
        return Bytes(BASE + host, 200.0 * n_ablations, gpu + held)
    return Bytes(BASE + host + held, 200.0 * n_ablations)


def effects_seconds(
    lm: Outline, speed: Speed, work: EffectsWork, n_above: int, n_read: int, context_length: int
) -> float:
    """Args: n_above: layers that run again after an ablation; n_read: layers up to the dictionary's input."""
    n_ablations = work.n_latents * work.n_examples
    # Each context is read once, as far as its examples need; few latents share few contexts.
    n_contexts = work.n_contexts * (1 - math.exp(-n_ablations / max(work.n_contexts, 1)))
    whole = forward_seconds(lm, speed, 0, lm.n_layers, context_length)
    again = forward_seconds(lm, speed, lm.n_layers - n_above, lm.n_layers, context_length)
    again += 2 * head_seconds(lm, speed)  # the predictions before as well as after
    removal = forward_seconds(lm, speed, 0, n_read, context_length)
    n_removed = work.n_removals * work.before * (work.before + 1) / 2
    return (
        MODEL_START
        + n_contexts * 0.7 * context_length * whole
        + n_ablations * work.n_new * again
        + n_removed * removal
    )


PROMPT_TOKENS, PROMPT_BYTES = 40, 450_000.0
"""Of a chosen text: its tokens, and its file with a few dozen latents on each."""


def prompts_bytes(lm: Outline, dictionary: Dictionary, n_texts: int) -> Bytes:
    """The model, the dictionary, and a text at a time."""
    host, gpu = _model_bytes(lm, PROMPT_TOKENS)
    held = dictionary.n_bytes + LOGIT_BYTES / 8 * PROMPT_TOKENS * lm.vocab_size
    if lm.device != "cpu":
        return Bytes(BASE + host, PROMPT_BYTES * n_texts, gpu + held)
    return Bytes(BASE + host + held, PROMPT_BYTES * n_texts)


def prompts_seconds(lm: Outline, speed: Speed, n_texts: int) -> float:
    """One forward of each text, with its predictions."""
    token = forward_seconds(lm, speed, 0, lm.n_layers, PROMPT_TOKENS) + head_seconds(lm, speed)
    return MODEL_START + n_texts * PROMPT_TOKENS * token


def explain_bytes(d_sae: int, n_nulls: int = 0) -> Bytes:
    """Memory for an atlas's examples, and the tables, one for the dictionary and each null."""
    return Bytes(BASE + 60_000.0 * d_sae, 400.0 * d_sae * (1 + n_nulls))


def explain_seconds(d_sae: int, n_nulls: int = 0) -> float:
    """Finding and scoring rules, shuffled ones included, for the dictionary and each null."""
    return START + (1 + n_nulls) * d_sae * EXPLAIN_PER_LATENT


def export_bytes(d_sae: int) -> Bytes:
    """Memory for a query's latents, and the site."""
    return Bytes(BASE + 2e8, SITE_BYTES * d_sae)


def export_seconds(d_sae: int) -> float:
    """Writing the site."""
    return START + d_sae * EXPORT_PER_LATENT
