"""The command line: `sae-kit train`, `sae-kit demo`, `sae-kit env`.

A flag is the path of a field in the config tree, and its value is read like a value in a YAML file, so file, flags and
Python meet in one place (`sae_kit.config.structure`), with one set of errors. Here are only argument lists and what is
printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sae_kit import config as trees
from sae_kit._version import __version__
from sae_kit.errors import ConfigError, SAEKitError, UnknownConfigKeyError, did_you_mean

SHORT_FLAGS = {
    "model": "language model: hub id, folder, or demo",
    "dataset": "text: hub id, file, folder, or demo",
    "hook": "site that is read, e.g. blocks.8.hook_resid_pre",
    "hook_out": "site that is written, if it is another one: the SAE is then a transcoder",
    "arch": "architecture of the SAE",
    "tokens": "activation rows to train on",
}
"""Flags that stand for a path in the tree, with their line of help; `_path` knows which."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `sae-kit`; returns the exit status: 0, 2 for a clear error, 130 when interrupted."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("sae_kit").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(
        prog="sae-kit", description="Train, evaluate and look at sparse autoencoders on language-model activations."
    )
    parser.add_argument("--version", action="version", version=f"sae-kit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train an SAE on the built-in model, offline, and show what it learned")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="root of every random generator (default: %(default)s)")
    commands.add_parser("env", help="print versions and devices, for bug reports")
    commands.add_parser(
        "train", help="train SAEs from flags, or from a YAML or JSON file with overrides", add_help=False
    )
    given, rest = parser.parse_known_args(arguments)
    if rest and given.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if given.command == "demo":
            from sae_kit.demo.run import demo as run_demo

            run_demo(given.out, seed=given.seed)
        elif given.command == "env":
            _print_environment()
        else:
            _train(rest)
    except (SAEKitError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _train(arguments: Sequence[str]) -> None:
    from sae_kit.training.run import run

    tree = parse_train(arguments)
    from sae_kit.training.config import RunConfig

    result = run(RunConfig.from_dict(tree))
    for name in result.saes:
        print(result.folder / "saes" / name)  # noqa: T201


def parse_train(arguments: Sequence[str]) -> dict[str, Any]:
    """The config tree of `sae-kit train [FILE] [FIELD=VALUE ...] [--FIELD VALUE ...]`.

    Flags beat overrides, and overrides beat the file.

    Raises:
        UnknownConfigKeyError, ConfigError: see `sae_kit.config`.
        SystemExit: `--help`, or arguments that are not of this form.
    """
    from sae_kit.training.config import expand_short_names

    arguments = _import_named(arguments)
    words = _words(arguments)
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"expected one config file, found {', '.join(files)}; an override has the form FIELD=VALUE")
    tree = expand_short_names(trees.load_tree(files[0])) if files else {}
    architecture = _architecture_of(arguments, tree)
    parser = _train_parser(architecture)
    given, rest = parser.parse_known_args(arguments)
    for flag in rest:
        if flag.startswith("--"):
            known = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
            name = flag[2:].split("=")[0]
            raise UnknownConfigKeyError(f"unknown flag --{name}.{did_you_mean(name, known)} See sae-kit train --help")
    overrides = [word.split("=", 1) for word in words if "=" in word]
    flags = [(name, value) for name, value in vars(given).items() if name != "words"]
    spelt: dict[tuple[str, ...], str] = {}
    for name, text in [*overrides, *flags]:
        path = _path(name)
        if spelt.setdefault(path, name) != name:
            raise ConfigError(f"{spelt[path]} and {name} are the same field: give one of them")
        _override(tree, path, name, text)
    if trees.look_up(tree, ("saes", "sae")) is not None:
        _override(tree, _path("arch"), "arch", architecture)
    return tree


def _path(name: str) -> tuple[str, ...]:
    """Where in the tree a flag or override points: `sae.k` and `tokens` are short for longer paths."""
    from sae_kit.training.config import SHORT_NAMES

    if name == "arch":
        name = "sae.architecture"
    first, *others = name.split(".")
    if first == "model" and others:
        return (first, *others)
    return (*SHORT_NAMES.get(first, (first,)), *others)


def _override(tree: dict[str, Any], path: tuple[str, ...], name: str, text: str) -> None:
    value = trees.parse_scalar(text)
    if path == ("data", "sources") and not isinstance(value, list):
        value = [value]
    *parents, last = path
    for depth, key in enumerate(parents, start=1):
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{name}: {'.'.join(path[:depth])} is {child!r}, not a section with fields")
        tree = child
    tree[last] = value


def _import_named(arguments: Sequence[str]) -> list[str]:
    """Import what `--import` names, so that its architectures are known; the other arguments are returned."""
    from sae_kit.registry import import_architectures

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="sources", action="append", default=[])
    given, rest = parser.parse_known_args(arguments)
    for source in given.sources:
        import_architectures(source)
    return rest


def _words(arguments: Sequence[str]) -> list[str]:
    """The arguments that are neither a flag nor the value of one: a config file, and overrides."""
    words: list[str] = []
    after_flag = False
    for argument in arguments:
        is_flag = argument.startswith("-")
        if not is_flag and not after_flag:
            words.append(argument)
        after_flag = is_flag and "=" not in argument and argument not in ("-h", "--help")
    return words


def _architecture_of(arguments: Sequence[str], tree: dict[str, Any]) -> str:
    """Which architecture's flags to offer: from --arch, an override or the config file; topk if nothing says."""
    from sae_kit.registry import get_architecture

    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = word.removeprefix("--").partition("=")
        if _path(name) == _path("arch") and (value or word.startswith("--")):
            return get_architecture(value or after).name
    return get_architecture(trees.look_up(tree, _path("arch")) or "topk").name


def _train_parser(architecture: str) -> argparse.ArgumentParser:
    from sae_kit.registry import list_architectures
    from sae_kit.training.config import RunConfig, SAEEntry

    parser = argparse.ArgumentParser(
        prog="sae-kit train",
        usage="sae-kit train [FILE.yaml] [FIELD=VALUE ...] [--FIELD VALUE ...]",
        description="Train SAEs. A value is written as in YAML; null is None; a share of the run is written '5%'.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
    )
    parser.add_argument(
        "words", nargs="*", default=[], metavar="FILE or FIELD=VALUE", help="a config file, overrides of its fields"
    )
    parser.add_argument("--import", metavar="FILE.py", help="import a file or module that registers architectures")
    short = parser.add_argument_group("a run of one SAE")
    for flag, text in SHORT_FLAGS.items():
        names = f": {', '.join(list_architectures())}" if flag == "arch" else ""
        default = " (default: topk)" if flag == "arch" else ""
        short.add_argument(f"--{flag}", metavar=flag.upper(), help=f"{text}{names} [{'.'.join(_path(flag))}]{default}")
    sae = parser.add_argument_group(f"the SAE ({architecture}; another --arch shows its own fields)")
    _add_fields(sae, list_architectures()[architecture].config, "sae", leave_out=("metadata",))
    entry = parser.add_argument_group("training of the SAE")
    _add_sections(parser, entry, SAEEntry, "saes.sae.", leave_out=("sae", "hook", "hook_out"))
    _add_sections(parser, parser.add_argument_group("the run"), RunConfig, "", leave_out=("saes",))
    return parser


def _add_sections(parser: Any, group: Any, cls: Any, prefix: str, leave_out: tuple[str, ...]) -> None:
    """Plain fields of `cls` go into `group`, those of each section in it into a group of their own."""
    docs = trees.field_docs(cls)
    for field in dataclasses.fields(cls):
        name, section = f"{prefix}{field.name}", _section(cls, field.name)
        if field.name in leave_out:
            continue
        if section is None:
            _add_field(group, name, docs.get(field.name, ""), field)
        else:
            _add_fields(parser.add_argument_group(f"{name}: {docs[field.name]}"), section, name)


def _add_fields(group: Any, cls: Any, prefix: str, leave_out: tuple[str, ...] = ()) -> None:
    docs = trees.field_docs(cls)
    for field in dataclasses.fields(cls):
        if field.name not in leave_out:
            section = _section(cls, field.name)
            if section is None:
                _add_field(group, f"{prefix}.{field.name}", docs.get(field.name, ""), field)
            else:
                _add_fields(group, section, f"{prefix}.{field.name}")


def _section(cls: Any, name: str) -> Any:
    """The dataclass that a field holds, perhaps besides None; None of other fields, and of lists of dataclasses."""
    hint = typing.get_type_hints(cls)[name]
    found = [part for part in _parts(hint) if dataclasses.is_dataclass(part)]
    return found[0] if found and typing.get_origin(hint) is not tuple else None


def _add_field(group: Any, name: str, text: str, field: dataclasses.Field[Any]) -> None:
    default = "" if field.default is dataclasses.MISSING else f" (default: {_yaml(field.default)})"
    group.add_argument(f"--{name}", dest=name, metavar="VALUE", help=f"{text}{default}".replace("%", "%%"))


def _parts(hint: Any) -> Iterator[Any]:
    arguments = typing.get_args(hint)
    if not arguments:
        yield hint
    for argument in arguments:
        yield from _parts(argument)


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _print_environment() -> None:
    import platform
    from importlib import metadata

    import torch

    lines = [f"sae-kit {__version__}", f"python {platform.python_version()} on {platform.platform()}"]
    for package in ("torch", "transformer-lens", "transformers", "datasets", "huggingface_hub", "safetensors", "wandb"):
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    lines.append(f"threads {torch.get_num_threads()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines += [f"cuda:{i} {name}" for i, name in enumerate(devices)] or ["no cuda device"]
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
