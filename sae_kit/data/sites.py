"""Sites: places inside a model, found by name. The only part of the library that understands those names.

`resolve` turns a spelling into a `BoundSite`, once and before any forward. Nothing here copies the model or imports
its library: a TransformerLens host is known by its `hook_dict`, a Hugging Face model by its `config`, and what has
neither is a module like any other.

| spelling | where it is looked up |
|---|---|
| `blocks.8.hook_resid_pre`, `blocks.8.hook_in` | HookPoints of a TransformerBridge or HookedTransformer |
| `blocks.8.hook_resid_pre` | in a Hugging Face model: the table of `sae_kit.data.families` |
| `model.layers.8`, `model.layers.8:out`, `model.layers.8:in` | modules of any model; a bridge's: of what it wraps |
| `("model.layers.8", "in")` | the same, as the pair that other libraries store |
| `model.layers.8:in` | in a HookedTransformer, which has other modules: that table, backwards |
| `blocks.8.attn.hook_z[3]` | one attention head of any of these |
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from sae_kit.data.families import (
    DERIVED,
    IN_A_BLOCK,
    READ_ONLY,
    Layout,
    Place,
    layout_of,
    layouts_of_architecture,
    normalized,
)
from sae_kit.errors import ConfigError, HookNotFoundError, ShapeError, SiteDidNotFireError, did_you_mean

IO = Literal["in", "out", "hook"]
Spelling = str | tuple[str, str]

SLEEPING = {
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_result": "use_attn_result",
}
"""HookPoints that fire only after a switch of the model was set."""

OF_QUERIES, OF_KEYS = ("n_heads", "num_attention_heads"), ("n_key_value_heads", "num_key_value_heads")
HEAD_SHAPED = {
    "hook_z": OF_QUERIES,
    "hook_q": OF_QUERIES,
    "hook_k": OF_KEYS,
    "hook_v": OF_KEYS,
    "hook_result": OF_QUERIES,
}
"""Names of values of attention heads, and what configs of TransformerLens and Hugging Face call their number."""

BESIDE_THE_FLOW = frozenset({"hook_normalized", "hook_scale"})
"""HookPoints that cannot be written: the model does not compute on from them."""

HOOKED_MODULES = {"mlp.hook_in": "mlp:in", "ln2.hook_out": "ln2:out"}
"""Places for which a HookedTransformer has a module but no HookPoint; the modules are names as well."""


class Site(NamedTuple):
    """A place: the input or first output of the module at `path`, or the HookPoint of that name."""

    path: str
    io: IO


class Handle:
    """An attached function; `remove()` may be called any number of times."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self._remove: Callable[[], None] | None = remove

    def remove(self) -> None:
        """Detach the function."""
        if self._remove is not None:
            self._remove()
            self._remove = None


@dataclass(frozen=True, eq=False)
class BoundSite:
    """A site found in one model: read it with `on_read`, replace its value with `on_write`.

    Functions see values as [..., width]: head-shaped ones come flattened, or as the one head that was asked for, and
    what `on_write`'s function returns is put back into their shape.
    """

    spelling: str
    """the name that was asked for"""
    site: Site
    module: nn.Module
    """the HookPoint, or the module whose input or output this is"""
    names: tuple[str, ...]
    """every spelling of this place, canonical first"""
    layout: Literal["flat", "heads"] = "flat"
    writable: bool = True
    head: int | None = None
    """the attention head that is read and written; None = all, one after the other"""
    n_heads: int | None = None
    """heads side by side in a value that is flat in the model"""
    derive: Callable[[Tensor], Tensor] | None = None
    """what is read is made from the value at this place"""
    hf_name: str | None = None
    """the module path of this place in the Hugging Face model, where it is known"""

    def on_read(self, fn: Callable[[Tensor], None]) -> Handle:
        """Call `fn(value)` after the functions that are attached now; what it returns is ignored."""

        def read(value: Tensor) -> None:
            fn(self._seen(value))

        return self._attach(read, first=False)

    def on_write(self, fn: Callable[[Tensor], Tensor | None]) -> Handle:
        """Replace the value by `fn(value)`, before every other function at this site; None leaves it.

        Raises:
            ConfigError: a replacement here would not do what the name says.
        """
        if not self.writable:
            raise ConfigError(
                f"{self.spelling!r} can be read but not replaced: the model does not compute on from it. "
                "Choose the residual stream, or the output of an attention or MLP layer"
            )

        def write(value: Tensor) -> Tensor | None:
            replacement = fn(self._seen(value))
            return None if replacement is None else self._put_back(replacement, value)

        return self._attach(write, first=True)

    def _seen(self, value: Tensor) -> Tensor:
        if self.derive is not None:
            return self.derive(value)
        if self.head is not None:
            return self._by_head(value)[..., self.head, :]
        return value.flatten(-2) if self.layout == "heads" and value.ndim == 4 else value

    def _put_back(self, replacement: Tensor, value: Tensor) -> Tensor:
        if self.head is None:
            return replacement.reshape(value.shape)
        heads = self._by_head(value).clone()
        heads[..., self.head, :] = replacement
        return heads.reshape(value.shape)

    def _by_head(self, value: Tensor) -> Tensor:
        return value if value.ndim == 4 else value.unflatten(-1, (self.n_heads or 1, -1))

    def _attach(self, fn: Callable[[Tensor], Tensor | None], first: bool) -> Handle:
        if self.site.io == "hook":
            return _attach_to_point(self.module, fn, first)
        if self.site.io == "in":

            def pre(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                key = None if args else _first_tensor_name(kwargs, self.spelling)
                replacement = fn(_tensor(args[0] if key is None else kwargs[key], self.spelling))
                if replacement is None:
                    return None
                return ((replacement, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: replacement})

            return Handle(self.module.register_forward_pre_hook(pre, prepend=first, with_kwargs=True).remove)

        def post(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return fn(output)
            replacement = fn(_first(output, self.spelling))
            if replacement is None:
                return None
            if not isinstance(output, tuple):
                raise ShapeError(
                    f"{self.spelling!r} gives a {type(output).__name__}: only tensors and tuples can be replaced"
                )
            return (replacement, *output[1:])

        return Handle(self.module.register_forward_hook(post, prepend=first).remove)


def resolve(model: nn.Module, spelling: Spelling, *, head: int | None = None) -> BoundSite:
    """Find a site in `model`, before any forward; `head=3` is the same as `[3]` at the end of the name.

    Raises:
        HookNotFoundError: no such place (with the nearest name), one that sleeps behind a switch of the model, or a
            name that the model has several places for.
        ConfigError: a head of something that has none, or not so many.
    """
    name = spelling if isinstance(spelling, str) else ":".join(spelling)
    if match := re.fullmatch(r"(.+)\[(\d+)\]", name):
        if head not in (None, int(match[2])):
            raise ConfigError(f"{name!r} names another head than head={head}: leave one of them out")
        name, head = match[1], int(match[2])
    host = _Host(model)
    found = host.point(name) or host.translated(name) or host.module(name)
    if found is None:
        raise host.not_found(name)
    return found if head is None else _one_head(host, found, head)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within `torch.compile`, data parallelism and adapters, whose names leave these wrappers out."""
    children = model._modules
    if isinstance(inner := children.get("_orig_mod"), nn.Module):
        return unwrapped(inner)
    if list(children) == ["module"] and isinstance(inner := children["module"], nn.Module):
        return unwrapped(inner)
    adapter = children.get("base_model")  # Hugging Face's own `base_model` is a property, not a child
    if isinstance(adapter, nn.Module) and isinstance(inner := adapter._modules.get("model"), nn.Module):
        return unwrapped(inner)
    return model


class _Host:
    """What a model offers to look names up in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)
        self.outer = model
        self.points: dict[str, nn.Module] | None = getattr(self.model, "hook_dict", None)
        """name -> HookPoint; a bridge makes this dict anew each time"""
        self.is_bridge = self.points is not None and hasattr(self.model, "original_model")
        self.inner: nn.Module = getattr(self.model, "original_model", self.model) if self.is_bridge else self.model
        self.cfg = getattr(self.model, "cfg", None)

    @functools.cached_property
    def layouts(self) -> list[Layout]:
        """How the Hugging Face model is laid out; for a HookedTransformer that does not say, all that it could be."""
        if self.points is not None and not self.is_bridge:
            return layouts_of_architecture(getattr(self.cfg, "original_architecture", None)) if self.cfg else []
        layout = layout_of(self.inner)
        return [] if layout is None else [layout]

    def point(self, name: str) -> BoundSite | None:
        """The HookPoint of that name."""
        if not self.points or name not in self.points:
            return None
        point = self.points[name]
        canonical = getattr(point, "name", None) or name
        names = sorted((n for n, p in self.points.items() if p is point), key=lambda n: n != canonical)
        ends = {_last(n) for n in names}
        switch = SLEEPING.get(_last(canonical))
        if switch is not None and not getattr(self.cfg, switch, False):
            raise HookNotFoundError(
                f"hook {name!r} sleeps in this model: call model.set_{switch}(True) before reading it"
            )
        if self._means_something_else(name):
            raise HookNotFoundError(f"hook {name!r} is another value in this model than elsewhere: use a module path")
        # A bridge's hook_resid_mid is the input of a norm: an edit there would miss the skip path.
        aside = bool(ends & BESIDE_THE_FLOW) or (self.is_bridge and _last(name) == "hook_resid_mid")
        site = BoundSite(name, Site(canonical, "hook"), point, tuple(names), writable=not aside)
        return self._with_names(site, [place for n in names if (place := self._place(n))], names)

    def translated(self, name: str) -> BoundSite | None:
        """A place that the model has under a name of the other convention."""
        if self.is_bridge:
            return None
        classic = _classic(name)
        inside = _in_block(classic)
        if self.points is not None:
            return self._on_hooked(name, classic)
        if (place := self.layouts[0].place(classic) if self.layouts else None) is not None:
            module = self._submodule(place.path)
            if module is None:
                return None
            if inside in DERIVED:
                derive = functools.partial(normalized, module)
                return BoundSite(name, _site(place), module, (classic,), writable=False, derive=derive)
            site = BoundSite(name, _site(place), module, (), writable=inside not in READ_ONLY)
            return self._with_names(site, [place], _spellings(place))
        if (switch := SLEEPING.get(_last(name))) is not None and self.layouts and inside != name:
            raise HookNotFoundError(
                f"hook {name!r} is not in a plain Hugging Face model: load it as a TransformerBridge and call "
                f"set_{switch}(True)"
            )
        return None

    def module(self, name: str) -> BoundSite | None:
        """The module of that path."""
        place = _place(name)
        module = self._submodule(place.path) if place.path and place.io in ("in", "out") else None
        if module is None:
            return None
        own = _spellings(place)
        if self.points is None or self.is_bridge:
            return self._with_names(BoundSite(name, _site(place), module, ()), [place], own)
        classic = _classic(str(place))
        meant = self._place(classic)
        return self._with_names(BoundSite(name, _site(place), module, ()), [meant] if meant else [], [*own, classic])

    def not_found(self, name: str) -> HookNotFoundError:
        # A bridge wraps each module of the inner model in one of its own; the path leaves the wrapper out.
        paths = {path.replace("._original_component", "") for path, _ in self.inner.named_modules() if path}
        classic = [] if self.points is not None else [n for layout in self.layouts for n in layout.all_names()]
        message = (
            f"hook {name!r} is not in this model.{did_you_mean(name, [*(self.points or classic), *sorted(paths)])}"
        )
        if self.points is None and ".hook_" in name and not any(layout.is_listed for layout in self.layouts):
            message += " TransformerLens names of this kind of model are not known: use a module path"
        return HookNotFoundError(message)

    def n_heads(self, site: BoundSite) -> int | None:
        """Heads whose values are at a site; None where it has none."""
        kinds = [HEAD_SHAPED[_last(name)] for name in site.names if _last(name) in HEAD_SHAPED]
        if not kinds:
            return None
        config = getattr(self.inner, "config", None)
        config = getattr(config, "text_config", None) or config
        queries = [getattr(self.cfg, OF_QUERIES[0], None), getattr(config, OF_QUERIES[1], None)]
        own = [getattr(self.cfg, kinds[0][0], None), getattr(config, kinds[0][1], None)]
        return next((number for number in (*own, *queries) if isinstance(number, int)), None)

    def _on_hooked(self, name: str, classic: str) -> BoundSite | None:
        """In a HookedTransformer: a place without a HookPoint, or one that is named as in a Hugging Face model."""
        place = _place(name)
        meant = {names[0] for layout in self.layouts if (names := layout.names(place))} or {classic}
        if len(meant) > 1:
            raise HookNotFoundError(
                f"{name!r} is {' or '.join(sorted(meant))}, depending on the kind of model, which this one does not "
                "say: use the TransformerLens name"
            )
        (classic,) = meant
        inside = _in_block(classic)
        found = self.point(classic)
        if found is None and inside in HOOKED_MODULES:
            found = self.module(classic.removesuffix(inside) + HOOKED_MODULES[inside])
        return None if found is None else replace(found, spelling=name)

    def _means_something_else(self, name: str) -> bool:
        """Whether a bridge has a normalised value where models of this kind have none of that name."""
        listed = self.is_bridge and self.layouts and self.layouts[0].is_listed
        return bool(listed) and _in_block(name) in DERIVED - self.layouts[0].family.places.keys()

    def _place(self, name: str) -> Place | None:
        """Where in a Hugging Face model the value of that name is, if that is known and is one place."""
        if len(self.layouts) != 1 or len(self.layouts[0].stacks) != 1 or _in_block(name) in DERIVED:
            return None
        return self.layouts[0].place(name)

    def _submodule(self, path: str) -> nn.Module | None:
        for root in (self.inner, self.outer):  # a path may name the wrappers
            try:
                return root.get_submodule(path)
            except AttributeError:
                continue
        return None

    def _with_names(self, site: BoundSite, places: Sequence[Place], own: Iterable[str]) -> BoundSite:
        """`site` with every spelling of it: its own, and those of the other convention."""
        others = [str(place) for place in places]
        others += [name for place in places for layout in self.layouts for name in layout.names(place)]
        names = tuple(dict.fromkeys([*own, *others]))
        layout = "heads" if any(_last(name) in HEAD_SHAPED for name in names) else "flat"
        return replace(site, names=names, layout=layout, hf_name=str(places[0]) if places else None)


def _one_head(host: _Host, site: BoundSite, head: int) -> BoundSite:
    number = host.n_heads(site)
    if number is None:
        raise ConfigError(f"{site.spelling!r} has no attention heads: leave out [{head}], or name an attn.hook_z")
    if not 0 <= head < number:
        raise ConfigError(f"{site.spelling!r} has heads 0 to {number - 1}, found {head}")
    names = tuple(f"{name}[{head}]" for name in site.names)
    hf_name = None if site.hf_name is None else f"{site.hf_name}[{head}]"
    return replace(site, spelling=f"{site.spelling}[{head}]", names=names, head=head, n_heads=number, hf_name=hf_name)


def _attach_to_point(point: Any, fn: Callable[[Tensor], Tensor | None], first: bool) -> Handle:
    def hook(value: Tensor, hook: Any) -> Tensor | None:
        return fn(value)

    point.add_hook(hook, is_permanent=True, prepend=first)
    record = point.fwd_hooks[0 if first else -1]  # TransformerLens 3 returns nothing

    def remove() -> None:
        record.hook.remove()
        point.fwd_hooks = [r for r in point.fwd_hooks if r is not record]

    return Handle(remove)


def _place(name: str) -> Place:
    path, colon, io = name.partition(":")
    return Place(path, io if colon else "out")


def _site(place: Place) -> Site:
    return Site(place.path, "in" if place.io == "in" else "out")


def _spellings(place: Place) -> list[str]:
    return [place.path, f"{place.path}:out"] if place.io == "out" else [str(place)]


def _last(name: str) -> str:
    return name.rpartition(".")[2].partition("[")[0]


def _in_block(name: str) -> str:
    match = IN_A_BLOCK.fullmatch(name)
    return match[2] if match else name


def _classic(name: str) -> str:
    """The name of a HookPoint for a module of a HookedTransformer that stands for one."""
    place = _place(name)
    spelt = f"{place.path}:{place.io}"
    for point, module in HOOKED_MODULES.items():
        if _in_block(spelt) == module:
            return spelt.removesuffix(module) + point
    return name


def _first(output: Any, spelling: str) -> Tensor:
    if isinstance(output, Mapping):
        return _tensor(next(iter(output.values()), None), spelling)
    return _tensor(output[0] if isinstance(output, tuple | list) and output else output, spelling)


def _tensor(value: Any, spelling: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ShapeError(f"expected a tensor at {spelling!r}, found {type(value).__name__}; choose another site")
    return value


def _first_tensor_name(kwargs: dict[str, Any], spelling: str) -> str:
    if "hidden_states" in kwargs:
        return "hidden_states"
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return name
    raise SiteDidNotFireError(f"{spelling!r} was called without a tensor")
