"""From sources to rows: what is read, in which order, on which side of the split, and what is refused."""

import copy
import json
import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import CONTEXT, stream, texts, uneven, words

from sae_kit.config import structure, unstructure
from sae_kit.data.documents import Documents
from sae_kit.data.holdout import is_held_out
from sae_kit.data.provenance import check_provenance
from sae_kit.data.sources import Source
from sae_kit.data.tokenizing import Encoder, check_vocabulary, tokenizer_identity
from sae_kit.data.tokens import DataConfig, TokenStream, excluded_ids, held_out_rows
from sae_kit.errors import ConfigError, DataError


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


@pytest.mark.parametrize("tokenize_batch", [1, 3, 1000])
def test_passes_are_counted_when_their_rows_are_handed_out(tokenizer: Any, tokenize_batch: int) -> None:
    rows = stream(tokenizer, texts(4, length=7), separator=None, tokenize_batch=tokenize_batch)
    passes = []
    for _ in range(13):
        rows.take(1)
        passes.append(rows.passes)
    assert passes == [0] * 4 + [1] * 4 + [2] * 4 + [3]
    once = stream(tokenizer, iter(texts(4, length=7)), tokenize_batch=tokenize_batch)
    assert len(once.take(100)) == 4
    assert once.passes == 1


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
    assert sorted(training.batch(1000).documents + evaluation.batch(1000).documents) == sorted(documents)


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


def test_shares_and_skipped_documents_can_be_read(tokenizer: Any) -> None:
    rows = stream(tokenizer, [None, *texts(2), ""], holdout=0.25)
    rows.take(1)
    assert (rows.holdout, rows.counters["skipped_documents"]) == ((0.25,), 2)


def test_empty_documents_are_skipped_and_counted() -> None:
    documents = Documents(["a", None, "", "b"])
    batch = documents.batch(10)
    assert (batch.documents, batch.skipped) == (["a", "b"], 2)


def test_a_batch_ends_with_its_pass_and_with_its_size() -> None:
    documents = Documents(["a", "b", "c"], epochs=2)
    assert [documents.batch(2).documents for _ in range(5)] == [["a", "b"], ["c"], ["a", "b"], ["c"], []]
    long = Documents(["x" * 600_000] * 3, epochs=1)
    assert [len(long.batch(10).documents) for _ in range(3)] == [2, 1, 0]
    even = Documents(["a", "b"], epochs=1)
    assert [even.batch(2).documents for _ in range(2)] == [["a", "b"], []]


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
        ({"open_shards": 0}, "open_shards: expected at least 1"),
        ({"workers": -1}, "workers: expected at least 0, found -1"),
        ({"short": "pad"}, 'short: expected "drop" with pack'),
        ({"short": "cut"}, "short: expected one of 'drop', 'pad', found 'cut'"),
        ({"exclude": "specials"}, "exclude: expected"),
        ({"seq_slice": [0, 8, 0]}, "seq_slice: expected a step of at least 1, found 0"),
        ({"seq_slice": [0, 8, -1]}, "seq_slice: expected a step of at least 1, found -1"),
        ({"seq_slice": [8, None, None], "context_size": 8}, "seq_slice: expected some of 8 positions, found none in"),
        ({"seq_slice": [1]}, "seq_slice: expected"),
        ({"sources": [{"path": "x", "weight": 0}]}, r"sources\[0\](\.|: )weight: expected a positive number"),
        ({"sources": [{"path": "x", "weight": math.inf}]}, r"weight: expected a positive number, found inf"),
        ({"sources": [""]}, r"path: expected a data set, file or folder, found an empty name"),
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
    from tokenizers import AddedToken

    assert excluded_ids("structural", tokenizer) == (0, 1, 2)
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("plain", special=False)])
    assert other.convert_tokens_to_ids("<|im_start|>") not in other.all_special_ids
    other.add_special_tokens({"unk_token": "<|unknown|>"})
    assert excluded_ids("structural", other) == (0, 1, 2)
    assert excluded_ids("special", other) == (0, 1, 2, 64, 66)
    assert excluded_ids("none", tokenizer) == ()
    assert excluded_ids((7, 5, 7), tokenizer) == (5, 7)


def test_positions_of_a_slice(tokenizer: Any) -> None:
    assert DataConfig().positions(8) == range(8)
    assert DataConfig(seq_slice=(1, -1, 3)).positions(8) == range(1, 7, 3)
    assert list(DataConfig(seq_slice=(-2, None, None)).positions(8)) == [6, 7]
    with pytest.raises(ConfigError, match=r"expected some of 8 positions, found none in \[9, None, None\]"):
        stream(tokenizer, texts(4), seq_slice=(9, None, None))


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_threads_change_no_row(tokenizer: Any, workers: int) -> None:
    expected = stream(tokenizer, uneven(60), workers=0).take(150).ids
    rows = stream(tokenizer, uneven(60), workers=workers, tokenize_batch=3)
    assert torch.equal(rows.take(150).ids, expected)
    rows.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_a_thread_is_raised_where_rows_are_taken(tokenizer: Any, workers: int) -> None:
    def documents() -> Iterator[str]:
        yield from texts(30)
        raise KeyError("a mistake of the reader")

    rows = stream(tokenizer, documents(), workers=workers, tokenize_batch=4)
    assert len(rows.take(20)) == 20
    for _ in range(2):
        with pytest.raises(KeyError, match="a mistake of the reader") as caught:
            rows.take(100)
        assert "documents" in {entry.name for entry in caught.traceback}, "with the traceback of the thread"
    rows.close()


def test_what_is_ready_does_not_wait_for_a_thread_that_reads(tokenizer: Any) -> None:
    reading, further = threading.Event(), threading.Event()

    def documents() -> Iterator[str]:
        yield from texts(4)
        reading.set()
        assert further.wait(10)
        yield from texts(4)

    rows = stream(tokenizer, documents(), workers=2, tokenize_batch=2, pack=False)
    assert len(rows.take(2)) == 2
    assert reading.wait(10)
    assert len(rows.take(2)) == 2
    further.set()
    assert len(rows.take(100)) == 4
    rows.close()


def test_close_ends_the_threads(tokenizer: Any) -> None:
    before = set(threading.enumerate())  # streams of other tests may end theirs meanwhile

    def started() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread not in before]

    rows = stream(tokenizer, uneven(50), workers=3, tokenize_batch=2)
    assert started() == [], "nothing runs before the first row"
    rows.take(10)
    assert len(started()) > 0
    assert all(name.startswith("tokenize") for name in started())
    rows.close()
    assert started() == []


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_the_short_way_gives_what_the_tokenizer_gives() -> None:
    from sae_kit.demo import corpus, load_tokenizer

    plain = load_tokenizer()
    texts = [*corpus().held_out[:20], "", " ", "é 漢字 🤖\x00", "<|endoftext|> in the text <|im_end|>", "x" * 5000]
    texts += [f"{token} and {token}{token}" for token in plain.all_special_tokens]
    cutting = copy.deepcopy(plain)
    cutting.backend_tokenizer.enable_truncation(5)
    cutting.backend_tokenizer.enable_padding(length=50)
    splitting = copy.deepcopy(plain)
    splitting.split_special_tokens = True
    for tokenizer in (plain, cutting, splitting):
        encoder = Encoder(tokenizer)
        assert encoder._rust is not None
        found = [ids.tolist() for ids in encoder(texts, "text")]
        assert found == tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    one, other = (sum(len(ids) for ids in Encoder(tokenizer)(texts, "text")) for tokenizer in (plain, splitting))
    assert one < other, "markers in the text are ids of their own unless they are to be split"


def test_halves_of_surrogate_pairs_are_no_text(tokenizer: Any) -> None:
    """They come from JSON and from names of files; UTF-8 has none, and neither do tokenizers."""
    from sae_kit.demo import load_tokenizer

    halves, whole = "a \ud800 é \udc00\ud83e\udd16", "a \ufffd é \ufffd🤖"
    for own in (load_tokenizer(), tokenizer):
        encoder = Encoder(own)
        for text, meant in ((halves, whole), (whole, whole)):
            expected = own([meant], add_special_tokens=False)["input_ids"][0]
            assert encoder([text], "text")[0].tolist() == expected
    assert len(stream(load_tokenizer(), [halves * 9]).take(2)) == 2, "from end to end"


def test_a_tokenizer_of_its_own_kind_is_called(tokenizer: Any) -> None:
    class Shouting(type(tokenizer)):
        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._encode_plus([part.replace("w1", "w2") for part in text], *args, **kwargs)

    other = copy.copy(tokenizer)
    other.__class__ = Shouting
    assert stream(other, iter(["w1 w2 w1 w3 w4 w5 w6"])).take(1).ids.tolist() == [[0, 5, 5, 5, 6, 7, 8, 9]]


def test_ids_that_the_model_does_not_have_are_refused(tokenizer: Any) -> None:
    check_vocabulary(tokenizer, 64)
    check_vocabulary(tokenizer, 100)
    with pytest.raises(ConfigError, match="has 64 ids, but the model reads 50: it is the tokenizer of another model"):
        check_vocabulary(tokenizer, 50)
    with pytest.raises(ConfigError, match="the model reads 50"):
        stream(tokenizer, texts(30), vocabulary=50)
    rows = stream(tokenizer, iter([[3, 4, 5, 6, 7, 8, 9, 64]]), vocabulary=64)
    with pytest.raises(DataError, match="id 64 is in the text, but the model reads ids below 64"):
        rows.take(1)
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["added"])
    assert len(stream(more, texts(30), vocabulary=64).take(5)) == 5, "an added token does no harm until it is met"
    with pytest.raises(DataError, match="id 64 is in the text"):
        stream(more, [*texts(2), "w1 added w2"], vocabulary=64).take(20)


# ---- rows that are not full ------------------------------------------------------------------------------------------


def test_padding_is_known_from_lengths(tokenizer: Any) -> None:
    documents = [words(1, 2), words(*range(9)), "", words(7)]
    batch = stream(tokenizer, iter(documents), pack=False, short="pad").take(10)
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [3, 8, 2]
    assert batch.ids.tolist() == [[0, 4, 5, 2, 2, 2, 2, 2], [0, *range(3, 10)], [0, 10, 2, 2, 2, 2, 2, 2]]
    assert next(stream(tokenizer, iter(documents), pack=False, short="pad")) == [0, 4, 5]
    full = stream(tokenizer, iter(documents), pack=False)
    assert full.take(10).lengths is None
    assert full.counters == {
        "skipped_documents": 1,
        "blank_documents": 0,
        "short_documents": 2,
        "cut_ids": 2,
        "tail_ids": 0,
    }


def test_the_last_row_is_kept_or_counted(tokenizer: Any) -> None:
    documents = [words(*range(10)), "   "]
    dropped, kept = (stream(tokenizer, iter(documents), tail=tail) for tail in ("drop", "pad"))
    assert len(dropped.take(9)) == 1
    assert (dropped.counters["tail_ids"], dropped.counters["blank_documents"]) == (4, 1)
    batch = kept.take(9)
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [8, 4]
    assert batch.ids[1].tolist() == [0, 10, 11, 12, 2, 2, 2, 2]
    assert kept.counters["tail_ids"] == 0
    assert stream(tokenizer, iter(["w1"]), tail="pad").take(9).ids.tolist() == [[0, 4, 2, 2, 2, 2, 2, 2]]


def test_documents_that_all_are_too_short_are_said(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"each of its documents has fewer than 8 ids; .* data\.short=pad"):
        stream(tokenizer, ["w1 w2"] * 5, pack=False).take(1)


def test_held_out_rows_are_packed_whatever_the_config_says(tokenizer: Any) -> None:
    cfg = DataConfig(context_size=CONTEXT, holdout=0.5, pack=False, short="pad")
    packed = DataConfig(context_size=CONTEXT, holdout=0.5)
    rows = held_out_rows(cfg, tokenizer, 10, documents=uneven(60))
    assert torch.equal(rows, held_out_rows(packed, tokenizer, 10, documents=uneven(60)))


# ---- provenance ------------------------------------------------------------------------------------------------------


def test_provenance_says_which_rows_these_are(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(20)))
    source = Source(path=str(tmp_path / "a.jsonl"), weight=2.0)
    found = stream(tokenizer, sources=(source,), separator="eos").provenance
    assert json.loads(json.dumps(found)) == found
    assert str(tmp_path) not in json.dumps(found), "nothing of this machine"
    marks = {"row_start": 0, "separator": 1, "doc_start": None}
    assert found["packing"] == {"context_size": 8, **marks, "pack": True, "short": "drop", "tail": "drop"}
    assert {"path": "a.jsonl", "kind": "text", "column": "text", "weight": 2.0, "holdout": 0.0}.items() <= found[
        "sources"
    ][0].items()
    assert set(found["versions"]) == {"sae_kit", "torch", "transformers", "tokenizers", "datasets"}
    assert len(found["tokenizer"]["sha256"]) == 64
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.enable_truncation(5)
    assert tokenizer_identity(other) == found["tokenizer"], "settings of a call are not the tokenizer's own"
    other.add_tokens(["w99"])
    assert tokenizer_identity(other)["sha256"] != found["tokenizer"]["sha256"]


def test_what_changes_no_row_is_not_compared(tokenizer: Any) -> None:
    ours = stream(tokenizer, texts(9), workers=0, tokenize_batch=3).provenance
    theirs = copy.deepcopy(dict(stream(tokenizer, texts(9)).provenance))
    theirs["versions"] = {"torch": "1.0"}
    theirs["tokenizer"] |= {"name": "another/name", "revision": "main"}
    check_provenance(ours, theirs, "this")
    check_provenance({"tokens": ours}, {"tokens": theirs}, "this")
    theirs["sources"][0]["weight"] = 3.0
    with pytest.raises(ConfigError) as caught:
        check_provenance(ours, theirs | {"more": 1}, "the cache in x")
    assert str(caught.value) == (
        "the cache in x was made with other settings: sources[0].weight: expected 1.0, found 3.0; "
        "more: expected None, found 1"
    )
    check_provenance(ours, theirs, "this", only=("packing", "tokenizer"))
