"""Transcoders in models: they read one site and write another, on module paths and on TransformerLens names."""

from typing import Any

import pytest
import torch
from helpers import D_IN
from hosts import Toy, bridge, differ, ids, plain
from torch import Tensor

from sae_kit import HookedSAETransformer, SAEMetadata, TopKSAEConfig, attached
from sae_kit.errors import ConfigError, ShapeError, SiteDidNotFireError
from sae_kit.evals import evaluate
from sae_kit.sae import SAE

READ, WRITTEN = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
HF_READ, HF_WRITTEN = "model.layers.1.mlp:in", "model.layers.1.mlp:out"


def transcoder(read: str, written: str | None, *, seed: int = 0, **fields: Any) -> SAE:
    """A random TopK skip transcoder; no two of its matrices are symmetric."""
    metadata = SAEMetadata(hook_name=read, hook_name_out=written)
    fields = {"d_in": D_IN, "out_shape": (D_IN,), "d_sae": 64, "k": 8, "skip": True, "metadata": metadata, **fields}
    sae = TopKSAEConfig(**fields).build(seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return sae


@pytest.fixture
def llama() -> Any:
    return HookedSAETransformer.from_model(bridge("llama"))


def test_what_was_read_becomes_what_is_written(llama: Any) -> None:
    sae = transcoder(READ, WRITTEN)
    clean = llama(ids())
    _, cache = llama.run_with_cache(ids())
    seen: dict[str, Tensor] = {}
    with attached(llama, sae) as spliced:
        llama.run_with_hooks(ids(), fwd_hooks=[(WRITTEN, lambda value, hook: seen.update(value=value))])
        torch.testing.assert_close(seen["value"], sae(cache[READ]), rtol=1e-5, atol=1e-5)
        acts = spliced.acts[f"{WRITTEN}.hook_sae_acts_post"]
        torch.testing.assert_close(acts, sae.encode(cache[READ]), rtol=1e-4, atol=1e-5)
        assert differ(llama(ids()), clean)
    assert llama(ids()).equal(clean)


def test_module_paths_mean_the_same(llama: Any) -> None:
    with attached(llama, transcoder(READ, WRITTEN)):
        expected = llama(ids())
    with attached(llama, transcoder(HF_READ, HF_WRITTEN)):
        torch.testing.assert_close(llama(ids()), expected, rtol=1e-5, atol=1e-5)
    model = plain("llama")
    with attached(model, transcoder(HF_READ, HF_WRITTEN)):
        torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_error_term_gives_back_the_model(llama: Any) -> None:
    clean = llama(ids())
    with attached(llama, transcoder(READ, WRITTEN), use_error_term=True):
        torch.testing.assert_close(llama(ids()), clean, rtol=1e-5, atol=1e-5)


def test_the_skip_is_part_of_what_is_written_in_the_models_precision() -> None:
    """A float32 transcoder in a bfloat16 model: silent latents leave the skip alone."""
    model: Any = HookedSAETransformer.from_model(bridge("llama", torch.bfloat16))
    sae = transcoder(READ, WRITTEN)
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
    _, cache = model.run_with_cache(ids())
    expected = (cache[READ].float() @ sae.W_skip.T + sae.b_dec).bfloat16()
    seen: dict[str, Tensor] = {}
    with attached(model, sae):
        model.run_with_hooks(ids(), fwd_hooks=[(WRITTEN, lambda value, hook: seen.update(value=value))])
    assert seen["value"].dtype == torch.bfloat16
    torch.testing.assert_close(seen["value"], expected, rtol=2e-2, atol=1e-2)


def test_gradients_flow_through_both_ends(llama: Any) -> None:
    sae = transcoder(READ, WRITTEN)
    with attached(llama, sae):
        llama(ids()).float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sae.parameters())


@pytest.mark.parametrize(
    ("sae", "error", "message"),
    [
        (lambda: transcoder(READ, None), ConfigError, "what it writes is not known"),
        (lambda: transcoder(READ, WRITTEN, out_shape=(16,)), ShapeError, "width 16, found 32"),
        (
            lambda: TopKSAEConfig(
                in_shape=(2, D_IN),
                d_sae=64,
                k=4,
                metadata=SAEMetadata(extra={"sae_kit": {"hook_names": [READ, WRITTEN]}}),
            ).build(),
            ConfigError,
            "a crosscoder of 2 sites cannot be attached",
        ),
    ],
)
def test_what_cannot_be_attached(llama: Any, sae: Any, error: type[Exception], message: str) -> None:
    clean = llama(ids())
    with pytest.raises(error, match=message), attached(llama, sae()):
        pytest.fail("attached")
    assert llama(ids()).equal(clean)


def test_sites_the_wrong_way_round(llama: Any) -> None:
    with (
        pytest.raises(SiteDidNotFireError, match="which this transcoder reads, did not come before"),
        attached(llama, transcoder("blocks.2.hook_resid_pre", WRITTEN)),
    ):
        llama(ids())


def test_the_input_of_one_forward_is_not_used_in_the_next() -> None:
    """A forward that writes without having read is an error, also right after one that read."""

    class Skipping(Toy):
        skips = False

        def forward(self, ids: Tensor) -> Tensor:
            return (
                self.head(torch.tanh(self.layer(torch.ones(*ids.shape, D_IN)))) if self.skips else super().forward(ids)
            )

    model = Skipping()
    with attached(model, transcoder("embed", "layer")):
        model(ids())
        model.skips = True
        with pytest.raises(SiteDidNotFireError):
            model(ids())


def test_evaluation_refers_to_the_site_that_is_written() -> None:
    toy = Toy().double()
    sae, rows = transcoder("embed", "layer", dtype="float64"), ids(20, 9)
    report = evaluate(sae, toy, rows, excluded_ids=(0,))
    eligible = rows != 0
    with torch.no_grad():
        x = toy.embed(rows)
        y = toy.layer(x)
        y_hat = sae(x)
        error, centred = (y - y_hat)[eligible], y[eligible] - y[eligible].mean(0)
        kept = torch.where(eligible[..., None], y_hat, y)
        logits, clean = ((toy.head(torch.tanh(v) + x)).log_softmax(-1) for v in (kept, y))
        kl = (clean.exp() * (clean - logits)).sum(-1)[eligible].mean()
    quality = report.metrics["sae"]["reconstruction_quality"]
    assert quality["fvu"] == pytest.approx(float(error.square().sum() / centred.square().sum()))
    assert report.metrics["sae"]["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(float(kl))
    assert report.metrics["sae"]["sparsity"]["l0"] == pytest.approx(
        float((sae.encode(x) != 0).sum(-1)[eligible].double().mean())
    )


def test_a_crosscoder_is_evaluated_at_each_site_and_not_spliced() -> None:
    toy = Toy().double()
    extra = {"sae_kit": {"hook_names": ["embed", "layer"]}}
    sae = TopKSAEConfig(in_shape=(2, D_IN), d_sae=64, k=8, dtype="float64", metadata=SAEMetadata(extra=extra)).build()
    rows = ids(20, 9)
    metrics = evaluate(sae, toy, rows, excluded_ids=(0,)).metrics["sae"]
    with torch.no_grad():
        x = toy.embed(rows)
        u = torch.stack([x, toy.layer(x)], dim=-2)[rows != 0]
        error, centred = u - sae(u), u - u.mean(0)
    for site in range(2):
        expected = float(error[:, site].square().sum() / centred[:, site].square().sum())
        assert metrics[f"reconstruction_quality_site_{site}"]["fvu"] == pytest.approx(expected)
    assert metrics["reconstruction_quality"]["fvu"] == pytest.approx(
        float(error.square().sum() / centred.square().sum())
    )
    assert "model_behavior_preservation" not in metrics
