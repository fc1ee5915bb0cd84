"""The command line, in processes of its own where exit codes and streams matter."""

import dataclasses
import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sae_kit import RunConfig, __version__, list_architectures
from sae_kit.cli import main, parse_train
from sae_kit.errors import ConfigError, UnknownArchitectureError, UnknownConfigKeyError
from sae_kit.training.init import InitConfig
from sae_kit.training.resampling import ResampleConfig

TRAIN = ["--model", "demo", "--dataset", "demo", "--hook", "blocks.2.hook_resid_pre", "--tokens", "8192"]


def sae_kit(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sae_kit.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def parse(*arguments: str) -> RunConfig:
    return RunConfig.from_dict(parse_train(arguments))


def test_a_full_disk_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/demo")

    monkeypatch.setattr("sae_kit.demo.run.demo", full)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'runs/demo'\n"


def test_version_and_environment() -> None:
    done = sae_kit("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"sae-kit {__version__}")
    done = sae_kit("env")
    assert done.returncode == 0
    for word in ("python 3.", "torch 2", "transformer-lens", "threads"):
        assert word in done.stdout


def test_flags_and_file_make_the_same_tree(tmp_path: Path) -> None:
    flags = parse(*TRAIN, "--arch", "topk", "--sae.d_sae", "512", "--sae.k", "16", "--optim.lr", "1e-3", "--out", "x")
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: demo\ndataset: demo\nhook: blocks.2.hook_resid_pre\ntokens: 8192\nout: x\n"
        "sae: {architecture: topk, d_sae: 512, k: 16}\noptim: {lr: 1e-3}\n"
    )
    assert parse(str(path)) == flags
    assert flags.optim.lr == 1e-3
    assert flags.saes["sae"].sae.to_dict()["k"] == 16
    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps(parse_train([str(path)])))
    assert parse(str(as_json)) == flags


def test_flags_beat_overrides_and_overrides_beat_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: demo\ndataset: demo\nhook: a\ntokens: 8192\nsae: {architecture: topk, d_sae: 512, k: 16}\n")
    cfg = parse(
        str(path), "optim.lr=2e-4", "sae.k=8", "tokens=9000", "--hook", "b", "optim.lr=3e-4", "--sae.aux_k=null"
    )
    assert cfg.optim.lr == 3e-4
    assert cfg.saes["sae"].hook == "b"
    assert cfg.train.tokens == 9000
    assert cfg.saes["sae"].sae.to_dict()["k"] == 8


def test_a_dataset_may_be_a_json_file() -> None:
    """The value of a flag is never taken for the config file."""
    cfg = parse(*TRAIN[:2], "--dataset", "corpus.json", *TRAIN[4:], "--sae.d_sae", "64", "optim.lr=0.5")
    assert cfg.data.sources[0].path == "corpus.json"
    assert cfg.optim.lr == 0.5


@pytest.mark.parametrize("text", ["saes: 3", "saes: {sae: [1]}", "saes: null", "saes: {sae: {sae: topk, hook: h}}"])
def test_a_malformed_file_is_a_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"tokens: 9000\n{text}\n")
    with pytest.raises(ConfigError, match="saes"):
        parse(str(path))


def test_values_are_written_as_in_yaml() -> None:
    cfg = parse(
        *TRAIN[:2], *TRAIN[4:], "--sae.d_sae", "512", "--sae.normalize_activations", "none", "--buffer.mix", "none",
        "--log.console", "false", "--optim.clip_grad_norm", "null", "--optim.betas", "[0.8, 0.9]",
        "--schedule.warm_up_tokens", "5%", "--log.wandb.project", "p", "--data.sources", "[demo, {path: x, weight: 2}]",
    )  # fmt: skip
    assert cfg.saes["sae"].sae.normalize_activations == "none", "text, unlike null"
    assert cfg.buffer.mix == "none"
    assert cfg.log.console is False
    assert cfg.optim.clip_grad_norm is None
    assert cfg.optim.betas == (0.8, 0.9)
    assert cfg.schedule.warm_up_tokens == "5%"
    assert cfg.log.wandb is not None
    assert [source.weight for source in cfg.data.sources] == [1.0, 2.0]


def test_start_and_resampling_of_an_sae_are_set_by_their_paths() -> None:
    arguments = [*TRAIN, "--arch", "standard", "--sae.d_sae", "512"]
    entry = parse(*arguments, "saes.sae.init.b_dec=geometric_median", "saes.sae.resample.interval_tokens=20%").saes[
        "sae"
    ]
    assert entry.init == InitConfig(b_dec="geometric_median")
    assert entry.resample == ResampleConfig(interval_tokens="20%")
    assert parse(*arguments).saes["sae"].init is parse(*arguments).saes["sae"].resample is None
    with pytest.raises(UnknownConfigKeyError, match=r"'saes.sae.init.b_dce' in InitConfig. Did you mean 'b_dec'\?"):
        parse(*arguments, "saes.sae.init.b_dce=mean")
    with pytest.raises(ConfigError, match=r"saes.sae.init: firing_rate is for b_enc='quantile'"):
        parse(*arguments, "saes.sae.init.firing_rate=0.1")


def test_flags_of_one_sae_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TRAIN, "--arch", "standard", "--sae.d_sae", "512"]
    entry = parse(
        *arguments, "--saes.sae.lr", "1e-3", "--saes.sae.seed", "7", "--saes.sae.init.b_dec", "mean",
        "--saes.sae.resample.interval_tokens=20%", "--saes.sae.resample.times", "2",
    ).saes["sae"]  # fmt: skip
    assert (entry.lr, entry.seed, entry.hook) == (1e-3, 7, "blocks.2.hook_resid_pre")
    assert entry.init == InitConfig(b_dec="mean")
    assert entry.resample == ResampleConfig(interval_tokens="20%", times=2)
    with pytest.raises(UnknownConfigKeyError, match=r"--saes.sae.init.b_dce. Did you mean 'saes.sae.init.b_dec'\?"):
        parse(*arguments, "--saes.sae.init.b_dce", "mean")
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for section, cls in (("init", InitConfig), ("resample", ResampleConfig)):
        title, _, rest = text.partition(f"saes.sae.{section}: ")[2].partition("\n")
        assert "None = " in title, "what there is without a flag of the section"
        flags = re.findall(r"--(\S+) VALUE", rest.split("\n\n")[0])
        assert flags == [f"saes.sae.{section}.{field.name}" for field in dataclasses.fields(cls)]
    for flag in ("saes.sae.lr", "saes.sae.seed"):
        assert f"--{flag} VALUE" in text
    assert "--saes.sae.hook" not in text, "which has a short name, and one name is enough"
    assert "--saes.sae.sae." not in text


@pytest.mark.parametrize("name", list_architectures())
def test_every_architecture_has_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(*TRAIN, "--arch", name, "--sae.d_sae", "512").saes["sae"].sae.architecture == name
    with pytest.raises(SystemExit) as stop:
        parse("--arch", name, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    fields = {f.name for f in dataclasses.fields(list_architectures()[name].config)} - {"metadata"}
    missing = [field for field in fields if f"--sae.{field} " not in text and f"--sae.{field}." not in text]
    assert missing == [], "a field without a flag, of its own or for each field of its section"
    assert "--optim.lr VALUE" in text
    assert "--sae.metadata" not in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--optim.lrr", "1"], UnknownConfigKeyError, "unknown flag --optim.lrr. Did you mean 'optim.lr'?"),
        (["--optim.lrr=1"], UnknownConfigKeyError, "unknown flag --optim.lrr. Did you mean 'optim.lr'?"),
        (["optim.lrr=1"], UnknownConfigKeyError, "unknown key 'optim.lrr' in OptimConfig. Did you mean 'lr'?"),
        (
            ["--sae.k", "1000", "--sae.d_sae", "64"],
            ConfigError,
            "saes.sae.sae: k must lie between 1 and d_sae = 64, found 1000",
        ),
        (["--sae.d_sae", "many"], ConfigError, "saes.sae.sae.d_sae: expected int, found 'many'"),
        (["--train.tokens", "9000"], ConfigError, "tokens and train.tokens are the same field: give one of them"),
        (["saes.sae.hook=b"], ConfigError, "saes.sae.hook and hook are the same field"),
        (["--out", "[1"], ConfigError, "'[1' is not a value that YAML can read"),
        (["--arch", "topc"], UnknownArchitectureError, "unknown architecture 'topc'. Did you mean 'topk'?"),
        (["--arch", "gated", "--sae.k", "3"], UnknownConfigKeyError, "unknown flag --sae.k"),
        (["a.yaml", "b.yaml"], ConfigError, "expected one config file, found a.yaml, b.yaml"),
        (["out.x=3", "--sae.d_sae", "64"], ConfigError, "out: expected str, found {'x': 3}"),
    ],
)
def test_bad_arguments(arguments: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as found:
        parse(*TRAIN, *arguments)
    assert message in str(found.value)


def test_training_from_the_command_line(tmp_path: Path) -> None:
    done = sae_kit(
        "train", *TRAIN, "--sae.d_sae", "256", "--train.batch_tokens", "1024", "--eval.tokens", "2048",
        "--eval.fidelity_tokens", "1024", "--name", "mine", "--data.context_size", "64", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "runs/mine/saes/sae"
    assert (tmp_path / "runs/mine/saes/sae/cfg.json").exists()
    assert "8,192 / 8,192 tokens" in done.stderr, "without a terminal there is a line per row of metrics"
    assert "Traceback" not in done.stderr


def test_errors_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *TRAIN[:4], "--hook", "blocks.2.hook_resid_prey", "--tokens", "8192", "--sae.d_sae", "256"]
    message = "error: hook 'blocks.2.hook_resid_prey' is not in this model. Did you mean 'blocks.2.hook_resid_pre'?"
    done = sae_kit(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == message
    assert "Traceback" not in done.stderr
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == message, "a refused run leaves nothing in its own way"
    assert main(["train", "nowhere.yaml"]) == 2


def test_a_sweep_trains_and_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.context_size", "64", "--buffer.tokens", "4096", "--train.batch_tokens", "512", "--log.console"]
    small += ["false", "--eval.tokens", "1024", "--eval.fidelity_tokens", "256", "--checkpoint.every_tokens", "null"]
    run = [*TRAIN[:-1], "4096", "--sae.d_sae", "128", *small, "--out", str(tmp_path), "--name", "run"]
    assert main(["train", *run, "sweep.grid.sae.k=[4,8]"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("/saes/") == 2
    assert "CE score" in printed
    plot = tmp_path / "pareto.svg"
    assert main(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "table"), "--plot", str(plot)]) == 0
    assert "EV" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "table" / "comparison.json").read_text())) == 2
    assert plot.read_text().startswith("<?xml")
    assert main(["compare", str(tmp_path / "nothing")]) == 2
