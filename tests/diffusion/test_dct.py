"""Block DCT: orthonormal change of basis in every block."""

import math

import pytest
import torch

from relay_diffusion.diffusion.corruption import block_mean, upsample_blocks
from relay_diffusion.diffusion.dct import (
    _dct_matrix_of_pieces,
    block_dct,
    block_filter,
    block_idct,
    dct_matrix,
    filter_and_add,
)
from support import TRITON

CPU = torch.device("cpu")
SHAPES = [(2, (8, 8)), (3, (6, 12)), (4, (16, 8)), (5, (5, 15)), (8, (8, 24))]


def images(height, width, dtype=torch.float64):
    return torch.randn(2, 3, height, width, dtype=dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_matrix_entries_are_the_dct_ii(size):
    expected = [
        [math.sqrt((1 if k == 0 else 2) / size) * math.cos(math.pi * k * (2 * n + 1) / (2 * size)) for n in range(size)]
        for k in range(size)
    ]
    torch.testing.assert_close(
        dct_matrix(size, torch.float64, CPU), torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=0
    )


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_matrix_is_orthonormal(size):
    matrix = dct_matrix(size, torch.float64, CPU)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-14, rtol=0)


@pytest.mark.parametrize(("block", "size"), SHAPES)
def test_round_trip(block, size):
    x = images(*size)
    torch.testing.assert_close(block_idct(block_dct(x, block), block), x, atol=1e-13, rtol=0)
    torch.testing.assert_close(block_dct(block_idct(x, block), block), x, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("block", "size"), SHAPES)
def test_energy_of_every_block_is_kept(block, size):
    x = images(*size)
    energy = block_mean(x**2, block)
    torch.testing.assert_close(block_mean(block_dct(x, block) ** 2, block), energy, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("block", "size"), SHAPES)
def test_a_constant_block_has_only_its_mean(block, size):
    values = torch.randn(1, 2, size[0] // block, size[1] // block, dtype=torch.float64)
    coefficients = block_dct(upsample_blocks(values, block), block)
    expected = torch.zeros_like(coefficients)
    expected[..., ::block, ::block] = block * values
    torch.testing.assert_close(coefficients, expected, atol=1e-13, rtol=0)


def test_rows_are_vertical_frequencies_and_columns_horizontal_ones():
    block = 4
    vertical = torch.cos(math.pi * (2 * torch.arange(block, dtype=torch.float64) + 1) / (2 * block))
    x = vertical[:, None].expand(block, block)[None, None]  # varies from row to row only
    coefficients = block_dct(x, block)[0, 0]
    expected = torch.zeros(block, block, dtype=torch.float64)
    expected[1, 0] = block / math.sqrt(2)  # norm of the cosine, sqrt(block/2), times sqrt(block) equal columns
    torch.testing.assert_close(coefficients, expected, atol=1e-14, rtol=0)


def test_each_block_is_transformed_alone_and_in_place():
    block, x = 4, images(8, 12)
    whole = block_dct(x, block)
    piece = block_dct(x[..., 4:8, 8:12].contiguous(), block)
    torch.testing.assert_close(whole[..., 4:8, 8:12], piece, atol=1e-14, rtol=0)


def test_filter_with_gains_one_is_the_identity():
    x = images(6, 12)
    torch.testing.assert_close(block_filter(x, torch.ones(1, 1, 3, 3).double()), x, atol=1e-13, rtol=0)


def filtered_by_hand(x, gains):
    """Filter every piece X separately in float64: M^T (g * (M X M^T)) M."""
    block = gains.shape[-1]
    matrix, result = dct_matrix(block, torch.float64, CPU), torch.empty(x.shape, dtype=torch.float64)
    for image, channels in enumerate(x.double()):
        gain = gains.double().expand(len(x), -1, -1, -1)[image, 0]
        for channel, plane in enumerate(channels):
            for top in range(0, plane.shape[0], block):
                for left in range(0, plane.shape[1], block):
                    here = slice(top, top + block), slice(left, left + block)
                    coefficients = matrix @ plane[here] @ matrix.T
                    result[image, channel][here] = matrix.T @ (coefficients * gain) @ matrix
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_of_gains", [1, 2])
@pytest.mark.parametrize("block", [2, 3, 4, 8, 9, 16])  # one product up to 8, axis by axis above
def test_filter_is_transform_gain_and_inverse_of_every_piece(block, batch_of_gains, dtype):
    x = images(3 * block, 2 * block, dtype)
    gains = torch.rand(batch_of_gains, 1, block, block, dtype=dtype) * 2 - 1
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6 * block
    filtered = block_filter(x, gains)
    assert filtered.dtype == dtype
    torch.testing.assert_close(filtered.double(), filtered_by_hand(x, gains), atol=tolerance, rtol=0)


@pytest.mark.parametrize("block", [4, 12])
def test_filter_reads_any_layout_and_returns_new_contiguous_memory(block):
    x, gains = images(block, 2 * block), torch.rand(2, 1, block, block).double()
    expected, before = block_filter(x, gains), x.clone()
    strided = x.to(memory_format=torch.channels_last)
    filtered = block_filter(strided, gains)
    assert filtered.is_contiguous()
    torch.testing.assert_close(filtered, expected, atol=1e-14, rtol=0)
    filtered.zero_()
    assert torch.equal(strided, before)


@pytest.mark.parametrize("block", [4, 12])
def test_filter_works_in_the_wider_precision(block):
    x, gains = images(block, block, torch.float32), torch.rand(2, 1, block, block).double()
    filtered = block_filter(x, gains)
    assert filtered.dtype == torch.float64
    torch.testing.assert_close(filtered, filtered_by_hand(x, gains), atol=1e-13, rtol=0)


@pytest.mark.parametrize("block", [4, 12])
def test_filter_is_exact_also_in_mixed_precision(block):
    x, gains = images(block, block, torch.float32), torch.rand(2, 1, block, block)
    expected = block_filter(x, gains)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_filter(x, gains), expected)


def test_filtering_an_indivisible_image_is_refused():
    with pytest.raises(ValueError, match="6x8 do not divide into blocks of 4x4"):
        block_filter(images(6, 8), torch.ones(1, 1, 4, 4).double())


def test_filter_that_keeps_only_the_mean_gives_the_upsampled_block_mean():
    block, x = 4, images(8, 12)
    gains = torch.zeros(1, 1, block, block, dtype=torch.float64)
    gains[..., 0, 0] = 1
    expected = upsample_blocks(block_mean(x, block), block)
    torch.testing.assert_close(block_filter(x, gains), expected, atol=1e-13, rtol=0)


def test_filters_compose_by_multiplying_their_gains():
    x, first, second = images(8, 12), torch.rand(1, 1, 4, 4).double(), torch.rand(1, 1, 4, 4).double()
    twice = block_filter(block_filter(x, first), second)
    torch.testing.assert_close(twice, block_filter(x, first * second), atol=1e-13, rtol=0)


def test_each_image_has_its_own_gains():
    x, gains = images(8, 12), torch.rand(2, 1, 4, 4).double()
    expected = torch.cat([block_filter(x[:1], gains[:1]), block_filter(x[1:], gains[1:])])
    torch.testing.assert_close(block_filter(x, gains), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("transform", [block_dct, block_idct])
@pytest.mark.parametrize(("height", "width"), [(6, 8), (8, 6)])
def test_sizes_that_do_not_divide_are_refused(transform, height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} do not divide into blocks of 4x4"):
        transform(images(height, width), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", [block_dct, block_idct])
def test_dtype_is_kept(transform, dtype):
    assert transform(images(8, 8, dtype), 4).dtype == dtype


def test_single_precision_agrees_with_double_precision():
    x = images(8, 8)
    torch.testing.assert_close(block_dct(x.float(), 4).double(), block_dct(x, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", [block_dct, block_idct])
def test_exact_also_in_mixed_precision(transform, dtype):
    x = images(8, 8, dtype)
    expected = transform(x, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = transform(x, 4)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, expected)


def test_a_matrix_cached_in_inference_mode_works_in_training():
    dct_matrix.cache_clear()
    _dct_matrix_of_pieces.cache_clear()
    with torch.inference_mode():
        block_dct(torch.randn(1, 1, 6, 6), 6)
        block_filter(torch.randn(1, 1, 6, 6), torch.ones(1, 1, 6, 6))
    for unitary in (lambda x: block_dct(x, 6), lambda x: block_filter(x, torch.ones(1, 1, 6, 6))):
        x = torch.randn(1, 1, 6, 6, requires_grad=True)
        unitary(x).square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.detach())  # Parseval


@pytest.mark.parametrize("block", [2, 3, 4, 6, 8])
def test_the_blur_kernel_equals_plain_torch(block):
    """Without a GPU in Triton's interpreter; with several programs, the last one partial."""
    pytest.importorskip("triton", TRITON)
    from relay_diffusion.kernels.block_filter import filter_and_add as in_one_pass

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, noise = (torch.randn(2, 3, 9 * block, 11 * block, device=device) for _ in range(2))
    scale, gains = torch.rand(2, device=device) + 1, torch.rand(2, 1, block, block, device=device)
    factors = torch.cat([gains.flatten(1), scale[:, None]], dim=1)
    got = in_one_pass(x, _dct_matrix_of_pieces(block, x.dtype, device), factors, noise)
    expected = block_filter(x.double(), gains.double()) + scale.double().view(-1, 1, 1, 1) * noise.double()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [4, 9])
def test_filter_and_add_equals_filter_plus_noise(block, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, noise = (torch.randn(2, 3, 2 * block, 3 * block, device=device, dtype=dtype) for _ in range(2))
    scale, gains = torch.rand(2, dtype=dtype), torch.rand(1, 1, block, block, dtype=dtype)
    expected = block_filter(x.double(), gains.double()) + scale.to(device).double().view(-1, 1, 1, 1) * noise.double()
    got = filter_and_add(x, gains, scale, noise)  # gains and scale may be on the CPU
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 3e-6)
    with pytest.raises(ValueError, match="do not divide"):
        filter_and_add(x[..., 1:], gains, scale, noise[..., 1:])
