"""Architectures of others, in each way that CONTRIBUTING.md describes; the code that is tested is printed there."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import ROOT, python_blocks

import sae_kit
from sae_kit.cli import main

NAME = "log_penalty"
PAGE = ROOT / "CONTRIBUTING.md"
LISTED = "from sae_kit import list_architectures; print(*list_architectures())"


def code() -> str:
    """The file that the page prints."""
    return python_blocks(PAGE)[0].lstrip("\n")


def command(start: str) -> list[str]:
    """Arguments of the one command line of the page that begins so."""
    (line,) = [line.strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.strip().startswith(start)]
    return shlex.split(line.removeprefix(start))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"{NAME}.py"
    path.write_text(code(), encoding="utf-8")
    return path


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with this checkout's package; `path` comes before it, and `cwd` before both."""
    checkout = Path(sae_kit.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (path or checkout, checkout)))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False
    )


# ---- a file ----------------------------------------------------------------------------------------------------------


def test_a_file_trains_and_is_needed_to_load(file: Path) -> None:
    small = shlex.split("--data.context_size 64 --eval.tokens 2048 --eval.fidelity_tokens 1024 --buffer.tokens 8192")
    home = file.parent
    done = python("-m", "sae_kit.cli", "train", *command("sae-kit train"), *small, "--name", "run", cwd=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "runs/run/saes/sae"
    load = f"from sae_kit import SAE; print(type(SAE.load_from_disk({str(home / 'runs/run/saes/sae')!r})).__name__)"
    known = python("-c", f"import {NAME}; {load}", cwd=home)
    assert known.stdout.strip() == "LogPenaltySAE", known.stderr
    unknown = python("-c", load, cwd=home)
    assert unknown.returncode == 1
    assert f"UnknownArchitectureError: unknown architecture '{NAME}'" in unknown.stderr
    assert "Known: abstopk, batchtopk" in unknown.stderr


def test_a_file_has_its_flags_in_the_help(file: Path) -> None:
    done = python("-m", "sae_kit.cli", "train", "--import", str(file), "--arch", NAME, "--help", cwd=file.parent)
    assert done.returncode == 0, done.stderr
    assert "weight of the sparsity penalty (default: 1.0)" in done.stdout.replace("\n" + " " * 36, " ")
    assert "--sae.log_scale" in done.stdout


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.py", "error: --import: there is no file nowhere.py"),
        ("no_such_module", "error: --import: there is no module 'no_such_module'; a file needs its ending .py"),
        ("no_such_package.part", "error: --import: there is no module 'no_such_package.part'; a file needs"),
        ("sae_kit.no_such_part", "error: --import: there is no module 'sae_kit.no_such_part'; a file needs"),
        ("./folder/name", "error: --import: there is no module './folder/name'; a file needs"),
    ],
)
def test_a_missing_file_or_module_is_a_clear_error(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--import", source, "--arch", NAME]) == 2
    assert message in capsys.readouterr().err


def test_a_file_named_like_a_module_that_is_loaded_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "json.py"
    path.write_text("raise AssertionError('imported')")
    assert main(["train", "--import", str(path)]) == 2
    assert "a module is called 'json' already: give json.py another name" in capsys.readouterr().err


# ---- the contract tests ----------------------------------------------------------------------------------------------

BROKEN = {
    "neighbours": (  # a row sees the others
        "pre = self.preactivations(x)\n",
        "pre = self.preactivations(x)\n        pre = pre - pre.mean(dim=0, keepdim=True) if pre.ndim > 1 else pre\n",
        "test_rows_are_independent_and_mode_does_not_matter",
    ),
    "fold": (  # of decoder norms, without b_enc
        "    def encoding(",
        "    def scale_biases(self, factor: Tensor) -> None:\n        pass\n\n    def encoding(",
        "test_decoder_norms_fold_exactly_or_are_refused",
    ),
    "hook": (  # is not asked
        "pre = on_pre(pre) if on_pre else pre",
        "pre = pre",
        "test_hooks_fire_in_order_with_the_right_tensors",
    ),
}
"""Name -> the right line, a wrong one, and the test that finds it."""


def contract_tests(*options: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "pytest", *options, "-q", "--no-header", "-rA", "-p", "no:cacheprovider", cwd=ROOT)


def test_the_contract_tests_run_on_files_and_find_what_is_wrong(file: Path) -> None:
    """One process for a right architecture and three wrong ones, with the command of the page."""
    tests, option, *_ = command(".venv/bin/python -m pytest")
    assert option == f"--import-architecture={file.name}"
    options = [f"--import-architecture={file}"]
    for name, (right, wrong, _) in BROKEN.items():
        assert code().count(right) == 1
        assert code().count(f'"{NAME}"') == 1
        broken = file.with_name(f"{NAME}_{name}.py")
        text = code().replace(right, wrong).replace(f'"{NAME}"', f'"{NAME}_{name}"')
        broken.write_text(text, encoding="utf-8")
        options.append(f"--import-architecture={broken}")
    done = contract_tests(tests, *options, "-k", f"{NAME} and ({' or '.join(test for *_, test in BROKEN.values())})")
    summary = done.stdout.partition("short test summary")[2]
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr
    for name, (*_, test) in BROKEN.items():
        assert summary.count(f"::{test}[{NAME}-") == summary.count(f"::{test}[{NAME}_{name}-") >= 6, "each geometry"
        failed = [line for line in summary.splitlines() if line.startswith("FAILED") and f"[{NAME}_{name}-" in line]
        assert any(f"::{test}[" in line for line in failed)
        others = [other for *_, other in BROKEN.values() if other != test]
        assert not any(f"::{other}[" in line for line in failed for other in others), "one mistake, one contract"
    assert (
        f"FAILED tests/contracts/test_shapes.py::test_rows_are_independent_and_mode_does_not_matter[{NAME}-"
        not in summary
    )
    assert not any(line.startswith("FAILED") and f"[{NAME}-" in line for line in summary.splitlines())


def test_a_missing_file_stops_the_tests(tmp_path: Path) -> None:
    done = contract_tests("tests/contracts", f"--import-architecture={tmp_path / 'nowhere.py'}")
    assert done.returncode == 4
    assert "there is no file" in done.stderr


# ---- this package and others -----------------------------------------------------------------------------------------


def test_a_file_in_the_folder_is_found(file: Path, tmp_path: Path) -> None:
    """In a copy of the package."""
    package = tmp_path / "copy" / "sae_kit"
    shutil.copytree(Path(sae_kit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "model"))
    shutil.copy(file, package / "architectures")
    after = python("-c", f"{LISTED}; import sae_kit; print(sae_kit.__file__)", cwd=package.parent)
    *listed, home = after.stdout.split()
    assert Path(home).parent == package
    assert {NAME, "topk"} < set(listed)
    done = python("-m", "sae_kit.cli", "train", "--help", cwd=package.parent)
    assert done.returncode == 0, done.stderr
    assert f"jumprelu, {NAME}, matching_pursuit" in " ".join(done.stdout.split())


def installed(folder: Path, module: str) -> None:
    """What pip leaves of a package with an entry point that names `module`."""
    info = folder / "my_package-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sae_kit.architectures]\n{NAME} = {module}\n")


def test_an_installed_package_is_found(tmp_path: Path) -> None:
    site, text = tmp_path / "site", PAGE.read_text(encoding="utf-8")
    assert '[project.entry-points."sae_kit.architectures"]\n  log_penalty = "my_package.log_penalty"\n' in text
    installed(site, "my_package.log_penalty")
    (site / "my_package").mkdir()
    (site / "my_package" / "__init__.py").touch()
    (site / "my_package" / f"{NAME}.py").write_text(code(), encoding="utf-8")
    done = python("-W", "error", "-c", LISTED, path=site, cwd=tmp_path)
    assert {NAME, "topk"} < set(done.stdout.split()), done.stderr


def test_a_broken_package_takes_no_other_down(tmp_path: Path) -> None:
    installed(tmp_path, "my_package.gone")
    done = python("-c", LISTED, cwd=tmp_path)
    assert "topk" in done.stdout.split()
    assert NAME not in done.stdout.split()
    assert "my_package.gone, which should add an architecture, cannot be imported" in done.stderr
