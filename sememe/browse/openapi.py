"""The server's JSON API, described: what /api/openapi.json answers.

Knows every address, what it takes and how it can fail; the server knows what it does. A test holds the two together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sememe import __version__
from sememe.browse.guard import MAX_BODY_BYTES
from sememe.browse.notes import VERDICTS, Note, Rating
from sememe.browse.schemas import (
    BOOLEAN,
    COMPARED,
    CONTEXTS,
    DETAILS,
    EMBEDDINGS,
    EXAMPLES,
    GENERATED,
    GRAPH,
    INDEX,
    LATENT,
    NOTES,
    NUMBER,
    OBJECT,
    OVERVIEW,
    PAIRS,
    PROMPTED,
    RATED,
    SEARCH,
    SESSION,
    STATUS,
    STRING,
    TEXT,
    TOKENS,
    array,
    record,
)

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
CHOSEN_GRAPH: Json = {
    "name": "graph",
    "in": "path",
    "required": True,
    "description": "The graph's place among those shown.",
    "schema": {"type": "integer", "minimum": 0},
}
LATENT_ID: Json = {
    "name": "latent",
    "in": "path",
    "required": True,
    "description": "The latent's number.",
    "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999},
}
ASKED: Json = {"type": "string", "maxLength": 20_000}
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


WITH: Json = {
    "name": "with",
    "in": "query",
    "description": "The atlas to compare with.",
    "schema": {"type": "integer", "minimum": 0, "default": 1},
}
LIVE_FAILURES = (400, 409, 413, 415, 422, 429, 502, 503, 504)
WRITE_FAILURES = (400, 413, 415)
WHAT_IS_IMPORTED = ("kind", "atlas", "dictionary", "latents", "ratings")

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/api/openapi.json", "This document.", OBJECT),
    Endpoint(
        "GET",
        "/api/session",
        "What is served: the atlases, whether notes may be written, whether a model answers.",
        SESSION,
    ),
    Endpoint(
        "GET",
        "/api/overview",
        "Where the atlas comes from, vital signs, density histogram, report.",
        OVERVIEW,
        (ATLAS,),
    ),
    Endpoint("GET", "/api/index", "Every latent, in columns.", INDEX, (ATLAS,)),
    Endpoint("GET", "/api/tokens", "The strings of all tokens in the atlas.", TOKENS, (ATLAS,)),
    Endpoint("GET", "/api/search", "For each token, the latents it leads to.", SEARCH, (ATLAS,)),
    Endpoint("GET", "/api/details", "The other figures of every latent, in columns.", DETAILS, (ATLAS,)),
    Endpoint("GET", "/api/embeddings", "Where labels lie among meanings.", EMBEDDINGS, (ATLAS,)),
    Endpoint(
        "GET",
        "/api/texts/{text}",
        "A chosen text with the latents that fire on it.",
        TEXT,
        (CHOSEN_TEXT, ATLAS),
    ),
    Endpoint(
        "GET",
        "/api/graphs/{graph}",
        "The graph of a prompt: what feeds what, in columns.",
        GRAPH,
        (CHOSEN_GRAPH, ATLAS),
    ),
    Endpoint("GET", "/api/latents/{latent}", "One latent.", LATENT, (LATENT_ID, ATLAS)),
    Endpoint(
        "GET",
        "/api/latents/{latent}/examples",
        "Its examples one by one, with token strings.",
        EXAMPLES,
        (LATENT_ID, ATLAS),
    ),
    Endpoint(
        "GET",
        "/api/contexts",
        "Whole token rows with their documents; at most 256.",
        CONTEXTS,
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
        COMPARED,
        (LATENT_ID, WITH, ATLAS),
        failures=(400,),
    ),
    Endpoint("GET", "/api/notes", "Stars, tags, notes, explanations by hand, and ratings.", NOTES, (ATLAS,)),
    Endpoint(
        "POST",
        "/api/notes",
        "Take over exported notes and ratings, of this atlas or its dictionary.",
        NOTES,
        (ATLAS,),
        record(("kind",), **{name: NOTES["properties"][name] for name in WHAT_IS_IMPORTED}),
        WRITE_FAILURES,
    ),
    Endpoint(
        "PUT",
        "/api/notes/{latent}",
        "Replace what is said of a latent.",
        Note.model_json_schema(),
        (LATENT_ID, ATLAS),
        Note.model_json_schema(),
        WRITE_FAILURES,
    ),
    Endpoint(
        "PUT",
        "/api/ratings",
        "Keep a verdict on a latent; null takes it back.",
        RATED,
        (ATLAS,),
        record(
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
        PROMPTED,
        body=record(
            ("text",),
            text=ASKED,
            n_latents={"type": "integer", "minimum": 1, "maximum": 50, "default": 5},
            latents={**array({"type": "integer", "minimum": 0}), "maxItems": 50},
            ablate=BOOLEAN,
            job=JOB,
        ),
        failures=LIVE_FAILURES,
    ),
    Endpoint(
        "POST",
        "/api/live/generate",
        "What the model writes, and what it writes with some latents turned up or down.",
        GENERATED,
        body=record(
            ("prompt",),
            prompt=ASKED,
            steer={
                **array(
                    record(
                        ("latent", "strength"),
                        latent={"type": "integer", "minimum": 0},
                        strength={"type": "number", "minimum": -100, "maximum": 100},
                    )
                ),
                "maxItems": 20,
            },
            n_tokens={"type": "integer", "minimum": 1, "maximum": 1000, "default": 40},
            temperature={"type": "number", "minimum": 0, "maximum": 10, "default": 0},
            seed={"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1, "default": 0},
            job=JOB,
        ),
        failures=LIVE_FAILURES,
    ),
    Endpoint(
        "POST",
        "/api/live/embed",
        "A text's vector, by the packaged sentence encoder.",
        record(("vector",), vector=array(NUMBER), encoder=STRING, fingerprint=STRING),
        body=record(("text",), text=ASKED, job=JOB),
        failures=LIVE_FAILURES,
    ),
    Endpoint(
        "POST",
        "/api/live/cancel",
        "Stop a job, running or waiting.",
        record(("cancelled",), cancelled=BOOLEAN),
        body=record(("job",), job=JOB),
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
        "components": {"schemas": {"Error": record(("error",), error=STRING)}},
    }
