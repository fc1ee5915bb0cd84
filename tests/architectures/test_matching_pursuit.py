"""Matching pursuit against SAELens and against itself written row by row; what stops a row; folds; files."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import D_IN, D_SAE, make_config, make_sae, relative, rows
from peers import Golden, Term, along_sphere, build, compare_step, step
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sae_kit import SAE, Batch, MatchingPursuitSAEConfig, RunConfig, SAETrainer
from sae_kit.architectures.matching_pursuit import Stop, _Pursuit, collected
from sae_kit.errors import ConfigError
from sae_kit.ops import to_dense
from sae_kit.sae import Encoding
from sae_kit.seeding import generator
from sae_kit.training.callbacks import Callback
from sae_kit.training.losses import training_pass

NAME = "matching_pursuit"
REASONS = {"zero", "duplicate", "threshold", "iterations"}


def row_by_row(
    x: Tensor, W_dec: Tensor, *, threshold: float, iterations: int, on_duplicate: bool
) -> tuple[Tensor, Tensor, list[str]]:
    """Codes and residuals by the definition, with autograd, and why each row stopped; x is centred."""
    codes, left, reasons = [], [], []
    for r in x:
        c = x.new_zeros(len(W_dec))
        for _ in range(iterations):
            i = int((W_dec @ r).argmax())
            w = torch.relu(r @ W_dec[i])
            again = bool(c[i] > 0)
            c = c + w * torch.nn.functional.one_hot(torch.tensor(i), len(W_dec))
            r = r - w * W_dec[i]
            if w <= 0 or (again and on_duplicate) or r.norm() < threshold:
                reasons.append("zero" if w <= 0 else "threshold" if r.norm() < threshold else "duplicate")
                break
        else:
            reasons.append("iterations")
        codes.append(c)
        left.append(r)
    return torch.stack(codes), torch.stack(left), reasons


# One setting for each of the ways to stop; the last dictionary points to one side only, so that nothing is left to add.
SETTINGS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "threshold": ({"residual_threshold": 2.0}, {"threshold"}),
    "duplicate": ({"residual_threshold": 0.0}, {"duplicate"}),
    "iterations": ({"residual_threshold": 0.0, "max_iterations": 3}, {"iterations"}),
    "many duplicates": (
        {"residual_threshold": 0.8, "max_iterations": 12, "stop_on_duplicate_support": False},
        {"threshold", "iterations"},
    ),
    "as many as features": ({"residual_threshold": 0.0, "stop_on_duplicate_support": False}, {"iterations"}),
    "all": ({"residual_threshold": 1.5, "max_iterations": 6}, {"threshold", "iterations", "duplicate"}),
    "nothing to add": ({"stop_on_duplicate_support": False, "max_iterations": 50}, {"zero"}),
}


@pytest.fixture(params=[True, False], ids=["subtracting", "plain"])
def subtract(request: pytest.FixtureRequest) -> bool:
    return request.param


def exact(setting: str, subtract: bool = True, **fields: Any) -> SAE:
    """A small float64 SAE."""
    sizes = {"d_in": 12, "d_sae": 20, "dtype": "float64", "apply_b_dec_to_input": subtract}
    sae = make_sae(NAME, **{**sizes, **SETTINGS[setting][0], **fields})
    if setting == "nothing to add":
        with torch.no_grad():
            sae.W_dec.abs_()
            sae.b_dec.zero_()
    return sae


def activations(sae: SAE, n: int = 30, seed: int = 3) -> Tensor:
    return torch.randn(n, sae.d_in, dtype=sae.dtype, generator=torch.Generator().manual_seed(seed)) + 0.2


def expected(sae: SAE, u: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    cfg = sae.cfg
    assert isinstance(cfg, MatchingPursuitSAEConfig)
    return row_by_row(
        u - sae.b_dec if cfg.apply_b_dec_to_input else u,
        sae.W_dec,
        threshold=cfg.residual_threshold,
        iterations=cfg.max_iterations or sae.d_in,
        on_duplicate=cfg.stop_on_duplicate_support,
    )


# ---- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_saelens(dtype: str) -> None:
    golden = Golden("saelens", NAME, dtype)
    fields = golden.config
    width = fields.pop("d_sae")
    del fields["d_in"], fields["dtype"]
    sae = build(golden, NAME, width=width, **fields)
    ours = step(golden, sae)
    compare_step(golden, ours, {"mse_loss": Term("mse_loss", part=True)})
    for name, value in ours.run.encoding.details.items():
        golden.compare(f"metric.{name}", value if name == "residual_norm" else value.float())  # as recorded
    golden.compare("out.acts", sae.encode(golden["in.x"]))
    golden.compare("out.recons", sae(golden["in.x"]))
    golden.assert_all_compared()


@pytest.mark.parametrize("setting", SETTINGS)
def test_codes_output_and_gradients_are_those_of_the_definition(setting: str, subtract: bool) -> None:
    sae, reference = (exact(setting, subtract) for _ in range(2))
    u = activations(sae)
    codes, left, reasons = expected(reference, given := u.clone().requires_grad_())
    assert set(reasons) >= SETTINGS[setting][1], "the setting does not test what it says"
    output = codes @ reference.W_dec + (reference.b_dec if subtract else 0)
    found = sae(read := u.clone().requires_grad_())
    torch.testing.assert_close(sae.encode(u), codes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(u - found, left, rtol=1e-8, atol=1e-8)  # x − a·b_dec = c W_dec + r
    weights, on_codes = activations(sae, seed=8), torch.randn(len(u), sae.d_sae, dtype=u.dtype)
    ((found * weights).sum() + (sae.encode(read) * on_codes).sum()).backward()
    ((output * weights).sum() + (codes * on_codes).sum()).backward()
    torch.testing.assert_close(read.grad, given.grad, rtol=1e-8, atol=1e-8)
    to_W, reference_to_W = sae.W_dec.grad, reference.W_dec.grad
    assert to_W is not None
    assert reference_to_W is not None
    if setting == "nothing to add":  # a latent is chosen again for what rounding left of it, or not: that turns no row
        to_W, reference_to_W = (along_sphere(sae.W_dec, gradient) for gradient in (to_W, reference_to_W))
    torch.testing.assert_close(to_W, reference_to_W, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(sae.b_dec.grad, reference.b_dec.grad, rtol=1e-8, atol=1e-8)


def test_gradcheck() -> None:
    sae = exact("many duplicates")
    W_dec = sae.W_dec.detach().clone().requires_grad_()
    x = activations(sae, 4).requires_grad_()
    stop = Stop(iterations=15, threshold=0.05, on_duplicate=False)
    assert torch.autograd.gradcheck(lambda x, W_dec: _Pursuit.apply(x, W_dec, stop)[0], (x, W_dec))


def test_a_latent_chosen_several_times_is_one_entry() -> None:
    sae = exact("many duplicates")
    u = activations(sae)
    codes = sae.encode_sparse(u)
    chosen = 12  # in every iteration one; no row reaches so small a residual
    assert codes.row_offsets is not None
    per_row = codes.row_offsets.diff()
    assert (per_row < chosen).any(), "no latent was chosen twice"
    for first, last in zip(codes.row_offsets[:-1], codes.row_offsets[1:], strict=True):
        assert len(codes.indices[first:last].unique()) == last - first
    assert torch.equal(codes.to_dense(), sae.encode(u))


def test_entries_of_one_latent_add_up_in_the_order_of_rows() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    row, latent = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([3, 1, 0, 3, 0])
    codes = collected(values, row, latent, n_rows=4, d_sae=5)
    dense = torch.zeros(4, 5)
    dense[2, 3], dense[0, 1], dense[2, 0], dense[0, 0] = 9, 2, 4, 16
    assert torch.equal(codes.to_dense(), dense)
    assert len(codes.values) == 4


# ---- invariants ----------------------------------------------------------------------------------------------------


def test_the_residual_never_grows_and_codes_are_not_negative() -> None:
    sae, u = make_sae(NAME, stop_on_duplicate_support=False), rows(40)
    assert (sae.encode(u) >= 0).all()
    before = torch.full((40,), torch.inf)
    for iterations in range(1, 20):
        sae.cfg = dataclasses.replace(sae.cfg, max_iterations=iterations)
        norms = (u - sae(u)).norm(dim=1)
        assert (norms <= before + 1e-6).all()
        assert (norms < before - 1e-3).any()
        before = norms


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_units_scale_codes(scale: float) -> None:
    sae, other = (make_sae(NAME, residual_threshold=t) for t in (2.5, 2.5 * scale))
    with torch.no_grad():
        other.b_dec *= scale
    u = rows(40)
    codes = sae.encode(u)
    assert 0 < ((u - sae(u)).norm(dim=1) < 2.5).sum() < 40
    assert relative(other.encode(scale * u), scale * codes) < 1e-5
    assert torch.equal(other.encode(scale * u) != 0, codes != 0)


def test_a_row_depends_on_no_other() -> None:
    sae, u = make_sae(NAME, residual_threshold=2.0), rows(50)
    together = sae.encode(u)
    assert (together != 0).sum(dim=1).unique().numel() > 3, "rows stop at different times"
    for number in (0, 7, 33):
        torch.testing.assert_close(sae.encode(u[number]), together[number], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode(u.flip(0)).flip(0), together, rtol=1e-5, atol=1e-5)
    assert torch.equal(sae.encode(u), together)


def test_rows_without_anything_to_explain_have_no_latents() -> None:
    sae = make_sae(NAME)
    u = torch.cat([sae.b_dec.detach()[None], rows(1)])
    codes = sae.encode_sparse(u)
    assert codes.l0()[0] == 0 < codes.l0()[1]
    assert torch.equal(sae(u)[0], sae.b_dec)


def test_a_tied_matrix_has_b_dec_on_both_sides_or_on_neither() -> None:
    sae, u = make_sae(NAME, apply_b_dec_to_input=False), rows(9)
    before, codes = sae(u), sae.encode(u)
    with torch.no_grad():
        sae.b_dec += 5
    assert torch.equal(sae(u), before)
    torch.testing.assert_close(before, codes @ sae.W_dec)
    subtracting = make_sae(NAME)
    torch.testing.assert_close(
        subtracting(u + 1), subtracting.encode(u + 1) @ subtracting.W_dec + subtracting.b_dec, rtol=1e-5, atol=1e-5
    )


def test_nothing_is_there_before_selection() -> None:
    sae = make_sae(NAME)
    sae.hook_sae_acts_pre.add_hook(lambda tensor, hook: pytest.fail("there are no pre-activations"))
    sae(rows(3), use_error_term=True)
    assert sae.encoding(rows(3)).pre is None


def test_half_precision_pursues_in_full(subtract: bool) -> None:
    """Residuals and gradients are sums of many terms; only weights and codes are rounded."""
    fields = {"max_iterations": 4, "stop_on_duplicate_support": False, "apply_b_dec_to_input": subtract}
    half = make_sae(NAME, **fields).to(torch.bfloat16)
    full = make_sae(NAME, **fields)
    full.load_state_dict({key: value.to(full.state_dict()[key].dtype) for key, value in half.state_dict().items()})
    u = rows(60).bfloat16()
    passes = [sae.training_encoding(u.to(sae.dtype), {}) for sae in (half, full)]
    found, expected = (encoding.details["residual_norm"] for encoding in passes)
    assert found.dtype == torch.float32
    assert abs(found / expected - 1) < 0.01
    for encoding in passes:
        to_dense(encoding.codes).float().square().sum().backward()
    assert half.W_dec.grad is not None
    assert full.W_dec.grad is not None
    difference = (half.W_dec.grad.float() - full.W_dec.grad).norm() / full.W_dec.grad.norm()
    assert difference < 0.2, "a few rows choose otherwise, and no more"


# ---- cost ----------------------------------------------------------------------------------------------------------


def test_rows_that_are_done_cost_nothing_and_the_selection_has_no_backward() -> None:
    sae, u = make_sae(NAME, residual_threshold=2.0), rows(64)
    with FlopCounterMode(display=False) as counter:
        codes = sae.encode_sparse(u)
    iterations = codes.l0() + (
        (u - sae(u)).norm(dim=1) >= 2.0
    )  # who did not reach the threshold ended with a duplicate
    assert iterations.max() > 1.5 * iterations.double().mean(), "rows stop at different times"
    product = 2 * D_IN * D_SAE
    assert abs(counter.get_total_flops() / (product * iterations.sum()) - 1) < 0.02
    loss = sae(u).square().sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 0


def test_no_matrix_of_rows_and_latents_is_kept_for_backward() -> None:
    sae = make_sae(NAME, d_sae=500)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        codes = sae.encode_sparse(rows(200))
    entries = len(codes.values)
    assert max(kept) == 500 * D_IN, "W_dec is the largest"
    assert sum(kept) < 500 * D_IN + 3 * 200 * D_IN + 10 * entries


# ---- training ------------------------------------------------------------------------------------------------------


def data(steps: int, size: int = 64) -> Iterator[Tensor]:
    draw = generator(0, "data")
    atoms = torch.nn.functional.normalize(torch.randn(48, D_IN, generator=draw), dim=1)
    for _ in range(steps):
        yield 5 * ((torch.rand(size, 48, generator=draw) < 0.08) * torch.rand(size, 48, generator=draw)) @ atoms


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_it_trains_with_unit_rows(normalize: str) -> None:
    sae = make_config(NAME, max_iterations=8, residual_threshold=1.0, normalize_activations=normalize).build()
    log: list[dict[str, float]] = []

    class Watch(Callback):
        def on_log(self, trainer: SAETrainer, metrics: Any) -> None:
            log.append(dict(metrics))

        def on_step_end(self, trainer: SAETrainer) -> None:
            worst = (sae.W_dec.norm(dim=1) - 1).abs().max()
            assert worst < 1e-6

    cfg = RunConfig.from_dict({
        "train": {"tokens": 150 * 64, "batch_tokens": 64, "device": "cpu"},
        "log": {"console": False, "every_tokens": 15 * 64},
        "optim": {"lr": 3e-3},
    })  # fmt: skip
    SAETrainer(cfg, sae, data(150), callbacks=[Watch()]).fit()
    assert len(log) == 10, "the observer of unit rows was dropped"
    assert log[-1]["losses/mse_loss"] < 0.6 * log[0]["losses/mse_loss"]
    assert log[-1]["losses/overall_loss"] == log[-1]["losses/mse_loss"]
    assert 0 <= log[-1]["metrics/min_l0"] <= log[-1]["metrics/l0"] <= log[-1]["metrics/max_l0"] <= 8
    assert 0 < log[-1]["metrics/residual_threshold_converged_portion"] <= 1
    assert log[-1]["metrics/residual_norm"] < log[0]["metrics/residual_norm"]


def test_numbers_of_a_pass() -> None:
    sae, x = make_sae(NAME, residual_threshold=2.0), rows(40)
    run = training_pass(sae, Batch(x, x), {})
    norms, l0 = (x - run.y_hat).norm(dim=1), (to_dense(run.encoding.codes) != 0).sum(dim=1)
    torch.testing.assert_close(
        dict(run.encoding.details),
        {
            "max_l0": l0.max().float(),
            "min_l0": l0.min().float(),
            "residual_norm": norms.mean(),
            "residual_threshold_converged_portion": (norms < 2.0).float().mean(),
        },
    )
    assert 0 < run.encoding.details["residual_threshold_converged_portion"] < 1
    empty: Encoding = sae.training_encoding(x[:0], {})
    assert to_dense(empty.codes).shape == (0, D_SAE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_init_norm": 0.1}, "have norm 1: decoder_init_norm must be 1.0, found 0.1"),
        ({"decoder_norm_constraint": "free"}, "have norm 1: decoder_norm_constraint must be 'unit', found 'free'"),
        ({"aux_coefficient": 0.1}, "aux_coefficient needs pre-activations"),
        ({"pre_act_loss_coefficient": 0.1}, "pre_act_loss_coefficient needs pre-activations"),
        ({"residual_threshold": -1.0}, "residual_threshold must be at least 0, found -1.0"),
        ({"residual_threshold": float("nan")}, "residual_threshold must be at least 0, found nan"),
        ({"max_iterations": 0}, "max_iterations must be at least 1 or None, found 0"),
        ({"normalize_activations": "covariance_whitening"}, "matching_pursuit has no .*'covariance_whitening'; it can"),
        (
            {"normalize_activations": "center_and_scale", "apply_b_dec_to_input": False},
            "set apply_b_dec_to_input or choose expected_average_only_in",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(NAME, **fields)


# ---- folds and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.02, 40.0])
@pytest.mark.parametrize("mode", ["expected_average_only_in", "center_and_scale"])
def test_a_folded_scale_moves_into_units(mode: str, scale: float) -> None:
    sae = make_sae(NAME, normalize_activations=mode, residual_threshold=1.5)
    u = rows(60) / scale
    sae.norm_in.estimate(u)
    s, W_dec, b_dec, codes, output = (
        t.detach().clone() for t in (sae.norm_in.scale, sae.W_dec, sae.b_dec, sae.encode(u), sae(u))
    )
    mean = sae.norm_in.mean.clone() if mode == "center_and_scale" else 0.0
    reached = sae.training_encoding(sae.norm_in(u), {}).details["residual_threshold_converged_portion"]
    assert 0 < reached < 1, "the threshold decides"
    sae.fold_normalization()
    assert sae.cfg.normalize_activations == "none"
    assert isinstance(sae.cfg, MatchingPursuitSAEConfig)
    assert sae.cfg.residual_threshold == pytest.approx(1.5 / float(s))
    assert torch.equal(sae.W_dec, W_dec)
    torch.testing.assert_close(sae.b_dec.detach(), b_dec / s + mean)
    assert relative(sae(u), output) < 1e-5
    assert relative(sae.encode(u), codes / s) < 1e-5
    assert torch.equal(sae.encode(u) != 0, codes != 0)


def test_the_form_for_use_has_the_defaults_of_this_architecture() -> None:
    sae = make_sae(NAME, dead_after_tokens=7)
    assert sae.fold_decoder_norm() is sae
    cfg = sae.to_inference().cfg
    assert (cfg.decoder_init_norm, cfg.decoder_norm_constraint, cfg.dead_after_tokens) == (1.0, "unit", None)
    details = cfg.metadata.training_architecture_details
    assert details is not None
    assert (details["decoder_init_norm"], details["decoder_norm_constraint"]) == (1.0, "unit")
    assert details["dead_after_tokens"] == 7


def test_the_encoder_is_a_view_of_the_decoder() -> None:
    sae = make_config(NAME).build()
    assert sae.W_enc.data_ptr() == sae.W_dec.data_ptr()
    assert {name for name, _ in sae.named_parameters()} == {"W_dec", "b_dec"}
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(D_SAE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["use", "training"])
def test_files(tmp_path: Path, form: str) -> None:
    fields = {"max_iterations": 5, "residual_threshold": 0.5, "stop_on_duplicate_support": False}
    sae = make_sae(NAME, normalize_activations="expected_average_only_in", **fields)
    u = 7 * rows(20)
    sae.norm_in.estimate(u)
    saved = sae.to_inference() if form == "use" else sae
    folder = saved.save_model(tmp_path / "sae")
    statistics = {"norm_in.scale", "norm_in.rows"} if form == "training" else set()
    assert set(load_file(folder / "sae_weights.safetensors")) == {"W_dec", "b_dec"} | statistics
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == NAME
    assert (cfg["max_iterations"], cfg["stop_on_duplicate_support"]) == (5, False)
    factor = float(sae.norm_in.scale) if form == "use" else 1.0
    assert cfg["residual_threshold"] == pytest.approx(0.5 / factor)
    loaded = SAE.load_from_disk(folder)
    assert torch.equal(loaded(u), saved(u))
    assert relative(loaded(u), sae(u)) < 1e-5
