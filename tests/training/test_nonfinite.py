"""Steps that are not finite are skipped; an SAE that has no others any more is stopped, and alone."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import BATCH, D_IN, batch, every_trainable, make_config, make_sae, run_config, sparse_batches
from torch import Tensor

from sae_kit import SAEMetadata, SAETrainer, list_architectures
from sae_kit.data.batch import Batch
from sae_kit.errors import NonFiniteError
from sae_kit.sae import SAE
from sae_kit.training.part import SAEInTraining

NAN = torch.full((BATCH, D_IN), float("nan"))


def rows(sae: SAE, steps: int) -> list[Tensor]:
    return [each.x for each in sparse_batches(sae, steps)]


def trained_on(sae: SAE, stream: list[Tensor], **sections: Any) -> dict[str, float | int]:
    cfg = run_config(len(stream), schedule={"warm_up_tokens": 0, "decay_tokens": 0}, **sections)
    return SAETrainer(cfg, sae, stream, callbacks=[]).fit().metrics


@every_trainable
@pytest.mark.parametrize("optim", [{}, {"name": "signum"}, {"name": "sgd"}, {"fused": False}, {"ema": 0.9}], ids=str)
def test_a_bad_step_leaves_no_trace_but_its_tokens(name: str, optim: dict[str, Any]) -> None:
    fixed: dict[str, Any] = (
        {"threshold_window_tokens": 10 * BATCH} if list_architectures()[name].sae.selects_over_batch else {}
    )
    healthy, poisoned = (make_config(name, **fixed).build() for _ in range(2))
    stream = rows(healthy, 6)
    section = {"optim": {"lr": 3e-3, "clip_grad_norm": None, **optim}, "train": {"dead_after_tokens": 10**9}}
    expected = trained_on(healthy, stream, **section)
    found = trained_on(poisoned, [*stream[:3], NAN, torch.full_like(NAN, float("inf")), *stream[3:]], **section)
    assert found["optim/skipped_steps"] == 2
    assert (poisoned.tokens_seen, healthy.tokens_seen) == (8 * BATCH, 6 * BATCH)
    poisoned.tokens_seen.fill_(6 * BATCH)
    torch.testing.assert_close(poisoned.state_dict(), healthy.state_dict(), rtol=1e-6, atol=1e-7)
    for key in ("losses/overall_loss", "metrics/l0", "metrics/explained_variance", "optim/grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5), key


def test_an_sae_that_goes_on_diverging_is_stopped_with_what_is_known() -> None:
    sae = make_sae("topk")
    cfg = run_config(40, log={"console": False, "every_tokens": 4 * BATCH}, train={"nonfinite_limit": 6})
    stream = iter([*rows(sae, 3), *[NAN] * 40])
    trainer = SAETrainer(cfg, sae, stream, callbacks=[])
    with pytest.raises(
        NonFiniteError,
        match=r"SAE 'sae' diverged by step 12 \(768 tokens\): the loss or a gradient was not finite in the last 9 "
        r"steps; the last finite loss was \d+\.\d+, the largest norm of a row in the last step nan",
    ):
        trainer.fit()
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def test_the_largest_norm_of_the_rows_is_named() -> None:
    sae = make_sae("topk")
    cfg = run_config(10, log={"console": False, "every_tokens": 1}, train={"nonfinite_limit": 1})
    with pytest.raises(NonFiniteError, match=r"the largest norm of a row in the last step 5\.65685e\+30"):
        SAETrainer(cfg, sae, [torch.full((BATCH, D_IN), 1e30)], callbacks=[]).fit()


def test_fewer_bad_steps_in_a_row_than_the_limit_stop_nothing() -> None:
    sae = make_sae("topk")
    good = iter(rows(sae, 20))
    stream = [item for _ in range(5) for item in (NAN, NAN, next(good))]
    cfg = run_config(15, log={"console": False, "every_tokens": BATCH}, train={"nonfinite_limit": 3})
    result = SAETrainer(cfg, sae, stream, callbacks=[]).fit()
    assert (result.steps, result.metrics["optim/skipped_steps"], result.status) == (15, 10, {"sae": "trained"})


def test_one_sae_that_diverges_is_frozen_and_the_others_end_as_if_it_had_not(caplog: pytest.LogCaptureFixture) -> None:
    names = ("one", "two", "three")

    def saes() -> dict[str, SAE]:
        sites = {name: SAEMetadata(hook_name=name) for name in names}
        return {name: make_config("topk", metadata=sites[name]).build(seed=i) for i, name in enumerate(names)}

    def stream(broken: bool) -> Iterator[dict[str, Tensor]]:
        for step, x in enumerate(rows(make_sae("topk"), 20)):
            yield {"one": x, "two": NAN if broken and step >= 5 else x, "three": 2 * x}

    cfg = run_config(20, log={"console": False, "every_tokens": 2 * BATCH}, train={"nonfinite_limit": 4})
    healthy, ill = saes(), saes()
    SAETrainer(cfg, healthy, stream(False), callbacks=[]).fit()
    trainer = SAETrainer(cfg, ill, stream(True), callbacks=[])
    with caplog.at_level(logging.WARNING, "sae_kit"):
        result = trainer.fit()
    assert result.status == {"one": "trained", "two": "failed", "three": "trained"}
    assert caplog.text.count("SAE 'two' diverged by step 10 (640 tokens)") == 1
    assert result.metrics["one/optim/skipped_steps"] == 0
    assert not any(key.startswith("two/") for key in result.metrics), "a frozen SAE has no more metrics"
    for name in ("one", "three"):
        torch.testing.assert_close(ill[name].state_dict(), healthy[name].state_dict(), rtol=0, atol=0)
    assert ill["two"].tokens_seen == 10 * BATCH
    resumed = SAETrainer(cfg, saes(), [], callbacks=[])
    resumed.load_state_dict(trainer.state_dict())
    assert [part.failed for part in resumed.in_training.values()] == [False, True, False], "and stays so"
    assert all(parameter.isfinite().all() for parameter in ill["two"].parameters())


@pytest.mark.parametrize(("nonfinite", "names"), [("stop", ("a", "b")), ("auto", ("a", "b")), ("freeze", ("a",))])
def test_when_the_run_stops(nonfinite: str, names: tuple[str, ...]) -> None:
    """At the first SAE if that is wanted; in any case when none is left."""
    saes = {name: make_config("topk", metadata=SAEMetadata(hook_name=name)).build() for name in names}
    last = {"stop": "a", "auto": "b", "freeze": "a"}[nonfinite]
    cfg = run_config(30, log={"console": False, "every_tokens": BATCH}, train={"nonfinite": nonfinite})
    with pytest.raises(NonFiniteError, match=f"SAE '{last}' diverged by step 10 "):
        SAETrainer(cfg, saes, [dict.fromkeys(names, NAN)] * 30, callbacks=[]).fit()


def test_an_optimizer_of_ones_own_is_not_called_with_bad_gradients() -> None:
    sae = make_sae("standard")
    part = SAEInTraining(run_config(10), "sae", sae, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    part.step(Batch(NAN, NAN), 0, 1.0)
    before["tokens_seen"] += BATCH
    torch.testing.assert_close(sae.state_dict(), before, rtol=0, atol=0)
    part.step(batch(sae, BATCH), BATCH, 1.0)
    assert not torch.equal(sae.W_dec, before["W_dec"])
