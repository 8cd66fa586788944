"""Noise of a known size on the residual stream, to find the floor under any difference.

Contract:
    each element after each layer is multiplied by 1 + u * epsilon / 2, u uniform in [-1, 1): as far
    as rounding to that dtype could move it, computed in the dtype of the run
    the numbers follow from the seed, the layer and the prompt's id alone
"""

import hashlib

import torch

from nvfp4check.forward.options import Perturbation


def perturbed(
    hidden: torch.Tensor, perturbation: Perturbation, seed: int, layer: int, prompt: str
) -> torch.Tensor:
    """Return the hidden state [T, D] of a prompt after a layer with noise on it."""
    name = f"{seed}/{layer}/{prompt}".encode()
    digest = hashlib.sha256(name).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    uniform = torch.rand(hidden.shape, generator=generator, dtype=wide) * 2 - 1
    factor = 1 + uniform * (perturbation.epsilon / 2)
    return (hidden.to(wide) * factor.to(hidden.device)).to(hidden.dtype)
