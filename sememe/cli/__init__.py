"""The command line. Knows the verbs' names and where they live; imports one only when it is called.

Flags are made from the verbs' configs (`flags.py`), so that there is one list of options. Errors of ours leave
on one line with exit code 1, wrong usage with 2, Ctrl-C with 130.
"""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

from cyclopts import App, CycloptsError

from sememe import __version__
from sememe.errors import ConfigError, SememeError, nearest

__all__ = ["VERBS", "Verb", "app", "main"]


class Verb(NamedTuple):
    """One command: what it does, in a line, and where it is."""

    help: str
    target: str


VERBS: dict[str, Verb] = {
    "run": Verb("Run a recipe: all its verbs in order, each skipped when its result is there.", "run_recipe"),
    "plan": Verb("Say what a recipe will take: memory, disk and time of each stage.", "plan_recipe"),
    "harvest": Verb("Run a language model over a text and store its activations.", "harvest"),
    "train": Verb(
        "Train a dictionary (topk, relu and others) on a store or straight from a model.", "train_app"
    ),
    "fit": Verb(
        "Fit a baseline or a sparse coder (pca, ica, nmf, ksvd and others) to a store's rows.", "fit_app"
    ),
    "evaluate": Verb("Measure a dictionary on held-out documents, beside its nulls.", "evaluate"),
    "compare": Verb(
        "Compare dictionaries: on the same documents at matched l0, and direction by direction.", "compare"
    ),
    "concepts": Verb("Ask what latents know of labels: probes, ablations, absorption.", "concepts"),
    "geometry": Verb(
        "Ask where latents lie: among neurons, in other dictionaries, over training.", "geometry"
    ),
    "report": Verb("Draw one page from one or several reports.", "report"),
    "lens": Verb("Train a tuned lens: what a model would say if it stopped at a layer.", "lens"),
    "interpret": Verb("Make an atlas: where each latent fires, and what it writes.", "interpret"),
    "explain": Verb("Say in words when each latent fires, and score the words.", "explain"),
    "effects": Verb(
        "Measure what each latent does to the predictions, and what made it fire: real forwards.", "effects"
    ),
    "circuit": Verb(
        "Draw what feeds what on a prompt: the attribution graph through transcoders.", "circuit"
    ),
    "prompt": Verb("Show which latents fire on a text, how strongly, and what each does there.", "prompt"),
    "prompts": Verb("Run some twenty chosen texts through a dictionary, for a site to show.", "prompts"),
    "browse": Verb("Look at an atlas in the web browser, or export it as a site.", "browse"),
    "erase": Verb("Take a labelled concept out of the activations, and count what that costs.", "erase"),
    "steer": Verb(
        "Turn latents up while the model writes: behaviour and perplexity against strength.", "steer"
    ),
    "intervene": Verb("Change a model's latents and see what it says then.", "intervene"),
    "trace": Verb("Trace a number back to latents: which of them made the model say this.", "trace"),
    "patch": Verb(
        "Ask how few latents, taken from one run of the model, make another say the same.", "patch"
    ),
    "scrub": Verb(
        "Test a hypothesised circuit by resampling ablation; what latents do to later ones.", "scrub"
    ),
    "toy": Verb("Train on a planted dictionary and see how much of it is found.", "toy"),
    "pretrain": Verb("Train a small transformer from scratch, to take apart.", "pretrain"),
    "convert": Verb("Read and write other tools' dictionaries.", "convert"),
    "publish": Verb("Gather a dictionary, its report and atlas into a folder for a hub.", "publish"),
    "models": Verb("List the embedded language models and corpora; fetch one.", "models"),
}

app = App(
    name="sememe",
    help="Take a language model apart: learn, measure, explain, browse and use dictionaries of its latents.",
    version=__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `_run` says that the work goes on
)
for _name, _verb in VERBS.items():
    app.command(f"sememe.cli.verbs:{_verb.target}", name=_name, help=_verb.help)
app.register_install_completion_command()


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit code."""
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except SememeError as error:
        print(f"sememe: {error}", file=sys.stderr)
        return error.exit_code
    except CycloptsError as error:
        print(f"sememe: {_usage(error, arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sememe: interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return 0


def _members(command: str) -> tuple[str, ...]:
    """The sub-commands of a command."""
    found = app[command] if command in VERBS else None
    return tuple(name for name in found or () if not name.startswith("-"))


def _usage(error: CycloptsError, arguments: list[str]) -> ConfigError:
    """Cyclopts' complaint in our three parts."""
    command = next((a for a in arguments if not a.startswith("-")), "")
    token = getattr(error, "token", None)
    unused = getattr(error, "unused_tokens", None)
    if type(error).__name__ == "MissingArgumentError" and arguments and arguments[-1].startswith("-"):
        return ConfigError(f"{arguments[-1]} must have a value", "none", f"See `sememe {command} --help`.")
    if command and command not in VERBS:
        return ConfigError("a command must be one of sememe's", repr(command), nearest(command, VERBS))
    members = _members(command) if unused else ()
    if unused and members and unused[0] not in members:
        return ConfigError(
            f"`sememe {command}` must go with one of its kinds", repr(unused[0]), nearest(unused[0], members)
        )
    if unused:
        return ConfigError(
            f"every argument of `sememe {command}` must be known",
            " ".join(unused),
            f"See `sememe {command} --help`.",
        )
    given = getattr(token, "keyword", None) or getattr(token, "value", None)
    if type(error).__name__ == "UnknownOptionError" and given:
        flags = [
            name
            for argument in (getattr(error, "argument_collection", None) or ())
            for name in argument.names
            if name.startswith("--") and not name.startswith("--no-")
        ]
        return ConfigError(
            f"every option of `sememe {command}` must be known",
            given,
            nearest(str(given), flags) if flags else f"See `sememe {command} --help`.",
        )
    text = " ".join(str(error).split()).rstrip(".")
    if type(error).__name__ == "CoercionError" and token is not None:
        flag, value = token.keyword or "an argument", repr(token.value)
        _, choices, names = text.partition("Choose from: ")
        if choices:
            known = re.findall(r'"([^"]*)"', names.partition(". Did")[0])
            return ConfigError(
                f"{flag} must be one of {', '.join(known)}", value, nearest(token.value, known)
            )
        kind = getattr(getattr(error, "target_type", None), "__name__", "value of its type")
        return ConfigError(f"{flag} must be a valid {kind}", value, f"See `sememe {command} --help`.")
    return ConfigError(f"`sememe {command}` must be called rightly", text, f"See `sememe {command} --help`.")
