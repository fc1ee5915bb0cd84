"""Where this field has slipped in the use of SAEs: folds, selection, files. test_training_mistakes.py has the rest.

See there for what the numbers are, and for the rows that wait.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fields import refused
from helpers import (
    D_IN,
    D_SAE,
    FORMS,
    NORMALIZATIONS,
    SITES,
    batch,
    estimated,
    every,
    every_trainable,
    fit,
    forms_in,
    inputs,
    make_config,
    make_sae,
    one_pass,
    relative,
    targets,
    values_of,
)
from hosts import Toy, ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sae_kit import SAE, SAEMetadata, attached
from sae_kit.architectures._selection import BatchSelectionSAE
from sae_kit.data.batch import Batch
from sae_kit.errors import ConfigError, MissingContextError
from sae_kit.ops import l0, to_dense
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import training_losses
from sae_kit.training.schedules import ScheduleConfig

SELECTING = pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka_batchtopk"])


@forms_in("transcoder", "crosscoder", "clt")
def test_r05_thresholds_move_with_folds_at_every_site(name: str, geometry: str) -> None:
    """in ≠ out statistics, unequal norms: the support stays, and no site's weights are left behind."""
    sae = estimated(make_sae(name, geometry, normalize_activations="expected_average_only_in"), 0.1)
    u = inputs(sae, 200) / 10
    out, on = sae(u), sae.encode(u) != 0
    for folded in (sae.to_inference(), sae.fold_normalization()):
        assert torch.equal(folded.encode(u) != 0, on)
        for site in range(out.shape[1] if out.ndim > 2 else 1):
            found, expected = (rows[:, site] if out.ndim > 2 else rows for rows in (folded(u), out))
            assert relative(found, expected) < 1e-5, site


@SELECTING
def test_r06_use_does_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    """The threshold of training, right after one step, saved as a buffer, restored by load, untouched by bfloat16."""
    sae = make_sae(name)
    u = inputs(sae, 40)
    torch.testing.assert_close(torch.cat([sae.encode(row[None]) for row in u]), sae.encode(u), rtol=1e-5, atol=1e-6)
    if not isinstance(sae, BatchSelectionSAE):
        return
    sae.schedule_settled()
    run = one_pass(sae, batch(sae, 60))
    sae.observe(run.encoding, values_of(sae))
    kept = (to_dense(run.encoding.codes) * sae.decoder_norms()).detach()
    again = SAE.load_from_disk(sae.save_model(tmp_path / "sae"))
    for one in (sae, again, sae.to(torch.bfloat16)):
        assert isinstance(one, BatchSelectionSAE)
        assert one.inference_threshold is not None
        torch.testing.assert_close(one.inference_threshold[0], kept[kept > 0].min(), rtol=1e-6, atol=0)


def test_r07_fractions_and_lengths_of_zero() -> None:
    sae = make_sae("batchtopk", k=0.29)
    assert l0(one_pass(sae, batch(sae, 100)).encoding.codes).sum() == 29, "not 28, which truncation gives"
    for name in ("topk", "batchtopk"):
        with pytest.raises(ConfigError, match="k must lie between 1 and d_sae = 96, found 97"):
            make_config(name, k=97)
    zero = ScheduleConfig(warm_up_tokens=0, decay_tokens=0).build(1000)
    assert [zero.factor(tokens, 10) for tokens in (0, 500, 990)] == [1.0, 1.0, 1.0]
    for cfg in (make_config("standard", l1_warm_up_tokens=0), make_config("jumprelu", l0_warm_up_tokens=0)):
        metrics = fit(cfg.build(), 2, schedule={"warm_up_tokens": 0, "decay_tokens": 0})
        assert metrics["losses/overall_loss"] > metrics["losses/mse_loss"], "the coefficient is whole from the start"


@pytest.mark.parametrize(
    ("name", "geometry"),
    [form for form in FORMS if form[1] == "skip" or (form[1] == "sae" and make_sae(form[0]).reads_sequences)],
)
def test_r09_what_passes_beside_the_latents_is_part_of_everything(name: str, geometry: str) -> None:
    """Skip, or prediction: of forward, of decoding, of a spliced model, and of what the error term need not add."""
    sae = make_sae(name, geometry, metadata=SAEMetadata(hook_name="layer"))
    toy = Toy()
    x = nn.functional.linear(toy.embed(ids()), *toy.layer.parameters())
    extra = sae.row_context(x).extra
    assert extra is not None
    latents_alone = sae.decode(sae.encode(x), sae.row_context(x)._replace(extra=None))
    torch.testing.assert_close(sae(x) - latents_alone, extra, rtol=1e-4, atol=1e-4)
    assert relative(sae(x), latents_alone) > 1e-2
    seen: list[Tensor] = []
    sae.hook_sae_error.add_hook(lambda error, hook: seen.append(error))
    torch.testing.assert_close(sae(x, use_error_term=True), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0], x - latents_alone - extra, rtol=1e-4, atol=1e-4)
    sae.hook_sae_error.remove_hooks()
    with attached(toy, sae):
        spliced = toy(ids())
    torch.testing.assert_close(spliced, toy.head(torch.tanh(sae(x)) + toy.embed(ids())), rtol=1e-5, atol=1e-5)


def test_r09_orientation_and_dtype_of_the_skip() -> None:
    sae = make_sae("topk", "skip")
    u = inputs(sae, 5).bfloat16()
    extra = sae.row_context(u).extra
    assert extra is not None
    assert extra.dtype == torch.float32
    torch.testing.assert_close(extra, u.float() @ sae.W_skip.T)
    assert (sae.W_skip - sae.W_skip.T).abs().max() > 0.1, "the other orientation would be seen"


@every
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "row_norm"])
def test_r10_no_call_remembers_another(name: str, normalization: str) -> None:
    sae = make_sae(name, **NORMALIZATIONS[normalization])
    u, other = inputs(sae, 6), 7 * inputs(sae, 6, seed=3) + 2
    codes, expected = sae.encode(u), sae(u)
    context = sae.row_context(u)
    fresh = make_sae(name, **NORMALIZATIONS[normalization])
    if fresh.needs_context:
        with pytest.raises(MissingContextError):
            fresh.decode(codes)
    torch.testing.assert_close(fresh.decode(codes, context), expected, rtol=1e-5, atol=1e-5)
    sparse = sae.encode_sparse(u)
    sae.encode(other)
    sae(other)
    for _ in range(2):
        torch.testing.assert_close(sae.decode(codes, context), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(sparse), expected, rtol=1e-5, atol=1e-5)
    if sae.needs_context:
        with pytest.raises(MissingContextError):
            sae.decode(codes)
    assert sae(torch.zeros(3, D_IN)).isfinite().all()


@every
def test_r11_heads_of_any_split_in_any_order(name: str) -> None:
    sae = make_sae(name, reshape_activations="hook_z")
    flat = inputs(sae, 2, 3)
    expected = sae(flat)
    assert expected.shape == (2, 3, D_IN)
    four, eight = flat.unflatten(-1, (4, 8)), flat.unflatten(-1, (8, 4))  # 4-D inputs
    context = sae.row_context(four)
    for split in (four, eight, four, flat):
        torch.testing.assert_close(sae(split), expected.reshape(split.shape))
    sae(eight)
    decoded = sae.decode(sae.encode(four), context)
    torch.testing.assert_close(decoded, expected.unflatten(-1, (4, 8)), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@SELECTING
def test_r19_no_tensor_of_rows_times_k_times_width(name: str) -> None:
    """Forward and backward of a step make nothing larger than dense codes or weights; for any k, on the CPU."""
    rows, width = 64, 128
    for k in (1, 3, 48, 96):
        sae = make_sae(name, d_in=width, k=k)
        data = batch(sae, rows)
        with Largest() as largest:
            run = one_pass(sae, data)
            training_losses(sae, run, values_of(sae), DeadLatents(sae, 10**9)).total.backward()
        levels = len(getattr(sae.cfg, "widths", (1,)))  # as many outputs are wanted
        assert largest.numel <= max(rows * D_SAE, width * D_SAE, rows * levels * width), k
        assert 0 < l0(run.encoding.codes).sum() <= rows * k


@every_trainable
def test_r20_a_checkpoint_is_converted_and_reopened_by_itself(name: str, tmp_path: Path) -> None:
    """No second registry: a folder of training gives its SAE, that one its inference form, and that a folder again."""
    sae = make_config(name, d_sae=97 if not refused(name, {"d_sae": 97}) else D_SAE).build()
    fit(sae, 2)
    again = SAE.load_from_disk(sae.save_model(tmp_path / "training"))
    u = inputs(sae, 5)
    torch.testing.assert_close(again.state_dict(), sae.state_dict(), rtol=0, atol=0)
    assert relative(again(u), sae(u)) < 1e-6
    inference = SAE.load_from_disk(again.to_inference().save_model(tmp_path / "inference"))
    assert relative(inference(u), sae(u)) < 1e-5
    for folder in ("training", "inference"):
        data = json.loads((tmp_path / folder / "cfg.json").read_text())
        assert data["d_sae"] == sae.d_sae == 97, "stored, not a multiple of d_in"


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_r23_layers_are_counted_as_documented(name: str, tmp_path: Path) -> None:
    """k in each layer; a layer's codes are those of its own block; the last layer is there and is saved."""
    sae = make_sae(name, "clt", k=5)
    data = batch(sae, 40)
    codes = to_dense(one_pass(sae, data).encoding.codes).view(40, SITES, D_SAE)
    assert (codes != 0).sum(dim=(0, 2)).tolist() == [5 * 40] * SITES
    layer = SITES - 1
    single = make_config(name, d_in=D_IN, out_shape=(sae.d_out,), k=5).build()
    with torch.no_grad():
        single.W_enc.copy_(sae.W_enc[layer])
        single.b_enc.copy_(sae.b_enc[layer])
        single.W_dec.copy_(sae.W_dec[layer][:, 0])
    own = one_pass(single, Batch(data.x[:, layer], data.y[:, layer]))
    torch.testing.assert_close(to_dense(own.encoding.codes), codes[:, layer], rtol=1e-5, atol=1e-5)
    silent = sae.encode(data.x).clone()
    silent[:, layer] = 0
    assert relative(sae.decode(silent)[:, layer], sae(data.x)[:, layer]) > 1e-2, "it writes"
    again = SAE.load_from_disk(sae.save_model(tmp_path / "sae"))
    assert len(again.W_dec) == SITES
    assert torch.equal(again(data.x), sae(data.x))


def test_r24_rows_do_not_matter_to_each_other_in_use() -> None:
    """What a padded row holds changes no other row's code, where no mask says that it is padding."""
    for name in ("topk", "batchtopk"):
        sae = make_sae(name)
        u = inputs(sae, 2, 5)
        padded = u.clone()
        padded[:, 3:] = 1000.0
        torch.testing.assert_close(sae.encode(padded)[:, :3], sae.encode(u)[:, :3], rtol=1e-5, atol=1e-5)


def test_targets_of_the_tests_are_other_rows() -> None:
    sae = make_sae("standard", "transcoder")
    assert relative(targets(sae, 4)[:, :8], inputs(sae, 4)[:, :8]) > 0.1
