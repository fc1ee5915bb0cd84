"""`HookedSAETransformer`: a TransformerLens model with methods for SAEs; and `attached`, which serves any model.

The class is sugar over `sae_kit.splicing`. Its base is TransformerBridge, on TransformerLens 3 HookedTransformer; it
is made when it is first asked for, because importing TransformerLens takes seconds.
"""

import functools
import importlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sae_kit.data.models import Compatibility, ModelConfig, load_model, model_path
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE
from sae_kit.splicing import Attachment, SAEs, attach, attached, detach_at, spliced_sites

__all__ = ["Attachment", "HookedSAETransformer", "SAETransformerBridge", "attached"]

PROCESSING = tuple(field.name for field in fields(Compatibility))
"""Weight processing of TransformerLens, each on by default in `from_pretrained`."""


class _SAEMethods:
    """What `HookedSAETransformer` adds to its host; names and defaults are those of TransformerLens 1 and SAELens."""

    @classmethod
    def from_model(cls, model: Any) -> Any:
        """Give a model that exists these methods, in place: its class changes, nothing is copied."""
        if isinstance(model, _SAEMethods):
            return model
        if not (isinstance(model, nn.Module) and hasattr(model, "hook_dict") and hasattr(model, "run_with_cache")):
            raise ConfigError(
                f"expected a TransformerBridge or a HookedTransformer, found {type(model).__name__}; "
                "sae_kit.attached works on any model"
            )
        model.__class__ = _class_over(type(model))
        return model

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> Any:
        """The model `name` with weights processed as TransformerLens does; "demo" is the one that ships with sae_kit.

        `fold_ln`, `center_writing_weights`, `center_unembed` and `fold_value_biases` default to True.
        """
        flags = {flag: kwargs.pop(flag, True) for flag in PROCESSING}
        if not hasattr(cls, "boot_transformers"):
            if Path(model_path(name)).is_dir():  # TransformerLens 3 knows only names
                cfg = ModelConfig(name=name, host="hooked", compat=Compatibility(**flags), **kwargs)
                return cls.from_model(load_model(cfg)[0])
            return super().from_pretrained(model_path(name), **flags, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        model = cls.from_pretrained_no_processing(name, **kwargs)
        model.enable_compatibility_mode(**flags)
        return model

    @classmethod
    def from_pretrained_no_processing(cls, name: str, **kwargs: Any) -> Any:
        """The model `name` with its weights as published."""
        boot = getattr(cls, "boot_transformers", None)
        if boot is None:
            return cls.from_pretrained(name, **dict.fromkeys(PROCESSING, False), **kwargs)
        return cls.from_model(boot(model_path(name), **kwargs))

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """Site -> the SAE that acts there now."""
        return spliced_sites(_module(self))

    def add_sae(self, sae: SAE, use_error_term: bool | None = None) -> None:
        """Attach `sae` until `reset_saes`; it takes the place of what is attached at its site."""
        attach(_module(self), sae, use_error_term, record=(), replacing=True)

    def reset_saes(
        self, act_names: str | Sequence[str] | None = None, prev_saes: Sequence[SAE | None] | None = None
    ) -> None:
        """Detach the SAEs at these sites (None: all), and attach `prev_saes`, one per name, in their place.

        Each of them takes its own `use_error_term`: one that an earlier `add_sae` was given is not remembered.

        Raises:
            HookNotFoundError: a name at which no SAE is attached.
        """
        if act_names is None:
            sites = list(self.acts_to_saes)
        else:
            sites = [act_names] if isinstance(act_names, str) else list(act_names)
        if prev_saes is not None and len(prev_saes) != len(sites):
            raise ConfigError(f"expected one of prev_saes per name, found {len(prev_saes)} for {len(sites)} names")
        detach_at(_module(self), None if act_names is None else sites)
        for site, sae in zip(sites, prev_saes or (), strict=False):
            if sae is not None:
                attach(_module(self), {site: sae}, None, record=(), replacing=True)

    @contextmanager
    def saes(
        self, saes: SAEs = (), reset_saes_end: bool = True, use_error_term: bool | None = None
    ) -> Generator[Any, None, None]:
        """Attach SAEs for the length of a `with` block, or, with `reset_saes_end=False`, from it on."""
        attachment = attach(_module(self), saes, use_error_term, record=())
        try:
            yield self
        except BaseException:
            attachment.detach()
            raise
        if reset_saes_end:
            attachment.detach()

    def run_with_saes(
        self,
        *args: Any,
        saes: SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """One forward with SAEs attached."""
        _refuse_masks(kwargs)
        with self.saes(saes, reset_saes_end, use_error_term):
            return _module(self)(*args, **kwargs)

    def run_with_cache_with_saes(
        self,
        *args: Any,
        saes: SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`run_with_cache` with SAEs attached; the cache also has their internals."""
        _refuse_masks(kwargs)
        with self.saes(saes, reset_saes_end, use_error_term):
            return _tl(self).run_with_cache(
                *args, return_cache_object=return_cache_object, remove_batch_dim=remove_batch_dim, **kwargs
            )

    def run_with_hooks_with_saes(
        self,
        *args: Any,
        saes: SAEs = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        fwd_hooks: Sequence[tuple[Any, Callable[..., Any]]] = (),
        bwd_hooks: Sequence[tuple[Any, Callable[..., Any]]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`run_with_hooks` with SAEs attached; the hooks may name their internals."""
        _refuse_masks(kwargs)
        with self.saes(saes, reset_saes_end, use_error_term):
            return _tl(self).run_with_hooks(
                *args,
                fwd_hooks=list(fwd_hooks),
                bwd_hooks=list(bwd_hooks),
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                **kwargs,
            )


def __getattr__(name: str) -> Any:
    if name not in ("HookedSAETransformer", "SAETransformerBridge"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = None
    if name == "HookedSAETransformer":
        try:
            base = getattr(importlib.import_module("transformer_lens"), "HookedTransformer", None)
        except ImportError:  # how TransformerLens 4 says that the class is gone
            base = None
    if base is None:
        base = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    globals()[name] = found = _class_over(base)
    return found


@functools.cache
def _class_over(base: type) -> type:
    doc = f"A {base.__name__} with methods for SAEs."
    return type("HookedSAETransformer", (_SAEMethods, base), {"__module__": __name__, "__doc__": doc})


def _module(model: _SAEMethods) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _tl(model: _SAEMethods) -> Any:
    return model


def _refuse_masks(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("exclude_special_tokens", False):
        raise ConfigError("exclude_special_tokens is not supported yet; leave it out to replace every position")


if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    class HookedSAETransformer(_SAEMethods, TransformerBridge):
        """A TransformerBridge (on TransformerLens 3: a HookedTransformer) with methods for SAEs."""

    SAETransformerBridge = HookedSAETransformer
