"""Reading activations: one hook per site, and a forward that stops as soon as all of them have fired.

A site in the middle of the model therefore costs half a forward, and nothing is cached. Where sites are and what they
are called is the business of `sae_kit.data.sites`.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_kit.data.sites import BoundSite, Handle, Spelling, resolve, unwrapped
from sae_kit.errors import ConfigError, SiteDidNotFireError


@dataclass(frozen=True, eq=False)
class Reader:
    """A model and how it is run on token ids: what each of its forwards is given besides them."""

    model: nn.Module
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """arguments of every forward"""
    autocast: bool = False
    """run forwards under autocast to bfloat16"""

    def capture(
        self,
        sites: Iterable[Spelling | BoundSite],
        ids: Int[Tensor, "rows context"],
        lengths: Int[Tensor, " rows"] | None = None,
    ) -> dict[str, Float[Tensor, "..."]]:
        """Values at `sites` in a forward that stops at the last of them; see `capture`.

        `lengths` are the ids of each row before its padding, which the other positions then do not attend to.
        """
        device = device_of(self.model)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            return capture(self.model, sites, ids.to(device), **self._arguments(ids, lengths))

    def __call__(self, ids: Int[Tensor, "rows context"], lengths: Int[Tensor, " rows"] | None = None) -> Any:
        """What the model gives for `ids` in a whole forward, with its gradient if that is on."""
        device = device_of(self.model)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(ids.to(device), **without_cache(self.model) | self._arguments(ids, lengths))

    def _arguments(self, ids: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        if lengths is None or bool((lengths == ids.shape[1]).all()):
            return dict(self.kwargs)
        if not _takes_mask(self.model):
            raise ConfigError(
                f"padded rows need a model whose forward takes attention_mask, which {type(self.model).__name__} does "
                'not; leave short documents out (data.short="drop") or pack them'
            )
        mask = torch.arange(ids.shape[1]) < lengths[:, None].cpu()
        return {"attention_mask": mask.to(device_of(self.model), torch.int64), **self.kwargs}


def capture(model: nn.Module, sites: Iterable[Spelling | BoundSite], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Values at `sites` in `model(*args, **kwargs)`, which is stopped when the last of them has fired.

    Keys are the spellings given; values are [..., width], without gradient. The hooks are removed whatever happens, and
    a forward of the same model in another thread is neither read nor stopped.

    Raises:
        HookNotFoundError: see `resolve`; raised before the forward.
        SiteDidNotFireError: the forward ended without reaching a site.
    """
    if kwargs.get("output_hidden_states", getattr(_config(model), "output_hidden_states", False)):
        # transformers patches the blocks for it, and the stop would leave them patched.
        raise ConfigError("output_hidden_states=True cannot be combined with an early stop; name the sites instead")
    bound = {site.spelling: site for site in (s if isinstance(s, BoundSite) else resolve(model, s) for s in sites)}
    if not bound:
        raise ConfigError("expected at least one site to read, found none")
    kwargs = without_cache(model) | kwargs
    values: dict[str, Tensor] = {}
    thread = threading.get_ident()

    def reader(name: str) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            if name in values or threading.get_ident() != thread:  # of a module that runs twice: its first value
                return
            if len(values) + 1 == len(bound):
                values[name] = value.detach()
                raise _StopForward
            values[name] = value.detach().clone()  # later modules may go on in place

        return read

    handles: list[Handle] = []
    try:
        handles += [site.on_read(reader(name)) for name, site in bound.items()]
        # Hooks that come and go would have a compiled model compiled anew.
        run = getattr(model, "_orig_mod", model)
        with torch.no_grad():
            run(*args, **kwargs)
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


def site_width(model: nn.Module | Reader, spelling: Spelling | BoundSite, *args: Any, **kwargs: Any) -> int:
    """Width of the values at a site, seen in a forward of `args` (default: one token of id 0)."""
    if isinstance(model, Reader):
        model, kwargs = model.model, {**model.kwargs, **kwargs}
    args = args or (torch.zeros(1, 1, dtype=torch.int64, device=device_of(model)),)
    (value,) = capture(model, [spelling], *args, **kwargs).values()
    return value.shape[-1]


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The argument that spares a forward the keys and values of a generation, where the model would keep them."""
    return {"use_cache": False} if getattr(_config(model), "use_cache", False) else {}


def max_context(model: nn.Module) -> int | None:
    """The longest row that the model can read, or None where it does not say."""
    inner, config = unwrapped(model), _config(model)
    config = getattr(config, "text_config", None) or config
    for source, name in (
        (getattr(inner, "cfg", None), "n_ctx"),
        (config, "max_position_embeddings"),
        (config, "n_positions"),
    ):
        if isinstance(limit := getattr(source, name, None), int) and limit > 0:
            return limit
    return None


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of ids that the model can read, or None where it does not say."""
    inner, config = unwrapped(model), _config(model)
    config = getattr(config, "text_config", None) or config
    sizes = (getattr(getattr(inner, "cfg", None), "d_vocab", None), getattr(config, "vocab_size", None))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model expects its ids."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _config(model: nn.Module) -> Any:
    """The config of the Hugging Face model that this is or wraps."""
    inner = unwrapped(model)
    return getattr(getattr(inner, "original_model", inner), "config", None)


def _takes_mask(model: nn.Module) -> bool:
    parameters = inspect.signature(unwrapped(model).forward).parameters
    return "attention_mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class _StopForward(Exception):
    pass
