import pytest
import torch

from nvfp4check.kernels import grouped_matmul as grouped
from nvfp4check.kernels.dequantize_fp8_block import dequantize_fp8_block
from nvfp4check.kernels.mla_decode import SPLIT, mla_decode
from nvfp4check.kernels.quantize import ScaleLayout
from nvfp4check.kernels.rms_norm_quantize import rms_norm_quantize
from nvfp4check.kernels.rope import rope
from nvfp4check.kernels.route import route
from nvfp4check.kernels.silu_mul_quantize import silu_mul_quantize
from nvfp4ref import layout
from nvfp4ref import matmul as reference
from nvfp4ref.deepseek_v3.attention import mla_decode as exact_mla_decode
from nvfp4ref.deepseek_v3.config import RotaryConfig, YarnConfig

ONE = torch.tensor(1.0)


@pytest.mark.parametrize("rows", [3, 130])
def test_fused_kernels_swizzle_the_scales_they_store(rows, generator):
    x = torch.randn(rows, 96, generator=generator)
    weight = torch.ones(96)
    fused = (
        lambda **how: silu_mul_quantize(x, x, ONE, **how),
        lambda **how: rms_norm_quantize(x, weight, 1e-6, ONE, **how),
    )
    for call in fused:
        codes, linear = call()
        same_codes, flat = call(scale_layout=ScaleLayout.SWIZZLED)
        assert torch.equal(codes, same_codes)
        assert torch.equal(flat.view(torch.uint8), layout.swizzle(linear).view(torch.uint8))


@pytest.mark.parametrize("columns", [128, 40])
def test_experts_swizzled_once_give_the_same_product(columns, generator):
    a_codes = torch.randint(0, 256, (20, 48), generator=generator).to(torch.uint8)
    b_codes = torch.randint(0, 256, (3, columns, 48), generator=generator).to(torch.uint8)
    a_scales = torch.ones(20, 6).to(torch.float8_e4m3fn)
    raw = torch.randint(0x30, 0x38, (3, columns, 6), generator=generator).to(torch.uint8)
    b_scales = raw.view(torch.float8_e4m3fn)
    rest = (torch.ones(3), torch.tensor([0, 7, 7, 20], dtype=torch.int32), torch.float32)

    found = grouped.grouped_matmul_swizzled(
        a_codes, a_scales, b_codes, grouped.swizzle_experts(b_scales), *rest
    )

    expected = reference.grouped_matmul(a_codes, a_scales, b_codes, b_scales, *rest)
    assert torch.equal(found, expected)


def test_a_sequence_of_several_parts_is_joined_to_the_whole(generator):
    page, length = 16, 2 * SPLIT + 5
    pages = -(-length // page)
    latent = torch.randn(pages, page, 64, generator=generator)
    keys = torch.randn(pages, page, 16, generator=generator)
    q_latent = torch.randn(2, 3, 64, generator=generator)
    q_rope = torch.randn(2, 3, 16, generator=generator)
    table = torch.arange(pages, dtype=torch.int32).expand(2, -1)
    lengths = torch.tensor([length, 0], dtype=torch.int32)
    given = (q_latent, q_rope, latent, keys, table, lengths, 0.1)

    found = mla_decode(*given)

    # Scores of 80 terms and 1029 weights of one sign: far more roundings than any part makes.
    error = (80 + length) * 2.0**-23 * latent.abs().max()
    assert (found.double() - exact_mla_decode(*given).double()).abs().max() <= error
    assert bool((found[1] == 0).all())


def test_a_rotary_configuration_is_read_as_an_object_and_as_a_mapping(generator):
    x = torch.randn(4, 2, 64, generator=generator)
    positions = torch.tensor([0, 1, 5000, 163839])
    yarn = {"factor": 40.0, "original_max_position_embeddings": 4096}
    scaling = {"type": "yarn", **yarn}
    mapping = {"qk_rope_head_dim": 64, "rope_theta": 10000.0, "rope_scaling": scaling}

    as_object = RotaryConfig(qk_rope_head_dim=64, rope_scaling=YarnConfig(**yarn))
    nested = {"qk_rope_head_dim": 64, "rope_parameters": {"rope_type": "yarn", **yarn}}

    assert torch.equal(rope(x, positions, mapping), rope(x, positions, as_object))
    assert torch.equal(rope(x, positions, mapping), rope(x, positions, nested))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: silu_mul_quantize(torch.ones(2, 32), torch.ones(2, 16), ONE), r"up: shape"),
        (lambda: silu_mul_quantize(torch.ones(2, 20), torch.ones(2, 20), ONE), "20 columns"),
        (lambda: rms_norm_quantize(torch.ones(2, 32), torch.ones(16), 0.0, ONE), "weight: shape"),
        (
            lambda: rms_norm_quantize(torch.ones(2, 32), torch.ones(32), 0.0, ONE, torch.ones(1)),
            "residual: shape",
        ),
        (lambda: rope(torch.ones(2, 1, 4), torch.ones(2), {}), "positions: dtype"),
        (lambda: rope(torch.ones(1, 1, 4), torch.tensor([0]), {}), "qk_rope_head_dim is missing"),
        (
            lambda: rope(
                torch.ones(1, 1, 4),
                torch.tensor([0]),
                {"qk_rope_head_dim": 4, "rope_scaling": {"type": "linear"}},
            ),
            "type 'linear'",
        ),
        (lambda: route(torch.ones(1, 10), torch.ones(10), 4, 2, 1, 1.0), "10 experts, 2 of 4"),
        (lambda: route(torch.ones(1, 8), torch.ones(8), 4, 1, 3, 1.0), "3 experts a token"),
        (
            lambda: dequantize_fp8_block(
                torch.ones(130, 4).to(torch.float8_e4m3fn), torch.ones(1, 1)
            ),
            r"scale_inv: shape \(1, 1\), expected \(2, 1\)",
        ),
        (
            lambda: grouped.grouped_matmul(
                torch.zeros(4, 8, dtype=torch.uint8),
                torch.zeros(4, 1).to(torch.float8_e4m3fn),
                torch.zeros(2, 4, 8, dtype=torch.uint8),
                torch.zeros(2, 4, 1).to(torch.float8_e4m3fn),
                torch.ones(2),
                torch.zeros(2, dtype=torch.int32),
            ),
            r"expert_offsets: shape \(2,\), expected \(3\)",
        ),
    ],
)
def test_what_a_launcher_cannot_take_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
