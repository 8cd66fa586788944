"""Two codes to a byte.

Contract:
    byte i of a row holds element 2i in its low nibble and element 2i + 1 in its high nibble

So do ModelOpt, compressed-tensors, torchao since 0.18, cuBLAS and CUTLASS. torchao 0.14 put the
first element in the high nibble.
"""

import torch


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Return packed codes [..., K/2] of codes [..., K], both uint8.

    Raises:
        ValueError: K is odd, or a code is above 15.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"K must be even to pack two codes in a byte, found {codes.shape[-1]}")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"an E2M1 code lies in 0..15, found {int(codes.max())}")
    low, high = codes[..., 0::2], codes[..., 1::2]
    return low | (high << 4)


def unpack(packed_codes: torch.Tensor) -> torch.Tensor:
    """Return codes [..., K] of packed codes [..., K/2], both uint8."""
    pairs = torch.stack((packed_codes & 15, packed_codes >> 4), dim=-1)
    return pairs.flatten(-2)
