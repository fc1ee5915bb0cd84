"""Facts about an SAE that no forward pass needs: where it was trained, on what, by which version.

The fields are those that SAELens writes, under its names, so that files travel both ways. A misspelt name is
an AttributeError or TypeError; whatever else a file's metadata holds is kept verbatim in `extra`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

SAE_LENS_COMPATIBILITY = "6.0.0"
"""Version of SAELens whose file layout we promise; readers there treat a file without it as pre-6."""


@dataclass(kw_only=True, slots=True)
class SAEMetadata:
    """What is known about an SAE's origin; None means unknown."""

    model_name: str | None = None
    """language model, by its hub id"""
    hook_name: str | None = None
    """site that is read, in the spelling that the run used"""
    hook_name_out: str | None = None
    """site that is written, if it is another one (transcoders)"""
    hook_head_index: int | None = None
    """attention head, if only one is read"""
    hook_head_index_out: int | None = None
    hf_hook_name: str | None = None
    """module path of the site in the plain Hugging Face model"""
    hf_hook_name_out: str | None = None
    model_class_name: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    """weight processing that the activations depend on"""
    prepend_bos: bool | None = None
    exclude_special_tokens: bool | list[int] | None = None
    """token ids whose positions were not trained on"""
    context_size: int | None = None
    seqpos_slice: tuple[int | None, ...] | None = None
    dataset_path: str | None = None
    neuronpedia_id: str | None = None
    l0: float | None = None
    num_dead_features: int | None = None
    training_architecture: str | None = None
    training_architecture_details: dict[str, Any] | None = None
    """fields that only shaped training"""
    extra: dict[str, Any] = field(default_factory=dict)
    """everything else, kept verbatim"""

    @classmethod
    def from_dict(cls, data: object, where: str = "") -> SAEMetadata:
        """Known names become fields, all others go to `extra`, an `extra` of a config tree included."""
        from sae_kit.errors import ConfigError

        if not isinstance(data, dict):
            raise ConfigError(f"{where or 'metadata'}: expected a mapping, found {data!r}")
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        known = {key: value for key, value in data.items() if key in names}
        if isinstance(known.get("seqpos_slice"), list):
            known["seqpos_slice"] = tuple(known["seqpos_slice"])
        extra = {key: value for key, value in data.items() if key not in names and key != "extra"}
        return cls(**known, extra={**data.get("extra", {}), **extra})

    def to_dict(self) -> dict[str, Any]:
        """Fields and `extra` side by side, as files have them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        if isinstance(fields["seqpos_slice"], tuple):
            fields["seqpos_slice"] = list(fields["seqpos_slice"])
        return {**fields, **self.extra}
