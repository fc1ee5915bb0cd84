"""Language models from their name: a plain Hugging Face model, or the same weights as a TransformerLens host.

A plain model is the cheapest to read. A TransformerBridge is made around one that is loaded already, so weights are
read once whatever the host turns out to be. A HookedTransformer copies them into modules of its own.
"""

import importlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from sae_kit.data.capture import Reader
from sae_kit.data.sites import Spelling, resolve
from sae_kit.devices import pick_device
from sae_kit.errors import ConfigError, HookNotFoundError


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """Processing of weights by TransformerLens; each of these moves the activations of some sites."""

    fold_ln: bool = False
    """move the gain of each norm into the weights that follow"""
    center_writing_weights: bool = False
    """take the mean out of everything that is added to the residual stream"""
    center_unembed: bool = False
    """take the mean over the vocabulary out of the logits"""
    fold_value_biases: bool = False
    """move value biases into the bias of the attention's output"""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model whose activations are read."""

    name: str | None = None
    """hub id or folder of the language model; demo = the one that ships with sae_kit"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    tokenizer: str | None = None
    """hub id or folder of another tokenizer; None = the model's"""
    host: Literal["auto", "hf", "bridge", "hooked"] = "auto"
    """hf = plain; bridge, hooked (TransformerLens 3) = as a TransformerLens model; auto = hf if that has every site"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the model; auto = float32 on a CPU, as stored on a GPU"""
    device: str = "auto"
    """where the model runs, e.g. cpu or cuda:1; auto = cuda where there is one, else cpu"""
    autocast: bool = False
    """run forwards under autocast to bfloat16"""
    attn_implementation: str | None = None
    """attention kernel of transformers, such as sdpa or eager; None = the model's, in a bridge eager"""
    compat: Compatibility | None = None
    """weights processed by TransformerLens; None = as published"""
    trust_remote_code: bool = False
    """run the code that comes with the model on the hub"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further arguments of from_pretrained"""
    forward_kwargs: dict[str, Any] = field(default_factory=dict)
    """further arguments of every forward"""

    def __post_init__(self) -> None:
        if self.compat is not None and self.host == "hf":
            raise ConfigError('compat: weights of a plain Hugging Face model are not processed; choose host="bridge"')
        if "output_hidden_states" in self.forward_kwargs:
            raise ConfigError(
                "forward_kwargs: output_hidden_states cannot be combined with forwards that stop early; "
                "name the sites to be read instead"
            )
        if self.attn_implementation is not None and self.host == "hooked":
            raise ConfigError('attn_implementation: a HookedTransformer has its own; choose host="hf" or "bridge"')
        own = {"revision", "dtype", "torch_dtype", "attn_implementation", "trust_remote_code", "device_map"}
        if taken := own & self.kwargs.keys():
            raise ConfigError(f"kwargs: {', '.join(sorted(taken))} cannot be given here, but by the fields beside it")

    def reader(self, model: nn.Module) -> Reader:
        """`model`, run as this config says."""
        return Reader(model, self.forward_kwargs, self.autocast)


def load_model(cfg: ModelConfig, sites: Iterable[Spelling] = ()) -> tuple[nn.Module, Any]:
    """The model of `cfg`, in eval mode, and its tokenizer.

    With host "auto" it is a plain Hugging Face model if that has all of `sites`, and otherwise a TransformerBridge. The
    tokenizer is read anew: TransformerLens changes its own, giving it a BOS and a padding token where it has none.

    Raises:
        ConfigError: no name, a device that is not there, a model or tokenizer that cannot be read, or a host that the
            installed TransformerLens does not have.
        HookNotFoundError: the plain model lacks a site, and TransformerLens has no bridge for models of its kind.
    """
    if cfg.name is None:
        raise ConfigError('model.name: expected a hub id, a folder or "demo", found None')
    device = str(pick_device(cfg.device, "model.device"))
    if cfg.host == "hooked":
        _hooked_transformer()
    with _reading(cfg.name):
        model = _plain(cfg, device)
        tokenizer = _tokenizer(cfg)
        missing = _missing(model, sites) if cfg.host == "auto" and cfg.compat is None else None
        if cfg.host == "bridge" or (cfg.host == "auto" and cfg.compat is not None) or missing is not None:
            try:
                model = _bridge(cfg, model)
            except ValueError as error:
                if missing is None:
                    raise
                raise missing from error
        elif cfg.host == "hooked":
            model = _hooked(cfg, model)
    return model.eval().requires_grad_(False), tokenizer


def model_facts(model: nn.Module, cfg: ModelConfig | None = None) -> dict[str, Any]:
    """Which model gives the activations, as JSON values: what must be equal for them to be equal."""
    cfg = cfg or ModelConfig()
    parameter = next(model.parameters(), None)
    compat = asdict(cfg.compat or Compatibility())
    return {
        "name": cfg.name,
        "revision": cfg.revision,
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "autocast": cfg.autocast,
        "compat": compat,
        "forward_kwargs": dict(cfg.forward_kwargs),
    }


def model_path(name: str) -> str:
    """Where `name` is read from: "demo" is the model that comes with the package, all else stands for itself."""
    if name != "demo":
        return name
    from sae_kit.demo import MODEL_FOLDER

    return str(MODEL_FOLDER)


def _missing(model: nn.Module, sites: Iterable[Spelling]) -> HookNotFoundError | None:
    """What there is to say about the first of `sites` that is not in `model`."""
    try:
        for site in sites:
            resolve(model, site)
    except HookNotFoundError as error:
        return error
    return None


def _plain(cfg: ModelConfig, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = cfg.dtype if cfg.dtype != "auto" else "float32" if device.startswith("cpu") else "auto"
    eager = cfg.host == "bridge" and cfg.attn_implementation is None  # its attention patterns can be read
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_path(str(cfg.name)),
        revision=cfg.revision,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation="eager" if eager else cfg.attn_implementation,
        trust_remote_code=cfg.trust_remote_code,
        **cfg.kwargs,
    )
    return model.to(device)


def _tokenizer(cfg: ModelConfig, **kwargs: Any) -> Any:
    from transformers import AutoTokenizer

    if cfg.tokenizer is not None:
        return AutoTokenizer.from_pretrained(cfg.tokenizer, trust_remote_code=cfg.trust_remote_code, **kwargs)
    return AutoTokenizer.from_pretrained(
        model_path(str(cfg.name)), revision=cfg.revision, trust_remote_code=cfg.trust_remote_code, **kwargs
    )


def _for_transformer_lens(cfg: ModelConfig) -> Any:
    """A tokenizer for the host's own use, and so to be changed by it; None = it reads the model's."""
    return None if cfg.tokenizer is None else _tokenizer(cfg, add_bos_token=True)


def _bridge(cfg: ModelConfig, model: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    model.config.architectures = model.config.architectures or [type(model).__name__]
    bridge = TransformerBridge.boot_transformers(
        model_path(str(cfg.name)),
        hf_model=model,
        tokenizer=_for_transformer_lens(cfg),
        device=str(model.device),
        dtype=model.dtype,
        revision=cfg.revision,
        trust_remote_code=cfg.trust_remote_code,
    )
    if cfg.attn_implementation is not None:  # which TransformerLens has overwritten
        model.set_attn_implementation(cfg.attn_implementation)
    if cfg.compat is not None:
        bridge.enable_compatibility_mode(**asdict(cfg.compat))
    return bridge


def _hooked(cfg: ModelConfig, model: Any) -> Any:
    loading = importlib.import_module("transformer_lens.loading_from_pretrained")

    flags: Mapping[str, bool] = asdict(cfg.compat or Compatibility())
    name, hooked = model_path(str(cfg.name)), _hooked_transformer()
    try:  # its own from_pretrained takes no folder, and prints
        config = loading.get_pretrained_model_config(
            name, hf_cfg=model.config.to_dict(), fold_ln=flags["fold_ln"], device=str(model.device), dtype=model.dtype
        )
        weights = loading.get_pretrained_state_dict(name, config, model, dtype=model.dtype)
    except (AttributeError, KeyError, NotImplementedError) as error:
        raise ConfigError(
            f'TransformerLens cannot make a HookedTransformer of {cfg.name!r} ({error}); choose host="bridge"'
        ) from error
    host = hooked(config, _for_transformer_lens(cfg), move_to_device=False)
    host.load_and_process_state_dict(weights, **flags)
    host.move_model_modules_to_device()
    return host


def _hooked_transformer() -> Any:
    try:
        return importlib.import_module("transformer_lens").HookedTransformer
    except ImportError as error:  # how TransformerLens 4 says that the class is gone
        raise ConfigError(
            'model.host: TransformerLens 4 has no HookedTransformer: choose "bridge", which processes weights in the '
            "same way if model.compat says so, or install transformer-lens<4"
        ) from error


@contextmanager
def _reading(name: str) -> Generator[None, None, None]:
    """Errors say what could not be read; no loading bars for the demo's model, which is there before they are seen."""
    from safetensors import SafetensorError
    from transformers.utils import logging as messages

    shown = messages.is_progress_bar_enabled()
    if name == "demo":
        messages.disable_progress_bar()
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot read model {name!r} or its tokenizer: {reason}") from error
    finally:
        if shown:
            messages.enable_progress_bar()
