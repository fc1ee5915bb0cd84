"""Where documents come from: what is opened, as what it is read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from texts import CONTEXT, stream, texts

from sae_kit.data.documents import Documents, content, normal
from sae_kit.data.sources import Source, open_source
from sae_kit.data.tokens import DataConfig, TokenStream, held_out_rows
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
    assert list(open_source(Source(path=str(tmp_path), data_dir="sub")).items) == ["three"]
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


def test_a_column_that_begins_with_nothing_is_what_the_config_says(tokenizer: Any, tmp_path: Path) -> None:
    lines = [{"x": None}] * 120 + [{"x": list(range(3, 3 + CONTEXT))}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = (Source(path=str(tmp_path), column="x", kind="tokens"),)
    assert stream(tokenizer, sources=sources).take(1).ids.tolist() == [lines[-1]["x"]]


@pytest.mark.parametrize("name", ["a[1].jsonl", "b?*.jsonl", "ünï c#%20{d}.jsonl"])
def test_names_of_files_are_no_patterns(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run [2]"
    folder.mkdir()
    (folder / name).write_text('{"text": "meant"}')
    for other in ("a1.jsonl", "bcd.jsonl"):
        (folder / other).write_text('{"text": "other"}')
    assert list(open_source(Source(path=str(folder / name))).items) == ["meant"]
    assert sorted(open_source(Source(path=str(folder))).items) == ["meant", "other", "other"]


def test_sources_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot open dataset 'nobody/nothing', split 'train'"):
        open_source(Source(path="nobody/nothing"))
    for path in (str(tmp_path / "nothing"), "./nothing", "~/nothing-here", "nothing.parquet"):
        with pytest.raises(DataError, match=r"nothing.*: there is no such file or folder"):
            open_source(Source(path=path))
    with pytest.raises(DataError, match=r"expected \.txt, .* files, found none"):
        open_source(Source(path=str(tmp_path)))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"one kind of files, found \.jsonl, \.txt; choose by data_files"):
        open_source(Source(path=str(tmp_path)))


# ---- chats, ids, saved datasets --------------------------------------------------------------------------------------

CHATS = [
    [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],
    [{"role": "user", "content": "w4"}, {"role": "assistant", "content": "w5 w6 w7"}],
]
CHAT_IDS = [0, 4, 5, 1, 6, 1, 0, 7, 1, 8, 9, 10, 1]
"""of both, by the template of the tests' tokenizer: BOS, then each message with EOS behind it"""


def from_value(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in chat]


def test_chats_are_written_by_the_template(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"conversations": from_value(chat)}) for chat in CHATS))
    table = datasets.Dataset.from_dict({"messages": CHATS, "prompt": ["x", "y"]})
    for rows in (
        stream(tokenizer, CHATS),
        stream(tokenizer, iter(CHATS)),
        stream(tokenizer, table),
        stream(tokenizer, sources=(Source(path=str(tmp_path / "a.jsonl"), kind="chat"),)),
    ):
        assert rows.take(1).ids.tolist() == [CHAT_IDS[:8]]
        assert "chat" in rows.provenance
        rows.close()


def test_what_tables_fill_up_with_is_no_part_of_a_chat(tokenizer: Any) -> None:
    """Tables give each message the keys of all, and in their own order: the text and the hash stay the same."""
    filled = [[{"tools": None, **dict(reversed(message.items()))} for message in chat] for chat in CHATS]
    template = "{% for m in messages %}{{ m.content }}{% if m.tools is defined %} w9 {% endif %} {% endfor %}"
    expected, found = (stream(tokenizer, chats, chat_kwargs={"chat_template": template}) for chats in (CHATS, filled))
    assert found.take(9).ids.tolist() == expected.take(9).ids.tolist()
    assert content(normal(filled[0], "chat")) == content(normal(CHATS[0], "chat"))


def test_arguments_reach_the_template(tokenizer: Any) -> None:
    kwargs = {"chat_template": "{{ extra }} {{ messages[0].content }}", "extra": "w9"}
    rows = stream(tokenizer, CHATS, chat_kwargs=kwargs, row_start=None, separator=None, context_size=5)
    assert rows.take(1).ids.tolist() == [[12, 4, 5, 12, 7]]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"text": "w1"}], r"expected messages with role and content, found \['text'\] in document 1"),
        ([{"role": "user", "content": "w1"}, "w2"], "expected messages with role and content, found str in document 1"),
        ([{"role": "user", "content": "refuse"}], 'the chat template of the tokenizer refuses .*"refuse".*: no such'),
    ],
)
def test_chats_that_cannot_be_written(tokenizer: Any, chat: Any, message: str) -> None:
    template = "{% if messages[0].content == 'refuse' %}{{ raise_exception('no such') }}{% endif %}"
    with pytest.raises(DataError, match=message):
        stream(tokenizer, [chat], chat_kwargs={"chat_template": template}).take(1)


ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15], list(range(20, 38))]
"""of exactly the context, shorter, and longer"""


def ids_in(folder: Path, kind: str) -> Any:
    import datasets
    import numpy as np

    table = datasets.Dataset.from_dict({"input_ids": ROWS})
    match kind:
        case "lists":
            return ROWS
        case "arrays":
            return [np.array(row, np.uint16) for row in ROWS]
        case "tensors":
            return iter([torch.tensor(row) for row in ROWS])
        case "table":
            return table
        case "stream":
            return table.to_iterable_dataset()
        case "parquet":
            table.to_parquet(folder / "a.parquet")
            return (Source(path=str(folder / "a.parquet"), epochs=1),)
        case "saved":
            table.save_to_disk(folder / "saved")
            return (Source(path=str(folder / "saved"), epochs=1),)
        case _:
            datasets.DatasetDict({"test": table}).save_to_disk(folder / "saved")
            return (Source(path=str(folder / "saved"), split="test", epochs=1),)


@pytest.mark.parametrize(
    "kind", ["lists", "arrays", "tensors", "table", "stream", "parquet", "saved", "saved with splits"]
)
def test_rows_of_ids(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    given = ids_in(tmp_path, kind)
    options = {"sources": given} if isinstance(given, tuple) else {"documents": given}
    rows = stream(tokenizer, **options).take(4).ids.tolist()
    assert rows == [
        ROWS[0],
        ROWS[2][:8],
        [0, 13, 14, 15, 0, 28, 29, 30],
        [0, *ROWS[2][11:]],
    ]


def test_ids_of_any_integer_type(tokenizer: Any) -> None:
    rows = [[numpy.int64(3), numpy.int64(4)] * 4, tuple(ROWS[0]), numpy.array(ROWS[0], numpy.uint16)]
    assert stream(tokenizer, rows).take(3).ids.tolist() == [[3, 4] * 4, ROWS[0], ROWS[0]]


def test_rows_of_ids_are_never_cut_short_unsaid(tokenizer: Any) -> None:
    cut = stream(tokenizer, iter([ROWS[0], ROWS[2]]), pack=False)
    assert cut.take(5).ids.tolist() == [ROWS[0], ROWS[2][:8]]
    assert cut.counters["cut_ids"] == 10
    with pytest.raises(DataError, match=r"expected rows of at least .* ids without .* found one of 3; set a smaller"):
        stream(tokenizer, ROWS, pack=False).take(3)
    padded = stream(tokenizer, iter(ROWS), pack=False, short="pad").take(3)
    assert padded.lengths is not None
    assert padded.lengths.tolist() == [8, 4, 8]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([["w1"]], "expected text, ids or messages, found list of str in document 1"),
        ([[1.5, 2.0]], "expected text, ids or messages, found list of float"),
        ([torch.ones(3)], r"expected a row of integers, found float32 of shape \[3\] in document 1"),
        ([torch.ones(3, 3, dtype=torch.int64)], r"found int64 of shape \[3, 3\]"),
        ([[3, -1]], r"expected ids from 0 to 2\*\*31 - 1, found -1 in document 1"),
        ([b"w1 w2"], "expected text, ids or messages, found bytes in document 1"),
        (["w1", [3]], "expected text, found list of int in document 2"),
        ([[3], "w1"], "expected a list of ids, found str in document 2"),
        ([{"text": "w1"}], "expected text, ids or messages, found dict in document 1"),
    ],
)
def test_items_that_are_no_documents(tokenizer: Any, documents: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        stream(tokenizer, iter(documents)).take(1)


def test_a_column_of_none(tokenizer: Any, tmp_path: Path) -> None:
    lines = [{"text": None, "n": 1}] * 4
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"a\.jsonl: expected text, found 4 documents, 4 of them empty"):
        stream(tokenizer, sources=(Source(path=str(tmp_path / "a.jsonl")),)).take(1)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"text": texts(1)[0], "n": 2}])))
    rows = stream(tokenizer, sources=(Source(path=str(tmp_path / "a.jsonl")),))
    assert len(rows.take(1)) == 1
    assert rows.counters["skipped_documents"] == 4


def test_saved_datasets_that_cannot_be_read(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="expected a split 'train', found test; set split"):
        open_source(Source(path=str(tmp_path / "saved")))
    (tmp_path / "saved" / "test" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot open the saved dataset"):
        open_source(Source(path=str(tmp_path / "saved" / "test")))


def test_a_file_that_breaks_off_is_said(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in texts(3000, length=40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "w1']))
    with pytest.raises(DataError, match=r"a\.jsonl"):
        list(stream(tokenizer, sources=(Source(path=str(tmp_path / "a.jsonl"), epochs=1),)))


# ---- order of files --------------------------------------------------------------------------------------------------


def sharded(folder: Path, files: int, documents: int) -> Source:
    for file in range(files):
        lines = [json.dumps({"text": f"{file} {number}"}) for number in range(documents + file)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return Source(path=str(folder))


def test_files_are_read_in_turn_in_a_new_order_each_time(tmp_path: Path) -> None:
    opened = open_source(sharded(tmp_path, 6, 4))
    documents = Documents(opened.items, seed=0, open_shards=3)
    passes = []
    for _ in range(3):
        batch = documents.batch(1000)
        passes.append([tuple(map(int, text.split())) for text in batch.documents])
    everything = [(file, number) for file in range(6) for number in range(4 + file)]
    for found in passes:
        assert sorted(found) == everything
        for file in range(6):
            assert [n for f, n in found if f == file] == list(range(4 + file)), "a file is read in its order"
        first, second = found[:3], found[3:6]
        assert len({f for f, _ in first}) == 3
        assert [(f, n + 1) for f, n in first] == second
        assert max(len({f for f, _ in found[i : i + 3]}) for i in range(len(found))) == 3
    assert len({tuple(found) for found in passes}) == 3
    in_order = Documents(opened.items, seed=None).batch(1000).documents
    assert [tuple(map(int, text.split())) for text in in_order] == everything


def test_the_order_does_not_depend_on_where_the_files_lie(tokenizer: Any, tmp_path: Path) -> None:
    streams = []
    for name in "ab":
        folder = tmp_path / name / "text"
        folder.mkdir(parents=True)
        for number, text in enumerate(texts(20)):
            (folder / f"{number}.txt").write_text(text)
        streams.append(stream(tokenizer, sources=(Source(path=str(folder)),), shuffle=True))
    first, second = streams
    assert torch.equal(first.take(50).ids, second.take(50).ids)
    assert first.provenance == second.provenance
