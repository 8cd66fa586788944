"""F9 and F10: the 128x4 layout of block scales, and what its padding holds.

Contract:
    layout    offsets worked out here with one mistake each; readers of row-major scales take them
              through the right layout and a wrong one
    padding   what lies in memory behind the last row of a tensor is read for that row; where the
              storage ends there, nothing is read and the result is right
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nvfp4check.faults.base import Form, KernelFault
from nvfp4check.faults.lifting import Pair, Tensor, in_operands
from nvfp4check.ops import Kernel
from nvfp4ref import layout, nvfp4, packing
from nvfp4ref import matmul as reference
from nvfp4ref.conventions import Convention
from nvfp4ref.rounding import round_to

#: (rows, columns) to the place of each scale in the flat layout.
Offsets = Callable[[int, int], Tensor]

_E4M3 = torch.float8_e4m3fn


def _linear(rows: int, columns: int) -> Tensor:
    """Row-major, over padded rows."""
    across = layout.padded(columns, 4)
    return torch.arange(rows).unsqueeze(1) * across + torch.arange(columns)


def _rows_only(rows: int, columns: int) -> Tensor:
    """Rows of a tile permuted, its four columns not interleaved."""
    r = torch.arange(rows).unsqueeze(1)
    place = r // 128 * 128 + r % 32 * 4 + r % 128 // 32
    return place * layout.padded(columns, 4) + torch.arange(columns)


def _unpadded_columns(rows: int, columns: int) -> Tensor:
    """Tiles across counted by C / 4 rounded down."""
    r, c = torch.arange(rows).unsqueeze(1), torch.arange(columns)
    tile = (r // 128) * max(columns // 4, 1) + c // 4
    return tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4


def _placed(offsets: Offsets, block_scales: Tensor) -> Tensor:
    rows, columns = block_scales.shape
    flat = torch.zeros(layout.swizzled_size(rows, columns), dtype=torch.uint8)
    raw = block_scales.contiguous().view(torch.uint8).flatten()
    for place, byte in zip(offsets(rows, columns).flatten().tolist(), raw.tolist(), strict=True):
        flat[place] = byte  # in order: where two meet, the later stays
    return flat.view(block_scales.dtype)


def _gathered(offsets: Offsets, flat: Tensor, rows: int, columns: int) -> Tensor:
    raw = flat.contiguous().view(torch.uint8).flatten()
    places = offsets(rows, columns).flatten()
    return raw[places].view(rows, columns).view(flat.dtype)


def _read_as(offsets: Offsets, block_scales: Tensor) -> Tensor:
    """Return scales that were stored in the right layout and read by wrong offsets."""
    if block_scales.ndim == 3:
        planes = [_read_as(offsets, one).view(torch.uint8) for one in block_scales.unbind()]
        whole = torch.stack(planes) if planes else block_scales.view(torch.uint8)
        return whole.view(_E4M3)
    return _gathered(offsets, layout.swizzle(block_scales), *block_scales.shape)


def _layout_forms(offsets: Offsets) -> tuple[Form, ...]:
    return (
        Form(operation="swizzle", wrong=partial(_placed, offsets)),
        Form(operation="unswizzle", wrong=partial(_gathered, offsets)),
        *in_operands(lambda codes, scales: (codes, _read_as(offsets, scales))),
    )


def _twice(block_scales: Tensor) -> Tensor:
    rows, columns = block_scales.shape
    once = layout.swizzle(block_scales)
    return layout.swizzle(once.view(layout.padded(rows, 128), layout.padded(columns, 4)))


def _back_twice(flat: Tensor, rows: int, columns: int) -> Tensor:
    padded = layout.padded(rows, 128), layout.padded(columns, 4)
    return layout.unswizzle(layout.unswizzle(flat, *padded).flatten(), rows, columns)


def _unpadded_buffer(block_scales: Tensor) -> Tensor:
    return layout.swizzle(block_scales)[: block_scales.numel()]


def _row_behind(tensor: Tensor) -> Tensor | None:
    """Return the row behind the last in memory; None where the storage ends."""
    if not tensor.numel():
        return None
    width, step = tensor.shape[-1], tensor.stride(-2)
    last = sum((n - 1) * s for n, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True))
    start = tensor.storage_offset() + last + step
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if start + (width - 1) * tensor.stride(-1) >= held:
        return None
    return tensor.as_strided((width,), (tensor.stride(-1),), start)


def _last_row_from_padding(codes: Tensor, scales: Tensor) -> Pair:
    behind = _row_behind(scales)
    if behind is None:
        return codes, scales
    raw = scales.contiguous().view(torch.uint8).clone()
    raw.view(-1, raw.shape[-1])[-1] = behind.view(torch.uint8)
    return codes, raw.view(_E4M3)


def _amax_with_padding(x: Tensor, decode: Tensor, *, convention: str) -> Pair:
    behind = _row_behind(x)
    named = Convention(convention)
    if behind is None:
        return nvfp4.quantize(x, decode, named)
    seen = x.contiguous().clone()
    seen[-1] = torch.maximum(seen[-1].abs(), behind.abs())
    scales = nvfp4.quantize_block_scales(seen, decode, named)
    return packing.pack(nvfp4.quantize_elements(x, scales, decode, named)), scales


def _small_batches_otherwise(*arguments: Any) -> Tensor:
    """Round the sums of up to 8 rows to bfloat16 before alpha, as a path of its own might."""
    a_codes, a_scales, b_codes, b_scales, alpha, dtype = arguments
    product = reference.exact(a_codes, a_scales, b_codes, b_scales).value
    if len(a_codes) <= 8:
        product = round_to(product, torch.bfloat16).double()
    return round_to(product * alpha.double(), dtype)


def _few_rows_share_scales(kernel: Kernel, x: Tensor, decode: Tensor) -> Any:
    """Give each row of a batch the scales of its own block, and of a lone row's first block."""
    if len(x) != 1 or x.shape[1] < 32:
        return kernel(x, decode)
    codes, scales = kernel(x, decode)
    raw = scales.view(torch.uint8).clone()
    raw[:, -1] = raw[:, 0]
    return codes, raw.view(scales.dtype)


FAULTS = (
    KernelFault(
        id="F9a",
        name="linear for swizzled scales",
        does="row-major scale bytes used as the 128x4 layout, or the reverse",
        needs="scales of a tile that differ",
        threads=(
            "flashinfer-ai/flashinfer/issues/4087",
            "modular/modular/issues/6600",
            "sgl-project/sglang/pull/23625",
        ),
        forms=_layout_forms(_linear),
    ),
    KernelFault(
        id="F9b",
        name="scales swizzled twice",
        does="the 128x4 layout applied to bytes that are in it",
        needs="scales of a tile that differ",
        threads=("modular/modular/issues/6600",),
        forms=(
            Form(operation="swizzle", wrong=_twice),
            Form(operation="unswizzle", wrong=_back_twice),
        ),
    ),
    KernelFault(
        id="F9c",
        name="8x4 for 128x4 tiles",
        does="the layout for few rows in place of that for many",
        needs="scales of a tile that differ",
        threads=("vllm-project/vllm/pull/47587", "vllm-project/vllm/pull/30260"),
        forms=_layout_forms(layout.offsets_8x4),
    ),
    KernelFault(
        id="F9d",
        name="rows permuted, columns not interleaved",
        does="only half of the 128x4 permutation",
        needs="scales of a tile that differ",
        threads=("flashinfer-ai/flashinfer/issues/4087",),
        forms=_layout_forms(_rows_only),
    ),
    KernelFault(
        id="F9e",
        name="offsets by unpadded sizes",
        does="tiles across counted by C in place of C rounded up to 4",
        needs="more than 128 rows, and C no multiple of 4",
        threads=(
            "vllm-project/vllm/pull/23140",
            "triton-lang/triton/issues/10772",
            "vllm-project/vllm/pull/47323",
        ),
        forms=_layout_forms(_unpadded_columns),
    ),
    KernelFault(
        id="F10a",
        name="padding scales read for a real row",
        does="the last row takes the scales behind it in memory",
        needs="memory behind the scales that is not theirs",
        threads=(
            "flashinfer-ai/flashinfer/issues/2861",
            "vllm-project/vllm/pull/38148",
            "vllm-project/vllm/pull/37564",
            "vllm-project/vllm/issues/45741",
            "vllm-project/vllm/pull/45739",
        ),
        forms=in_operands(_last_row_from_padding),
    ),
    KernelFault(
        id="F10b",
        name="padding enters an amax",
        does="the largest magnitude of a block counts the row behind the last",
        needs="memory behind the input that is not its own",
        threads=(
            "sgl-project/sglang/pull/26133",
            "flashinfer-ai/flashinfer/issues/3057",
            "vllm-project/vllm/pull/39743",
        ),
        forms=(Form(operation="quantize", wrong=_amax_with_padding),),
    ),
    KernelFault(
        id="F10c",
        name="scale buffer without its padding",
        does="M C bytes allocated for the 128x4 layout",
        needs="M no multiple of 128, or C none of 4",
        threads=("vllm-project/vllm/pull/55643", "vllm-project/vllm/pull/23140"),
        forms=(Form(operation="swizzle", wrong=_unpadded_buffer),),
    ),
    KernelFault(
        id="F10d",
        name="a row depends on the size of the batch",
        does="batches of few rows take another path, which loses bits or a scale",
        needs="the same row in batches of several sizes",
        threads=("Pushkinist/rMLX/issues/449",),
        forms=(
            Form(operation="matmul", wrong=_small_batches_otherwise, label="sums in bfloat16"),
            Form(
                operation="quantize",
                wrong=_few_rows_share_scales,
                label="the last scale of a lone row",
                around=True,
            ),
        ),
    ),
)
