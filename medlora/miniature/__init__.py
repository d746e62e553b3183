"""The embedded default: a tiny base model and a small Korean medical corpus, both made here in a few minutes."""

from __future__ import annotations

import hashlib
import json
import string
from dataclasses import astuple
from importlib import metadata

from medlora import prompts

FORMAT = 1
"""Raise it when code of this package changes the bytes of the corpus or the base while the tables stay the same.

Such code makes the records, the lessons, the tokenizer, the network and the training. A test compares the records, the
lessons and the tokenizer with those of this format. No test can do so for the trained weights, whose bytes differ from
machine to machine.
"""

_FIRST = "1 62dc57afcee0af974a7a7140e7644ce5e90bde176b2ebb5c007bcad77a68a43e b971049d02f0"
_FIRST_FINGERPRINTS = {
    ("2.11.0", "5.17.0"): "46aea00de045",
    ("2.11.0+cpu", "5.17.0"): "cac18b44d6df",
    ("2.11.0+cu130", "5.17.0"): "605f383a8e87",
    ("2.13.0", "5.23.0"): "14c2f9f85449",
    ("2.13.0+cpu", "5.23.0"): "2673c03d3da9",
    ("2.13.0+cu126", "5.23.0"): "d32b9d4bc590",
    ("2.13.0+cu128", "5.23.0"): "816050574be2",
    ("2.13.0+cu129", "5.23.0"): "3c0557a1ce3a",
    ("2.13.0+cu130", "5.23.0"): "4b0d3d3d1937",
    ("2.13.0+cu132", "5.23.0"): "303a61abdf91",
}
"""What `fingerprint` returned at commit b8b1703 by versions of torch and transformers, while it hashed the source code.

That hash cannot be computed any more. While format, tables and prompts are those of `_FIRST`, the values stay valid, so
that bases and runs made at that time are found again. For other versions the base is built once more.
"""


def fingerprint() -> str:
    """A short hash of what a built miniature depends on besides the seed: format, tables, prompts, versions.

    It needs no torch, so that a driver can find out whether a finished run can be reused. How the source code is written
    does not matter.
    """
    made_by = f"{FORMAT} {hash_tables()} {prompts.version()}"
    versions = metadata.version("torch"), metadata.version("transformers")
    if made_by == _FIRST and versions in _FIRST_FINGERPRINTS:
        return _FIRST_FINGERPRINTS[versions]
    return hashlib.sha256(" ".join((made_by, *versions)).encode()).hexdigest()[:12]


def hash_tables() -> str:
    """sha256 of the data that the miniature is made from: facts, wording, and every number of `settings` by its name."""
    from medlora.miniature import corpus, facts, general, settings, wording

    pairs, ends = ("은/는", "이/가", "을/를", "으로/로"), f"가각갈{string.ascii_letters}{string.digits}"
    tables = {
        "medical": [astuple(fact) for fact in facts.MEDICAL],
        "general": [astuple(fact) for fact in general.GENERAL],
        "asked": [fact.term for fact in corpus.ASKED],
        "text_only": [fact.term for fact in corpus.TEXT_ONLY],
        "extra_tokens": corpus.EXTRA_TOKENS,
        "statements": wording.STATEMENTS,
        "questions": wording.QUESTIONS,
        "particles": [[wording.particle(end, pair) for pair in pairs] for end in ends],
        "english": wording.word_fact_in_english(facts.MEDICAL[0]),
        "settings": {name: value for name, value in vars(settings).items() if name.isupper()},
    }
    return hashlib.sha256(json.dumps(tables, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
