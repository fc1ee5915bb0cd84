"""Where documents come from: what is opened, as what it is read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import CONTEXT, stream, texts

from sae_kit.data.sources import Source, open_source
from sae_kit.data.tokens import DataConfig, Documents, TokenStream, held_out_rows
from sae_kit.errors import DataError


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
        opened = open_source(Source(path=str(path), column=column, streaming=streaming)).items
        assert list(opened) == documents
        assert list(opened) == documents, "a second pass"
        shuffled = Documents(opened, seed=0).batch(100).documents
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
    with pytest.raises(DataError, match="'messages' or 'conversations', found columns 'story', 'n'; set column"):
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


def test_a_readme_beside_tables_is_not_data(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        tables(tmp_path, 5)[1 if name == "a.json" else 2].unlink()
        (tmp_path / "a.parquet").unlink()
        (tmp_path / "README.md").write_text("# about")
        assert list(open_source(Source(path=str(tmp_path))).items) == texts(5)


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
    assert list(open_source(Source(path=str(folder), streaming=streaming)).items) == texts(4)
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
    assert list(open_source(Source(path=str(tmp_path))).items) == ["one", "two", None, "three"]
    assert "latin.txt is not UTF-8 text: skipped" in caplog.text
    assert list(open_source(Source(path=str(tmp_path), data_files="*.py")).items) == ["one"]
    assert list(open_source(Source(path=str(tmp_path / "b.txt"))).items) == ["two"]


def test_demo_source_is_split_as_the_corpus_is() -> None:
    from sae_kit.demo import corpus

    documents = open_source(Source(path="demo")).items
    assert sorted(documents) == sorted(corpus().train + corpus().held_out)


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        (
            {"a": "x", "b": "y"},
            "auto",
            "'messages' or 'conversations', found columns 'a', 'b'; set column",
        ),
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
