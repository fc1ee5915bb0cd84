"""C7: six hook points, in order, with the right tensors in every geometry; the error term makes up for the rest."""

from typing import Any

import pytest
import torch
from helpers import (
    FORMS,
    NORMALIZATIONS,
    estimated,
    every_form,
    forms_in,
    has_form,
    inputs,
    make_sae,
    relative,
    targets,
)

from sae_kit.errors import ConfigError, ShapeError
from sae_kit.sae import SAE

HOOKS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


def hooks_of(sae: SAE) -> tuple[str, ...]:
    """The points that fire; where latents have no pre-activation, that one does not."""
    return HOOKS if sae.has_preactivations else tuple(key for key in HOOKS if key != "acts_pre")


def point(sae: SAE, key: str) -> Any:
    return getattr(sae, f"hook_sae_{key}")


def true_output(sae: SAE, u: torch.Tensor) -> torch.Tensor:
    return u if sae.geometry.same_site else targets(sae, *u.shape[: u.ndim - len(sae.geometry.in_shape)])


@every_form
def test_hooks_fire_in_order_with_the_right_tensors(name: str, geometry: str) -> None:
    normalization = "center" if has_form(name, geometry, "center") else "none"
    sae = estimated(make_sae(name, geometry, **NORMALIZATIONS[normalization]))
    u = inputs(sae, 2, 3)
    v = true_output(sae, u)
    acts, out, context = sae.encode(u), sae(u), sae.row_context(u)
    seen: dict[str, torch.Tensor] = {}

    def record(tensor: torch.Tensor, hook: object) -> None:
        seen[next(key for key in HOOKS if point(sae, key) is hook)] = tensor

    for key in HOOKS:
        point(sae, key).add_hook(record)
    sae(u, target=v, use_error_term=True)
    assert tuple(seen) == hooks_of(sae)
    torch.testing.assert_close(seen["input"], u)
    torch.testing.assert_close(seen["acts_post"], acts)
    with_extra = seen["recons"] if context.extra is None else seen["recons"] + context.extra
    torch.testing.assert_close(sae.norm_target.undo(with_extra), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["error"], v - out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["output"], v, rtol=1e-5, atol=1e-5)
    if "acts_pre" in seen:
        assert seen["acts_pre"].shape == (2, 3, *sae.latent_shape)
        on = acts > 0
        assert (seen["acts_pre"][on] > 0).all()
    seen.clear()
    assert torch.equal(sae.encode(u), acts)
    assert tuple(seen) == tuple(key for key in hooks_of(sae) if key in ("input", "acts_pre", "acts_post"))
    seen.clear()
    torch.testing.assert_close(sae.encode_sparse(u).to_dense(), acts)
    assert tuple(seen) == tuple(key for key in hooks_of(sae) if key in ("input", "acts_pre", "acts_post"))
    seen.clear()
    sae.decode(acts, context)
    assert tuple(seen) == ("recons",)
    for key in HOOKS:
        point(sae, key).remove_hooks()
        assert not point(sae, key).is_listening
    assert torch.equal(sae(u), out)


@pytest.mark.parametrize(
    ("name", "geometry", "key"),
    [(*form, key) for form in FORMS if form[1] in ("sae", "crosscoder", "clt_skip") for key in HOOKS],
)
def test_what_a_hook_returns_is_used(name: str, geometry: str, key: str) -> None:
    sae = make_sae(name, geometry)
    if key not in hooks_of(sae):
        return
    u = inputs(sae, 4)
    v = true_output(sae, u)
    plain = sae(u, target=v, use_error_term=True)
    point(sae, key).add_hook(lambda tensor, hook: tensor * 0.5)
    assert (sae(u, target=v, use_error_term=True) - plain).abs().max() > 1e-2


@forms_in("sae", "skip", "clt")
def test_an_edited_code_is_decoded_like_any_other(name: str, geometry: str) -> None:
    """acts_post and acts_pre may be replaced on the dense and on the sparse path, with the same effect."""
    sae = make_sae(name, geometry)
    u = inputs(sae, 4)
    context = sae.row_context(u)
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts + 0.25)
    edited = sae.encode(u)
    torch.testing.assert_close(sae(u), sae.decode(edited, context), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode_sparse(u).to_dense(), edited)
    sae.hook_sae_acts_post.remove_hooks()
    if "acts_pre" not in hooks_of(sae):
        return
    sae.hook_sae_acts_pre.add_hook(lambda pre, hook: torch.full_like(pre, -1.0))
    silent = sae.encode(u)
    torch.testing.assert_close(sae.encode_sparse(u).to_dense(), silent)
    assert (silent <= 0).all()
    torch.testing.assert_close(sae(u), sae.decode(silent, context), rtol=1e-5, atol=1e-5)


@forms_in("sae", "skip", "skip_transcoder", "clt_skip")
def test_a_replaced_input_is_what_everything_else_reads(name: str, geometry: str) -> None:
    """Row context and skip take the input that the hook gave."""
    fields: dict[str, Any] = {}
    if has_form(name, geometry, "layer_norm"):
        fields["normalize_activations"] = "layer_norm"
    sae = make_sae(name, geometry, **fields)
    u, other = inputs(sae, 4), 3 * inputs(sae, 4, seed=5)
    expected = sae(other)
    sae.hook_sae_input.add_hook(lambda tensor, hook: other)
    assert relative(sae(u), expected) < 1e-5
    assert relative(sae.decode(sae.encode_sparse(u)), expected) < 1e-5


@every_form
def test_error_term_adds_exactly_the_edit(name: str, geometry: str) -> None:
    sae = make_sae(name, geometry)
    u = inputs(sae, 9)
    v = true_output(sae, u)
    torch.testing.assert_close(sae(u, target=v, use_error_term=True), v, rtol=1e-5, atol=1e-5)
    acts, context = sae.encode(u), sae.row_context(u)
    edited = acts.clone()
    edited.view(9, -1)[:, int(acts.view(9, -1).abs().sum(dim=0).argmax())] = 0
    expected = v + sae.decode(edited, context) - sae.decode(acts, context)
    assert relative(expected, v) > 1e-3
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: edited)
    torch.testing.assert_close(sae(u, target=v, use_error_term=True), expected, rtol=1e-5, atol=1e-5)
    sae.use_error_term = True
    torch.testing.assert_close(sae(u, target=v), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(u, use_error_term=False), sae.decode(edited, context), rtol=1e-5, atol=1e-5)


@every_form
def test_error_term_passes_gradients_through_the_reconstruction_alone(name: str, geometry: str) -> None:
    sae = make_sae(name, geometry)
    u, v = inputs(sae, 5).requires_grad_(), true_output(sae, inputs(sae, 5)).detach().requires_grad_()
    weights = torch.randn(5, *sae.geometry.out_shape, generator=torch.Generator().manual_seed(3))
    (plain,) = torch.autograd.grad((sae(u) * weights).sum(), u)
    found, to_target = torch.autograd.grad(
        (sae(u, target=v, use_error_term=True) * weights).sum(), (u, v), allow_unused=True
    )
    torch.testing.assert_close(found, plain)
    assert to_target is None
    assert plain.abs().max() > 0


@every_form
def test_another_site_needs_its_true_output(name: str, geometry: str) -> None:
    sae = make_sae(name, geometry)
    u = inputs(sae, 4)
    if sae.geometry.same_site:
        torch.testing.assert_close(sae(u, use_error_term=True), u, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ConfigError, match=r"give the true values there, sae\(u, target=v\)"):
            sae(u, use_error_term=True)
    with pytest.raises(ShapeError, match="expected a target of shape"):
        sae(u, target=torch.zeros(4, 7), use_error_term=True)


@forms_in("sae", "clt")
def test_backward_hooks_see_the_gradient_of_the_codes(name: str, geometry: str) -> None:
    sae = make_sae(name, geometry)
    u = inputs(sae, 4)
    seen: list[torch.Tensor] = []
    sae.hook_sae_acts_post.add_hook(lambda grad, hook: seen.append(grad), dir="bwd")
    sae(u).sum().backward()
    (gradient,) = seen
    acts = sae.encode(u).detach().requires_grad_()
    (expected,) = torch.autograd.grad(sae.decode(acts, sae.row_context(u)).sum(), acts)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
