"""Which language model is asked, how, and what it may cost. Knows no protocol."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

import pydantic
from pydantic import Field, field_validator, model_validator

from sememe.config import Config, canonical_json
from sememe.errors import ConfigError

__all__ = ["EndpointConfig", "JudgeConfig", "LocalConfig"]


TAKEN = frozenset(
    {
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "seed",
        "stop",
        "stream",
        "n",
        "logprobs",
        "echo",
    }
)
"""Fields of a request that are not the user's to give."""


class EndpointConfig(Config):
    """A server that speaks OpenAI's protocol: OpenAI's own, llama.cpp, Ollama, vLLM and others."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {
            "key_variable",
            "concurrency",
            "timeout_seconds",
            "max_retries",
            "backoff_seconds",
            "max_wait_seconds",
            "prompt_price",
            "completion_price",
            "max_price",
            "max_calls",
            "answers",
        }
    )

    kind: Literal["endpoint"] = "endpoint"
    model: str = Field(default="gpt-4o-mini", min_length=1)
    """The model's name, as the server calls it."""
    base_url: str = "https://api.openai.com/v1"
    """Where the server is, with the /v1 that most have."""
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key. Servers of one's own need none. The key itself is never stored."""
    concurrency: int = Field(default=16, ge=1)
    """Most requests under way at a time."""
    timeout_seconds: float = Field(default=120, gt=0)
    """How long one request may take."""
    max_retries: int = Field(default=6, ge=0)
    """How often a request is sent again when the server is busy, ill or silent."""
    backoff_seconds: float = Field(default=0.5, gt=0)
    """The first wait before a request is sent again; each further one is about twice as long."""
    max_wait_seconds: float = Field(default=120, gt=0)
    """The longest wait; a server that asks for a longer one (a day's quota is spent) ends the run instead."""
    leave_out: tuple[Literal["temperature", "seed", "stop"], ...] = ()
    """Fields of a request that this model refuses."""
    extra_body: str = ""
    """Further fields of a question's request, a JSON object (a table in a recipe), for what a server knows beyond the
    protocol: '{"chat_template_kwargs": {"enable_thinking": false}}' keeps a model from thinking (vLLM, llama.cpp)."""
    slots: Literal["echo", "one_by_one"] = "echo"
    """How the model's distributions at places of a text are read. echo: all in one request that returns the prompt with
    its log-probabilities (vLLM); one_by_one: a request for each place, on servers without (llama.cpp)."""
    n_log_probs: int = Field(default=15, ge=1)
    """How many of the likeliest tokens are asked for at each place; servers have limits (OpenAI 5, vLLM 20)."""
    prompt_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens of prompts, in any currency."""
    completion_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens of answers."""
    max_price: float | None = Field(default=None, gt=0)
    """Most to spend in one run; needs both prices. What was answered before is free."""
    max_calls: int | None = Field(default=None, ge=1)
    """Most questions to send in one run. What was answered before does not count."""
    answers: Path | None = None
    """The file that keeps every answer, for any number of runs; left out: one in the user's cache."""

    @field_validator("extra_body", mode="before")
    @classmethod
    def _extra_body_is_json(cls, value: Any) -> str:
        found = value
        if isinstance(value, str):
            try:
                found = json.loads(value) if value.strip() else {}
            except ValueError:
                found = None
        if not isinstance(found, dict):
            raise ConfigError(
                "extra_body must be a JSON object",
                repr(value),
                """For instance '{"chat_template_kwargs": {"enable_thinking": false}}'.""",
            )
        taken = sorted(TAKEN.intersection(found))
        if taken:
            raise ConfigError(
                "extra_body must leave the fields alone that have options of their own or that a scorer sets",
                ", ".join(taken),
                "Drop them; leave_out is for fields that a model refuses.",
            )
        return canonical_json(found) if found else ""

    @field_validator("base_url", mode="after")
    @classmethod
    def _base_url_is_one(cls, value: str) -> str:
        parts = urlsplit(value)
        if "@" in parts.netloc or parts.query or parts.fragment:
            # Not shown: it may be a password.
            raise ConfigError(
                "base_url must hold no user, password or query",
                "one that does",
                "Put the key into an environment variable, and name that with key_variable.",
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                "base_url must begin with http:// or https://",
                repr(value),
                'For instance "http://localhost:8080/v1".',
            )
        return value.rstrip("/")

    @field_validator("key_variable", mode="after")
    @classmethod
    def _key_is_not_given(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) or value.startswith("sk_"):
            # Not shown: it may be the key itself.
            raise ConfigError(
                "key_variable must be the name of an environment variable",
                "something else",
                "Put the key into a variable and name that: OPENAI_API_KEY.",
            )
        return value

    def identity(self) -> dict[str, Any]:
        """As of every config; without further fields, what it was before there were any: answers are kept by it."""
        found = super().identity()
        return found if self.extra_body else {name: found[name] for name in found if name != "extra_body"}

    @model_validator(mode="after")
    def _prices_go_together(self) -> Self:
        prices = (self.prompt_price, self.completion_price)
        if self.max_price is not None and None in prices:
            raise ConfigError(
                "max_price needs prompt_price and completion_price",
                f"max_price {self.max_price:g} without {'both' if prices == (None, None) else 'one of them'}",
                "Give the prices of a million tokens, or use max_calls.",
            )
        if self.max_price is None and (self.prompt_price is None) != (self.completion_price is None):
            raise ConfigError(
                "prompt_price and completion_price must be given together",
                "one of them",
                "Give both (0 is one).",
            )
        return self


class LocalConfig(Config):
    """A language model in this process."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"device", "device_map", "batch_size", "max_calls", "answers"}
    )

    kind: Literal["local"] = "local"
    model: str = "smollm2-135m"
    """An embedded model's name, a folder, a .gguf file, or a name on the Hugging Face hub (owner/name)."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """auto: bfloat16 where the device multiplies it natively, float32 elsewhere."""
    device: str = "auto"
    """auto: the CUDA device if there is one, else the CPU."""
    device_map: str | None = None
    """Spread a large model over devices ("auto", "balanced", ...); needs the package accelerate."""
    revision: str | None = None
    """A branch, tag or commit of the hub."""
    batch_size: int = Field(default=8, ge=1)
    """Most questions answered at a time. Sums of other lengths are rounded otherwise, so an answer can differ with it
    where two tokens are nearly as likely."""
    max_calls: int | None = Field(default=None, ge=1)
    """Most questions to answer in one run. What was answered before does not count."""
    answers: Path | None = None
    """The file that keeps every answer, for any number of runs; left out: one in the user's cache."""


JudgeConfig = Annotated[EndpointConfig | LocalConfig, pydantic.Field(discriminator="kind")]
