"""Every error a user can meet. Each says three things on one line: the rule, the value, the remedy.

    SememeError
    ├── ConfigError          an option is unknown, out of range, or without effect (exit code 2)
    ├── ShapeError           a tensor's axes are not what the operation needs
    ├── ModelError           a language model cannot be found, read, or used
    │   └── HookpointError   a hookpoint does not exist in the model
    ├── TextError            a corpus cannot be found, is empty, or is too short
    ├── ActivationError      activations, or a dictionary's weights, are NaN, infinite, or otherwise unusable
    ├── ArtifactError        a folder on disk is not the artifact that was asked for
    │   ├── CorruptError     a file is truncated or does not match its hash
    │   ├── MismatchError    an artifact belongs to another model, layer, policy, config or parent
    │   └── LockError        another run is writing to the same place
    ├── FormatError          another tool's file is not what it claims to be
    ├── ResourceError        not enough memory, disk, or a missing optional package
    ├── JudgeError           a language model that is asked cannot be reached, or refuses
    │   └── LimitError       asking has cost what it may
    └── ServerError          the browser's server cannot be started

Knows nothing about the rest of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ActivationError",
    "ArtifactError",
    "ConfigError",
    "CorruptError",
    "FormatError",
    "HookpointError",
    "JudgeError",
    "LimitError",
    "LockError",
    "MismatchError",
    "ModelError",
    "ResourceError",
    "SememeError",
    "ServerError",
    "ShapeError",
    "TextError",
    "nearest",
]


class SememeError(Exception):
    """An error that a user can mend.

    Args:
        rule: What must hold, e.g. "k must be in [1, d_sae=16384]".
        value: What was found, e.g. "20000".
        remedy: What to do about it, e.g. "Lower k or raise d_sae."
    """

    exit_code = 1

    def __init__(self, rule: str, value: object, remedy: str) -> None:
        self.rule, self.value, self.remedy = rule, value, remedy
        text = " ".join(f"{rule}, got {value}. {remedy}".split())
        super().__init__(text)

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        return type(self), (self.rule, self.value, self.remedy)


class ConfigError(SememeError):
    """An option is unknown, out of range, or without effect."""

    exit_code = 2


class ShapeError(SememeError):
    """A tensor's axes are not what the operation needs."""


class ModelError(SememeError):
    """A language model cannot be found, read, or used."""


class HookpointError(ModelError):
    """A hookpoint does not exist in the model."""


class TextError(SememeError):
    """A corpus cannot be found, is empty, or is too short."""


class ActivationError(SememeError):
    """Activations, or a dictionary's weights, are NaN, infinite, or otherwise unusable."""


class ArtifactError(SememeError):
    """A folder on disk is not the artifact that was asked for."""


class CorruptError(ArtifactError):
    """A file is truncated or does not match its hash."""


class MismatchError(ArtifactError):
    """An artifact belongs to another model, layer, policy, config or parent."""


class LockError(ArtifactError):
    """Another run is writing to the same place."""


class FormatError(SememeError):
    """Another tool's file is not what it claims to be."""


class ResourceError(SememeError):
    """Not enough memory or disk, or an optional package is missing."""


class JudgeError(SememeError):
    """A language model that is asked cannot be reached, or refuses."""


class LimitError(JudgeError):
    """Asking has cost what it may; what was answered is kept."""


class ServerError(SememeError):
    """The browser's server cannot be started."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """ "did you mean 'resid_post.8'?" for a misspelt name, or the known names when none is close."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=n, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"Known: {shown}."
