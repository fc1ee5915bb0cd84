"""From sources to rows: what is read, in which order, on which side of the split, and what is refused."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_kit.config import structure, unstructure
from sae_kit.data.holdout import is_held_out
from sae_kit.data.sources import Source, open_source
from sae_kit.data.tokens import DataConfig, Documents, TokenStream, excluded_ids, held_out_rows
from sae_kit.errors import ConfigError, DataError

CONTEXT = 8


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def texts(count: int, length: int = 10) -> list[str]:
    return [words(*(((7 * i) + j) % 61 for j in range(length))) + f" w{i % 61}" * (i // 61) for i in range(count)]


def stream(tokenizer: Any, documents: Any, **options: Any) -> TokenStream:
    seed = options.pop("seed", 0)
    cfg = DataConfig(**{"context_size": CONTEXT, "holdout": 0.0, "shuffle": False, **options})
    return TokenStream.from_config(cfg, tokenizer, documents=documents, seed=seed)


def test_rows_are_the_documents_between_bos(tokenizer: Any) -> None:
    rows = stream(tokenizer, iter([words(1, 2, 3), words(4, 5, 6, 7, 8)])).take(9).ids
    assert rows.tolist() == [[0, 4, 5, 6, 0, 7, 8, 9]]
    assert rows.dtype == torch.int64


def test_marks_come_from_the_tokenizer_or_are_ids(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    documents = [words(1, 2, 3), words(4, 5, 6, 7, 8, 9, 10)]
    rows = stream(tokenizer, iter(documents), row_start=None, separator="eos", doc_start=9).take(9).ids
    assert rows.tolist() == [[9, 4, 5, 6, 1, 9, 7, 8]]
    rows = stream(tokenizer, iter(documents), row_start="sep", separator=None).take(9).ids
    assert rows.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert "the tokenizer has no SEP token: data.row_start is off" in caplog.text


def test_rows_do_not_depend_on_how_many_documents_are_tokenised_at_a_time(tokenizer: Any) -> None:
    documents = texts(50)
    one, many = (stream(tokenizer, documents, tokenize_batch=n).take(40).ids for n in (1, 1000))
    assert torch.equal(one, many)


def test_take_gives_less_at_the_end_and_then_nothing(tokenizer: Any) -> None:
    rows = stream(tokenizer, iter(texts(3, length=7)))
    assert rows.take(2).ids.shape == (2, CONTEXT)
    assert rows.take(5).ids.shape == (1, CONTEXT)
    assert rows.take(5).ids.shape == (0, CONTEXT)


def test_passes_go_on_without_end_and_are_announced(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rows = stream(tokenizer, texts(4, length=7), separator=None).take(12).ids
    assert torch.equal(rows[:4], rows[4:8])
    assert [r.message for r in caplog.records] == [
        "the documents: pass 2 over its 4 documents begins",
        "the documents: pass 3 over its 4 documents begins",
    ]


def test_shuffling_is_seeded_and_differs_from_pass_to_pass(tokenizer: Any) -> None:
    def passes(seed: int) -> tuple[list[list[int]], ...]:
        rows = stream(tokenizer, texts(30, length=7), shuffle=True, seed=seed).take(60).ids.tolist()
        return rows[:30], rows[30:]

    first, second = passes(0)
    assert first != second
    assert sorted(first) == sorted(second)
    assert passes(0) == (first, second)
    assert passes(1)[0] != first


def test_every_document_is_on_one_side(tokenizer: Any) -> None:
    documents = texts(400, length=7)
    cfg = DataConfig(context_size=CONTEXT, holdout=0.2, shuffle=False)
    held = held_out_rows(cfg, tokenizer, 30, documents=documents)
    assert held.shape == (30, CONTEXT)
    kept = [text for text in documents if is_held_out(text, 0.2)]
    expected = [i for ids in tokenizer(kept, add_special_tokens=False)["input_ids"] for i in ids]
    ids = held[held != 0].tolist()
    assert ids == expected[: len(ids)]
    training, evaluation = Documents(documents, share=0.2), Documents(documents, share=0.2, held_out=True)
    assert sorted(training.batch(1000) + evaluation.batch(1000)) == sorted(documents)


def test_held_out_rows_warn_when_there_are_fewer(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    cfg = DataConfig(context_size=CONTEXT, holdout=0.5)
    rows = held_out_rows(cfg, tokenizer, 1000, documents=texts(40))
    assert 0 < len(rows) < 1000
    assert f"gives {len(rows)} of 1000 rows" in caplog.text
    assert torch.equal(rows, held_out_rows(cfg, tokenizer, 1000, documents=texts(40)))


def test_shares_of_sources_hold_to_one_row(tokenizer: Any, tmp_path: Path) -> None:
    sources = []
    for i, weight in enumerate((0.5, 2.0, 1.0)):
        (tmp_path / f"{i}.txt").write_text(words(*[i] * 40))
        sources.append(Source(path=str(tmp_path / f"{i}.txt"), weight=weight))
    cfg = DataConfig(sources=tuple(sources), context_size=CONTEXT, holdout=0.0, row_start=None, separator=None)
    rows = TokenStream.from_config(cfg, tokenizer).take(70).ids
    for j in range(1, 71):
        counts = [(rows[:j, 0] == 3 + i).sum().item() for i in range(3)]
        assert all(abs(count - j * share) <= 1 for count, share in zip(counts, (1 / 7, 4 / 7, 2 / 7), strict=True))


def test_a_source_that_ends_leaves_its_share_to_the_rest(tokenizer: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(words(*[ord(name) - 97] * 40))
    sources = (Source(path=str(tmp_path / "a.txt"), epochs=1), Source(path=str(tmp_path / "b.txt"), epochs=3))
    cfg = DataConfig(sources=sources, context_size=CONTEXT, holdout=0.0, row_start=None, separator=None)
    rows = TokenStream.from_config(cfg, tokenizer).take(100).ids
    assert rows[:, 0].tolist() == [3, 4] * 5 + [4] * 10


def test_shares_are_exact_again_after_a_source_has_ended(tokenizer: Any, tmp_path: Path) -> None:
    sources = []
    for i, (weight, epochs) in enumerate(((8.0, 1), (3.0, None), (1.0, None))):
        (tmp_path / f"{i}.txt").write_text(words(*[i] * 400))
        sources.append(Source(path=str(tmp_path / f"{i}.txt"), weight=weight, epochs=epochs))
    cfg = DataConfig(sources=tuple(sources), context_size=CONTEXT, holdout=0.0, row_start=None, separator=None)
    rows = TokenStream.from_config(cfg, tokenizer).take(150).ids[:, 0]
    ended = int((rows == 3).nonzero().max()) + 1
    assert int((rows == 3).sum()) == 50
    rest = rows[ended:]
    for j in range(1, len(rest) + 1):
        assert abs(int((rest[:j] == 4).sum()) - 0.75 * j) <= 1


@pytest.mark.parametrize("streaming", [True, False])
def test_local_tables(tokenizer: Any, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    documents = texts(20)
    table = tmp_path / "in" / "a.jsonl"
    table.parent.mkdir()
    table.write_text("\n".join(json.dumps({"text": t, "n": i}) for i, t in enumerate(documents)))
    import datasets

    datasets.Dataset.from_list([{"content": t} for t in documents]).to_parquet(tmp_path / "b.parquet")
    for path, column in ((table, "auto"), (table.parent, "text"), (tmp_path / "b.parquet", "auto")):
        opened = open_source(Source(path=str(path), column=column, streaming=streaming))
        assert list(opened) == documents
        assert list(opened) == documents, "a second pass"
        shuffled = Documents(opened, seed=0).batch(100)
        assert sorted(shuffled) == sorted(documents)
        assert (shuffled == documents) == streaming, "only what has a known length is shuffled"


def dataset(documents: list[str], column: str = "text") -> Any:
    import datasets

    return datasets.Dataset.from_dict({column: documents, "n": list(range(len(documents)))})


def test_a_dataset_object_is_read_as_its_column_of_text(tokenizer: Any) -> None:
    documents = texts(30)
    expected = stream(tokenizer, iter(documents)).take(1000).ids
    for given in (dataset(documents), dataset(documents, "content").to_iterable_dataset()):
        rows = stream(tokenizer, given)
        assert torch.equal(rows.take(len(expected)).ids, expected)
        assert len(rows.take(100).ids) == 100, "further passes"
    shuffled, same = (stream(tokenizer, dataset(documents), shuffle=True, seed=0).take(20).ids for _ in range(2))
    assert torch.equal(shuffled, same)
    assert not torch.equal(shuffled, expected[:20])
    with pytest.raises(DataError, match="expected one column 'text' or 'content', found columns 'story', 'n'"):
        stream(tokenizer, dataset(documents, "story"))
    with pytest.raises(DataError, match="the documents: expected text, found no documents"):
        stream(tokenizer, dataset([]))


def tables(folder: Path, number: int) -> list[Path]:
    documents = texts(number)
    dataset(documents).to_parquet(folder / "a.parquet")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in documents]))
    return [folder / name for name in ("a.parquet", "a.jsonl", "a.json")]


def test_documents_of_local_tables_are_counted_for_the_share(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in tables(tmp_path, 300):
        cfg = DataConfig(sources=(Source(path=str(path)),), context_size=CONTEXT)
        assert TokenStream.from_config(cfg, tokenizer).holdout == (0.05,)
        assert len(held_out_rows(cfg, tokenizer, 5)) == 5
        monkeypatch.setattr("sae_kit.data.sources.COUNTED_BYTES", 100)
        assert TokenStream.from_config(cfg, tokenizer).holdout == (0.001,)
        monkeypatch.undo()


def test_shares_and_skipped_documents_can_be_read(tokenizer: Any) -> None:
    rows = stream(tokenizer, [None, *texts(2), ""], holdout=0.25)
    rows.take(1)
    assert (rows.holdout, rows.skipped_documents) == ((0.25,), 2)


def test_a_readme_beside_tables_is_not_data(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        tables(tmp_path, 5)[1 if name == "a.json" else 2].unlink()
        (tmp_path / "a.parquet").unlink()
        (tmp_path / "README.md").write_text("# about")
        assert list(open_source(Source(path=str(tmp_path)))) == texts(5)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_an_empty_table_is_said_or_passed_over(
    tmp_path: Path, suffix: str, streaming: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "in"
    folder.mkdir()
    empty = folder / f"empty{suffix}"
    empty.touch()
    with pytest.raises(DataError, match=rf"empty\{suffix}: expected text, found 1 empty file"):
        open_source(Source(path=str(empty), streaming=streaming))
    for path in tables(folder, 4):
        if path.suffix != suffix:
            path.unlink()
    assert list(open_source(Source(path=str(folder), streaming=streaming))) == texts(4)
    assert f"empty{suffix} is empty: skipped" in caplog.text


@pytest.mark.parametrize("streaming", [True, False])
def test_tables_without_rows_or_broken(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset([]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.jsonl").write_text("\n\n")
    (tmp_path / "d.jsonl").write_text('{"text": "w1"}\n{"text": ')
    for name in ("a.parquet", "b.json", "c.jsonl", "d.jsonl"):
        with pytest.raises(DataError, match=name):
            open_source(Source(path=str(tmp_path / name), streaming=streaming))


def test_an_empty_text_file_is_said(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    cfg = DataConfig(sources=(Source(path=str(tmp_path / "a.txt")),), context_size=CONTEXT)
    with pytest.raises(DataError, match=r"a\.txt: expected text, found 1 documents, 1 of them empty"):
        TokenStream.from_config(cfg, tokenizer).take(1)


def test_local_text_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (("b.txt", "two"), ("a.py", "one"), ("sub/c.md", "three"), ("d.bin", "no")):
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    assert list(open_source(Source(path=str(tmp_path)))) == ["one", "two", None, "three"]
    assert "latin.txt is not UTF-8 text: skipped" in caplog.text
    assert list(open_source(Source(path=str(tmp_path), data_files="*.py"))) == ["one"]
    assert list(open_source(Source(path=str(tmp_path / "b.txt")))) == ["two"]


def test_demo_source_is_split_as_the_corpus_is() -> None:
    from sae_kit.demo import corpus

    documents = open_source(Source(path="demo"))
    assert sorted(documents) == sorted(corpus().train + corpus().held_out)


def test_empty_documents_are_skipped_and_counted() -> None:
    documents = Documents(["a", None, "", "b"])
    assert documents.batch(10) == ["a", "b"]
    assert documents.skipped == 2


def test_a_batch_ends_with_its_pass_and_with_its_size() -> None:
    documents = Documents(["a", "b", "c"], epochs=2)
    assert [documents.batch(2) for _ in range(5)] == [["a", "b"], ["c"], ["a", "b"], ["c"], []]
    long = Documents(["x" * 600_000] * 3, epochs=1)
    assert [len(long.batch(10)) for _ in range(3)] == [2, 1, 0]
    even = Documents(["a", "b"], epochs=1)
    assert [even.batch(2) for _ in range(2)] == [["a", "b"], []]


def once(*items: Any) -> Iterator[Any]:
    yield from items


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "expected text, found 0 documents"),
        ([None, ""], "found 2 documents, 2 of them empty"),
        (once(), "expected text, found 0 documents"),
        (once("w1", 5), "expected text, found int in document 2"),
        (["w1 w2", "w3"], "all its text fills 5 of the 8 places of one row"),
        (once("w1 w2"), "all its text fills 3 of the 8 places"),
    ],
)
def test_text_that_cannot_be_trained_on(tokenizer: Any, documents: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        stream(tokenizer, documents).take(1)


def test_a_split_without_documents_says_what_would_help(tokenizer: Any) -> None:
    def refusal(documents: list[str], share: float) -> str:
        with pytest.raises(DataError) as caught:
            held_out_rows(DataConfig(context_size=CONTEXT, holdout=share), tokenizer, 1, documents=documents)
        return str(caught.value)

    found = "the documents: 3 documents, 0 of them empty, and none is held out at a share of"
    assert refusal(texts(3), 0.0) == f"{found} 0.0; set a larger data.holdout, or eval.at_end=false"
    assert refusal(texts(3), 0.001) == (
        f"{found} 0.001: the corpus has too few documents for that; give more documents, set a larger data.holdout, "
        "or set eval.at_end=false"
    )
    one = refusal(texts(1, length=500), 0.05)
    assert one.endswith("; one document cannot be split: give more documents, or set eval.at_end=false")
    with pytest.raises(
        DataError, match=r"held-out text fills .* a larger data\.holdout or a smaller data\.context_size"
    ):
        held_out_rows(
            DataConfig(context_size=100, holdout=0.5),
            tokenizer,
            1,
            documents=[t for t in texts(9) if is_held_out(t, 0.5)],
        )
    everything = [text for text in texts(9) if is_held_out(text, 0.5)]
    with pytest.raises(DataError, match=r"none is left to train on .* data\.holdout=0 and eval\.at_end=false"):
        stream(tokenizer, everything, holdout=0.5).take(1)


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        ({"a": "x", "b": "y"}, "auto", "expected one column 'text' or 'content', found columns 'a', 'b'; set column"),
        ({"text": "x", "content": "y"}, "auto", "found columns 'text', 'content'"),
        ({"a": "x"}, "text", "expected one column 'text', found columns 'a'"),
        ({"text": [1, 2]}, "auto", "expected text in column 'text', found list"),
    ],
)
def test_columns_that_cannot_be_read(tmp_path: Path, line: dict[str, Any], column: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=message):
        open_source(Source(path=str(tmp_path / "a.jsonl"), column=column))


def test_sources_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot open dataset 'nobody/nothing', split 'train'"):
        open_source(Source(path="nobody/nothing"))
    with pytest.raises(DataError, match=r"expected \.txt, .* files, found none"):
        open_source(Source(path=str(tmp_path)))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"one kind of files, found \.jsonl, \.txt; choose by data_files"):
        open_source(Source(path=str(tmp_path)))


def test_streams_that_cannot_be_made(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="at least one source"):
        TokenStream.from_config(DataConfig(context_size=8), tokenizer)
    with pytest.raises(ConfigError, match=r"data\.context_size"):
        TokenStream.from_config(DataConfig(), tokenizer, documents=["w1"])
    with pytest.raises(ConfigError, match=r"either data\.sources or documents, found both"):
        stream(tokenizer, ["w1"], sources=(Source(path="demo"),))
    for documents, found in (("w1 w2", "str"), ({"train": ["w1"]}, "dict")):
        with pytest.raises(ConfigError, match=f"iterable of strings or one split of a dataset, found {found}"):
            stream(tokenizer, documents)


@pytest.mark.parametrize("mark", ["row_start", "separator", "doc_start"])
@pytest.mark.parametrize("number", [-1, 64, 99_999])
def test_ids_outside_the_vocabulary_are_refused_before_any_text_is_opened(
    tokenizer: Any, mark: str, number: int
) -> None:
    fields: dict[str, Any] = {mark: number, "sources": (Source(path="nobody/nothing"),)}
    with pytest.raises(ConfigError, match=rf"data\.{mark}: expected an id from 0 to 63, found {number}"):
        TokenStream.from_config(DataConfig(context_size=8, **fields), tokenizer)
    assert stream(tokenizer, ["w1 w2"], context_size=2, **{mark: 63}).take(1).ids.shape == (1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_size": 1}, "context_size: expected at least 2, found 1"),
        ({"holdout": 1.0}, "holdout: expected a share"),
        ({"rows_per_forward": 0}, "rows_per_forward: expected at least 1"),
        ({"tokenize_batch": 0}, "tokenize_batch: expected at least 1"),
        ({"sources": [{"path": "x", "weight": 0}]}, r"sources\[0\](\.|: )weight: expected a positive number"),
        ({"sources": [{"path": "x", "epochs": 0}]}, r"sources\[0\](\.|: )epochs: expected at least 1"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structure(DataConfig, fields)


def test_config_round_trip_and_bare_strings() -> None:
    cfg = structure(DataConfig, {"sources": ["demo", {"path": "x", "weight": 2}], "exclude": [0, 5], "row_start": 7})
    assert cfg.sources == (Source(path="demo"), Source(path="x", weight=2.0))
    assert structure(DataConfig, unstructure(cfg)) == cfg


def test_excluded_ids(tokenizer: Any) -> None:
    assert excluded_ids("structural", tokenizer) == (0, 1, 2)
    assert excluded_ids("none", tokenizer) == ()
    assert excluded_ids((7, 5, 7), tokenizer) == (5, 7)
