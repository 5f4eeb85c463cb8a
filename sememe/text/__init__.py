"""Text to token rows: embedded corpora, files and hub data sets, mixed, split, tokenized, traceable.

Knows documents, corpora and the token policy. Knows nothing about language models: a tokenizer is any object
with the methods of a Hugging Face one, and this package never imports transformers.

    config.py      TextConfig, TokenPolicy: what can be chosen
    documents.py   what a document is, how it is cut, on which side of a split it lies
    extract.py     plain documents out of each package's files
    corpora.py     the embedded corpora: parts, shares, licences
    cache.py       parts on disk: fetched and cut once, read ever after
    sources.py     documents out of files, folders, URLs, hub data sets
    mixture.py     sources mixed by weight: documents, attributions, fingerprint
    tokens.py      documents to rows of tokens: the token policy at work
"""

from __future__ import annotations

from sememe.text.config import TextConfig, TokenPolicy
from sememe.text.corpora import CORPORA
from sememe.text.documents import Attribution, Document, DocumentInfo, split_of, whole_id
from sememe.text.mixture import Split, attributions, documents, fetch, fingerprint
from sememe.text.tokens import TokenBlock, token_blocks

__all__ = [
    "CORPORA",
    "Attribution",
    "Document",
    "DocumentInfo",
    "Split",
    "TextConfig",
    "TokenBlock",
    "TokenPolicy",
    "attributions",
    "documents",
    "fetch",
    "fingerprint",
    "split_of",
    "token_blocks",
    "whole_id",
]
