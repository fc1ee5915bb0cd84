"""TransformerLens names of the insides of Hugging Face models, as a table, and where in a model they lie.

TransformerLens gave the places of a transformer names that do not depend on who wrote the model:
`blocks.8.hook_mlp_out`. In a Hugging Face model the same place is the input or output of some module, and which one
is a fact of the model's family: `Family` records it, `Layout` is a family found in one model. The model's own
`config.model_type` says which family it is; the stack of its blocks is found by the end of its path, so that a
language model within a multimodal one has the same names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_kit.errors import HookNotFoundError

IN_A_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class Place(NamedTuple):
    """The input ("in") or the first output ("out") of the module at `path`."""

    path: str
    io: str

    def __str__(self) -> str:
        return self.path if self.io == "out" else f"{self.path}:in"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How models of one kind are laid out; paths of places are those within a block."""

    trunk: str
    """the module that holds embedding and blocks, in the causal language model alone"""
    blocks: str
    """the list of blocks in the trunk"""
    embed: str
    """the embedding in the trunk"""
    places: Mapping[str, str]
    """TransformerLens name -> `path:in` or `path:out`"""

    def place(self, name: str) -> Place | None:
        """Where the value called `name` within a block is."""
        if name not in self.places:
            return None
        path, _, io = self.places[name].partition(":")
        return Place(path, io)

    def names(self, place: Place) -> list[str]:
        """The TransformerLens names of a place within a block, those that can be written first."""
        found = [name for name in self.places if name not in DERIVED and self.place(name) == place]
        return sorted(found, key=lambda name: name in READ_ONLY)


DERIVED = frozenset({"ln1.hook_normalized", "ln2.hook_normalized"})
"""The value before a norm's gain and bias, which is no module's input or output: recomputed from the norm's input."""

READ_ONLY = DERIVED | {"hook_resid_mid"}
"""Names of what can be read but not written: the stream also passes by the norm whose input `hook_resid_mid` is."""

_BLOCK = {"hook_resid_pre": ":in", "hook_resid_post": ":out", "mlp.hook_in": "mlp:in"}
_NORMS_IN_FRONT = {
    "hook_resid_mid": "post_attention_layernorm:in",
    "ln2.hook_out": "post_attention_layernorm:out",
    "ln1.hook_normalized": "input_layernorm:in",
    "ln2.hook_normalized": "post_attention_layernorm:in",
}
_GATED = {
    "attn.hook_z": "self_attn.o_proj:in",
    "mlp.hook_pre": "mlp.gate_proj:out",
    "mlp.hook_post": "mlp.down_proj:in",
}
_BARE_OUTPUTS = {"hook_attn_out": "self_attn:out", "hook_mlp_out": "mlp:out"}
_NORMED_OUTPUTS = {"hook_attn_out": "post_attention_layernorm:out", "hook_mlp_out": "post_feedforward_layernorm:out"}


def _trunk_of_llama(*places: Mapping[str, str]) -> Family:
    merged = {name: path for part in (_BLOCK, *places) for name, path in part.items()}
    return Family(trunk="model", blocks="layers", embed="embed_tokens", places=merged)


_LLAMA = _trunk_of_llama(_NORMS_IN_FRONT, _GATED, _BARE_OUTPUTS)
# One matrix makes the gate and what it gates, so `mlp.hook_pre` is no module's output.
_PHI3 = _trunk_of_llama(
    _NORMS_IN_FRONT, {name: path for name, path in _GATED.items() if name != "mlp.hook_pre"}, _BARE_OUTPUTS
)
# Norms before and after attention and MLP: what is added to the stream is what the second of them gives.
_GEMMA = _trunk_of_llama(
    _NORMED_OUTPUTS,
    _GATED,
    {
        "hook_resid_mid": "pre_feedforward_layernorm:in",
        "ln2.hook_out": "pre_feedforward_layernorm:out",
        "ln1.hook_normalized": "input_layernorm:in",
        "ln2.hook_normalized": "pre_feedforward_layernorm:in",
    },
)
# Norms only after attention and MLP, which therefore read the stream itself.
_OLMO2 = _trunk_of_llama(_NORMED_OUTPUTS, _GATED, {"hook_resid_mid": "mlp:in"})
_GPT2 = Family(
    trunk="transformer",
    blocks="h",
    embed="wte",
    places={
        **_BLOCK,
        "hook_resid_mid": "ln_2:in",
        "hook_attn_out": "attn:out",
        "hook_mlp_out": "mlp:out",
        "attn.hook_z": "attn.c_proj:in",
        "mlp.hook_pre": "mlp.c_fc:out",
        "mlp.hook_post": "mlp.c_proj:in",
        "ln2.hook_out": "ln_2:out",
        "ln1.hook_normalized": "ln_1:in",
        "ln2.hook_normalized": "ln_2:in",
    },
)
# Attention and MLP side by side: there is no stream between them.
_NEOX = Family(
    trunk="gpt_neox",
    blocks="layers",
    embed="embed_in",
    places={
        **_BLOCK,
        "hook_attn_out": "attention:out",
        "hook_mlp_out": "mlp:out",
        "attn.hook_z": "attention.dense:in",
        "mlp.hook_pre": "mlp.dense_h_to_4h:out",
        "mlp.hook_post": "mlp.dense_4h_to_h:in",
        "ln2.hook_out": "post_attention_layernorm:out",
        "ln1.hook_normalized": "input_layernorm:in",
        "ln2.hook_normalized": "post_attention_layernorm:in",
    },
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_neox": _NEOX,
    "phi3": _PHI3,
    "olmo2": _OLMO2,
}
"""`config.model_type` -> family."""

ANY_KIND = Family(trunk="", blocks="", embed="", places={"hook_resid_pre": ":in", "hook_resid_post": ":out"})
"""What is known of a kind of model that is not in the table: what goes into a block, and what comes out of it."""


@dataclass(frozen=True)
class Layout:
    """A family found in one model."""

    model_type: str
    family: Family
    stacks: tuple[str, ...]
    """paths of what may be the list of blocks"""
    n_blocks: int

    @property
    def is_listed(self) -> bool:
        """Whether the table has this kind of model."""
        return self.family is not ANY_KIND

    def place(self, name: str) -> Place | None:
        """The place that a TransformerLens name means, or None.

        Raises:
            HookNotFoundError: there are two lists of blocks, or none, so that the name has no one meaning.
        """
        match = IN_A_BLOCK.fullmatch(name)
        if name == "hook_embed" and self.family.embed:
            return Place(_joined(self._stack(name).rpartition(".")[0], self.family.embed), "out")
        place = self.family.place(match[2]) if match else None
        if match is None or place is None:
            return None
        return Place(_joined(self._stack(name), match[1], place.path), place.io)

    def names(self, place: Place) -> list[str]:
        """The TransformerLens names of a place, those that can be written first."""
        for stack in self.stacks if len(self.stacks) == 1 else ():
            number, _, rest = place.path.removeprefix(f"{stack}.").partition(".")
            if place.path.startswith(f"{stack}.") and number.isdecimal():
                return [f"blocks.{number}.{name}" for name in self.family.names(Place(rest, place.io))]
            if self.family.embed and place == self.place("hook_embed"):
                return ["hook_embed"]
        return []

    def all_names(self) -> Iterator[str]:
        """Every name that `place` knows, for suggestions."""
        if self.family.embed:
            yield "hook_embed"
        for number in range(self.n_blocks):
            yield from (f"blocks.{number}.{name}" for name in self.family.places)

    def _stack(self, name: str) -> str:
        if len(self.stacks) == 1:
            return self.stacks[0]
        found = (
            f"its blocks could be those of {' or of '.join(self.stacks)}" if self.stacks else "it has no known blocks"
        )
        raise HookNotFoundError(
            f"{name!r} is not one place in this {self.model_type} model: {found}; use a module path"
        )


def layout_of(model: nn.Module) -> Layout | None:
    """The layout of a Hugging Face model; None of other modules.

    A model that holds several is known by its `text_config`. The list of blocks is the one `ModuleList` of the right
    length; in a family of the table it also has the family's name, and its blocks the family's modules.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    model_type, n_blocks = getattr(config, "model_type", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(model_type, str) or not isinstance(n_blocks, int) or n_blocks < 1:
        return None
    family = FAMILIES.get(model_type, ANY_KIND)
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_blocks]
    stacks = [path for path, blocks in lists if _fits(family, path, blocks[0])]
    outermost = [path for path in stacks if not any(path.startswith(f"{other}.") for other in stacks)]
    return Layout(model_type, family, tuple(outermost), n_blocks)


def layouts_of_architecture(architecture: str | None) -> list[Layout]:
    """How models of a class, such as "LlamaForCausalLM", are laid out; of an unknown one (None) all that could be."""
    found = {kind: Layout(kind, family, (f"{family.trunk}.{family.blocks}",), 0) for kind, family in FAMILIES.items()}
    for kind, layout in found.items():
        compact = kind.removesuffix("_text").replace("_", "")
        if re.match(rf"{compact}(for|lmhead)", (architecture or "").lower()):
            return [layout]
    return [] if architecture else list(found.values())


def _fits(family: Family, path: str, block: nn.Module) -> bool:
    if family is ANY_KIND:
        return True
    if path.rpartition(".")[2] != family.blocks:
        return False
    try:
        for name in family.places:
            block.get_submodule(family.places[name].partition(":")[0])
    except AttributeError:
        return False
    return True


def normalized(norm: Any, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """What LayerNorm or RMSNorm makes of `x` [..., width] before its gain and bias; computed in float32."""
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    wide = x.float()
    if isinstance(norm, nn.LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
