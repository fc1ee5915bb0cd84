"""The pass: every number against a brute force, independence of how it is cut, and nothing left behind."""

from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, make_sae
from hosts import VOCABULARY, Toy, bridge, identity_sae, ids, plain, sae_at, zero_sae
from torch import Tensor

from sae_kit import SAEMetadata, attached
from sae_kit.errors import ConfigError, DataError, HookNotFoundError, ShapeError
from sae_kit.evals import EvalReport, evaluate
from sae_kit.sae import SAE

SITE, EARLIER = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
EXCLUDED = (0, 5)


def flat(report: EvalReport, name: str = "sae") -> dict[str, float | None]:
    return {key: value for group in report.metrics[name].values() for key, value in group.items()}


def same(found: dict[str, float | None], expected: dict[str, float | None], rel: float = 1e-9) -> bool:
    """Equal but for rounding, and undefined in the same places."""
    assert {key for key, value in found.items() if value is None} == {k for k, v in expected.items() if v is None}
    return {k: v for k, v in found.items() if v is not None} == pytest.approx(
        {k: v for k, v in expected.items() if v is not None}, rel=rel
    )


@pytest.fixture
def toy() -> Toy:
    return Toy().double()


def predictable(toy: Toy, number: int, context: int) -> Tensor:
    """Rows of which the toy guesses every second id right, so that ablating it costs something."""
    rows = ids(number, context)
    for position in range(1, context, 2):
        rows[:, position] = toy(rows)[:, position - 1].argmax(-1)
    return rows


@pytest.mark.parametrize("narrow", [False, True], ids=["all", "slice_and_norm"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_everything_equals_a_brute_force(toy: Toy, name: str, ablation: Any, narrow: bool) -> None:
    sae, rows = sae_at("layer", name, dtype="float64"), predictable(toy, 20, 9)
    eligible = ~torch.isin(rows, torch.tensor(EXCLUDED))
    limits: dict[str, Any] = {}
    if narrow:
        norms = toy.layer(toy.embed(rows)).detach().norm(dim=-1)
        longest = float(norms.quantile(0.8))
        limits = {"seq_slice": (2, None, None), "max_norms": {"layer": longest, "elsewhere": 0.0}}
        eligible = eligible & (norms <= longest) & (torch.arange(9) >= 2)
    found = flat(evaluate(sae, toy, rows, excluded_ids=EXCLUDED, ablation=ablation, rows_per_forward=6, **limits))
    has_target = eligible.clone()
    has_target[:, -1] = False
    with torch.no_grad():
        x = toy.embed(rows)
        y = toy.layer(x)
        folded = sae.decoder_norm_folds() and not sae.rescales  # codes of the form for use are lengths
        y_hat, acts = sae(y), sae.encode(y)[eligible] * (sae.decoder_norms() if folded else 1)
        instead = torch.zeros_like(y) if ablation == "zero" else y[eligible].mean(0).expand_as(y)
        p, q, r = (
            toy.head(torch.tanh(torch.where(eligible[..., None], v, y)) + x).log_softmax(-1)
            for v in (y, y_hat, instead)
        )
    error = (y - y_hat)[eligible].square().sum()
    ce = [float(-v.gather(-1, rows.roll(-1, 1)[..., None]).squeeze(-1)[has_target].mean()) for v in (p, q, r)]
    kl = [float((p.exp() * (p - v)).sum(-1)[eligible].mean()) for v in (q, r)]
    expected = {
        "explained_variance": float(1 - error / (y[eligible] - y[eligible].mean(0)).square().sum()),
        "mse": float(error / eligible.sum()),
        "l0": float((acts != 0).sum(1).double().mean()),
        "l1": float(acts.abs().sum(1).mean()),
        "dead_latents": float((acts == 0).all(0).sum()),
        "ce_loss_without_sae": ce[0],
        "ce_loss_with_sae": ce[1],
        "ce_loss_with_ablation": ce[2],
        "ce_loss_score": (ce[2] - ce[1]) / (ce[2] - ce[0]),
        "kl_div_with_sae": kl[0],
        "kl_div_score": (kl[1] - kl[0]) / kl[1],
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-9)


def test_a_limit_of_zero_is_none_and_one_that_all_exceed_leaves_nothing(toy: Toy) -> None:
    sae, rows = sae_at("layer", dtype="float64"), predictable(toy, 20, 9)
    assert evaluate(sae, toy, rows, max_norms={"layer": 0.0}).metrics == evaluate(sae, toy, rows).metrics
    norms = toy.layer(toy.embed(rows)).detach().norm(dim=-1)
    shortest = {"layer": float(norms.min()) * (1 + 1e-6)}
    for size in (1, 20):  # forwards in which nothing is left
        assert evaluate(sae, toy, rows, max_norms=shortest, rows_per_forward=size).tokens["eligible"] == 1
    with pytest.raises(DataError, match="expected some token that is not excluded"):
        evaluate(sae, toy, rows, max_norms={"layer": 1e-9})


@pytest.fixture(scope="module")
def wide_bridge() -> Any:
    """In float64 the model's own rounding, which does depend on the batch, is out of the way."""
    return bridge("llama", torch.float64)


def two(dtype: Any = "float64") -> dict[str, SAE]:
    return {"a": sae_at(SITE, dtype=dtype), "b": sae_at(EARLIER, "standard", dtype=dtype)}


@pytest.fixture(scope="module")
def reference(wide_bridge: Any) -> EvalReport:
    return evaluate(two(), wide_bridge, ids(17), excluded_ids=EXCLUDED)


@pytest.mark.parametrize("rows_per_forward", [1, 3, 16])
def test_no_number_depends_on_the_batch_size(wide_bridge: Any, reference: EvalReport, rows_per_forward: int) -> None:
    report = evaluate(two(), wide_bridge, ids(17), excluded_ids=EXCLUDED, rows_per_forward=rows_per_forward)
    assert report.tokens == reference.tokens
    for name in "ab":
        assert same(flat(report, name), flat(reference, name))
        assert report.features[name]["feature_density"].equal(reference.features[name]["feature_density"])


def test_no_number_depends_on_order_or_on_company(wide_bridge: Any, reference: EvalReport) -> None:
    shuffled = ids(17)[torch.randperm(17, generator=torch.Generator().manual_seed(2))]
    report = evaluate({"a": two()["a"]}, wide_bridge, shuffled, excluded_ids=EXCLUDED, rows_per_forward=4)
    assert same(flat(report, "a"), flat(reference, "a"))


def test_fidelity_is_of_the_same_rows_whatever_the_batch_size(wide_bridge: Any) -> None:
    reports = [
        evaluate(two(), wide_bridge, ids(17), fidelity_tokens=5 * 8, rows_per_forward=size) for size in (1, 3, 17)
    ]
    assert {report.tokens["ce_positions"] for report in reports} == {5 * 7}
    for report in reports:
        assert same(flat(report, "b"), flat(reports[0], "b"))
    first = flat(evaluate(two(), wide_bridge, ids(17)[:5]), "a")
    assert flat(reports[0], "a")["ce_loss_with_sae"] == pytest.approx(first["ce_loss_with_sae"], rel=1e-9)
    assert flat(reports[0], "a")["mse"] != pytest.approx(first["mse"], rel=1e-3)


@pytest.mark.parametrize("garbage", [1e30, float("nan")])
def test_garbage_at_excluded_positions_changes_nothing(toy: Toy, garbage: float) -> None:
    sae, rows = sae_at("layer", dtype="float64"), ids(12)
    before = evaluate(sae, toy, rows, excluded_ids=EXCLUDED)
    with torch.no_grad():
        toy.embed.weight[torch.tensor(EXCLUDED)] = garbage
    after = evaluate(sae, toy, rows, excluded_ids=EXCLUDED)
    assert after.metrics == before.metrics


def test_excluded_positions_keep_the_value_of_the_model(toy: Toy) -> None:
    rows, seen = ids(3), list[Any]()
    toy.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    evaluate(zero_sae("layer").to(torch.float64), toy, rows, excluded_ids=EXCLUDED, metrics=["fidelity"])
    clean, ablated, spliced = seen
    eligible = ~torch.isin(rows, torch.tensor(EXCLUDED))
    for patched in (ablated, spliced):
        assert patched[~eligible].equal(clean[~eligible])
        torch.testing.assert_close(patched[eligible], toy.embed(rows)[eligible])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("site", [SITE, EARLIER, "blocks.1.attn.hook_z"])
def test_the_identity_loses_nothing_and_zero_is_the_ablation(family: str, site: str) -> None:
    saes = {"identity": identity_sae(site), "zero": zero_sae(site)}
    report = evaluate(saes, bridge(family), ids(6), excluded_ids=(0,))
    identity, zero = flat(report, "identity"), flat(report, "zero")
    assert identity["ce_loss_with_sae"] == pytest.approx(identity["ce_loss_without_sae"], abs=1e-6)
    assert identity["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    assert identity["explained_variance"] == pytest.approx(1, abs=1e-12)
    assert zero["ce_loss_with_sae"] == zero["ce_loss_with_ablation"]
    assert zero["nmse"] == 1
    assert zero["kl_div_score"] == 0


def test_scores_are_one_for_the_identity_and_zero_for_nothing(toy: Toy) -> None:
    saes = {"identity": identity_sae("layer", dtype="float64"), "zero": zero_sae("layer").to(torch.float64)}
    with torch.no_grad():
        toy.head.weight.mul_(3)
        clean = toy(torch.arange(VOCABULARY)[None])[0].argmax(-1)
    rows = torch.stack([torch.arange(VOCABULARY), clean], 1)  # the model knows what comes next
    report = evaluate(saes, toy, rows)
    for key in ("ce_loss_score", "kl_div_score"):
        assert flat(report, "identity")[key] == pytest.approx(1, abs=1e-12)
        assert flat(report, "zero")[key] == 0


def test_a_constant_sae_scores_zero_against_mean_ablation(toy: Toy) -> None:
    sae, rows = zero_sae("layer").to(torch.float64), ids(10)
    with torch.no_grad():
        sae.b_dec.copy_(toy.layer(toy.embed(rows))[rows != 0].mean(0))
        sae.b_enc.fill_(-100)
    found = flat(evaluate(sae, toy, rows, excluded_ids=(0,), ablation="mean"))
    assert found["kl_div_score"] == pytest.approx(0, abs=1e-9)
    assert found["explained_variance"] == pytest.approx(0, abs=1e-9)


def test_forwards_per_batch(toy: Toy) -> None:
    saes = {"a": sae_at("layer"), "b": sae_at("layer", "standard"), "c": sae_at("embed")}
    evaluate(saes, toy.float(), ids(12), rows_per_forward=4)
    assert toy.calls == 3 * (1 + 2 + 3)
    toy.calls = 0
    evaluate(saes, toy, ids(12), rows_per_forward=4, metrics=["reconstruction", "sparsity"])
    assert toy.calls == 3


def test_without_fidelity_the_forward_stops_at_the_deepest_site() -> None:
    model, ran = bridge(), list[int]()
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    evaluate(two("float32"), model, ids(4), metrics=["reconstruction"])
    assert set(ran) <= {0, 1}
    evaluate(two("float32"), model, ids(4), metrics=["fidelity"])
    assert set(ran) == {0, 1, 2}


def test_a_plain_model_gives_what_its_bridge_gives() -> None:
    on_bridge = flat(evaluate(sae_at(SITE), bridge("gpt2"), ids(9)))
    on_plain = flat(evaluate(sae_at("transformer.h.1"), plain("gpt2"), ids(9)))
    assert same(on_plain, on_bridge, rel=1e-4)


def test_the_scale_of_the_input_is_applied(toy: Toy) -> None:
    scaled, rows = sae_at("layer", normalize_activations="expected_average_only_in", dtype="float64"), ids(10)
    scaled.norm_in.scale.fill_(2.5)
    with torch.no_grad():
        y = toy.layer(toy.embed(rows)).flatten(0, 1)
        expected = float((scaled(y) - y).square().sum(1).mean())
    assert flat(evaluate(scaled, toy, rows))["mse"] == pytest.approx(expected, rel=1e-6)


def snapshot(model: torch.nn.Module, saes: list[SAE]) -> list[Any]:
    state = [value.clone() for module in (model, *saes) for value in module.state_dict().values()]
    modes = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    return [torch.get_rng_state(), *state, modes, [sae.training for sae in saes], [sae.cfg for sae in saes]]


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_nothing_is_left_behind(ablation: Any) -> None:
    model, saes = bridge("gpt2"), two("float32")
    model(ids(1))  # its first forward adds hooks of its own
    model.blocks[1].mlp.train()  # not the mode of the rest
    before = snapshot(model, list(saes.values()))
    report = evaluate(saes, model, ids(4), ablation=ablation)
    broken = sae_at(EARLIER, "standard", d_in=16)
    with pytest.raises(ShapeError, match="blocks\\.0\\.hook_mlp_out"):
        evaluate({**saes, "broken": broken}, model, ids(4))
    after = snapshot(model, list(saes.values()))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert all(not value.requires_grad for value in report.features["a"].values())
    assert torch.is_grad_enabled()


def test_report_counts_real_tokens(toy: Toy) -> None:
    rows = ids(5, 8)
    report = evaluate(sae_at("layer", dtype="float64"), toy, rows, excluded_ids=(0,))
    assert report.tokens == {"rows": 5, "tokens": 40, "eligible": 35, "excluded": 5, "ce_positions": 30}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metrics": ["sparsty"]}, ConfigError, "Did you mean 'sparsity'"),
        ({"ablation": "median"}, ConfigError, "expected 'zero' or 'mean', found 'median'"),
        ({"fidelity_tokens": 0}, ConfigError, "at least 1"),
        ({"saes": "layr"}, HookNotFoundError, "Did you mean 'layer'"),
        ({"saes": None}, ConfigError, "does not say where it belongs"),
        ({"excluded_ids": range(VOCABULARY)}, DataError, "none among 16"),
    ],
)
def test_bad_requests_are_clear_errors(toy: Toy, change: dict[str, Any], error: type[Exception], message: str) -> None:
    site = change.pop("saes", "layer")
    sae = make_sae("topk", metadata=SAEMetadata(hook_name=site), dtype="float64")
    with pytest.raises(error, match=message):
        evaluate(sae, toy, ids(2), **change)


def test_a_model_with_saes_attached_is_refused(toy: Toy) -> None:
    sae = sae_at("layer", dtype="float64")
    with attached(toy, sae), pytest.raises(ConfigError, match="attached to the model at layer"):
        evaluate(sae, toy, ids(2))


def test_rows_longer_than_the_model_can_read_are_refused() -> None:
    model = bridge()
    limit = model.cfg.n_ctx
    with pytest.raises(
        ConfigError, match=rf"rows: expected at most {limit} ids, the model's maximum, found {limit + 1}"
    ):
        evaluate(sae_at(SITE), model, ids(1, limit + 1))


def test_what_is_no_sae_is_refused(toy: Toy) -> None:
    other: Any = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"expected an SAE, .* found Linear; SAE\.load_from_disk reads one"):
        evaluate({"a": sae_at("layer"), "b": other}, toy, ids(2))
