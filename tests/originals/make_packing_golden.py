"""Write tests/golden/saelens_packing.json: the rows that SAELens makes of some documents under each of its options.

Run by an interpreter that has SAELens (README.md beside this file). Some documents begin with one of the marks, some
are empty, some fill rows to the last place; every mark may be any of the others or none.
"""

import itertools
import json
from pathlib import Path

import torch
from sae_lens.tokenization_and_batching import concat_and_batch_sequences

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "saelens_packing.json"
MARKS = (None, 0, 1)
LENGTHS = (3, 1, 0, 9, 2, 5, 17, 4, 1, 1, 6, 30, 7, 8, 2)
CONTEXTS = (2, 3, 4, 7, 16)


def documents() -> list[list[int]]:
    """Ids from 2 on, except that every third document begins with a mark, which also occurs within some."""
    numbers = itertools.count(2)
    made = [[next(numbers) for _ in range(length)] for length in LENGTHS]
    for index, document in enumerate(made):
        if document and index % 3 == 0:
            document[0] = index % 2
        if len(document) > 6:
            document[4] = (index + 1) % 2
    return made


def rows(ids: list[list[int]], context_size: int, **options: int | bool | None) -> list[list[int]]:
    tensors = (torch.tensor(document, dtype=torch.long) for document in ids)
    return [row.tolist() for row in concat_and_batch_sequences(tensors, context_size, **options)]


def main() -> None:
    ids = documents()
    cases = []
    for context_size, start, document, separator, alone in itertools.product(
        CONTEXTS, MARKS, MARKS, MARKS, (False, True)
    ):
        options = {
            "begin_batch_token_id": start,
            "begin_sequence_token_id": document,
            "sequence_separator_token_id": separator,
            "disable_concat_sequences": alone,
        }
        cases.append({"context_size": context_size, **options, "rows": rows(ids, context_size, **options)})
    text = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    GOLDEN.write_text(f'{{"documents":{json.dumps(ids)},\n"cases":[\n{text}\n]}}\n')
    print(f"{len(cases)} cases, {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
