"""Texts that tests of the data share: the built-in documentation, read and built once, and prose of no meaning."""

import os

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus.ingest import read_corpus
from data.corpus.prepare import prepare

WORDS = [
    f"{a}{b}" for a in ("ta", "ri", "mo", "ke", "su", "lan", "por", "vi") for b in ("n", "ro", "le", "st", "mi", "d")
]


def prose(seed, words=200):
    draw = np.random.default_rng(seed)
    return " ".join(draw.choice(WORDS, words)) + ".\n\n"


@pytest.fixture(scope="session")
def documents():
    return list(read_corpus(DataConfig()))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """One folder for all processes of this run: who comes first builds a corpus there, the others wait for it."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"


@pytest.fixture(scope="session")
def stdlib_docs(shared_cache):
    """The default corpus, built once for all tests of this run."""
    return prepare(DataConfig(cache=shared_cache))
