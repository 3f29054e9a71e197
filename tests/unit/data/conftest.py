"""Corpora for the tests of `megasp.data`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megasp.data import IndexedDataset, IndexedDatasetBuilder


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """corpus(lengths): documents of these lengths; token i of the stream is i modulo 60000."""

    def build(lengths: Sequence[int], name: str = "corpus") -> IndexedDataset:
        tokens = np.arange(sum(lengths)) % 60000
        with IndexedDatasetBuilder(tmp_path / name, np.uint16) as builder:
            for part in np.split(tokens, np.cumsum(lengths)[:-1]):
                builder.add_document(part)
        return IndexedDataset(tmp_path / name)

    return build
