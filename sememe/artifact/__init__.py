"""Folders on disk that are complete or absent. Knows files and hashes, not what is in them; never loads torch.

An artifact is a folder: `meta.json` and files. It is built in `.NAME.partial` beside its final place, every
file is flushed to disk, and the folder is renamed as the last step: whatever is killed when, the final name
holds a whole artifact or nothing. A partial folder of the same identity is picked up again by the next run.

Two hashes tell artifacts apart. The *identity* is known before the work starts: kind, the verb's version, its
config, its parents' fingerprints. The *fingerprint* is known after: identity and the hash of each file.

A path may be an address on object storage (`remote.py`): the artifact is made in a mirror on this machine and sent
when it is whole, meta.json last; opened, its files are fetched into the mirror as they are needed. Or it is an id on
the hub (`hub.py`), to read from.

    files       hashes, JSON, the names beside a folder
    identity    what would be made now, and how it differs from what is there
    finished    those that are there: load, find, below, remove
    building    those being made
    lock        one writer
"""

from __future__ import annotations

from sememe.artifact.building import Work, building
from sememe.artifact.files import META, file_sha256, write_json
from sememe.artifact.finished import Artifact, below, exists, find, here, kind_of, load, remove
from sememe.artifact.identity import FORMAT_VERSION, identity_of

__all__ = [
    "FORMAT_VERSION",
    "META",
    "Artifact",
    "Work",
    "below",
    "building",
    "exists",
    "file_sha256",
    "find",
    "here",
    "identity_of",
    "kind_of",
    "load",
    "remove",
    "write_json",
]
