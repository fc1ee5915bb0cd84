"""Folders that SAELens wrote give here what SAELens computed from them (made by originals/make_saelens_golden.py)."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_kit import SAE
from sae_kit.registry import list_architectures

GOLDEN = sorted((Path(__file__).parent / "golden" / "saelens").iterdir())
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def test_golden_folders_cover_what_both_libraries_save_under_one_name() -> None:
    found = {SAE.load_from_disk(folder).cfg.architecture for folder in GOLDEN}
    assert {"standard", "gated", "jumprelu", "topk"} <= found <= set(list_architectures())


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_saelens_folder_gives_saelens_outputs(folder: Path) -> None:
    sae = SAE.load_from_disk(folder)
    recorded = load_file(folder / "recorded.safetensors")
    acts = recorded["acts"]
    with torch.no_grad():
        assert_close(sae.encode(recorded["inputs"]), acts)
        assert_close(sae.encode_sparse(recorded["inputs"]).to_dense(), acts)
        assert_close(sae.decode(acts), recorded["decoded"].reshape(*acts.shape[:-1], sae.d_in))
        assert_close(sae(recorded["inputs"]), recorded["output"])


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_saelens_metadata_survives(folder: Path, tmp_path: Path) -> None:
    SAE.load_from_disk(folder).save_model(tmp_path / "again")
    for path in (folder, tmp_path / "again"):
        metadata = SAE.load_from_disk(path).cfg.metadata
        assert metadata.model_name == "a-model"
        assert metadata.hook_name in ("blocks.1.attn.hook_z", "blocks.1.hook_resid_post")
        assert metadata.context_size == 128
        assert metadata.prepend_bos is True
        if folder.name.endswith("_training"):
            assert metadata.training_architecture == folder.name.removesuffix("_training")
            assert metadata.training_architecture_details is not None
            assert metadata.training_architecture_details["decoder_init_norm"] == 0.1
