"""The answers of the server's JSON API as JSON schemas: what /api/openapi.json says of them.

Knows what `Data`, notes and the model's process answer, and computes nothing; a test holds real answers against it.
Columns go together: those of one object have the same length. NaN and infinities are null.
"""

from __future__ import annotations

from typing import Any

from sememe.browse.data.latents import EFFECT_COLUMNS, EXAMPLE_COLUMNS
from sememe.browse.notes import Note, Rating

__all__ = [
    "BOOLEAN",
    "COMPARED",
    "CONTEXTS",
    "DETAILS",
    "EMBEDDINGS",
    "EXAMPLES",
    "GENERATED",
    "GRAPH",
    "INDEX",
    "INTEGER",
    "LATENT",
    "NOTES",
    "NUMBER",
    "OBJECT",
    "OVERVIEW",
    "PAIRS",
    "PROMPTED",
    "RATED",
    "SEARCH",
    "SESSION",
    "STATUS",
    "STRING",
    "TEXT",
    "TOKENS",
    "array",
    "described",
    "mapping",
    "maybe",
    "record",
]

Json = dict[str, Any]

OBJECT: Json = {"type": "object"}
NUMBER: Json = {"type": "number"}
INTEGER: Json = {"type": "integer"}
STRING: Json = {"type": "string"}
BOOLEAN: Json = {"type": "boolean"}


def record(required: tuple[str, ...] = (), **properties: Json) -> Json:
    """An object with named properties."""
    found: Json = {"type": "object", "properties": properties}
    return found | ({"required": list(required)} if required else {})


def full(**properties: Json) -> Json:
    """An object that has all of its properties."""
    return record(tuple(properties), **properties)


def array(items: Json) -> Json:
    """A list."""
    return {"type": "array", "items": items}


def mapping(values: Json) -> Json:
    """An object whose names are data: numbers or names."""
    return {"type": "object", "additionalProperties": values}


def maybe(schema: Json) -> Json:
    """The same, or null."""
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def described(schema: Json, text: str) -> Json:
    """The same with a description."""
    return {**schema, "description": text}


def _columns(schema: Json, *names: str) -> Json:
    return {name: array(schema) for name in names}


MAYBE_NUMBER, MAYBE_INTEGER, MAYBE_STRING = maybe(NUMBER), maybe(INTEGER), maybe(STRING)

# ---- the atlas

_INTERVAL = full(value=MAYBE_NUMBER, low=MAYBE_NUMBER, high=MAYBE_NUMBER)
_FIGURES = mapping(_INTERVAL)
SESSION = full(
    atlases=array(
        record(
            ("name", "write"),
            name=STRING,
            error=described(STRING, "Why it cannot be shown; then it has no more than this."),
            fingerprint=STRING,
            dictionary=described(STRING, "The dictionary's fingerprint; empty for a null's."),
            model=MAYBE_STRING,
            hookpoint=MAYBE_STRING,
            kind=MAYBE_STRING,
            write=BOOLEAN,
        )
    ),
    write=BOOLEAN,
    live=BOOLEAN,
)
OVERVIEW = full(
    api=INTEGER,
    sememe=STRING,
    fingerprint=STRING,
    dictionary=OBJECT,
    text=OBJECT,
    context_length=MAYBE_INTEGER,
    window=described({}, "Tokens kept around an example's peak."),
    histogram_edges=array(NUMBER),
    logit_edges=array(NUMBER),
    position_edges=array(NUMBER),
    report=maybe(full(metrics=_FIGURES, nulls=mapping(_FIGURES))),
    attributions=array({}),
    latents=full(n=INTEGER, alive=INTEGER, dead=INTEGER, l0=MAYBE_NUMBER),
    density=full(log10_edges=array(NUMBER), counts=array(INTEGER)),
    languages=array(full(language=STRING, n=INTEGER)),
    contexts=INTEGER,
    explained=INTEGER,
    frontier=array(record(("name", "own"), name=STRING, own=BOOLEAN)),
    scores=array(
        record(
            ("scorer", "variant", "mean", "low", "high", "n", "nulls", "lift"),
            scorer=STRING,
            variant=STRING,
            mean=MAYBE_NUMBER,
            low=MAYBE_NUMBER,
            high=MAYBE_NUMBER,
            n=INTEGER,
            nulls=mapping(MAYBE_NUMBER),
            lift=maybe(_INTERVAL),
            best_null=MAYBE_STRING,
        )
    ),
    clusters=array(full(id=INTEGER, label=MAYBE_STRING, n=INTEGER, explanation=MAYBE_STRING)),
    embedded=INTEGER,
    placed=INTEGER,
    coactive_tokens=MAYBE_INTEGER,
    effects=BOOLEAN,
    graphs=array(full(name=STRING, kind=STRING, prompt=STRING, n_nodes=INTEGER, n_edges=INTEGER)),
    texts=array(full(prompt=STRING, n_tokens=INTEGER)),
)
INDEX = full(
    **_columns(INTEGER, "id", "n_active", "language", "n_distinct_tokens"),
    **_columns(MAYBE_NUMBER, "density", "max_act", "mean_act", "top_token_share", "language_share"),
    top_token=array(MAYBE_INTEGER),
    languages=described(array(STRING), "What `language` counts; -1 is none."),
    label_tokens=array(array(INTEGER)),
    promoted=array(array(INTEGER)),
    explanation=described(mapping(STRING), "By row."),
)
DETAILS = {
    **record(("cluster", "top_neuron"), cluster=array(MAYBE_INTEGER), top_neuron=array(MAYBE_INTEGER)),
    "additionalProperties": array(MAYBE_NUMBER),
    "description": "Columns by name; those without any value are left out. `x`, `y`: 0 to 9,999.",
}
EMBEDDINGS = full(
    latent=array(INTEGER), width=INTEGER, vectors=described(STRING, "Signed bytes in base64, times 127.")
)
TOKENS = full(
    id=array(INTEGER),
    text=array(STRING),
    bytes=described(mapping(STRING), "By id, in hex, of those that are not UTF-8 by themselves."),
)
_LEADS = full(token=array(INTEGER), latents=array(array(INTEGER)))
SEARCH = full(promoted=_LEADS, peaks=_LEADS)
GRAPH = full(
    name=STRING,
    format_version=INTEGER,
    kind={"enum": ["attribution", "linear"]},
    model=STRING,
    prompt=full(ids=array(INTEGER), tokens=array(STRING)),
    pair=maybe(OBJECT),
    metric=described(OBJECT, "What is explained: name, text, clean, patched."),
    dictionaries=array(
        full(name=STRING, hookpoints=array(STRING), fingerprint=STRING, d_sae=INTEGER, atlas=MAYBE_STRING)
    ),
    nodes=full(
        id=array(STRING),
        kind=array({"enum": ["latent", "error", "token", "logit"]}),
        **_columns(INTEGER, "layer", "position"),
        **_columns(MAYBE_INTEGER, "dictionary", "latent"),
        **_columns(NUMBER, "act", "effect"),
        **_columns(MAYBE_NUMBER, "exact", "influence"),
        label=array(MAYBE_STRING),
    ),
    edges={
        **record(("from", "to", "weight"), **_columns(INTEGER, "from", "to"), weight=array(NUMBER)),
        "description": "`from` and `to` are places in the nodes' columns.",
    },
    scores=OBJECT,
    checks=OBJECT,
)
TEXT = full(
    prompt=STRING,
    model=STRING,
    ablated=BOOLEAN,
    tokens=full(
        position=array(INTEGER),
        token=array(INTEGER),
        text=array(STRING),
        kept=array(BOOLEAN),
        n_active=array(MAYBE_INTEGER),
        loss_of_next=array(MAYBE_NUMBER),
        bytes=described(array(MAYBE_STRING), "Hex, where a token is not UTF-8 by itself."),
    ),
    latents=array(
        maybe(
            record(
                ("latent",),
                latent=array(INTEGER),
                **_columns(MAYBE_NUMBER, "act", "quantile", "loss_change", "loss_change_after", "kl"),
                raised=array(
                    array(described(array({}), "Token, its text, the change of its log-probability."))
                ),
                lowered=array(array(array({}))),
            )
        )
    ),
)

# ---- one latent

_ENDS = full(tokens=array(INTEGER), values=array(MAYBE_NUMBER))
_LENS = full(promoted=_ENDS, demoted=_ENDS)
_EFFECT = full(
    **{name: MAYBE_NUMBER for name in EFFECT_COLUMNS if name not in ("raised", "lowered")},
    raised=array(described(array({}), "Token, its text, the change of its log-probability.")),
    lowered=array(array({})),
)
_EXAMPLE: Json = {
    "kind": {"enum": ["top", "decile", "random"]},
    **dict.fromkeys(("rank", "context", "position", "start", "stop", "document"), INTEGER),
    "decile": MAYBE_INTEGER,
    "act": NUMBER,
}
assert set(_EXAMPLE) == set(EXAMPLE_COLUMNS)
_FIGURE_NAMES = (
    "density", "max_act", "mean_act", "decoder_norm", "logit_mean", "logit_std", "top_token_share", "language_share",
    "bias", "encoder_decoder_cosine", "max_cos", "mcs", "self_similarity", "skew", "kurtosis",
    "n_effective_neurons", "top_neuron_share", "outlier_share",
)  # fmt: skip
LATENT = full(
    id=INTEGER,
    n_active=INTEGER,
    **dict.fromkeys(_FIGURE_NAMES, MAYBE_NUMBER),
    top_token=MAYBE_INTEGER,
    n_distinct_tokens=MAYBE_INTEGER,
    language=MAYBE_STRING,
    histogram=maybe(array(INTEGER)),
    position_density=maybe(array(MAYBE_NUMBER)),
    position_mean=maybe(array(MAYBE_NUMBER)),
    top_neuron=MAYBE_INTEGER,
    cluster=MAYBE_INTEGER,
    label_tokens=array(INTEGER),
    explanation=MAYBE_STRING,
    explained=maybe(
        record(
            ("scores",),
            scores=array(
                record(
                    ("scorer", "variant", "score", "n"),
                    scorer=STRING,
                    variant=STRING,
                    score=MAYBE_NUMBER,
                    n=MAYBE_INTEGER,
                    deciles=array(MAYBE_NUMBER),
                )
            ),
        )
    ),
    promoted=_ENDS,
    demoted=_ENDS,
    lenses=mapping(_LENS),
    neighbours=array(
        full(kind=STRING, dictionary=MAYBE_STRING, other=array(INTEGER), cosine=array(MAYBE_NUMBER))
    ),
    top_tokens=record(
        token=array(INTEGER),
        **_columns(MAYBE_NUMBER, "share", "mean_act"),
        **_columns(MAYBE_INTEGER, "n_active", "n_seen"),
    ),
    coactive=record(
        other=array(INTEGER), n_both=array(MAYBE_INTEGER), **_columns(MAYBE_NUMBER, "expected", "phi")
    ),
    neurons=record(neuron=array(INTEGER), **_columns(MAYBE_NUMBER, "weight", "share")),
    history=record(step=array(INTEGER), cosine=array(MAYBE_NUMBER)),
    logit_histograms=record(lens=array(STRING), counts=array(array(INTEGER))),
    examples=record(
        (*EXAMPLE_COLUMNS, "positions", "acts"),
        **{name: array(schema) for name, schema in _EXAMPLE.items()},
        positions=array(array(INTEGER)),
        acts=array(array(NUMBER)),
        effect=array(maybe(_EFFECT)),
        removals=array(maybe(full(removed=array(INTEGER), act=array(MAYBE_NUMBER)))),
    ),
)
_DOCUMENT = full(source=MAYBE_STRING, language=MAYBE_STRING, title=MAYBE_STRING, tags=OBJECT)
EXAMPLES = array(
    full(
        **{**_EXAMPLE, "document": maybe(_DOCUMENT)},  # itself, in place of its number
        tokens=array(STRING),
        token_ids=array(INTEGER),
        acts=described(array(NUMBER), "One for each token of the window."),
    )
)
CONTEXTS = full(
    contexts=described(
        mapping(full(tokens=array(INTEGER), documents=array(array(INTEGER)))),
        "By id. Documents are run-length coded: number of the document (-1: padding), number of tokens.",
    ),
    documents=mapping(_DOCUMENT),
)

# ---- beside others

PAIRS = record(
    ("method", "about", "latent", "other", "similarity", "mutual"),
    method={"enum": ["neighbours", "directions", "tokens"]},
    about=STRING,
    latent=array(INTEGER),
    other=array(MAYBE_INTEGER),
    similarity=array(MAYBE_NUMBER),
    mutual=array(maybe(BOOLEAN)),
)
COMPARED = full(
    method={"enum": ["neighbours", "directions", "tokens"]}, other=array(INTEGER), similarity=array(NUMBER)
)

# ---- notes

NOTES = record(
    ("kind", "latents", "ratings"),
    kind={"const": "notes"},
    format_version=INTEGER,
    atlas=described(STRING, "Fingerprint."),
    dictionary=described(STRING, "Fingerprint; empty for a null's."),
    latents=mapping(Note.model_json_schema()),
    ratings=array(Rating.model_json_schema()),
    write=BOOLEAN,
)
RATED: Json = {"anyOf": [Rating.model_json_schema(), {"type": "object", "maxProperties": 0}]}

# ---- the model

_TOKEN = record(
    ("token", "text"),
    token=INTEGER,
    text=STRING,
    bytes=described(STRING, "Hex, where it is not UTF-8 by itself."),
)
_OUTPUT = full(token=INTEGER, text=STRING, change=NUMBER)
PROMPTED = full(
    tokens=array(
        record(
            ("position", "token", "text", "kept", "n_active", "loss_of_next", "latents"),
            **_TOKEN["properties"],
            position=INTEGER,
            kept=described(BOOLEAN, "Whether latents are looked at here."),
            n_active=MAYBE_INTEGER,
            loss_of_next=MAYBE_NUMBER,
            latents=array(
                record(
                    ("latent", "act", "writes"),
                    latent=INTEGER,
                    text=STRING,
                    label=MAYBE_STRING,
                    n_after=MAYBE_INTEGER,
                    **dict.fromkeys(
                        (
                            "act", "writes", "quantile", "share_of_max", "density", "loss_change",
                            "loss_change_after", "kl",
                        ),
                        MAYBE_NUMBER,
                    ),
                    raised=array(_OUTPUT),
                    lowered=array(_OUTPUT),
                )
            ),
        )
    ),
    hookpoints=array(STRING),
    ablated=BOOLEAN,
)  # fmt: skip
_WRITTEN = full(text=STRING, tokens=array(_TOKEN), perplexity=MAYBE_NUMBER)
GENERATED = full(
    prompt=STRING,
    n_prompt_tokens=INTEGER,
    unsteered=_WRITTEN,
    steered=maybe(_WRITTEN),
    added=described(
        array(full(latent=INTEGER, added=NUMBER, strength=NUMBER)), "In units of the latent's activation."
    ),
)
STATUS = record(
    ("state",),
    state={"enum": ["off", "loading", "ready", "busy", "failed"]},
    reason=STRING,
    about=OBJECT,
    waiting=INTEGER,
    job=maybe(full(name=STRING, verb=STRING, done=INTEGER, of=INTEGER)),
)
