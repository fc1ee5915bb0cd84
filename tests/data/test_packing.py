"""Packing is exact: rows of one length, nothing lost, nothing inserted but what was asked for."""

import itertools
from typing import Any

import numpy as np
import pytest

from sae_kit.data.packing import Packer

START, SEPARATOR, DOC = 100, 101, 102
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [], [14, 15], [16, 17, 18, 19, 20]]


def ids(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, np.int32)


def pack(documents: list[list[int]], context_size: int, **marks: Any) -> tuple[list[list[int]], list[int]]:
    packer = Packer(context_size, **marks)
    rows = [row.tolist() for document in documents for row in packer.add(ids(document))]
    return rows, packer.row.tolist()


def test_each_mark_by_hand() -> None:
    assert pack([[1, 2, 3], [4, 5]], 4) == ([[1, 2, 3, 4]], [5])
    assert pack([[1, 2, 3], [4, 5]], 4, row_start=START) == ([[100, 1, 2, 3]], [100, 4, 5])
    assert pack([[1, 2], [4, 5]], 4, row_start=START, separator=SEPARATOR) == ([[100, 1, 2, 101]], [100, 4, 5])
    assert pack([[1], [4, 5]], 4, separator=SEPARATOR) == ([[1, 101, 4, 5]], [])
    assert pack([[1], [4, 5]], 5, doc_start=DOC, separator=SEPARATOR) == ([[102, 1, 101, 102, 4]], [5])


def test_a_cut_separator_is_dropped_and_an_unplaced_doc_start_is_carried() -> None:
    rows, rest = pack([[1, 2], [4]], 3, separator=SEPARATOR)
    assert (rows, rest) == ([[1, 2, 101]], [4])
    rows, rest = pack([[1, 2], [4]], 4, doc_start=DOC, separator=SEPARATOR)
    assert (rows, rest) == ([[102, 1, 2, 101]], [102, 4])


def test_no_mark_is_doubled() -> None:
    assert pack([[100, 1], [101, 4]], 8, row_start=START, separator=SEPARATOR)[1] == [100, 1, 101, 4]
    assert pack([[102, 1]], 8, doc_start=DOC)[1] == [102, 1]
    assert pack([[1], [4]], 8, row_start=START, separator=START, doc_start=START)[1] == [100, 1, 100, 4]
    assert pack([[1, 2, 100, 3]], 3, row_start=START) == ([[100, 1, 2]], [100, 3])


@pytest.mark.parametrize("context_size", [2, 3, 4, 7, 64])
@pytest.mark.parametrize("marks", list(itertools.product([None, START], [None, SEPARATOR], [None, DOC])))
def test_without_the_inserted_ids_the_rows_are_the_documents(context_size: int, marks: tuple[int | None, ...]) -> None:
    rows, rest = pack(DOCUMENTS, context_size, **dict(zip(("row_start", "separator", "doc_start"), marks, strict=True)))
    assert all(len(row) == context_size for row in rows)
    assert all(row[0] == marks[0] for row in rows if marks[0] is not None)
    assert len(rest) < context_size
    found = [i for row in [*rows, rest] for i in row]
    assert [i for i in found if i < 100] == [i for document in DOCUMENTS for i in document]
    assert found.count(DOC) == (5 if marks[2] is not None else 0)
