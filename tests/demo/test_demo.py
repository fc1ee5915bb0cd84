"""The embedded default: its model loads as a bridge, its corpus is split the same way every time."""

import torch

from sae_kit.data.holdout import default_share, is_held_out
from sae_kit.demo import corpus, load_model, load_tokenizer
from sae_kit.demo.corpus import without_near_copies


def test_model_is_a_bridge_that_predicts_python() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = load_model(device="cpu"), load_tokenizer()
    assert isinstance(model, TransformerBridge)
    assert not model.training
    ids = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer("import os\nimport", add_special_tokens=False)["input_ids"]]]
    )
    logits = model(ids)
    assert logits.shape == (1, ids.shape[1], 2048)
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.n_ctx) == (4, 128, 256)
    assert " " in tokenizer.decode([logits[0, -1].argmax().item()]), "after `import` comes a name"


def test_tokenizer_gives_the_text_back() -> None:
    tokenizer = load_tokenizer()
    text = "def f(x):\n    return 'é' if x else \"→\"  # ok\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)


def test_corpus_is_split_by_content_and_repeatable() -> None:
    first = corpus()
    corpus.cache_clear()
    again = corpus()
    assert first == again
    share = default_share(len(first.train) + len(first.held_out))
    assert not set(first.train) & set(first.held_out)
    assert all(is_held_out(text, share) for text in first.held_out)
    assert not any(is_held_out(text, share) for text in first.train)
    assert len(first.train) > 10 * len(first.held_out) > 100


def test_near_copies_are_left_out() -> None:
    lines = [f"this is line number {i} of a file" for i in range(10)]
    original, copy = "\n".join(lines), "\n".join([*lines[:6], *(f"other line number {i} of it" for i in range(4))])
    fresh = "\n".join([*lines[:4], *(f"a fresh line number {i} here" for i in range(6))])
    assert list(without_near_copies([original, copy, fresh])) == [original, fresh]
