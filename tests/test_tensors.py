"""Patches, visible tokens, masked means."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.tensors import (
    gather_tokens,
    masked_mean,
    patchify,
    scatter_tokens,
    unpatchify,
    visible_from_noise,
)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 2, 4]))
def test_unpatchify_inverts_patchify(batch, channels, rows, columns, patch):
    x = torch.randn(batch, channels, rows * patch, columns * patch)
    tokens = patchify(x, patch)
    assert tokens.shape == (batch, rows * columns, channels * patch**2)
    assert torch.equal(unpatchify(tokens, (rows, columns), patch), x)


def test_patch_layout_is_row_column_channel():
    x = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    token = patchify(x, 2)[0, 4]  # second row of patches, second column
    expected = [x[0, c, 2 + row, 2 + column] for row in range(2) for column in range(2) for c in range(2)]
    assert token.tolist() == expected


@given(st.integers(1, 40), st.floats(0, 0.999))
def test_visible_tokens_are_distinct_and_as_many_as_asked(length, ratio):
    visible = visible_from_noise(torch.rand(3, length), ratio)
    expected = max(1, int(length * (1 - ratio)))
    if expected == length:
        assert visible is None
    else:
        assert visible.shape == (3, expected)
        assert all(len(set(row)) == expected for row in visible.tolist())


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_mask_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="below 1"):
        visible_from_noise(torch.rand(1, 4), ratio)


def test_every_patch_is_visible_equally_often():
    visible = visible_from_noise(torch.rand(20_000, 16, generator=torch.Generator().manual_seed(0)), 0.75)
    share = torch.bincount(visible.flatten(), minlength=16) / 20_000
    # 0.25 +- 4 standard deviations of a binomial share
    assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 20_000) ** 0.5


def test_scatter_puts_gathered_tokens_back():
    tokens = torch.randn(2, 9, 4)
    visible = visible_from_noise(torch.rand(2, 9), 0.5)
    full = scatter_tokens(gather_tokens(tokens, visible), visible, 9)
    kept = torch.zeros(2, 9, dtype=torch.bool).scatter(1, visible, True)
    assert torch.equal(full[kept], tokens[kept])
    assert (full[~kept] == 0).all()


def test_masked_mean_ignores_padding():
    values = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    expected = torch.stack([values[0, :2].mean(0), values[1].mean(0)])
    assert torch.allclose(masked_mean(values, mask), expected)
    assert torch.equal(masked_mean(values, None), values.mean(1))
