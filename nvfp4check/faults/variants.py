"""Correct kernels that differ from the reference: no suite may reject one.

Contract:
    products    every order in which float32 may add, truncation after each K = 64, float64, alpha
                multiplied into an operand's sums or after them
    quantisers  the engine's arithmetic with reciprocals up to 2 ulp off, either way, or truncated
    others      the same formulas in float32, products and experts in another order
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from nvfp4check.faults.lifting import Pair, Tensor, by_group
from nvfp4check.faults.scaling import blocks_of
from nvfp4check.ops import Kernel, operation
from nvfp4check.tolerance import Facts, Reciprocal
from nvfp4ref import e2m1, e4m3, nvfp4, packing
from nvfp4ref import matmul as reference
from nvfp4ref.conventions import Convention
from nvfp4ref.deepseek_v3 import rotary
from nvfp4ref.deepseek_v3.config import RotaryConfig
from nvfp4ref.formats import BLOCK_SIZE, E2M1
from nvfp4ref.fused import add_residual
from nvfp4ref.matmul import Accumulation, AccumulatorRounding
from nvfp4ref.rounding import round_to


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A correct kernel, and the facts and the convention under which it is one."""

    operation: str
    name: str
    kernel: Kernel
    convention: str | None = None
    facts: Facts = field(default_factory=Facts)


def _product(sums: Callable[[Tensor, Tensor], Tensor], *arguments: Any) -> Tensor:
    a_codes, a_scales, b_codes, b_scales, alpha, dtype = arguments
    a, b = reference.operand(a_codes, a_scales), reference.operand(b_codes, b_scales)
    total = sums(a, b).double()
    return round_to(round_to(total * alpha.double(), torch.float32).double(), dtype)


def _ordered(order: Accumulation, a: Tensor, b: Tensor) -> Tensor:
    return reference.accumulate(a, b, order)


def _reversed(a: Tensor, b: Tensor) -> Tensor:
    return reference.accumulate(a.flip(-1), b.flip(-1), Accumulation(chunk=16))


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    """Add neighbours, then their sums, and so on, in float32."""
    rows = []
    for row in a.unbind():
        terms = (row * b).float()
        while terms.shape[-1] > 1:
            terms = torch.nn.functional.pad(terms, (0, terms.shape[-1] % 2))
            terms = terms[..., 0::2] + terms[..., 1::2]
        rows.append(terms.sum(-1))
    return torch.stack(rows) if rows else a.new_zeros(0, len(b))


def _once(a: Tensor, b: Tensor) -> Tensor:
    return reference.exact_of_elements(a, b).value


def _blas(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float().T


_ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "chunks of 16, nearest": partial(_ordered, Accumulation(chunk=16)),
    "chunks of 64, toward zero": partial(
        _ordered, Accumulation(chunk=64, rounding=AccumulatorRounding.TOWARD_ZERO)
    ),
    "four splits of K": partial(_ordered, Accumulation(chunk=16, splits=4)),
    "K from its end": _reversed,
    "pairwise": _pairwise,
    "float64, then two roundings": _once,
    "the BLAS of torch, float32": _blas,
}

#: One addition after the other rounds K times: more than an undeclared chunk of 16 allows for.
_SEQUENTIAL = Facts(accumulation_chunk=1)


def _products() -> list[Variant]:
    every = [(name, sums, Facts()) for name, sums in _ORDERS.items()]
    every.append(("one after the other", partial(_ordered, Accumulation()), _SEQUENTIAL))
    found = []
    for name, sums, facts in every:
        one = partial(_product, sums)
        found.append(Variant(operation="matmul", name=name, kernel=one, facts=facts))
        found.append(
            Variant(
                operation="grouped_matmul", name=name, kernel=partial(by_group, one), facts=facts
            )
        )
    return found


def _off_by(ulps: int, values: Tensor) -> Tensor:
    """Return reciprocals so many units of the last place too large, zeros and infinities kept."""
    right = values.reciprocal()
    moved = (right.view(torch.int32) + ulps).view(torch.float32)
    usual = right.isfinite() & (right.abs() > 2 * torch.finfo(torch.float32).tiny)
    return torch.where(usual, moved, right)


def _truncated(values: Tensor) -> Tensor:
    right = values.reciprocal()
    too_large = right.double().abs() > values.double().reciprocal().abs()
    return torch.where(too_large & right.isfinite(), _off_by(-1, values), right)


def _engine(reciprocal: Callable[[Tensor], Tensor], x: Tensor, decode: Tensor) -> Pair:
    """Quantise as engines do, with a reciprocal that is given."""
    convention = Convention.ENGINE
    encode = reciprocal(decode.float())
    blocks = blocks_of(x)
    known = torch.where(blocks.isnan(), 0.0, blocks).abs().amax(-1)
    amax = torch.where(blocks.isnan().all(-1), torch.nan, known)
    sixth = torch.tensor(E2M1.max).reciprocal()
    ideal = encode * (amax * sixth)
    ideal = torch.where(ideal.isnan(), torch.nan, ideal)
    raw = e4m3.encode(ideal, e4m3.Overflow.SATURATE).view(torch.float8_e4m3fn)
    factor = reciprocal(e4m3.decode(raw) * reciprocal(encode)).unsqueeze(-1)
    scaled = (blocks * factor).reshape(x.shape)
    edge = nvfp4.quantize_elements(x, raw, decode, convention)
    finite = scaled.isfinite()
    codes = torch.where(finite, e2m1.encode(torch.where(finite, scaled, 0.0)), edge)
    return packing.pack(codes), raw


def _quantisers() -> list[Variant]:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "IEEE reciprocals": torch.reciprocal,
        "reciprocals 2 ulp too large": partial(_off_by, 2),
        "reciprocals 2 ulp too small": partial(_off_by, -2),
        "reciprocals truncated": _truncated,
    }
    found = [
        Variant(operation="quantize", name=name, kernel=partial(_engine, way), convention="engine")
        for name, way in ways.items()
    ]
    found += [
        Variant(
            operation="quantize",
            name=f"the reference under {convention}",
            kernel=operation("quantize").reference(convention),
            convention=str(convention),
            facts=Facts(reciprocal=Reciprocal.IEEE),
        )
        for convention in Convention
        if convention is not Convention.TORCHAO_0_14  # it packs the other nibble first
    ]
    found += [
        Variant(operation=op, name=name, kernel=kernel, convention="engine")
        for op, name, kernel in (
            ("silu_mul_quantize", "float32 throughout", _silu32),
            ("rms_norm_quantize", "float32 throughout", _rms32),
            ("rms_norm_quantize", "squares added by the batch", _norm_by_the_batch),
        )
    ]
    return found


def _silu32(gate: Tensor, up: Tensor, decode: Tensor) -> Pair:
    wide = gate.float()
    value = wide / (1 + torch.exp(-wide)) * up.float()
    return nvfp4.quantize(value, decode, Convention.ENGINE)


def _rms32(
    x: Tensor, weight: Tensor, eps: float, decode: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    pair = nvfp4.quantize(_normed32(x, weight, eps, residual), decode, Convention.ENGINE)
    return pair if residual is None else (*pair, add_residual(x, residual))


def _norm_by_the_batch(
    x: Tensor, weight: Tensor, eps: float, decode: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Norm in float32; the squares are added backwards in batches and in layouts of some kind."""
    if len(x) < 2 and x.is_contiguous():
        return _rms32(x, weight, eps, decode, residual)
    backwards = None if residual is None else residual.flip(-1)
    turned = _normed32(x.flip(-1), weight.flip(-1), eps, backwards).flip(-1)
    quantised = nvfp4.quantize(turned, decode, Convention.ENGINE)
    return quantised if residual is None else (*quantised, add_residual(x, residual))


def _normed32(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    wide = (x if residual is None else add_residual(x, residual)).float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


def _inner_first(codes: Tensor, scales: Tensor, decode: Tensor, dtype: torch.dtype) -> Tensor:
    """Form (code * scale) * global scale, where the reference forms code * (scale * global)."""
    elements = e2m1.decode(packing.unpack(codes.contiguous()))
    spread = e4m3.decode(scales.contiguous()).repeat_interleave(BLOCK_SIZE, -1)
    return (elements * spread * decode.float()).to(dtype)


def _scale_first(codes: Tensor, scales: Tensor, decode: Tensor, dtype: torch.dtype) -> Tensor:
    elements = e2m1.decode(packing.unpack(codes.contiguous()))
    spread = (e4m3.decode(scales.contiguous()) * decode.float()).repeat_interleave(BLOCK_SIZE, -1)
    return (elements * spread).to(dtype)


def _experts(order: Callable[[Tensor], Tensor], *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the experts of the reference in another order, each with its own weight."""
    experts, weights = operation("route").reference()(*arguments)
    places = order(experts)
    return experts.gather(-1, places), weights.gather(-1, places)


def _rising(experts: Tensor) -> Tensor:
    return experts.sort(-1).indices


def _backwards(experts: Tensor) -> Tensor:
    return torch.arange(experts.shape[-1]).flip(0).expand(experts.shape).contiguous()


def _route64(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    experts, weights = operation("route").reference()(logits.double(), *rest)
    return experts, weights.float()


def _higher_index(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Route mirrored scores: of equal ones the higher index is taken, as torch.topk may."""
    mirrored = logits.flip(-1), bias.flip(-1)
    experts, weights = operation("route").reference()(
        *mirrored, n_group, topk_group, top_k, scaling
    )
    return (logits.shape[1] - 1 - experts).to(experts.dtype), weights


def _rope32(x: Tensor, positions: Tensor, config: Any) -> Tensor:
    settings = RotaryConfig.of(config)
    theta = rotary.angles(positions, settings)
    factor = 1.0 if settings.rope_scaling is None else settings.rope_scaling.rotary_factor
    return rotary.rotate(x.float(), theta.cos() * factor, theta.sin() * factor).to(x.dtype)


def _attention32(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_pages: Tensor,
    rope_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """Attend page after page in float32, with a running maximum and a running sum."""
    q_latent, q_rope = q_latent.contiguous(), q_rope.contiguous()
    page = latent_pages.shape[1]
    attended = []
    for b, length in enumerate(lengths.tolist()):
        heads, width = q_latent.shape[1:]
        highest = torch.full((heads, 1), -torch.inf)
        total, sums = torch.zeros(heads, 1), torch.zeros(heads, width)
        for number, first in enumerate(range(0, length, page)):
            held = min(page, length - first)
            latent = latent_pages[int(page_table[b, number]), :held].float().contiguous()
            turned = rope_pages[int(page_table[b, number]), :held].float().contiguous()
            scores = (q_latent[b].float() @ latent.T + q_rope[b].float() @ turned.T) * scale
            raised = torch.maximum(highest, scores.amax(-1, keepdim=True))
            kept, weights = torch.exp(highest - raised), torch.exp(scores - raised)
            total = total * kept + weights.sum(-1, keepdim=True)
            sums = sums * kept + weights @ latent
            highest = raised
        attended.append(sums / total if length else sums)
    return torch.stack(attended).to(q_latent.dtype)


def _split_by_the_batch(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_pages: Tensor,
    rope_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """Attend in float32 to as many splits of the tokens as keep a GPU busy with this batch."""
    splits = max(1, 16 // len(lengths)) if len(lengths) else 1
    page = latent_pages.shape[1]
    attended = []
    for b, length in enumerate(lengths.tolist()):
        pages = page_table[b, : -(-length // page)].long()
        latent = latent_pages[pages].flatten(0, 1)[:length].float()
        turned = rope_pages[pages].flatten(0, 1)[:length].float()
        scores = (q_latent[b].float() @ latent.T + q_rope[b].float() @ turned.T) * scale
        size = -(-length // splits)
        parts = [slice(first, first + size) for first in range(0, length, size)]
        highest = torch.stack([scores[:, part].amax(-1) for part in parts])
        shifted = [
            torch.exp(scores[:, p] - m.unsqueeze(-1)) for p, m in zip(parts, highest, strict=True)
        ]
        factors = torch.exp(highest - highest.amax(0)).unsqueeze(-1)
        sums = torch.stack([w @ latent[p] for w, p in zip(shifted, parts, strict=True)])
        totals = torch.stack([w.sum(-1, keepdim=True) for w in shifted])
        attended.append((factors * sums).sum(0) / (factors * totals).sum(0))
    return torch.stack(attended).to(q_latent.dtype)


def _others() -> list[Variant]:
    kernels: list[tuple[str, str, Kernel]] = [
        ("dequantize", "(code * scale) * global", _inner_first),
        ("dequantize", "code * (scale * global)", _scale_first),
        ("route", "experts by number", partial(_experts, _rising)),
        ("route", "experts backwards", partial(_experts, _backwards)),
        ("route", "float64", _route64),
        ("route", "ties to the higher index", _higher_index),
        ("rope", "float32 throughout", _rope32),
        ("mla_decode", "float32, page after page", _attention32),
        ("mla_decode", "tokens split by the batch", _split_by_the_batch),
    ]
    found = [Variant(operation=op, name=name, kernel=kernel) for op, name, kernel in kernels]
    found += [
        Variant(operation=name, name="the reference", kernel=operation(name).reference())
        for name in ("swizzle", "unswizzle", "dequantize_fp8_block")
    ]
    return found


def correct_variants(named: str | None = None) -> tuple[Variant, ...]:
    """Return every correct variant, or those of one operation."""
    every = (*_products(), *_quantisers(), *_others())
    return tuple(one for one in every if named in (None, one.operation))
