"""The server's JSON API, described: what /api/openapi.json answers.

Knows every address, what it takes and how it can fail; the server knows what it does. A test holds the two together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sememe import __version__
from sememe.browse.guard import MAX_BODY_BYTES
from sememe.browse.notes import VERDICTS, Note, Rating

__all__ = ["ENDPOINTS", "Endpoint", "document"]

Json = dict[str, Any]

ATLAS: Json = {
    "name": "atlas",
    "in": "query",
    "description": "Which of the atlases that are served, as /api/session counts them.",
    "schema": {"type": "integer", "minimum": 0, "default": 0},
}
CHOSEN_TEXT: Json = {
    "name": "text",
    "in": "path",
    "required": True,
    "description": "The text's place among those chosen.",
    "schema": {"type": "integer", "minimum": 0},
}
LATENT: Json = {
    "name": "latent",
    "in": "path",
    "required": True,
    "description": "The latent's number.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
}
OBJECT: Json = {"type": "object"}
TEXT: Json = {"type": "string", "maxLength": 20_000}
JOB: Json = {"type": "string", "maxLength": 100, "description": "A name by which it can be cancelled."}


class Endpoint(NamedTuple):
    """One address and method."""

    method: str
    path: str
    summary: str
    answer: Json
    """JSON schema of the answer."""
    parameters: tuple[Json, ...] = ()
    body: Json | None = None
    """JSON schema of what is sent."""
    failures: tuple[int, ...] = ()
    """Statuses it may answer with beside those that every address may."""


def _object(required: tuple[str, ...] = (), **properties: Json) -> Json:
    found: Json = {"type": "object", "properties": properties}
    return found | ({"required": list(required)} if required else {})


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


NUMBER: Json = {"type": "number"}
INTEGER: Json = {"type": "integer"}
STRING: Json = {"type": "string"}
BOOLEAN: Json = {"type": "boolean"}

TOKEN = _object(
    ("token", "text"),
    token=INTEGER,
    text=STRING,
    bytes=STRING | {"description": "Hex, where it is not UTF-8 by itself."},
)
WRITTEN = _object(
    ("text", "tokens", "perplexity"),
    text=STRING,
    tokens=_array(TOKEN),
    perplexity={"type": ["number", "null"]},
)
STATUS = _object(
    ("state",),
    state={"enum": ["off", "loading", "ready", "busy", "failed"]},
    reason=STRING,
    about=OBJECT,
    waiting=INTEGER,
    job={
        "type": ["object", "null"],
        "properties": {"name": STRING, "verb": STRING, "done": INTEGER, "of": INTEGER},
    },
)
PAIRS = _object(
    ("method", "latent", "other", "similarity"),
    method={"enum": ["neighbours", "directions", "tokens"]},
    about=STRING,
    latent=_array(INTEGER),
    other=_array({"type": ["integer", "null"]}),
    similarity=_array({"type": ["number", "null"]}),
    mutual=_array({"type": ["boolean", "null"]}),
)
WITH: Json = {
    "name": "with",
    "in": "query",
    "description": "The atlas to compare with.",
    "schema": {"type": "integer", "minimum": 0, "default": 1},
}
LIVE_FAILURES = (400, 409, 413, 415, 422, 429, 502, 503, 504)
WRITE_FAILURES = (400, 413, 415)

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/api/openapi.json", "This document.", OBJECT),
    Endpoint(
        "GET",
        "/api/session",
        "What is served: the atlases, whether notes may be written, whether a model answers.",
        _object(("atlases", "write", "live"), atlases=_array(OBJECT), write=BOOLEAN, live=BOOLEAN),
    ),
    Endpoint(
        "GET",
        "/api/overview",
        "Where the atlas comes from, vital signs, density histogram, report.",
        OBJECT,
        (ATLAS,),
    ),
    Endpoint("GET", "/api/index", "Every latent, in columns.", OBJECT, (ATLAS,)),
    Endpoint("GET", "/api/tokens", "The strings of all tokens in the atlas.", OBJECT, (ATLAS,)),
    Endpoint("GET", "/api/search", "For each token, the latents it leads to.", OBJECT, (ATLAS,)),
    Endpoint("GET", "/api/details", "The other figures of every latent, in columns.", OBJECT, (ATLAS,)),
    Endpoint("GET", "/api/embeddings", "Where labels lie among meanings.", OBJECT, (ATLAS,)),
    Endpoint(
        "GET",
        "/api/texts/{text}",
        "A chosen text with the latents that fire on it.",
        OBJECT,
        (CHOSEN_TEXT, ATLAS),
    ),
    Endpoint("GET", "/api/latents/{latent}", "One latent.", OBJECT, (LATENT, ATLAS)),
    Endpoint(
        "GET",
        "/api/latents/{latent}/examples",
        "Its examples one by one, with token strings.",
        _array(OBJECT),
        (LATENT, ATLAS),
    ),
    Endpoint(
        "GET",
        "/api/contexts",
        "Whole token rows with their documents; at most 256.",
        _object(("contexts", "documents"), contexts=OBJECT, documents=OBJECT),
        (
            {
                "name": "ids",
                "in": "query",
                "required": True,
                "description": "Numbers with commas between them.",
                "schema": {"type": "string", "pattern": "^[0-9]{1,9}(,[0-9]{1,9}){0,255}$"},
            },
            ATLAS,
        ),
        failures=(400,),
    ),
    Endpoint(
        "GET",
        "/api/compare",
        "Every latent with the one of another atlas that is most like it.",
        PAIRS,
        (WITH, ATLAS),
        failures=(400,),
    ),
    Endpoint(
        "GET",
        "/api/compare/{latent}",
        "The latents of another atlas that are most like one.",
        _object(
            ("method", "other", "similarity"), method=STRING, other=_array(INTEGER), similarity=_array(NUMBER)
        ),
        (LATENT, WITH, ATLAS),
        failures=(400,),
    ),
    Endpoint("GET", "/api/notes", "Stars, tags, notes, explanations by hand, and ratings.", OBJECT, (ATLAS,)),
    Endpoint(
        "POST",
        "/api/notes",
        "Take over exported notes and ratings.",
        OBJECT,
        (ATLAS,),
        _object(("kind", "latents"), kind={"const": "notes"}, latents=OBJECT, ratings=_array(OBJECT)),
        WRITE_FAILURES,
    ),
    Endpoint(
        "PUT",
        "/api/notes/{latent}",
        "Replace what is said of a latent.",
        Note.model_json_schema(),
        (LATENT, ATLAS),
        Note.model_json_schema(),
        WRITE_FAILURES,
    ),
    Endpoint(
        "PUT",
        "/api/ratings",
        "Keep a verdict on a latent; null takes it back.",
        OBJECT,
        (ATLAS,),
        _object(
            ("session", "latent", "verdict"),
            **{
                **Rating.model_json_schema()["properties"],
                "verdict": {"enum": [*VERDICTS, None]},
            },
        ),
        WRITE_FAILURES,
    ),
    Endpoint("GET", "/api/live", "What the model's process is doing.", STATUS),
    Endpoint(
        "POST",
        "/api/live/prompt",
        "Which latents fire on a text, token by token.",
        _object(("tokens",), tokens=_array(OBJECT), hookpoints=_array(STRING), ablated=BOOLEAN),
        body=_object(
            ("text",),
            text=TEXT,
            n_latents={"type": "integer", "minimum": 1, "maximum": 50, "default": 5},
            latents=_array({"type": "integer", "minimum": 0}),
            ablate=BOOLEAN,
            job=JOB,
        ),
        failures=LIVE_FAILURES,
    ),
    Endpoint(
        "POST",
        "/api/live/generate",
        "What the model writes, and what it writes with some latents turned up or down.",
        _object(("unsteered", "steered"), unsteered=WRITTEN, steered={"anyOf": [WRITTEN, {"type": "null"}]}),
        body=_object(
            ("prompt",),
            prompt=TEXT,
            steer=_array(
                _object(
                    ("latent", "strength"),
                    latent={"type": "integer", "minimum": 0},
                    strength={"type": "number", "minimum": -100, "maximum": 100},
                )
            ),
            n_tokens={"type": "integer", "minimum": 1, "maximum": 1000, "default": 40},
            temperature={"type": "number", "minimum": 0, "maximum": 10, "default": 0},
            seed={"type": "integer", "minimum": 0, "default": 0},
            job=JOB,
        ),
        failures=LIVE_FAILURES,
    ),
    Endpoint(
        "POST",
        "/api/live/embed",
        "A text's vector, by the packaged sentence encoder.",
        _object(("vector",), vector=_array(NUMBER), encoder=STRING, fingerprint=STRING),
        body=_object(("text",), text=TEXT, job=JOB),
        failures=LIVE_FAILURES,
    ),
    Endpoint(
        "POST",
        "/api/live/cancel",
        "Stop a job, running or waiting.",
        _object(("cancelled",), cancelled=BOOLEAN),
        body=_object(("job",), job=JOB),
        failures=WRITE_FAILURES,
    ),
)

REASONS = {
    400: "The request is not understood.",
    401: "The token is missing (only where the server listens beyond this machine).",
    403: "A foreign Host, a request from another page, or a server that only reads.",
    404: "There is no such latent or atlas.",
    409: "The job was cancelled.",
    413: f"The body is over {MAX_BODY_BYTES >> 20} MB.",
    414: "The address is too long.",
    415: "The body is not application/json.",
    422: "The model cannot do this.",
    429: "Too many questions wait for the model.",
    500: "The atlas is damaged.",
    502: "The model's process ended.",
    503: "There is no model: the server was started without --live.",
    504: "The model took too long.",
}
ALWAYS = (401, 403, 404, 414, 500)


def document() -> Json:
    """The whole API as an OpenAPI 3.1 document."""
    paths: dict[str, Json] = {}
    for end in ENDPOINTS:
        operation: Json = {
            "summary": end.summary,
            "operationId": f"{end.method.lower()}{end.path.removeprefix('/api').replace('/', '_')}",
            "responses": {
                "200": {
                    "description": "The answer.",
                    "content": {"application/json": {"schema": end.answer}},
                }
            },
        }
        for status in sorted({*ALWAYS, *end.failures}):
            operation["responses"][str(status)] = {
                "description": REASONS[status],
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            }
        if end.parameters:
            operation["parameters"] = list(end.parameters)
        if end.body is not None:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": end.body}},
            }
        paths.setdefault(end.path, {})[end.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sememe browse",
            "version": __version__,
            "description": "Everything the page shows. Activations are in the model's own units.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": {"Error": _object(("error",), error=STRING)}},
    }
