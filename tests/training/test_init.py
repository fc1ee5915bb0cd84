"""What an SAE starts from: each formula against its definition, in every geometry, and the sample is trained on."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import D_IN, D_OUT, SITES, make_config
from torch import Tensor

from sae_kit import Batch, RunConfig, SAETrainer
from sae_kit.errors import ConfigError, DataError, ShapeError
from sae_kit.ops import firing_counts
from sae_kit.sae import SAE
from sae_kit.training.init import (
    InitConfig,
    active_subspace,
    geometric_median,
    grid_search,
    initialize_from,
    quantile_levels,
    transcoder_from_mlp,
)
from sae_kit.training.part import SAEInTraining

ROWS = 1_000
every_geometry = pytest.mark.parametrize("geometry", ["sae", "transcoder", "crosscoder", "clt"])
elementwise = pytest.mark.parametrize("name", ["standard", "gated", "jumprelu"])


def build(name: str = "standard", geometry: str = "sae", **fields: Any) -> SAE:
    fields.setdefault("normalize_activations", "expected_average_only_in")
    return make_config(name, geometry, **fields).build(seed=5)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Skewed rows with a mean of their own."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).exp()
    return found * torch.linspace(1, 3, shape[-1])


def sample(sae: SAE, rows: int = ROWS) -> Batch:
    x = drawn(rows, *sae.geometry.in_shape)
    return Batch(x, x if sae.geometry.same_site else drawn(rows, *sae.geometry.out_shape, seed=1))


def start(sae: SAE, data: Batch | None = None, **fields: Any) -> Batch:
    """Initialise; returns the sample in training space."""
    data = data or sample(sae)
    initialize_from(sae, data, InitConfig(**fields), seed=7)
    return Batch(sae.norm_in(data.x), sae.norm_target(data.y))


def blocks(sae: SAE) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Encoder [d_read, S] and decoder [S, d_written] of every block."""
    for layer in range(sae.geometry.layers):
        yield layer, sae.geometry.encoder(sae.W_enc, layer), sae.geometry.decoder(sae.W_dec, layer)


# ---- b_dec -----------------------------------------------------------------------------------------------------------


def test_geometric_median_is_not_the_mean() -> None:
    """30 % of the rows lie 141 away: they move the mean by 42, and the median by 1.4."""
    rows = torch.randn(4_000, 8, generator=torch.Generator().manual_seed(0))
    rows[:1_200] += 50.0
    median = geometric_median(rows)
    assert rows.mean(dim=0).norm() == pytest.approx(42, abs=1)
    assert median.norm() == pytest.approx(1.4, abs=0.15)
    pull = torch.nn.functional.normalize(rows - median, dim=1).mean(dim=0)
    assert pull.norm() < 1e-3
    both = geometric_median(torch.stack([rows, 3 - rows], dim=1))
    torch.testing.assert_close(both, torch.stack([median, 3 - median]), rtol=0, atol=1e-3)
    assert geometric_median(rows.bfloat16()).dtype == torch.float32


@every_geometry
@pytest.mark.parametrize("centre", ["mean", "geometric_median"])
def test_b_dec_is_the_centre_of_what_is_reproduced(geometry: str, centre: str) -> None:
    sae = build(geometry=geometry)
    y = start(sae, b_dec=centre).y
    expected = y.mean(dim=0) if centre == "mean" else geometric_median(y)
    torch.testing.assert_close(sae.b_dec.detach(), expected)
    assert (y.mean(dim=0) - geometric_median(y)).norm() > 0.1
    start(sae)
    assert not sae.b_dec.any(), "the default is zero, whatever was there"


# ---- decoder ---------------------------------------------------------------------------------------------------------


@every_geometry
@pytest.mark.parametrize("constraint", ["free", "unit"])
def test_active_subspace_holds_every_decoder_row(geometry: str, constraint: str) -> None:
    sae = build(geometry=geometry, normalize_activations="none", decoder_norm_constraint=constraint)
    rank, width = 5, max(decoder.shape[1] for _, _, decoder in blocks(sae))
    plane = torch.linalg.qr(drawn(width, rank, seed=3) - 2).Q.T  # [rank, width]
    x = drawn(ROWS, *sae.geometry.in_shape)
    y = ((drawn(ROWS, rank, seed=4) @ plane) + 10).reshape(ROWS, *sae.geometry.out_shape)
    encoder, before = sae.W_enc.detach().clone(), sae.decoder_norms().detach().clone()
    start(sae, Batch(y if sae.geometry.same_site else x, y), decoder="active_subspace", d_active_subspace=rank)
    for layer, _, decoder in blocks(sae):
        basis = torch.linalg.qr(sae.geometry.written(plane.reshape(rank, *sae.geometry.out_shape), layer).T).Q
        unit = torch.nn.functional.normalize(decoder.detach(), dim=1)
        torch.testing.assert_close(unit @ basis @ basis.T, unit, rtol=0, atol=1e-4)
        assert torch.linalg.matrix_rank(decoder.detach(), rtol=1e-4) == rank
    torch.testing.assert_close(sae.decoder_norms(), before)
    if sae.geometry.same_site:
        torch.testing.assert_close(sae.W_enc.flatten(0, -2), sae.W_dec.flatten(1).T, rtol=0, atol=0)
    else:
        assert torch.equal(sae.W_enc, encoder)


def test_active_subspace_is_where_rows_vary_around_their_mean() -> None:
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 5, 0.1, 9, 0.1, 0.1])
    basis = active_subspace(rows + 100, 2)
    torch.testing.assert_close(basis.abs()[[3, 1], [0, 1]], torch.ones(2), rtol=0, atol=1e-2)
    with pytest.raises(DataError, match="needs more rows"):
        active_subspace(rows[:2], 2)


def test_uniform_weights_of_a_cross_layer_transcoder() -> None:
    sae = build(geometry="clt", d_sae=256)
    start(sae, decoder="uniform", encoder="uniform")
    for matrix, bound in ((sae.W_enc, 256**-0.5), *((block, (SITES * D_OUT) ** -0.5) for block in sae.W_dec)):
        assert matrix.abs().max() <= bound
        assert float(matrix.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(sae.W_enc[0], sae.W_enc[1])
    drawn = [block.detach().clone() for block in sae.W_dec]
    start(sae, decoder="uniform", encoder="uniform", zero_later_layers=True)
    for block, before in zip(sae.W_dec, drawn, strict=True):
        assert torch.equal(block[:, 0], before[:, 0])
        assert not block[:, 1:].any()


def test_a_transcoder_may_start_with_a_decoder_of_zeros() -> None:
    for name in ("standard", "topk"):
        sae = build(name, "transcoder")
        start(sae, decoder="zero", b_dec="mean")
        assert not sae.W_dec.any()
        assert sae.W_enc.any()
        fit(sae, [drawn(64, D_IN, seed=i) for i in range(5)], y=True)
        assert all(parameter.isfinite().all() for parameter in sae.parameters())
        assert sae.W_dec.any()


def test_drawn_weights_obey_the_constraint_of_the_decoder() -> None:
    sae = build(decoder_norm_constraint="unit")
    start(sae, decoder="uniform")
    torch.testing.assert_close(sae.decoder_norms().detach(), torch.ones(sae.d_sae))
    assert torch.equal(sae.W_enc, sae.W_dec.T)


def test_grid_search_looks_closer_around_the_best() -> None:
    tried: list[float] = []

    def loss(norm: float) -> float:
        tried.append(norm)
        return (norm - 1.234) ** 2

    assert grid_search(loss) == pytest.approx(1.23)
    assert tried[:50] == pytest.approx([0.1 * i for i in range(1, 51)])
    assert tried[50:] == pytest.approx([1.11 + 0.01 * i for i in range(20)])
    assert grid_search(lambda norm: norm) == pytest.approx(0.01)


@every_geometry
@pytest.mark.parametrize("b_enc", ["zero", "mean_centred", "quantile"])
def test_the_norm_of_least_error_is_given_to_decoder_and_encoder(geometry: str, b_enc: str) -> None:
    sae = build(geometry=geometry)
    unit = [decoder.detach() / decoder.norm(dim=1, keepdim=True) for _, _, decoder in blocks(sae)]
    x = drawn(ROWS, *sae.geometry.in_shape)
    y = x if sae.geometry.same_site else sae(x).detach()  # what these directions can reproduce
    data = start(sae, Batch(x, y), decoder_norm="grid", b_dec="mean", b_enc=b_enc)
    norm = float(sae.decoder_norms().detach()[0])
    torch.testing.assert_close(sae.decoder_norms().detach(), torch.full((sae.geometry.n_latents,), norm))
    for (_, encoder, decoder), directions in zip(blocks(sae), unit, strict=True):
        torch.testing.assert_close(decoder / decoder.norm(dim=1, keepdim=True), directions)
        if sae.geometry.same_site:
            assert torch.equal(encoder, decoder.T)
        else:
            torch.testing.assert_close(encoder.norm(dim=0).detach(), torch.full((sae.d_sae,), norm))

    @torch.no_grad()
    def error(other: float) -> float:
        """Σ‖ŷ − y‖² with encoder, b_enc and decoder of another norm."""
        longer = other / norm
        codes = torch.relu(longer * sae.preactivations(data.x))
        return float((sae.geometry.decode(longer * codes, sae.W_dec) + sae.b_dec - data.y).square().sum())

    coarse = min((0.1 * i for i in range(1, 51)), key=error)
    assert norm == pytest.approx(min((max(coarse - 0.09 + 0.01 * i, 0.01) for i in range(20)), key=error))
    assert 0.02 < norm < 5, "a minimum, not an end of the range"


# ---- encoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["sae", "crosscoder"])
def test_encoder_is_the_scaled_transpose(geometry: str) -> None:
    sae = build(geometry=geometry)
    start(sae, decoder="uniform", encoder="transpose", encoder_factor=0.25)
    assert sae.W_dec.abs().max() <= sae.W_dec[0].numel() ** -0.5
    assert torch.equal(sae.W_enc.flatten(0, -2), 0.25 * sae.W_dec.flatten(1).T)
    assert sae.W_enc.is_contiguous()
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()


@pytest.mark.parametrize("name", ["standard", "topk", "batchtopk"])
def test_a_calibrated_encoder_answers_unit_inputs_with_unit_outputs(name: str) -> None:
    sae = build(name, decoder_norm_constraint="unit", normalize_activations="none")
    start(sae, encoder="calibrated", b_dec="mean")
    inputs = torch.nn.functional.normalize(torch.randn(2_000, D_IN, generator=torch.Generator().manual_seed(9)), dim=1)
    assert float((sae(sae.b_dec + inputs) - sae.b_dec).detach().norm(dim=1).mean()) == pytest.approx(1, rel=0.05)
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(sae.d_sae))


# ---- b_enc -----------------------------------------------------------------------------------------------------------


@elementwise
@every_geometry
def test_quantile_biases_give_every_latent_the_same_firing_rate(name: str, geometry: str) -> None:
    fields = {"jumprelu_init_threshold": 0.3} if name == "jumprelu" else {}
    sae = build(name, geometry, **fields)
    x = start(sae, b_dec="mean", b_enc="quantile", firing_rate=0.2).x
    fired = firing_counts(sae.encoding(x).codes)
    assert torch.equal(fired, torch.full_like(fired, ROWS // 5))
    start(sae, b_dec="mean", b_enc="quantile")
    assert torch.equal(firing_counts(sae.encoding(x).codes), torch.full_like(fired, ROWS // 10))


def test_the_usual_firing_rate_is_ten_thousand_latents() -> None:
    sae = build(d_sae=200_000, in_shape=(2,), d_in=None, normalize_activations="none")
    data = sample(sae, 40)
    start(sae, data, b_enc="quantile")
    fired = (sae.preactivations(data.x) > 0).sum(dim=0)
    assert torch.equal(fired, torch.full_like(fired, 2))


def test_quantiles_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, W_enc = drawn(100, 8), drawn(8, 50, seed=1)
    whole = quantile_levels(rows, W_enc, 0.3)
    monkeypatch.setattr("sae_kit.training.init.CHUNK_LATENTS", 7)
    torch.testing.assert_close(quantile_levels(rows, W_enc, 0.3), whole)
    assert torch.equal((rows @ W_enc > whole).sum(dim=0), torch.full((50,), 30))


@elementwise
@every_geometry
def test_centred_biases_give_mean_zero(name: str, geometry: str) -> None:
    sae = build(name, geometry)
    x = start(sae, b_dec="mean", b_enc="mean_centred").x
    pre = sae.encoding(x).pre
    assert isinstance(pre, Tensor)
    torch.testing.assert_close(pre.mean(dim=0), torch.zeros(sae.geometry.n_latents), rtol=0, atol=1e-5)
    assert pre.std() > 0.01
    start(sae, b_dec="mean")
    pre = sae.encoding(x).pre
    assert isinstance(pre, Tensor)
    if sae.cfg.apply_b_dec_to_input:
        return  # b_dec has centred the input
    assert pre.mean(dim=0).abs().max() > 0.1, "the default is zero, whatever was there"


# ---- a transcoder from its MLP ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "center_and_scale", "covariance_whitening"])
def test_a_transcoder_of_a_linear_map_has_its_directions(normalize: str) -> None:
    sae = build(geometry="transcoder", normalize_activations=normalize)
    data, A = sample(sae), torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(2))
    probes: list[Tensor] = []

    def mlp(u: Tensor) -> Tensor:
        probes.append(u)
        return u @ A + 3

    encoder, norms = sae.W_enc.detach().clone(), sae.decoder_norms().detach().clone()
    transcoder_from_mlp(sae, mlp, data)
    columns = torch.nn.functional.normalize(encoder, dim=0).T
    if normalize != "covariance_whitening":  # which moves rows by different amounts in different directions
        mean = data.x.mean(dim=0)
        torch.testing.assert_close(torch.cat(probes), mean + columns * (data.x - mean).norm(dim=1).mean())
    read, written = torch.eye(D_IN), torch.eye(D_OUT)
    if normalize != "none":
        read, written = sae.norm_in.affine().inverse.float(), sae.norm_target.affine().matrix.float()
    expected = torch.nn.functional.normalize((columns - columns.mean(dim=0)) @ read @ A @ written, dim=1)
    torch.testing.assert_close(sae.W_dec / norms[:, None], expected, rtol=0, atol=1e-4)
    assert torch.equal(sae.W_enc, encoder)
    with pytest.raises(ShapeError, match=r"expected the MLP to give \[96, 24\], found \[96, 32\]"):
        transcoder_from_mlp(sae, lambda u: u, data)
    with pytest.raises(ConfigError, match="for transcoders from one site to one other, found a sae"):
        transcoder_from_mlp(build(), mlp, data)


# ---- in a run --------------------------------------------------------------------------------------------------------


def run_config(sae: SAE, steps: int, **entry: Any) -> RunConfig:
    tree = {"sae": {"sae": sae.cfg, "hook": "h", **entry}} if entry else {}
    log = {"console": False, "every_tokens": 10**9}
    return RunConfig.from_dict({"saes": tree, "log": log, "train": {"tokens": 64 * steps, "batch_tokens": 64}})


def fit(sae: SAE, rows: list[Tensor], y: bool = False, **entry: Any) -> None:
    items = [Batch(x, x[:, :D_OUT]) for x in rows] if y else rows
    SAETrainer(run_config(sae, len(rows), **entry), sae, items, callbacks=[]).fit()


class Peekable(list[Tensor]):
    """Batches that can be looked at before they are taken."""

    def peek(self, number: int) -> Tensor:
        return torch.cat(list(self))[:number]


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("peek", [False, True])
def test_the_sample_is_trained_on_afterwards(normalize: str, peek: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = build(normalize_activations=normalize)
    rows = [drawn(64, D_IN, seed=i) for i in range(6)]
    seen: list[Tensor] = []
    started: list[Tensor] = []
    step = SAEInTraining.step

    def watched(self: SAEInTraining, batch: Batch, tokens: int, **given: Any) -> None:
        seen.append(batch.x)
        started.append(self.sae.b_dec.detach().clone())
        step(self, batch, tokens, **given)

    monkeypatch.setattr(SAEInTraining, "step", watched)
    fit(sae, Peekable(rows) if peek else rows, init={"b_dec": "geometric_median"})
    assert torch.equal(torch.cat(seen), torch.cat(rows)), "every batch is trained on, once and in order"
    torch.testing.assert_close(started[0], geometric_median(sae.norm_in(torch.cat(rows))))
    after = sae.b_dec.detach().clone()
    fit(sae, [x + 100 for x in rows], init={"b_dec": "geometric_median"})
    torch.testing.assert_close(started[6], after, rtol=0, atol=0)


def test_without_an_init_an_sae_starts_as_built() -> None:
    one, two, plain = build(), build(), build(normalize_activations="none")
    rows = [drawn(64, D_IN, seed=i) for i in range(3)]
    fit(one, rows)
    fit(two, rows, seed=0)
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    built = {key: value.clone() for key, value in plain.state_dict().items()}
    start(plain)
    torch.testing.assert_close(plain.state_dict(), built, rtol=0, atol=0)


def test_a_start_depends_on_its_seed_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    fields: dict[str, Any] = {"decoder": "uniform", "encoder": "calibrated", "b_dec": "geometric_median"}
    one, two, other = build(), build(), build()
    start(one, **fields)
    start(two, **fields)
    start(two, **fields)
    initialize_from(other, sample(other), InitConfig(**fields), seed=8)
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    assert not torch.equal(one.W_dec, other.W_dec)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_gets_what_single_precision_found() -> None:
    fields: dict[str, Any] = {"b_dec": "geometric_median", "b_enc": "quantile", "firing_rate": 0.2}
    sae = build("jumprelu", dtype="bfloat16", normalize_activations="none")
    data = start(sae, **fields)
    torch.testing.assert_close(sae.b_dec, geometric_median(data.x).bfloat16(), rtol=0, atol=0)
    rate = (sae.preactivations(data.x.bfloat16()) > sae.get_parameter("threshold")).double().mean(dim=0)
    assert (rate - 0.2).abs().mean() < 0.02


def test_large_samples_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows in (("SAMPLE_ROWS", 300), ("MEDIAN_ROWS", 200)):
        monkeypatch.setattr(f"sae_kit.training.init.{name}", rows)
    sae = build(geometry="transcoder")
    x = drawn(2_000, D_IN) + torch.arange(2_000)[:, None] / 400  # the first rows are unlike the rest
    data = start(sae, Batch(x, x[:, :D_OUT]), b_dec="mean", b_enc="quantile", firing_rate=0.1)
    mean = data.y.mean(dim=0)
    assert 0.01 < (sae.b_dec - mean).norm() < 0.2 * (data.y[:300].mean(dim=0) - mean).norm(), "some, from everywhere"
    rate = float((sae.encode(x) != 0).double().mean())
    assert rate == pytest.approx(0.1, abs=0.03)
    sae.b_dec.detach().fill_(0)
    start(sae, Batch(x, x[:, :D_OUT]), b_dec="geometric_median")
    assert 0.01 < (sae.b_dec - geometric_median(data.y)).norm() < 0.3 * (data.y[:200].mean(dim=0) - mean).norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder": "active_subspace"}, "belong together, found None and 'active_subspace'"),
        ({"d_active_subspace": 4}, "belong together, found 4 and 'random'"),
        ({"decoder": "active_subspace", "d_active_subspace": 0}, "must be at least 1, found 0"),
        ({"encoder_factor": 0.5}, "is for encoder='transpose', found encoder='default'"),
        ({"encoder": "transpose", "encoder_factor": 0.0}, "must be positive, found 0.0"),
        ({"firing_rate": 0.1}, "is for b_enc='quantile', found b_enc='zero'"),
        ({"b_enc": "quantile", "firing_rate": 1.0}, "must lie between 0 and 1, found 1.0"),
        ({"decoder_norm": "grid", "encoder": "calibrated"}, "both say how long weights are"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InitConfig(**fields)


@pytest.mark.parametrize(
    ("geometry", "sae_fields", "fields", "message"),
    [
        ("transcoder", {}, {"encoder": "transpose"}, "a standard transcoder writes elsewhere than it reads"),
        ("clt", {}, {"encoder": "calibrated"}, "a standard clt writes elsewhere than it reads"),
        ("sae", {}, {"decoder": "zero"}, "would be its transpose, and zero as well"),
        ("sae", {}, {"zero_later_layers": True}, "is for cross-layer transcoders, found a standard sae"),
        ("sae", {"decoder_norm_constraint": "unit"}, {"decoder_norm": "grid"}, "keeps every norm at 1"),
        ("transcoder", {"decoder_norm_constraint": "unit"}, {"decoder": "zero"}, "keeps every norm at 1"),
        ("clt", {}, {"decoder": "active_subspace", "d_active_subspace": 25}, "at most 24, .* found 25"),
    ],
)
def test_settings_without_meaning_for_an_sae(
    geometry: str, sae_fields: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    sae = build(geometry=geometry, **sae_fields)
    with pytest.raises(ConfigError, match=rf"init\..*{message}"):
        initialize_from(sae, sample(sae), InitConfig(**fields), seed=0)
    with pytest.raises(ConfigError, match=rf"SAE 'sae': init\..*{message}"):
        SAEInTraining(run_config(sae, 1, init=fields), "sae", sae)


def test_an_sae_without_encoder_and_biases_of_its_own_refuses_them() -> None:
    sae = build()
    for name in ("W_enc", "b_enc"):
        del sae._parameters[name]
    sae.W_enc = sae.W_dec.T
    with pytest.raises(ConfigError, match="has no encoder of its own, it is the transposed decoder"):
        initialize_from(sae, sample(sae), InitConfig(encoder="transpose"), seed=0)
    with pytest.raises(ConfigError, match=r"init.b_enc='quantile': a standard sae has no biases of latents"):
        initialize_from(sae, sample(sae), InitConfig(b_enc="quantile"), seed=0)
    start(sae, decoder="active_subspace", d_active_subspace=4, b_dec="mean")


def test_a_sample_of_the_wrong_shape_is_refused() -> None:
    sae = build(normalize_activations="none")
    with pytest.raises(ShapeError, match="expected rows of shape"):
        initialize_from(sae, Batch(drawn(8, 4), drawn(8, 4)), InitConfig(), seed=0)
    with pytest.raises(DataError, match="empty sample"):
        initialize_from(sae, Batch(drawn(0, D_IN), drawn(0, D_IN)), InitConfig(), seed=0)
    with pytest.raises(DataError, match="at least 2 rows, found 1"):
        initialize_from(sae, sample(sae, 1), InitConfig(b_enc="quantile"), seed=0)
