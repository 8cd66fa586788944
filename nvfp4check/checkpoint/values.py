"""The bytes of a stored tensor as numbers.

Contract:
    scalar_of   the stored value, exactly: float32, bfloat16 and float16 widen to a double
                without rounding; NaN and infinities are themselves
    torch_of    the same bits under the torch dtype of the entry
"""

import struct
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nvfp4check.checkpoint.header import TensorEntry

if TYPE_CHECKING:
    import torch

#: safetensors dtype -> torch dtype name. Formats below a byte stay packed in uint8.
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}


def scalar_of(data: npt.NDArray[np.uint8], entry: TensorEntry) -> float:
    """Read the one value of a floating-point tensor of one element.

    Raises:
        ValueError: the tensor has another number of elements, or another dtype.
    """
    if entry.numel != 1:
        raise ValueError(f"{entry.name}: shape {list(entry.shape)}, expected one element")
    raw = data.tobytes()
    if entry.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    code = {"F32": "<f", "F64": "<d", "F16": "<e"}.get(entry.dtype)
    if code is None:
        raise ValueError(f"{entry.name}: dtype {entry.dtype}, expected F32, BF16, F16 or F64")
    return float(struct.unpack(code, raw)[0])


def torch_of(data: npt.NDArray[np.uint8], entry: TensorEntry) -> "torch.Tensor":
    """Copy the bytes of a tensor into a torch tensor of its dtype and shape."""
    import torch

    owned = torch.from_numpy(data.copy())
    name = _TORCH_NAMES.get(entry.dtype)
    if name is None:  # below a byte: the last dimension counts bytes
        leading = entry.shape[:-1]
        return owned.reshape(*leading, -1) if entry.numel else owned.reshape(*leading, 0)
    dtype: torch.dtype = getattr(torch, name)
    return owned.view(dtype).reshape(entry.shape)
