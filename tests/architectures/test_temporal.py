"""Temporal SAEs against SAELens; what may depend on which token; the predicted part wherever there is an output."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import D_IN, D_SAE, make_config, make_sae, relative, rows
from hosts import Toy, ids
from peers import Golden, build
from safetensors.torch import load_file
from torch import Tensor

from sae_kit import SAE, RunConfig, SAEMetadata, SAETrainer, SparseCodes, TemporalSAE, TemporalSAEConfig, attached
from sae_kit.errors import ConfigError, MissingContextError
from sae_kit.sae import RowContext

NAME = "temporal"


def temporal(**fields: Any) -> TemporalSAE:
    """A random one of two layers, whose predictions come from the tokens more than from biases."""
    sae = make_sae(NAME, **{"n_attn_layers": 2, "kval_topk": 8, **fields})
    assert isinstance(sae, TemporalSAE)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("W_"):
                parameter *= 4  # inputs are multiplied by 1 / (4 d_in)
            elif name.endswith(".bias"):
                parameter *= 0.1
    return sae


def prediction(sae: TemporalSAE, u: Tensor) -> Tensor:
    """The predicted part of a sequence, in training space."""
    extra = sae.row_context(u).extra
    assert extra is not None
    return extra


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", ["temporal", "temporal_untied"])
def test_saelens(case: str, dtype: str) -> None:
    golden = Golden("saelens", case, dtype)
    fields = golden.config
    width = fields.pop("d_sae")
    del fields["d_in"], fields["dtype"]
    sae = build(golden, NAME, width=width, **fields)
    assert isinstance(sae, TemporalSAE)
    u = golden["in.x"]
    golden.compare("out.acts", sae.encode(u))
    golden.compare("out.recons", sae(u))
    golden.compare("out.predicted_acts", sae.predicted_codes(u))
    golden.compare("out.decoded_novel", sae.decode(sae.encode(u), RowContext()))
    golden.assert_all_compared()


# ---- sequences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 3), (0,), (2, 0), (0, 3), (2, 0, 3)])
def test_the_axis_before_the_features_is_time(shape: tuple[int, ...]) -> None:
    sae, u = temporal(), rows(*shape)
    out, z, context = sae(u), sae.predicted_codes(u), sae.row_context(u)
    assert out.shape == u.shape
    assert z.shape == sae.encode(u).shape == (*shape, D_SAE)
    assert context.extra is not None
    assert context.extra.shape == u.shape
    if u.ndim > 2:
        for sequence, expected in zip(u.flatten(0, -3), out.flatten(0, -3), strict=True):
            torch.testing.assert_close(sae(sequence), expected, rtol=1e-5, atol=1e-5)


def test_a_token_alone_is_a_sequence_of_one() -> None:
    sae, u = temporal(), rows()
    torch.testing.assert_close(sae(u), sae(u[None])[0])
    torch.testing.assert_close(sae.encode(u), sae.encode(u[None, None])[0, 0])
    torch.testing.assert_close(sae.predicted_codes(u), sae.predicted_codes(u[None])[0])


def test_order_matters() -> None:
    sae, u = temporal(), rows(5)
    assert relative(sae(u.flip(0)).flip(0), sae(u)) > 1e-2


@pytest.mark.parametrize("token", [0, 2, 5])
def test_nothing_depends_on_later_tokens(token: int) -> None:
    sae, u = temporal(), rows(6)
    changed = u.clone()
    changed[token] += rows(seed=9)
    for of in (sae.predicted_codes, lambda u: prediction(sae, u), sae.encode, sae):
        before, after = of(u), of(changed)
        assert torch.equal(after[:token], before[:token])
        assert (after[token:] != before[token:]).any(dim=1).all(), "this token and all later ones see the change"


def test_values_come_from_earlier_tokens_alone() -> None:
    """A token decides how much of a prediction is right and where attention looks, not what there is to see."""
    sae = temporal(n_attn_layers=1)
    u, other = rows(1), rows(1, seed=9)
    first, second = sae.predicted_codes(u)[0], sae.predicted_codes(other)[0]
    assert first.norm() > 0
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=0).abs()
    assert cosine > 1 - 1e-5, "the first token has nothing before it: biases alone predict it"
    assert (first.norm() / second.norm() - 1).abs() > 0.01
    with torch.no_grad():  # look nowhere in particular: the mean of all values
        for name in ("q_target", "k_ctx"):
            for parameter in sae.attn_layers[0].get_submodule(name).parameters():
                parameter.zero_()
    u = rows(3)
    changed = u.clone()
    changed[2] = rows(seed=9)
    before, after = sae.predicted_codes(u)[2], sae.predicted_codes(changed)[2]
    assert torch.nn.functional.cosine_similarity(before, after, dim=0).abs() > 1 - 1e-5
    changed = u.clone()
    changed[1] = rows(seed=9)
    after = sae.predicted_codes(changed)[2]
    assert torch.nn.functional.cosine_similarity(before, after, dim=0).abs() < 1 - 1e-3


def test_each_layer_subtracts_what_it_explains() -> None:
    """Every layer's part is the projection on its direction, so what is left of a token becomes shorter."""
    sae, u = temporal(), rows(2, 6)
    codes, predicted, left = sae._predict(u)
    torch.testing.assert_close(predicted, codes @ sae.W_dec, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left + predicted, u - sae.b_dec, rtol=1e-5, atol=1e-5)
    one = temporal(n_attn_layers=1)
    one.load_state_dict({key: value for key, value in sae.state_dict().items() if "layers.1" not in key})
    start, after_one = (u - sae.b_dec).norm(dim=-1), one._predict(u)[2].norm(dim=-1)
    assert (after_one < start).all()
    assert (left.norm(dim=-1) < after_one).all()


def test_latents_of_the_new_part() -> None:
    plain, relu, topk = temporal(kval_topk=None), temporal(sae_diff_type="relu"), temporal()
    u = rows(10)
    all_on = plain.encode(u)
    assert torch.equal(relu.encode(u), all_on)
    assert (all_on != 0).sum(dim=1).min() > 8
    kept = topk.encode(u)
    assert ((kept != 0).sum(dim=1) == 8).all()
    assert torch.equal(kept.sort(dim=1).values[:, -8:], all_on.sort(dim=1).values[:, -8:])
    assert isinstance(topk.encoding(u).codes, SparseCodes)


# ---- the predicted part is output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"tied_weights": False}, {"activation_normalization_factor": 3.0}])
@pytest.mark.parametrize("subtract", [True, False])
def test_output_is_the_new_and_the_predicted_part(fields: dict[str, Any], subtract: bool) -> None:
    sae, u = temporal(apply_b_dec_to_input=subtract, **fields), rows(2, 6)
    factor = fields.get("activation_normalization_factor", 1.0)
    z, context = sae.predicted_codes(u), sae.row_context(u)
    bias = sae.b_dec if subtract or "tied_weights" in fields else 0
    expected = ((sae.encode(u) + z) @ sae.W_dec + bias) / factor
    torch.testing.assert_close(sae(u), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction(sae, u), z @ sae.W_dec, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(u), context), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(u)), expected, rtol=1e-5, atol=1e-5)
    assert relative(prediction(sae, u) / factor, expected) > 0.1, "it is worth including"
    assert sae.encoding(u).extra is not None, "computed once, with the codes"


def test_codes_alone_are_not_decoded() -> None:
    sae = temporal()
    with pytest.raises(MissingContextError, match=r"decode\(acts, context=sae\.row_context\(u\)\)"):
        sae.decode(torch.zeros(4, D_SAE))


def test_the_error_term_is_what_both_parts_miss() -> None:
    sae, u = temporal(), rows(2, 6)
    out, seen = sae(u), {}
    sae.hook_sae_error.add_hook(lambda tensor, hook: seen.update(error=tensor))
    torch.testing.assert_close(sae(u, use_error_term=True), u, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["error"], u - out, rtol=1e-5, atol=1e-5)
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: torch.zeros_like(acts))
    codes = out - sae(u)
    torch.testing.assert_close(sae(u, use_error_term=True), u - codes, rtol=1e-5, atol=1e-5)
    assert relative(sae(u), sae.b_dec.expand_as(u) + prediction(sae, u)) < 1e-5, "the prediction stays"


def test_hooks() -> None:
    sae, u = temporal(activation_normalization_factor=2.0), rows(2, 6)
    seen: dict[str, Tensor] = {}
    names = ("input", "acts_pre", "acts_post", "recons", "error", "output")
    for name in names:
        point = getattr(sae, f"hook_sae_{name}")
        point.add_hook(lambda tensor, hook, name=name: seen.update({name: tensor}))
    out = sae(u, use_error_term=False)
    sae(u, use_error_term=True)
    assert tuple(seen) == ("input", "acts_pre", "acts_post", "recons", "output", "error")
    left = 2 * u - sae.b_dec - prediction(sae, u)
    torch.testing.assert_close(seen["acts_pre"], left @ sae.W_enc / (4 * D_IN), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen["recons"] + prediction(sae, u), 2 * out, rtol=1e-5, atol=1e-5)


def test_it_is_spliced_with_its_prediction() -> None:
    model, sae = Toy(), temporal(metadata=SAEMetadata(hook_name="layer:in"))
    tokens = ids(3, 7)
    x = model.embed(tokens)
    with attached(model, sae, use_error_term=False) as spliced:
        found = model(tokens)
        torch.testing.assert_close(spliced.acts["layer:in.hook_sae_acts_post"], sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, model.head(torch.tanh(model.layer(sae(x))) + x), rtol=1e-5, atol=1e-5)
    with attached(model, sae, use_error_term=True):
        torch.testing.assert_close(model(tokens), model.head(torch.tanh(model.layer(x)) + x), rtol=1e-5, atol=1e-5)


def test_gradients_reach_earlier_tokens_through_the_prediction() -> None:
    sae, u = temporal(), rows(5).requires_grad_()
    out = sae(u)
    (to_last,) = torch.autograd.grad(out[4].sum(), u, retain_graph=True)
    (to_first,) = torch.autograd.grad(out[0].sum(), u)
    assert (to_last.abs().amax(dim=1) > 0).all()
    assert to_first[1:].abs().max() == 0 < to_first[0].abs().max()


# ---- scale, folds, files -------------------------------------------------------------------------------------------


def test_a_factor_is_a_scale() -> None:
    scaled, plain, u = temporal(activation_normalization_factor=3.0), temporal(), rows(6)
    assert scaled.cfg.normalize_activations == "constant_scalar_rescale"
    assert plain.cfg.normalize_activations == "none"
    torch.testing.assert_close(scaled.encode(u), plain.encode(3 * u))
    torch.testing.assert_close(scaled(u), plain(3 * u) / 3)
    told = temporal(activation_normalization_factor=3.0, normalize_activations="none")
    assert torch.equal(told(u), plain(u))


@pytest.mark.parametrize(
    "fields",
    [{}, {"activation_normalization_factor": 3.0}, {"normalize_activations": "layer_norm"}, {"tied_weights": False}],
)
def test_it_keeps_its_normalisation(fields: dict[str, Any]) -> None:
    sae, u = temporal(**fields), rows(6)
    mode, before = sae.norm_in.mode, {key: value.clone() for key, value in sae.state_dict().items()}
    assert sae.fold_normalization() is sae
    once = sae.to_inference()
    again = once.to_inference()
    for other in (sae, once, again):
        assert other.norm_in.mode == other.cfg.normalize_activations == mode
        torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
        assert torch.equal(other(u), sae(u))
    assert again.cfg == once.cfg
    assert once is not sae
    assert once.W_dec.data_ptr() != sae.W_dec.data_ptr()


def test_decoder_norms_stay() -> None:
    """They are equal here, so that it is not the selection that forbids it: attention reads the codes."""
    sae = temporal()
    with torch.no_grad():
        sae.geometry.scale_decoder(sae.W_dec, 3 / sae.decoder_norms())
    before = sae.W_dec.clone()
    with pytest.raises(ConfigError, match="folding them would change"):
        sae.fold_decoder_norm()
    assert torch.equal(sae.to_inference().W_dec, before)


@pytest.mark.parametrize("tied", [True, False])
def test_files(tmp_path: Path, tied: bool) -> None:
    sae, u = temporal(tied_weights=tied, activation_normalization_factor=0.3), rows(2, 6)
    folder = sae.save_model(tmp_path / "sae")
    attention = {
        f"attn_layers.{layer}.{name}.{kind}"
        for layer in (0, 1)
        for name in ("k_ctx", "q_target", "v_ctx", "c_proj")
        for kind in ("weight", "bias")
    }
    weights = load_file(folder / "sae_weights.safetensors")
    assert set(weights) == {"W_dec", "b_dec"} | attention | (set() if tied else {"W_enc"})
    narrow = D_SAE // 8
    for name, width in (("k_ctx", narrow), ("q_target", narrow), ("v_ctx", D_SAE), ("c_proj", D_SAE)):
        assert weights[f"attn_layers.1.{name}.weight"].shape == (width, D_SAE)
        assert weights[f"attn_layers.1.{name}.bias"].shape == (width,)
    cfg = json.loads((folder / "cfg.json").read_text())
    own = {
        "architecture": NAME,
        "normalize_activations": "constant_scalar_rescale",
        "activation_normalization_factor": 0.3,
        "n_heads": 2,
        "n_attn_layers": 2,
        "bottleneck_factor": 8,
        "sae_diff_type": "topk",
        "kval_topk": 8,
        "tied_weights": tied,
    }
    assert {key: cfg[key] for key in own} == own
    loaded = SAE.load_from_disk(folder)
    assert torch.equal(loaded(u), sae(u))
    assert isinstance(loaded, TemporalSAE)
    assert torch.equal(prediction(loaded, u), prediction(sae, u))


def test_a_file_of_another_tying_is_refused(tmp_path: Path) -> None:
    folder = temporal(tied_weights=False).save_model(tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"tied_weights": True}))
    with pytest.raises(ValueError, match=r"unexpected W_enc \[32, 96\]"):
        SAE.load_from_disk(folder)


def test_initial_weights() -> None:
    one, same, other = (make_config(NAME, n_attn_layers=2, tied_weights=False).build(seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(one.state_dict(), same.state_dict(), rtol=0, atol=0)
    for name, parameter in one.named_parameters():
        assert parameter.isfinite().all()
        if not name.endswith(("bias", "b_dec")):
            assert not torch.equal(parameter, other.get_parameter(name)), name
            assert parameter.abs().max() > 0
    first, second = (one.get_parameter(f"attn_layers.{layer}.v_ctx.weight") for layer in (0, 1))
    assert not torch.equal(first, second)
    tied = make_config(NAME).build()
    assert tied.W_enc.data_ptr() == tied.W_dec.data_ptr()


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_there_is_no_way_to_train_it() -> None:
    cfg = RunConfig.from_dict({"train": {"tokens": 64, "batch_tokens": 8, "device": "cpu"}, "log": {"console": False}})
    with pytest.raises(ConfigError, match="temporal SAEs are loaded and used; there is no way to train one"):
        SAETrainer(cfg, temporal(), [rows(8)], callbacks=[])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 0}, "n_heads must be at least 1, found 0"),
        ({"n_attn_layers": 0}, "n_attn_layers must be at least 1, found 0"),
        ({"bottleneck_factor": 0}, "bottleneck_factor must be at least 1, found 0"),
        ({"n_heads": 5}, "d_sae must be a multiple of n_heads · bottleneck_factor = 40, found 96"),
        ({"kval_topk": 0}, "kval_topk must lie between 1 and d_sae = 96, found 0"),
        ({"kval_topk": 97}, "kval_topk must lie between 1 and d_sae = 96, found 97"),
        ({"activation_normalization_factor": 0.0}, "activation_normalization_factor must be positive, found 0.0"),
        ({"normalize_activations": "expected_average_only_in"}, "temporal has no .*it can be: constant_norm_rescale"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(NAME, **fields)


def test_two_numbers_make_a_config() -> None:
    sae = TemporalSAEConfig(d_in=32, d_sae=512).build()
    assert sae(rows(3)).shape == (3, 32)
    with pytest.raises(ConfigError, match="temporal has no transcoder form; it can be: sae"):
        TemporalSAEConfig(d_in=32, d_sae=512, out_shape=(16,)).build()
