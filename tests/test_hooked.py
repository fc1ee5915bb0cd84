"""`HookedSAETransformer`: its methods, its class made on demand, and the demo's model."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import D_SAE, make_sae
from hosts import HAS_HOOKED, bridge, fail, hooked, ids, plain, sae_at

from sae_kit import HookedSAETransformer, SAEMetadata, SAETransformerBridge, attached
from sae_kit.errors import ConfigError, HookNotFoundError

SITE, EARLIER, CANONICAL = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.1.hook_out"
ACTS = f"{SITE}.hook_sae_acts_post"


@pytest.fixture
def llama() -> Any:
    return HookedSAETransformer.from_model(bridge("llama"))


def test_from_model_changes_the_class_in_place() -> None:
    host = bridge()
    clean = host(ids())
    model = HookedSAETransformer.from_model(host)
    assert model is host
    assert isinstance(host, SAETransformerBridge)
    assert SAETransformerBridge.from_model(model) is model
    assert model(ids()).equal(clean)
    with pytest.raises(ConfigError, match=r"found LlamaForCausalLM; sae_kit\.attached works on any"):
        HookedSAETransformer.from_model(plain("llama"))


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "site", [SITE, EARLIER, "blocks.2.attn.hook_z", "blocks.2.attn.hook_z[1]", "blocks.1.mlp.hook_in"]
)
def test_a_hooked_transformer_is_spliced_as_a_bridge_is(family: str, site: str) -> None:
    sae = sae_at(site, d_in=8 if site.endswith("]") else 32)
    results = []
    for model in (HookedSAETransformer.from_model(hooked(family)), HookedSAETransformer.from_model(bridge(family))):
        clean, names = model(ids()), set(model.hook_dict)
        torch.testing.assert_close(
            model.run_with_saes(ids(), saes={site: sae}, use_error_term=True), clean, rtol=0, atol=1e-5
        )
        results.append(model.run_with_saes(ids(), saes={site: sae}).log_softmax(-1))
        assert (results[-1] - clean.log_softmax(-1)).abs().max() > 1e-3
        assert model(ids()).equal(clean)
        assert set(model.hook_dict) == names
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4)


def test_added_saes_stay_until_reset(llama: Any) -> None:
    clean, sae, other = llama(ids()), sae_at(SITE), sae_at(EARLIER)
    llama.add_sae(sae, use_error_term=True)
    llama.add_sae(other)
    assert llama.acts_to_saes == {SITE: sae, EARLIER: other}
    llama.reset_saes(EARLIER)
    torch.testing.assert_close(llama(ids()), clean, rtol=0, atol=1e-5)
    newer = sae_at(SITE, seed=7)
    llama.add_sae(newer)
    assert llama.acts_to_saes == {SITE: newer}
    llama.reset_saes([CANONICAL], prev_saes=[sae])
    assert llama.acts_to_saes == {CANONICAL: sae}
    llama.reset_saes()
    assert llama.acts_to_saes == {}
    assert llama(ids()).equal(clean)


def test_former_saes_come_back_with_their_own_error_term(llama: Any) -> None:
    clean, sae = llama(ids()), sae_at(SITE)
    llama.add_sae(sae, use_error_term=True)
    llama.add_sae(sae_at(SITE, seed=7))
    llama.reset_saes(SITE, prev_saes=[sae])
    assert llama(ids()).equal(llama.run_with_saes(ids(), saes=sae, use_error_term=False))
    llama.reset_saes()
    sae.use_error_term = True
    llama.add_sae(sae_at(SITE, seed=7))
    llama.reset_saes(SITE, prev_saes=[sae])
    torch.testing.assert_close(llama(ids()), clean, rtol=0, atol=1e-5)


def test_reset_refuses_sites_without_an_sae(llama: Any) -> None:
    llama.add_sae(sae_at(SITE))
    with pytest.raises(HookNotFoundError, match=r"no SAE is attached at 'blocks\.1\.hook_resid_pst'\. Did you mean"):
        llama.reset_saes("blocks.1.hook_resid_pst")
    with pytest.raises(ConfigError, match="found 2 for 1 names"):
        llama.reset_saes([SITE], prev_saes=[None, None])
    assert list(llama.acts_to_saes) == [SITE]


def test_the_methods_agree_with_the_context(llama: Any) -> None:
    sae = sae_at(SITE)
    with llama.saes([sae]) as same:
        assert same is llama
        expected = llama(ids())
        assert llama.acts_to_saes == {SITE: sae}
    assert llama.acts_to_saes == {}
    assert llama.run_with_saes(ids(), saes=[sae]).equal(expected)
    out, cache = llama.run_with_cache_with_saes(ids(), saes={SITE: sae}, return_cache_object=False)
    torch.testing.assert_close(out, expected)
    assert isinstance(cache, dict)
    _, row = llama.run_with_cache_with_saes(ids(1), saes=sae, remove_batch_dim=True)
    assert row[ACTS].shape == (8, D_SAE)
    seen = list[str]()
    llama.run_with_hooks_with_saes(ids(), saes=sae, fwd_hooks=[(ACTS, lambda acts, hook: seen.append(hook.name))])
    assert seen == [f"{CANONICAL}.hook_sae_acts_post"]
    assert not sae.hook_sae_acts_post.is_listening


def test_saes_stay_if_asked_to_unless_something_fails(llama: Any) -> None:
    sae = sae_at(SITE)
    expected = llama.run_with_saes(ids(), saes=sae, reset_saes_end=False)
    assert llama.acts_to_saes == {SITE: sae}
    assert llama(ids()).equal(expected)
    llama.reset_saes()
    with pytest.raises(RuntimeError, match="on purpose"):
        llama.run_with_hooks_with_saes(ids(), saes=sae, reset_saes_end=False, fwd_hooks=[(SITE, fail)])
    assert llama.acts_to_saes == {}


def test_masks_are_refused_rather_than_ignored(llama: Any) -> None:
    with pytest.raises(ConfigError, match="exclude_special_tokens is not supported yet"):
        llama.run_with_saes(ids(), saes=sae_at(SITE), exclude_special_tokens=True)


def test_the_demo_model_with_raw_and_with_processed_weights() -> None:
    raw = HookedSAETransformer.from_pretrained_no_processing("demo")
    processed = HookedSAETransformer.from_pretrained("demo")
    width = raw.cfg.d_model
    sae = make_sae("topk", d_in=width, metadata=SAEMetadata(hook_name=SITE))
    tokens = raw.to_tokens("import os\n")
    results = []
    for model in (raw, processed):
        assert isinstance(model, HookedSAETransformer)
        clean = model(tokens)
        torch.testing.assert_close(model.run_with_saes(tokens, saes=sae, use_error_term=True), clean, rtol=0, atol=1e-4)
        out, cache = model.run_with_cache_with_saes(tokens, saes=sae)
        assert cache[ACTS].shape == (*tokens.shape, D_SAE)
        assert model(tokens).equal(clean)
        results.append(out.log_softmax(-1))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-3)
    with attached(raw, sae):
        assert raw.generate("import os", max_new_tokens=3, do_sample=False, verbose=False).startswith("import os")


def test_importing_attached_does_not_load_transformer_lens() -> None:
    code = "import sys, sae_kit.hooked as h; h.attached; print({'transformer_lens', 'transformers'} & set(sys.modules))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (child.stdout.strip(), child.stderr) == ("set()", "")
