"""KL through the model: against a direct computation, step by hand, and as a run that is better at what it is for."""

import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_sae
from hosts import D_IN, Toy, bridge, ids, plain
from torch import Tensor, nn

from sae_kit import SAE, RunConfig, SAETrainer, ops
from sae_kit.data.batch import Batch, Harvested, State, TokenBatch
from sae_kit.data.capture import capture
from sae_kit.data.contexts import WholeContexts
from sae_kit.data.sites import resolve
from sae_kit.errors import ConfigError, DataError, TrainingInterrupted
from sae_kit.metadata import SAEMetadata
from sae_kit.splicing import observed, replaced
from sae_kit.training.callbacks import Callback, read_metrics
from sae_kit.training.end_to_end import EndToEnd, EndToEndConfig, kl_divergence
from sae_kit.training.losses import training_pass
from sae_kit.training.optim import OptimConfig
from sae_kit.training.run import run

SITE, LATER = "blocks.1.hook_resid_pre", ("blocks.2.hook_resid_pre", "blocks.2.hook_resid_post")
BOTH = EndToEndConfig(kl=0.7, downstream=0.3, sites=LATER)


class Text(Iterator[Harvested]):
    """Activations of a model on forwards of four contexts of which the first two positions do not count."""

    def __init__(self, model: nn.Module, *sites: str, forwards: int = 2, contexts: int = 4) -> None:
        self.model, self.sites, self.forwards, self.contexts, self.at = model, sites, forwards, contexts, 0

    def __next__(self) -> Harvested:
        if self.at == self.forwards:
            raise StopIteration
        self.at += 1
        tokens = ids(self.contexts, 8, seed=self.at)
        kept = torch.arange(self.contexts * 8).view(-1, 8)[:, 2:].flatten()
        rows = {site: value.flatten(0, 1)[kept] for site, value in capture(self.model, self.sites, tokens).items()}
        return Harvested(rows, TokenBatch(tokens), kept)

    @property
    def counters(self) -> dict[str, int | float]:
        return {"lm_tokens": self.at * self.contexts * 8}

    @property
    def provenance(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> State:
        return {"at": self.at}

    def load_state_dict(self, state: State) -> None:
        self.at = state["at"]

    def close(self) -> None:
        pass


def host(kind: str) -> nn.Module:
    model = bridge("gpt2", torch.float64) if kind == "bridge" else plain("gpt2").double()
    return model.requires_grad_(False)


def sae_at(site: str = SITE, name: str = "topk", **fields: Any) -> SAE:
    fields = {"normalize_activations": "expected_average_only_in", "dtype": "float64", **fields}
    sae = make_sae(name, metadata=SAEMetadata(hook_name=site), **fields)
    sae.norm_in.estimate(2.0 * torch.randn(500, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    return sae


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def directly(sae: SAE, model: nn.Module, parts: list[Harvested], cfg: EndToEndConfig, values: Any) -> Tensor:
    """The loss as it is defined: the SAE on the live activations of all contexts, autograd through all of it."""
    total = sum(len(part.kept) for part in parts)
    loss = torch.zeros((), dtype=torch.float64)
    for part in parts:
        where = torch.zeros(part.tokens.ids.numel(), dtype=torch.bool)
        where[part.kept] = True
        where = where.view(part.tokens.ids.shape)
        with torch.no_grad(), observed(model, LATER) as clean:
            p = logits(model, part.tokens.ids).log_softmax(-1)[where]

        def spliced(value: Tensor) -> Tensor:
            flat = value.flatten(0, 1)
            run = training_pass(sae, Batch(flat, flat), values)
            return sae.norm_in.undo(run.y_hat, run.scale, run.shift).view(value.shape)

        live: list[Tensor] = []
        readers = [resolve(model, site).on_read(live.append) for site in LATER]
        with replaced(model, SITE, spliced, where):
            q = logits(model, part.tokens.ids).log_softmax(-1)[where]
        for reader in readers:
            reader.remove()
        loss = loss + cfg.kl * nn.functional.kl_div(q, p, log_target=True, reduction="sum") / total
        for site, value in zip(cfg.sites, live, strict=False):
            v, v_hat = clean[site][where], value[where]
            share = (v - v_hat).square().sum() / (v - v.mean(0)).square().sum()
            loss = loss + cfg.downstream * share / len(cfg.sites) * len(part.kept) / total
    return loss


@pytest.mark.parametrize("kind", ["plain", "bridge"])
@pytest.mark.parametrize("cfg", [EndToEndConfig(), BOTH], ids=["kl", "both"])
def test_terms_and_gradients_are_those_of_the_definition(kind: str, cfg: EndToEndConfig) -> None:
    model = host(kind)
    contexts = WholeContexts(Text(model, SITE), forwards=2)
    sae = sae_at(k=4)
    batch = next(contexts)[SITE]
    run = training_pass(sae, Batch(batch, batch), {})
    terms = EndToEnd(model, contexts, [(sae, cfg)])(sae, Batch(batch, batch), run)
    assert list(terms) == ["kl_loss", *(["downstream_loss"] if cfg.sites else [])]
    (3 * sum(terms.values(), torch.zeros(()))).backward()
    found = {name: p.grad for name, p in sae.named_parameters()}
    sae.zero_grad()
    loss = directly(sae, model, contexts.current, cfg, {})
    (3 * loss).backward()
    torch.testing.assert_close(sum(terms.values()), loss, rtol=1e-10, atol=0)
    assert loss > 1e-3
    for name, p in sae.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_the_gradient_of_the_divergence_is_the_numerical_one() -> None:
    draws = torch.Generator().manual_seed(0)
    clean, q = (torch.randn(2, 3, 5, dtype=torch.float64, generator=draws) for _ in range(2))
    clean[0, 0, 1] = -torch.inf  # an id that the model never predicts
    index = torch.tensor([0, 2, 3])
    q.requires_grad_()
    flat_p, flat_q = clean.view(-1, 5)[index].softmax(-1), q.view(-1, 5)[index].log_softmax(-1)
    expected = (torch.special.xlogy(flat_p, flat_p) - flat_p * flat_q).sum()
    total, gradient = kl_divergence(clean, q, index)
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, q)[0])


def run_config(hook: str = SITE, **train: Any) -> RunConfig:
    entry = {"hook": hook, "sae": {"architecture": "topk", "d_sae": 96, "k": 4}, "end_to_end": {}}
    train = {"batch_tokens": 64, "tokens": 640, **train}
    optim = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "clip_grad_norm": None}
    return RunConfig.from_dict(
        {"saes": {"sae": entry}, "train": train, "optim": optim, "schedule": {"name": "constant", "warm_up_tokens": 0}}
    )


def test_a_step_is_the_one_by_hand() -> None:
    """Stochastic gradient descent on the KL divergence alone: the local error, which is logged, has no part in it."""
    model = host("plain")
    contexts = WholeContexts(Text(model, SITE), forwards=2)
    sae, other = sae_at(k=4, aux_coefficient=0.0), sae_at(k=4, aux_coefficient=0.0)
    trainer = SAETrainer(run_config(), sae, contexts, loss=EndToEnd(model, contexts, [(sae, EndToEndConfig())]))
    trainer.step(next(contexts))
    directly(other, model, contexts.current, EndToEndConfig(), {}).backward()
    row = trainer.in_training["sae"].row()
    assert row["losses/overall_loss"] == pytest.approx(row["losses/kl_loss"], rel=1e-12)
    assert row["losses/mse_loss"] > 0
    for (name, p), q in zip(sae.named_parameters(), other.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * q.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_it_is_better_at_what_it_is_trained_for() -> None:
    """On the same text, from the same start, at the same L0: the model is disturbed less, activations more."""
    model, found = Toy().double().requires_grad_(False), {}
    for name in ("end to end", "local"):
        cfg = dataclasses.replace(run_config("embed", tokens=9600, batch_tokens=96), optim=OptimConfig(lr=1e-2))
        if name == "local":
            cfg = dataclasses.replace(cfg, saes={})
        sae = sae_at("embed", k=2, d_sae=24, aux_coefficient=0.0)
        contexts = WholeContexts(Text(model, "embed", forwards=2, contexts=8), forwards=2)
        loss = EndToEnd(model, contexts, [(sae, EndToEndConfig())])
        trainer = SAETrainer(cfg, sae, contexts, loss=loss if name == "end to end" else None, callbacks=[])
        rows = next(contexts)
        for _ in range(100):
            trainer.step(rows)
        batch = Batch(rows["embed"], rows["embed"])
        after = training_pass(sae, batch, {})
        assert ops.values_of(after.encoding.codes).shape[-1] == 2
        found[name] = (
            loss(sae, batch, after)["kl_loss"].item(),
            float((after.y_hat - after.y).detach().square().mean()),
        )
    assert found["end to end"][0] < 0.9 * found["local"][0]
    assert found["local"][1] < 0.8 * found["end to end"][1]


def test_the_size_of_forwards_changes_nothing() -> None:
    model, gradients = host("plain"), []
    for forwards in (1, 2):
        text = Text(model, SITE, forwards=forwards, contexts=8 // forwards)
        contexts = WholeContexts(text, forwards=forwards)
        sae = sae_at(k=4)
        all_ids = torch.cat([ids(4, 8, seed=1), ids(4, 8, seed=2)])
        contexts.source = OneText(text, all_ids)
        batch = next(contexts)[SITE]
        assert len(contexts.current) == forwards
        (term,) = EndToEnd(model, contexts, [(sae, EndToEndConfig())])(
            sae, Batch(batch, batch), training_pass(sae, Batch(batch, batch), {})
        ).values()
        term.backward()
        gradients.append(sae.W_dec.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-13)


class OneText(Text):
    """The same ids, however many contexts a forward has."""

    def __init__(self, text: Text, all_ids: Tensor) -> None:
        super().__init__(text.model, *text.sites, forwards=text.forwards, contexts=text.contexts)
        self.all_ids = all_ids

    def __next__(self) -> Harvested:
        found = super().__next__()
        tokens = self.all_ids[(self.at - 1) * self.contexts :][: self.contexts]
        values = capture(self.model, self.sites, tokens)
        rows = {site: value.flatten(0, 1)[found.kept] for site, value in values.items()}
        return dataclasses.replace(found, rows=rows, tokens=TokenBatch(tokens))


def test_the_model_is_left_as_it_was() -> None:
    model = plain("gpt2").double()
    frozen = next(model.parameters()).requires_grad_(False)
    contexts = WholeContexts(Text(model, SITE))
    sae = sae_at(k=4)
    SAETrainer(run_config(), sae, contexts, loss=EndToEnd(model, contexts, [(sae, BOTH)])).step(next(contexts))
    assert all(p.grad is None for p in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_transcoder_is_put_in_where_it_writes() -> None:
    model, reads, writes = host("plain"), "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    contexts = WholeContexts(Text(model, reads, writes))
    metadata = SAEMetadata(hook_name=reads, hook_name_out=writes)
    sae = make_sae("topk", k=4, metadata=metadata, out_shape=(D_IN,), dtype="float64")
    rows = next(contexts)
    batch = Batch(rows[reads], rows[writes])
    loss = EndToEnd(model, contexts, [(sae, EndToEndConfig())])
    (term,) = loss(sae, batch, training_pass(sae, batch, {})).values()
    term.backward()
    assert sae.W_enc.grad is not None
    assert float(sae.W_enc.grad.norm()) > 0
    with torch.no_grad():  # what reproduces the MLP exactly costs nothing
        exact = training_pass(sae, batch, {})._replace(y_hat=rows[writes])
        (nothing,) = loss(sae, batch, exact).values()
    assert nothing.item() < 1e-12 < term.item()


def test_a_forward_of_which_one_row_is_left_counts_like_any_other() -> None:
    """The last batch of a run is cut to its tokens; what is left of a forward may have no variance."""
    model, sae = host("plain"), sae_at(k=4)
    contexts = WholeContexts(Text(model, SITE), forwards=2, train_tokens=25)
    rows = next(contexts)[SITE]
    assert [len(part.kept) for part in contexts.current] == [24, 1]
    batch = Batch(rows, rows)
    terms = EndToEnd(model, contexts, [(sae, BOTH)])(sae, batch, training_pass(sae, batch, {}))
    sum(terms.values(), torch.zeros(())).backward()
    assert all(term.isfinite() for term in terms.values())
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad.isfinite().all()


def test_a_batch_from_elsewhere_is_refused() -> None:
    model = host("plain")
    contexts = WholeContexts(Text(model, SITE))
    sae = sae_at(k=4)
    loss = EndToEnd(model, contexts, [(sae, EndToEndConfig())])
    rows = next(contexts)[SITE][:-1]
    with pytest.raises(DataError, match="whole batches of its stream"):
        loss(sae, Batch(rows, rows), training_pass(sae, Batch(rows, rows), {}))


def test_a_site_before_the_sae_is_refused() -> None:
    model = host("plain")
    contexts = WholeContexts(Text(model, SITE))
    sae, cfg = sae_at(k=4), EndToEndConfig(downstream=1.0, sites=("blocks.0.hook_resid_pre",))
    rows = next(contexts)[SITE]
    with pytest.raises(ConfigError, match=r"'blocks.0.hook_resid_pre' does not come after the site"):
        EndToEnd(model, contexts, [(sae, cfg)])(sae, Batch(rows, rows), training_pass(sae, Batch(rows, rows), {}))


# ---- runs ------------------------------------------------------------------------------------------------------------

HOOK = "blocks.2.hook_resid_pre"
ENTRY: dict[str, Any] = {
    "hook": HOOK,
    "sae": {"architecture": "topk", "d_sae": 256, "k": 8, "dead_after_tokens": 1024},
}
TREE: dict[str, Any] = {
    "model": "demo",
    "dataset": "demo",
    "name": "run",
    "data": {"context_size": 64},
    "train": {"tokens": 4096, "batch_tokens": 512},
    "optim": {"lr": 3e-3},
    "eval": {"tokens": 4096, "fidelity_tokens": 4096, "every_tokens": None},
    "log": {"console": False, "every_tokens": 1024},
    "checkpoint": {"every_tokens": None, "every_minutes": None},
    "saes": {"sae": {**ENTRY, "end_to_end": {}}},
}


def config(out: Path, **changes: Any) -> RunConfig:
    return RunConfig.from_dict({**TREE, "out": str(out), **changes})


def test_a_run_that_is_interrupted_goes_on_bit_for_bit(tmp_path: Path) -> None:
    short = {"train": {"tokens": 2048, "batch_tokens": 512}, "eval": {"at_end": False, "every_tokens": None}}
    straight = run(config(tmp_path / "straight", **short))
    stopped = config(tmp_path / "stopped", **short)
    with pytest.raises(TrainingInterrupted):
        run(stopped, callbacks=[Interrupt(2)])
    resumed = run(stopped)
    assert resumed.training.tokens == straight.training.tokens == 2048
    torch.testing.assert_close(
        resumed.training.saes["sae"].state_dict(), straight.training.saes["sae"].state_dict(), rtol=0, atol=0
    )
    rows, others = (read_metrics(found.folder / "metrics.jsonl") for found in (resumed, straight))
    for row, other in zip(rows, others, strict=True):
        assert row["losses/kl_loss"] == other["losses/kl_loss"]


class Interrupt(Callback):
    """A signal after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any) -> None:
        if trainer.steps == self.step:
            signal.raise_signal(signal.SIGINT)


def test_a_run_may_hold_saes_of_both_kinds(tmp_path: Path) -> None:
    """On the same rows; the one that is trained as ever has no part in the other's loss."""
    mixed = {"reconstruction": 0.01, "end_to_end": {"kl": 1.0, "downstream": 0.5, "sites": ["blocks.3.hook_resid_pre"]}}
    saes = {"local": ENTRY, "model": {**ENTRY, "end_to_end": {}}, "all": {**ENTRY, **mixed}}
    train = {**TREE["train"], "tokens": 2048}
    found = run(config(tmp_path, saes=saes, train=train))
    row = found.training.metrics
    assert {name.split("/")[0] for name in row if name.endswith("losses/kl_loss")} == {"model", "all"}
    assert [name for name in row if name.endswith("losses/downstream_loss")] == ["all/losses/downstream_loss"]
    for name, weight in (("local", 1.0), ("model", 0.0), ("all", 0.01)):
        kl, downstream = (row.get(f"{name}/losses/{term}_loss", 0.0) for term in ("kl", "downstream"))
        aux = row.get(f"{name}/losses/auxiliary_reconstruction_loss", 0.0)
        expected = weight * row[f"{name}/losses/mse_loss"] + kl + downstream + aux
        assert row[f"{name}/losses/overall_loss"] == pytest.approx(expected, rel=1e-5)
    assert set(found.evals) == set(saes)
    assert found.training.tokens == 2048
    assert row["data/lm_tokens"] <= 2048 + 512, "one forward reads for all"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"tokens": 4096, "accumulate": 2}}, "train.accumulate: with end_to_end a step is one pass"),
        ({"buffer": {"tokens": 8192}}, "buffer.tokens: with end_to_end there is no buffer, found 8192"),
        ({"buffer": {"prefetch": 2}}, "buffer.prefetch: with end_to_end there is no buffer"),
        ({"cache": {"read": "folder"}}, "end_to_end runs the model on the text of each batch"),
        ({"saes": {"sae": {**ENTRY, "end_to_end": {"kl": 0}}}}, "kl and downstream must not be negative, nor both 0"),
        ({"saes": {"sae": {**ENTRY, "end_to_end": {"downstream": 1.0}}}}, "downstream and sites belong together"),
        ({"saes": {"sae": {**ENTRY, "end_to_end": {"k": 1}}}}, "unknown key 'saes.sae.end_to_end.k'"),
        ({"saes": {"sae": {**ENTRY, "reconstruction": -1.0}}}, "reconstruction must not be negative"),
        (
            {"saes": {"sae": {**ENTRY, "hook": ["blocks.1.hook_resid_pre", HOOK], "end_to_end": {}}}},
            "only an SAE that writes one site can be put into a forward",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        config(tmp_path, **changes)
    assert message in str(found.value)


def test_a_step_of_less_than_a_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a step on whole contexts takes at least one of 64 ids"):
        run(config(tmp_path, train={"tokens": 4096, "batch_tokens": 32}))


def test_without_end_to_end_the_coefficient_of_the_reconstruction_counts(tmp_path: Path) -> None:
    """Of a loss of one's own, say, that takes its place."""
    entry = {**ENTRY, "reconstruction": 0.25, "sae": {**ENTRY["sae"], "aux_coefficient": 0.0}}
    changes = {"train": {"tokens": 1024, "batch_tokens": 512}, "eval": {"at_end": False, "every_tokens": None}}
    row = run(config(tmp_path, saes={"sae": entry}, **changes)).training.metrics
    assert row["losses/overall_loss"] == pytest.approx(0.25 * row["losses/mse_loss"], rel=1e-6)
