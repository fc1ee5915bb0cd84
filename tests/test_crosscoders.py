"""Model diffing: latents that one site has to itself are told from shared ones."""

import pytest
import torch

from sae_kit import TopKSAEConfig
from sae_kit.crosscoders import decoder_statistics
from sae_kit.errors import ConfigError


def test_norms_and_cosines_of_a_decoder_that_is_known() -> None:
    sae = TopKSAEConfig(in_shape=(2, 3), d_sae=4, k=1).build()
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_dec[0, 0, 0] = 2.0  # of the first site alone
        sae.W_dec[1, :, 1] = torch.tensor([3.0, 1.0])  # shared, the same direction
        sae.W_dec[2, 0], sae.W_dec[2, 1] = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0])
    found = decoder_statistics(sae)
    expected = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.0, 0.0]])
    torch.testing.assert_close(found.relative_norms, expected)
    torch.testing.assert_close(found.norms[1], torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(found.cosines[:, 0, 1], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(found.cosines[2].diagonal(), torch.ones(2))


def test_only_a_crosscoder_has_sites_to_compare() -> None:
    with pytest.raises(ConfigError, match="expected a crosscoder, which writes several sites, found a transcoder"):
        decoder_statistics(TopKSAEConfig(d_in=3, out_shape=(3,), d_sae=4, k=1).build())
