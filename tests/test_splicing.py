"""SAEs inside models: the rules that hold on every host, on small random models."""

from typing import Any

import pytest
import torch
from helpers import D_IN, D_SAE, make_sae
from hosts import BLOCKS, HEADS, Toy, bridge, differ, fail, identity_sae, ids, plain, sae_at
from torch import Tensor, nn

from sae_kit import HookedSAETransformer, SAEMetadata, attached
from sae_kit.data.capture import capture
from sae_kit.splicing import INTERNALS

SITE, EARLIER, LATER = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.2.attn.hook_z"
CANONICAL = "blocks.1.hook_out"
ACTS = f"{SITE}.hook_sae_acts_post"


families = pytest.mark.parametrize("family", ["llama", "gpt2"])
every_site = pytest.mark.parametrize("site", [SITE, EARLIER, LATER, CANONICAL, "blocks.2.hook_resid_pre"])


def hooks_of(model: nn.Module) -> list[tuple[int, int, int]]:
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(getattr(m, "fwd_hooks", ()))) for m in model.modules()
    ]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return HookedSAETransformer.from_model(bridge(request.param))


@pytest.fixture
def llama() -> Any:
    return HookedSAETransformer.from_model(bridge("llama"))


# ---- what a splice does ----------------------------------------------------------------------------------------------


@every_site
def test_identity_changes_nothing_and_detaching_restores_every_bit(model: Any, site: str) -> None:
    clean = model(ids())
    torch.testing.assert_close(model.run_with_saes(ids(), saes=identity_sae(site)), clean, rtol=0, atol=1e-6)
    with attached(model, sae_at(site)) as spliced:
        assert spliced.is_attached
        assert differ(model(ids()), clean)
    assert not spliced.is_attached
    assert model(ids()).equal(clean)


@families
def test_equals_a_model_spliced_by_hand(family: str) -> None:
    saes = {SITE: sae_at(SITE), "blocks.0.hook_resid_post": sae_at(SITE, name="jumprelu", seed=3)}
    by_hand: Any = plain(family)
    for layer, sae in ((1, saes[SITE]), (0, saes["blocks.0.hook_resid_post"])):
        by_hand.get_submodule(f"{BLOCKS[family]}.{layer}").register_forward_hook(
            lambda _module, _args, out, sae=sae: (sae(out[0]), *out[1:]) if isinstance(out, tuple) else sae(out)
        )
    expected = by_hand(ids()).logits
    expected.square().mean().backward()
    grads = {
        name: parameter.grad.clone() for name, parameter in saes[SITE].named_parameters() if parameter.grad is not None
    }
    for sae in saes.values():
        sae.zero_grad()
    host = bridge(family)
    with attached(host, saes) as spliced:
        found = host(ids())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert spliced.sites == tuple(saes)
    found.square().mean().backward()
    assert len(grads) == 4
    for name, parameter in saes[SITE].named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-6)
    assert host.original_model.get_input_embeddings().weight.grad is not None


@every_site
def test_the_cache_of_the_host_has_the_value_after_the_splice(model: Any, site: str) -> None:
    _, clean = model.run_with_cache(ids())
    sae = sae_at(site)
    _, cache = model.run_with_cache_with_saes(ids(), saes=[sae])
    written = cache[site].flatten(2)
    assert cache[f"{site}.hook_sae_output"].equal(written)
    assert cache[f"{site}.hook_sae_input"].equal(clean[site].flatten(2))
    torch.testing.assert_close(cache[f"{site}.hook_sae_acts_post"], sae.encode(clean[site].flatten(2)))
    assert f"{site}.hook_sae_error" not in cache


def test_internals_are_addressable_under_both_names_and_leave_with_the_sae(model: Any) -> None:
    names, hooks = set(model.hook_dict), hooks_of(model)
    sae = sae_at(SITE)
    own = [(point.name, type(point)) for point in sae.modules() if hasattr(point, "ctx")]
    with attached(model, sae):
        published = {f"{site}.{internal}" for site in (SITE, CANONICAL) for internal in INTERNALS}
        assert set(model.hook_dict) == names | published
        assert model.hook_dict[ACTS] is model.hook_dict[f"{CANONICAL}.hook_sae_acts_post"] is sae.hook_sae_acts_post
        assert model.get_hook_point(ACTS).layer() == 1
    assert set(model.hook_dict) == names
    assert hooks_of(model) == hooks
    assert [(point.name, type(point)) for point in sae.modules() if hasattr(point, "ctx")] == own
    assert not any(internal in vars(model.blocks[1].hook_out) for internal in INTERNALS)


@every_site
def test_with_the_error_term_only_edits_show_and_exactly(model: Any, site: str) -> None:
    sae = sae_at(site)
    clean, clean_cache = model.run_with_cache(ids())
    torch.testing.assert_close(model.run_with_saes(ids(), saes=sae, use_error_term=True), clean, rtol=0, atol=1e-5)
    sae.use_error_term = True
    torch.testing.assert_close(model.run_with_saes(ids(), saes=sae), clean, rtol=0, atol=1e-5)
    assert differ(model.run_with_saes(ids(), saes=sae, use_error_term=False), clean)

    def add_to_latent_3(acts: Tensor, hook: Any) -> Tensor:
        edited = acts.clone()
        edited[..., 3] += 2.0
        return edited

    seen = list[Tensor]()
    edits = [(f"{site}.hook_sae_acts_post", add_to_latent_3), (site, lambda value, hook: seen.append(value))]
    out = model.run_with_hooks_with_saes(ids(), saes=sae, fwd_hooks=edits)
    assert differ(out, clean)
    direction = sae.decode(torch.eye(D_SAE)[3]) - sae.decode(torch.zeros(D_SAE))
    difference = (seen[0] - clean_cache[site]).flatten(2)
    torch.testing.assert_close(difference, (2.0 * direction).expand_as(difference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("internal", [name for name in INTERNALS if name != "hook_sae_error"])
@pytest.mark.parametrize("how", ["run_with_hooks", "hooks", "add_hook", "filter"])
def test_every_internal_can_be_edited_by_name(llama: Any, internal: str, how: str) -> None:
    name = f"{SITE}.{internal}"

    def edit(value: Tensor, hook: Any) -> Tensor:
        return value + 1

    with attached(llama, sae_at(SITE, name="standard")):
        before = llama(ids())
        if how == "run_with_hooks":
            after = llama.run_with_hooks(ids(), fwd_hooks=[(name, edit)])
        elif how == "hooks":
            with llama.hooks(fwd_hooks=[(name, edit)]):
                after = llama(ids())
        else:
            llama.add_hook(name if how == "add_hook" else lambda other: other == name, edit)
            after = llama(ids())
            llama.reset_hooks()
        assert differ(after, before)
        assert llama(ids()).equal(before)


def test_the_sae_itself_is_called(llama: Any) -> None:
    sae = sae_at(SITE)
    sae.register_forward_hook(lambda _module, _args, out: 0 * out + 7)  # stands for what an architecture may add
    _, cache = llama.run_with_cache_with_saes(ids(), saes=sae)
    assert cache[SITE].unique().tolist() == [7]


@pytest.mark.parametrize(("host", "dtype"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_dtypes_of_host_and_sae_stay(host: torch.dtype, dtype: Any) -> None:
    model = bridge("llama", host)
    sae = sae_at(SITE, dtype=dtype)
    with attached(model, sae) as spliced:
        out, cache = model.run_with_cache(ids(), names_filter=[SITE, ACTS])
        assert spliced.acts[ACTS].dtype == sae.dtype
    assert (out.dtype, cache[SITE].dtype, cache[ACTS].dtype) == (host, host, sae.dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {host}


def test_gradients_are_cached(llama: Any) -> None:
    sae = sae_at(SITE)
    for use_error_term in (False, True):
        sae.zero_grad()
        _, cache = llama.run_with_cache_with_saes(
            ids(), saes=sae, use_error_term=use_error_term, incl_bwd=True, return_type="loss", names_filter=[SITE, ACTS]
        )
        assert cache[f"{ACTS}_grad"].shape == cache[ACTS].shape
        decoder = sae.W_dec / sae.decoder_norms()[:, None]
        torch.testing.assert_close(
            cache[f"{ACTS}_grad"], cache[f"{SITE}_grad"] @ decoder.detach().T, rtol=1e-4, atol=1e-8
        )
        assert all(float(p.grad.abs().sum()) > 0 for p in sae.parameters() if p.grad is not None)
        assert sae.W_enc.grad is not None


# ---- several, nested, and gone wrong ---------------------------------------------------------------------------------


def test_each_sae_reads_what_earlier_ones_left(llama: Any) -> None:
    saes = [sae_at(SITE), sae_at("blocks.2.hook_resid_pre", seed=5)]
    _, cache = llama.run_with_cache_with_saes(ids(), saes=saes)
    assert cache["blocks.2.hook_resid_pre.hook_sae_input"].equal(cache[f"{SITE}.hook_sae_output"])


def test_an_inner_sae_replaces_the_outer_until_it_leaves(llama: Any) -> None:
    outer, inner, clean = sae_at(SITE), sae_at(SITE, name="standard", seed=2), llama(ids())
    expected = llama.run_with_saes(ids(), saes=inner)
    with attached(llama, outer, use_error_term=True) as first:
        with attached(llama, {CANONICAL: inner}) as second:
            assert llama(ids()).equal(expected)
            assert (first.is_attached, second.is_attached) == (False, True)
            assert llama.hook_dict[f"{CANONICAL}.hook_sae_acts_post"] is inner.hook_sae_acts_post
            assert ACTS not in llama.hook_dict
        assert first.is_attached
        assert llama.hook_dict[ACTS] is outer.hook_sae_acts_post
        torch.testing.assert_close(llama(ids()), clean, rtol=0, atol=1e-5)
    assert llama(ids()).equal(clean)


def test_contexts_may_close_in_any_order(llama: Any) -> None:
    clean, hooks = llama(ids()), hooks_of(llama)
    outer, inner = attached(llama, sae_at(SITE)), attached(llama, sae_at(SITE, seed=2))
    outer.__enter__()
    with inner:
        spliced = llama(ids())
        outer.__exit__(None, None, None)
        assert llama(ids()).equal(spliced)
    assert llama(ids()).equal(clean)
    assert hooks_of(llama) == hooks


@pytest.mark.parametrize("where", ["body", "user hook", "internal", "model", "sae"])
def test_an_exception_detaches_what_its_context_attached(llama: Any, where: str) -> None:
    outer, inner = sae_at(EARLIER), sae_at(SITE)
    with attached(llama, outer):
        before, hooks, names = llama(ids()), hooks_of(llama), set(llama.hook_dict)
        late = llama.blocks[2].mlp.register_forward_hook(fail) if where == "model" else None
        broken = inner.register_forward_hook(fail) if where == "sae" else None
        bad = {"user hook": [(SITE, fail)], "internal": [(ACTS, fail)]}.get(where, [])
        with pytest.raises(RuntimeError, match="on purpose"), attached(llama, inner):  # noqa: PT012
            if where == "body":
                fail()
            llama.run_with_hooks(ids(), fwd_hooks=bad)
        for handle in (late, broken):
            if handle is not None:
                handle.remove()
        assert llama(ids()).equal(before)
        assert hooks_of(llama) == hooks
        assert set(llama.hook_dict) == names
    assert not inner.hook_sae_acts_post.is_listening


def test_hooks_of_the_user_survive_and_see_the_value_after_the_splice(model: Any) -> None:
    seen = list[Tensor]()
    model.add_hook(SITE, lambda value, hook: seen.append(value), is_permanent=True)
    clean = model(ids())
    original = seen.pop()
    sae = sae_at(SITE)
    with attached(model, sae) as spliced:
        model.add_hook(SITE, lambda value, hook: seen.append(value))
        out = model(ids())
        assert len(seen) == 2
        for value in seen:
            torch.testing.assert_close(value, sae(original))
        model.reset_hooks()
        assert model(ids()).equal(out)
        assert len(seen) == 3
        assert spliced.is_attached
        model.reset_hooks(including_permanent=True)
        assert not spliced.is_attached
        assert model(ids()).equal(clean)
        spliced.detach()
        spliced.detach()
    assert len(seen) == 3
    assert ACTS not in model.hook_dict


def test_a_user_hook_survives_detaching(llama: Any) -> None:
    seen = list[Tensor]()
    with attached(llama, sae_at(SITE)):
        llama.add_hook(SITE, lambda value, hook: seen.append(value))
    llama(ids())
    assert len(seen) == 1


def test_attaching_leaves_the_module_tree_alone(model: Any) -> None:
    def inventory() -> Any:
        return (
            [(name, id(p)) for name, p in model.named_parameters()],
            sorted(model.state_dict()),
            [(name, id(m)) for name, m in model.named_modules()],
        )

    before = inventory()
    with attached(model, [sae_at(SITE), sae_at(EARLIER)]):
        assert inventory() == before
    assert inventory() == before


def test_many_cycles_leave_nothing(llama: Any) -> None:
    llama(ids())
    sae, size, hooks, keys = (
        sae_at(SITE),
        len(llama._hook_registry),
        hooks_of(llama),
        set(vars(llama.blocks[1].hook_out)),
    )
    for _ in range(200):
        with attached(llama, sae):
            pass
    llama(ids())
    assert (len(llama._hook_registry), hooks_of(llama)) == (size, hooks)
    assert set(vars(llama.blocks[1].hook_out)) == keys
    assert not any(point.is_listening for point in (sae.hook_sae_acts_post, sae.hook_sae_output))


@pytest.mark.parametrize("when", ["before", "within"])
def test_an_sae_removed_with_all_hooks_does_not_come_back(llama: Any, when: str) -> None:
    clean = llama(ids())
    with attached(llama, sae_at(SITE)) as outer, attached(llama, sae_at(SITE, seed=2)) as middle:
        if when == "before":
            llama.reset_hooks(including_permanent=True)
        with attached(llama, sae_at(SITE, seed=3)) as inner:
            assert inner.is_attached
            assert differ(llama(ids()), clean)
            if when == "within":
                llama.reset_hooks(including_permanent=True)
        for _ in range(2):
            assert not middle.is_attached
            assert llama(ids()).equal(clean)
            with attached(llama, sae_at(SITE, seed=4)) as another:
                assert another.is_attached
        middle.detach()
        assert not outer.is_attached
        assert llama(ids()).equal(clean)
        assert llama.acts_to_saes == {}


def test_a_hook_point_and_a_module_path_are_two_sites(llama: Any) -> None:
    point, path = "blocks.2.hook_resid_pre", "model.layers.2:in"
    saes = {point: sae_at(point), path: sae_at(path, seed=2)}
    with attached(llama, saes, record=("hook_sae_input", "hook_sae_output")) as spliced:
        llama(ids())
        assert spliced.is_attached
        chained = [
            spliced.acts[f"{first}.hook_sae_output"].equal(spliced.acts[f"{second}.hook_sae_input"])
            for first, second in ((point, path), (path, point))
        ]
    assert chained.count(True) == 1


# ---- recorded activations --------------------------------------------------------------------------------------------


def test_acts_are_those_of_the_last_forward_after_edits(llama: Any) -> None:
    sae = sae_at(SITE)
    with attached(llama, sae, record=("hook_sae_acts_post", "hook_sae_input")) as spliced:
        llama(ids(seed=5))
        llama(ids())
        found = dict(spliced.acts)
        assert set(found) == {ACTS, f"{SITE}.hook_sae_input"}
        torch.testing.assert_close(found[ACTS], sae.encode(found[f"{SITE}.hook_sae_input"]))
        llama.run_with_hooks(ids(), fwd_hooks=[(ACTS, lambda acts, hook: acts * 0)])
        assert float(spliced.acts[ACTS].detach().abs().max()) == 0


def test_nothing_dense_is_made_unless_asked_for(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_kit.sae.to_dense", fail)
    with attached(llama, sae_at(SITE), record=()) as spliced:
        llama(ids())
        assert spliced.acts == {}
    with attached(llama, sae_at(SITE)), pytest.raises(RuntimeError, match="on purpose"):
        llama(ids())


def test_generation_reads_step_by_step(llama: Any) -> None:
    sae, shapes = sae_at(SITE), list[tuple[int, ...]]()
    sae.hook_sae_input.add_hook(lambda value, hook: shapes.append(tuple(value.shape)))
    options = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
    free = llama.generate(ids(), **options)
    with attached(llama, sae, use_error_term=True):
        assert llama.generate(ids(), **options).equal(free)
        assert set(shapes) == {(2, 8, D_IN), (2, 1, D_IN)}
    with attached(llama, sae):
        cached = llama.generate(ids(), **options)
        assert llama.generate(ids(), use_past_kv_cache=False, **options).equal(cached)
    assert not cached.equal(free)


# ---- hosts without names ---------------------------------------------------------------------------------------------


@families
def test_a_module_path_serves_plain_models_and_bridges(family: str) -> None:
    sae, path = sae_at(SITE), f"{BLOCKS[family]}.1"
    host, wrapped = plain(family), bridge(family)
    with attached(host, {path: sae}) as spliced:
        expected = host(ids()).logits
        assert spliced.acts[f"{path}.hook_sae_acts_post"].shape == (2, 8, D_SAE)
    with attached(wrapped, {path: sae}):
        torch.testing.assert_close(wrapped(ids()), expected, rtol=1e-4, atol=1e-5)
        _, cache = wrapped.run_with_cache(ids(), names_filter=f"{path}.hook_sae_acts_post")
        assert f"{path}.hook_sae_acts_post" in cache
    with attached(wrapped, {SITE: sae}):
        torch.testing.assert_close(wrapped(ids()), expected, rtol=1e-4, atol=1e-5)


def test_an_input_can_be_spliced_and_a_pair_names_it() -> None:
    host, sae = plain("llama"), sae_at(SITE)
    with attached(host, {("model.layers.2", "in"): sae}):
        found = host(ids()).logits
    with attached(host, {"model.layers.1": sae}) as spliced:
        torch.testing.assert_close(host(ids()).logits, found)
        assert spliced.is_attached


@pytest.mark.parametrize("make", [plain, bridge])
@families
def test_heads_of_one_place_have_saes_of_their_own(make: Any, family: str) -> None:
    host, names = make(family), [f"{LATER}[{head}]" for head in (0, 2)]
    saes = {name: sae_at(name, d_in=D_IN // HEADS, seed=i) for i, name in enumerate(names)}
    before = capture(host, [LATER], ids())[LATER].unflatten(-1, (HEADS, -1))
    with attached(host, saes) as spliced:
        assert spliced.sites == tuple(names)
        after = capture(host, [LATER], ids())[LATER].unflatten(-1, (HEADS, -1))
        with attached(host, {names[0]: sae_at(names[0], d_in=D_IN // HEADS, seed=5)}):
            inner = capture(host, [LATER], ids())[LATER].unflatten(-1, (HEADS, -1))
    for head, sae in zip((0, 2), saes.values(), strict=True):
        torch.testing.assert_close(after[..., head, :], sae(before[..., head, :]), rtol=1e-4, atol=1e-5)
    assert after[..., [1, 3], :].equal(before[..., [1, 3], :])
    assert not inner[..., 0, :].equal(after[..., 0, :])
    assert inner[..., 1:, :].equal(after[..., 1:, :])
    assert capture(host, [LATER], ids())[LATER].unflatten(-1, (HEADS, -1)).equal(before)


def test_the_recorded_module_path_is_used_where_names_are_unknown() -> None:
    sae = make_sae("topk", metadata=SAEMetadata(hook_name=CANONICAL, hf_hook_name="model.layers.1"))
    with attached(plain("llama"), sae) as spliced:
        assert spliced.sites == ("model.layers.1",)


def test_a_model_by_hand() -> None:
    toy, sae = Toy(), sae_at("layer")
    with attached(toy, sae):
        x = toy.embed(ids())
        torch.testing.assert_close(
            toy(ids()), toy.head(torch.tanh(sae(nn.functional.linear(x, *toy.layer.parameters()))) + x)
        )


def test_a_hooked_root_module_keeps_its_hooks_in_dicts_of_its_own() -> None:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.HookedRootModule import HookedRootModule

    class Rooted(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.toy, self.hook_mid = Toy(), HookPoint()
            self.setup()

        def forward(self, ids: Tensor) -> Tensor:
            return self.toy.head(self.hook_mid(self.toy.embed(ids)))

    model, sae, edit = Rooted(), sae_at("hook_mid"), ("hook_mid.hook_sae_acts_post", lambda acts, hook: acts + 1)
    clean, names = model(ids()), set(model.mod_dict)
    with attached(model, sae):
        out, cache = model.run_with_cache(ids())
        assert differ(out, clean)
        assert cache["hook_mid.hook_sae_output"].equal(cache["hook_mid"])
        assert differ(model.run_with_hooks(ids(), fwd_hooks=[edit]), out)
    assert (set(model.mod_dict), set(model.hook_dict)) == (names, {"hook_mid"})
    torch.testing.assert_close(HookedSAETransformer.from_model(model).run_with_saes(ids(), saes=sae), out)
    assert model(ids()).equal(clean)
