"""Nearest training pictures, and diversity over seeds."""

from __future__ import annotations

import pytest
import torch

from shoestring.evaluation.neighbours import diversity, nearest_training


def test_the_nearest_training_picture_is_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.evaluation.neighbours.BLOCK", 3)
    training = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = torch.cat([3 * training[[7, 2, 19]], training[[4]] + 0.01, -training[[0]]])
    found = nearest_training(samples, training)
    assert found.index_N.tolist()[:4] == [7, 2, 19, 4]
    assert found.cosine_N[:3].tolist() == pytest.approx([1, 1, 1])
    assert 0.99 < found.cosine_N[3] < 1
    by_hand = torch.nn.functional.cosine_similarity(samples[4:], training).argmax()
    assert found.index_N[4] == by_hand
    with pytest.raises(ValueError, match="6 and 5 columns"):
        nearest_training(samples, training[:, :5])


def test_diversity_is_the_mean_over_pairs_of_one_prompt() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 0.0], [5.0, 0.0]])
    half = 0.5**0.5
    first = 1 - (0 + half + half) / 3
    assert diversity(rows, ["a", "a", "a", "b", "b"]) == pytest.approx((first + 0) / 2)
    assert diversity(rows, ["a", "a", "a", "b", "c"]) == pytest.approx(first)
    with pytest.raises(ValueError, match="no prompt has two samples"):
        diversity(rows, "abcde")
    with pytest.raises(ValueError, match="4 prompts for 5 samples"):
        diversity(rows, "aabb")
