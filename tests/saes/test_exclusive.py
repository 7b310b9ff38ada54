"""Latent scaling against per-latent least squares, and on a latent that one site truly lacks."""

import numpy as np
import pytest
import torch
from sae_makers import made

from veridical.errors import DataError, InputError
from veridical.saes import latent_scaling


@torch.no_grad()
def test_scales_equal_least_squares_for_each_latent(vectors):
    sae, (x, _) = made("crosscoder"), vectors
    sae.loss(x)
    found = latent_scaling(sae, x.split(20), home=1)
    latents, y = sae.encode(x), (x * sae.scale).view(64, 3, 4)
    rows, bias = sae.decoders, sae.b_dec.view(3, 4)
    for latent in range(40):
        f = latents[:, latent]
        if not (f > 0).any():
            assert np.isnan(found.error[:, latent]).all()
            continue
        direction = rows[1, latent]
        for site in range(3):
            others = latents @ rows[site] - f[:, None] * rows[site, latent]
            design = (f[:, None] * direction).reshape(-1, 1)
            for name, target in (("error", y[:, site] - others - bias[site]), ("reconstruction", others)):
                beta = torch.linalg.lstsq(design, target.reshape(-1, 1)).solution
                assert getattr(found, name)[site, latent] == pytest.approx(float(beta), rel=1e-8, abs=1e-10)


@torch.no_grad()
def test_a_direction_that_one_site_lacks_has_ratio_zero_and_a_shrunken_one_does_not():
    """Two features live at both sites, one at the first alone; the decoder says that all do."""
    from veridical.saes import SAEConfig
    from veridical.saes.crosscoder import Crosscoder

    random = torch.Generator().manual_seed(0)
    strength = torch.rand(4000, 3, generator=random) * (torch.rand(4000, 3, generator=random) < 0.2)
    basis = torch.eye(6)
    here = strength @ basis[:3]
    there = strength[:, :2] @ basis[3:5]
    there[:, 0] += strength[:, 0]  # feature 0 points along the same direction at both sites
    sae = Crosscoder(SAEConfig(architecture="crosscoder", width=3, k=1, sites=("a", "b")), 12)
    sae.W_enc.copy_(torch.cat([basis[:3], torch.zeros(3, 6)], 1))
    sae.W_dec.copy_(sae.W_enc)  # says that all three live at the first site alone
    found = latent_scaling(sae, [torch.stack([here, there], 1)], home=0)
    ratio, _ = found.ratios(1)
    assert ratio[0] == pytest.approx(1.0, abs=1e-5)
    assert ratio[2] == pytest.approx(0.0, abs=1e-5)


def test_stacks_missing_sites_and_no_vectors_are_refused(vectors):
    sae = made("crosscoder")
    with pytest.raises(InputError, match="a site from 0 to 2"):
        latent_scaling(sae, [vectors[0]], home=3)
    with pytest.raises(DataError, match="no vectors"):
        latent_scaling(sae, [], home=0)
