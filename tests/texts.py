"""Documents of numbered words, which the tests' tokenizer makes one id each, and streams of their rows."""

from typing import Any

from sae_kit.data.tokens import DataConfig, TokenStream

CONTEXT = 8


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def texts(count: int, length: int = 10) -> list[str]:
    """Documents of `length` words, no two alike."""
    return [words(*(((7 * i) + j) % 61 for j in range(length))) + f" w{i % 61}" * (i // 61) for i in range(count)]


def uneven(count: int) -> list[str]:
    """Documents of 1 to 30 words."""
    return [words(*((7 * i + j) % 61 for j in range(1 + (i * i) % 30))) for i in range(count)]


def stream(tokenizer: Any, documents: Any = None, **options: Any) -> TokenStream:
    """Rows of `documents` in order, none held out, unless `options` say otherwise."""
    given = {name: options.pop(name) for name in ("seed", "held_out", "vocabulary") if name in options}
    cfg = DataConfig(**{"context_size": CONTEXT, "holdout": 0.0, "shuffle": False, **options})
    return TokenStream.from_config(cfg, tokenizer, documents=documents, **given)
