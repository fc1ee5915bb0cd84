"""Write tests/golden/saelens_cache/: a cache of activations by SAELens' own runner, with what its store reads from it.

Run by an interpreter that has SAELens (README.md beside this file). The model is random and so small that its cache is
a few kilobytes; four record batches in as many files, contexts of five ids, some of which are above 256.
"""

import shutil
from pathlib import Path

import sae_lens.cache_activations_runner as runner
import torch
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

FOLDER = Path(__file__).parent.parent / "golden" / "saelens_cache"
HOOK = "blocks.0.hook_mlp_out"
CONTEXT, D_IN, ROWS_PER_FORWARD, IDS = 5, 6, 2, 400


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=D_IN, n_ctx=CONTEXT, d_head=3, n_heads=2, d_vocab=IDS, act_fn="relu", d_mlp=8, seed=0
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    ids = torch.randint(IDS, (40, CONTEXT), generator=torch.Generator().manual_seed(0))
    text = Dataset.from_dict({"tokens": ids.tolist()})
    cfg = CacheActivationsRunnerConfig(
        dataset_path="random",
        model_name="random",
        model_batch_size=ROWS_PER_FORWARD,
        hook_name=HOOK,
        d_in=D_IN,
        training_tokens=20 * CONTEXT,
        context_size=CONTEXT,
        new_cached_activations_path=str(FOLDER / "cache"),
        buffer_size_gb=30 * D_IN * 4 / 1e9,  # six contexts
        prepend_bos=False,
        shuffle=False,
        streaming=False,
        device="cpu",
    )
    runner.load_model = lambda **arguments: model  # there is no network, and no such model
    CacheActivationsRunner(cfg, override_dataset=text).run()
    store = ActivationsStore(
        model=model,
        dataset=text,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=D_IN,
        n_batches_in_buffer=2,
        total_training_tokens=20 * CONTEXT,
        store_batch_size_prompts=ROWS_PER_FORWARD,
        train_batch_size_tokens=-1,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(FOLDER / "cache"),
    )
    read = []
    while True:
        try:
            read.append(store.get_raw_llm_batch(raise_on_epoch_end=True))
        except StopIteration:
            break
    expected = {"acts": torch.cat([acts for acts, _ in read]), "token_ids": torch.cat([ids for _, ids in read])}
    save_file(expected, FOLDER / "expected.safetensors")
    print(f"{len(expected['acts'])} activations of {HOOK} in {FOLDER}")


if __name__ == "__main__":
    main()
