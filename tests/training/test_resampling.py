"""Resampling: which rows are drawn, which latents they go to, what changes, and what does not."""

import copy
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers import D_IN, TRAINABLE, make_config, make_sae
from torch import Tensor

from sae_kit import Batch, RunConfig, SAETrainer
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE, Encoding
from sae_kit.training.callbacks import Callback
from sae_kit.training.losses import Pass
from sae_kit.training.part import SAEInTraining
from sae_kit.training.resampling import ResampleConfig, Resampler, reset_moments

BATCH = 64
every_geometry = pytest.mark.parametrize("geometry", ["sae", "skip", "transcoder", "crosscoder", "clt"])
ELEMENTWISE = ("standard", "gated", "jumprelu")
elementwise = pytest.mark.parametrize("name", ELEMENTWISE)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(sae: SAE, seed: int) -> Batch:
    x = drawn(BATCH, *sae.geometry.in_shape, seed=seed)
    return Batch(x, x if sae.geometry.same_site else drawn(BATCH, *sae.geometry.out_shape, seed=seed + 1000))


def run_config(sae: SAE, steps: int, batch_tokens: int = BATCH, **resample: Any) -> RunConfig:
    entry = {"sae": sae.cfg, "hook": "h", **({"resample": resample} if resample else {})}
    train = {"tokens": steps * batch_tokens, "batch_tokens": batch_tokens, "device": "cpu"}
    log = {"console": False, "every_tokens": batch_tokens}
    return RunConfig.from_dict({"saes": {"sae": entry}, "train": train, "log": log, "optim": {"lr": 1e-3}})


def trained(name: str, geometry: str, steps: int = 3, **resample: Any) -> SAEInTraining:
    """An SAE of weights that hide no mistake, with moments of `steps` steps."""
    sae = make_sae(name, geometry)
    part = SAEInTraining(run_config(sae, 1000, **resample), "sae", sae)
    for i in range(steps):
        part.step(batch(sae, i), i * BATCH, 1.0)
    return part


def by_latent(sae: SAE, name: str, tensor: Tensor) -> tuple[slice, Tensor] | None:
    """Which latents a tensor shaped like this parameter belongs to, and its rows for them; None if to no latent."""
    tensor = tensor.detach()
    if name in ("b_dec", "W_skip"):
        return None
    if name.startswith("W_dec."):
        first = int(name[-1]) * sae.d_sae
        return slice(first, first + sae.d_sae), tensor
    if name == "W_enc":
        tensor = tensor.transpose(1, 2).flatten(0, 1) if sae.geometry.cross_layer else tensor.flatten(0, -2).T
    return slice(None), tensor if name.startswith("W_") else tensor.flatten()


# ---- which rows ------------------------------------------------------------------------------------------------------


def fake_pass(sae: SAE, errors: Tensor, first: int = 0) -> Pass:
    """Rows that say their own number, each missing its target by so much."""
    x = torch.zeros(len(errors), D_IN)
    x[:, 0] = torch.arange(first, first + len(errors)) + 1
    y_hat = x.clone()
    y_hat[:, 1] += errors
    return Pass(x, x, Encoding(torch.zeros(len(errors), sae.d_sae), None), y_hat, None, None)


def sampler(candidates: int, *, seed: int = 0, rows: int = 100, interval: int = 100) -> Resampler:
    """A resampler for an SAE of which so many latents are dead."""
    sae = make_config("standard").build()
    sae.seed = seed
    sae.tokens_since_fired[:candidates] = 10**6
    cfg = ResampleConfig(interval_tokens=interval, window_tokens=10**6, rows=rows)
    return Resampler(sae, cfg, 10**9)


def kept_rows(resampler: Resampler) -> list[int]:
    """Numbers of the rows that are kept, best key first."""
    assert resampler.keys is not None
    assert resampler.x is not None
    order = resampler.keys.sort(descending=True)
    return [int(i) - 1 for i in resampler.x[order.indices[order.values > -torch.inf], 0]]


def test_rows_are_drawn_in_proportion_to_the_square_of_their_loss() -> None:
    """Loss ‖ŷ − y‖² of 1, 2, 3, 4 and 0 in two batches: P of being drawn first is 1, 4, 9, 16 and 0 parts of 30."""
    losses = torch.tensor([1.0, 3.0, 0.0, 2.0, 4.0])
    trials = 1_000
    resampler = sampler(1)
    one, two = (fake_pass(resampler._sae, part.sqrt(), first) for part, first in ((losses[:3], 0), (losses[3:], 3)))
    found = torch.zeros(5)
    for seed in range(trials):
        resampler._sae.seed = seed
        resampler.keys = None
        resampler.observe(one, 0)
        resampler.observe(two, 3)
        (row,) = kept_rows(resampler)
        found[row] += 1
    expected = losses.square() / losses.square().sum()
    assert found[2] == 0
    spread = (expected * (1 - expected) / trials).sqrt()
    assert ((found / trials - expected).abs() <= 4 * spread).all(), found / trials - expected


def test_rows_are_drawn_without_replacement_and_all_in_the_end() -> None:
    resampler = sampler(12)
    for i in range(4):
        resampler.observe(fake_pass(resampler._sae, torch.rand(5) + 0.1, 5 * i), 5 * i)
    assert len(set(kept_rows(resampler))) == 12
    plenty = sampler(40)
    for i in range(4):
        plenty.observe(fake_pass(plenty._sae, torch.ones(5), 5 * i), 5 * i)
    assert sorted(kept_rows(plenty)) == list(range(20))


def test_the_second_row_is_drawn_from_the_rest() -> None:
    """With weights 1, 4, 25 the pair lacks row i with the probability of successive draws."""
    weights = torch.tensor([1.0, 4.0, 25.0], dtype=torch.float64)
    total = weights.sum()
    resampler, trials, missing = sampler(2), 600, torch.zeros(3)
    rows = fake_pass(resampler._sae, weights.float() ** 0.25)
    for seed in range(trials):
        resampler._sae.seed, resampler.keys = seed, None
        resampler.observe(rows, 0)
        (left,) = set(range(3)) - set(kept_rows(resampler))
        missing[left] += 1
    for i, (j, k) in enumerate(((1, 2), (0, 2), (0, 1))):
        a, b = weights[j] / total, weights[k] / total
        expected = float(a * b / (1 - a) + b * a / (1 - b))
        assert abs(missing[i] / trials - expected) < 4 * (expected * (1 - expected) / trials) ** 0.5


def test_only_the_last_rows_before_the_time_are_looked_at_and_no_more_kept_than_can_be_dead() -> None:
    resampler = sampler(3, rows=10, interval=40)
    sae = resampler._sae
    sae.tokens_since_fired[3] = 10**6 - 11  # will not have been silent for long enough
    sae.tokens_since_fired[4] = 10**6 - 5  # can be
    for tokens in range(0, 40, 5):
        resampler.observe(fake_pass(sae, torch.ones(5), tokens), tokens)
        assert (resampler.keys is not None) == (tokens >= 30)
    assert resampler.keys is not None
    assert len(resampler.keys) == 4
    assert set(kept_rows(resampler)) < set(range(30, 40))


def test_nothing_is_kept_where_nothing_can_be_dead() -> None:
    resampler = sampler(0)
    resampler.observe(fake_pass(resampler._sae, torch.ones(5)), 0)
    assert resampler.keys is not None
    assert len(resampler.keys) == 0
    latents = resampler.apply(torch.optim.Adam(resampler._sae.parameters()), 0, 100)
    assert latents is not None
    assert len(latents) == 0
    assert (resampler.done, resampler.resampled) == (1, 0)


# ---- what changes ----------------------------------------------------------------------------------------------------


def resample_some(part: SAEInTraining, rows: Tensor, residual: Tensor) -> Tensor:
    """Declare four latents dead, show `rows` that were missed by `residual`, and resample."""
    sae, resampler, n = part.sae, part.resampler, part.sae.geometry.n_latents
    assert resampler is not None
    dead = torch.tensor([1, 7, n - 30, n - 1])
    sae.tokens_since_fired[dead] = 10**6
    sae.firing_count += 5
    resampler.keys = None  # of the steps before, when nothing could be dead
    y = rows if sae.geometry.same_site else drawn(*residual.shape, seed=10)
    resampler.observe(Pass(rows, y, Encoding(torch.zeros(BATCH, n), None), y - residual, None, None), 5 * BATCH)
    found = resampler.apply(part.optimizer, 5 * BATCH, BATCH)
    assert found is not None
    assert torch.equal(found, dead)
    return dead


@elementwise
@every_geometry
def test_dead_latents_get_rows_and_nothing_else_changes(name: str, geometry: str) -> None:
    part = trained(name, geometry, interval_tokens=6 * BATCH, window_tokens=10**6)
    sae, optimizer, n = part.sae, part.optimizer, part.sae.geometry.n_latents
    before = {key: parameter.detach().clone() for key, parameter in sae.named_parameters()}
    moments = copy.deepcopy({key: optimizer.state[parameter] for key, parameter in sae.named_parameters()})
    norms = sae.decoder_norms().detach().clone()
    x, residual = drawn(BATCH, *sae.geometry.in_shape, seed=8), drawn(BATCH, *sae.geometry.out_shape, seed=9)
    dead = resample_some(part, x, residual)
    living = torch.ones(n, dtype=torch.bool).index_fill_(0, dead, False)

    for key, parameter in sae.named_parameters():
        state = optimizer.state[parameter]
        assert torch.equal(state["step"], moments[key]["step"])
        pairs = [(key, parameter, before[key])]
        pairs += [(f"{key} {moment}", state[moment], moments[key][moment]) for moment in ("exp_avg", "exp_avg_sq")]
        for what, now, was in pairs:
            new, old = by_latent(sae, key, now), by_latent(sae, key, was)
            if new is None or old is None:
                assert torch.equal(now, was), what
                continue
            mine = living[new[0]]
            assert torch.equal(new[1][mine], old[1][mine]), what
            if " " in what:
                assert not new[1][~mine].any(), what
                assert old[1].any(), what

    assert (sae.tokens_since_fired[dead] == 0).all()
    assert (sae.firing_count[dead] == 0).all()
    assert (sae.firing_count[living] >= 5).all()
    for key in ("b_enc", "b_gate", "b_mag", "r_mag"):
        if key in before:
            assert not sae.get_parameter(key).flatten()[dead].any()
    if name == "jumprelu":
        assert (sae.get_parameter("threshold").flatten()[dead] == 0.01).all()

    read = x - sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else x
    used: list[int] = []
    for latent in dead.tolist():
        layer, within = divmod(latent, sae.d_sae)
        block = slice(layer * sae.d_sae, (layer + 1) * sae.d_sae)
        encoder, old = (sae.geometry.encoder(w.detach(), layer) for w in (sae.W_enc, before["W_enc"]))
        column = encoder[:, within]
        rows = torch.nn.functional.normalize(sae.geometry.read(read, layer), dim=1)
        row = int((rows @ column).argmax())
        used.append(row)
        length = 0.2 * old.norm(dim=0)[living[block]].mean()
        torch.testing.assert_close(column, rows[row] * length)
        missed = sae.geometry.written(read if sae.geometry.same_site else residual, layer)
        written = sae.geometry.decoder(sae.W_dec, layer).detach()[within]
        torch.testing.assert_close(written / written.norm(), missed[row] / missed[row].norm())
        torch.testing.assert_close(sae.decoder_norms()[latent], norms[block][living[block]].mean())
    assert len(set(used)) == len(dead), "each latent has a row of its own"


@pytest.mark.parametrize("geometry", ["sae", "clt"])
def test_new_latents_may_take_the_second_moment_of_the_living(geometry: str) -> None:
    part = trained("gated", geometry, interval_tokens=6 * BATCH, window_tokens=10**6, reset_second_moment="alive_mean")
    sae, n = part.sae, part.sae.geometry.n_latents
    x, residual = drawn(BATCH, *sae.geometry.in_shape, seed=8), drawn(BATCH, *sae.geometry.out_shape, seed=9)
    dead = resample_some(part, x, residual)
    living = torch.ones(n, dtype=torch.bool).index_fill_(0, dead, False)
    for key, parameter in sae.named_parameters():
        first, second = (by_latent(sae, key, part.optimizer.state[parameter][m]) for m in ("exp_avg", "exp_avg_sq"))
        if first is None or second is None:
            continue
        numbers = torch.arange(n)[first[0]]
        for latent in set(dead.tolist()) & set(numbers.tolist()):
            row = latent - int(numbers[0])
            block = living[numbers] & (numbers // sae.d_sae == latent // sae.d_sae)
            assert not first[1][row].any()
            torch.testing.assert_close(second[1][row], second[1][block].mean(dim=0), rtol=1e-5, atol=0)


def test_unit_decoders_stay_unit_and_half_precision_works() -> None:
    for fields in ({"decoder_norm_constraint": "unit"}, {"dtype": "bfloat16"}):
        sae = make_config("jumprelu", **fields).build()
        part = SAEInTraining(run_config(sae, 100, interval_tokens=BATCH, window_tokens=1, rows=BATCH), "sae", sae)
        with torch.no_grad():
            sae.b_enc[:5] = -100.0
        part.step(batch(sae, 0), 0, 1.0)
        assert part.resampler is not None
        assert part.resampler.resampled >= 5
        expected = torch.ones(5) if "dtype" not in fields else sae.decoder_norms()[10:].mean().expand(5)
        torch.testing.assert_close(
            sae.decoder_norms()[:5], expected, rtol=0 if "dtype" not in fields else 0.02, atol=1e-6
        )
        assert not sae.b_enc[:5].any()


def test_moments_of_other_optimizers_are_forgotten_too() -> None:
    sae = make_sae("standard")
    optimizer = torch.optim.SGD(sae.parameters(), momentum=0.9)
    sae(batch(sae, 0).x).square().sum().backward()
    optimizer.step()
    dead = torch.tensor([2, 3])
    living = torch.ones(sae.d_sae, dtype=torch.bool).index_fill_(0, dead, False)
    reset_moments(optimizer, sae, dead, living, "alive_mean")
    momentum = optimizer.state[sae.W_enc]["momentum_buffer"]
    assert not momentum[:, dead].any()
    assert momentum[:, living].any(dim=0).all()
    amsgrad = torch.optim.Adam(sae.parameters(), amsgrad=True)
    amsgrad.step()
    reset_moments(amsgrad, sae, dead, living, "zero")
    largest = amsgrad.state[sae.W_dec]["max_exp_avg_sq"]
    assert not largest[dead].any()
    assert largest[living].any(dim=1).all()


def test_where_all_are_dead_the_means_are_over_all() -> None:
    part = trained("standard", "sae", interval_tokens=6 * BATCH, window_tokens=10**6, reset_second_moment="alive_mean")
    assert part.resampler is not None
    part.sae.tokens_since_fired.fill_(10**6)
    part.resampler.keys = None
    data = batch(part.sae, 5)
    run = Pass(data.x, data.y, Encoding(torch.zeros(BATCH, 96), None), torch.zeros_like(data.y), None, None)
    part.resampler.observe(run, 5 * BATCH)
    norm = part.sae.decoder_norms().mean()
    part.resampler.apply(part.optimizer, 5 * BATCH, BATCH)
    assert part.resampler.resampled == BATCH, "fewer rows than dead latents: the rest wait"
    torch.testing.assert_close(part.sae.decoder_norms()[:BATCH], norm.expand(BATCH))
    assert (part.sae.tokens_since_fired == 0).sum() == BATCH
    assert all(parameter.isfinite().all() for parameter in part.sae.parameters())


# ---- in a run --------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """What was logged after each step, and which latents had just been renewed."""

    def __init__(self) -> None:
        self.counts: list[float] = []
        self.rows: list[Mapping[str, Any]] = []

    def on_log(self, trainer: SAETrainer, metrics: Any) -> None:
        self.rows.append(dict(metrics))
        self.counts.append(metrics.get("details/resampled", -1))


def silence(sae: SAE, latents: slice) -> None:
    """Nothing that the data holds makes these fire, and no gradient reaches them."""
    with torch.no_grad():
        sae.b_enc[latents] = -100.0


def fit(sae: SAE, steps: int, **resample: Any) -> Watch:
    watch = Watch()
    items = [batch(sae, i).x for i in range(steps)]
    SAETrainer(run_config(sae, steps, **resample), sae, items, callbacks=[watch]).fit()
    return watch


def test_interval_times_and_the_end_of_the_run() -> None:
    sae = make_config("standard").build()
    silence(sae, slice(0, 10))
    resets: list[int] = []

    class Silence(Callback):
        """Kill the ten again after every step, so that each time finds them dead."""

        def on_step_end(self, trainer: SAETrainer) -> None:
            if (sae.tokens_since_fired[:10] == 0).all() and trainer.steps > 1:
                resets.append(trainer.steps)
            silence(sae, slice(0, 10))

    items = [batch(sae, i).x for i in range(20)]
    cfg = run_config(sae, 20, interval_tokens=4 * BATCH, window_tokens=2 * BATCH, times=3, rows=BATCH)
    SAETrainer(cfg, sae, items, callbacks=[Silence()]).fit()
    assert resets == [4, 8, 12]
    resets.clear()
    sae.tokens_since_fired.zero_()
    cfg = run_config(sae, 20, interval_tokens=4 * BATCH + 1, window_tokens=2 * BATCH, times=99, rows=BATCH)
    SAETrainer(cfg, sae, items, callbacks=[Silence()]).fit()
    assert resets == [5, 9, 13, 17], "the first step past each multiple"
    resets.clear()
    sae.tokens_since_fired.zero_()
    cfg = run_config(sae, 20, interval_tokens="20%", window_tokens="10%", times=99, rows=BATCH)
    SAETrainer(cfg, sae, items, callbacks=[Silence()]).fit()
    assert resets == [4, 8, 12, 16], "not with the last step: nothing would train them"


def test_dead_is_silent_for_the_window_not_for_the_interval() -> None:
    sae = make_config("standard").build()

    class Silence(Callback):
        def on_step_end(self, trainer: SAETrainer) -> None:
            if trainer.steps == 4:
                silence(sae, slice(0, 5))  # then silent for 4 batches at the time
            if trainer.steps == 6:
                silence(sae, slice(5, 10))  # for 2

    items = [batch(sae, i).x for i in range(10)]
    cfg = run_config(sae, 10, interval_tokens=8 * BATCH, window_tokens=3 * BATCH, rows=2 * BATCH)
    SAETrainer(cfg, sae, items, callbacks=[Silence()]).fit()
    assert (sae.b_enc[:5] > -50).all()
    assert (sae.b_enc[5:10] < -50).all()


@elementwise
@every_geometry
def test_dead_latents_come_back_to_life(name: str, geometry: str) -> None:
    resample = {"interval_tokens": 5 * BATCH, "window_tokens": 4 * BATCH, "rows": 3 * BATCH, "times": 1}
    with_it, without = (make_config(name, geometry, normalize_activations="none").build() for _ in range(2))
    for sae, fields in ((with_it, resample), (without, {})):
        bias = next(sae.get_parameter(key) for key in ("b_enc", "b_gate") if key in dict(sae.named_parameters()))
        with torch.no_grad():
            bias[..., :10] = -100.0
        watch = Watch()
        items = [batch(sae, i) for i in range(15)]
        SAETrainer(run_config(sae, 15, **fields), sae, items, callbacks=[watch]).fit()
        expected = 10 * sae.geometry.layers
        if fields:
            assert watch.counts[:4] == [0] * 4
            assert watch.counts[4:] == [expected] * 11
        else:
            assert watch.counts == [-1] * 15
        assert all(0 <= row["sparsity/dead_fraction"] < 1 for row in watch.rows)
    dead, revived = (sae.firing_count.reshape(-1, sae.d_sae)[:, :10] for sae in (without, with_it))
    assert (dead == 0).all()
    assert (revived > 0).double().mean() > 0.9


def test_an_interrupted_window_goes_on_as_if_nothing_had_happened() -> None:
    resample = {"interval_tokens": 6 * BATCH, "window_tokens": 4 * BATCH, "rows": 4 * BATCH, "times": 2}

    def begin(saved: Mapping[str, Any] | None = None) -> SAEInTraining:
        sae = make_config("standard", "transcoder").build()
        silence(sae, slice(0, 20))
        part = SAEInTraining(run_config(sae, 100, **resample), "sae", sae)
        if saved is not None:
            sae.load_state_dict(saved["sae"])
            part.optimizer.load_state_dict(saved["optimizer"])
            assert part.resampler is not None
            part.resampler.load_state_dict(saved["resampler"])
        return part

    whole, first = begin(), begin()
    for i in range(15):
        whole.step(batch(whole.sae, i), i * BATCH, 1.0)
    for i in range(4):
        first.step(batch(first.sae, i), i * BATCH, 1.0)
    assert first.resampler is not None
    assert first.resampler.keys is not None
    state = {
        "sae": first.sae.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "resampler": first.resampler.state_dict(),
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    second = begin(torch.load(file, weights_only=True))
    for i in range(4, 15):
        second.step(batch(second.sae, i), i * BATCH, 1.0)
    torch.testing.assert_close(second.sae.state_dict(), whole.sae.state_dict(), rtol=0, atol=0)
    assert second.resampler is not None
    assert second.resampler.resampled >= 20
    assert (second.resampler.done, second.resampler.keys) == (2, None)


def test_the_logged_density_does_not_fall_below_zero() -> None:
    """Latents that fired in the window of an earlier density are silent, and start to count anew."""
    sae = make_config("standard").build()
    watch = Watch()

    class Silence(Callback):
        def on_step_end(self, trainer: SAETrainer) -> None:
            if trainer.steps == 4:
                silence(sae, slice(0, 20))

    cfg = run_config(sae, 14, interval_tokens=8 * BATCH, window_tokens=3 * BATCH, rows=BATCH)
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, density_window_tokens=4 * BATCH))
    items = [batch(sae, i).x for i in range(14)]
    SAETrainer(cfg, sae, items, callbacks=[Silence(), watch]).fit()
    assert watch.counts[-1] == 20
    assert all(row["metrics/mean_log10_feature_sparsity"] <= 0 for row in watch.rows)


def test_collecting_rows_changes_no_training() -> None:
    one, two = make_config("standard").build(), make_config("standard").build()
    fit(one, 6)
    fit(two, 6, interval_tokens=5 * BATCH, window_tokens=10**9, rows=10**6)
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name not in ELEMENTWISE])
def test_latents_that_compete_are_not_resampled(name: str) -> None:
    sae = make_config(name).build()
    with pytest.raises(ConfigError, match=f"SAE 'sae': resample: latents of {name} SAEs compete.* Leave resample out"):
        SAETrainer(run_config(sae, 10, times=1), sae, [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval_tokens": 0}, "interval_tokens: expected a positive number of tokens, found 0"),
        ({"window_tokens": "0%"}, "window_tokens: expected a positive number of tokens, found '0%'"),
        ({"window_tokens": "1.5"}, "window_tokens: expected a number of tokens .* found '1.5'"),
        ({"times": 0}, "times must be at least 1, found 0"),
        ({"rows": 0}, "rows must be at least 1, found 0"),
        ({"encoder_scale": 0.0}, "encoder_scale must be positive, found 0.0"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResampleConfig(**fields)
