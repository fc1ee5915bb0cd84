"""A config tree from a command line: `sae-kit COMMAND [FILE] [FIELD=VALUE ...] [--FIELD VALUE ...]`.

A flag is the path of a field in the tree, and its value is read like a value in a YAML file, so file, flags and Python
meet in one place (`sae_kit.config.structure`), with one set of errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sae_kit import config as trees
from sae_kit.errors import ConfigError, UnknownConfigKeyError, did_you_mean

ShortFlags = Mapping[str, tuple[tuple[str, ...], str]]
"""Flag -> the path that it stands for, and its line of help."""


class TreeCommand:
    """A command whose arguments are the tree of the config class `root`; `short` flags stand for paths in it."""

    def __init__(self, name: str, description: str, root: type, short: ShortFlags) -> None:
        self.name, self.description, self.root, self.short = name, description, root, short

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The tree; flags beat overrides, and overrides beat the file.

        Raises:
            UnknownConfigKeyError, ConfigError: see `sae_kit.config`.
            SystemExit: `--help`, or arguments that are not of this form.
        """
        words = _words(arguments)
        files = [word for word in words if "=" not in word]
        if len(files) > 1:
            raise ConfigError(
                f"expected one config file, found {', '.join(files)}; an override has the form FIELD=VALUE"
            )
        tree = self.expand(trees.load_tree(files[0])) if files else {}
        parser = self.parser(arguments, tree)
        given, rest = parser.parse_known_args(arguments)
        for flag in rest:
            if flag.startswith("--"):
                known = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
                name = flag[2:].split("=")[0]
                raise UnknownConfigKeyError(
                    f"unknown flag --{name}.{did_you_mean(name, known)} See sae-kit {self.name} --help"
                )
        overrides = [word.split("=", 1) for word in words if "=" in word]
        flags = [(name, value) for name, value in vars(given).items() if name != "words"]
        spelt: dict[tuple[str, ...], str] = {}
        for name, text in [*overrides, *flags]:
            path = self.path(name)
            if spelt.setdefault(path, name) != name:
                raise ConfigError(f"{spelt[path]} and {name} are the same field: give one of them")
            set_text(tree, path, name, text)
        return tree

    def expand(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The tree of a file, without the short names in it."""
        for name, (path, _) in self.short.items():
            if name in tree and path != (name,) and not isinstance(tree[name], Mapping):
                trees.set_path(tree, path, tree.pop(name), name)
        return tree

    def path(self, name: str) -> tuple[str, ...]:
        """Where in the tree a flag or override points."""
        return self.short[name][0] if name in self.short else tuple(name.split("."))

    def parser(self, arguments: Sequence[str], tree: dict[str, Any]) -> argparse.ArgumentParser:
        """One flag for each field."""
        parser = self.empty_parser()
        self.add_short(parser.add_argument_group("short"))
        add_sections(parser, parser.add_argument_group("fields"), self.root, "", leave_out=())
        return parser

    def empty_parser(self) -> argparse.ArgumentParser:
        """Without a flag, but with words."""
        parser = argparse.ArgumentParser(
            prog=f"sae-kit {self.name}",
            usage=f"sae-kit {self.name} [FILE.yaml] [FIELD=VALUE ...] [--FIELD VALUE ...]",
            description=f"{self.description} A value is written as in YAML; null is None.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
        )
        parser.add_argument(
            "words", nargs="*", default=[], metavar="FILE or FIELD=VALUE", help="a config file, overrides of its fields"
        )
        return parser

    def add_short(self, group: Any) -> None:
        for flag, (path, text) in self.short.items():
            group.add_argument(f"--{flag}", metavar=flag.upper(), help=f"{text} [{'.'.join(path)}]")


def set_text(tree: dict[str, Any], path: tuple[str, ...], name: str, text: str) -> None:
    """Put a value, written as in YAML, at `path`; `name` is what the user wrote."""
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


def add_sections(parser: Any, group: Any, cls: Any, prefix: str, leave_out: tuple[str, ...]) -> None:
    """Plain fields of `cls` go into `group`, those of each section in it into a group of their own."""
    docs = trees.field_docs(cls)
    for field in dataclasses.fields(cls):
        name, section = f"{prefix}{field.name}", _section(cls, field.name)
        if field.name in leave_out:
            continue
        if section is None:
            _add_field(group, name, docs.get(field.name, ""), field)
        else:
            add_fields(parser.add_argument_group(f"{name}: {docs[field.name]}"), section, name)


def add_fields(group: Any, cls: Any, prefix: str, leave_out: tuple[str, ...] = ()) -> None:
    docs = trees.field_docs(cls)
    for field in dataclasses.fields(cls):
        if field.name not in leave_out:
            section = _section(cls, field.name)
            if section is None:
                _add_field(group, f"{prefix}.{field.name}", docs.get(field.name, ""), field)
            else:
                add_fields(group, section, f"{prefix}.{field.name}")


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
