"""Packing is exact: rows of one length, nothing lost, nothing inserted but what was asked for."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_kit.data.packing import Packer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "saelens_packing.json").read_text())
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


@pytest.mark.parametrize("context_size", sorted({case["context_size"] for case in GOLDEN["cases"]}))
def test_rows_are_those_of_saelens_under_all_its_options(context_size: int) -> None:
    cases = [case for case in GOLDEN["cases"] if case["context_size"] == context_size]
    assert len(cases) == 54
    for case in cases:
        packer = Packer(
            context_size,
            row_start=case["begin_batch_token_id"],
            doc_start=case["begin_sequence_token_id"],
            separator=case["sequence_separator_token_id"],
            pack=not case["disable_concat_sequences"],
        )
        assert [row.tolist() for document in GOLDEN["documents"] for row in packer.add(ids(document))] == case["rows"]


def test_one_document_a_row() -> None:
    documents = [[1, 2, 3, 4, 5], [6], [], [7, 8, 9], [100, 10, 11, 12, 13]]

    def alone(short: str, **marks: int) -> tuple[list[list[int]], dict[str, int]]:
        packer = Packer(4, pack=False, short=short, **marks)  # pyright: ignore[reportArgumentType]
        rows = [row.tolist() for document in documents for row in packer.add(ids(document))]
        assert packer.finish() == []
        return rows, {reason: number for reason, number in packer.counters.items() if number}

    assert alone("drop") == (
        [[1, 2, 3, 4], [100, 10, 11, 12]],
        {"blank_documents": 1, "short_documents": 2, "cut_ids": 2},
    )
    assert alone("drop", row_start=100) == (
        [[100, 1, 2, 3], [100, 7, 8, 9], [100, 10, 11, 12]],
        {"blank_documents": 1, "short_documents": 1, "cut_ids": 3},
    )
    assert alone("pad", doc_start=102)[0] == [
        [102, 1, 2, 3],
        [102, 6],
        [102, 7, 8, 9],
        [102, 100, 10, 11],
    ]


def test_what_is_left_at_the_end() -> None:
    for tail, rows, counted in (("drop", [], 3), ("pad", [[100, 4, 5]], 0)):
        packer = Packer(4, row_start=START, tail=tail)  # pyright: ignore[reportArgumentType]
        assert [row.tolist() for row in packer.add(ids([1, 2, 3, 4, 5]))] == [[100, 1, 2, 3]]
        assert [row.tolist() for row in packer.finish()] == rows
        assert packer.counters["tail_ids"] == counted
        assert packer.finish() == []


def test_rows_that_were_packed_before() -> None:
    packer = Packer(4, row_start=START, separator=SEPARATOR, doc_start=DOC)
    assert [row.tolist() for row in packer.add_row(ids([1, 2, 3, 4]))] == [[1, 2, 3, 4]]
    assert [row.tolist() for row in packer.add_row(ids([5, 6]))] == [[100, 102, 5, 6]]
    longer = packer.add_row(ids([10, 11, 12, 13, 14, 15]))
    assert [row.tolist() for row in longer] == [[10, 11, 12, 13]]
    assert packer.row.tolist() == [100, 14, 15]
    cut = Packer(4, pack=False)
    assert [row.tolist() for row in cut.add_row(ids([1, 2, 3, 4, 5, 6]))] == [[1, 2, 3, 4]]
    assert cut.counters["cut_ids"] == 2


def test_packing_goes_on_from_its_state() -> None:
    for cut in range(len(DOCUMENTS)):
        first, second = (Packer(5, row_start=START, separator=SEPARATOR) for _ in range(2))
        expected = [row.tolist() for document in DOCUMENTS for row in first.add(ids(document))]
        whole = Packer(5, row_start=START, separator=SEPARATOR)
        rows = [row.tolist() for document in DOCUMENTS[:cut] for row in whole.add(ids(document))]
        second.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        rows += [row.tolist() for document in DOCUMENTS[cut:] for row in second.add(ids(document))]
        assert (rows, second.counters) == (expected, first.counters)
