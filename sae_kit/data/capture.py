"""Reading activations: the only place that understands the names of a model's insides.

`resolve` turns a spelling into a `BoundSite` once; `capture` then runs the model with one hook per site and
stops it as soon as all have fired, so a site in the middle costs half a forward. Nothing here caches, copies the
model or imports its library: a TransformerLens host is known by its `hook_dict`.

| spelling | where it is looked up |
|---|---|
| `blocks.8.hook_resid_pre`, `blocks.8.hook_in` | HookPoints of a TransformerBridge or HookedTransformer |
| `model.layers.8`, `model.layers.8:out`, `model.layers.8:in` | modules of any model; a bridge's: of what it wraps |
| `("model.layers.8", "in")` | the same, as the pair that other libraries store |
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sae_kit.devices import pick_device
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

HEAD_SHAPED = frozenset({"hook_z", "hook_q", "hook_k", "hook_v", "hook_result"})
"""HookPoints whose value may be [batch, position, heads, d_head]."""

READ_ONLY = frozenset({"hook_normalized", "hook_scale"})
"""HookPoints beside the flow of the forward, not in it."""


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

    Functions see values as [..., width]: head-shaped ones come flattened, and what `on_write`'s function returns
    is given its head shape back.
    """

    spelling: str
    """the name that was asked for"""
    site: Site
    module: nn.Module
    """the HookPoint, or the module whose input or output this is"""
    names: tuple[str, ...]
    """every spelling of this place, canonical first"""
    layout: Literal["flat", "heads"]
    writable: bool

    def on_read(self, fn: Callable[[Tensor], None]) -> Handle:
        """Call `fn(value)` after the functions that are attached now; what it returns is ignored."""

        def read(value: Tensor) -> None:
            fn(self._flat(value))

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
            replacement = fn(self._flat(value))
            return None if replacement is None else replacement.reshape(value.shape)

        return self._attach(write, first=True)

    def _flat(self, value: Tensor) -> Tensor:
        return value.flatten(-2) if self.layout == "heads" and value.ndim == 4 else value

    def _attach(self, fn: Callable[[Tensor], Tensor | None], first: bool) -> Handle:
        if self.site.io == "hook":
            return _attach_to_point(self.module, fn, first)
        if self.site.io == "in":

            def pre(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                key = None if args else _first_tensor_name(kwargs, self.spelling)
                replacement = fn(args[0] if key is None else kwargs[key])
                if replacement is None:
                    return None
                return ((replacement, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: replacement})

            return Handle(self.module.register_forward_pre_hook(pre, prepend=first, with_kwargs=True).remove)

        def post(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return fn(output)
            replacement = fn(output[0])
            if replacement is None:
                return None
            if not isinstance(output, tuple):
                raise ShapeError(
                    f"{self.spelling!r} gives a {type(output).__name__}: only tensors and tuples can be replaced"
                )
            return (replacement, *output[1:])

        return Handle(self.module.register_forward_hook(post, prepend=first).remove)


def resolve(model: nn.Module, spelling: Spelling) -> BoundSite:
    """Find a site in `model`, before any forward.

    Raises:
        HookNotFoundError: no such place (with the nearest name), or one that sleeps behind a switch of the model.
    """
    name = spelling if isinstance(spelling, str) else ":".join(spelling)
    points: dict[str, nn.Module] | None = getattr(model, "hook_dict", None)
    if points and name in points:
        return _resolve_point(model, points, name)
    path, io = _split(name)
    inner = model if points is None else getattr(model, "original_model", model)
    try:
        module = inner.get_submodule(path) if path else None
    except AttributeError:
        module = None
    if module is None or io is None:
        raise HookNotFoundError(f"hook {name!r} is not in this model.{_suggest(name, points, inner)}")
    names = (path, f"{path}:out") if io == "out" else (f"{path}:in",)
    return BoundSite(name, Site(path, io), module, names, layout="flat", writable=True)


def capture(model: nn.Module, sites: Iterable[Spelling | BoundSite], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Values at `sites` in `model(*args, **kwargs)`, which is stopped when the last of them has fired.

    Keys are the spellings given; values are [..., width], without gradient. The hooks are removed whatever happens.

    Raises:
        HookNotFoundError: see `resolve`; raised before the forward.
        SiteDidNotFireError: the forward ended without reaching a site.
    """
    if kwargs.get("output_hidden_states"):
        raise ConfigError("output_hidden_states=True cannot be combined with an early stop; name the sites instead")
    bound = {site.spelling: site for site in (s if isinstance(s, BoundSite) else resolve(model, s) for s in sites)}
    if not bound:
        raise ConfigError("expected at least one site to read, found none")
    kwargs = without_cache(model) | kwargs
    values: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            if name in values:  # a module that runs twice: its first value
                return
            if len(values) + 1 == len(bound):
                values[name] = value.detach()
                raise _StopForward
            values[name] = value.detach().clone()  # later modules may go on in place

        return read

    handles: list[Handle] = []
    try:
        handles += [site.on_read(reader(name)) for name, site in bound.items()]
        with torch.no_grad():
            model(*args, **kwargs)
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in bound if name not in values]:
        raise SiteDidNotFireError(
            f"the forward pass never reached {', '.join(map(repr, missing))}; choose another site"
        )
    return {name: values[name] for name in bound}


def site_width(model: nn.Module, spelling: Spelling | BoundSite, *args: Any, **kwargs: Any) -> int:
    """Width of the values at a site, seen in a forward of `args` (default: one token of id 0)."""
    args = args or (torch.zeros(1, 1, dtype=torch.int64, device=device_of(model)),)
    (value,) = capture(model, [spelling], *args, **kwargs).values()
    return value.shape[-1]


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The argument that spares a forward the keys and values of a generation, where the model would keep them."""
    config = getattr(getattr(model, "original_model", model), "config", None)
    return {"use_cache": False} if getattr(config, "use_cache", False) else {}


def max_context(model: nn.Module) -> int | None:
    """The longest row that the model can read, or None where it does not say."""
    for config, name in (
        (getattr(model, "cfg", None), "n_ctx"),
        (getattr(model, "config", None), "max_position_embeddings"),
        (getattr(model, "config", None), "n_positions"),
    ):
        if isinstance(limit := getattr(config, name, None), int) and limit > 0:
            return limit
    return None


def device_of(model: nn.Module) -> torch.device:
    """Where the model expects its ids."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model whose activations are read."""

    name: str | None = None
    """hub id or folder of the language model; demo = the one that ships with sae_kit"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    tokenizer: str | None = None
    """hub id or folder of another tokenizer; None = the model's"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the model; auto = float32 on a CPU, as stored on a GPU"""
    device: str = "auto"
    """where the model runs, e.g. cpu or cuda:1; auto = cuda where there is one, else cpu"""


def load_model(cfg: ModelConfig) -> tuple[nn.Module, Any]:
    """The model of `cfg` as a TransformerBridge with raw weights, in eval mode, and its tokenizer.

    The tokenizer is read anew: the bridge changes its own, giving it a BOS and a padding token where it has none.

    Raises:
        ConfigError: no name, a device that is not there, or a model or tokenizer that cannot be read.
    """
    if cfg.name is None:
        raise ConfigError('model.name: expected a hub id, a folder or "demo", found None')
    name = model_path(cfg.name)
    device = str(pick_device(cfg.device, "model.device"))
    from safetensors import SafetensorError
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig, AutoTokenizer

    try:
        dtype = cfg.dtype if cfg.dtype != "auto" else "float32"
        if cfg.dtype == "auto" and not device.startswith("cpu"):
            dtype = getattr(AutoConfig.from_pretrained(name, revision=cfg.revision), "dtype", None) or dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with _bars(shown=cfg.name != "demo"):
            model = TransformerBridge.boot_transformers(name, device=device, dtype=dtype, revision=cfg.revision)
        if cfg.tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=cfg.revision)
        else:
            tokenizer = AutoTokenizer.from_pretrained(cfg.tokenizer)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot read model {cfg.name!r} or its tokenizer: {reason}") from error
    return model.eval().requires_grad_(False), tokenizer


def model_path(name: str) -> str:
    """Where `name` is read from: "demo" is the model that comes with the package, all else stands for itself."""
    if name != "demo":
        return name
    from sae_kit.demo import MODEL_FOLDER

    return str(MODEL_FOLDER)


@contextmanager
def _bars(shown: bool) -> Generator[None, None, None]:
    """Loading bars of transformers: the demo's model is there before one could be read."""
    from transformers.utils import logging as messages

    before = messages.is_progress_bar_enabled()
    if not shown:
        messages.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            messages.enable_progress_bar()


class _StopForward(Exception):
    pass


def _resolve_point(model: nn.Module, points: dict[str, nn.Module], name: str) -> BoundSite:
    point = points[name]
    canonical = getattr(point, "name", None) or name
    names = sorted((n for n, p in points.items() if p is point), key=lambda n: n != canonical)
    switch = SLEEPING.get(canonical.rpartition(".")[2])
    if switch is not None and not getattr(getattr(model, "cfg", None), switch, False):
        raise HookNotFoundError(f"hook {name!r} sleeps in this model: call model.set_{switch}(True) before reading it")
    last = {n.rpartition(".")[2] for n in names}
    # A bridge's hook_resid_mid is the input of a norm: an edit there would miss the skip path.
    wrapped_mid = "hook_resid_mid" in last and hasattr(model, "original_model")
    writable = last.isdisjoint(READ_ONLY) and not wrapped_mid
    layout = "flat" if last.isdisjoint(HEAD_SHAPED) else "heads"
    return BoundSite(name, Site(canonical, "hook"), point, tuple(names), layout, writable)


def _attach_to_point(point: Any, fn: Callable[[Tensor], Tensor | None], first: bool) -> Handle:
    def hook(value: Tensor, hook: Any) -> Tensor | None:
        return fn(value)

    point.add_hook(hook, is_permanent=True, prepend=first)
    record = point.fwd_hooks[0 if first else -1]  # TransformerLens 3 returns nothing

    def remove() -> None:
        record.hook.remove()
        point.fwd_hooks = [r for r in point.fwd_hooks if r is not record]

    return Handle(remove)


def _split(name: str) -> tuple[str, IO | None]:
    path, colon, io = name.partition(":")
    if not colon:
        return path, "out"
    return path, io if io in ("in", "out") else None


def _first_tensor_name(kwargs: dict[str, Any], spelling: str) -> str:
    if "hidden_states" in kwargs:
        return "hidden_states"
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return name
    raise SiteDidNotFireError(f"{spelling!r} was called without a tensor")


def _suggest(name: str, points: dict[str, nn.Module] | None, inner: nn.Module) -> str:
    # A bridge wraps each module of the inner model in one of its own; the path leaves the wrapper out.
    paths = {path.replace("._original_component", "") for path, _ in inner.named_modules() if path}
    near = did_you_mean(name, [*(points or ()), *sorted(paths)])
    if points is None and ".hook_" in name:
        return f"{near} It has no TransformerLens names: give a module path, or load it as a TransformerBridge"
    return near
