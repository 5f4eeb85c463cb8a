"""A finished release on its way to a repository of the hub: its card is written for that one. Knows the hub's client.

Knows of a release its files and the lines of its card that say where it is.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from sememe import artifact
from sememe.errors import ConfigError, ResourceError
from sememe.hub import of_the_network
from sememe.publish.private import as_json

__all__ = ["CARD", "LOCAL_FOLDER", "check_repo", "opened", "upload"]

CARD = "README.md"
LOCAL_FOLDER = '"path/to/this/folder"'
OPENED = re.compile(
    r"(?:from huggingface_hub import snapshot_download\n)?from sememe import dictionaries\n\nfolder = Path\(.*\)\n"
)
"""The lines of a card that say where the release is."""


def check_repo(repo: str) -> None:
    """Raise a ConfigError unless the hub's client takes the name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(
            "repo must be a name that the hub takes",
            f"{repo!r} ({str(error).rstrip('.')})",
            "Change --repo.",
        ) from None


def opened(source: str, *imports: str) -> str:
    """The lines that `OPENED` finds."""
    return "\n".join([*imports, "from sememe import dictionaries", "", f"folder = Path({source})", ""])


def _card_for(repo: str, card: str) -> str:
    """A release's card for those who find it in a repository."""
    own = opened(f'snapshot_download("{repo}")', "from huggingface_hub import snapshot_download")
    found = list(OPENED.finditer(card))
    return card[: found[-1].start()] + own + card[found[-1].end() :] if found else card


def _sent(repo: str, release: artifact.Artifact) -> dict[str, Path | bytes]:
    """The files of a release as they go to a repository: its card names it, and meta.json knows the card."""
    files: dict[str, Path | bytes] = {name: release.path / name for name in release.meta["files"]}
    card = _card_for(repo, (release.path / CARD).read_text(encoding="utf-8")).encode()
    about = {"bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    config = {
        **release.meta["config"],
        "repo": None,
    }  # before version 3 it named the first one that it went to
    meta = {**release.meta, "config": config, "files": {**release.meta["files"], CARD: about}}
    return {**files, CARD: card, artifact.META: as_json(meta)}


def upload(release: artifact.Artifact, repo: str, *, private: bool) -> str:
    """Send a release to the hub; files that are there already are not sent again.

    Args:
        release: What to send.
        repo: Where, owner/name.
        private: Whether the repository is made private if it is new.
    Returns:
        Its address.
    Raises:
        ResourceError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder = release.path
    files = _sent(repo, release)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        api.create_commit(repo, operations, commit_message="Upload a Sememe release")
    except HfHubHTTPError as error:
        raise ResourceError(
            f"the hub must accept the upload to {repo}",
            str(error).splitlines()[0],
            f"Log in (hf auth login) and check the name; the folder {folder} is complete, so run it again.",
        ) from None
    except OSError as error:
        raise _unreachable(repo, folder, error) from None
    except Exception as error:  # of a large file the client says only that it failed, and gives the cause
        cause = next(
            (one for one in (error, error.__cause__) if one is not None and of_the_network(one)), None
        )
        if cause is None:
            raise
        raise _unreachable(repo, folder, cause) from None
    return str(url)


def _unreachable(repo: str, folder: Path, error: BaseException) -> ResourceError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResourceError(
        f"the hub must be reachable to upload to {repo}",
        first,
        f"Check the network; the folder {folder} is complete, so run it again.",
    )
