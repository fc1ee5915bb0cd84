"""C1, C6: what is written is read back to the bit, in training and inference form, with no field at its default."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fields import REQUIRED, configs_of_other_values, others_of, refused
from helpers import (
    FORMS,
    NORMALIZATIONS,
    estimated,
    every,
    every_form,
    has_form,
    inputs,
    make_config,
    make_sae,
)

from sae_kit import SAE, list_architectures
from sae_kit.errors import ConfigError
from sae_kit.io import load, load_config
from sae_kit.normalization import PER_ROW
from sae_kit.sae_config import SAEConfig

SHAPES = ("d_in", "in_shape", "device")  # two spellings of one width; the machine's


def assert_read_back(sae: SAE, folder: Path) -> None:
    """Config, every tensor and the output of a saved SAE are those of the SAE."""
    sae.save_model(folder)
    again = load(folder, verify=True)
    assert type(again) is type(sae)
    assert again.geometry == sae.geometry
    for field in dataclasses.fields(sae.cfg):
        if field.name not in SHAPES:
            found, expected = getattr(again.cfg, field.name), getattr(sae.cfg, field.name)
            assert found == expected or (found, expected) == ("none", None), field.name
    assert load_config(folder).to_dict() == {**again.cfg.to_dict(), "device": "cpu"}
    torch.testing.assert_close(again.state_dict(), sae.state_dict(), rtol=0, atol=0)
    weights = "sae_weights.safetensors"
    resaved = again.save_model(folder.with_name(f"{folder.name}_again"))
    assert (resaved / weights).read_bytes() == (folder / weights).read_bytes()
    u = inputs(sae, 4, 3)
    assert torch.equal(again(u), sae(u))
    assert torch.equal(again.encode(u), sae.encode(u))


@every_form
def test_both_forms_of_every_geometry(tmp_path: Path, name: str, geometry: str) -> None:
    normalization = "center" if has_form(name, geometry, "center") else "none"
    sae = estimated(make_sae(name, geometry, **NORMALIZATIONS[normalization]))
    sae.tokens_since_fired += torch.arange(sae.geometry.n_latents)
    sae.firing_count += 3
    sae.tokens_seen += 1000
    assert_read_back(sae, tmp_path / "training")
    assert_read_back(sae.to_inference(), tmp_path / "inference")


@pytest.mark.parametrize(
    ("name", "geometry", "normalization"),
    [
        (*form, key)
        for form in FORMS
        for key in NORMALIZATIONS
        if form[1] in ("sae", "clt_skip") and key != "center" and has_form(*form, key)
    ],
)
def test_every_normalisation(tmp_path: Path, name: str, geometry: str, normalization: str) -> None:
    sae = estimated(make_sae(name, geometry, dtype="bfloat16", **NORMALIZATIONS[normalization]))
    for folder, one in (("training", sae), ("inference", sae.to_inference())):
        one.save_model(tmp_path / folder)
        again = SAE.load_from_disk(tmp_path / folder)
        u = inputs(one, 5)
        torch.testing.assert_close(again.state_dict(), one.state_dict(), rtol=0, atol=0)
        assert torch.equal(again(u), one(u))


@every
def test_no_field_is_left_at_its_default(name: str) -> None:
    """A field that is new, or that `tests/fields.py` does not know, is tested too, or this fails."""
    configs = configs_of_other_values(name)
    others = others_of(name)
    for field in dataclasses.fields(configs[0]):
        if field.name in REQUIRED or refused(name, others[field.name]):
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        assert any(getattr(cfg, field.name) != default for cfg in configs), field.name


def test_every_field_has_another_value_somewhere() -> None:
    """An architecture may refuse a value (fixed fields, geometries that it lacks), but not all may."""
    taken: dict[str, bool] = {}
    for name in list_architectures():
        for field, wanted in others_of(name).items():
            taken[field] = taken.get(field, False) or not refused(name, wanted)
    assert [field for field, found in taken.items() if not found] == []


@every
@pytest.mark.parametrize("training", [True, False])
def test_every_field_survives(tmp_path: Path, name: str, training: bool) -> None:
    for number, cfg in enumerate(configs_of_other_values(name)):
        sae = estimated(cfg.build(seed=3))
        assert_read_back(sae if training else sae.to_inference(), tmp_path / str(number))


@every
def test_a_file_says_how_its_sae_is_trained_until_that_is_for_use(tmp_path: Path, name: str) -> None:
    """Whatever scales the activations; at its defaults, and for use, training leaves no fields at the top level."""
    for mode in ("none", *sorted(PER_ROW)):
        given = {} if refused(name, {"normalize_activations": mode}) else {"normalize_activations": mode}
        plain, other = make_config(name, **given).build(), make_config(name, **given, dead_after_tokens=7).build()
        assert plain.selects_over_batch or not training_fields(plain, tmp_path)
        assert training_fields(other, tmp_path) == training_only(other)
        assert SAE.load_from_disk(tmp_path).cfg.dead_after_tokens == 7
        assert not training_fields(other.to_inference(), tmp_path)
        assert not training_fields(SAE.load_from_disk(tmp_path), tmp_path)


def training_only(sae: SAE) -> set[str]:
    return {field.name for field in dataclasses.fields(sae.cfg) if field.metadata.get("training_only")}


def training_fields(sae: SAE, folder: Path) -> set[str]:
    """Fields of training alone in the file of an SAE."""
    return training_only(sae) & json.loads((sae.save_model(folder) / "cfg.json").read_text()).keys()


@every
def test_configs_are_strict_and_round_trip(name: str) -> None:
    for cfg in configs_of_other_values(name):
        assert SAEConfig.from_dict(cfg.to_dict()) == cfg
        without_name = {key: value for key, value in cfg.to_dict().items() if key != "architecture"}
        assert type(cfg).from_dict(without_name) == cfg
    with pytest.raises(ConfigError, match=r"unknown key 'sae\.d_sea'.*Did you mean 'd_sae'\?"):
        SAEConfig.from_dict({**make_config(name).to_dict(), "d_sea": 3}, "sae")
    with pytest.raises(ConfigError, match="d_in is not set"):
        make_config(name, d_in=None).build()


def test_an_unknown_architecture_is_answered_with_the_known_ones() -> None:
    known = ", ".join(list_architectures())
    with pytest.raises(ConfigError, match=rf"unknown architecture 'topc'. Did you mean 'topk'\? Known: {known}"):
        SAEConfig.from_dict({"architecture": "topc", "d_in": 2, "d_sae": 4})


def test_a_subclass_needs_its_own_config() -> None:
    from sae_kit import StandardSAE

    with pytest.raises(ConfigError, match="StandardSAE needs a StandardSAEConfig, found TopKSAEConfig"):
        StandardSAE(make_config("topk"))
    assert isinstance(StandardSAE(make_config("standard")), SAE)


@every
def test_a_form_that_makes_no_sense_is_refused(name: str) -> None:
    cls = list_architectures()[name].sae
    for geometry in ("skip", "transcoder", "skip_transcoder", "crosscoder", "clt"):
        if not has_form(name, geometry):
            with pytest.raises(ConfigError):
                make_sae(name, geometry)
    assert "sae" in cls.geometries


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_shape": (3, 7)}, "in_shape .* and d_in 32 disagree"),
        ({"d_in": None, "in_shape": (3, 7), "out_shape": (4,)}, r"out_shape needs \(sites, width\)"),
        ({"out_shape": (3, 7)}, "several sites are written"),
        ({"cross_layer": True}, "a cross-layer transcoder reads several layers"),
        ({"d_in": None, "in_shape": (3, 7), "out_shape": (2, 7), "cross_layer": True}, "writes the layers it reads"),
        ({"d_in": None, "in_shape": (3, 7), "skip": True}, "a crosscoder has no skip connection"),
        ({"d_in": None, "in_shape": (3, 7), "reshape_activations": "hook_z"}, "hook_z' is for one site"),
        ({"out_shape": (7,), "normalize_activations": "layer_norm"}, "has no\nmeaning|no meaning where another site"),
        ({"out_shape": (7,), "apply_b_dec_to_input": True}, "needs an output of the shape of the input"),
        ({"in_shape": (3, 7, 2), "d_in": None}, r"in_shape must be \(width,\) or \(sites, width\)"),
    ],
)
def test_geometries_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("standard", **fields)
