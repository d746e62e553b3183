"""A token's attention with packed heads is transformers' own."""

from __future__ import annotations

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from medlora.kernels.attention import _is_one_token, attend_with_packed_heads


def draw(heads: int, tokens: int) -> torch.Tensor:
    return torch.randn(3, heads, tokens, 16)


def test_packed_heads_attend_as_repeated_keys_do() -> None:
    torch.manual_seed(0)
    query, key, value = draw(8, 1), draw(2, 11), draw(2, 11)
    mask = torch.zeros(3, 1, 1, 11).masked_fill_(torch.rand(3, 1, 1, 11) < 0.4, -torch.inf)
    mask[..., -1] = 0
    module = torch.nn.Module()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found = attend_with_packed_heads(query, key, value, mask, 0.3)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_only_one_token_with_a_mask_of_all_heads_and_nothing_else_is_packed() -> None:
    mask = torch.zeros(3, 1, 1, 11)
    assert _is_one_token(draw(8, 1), draw(2, 11), mask, {"scaling": 1.0, "sliding_window": 8})
    for query, key, given, options in (
        (draw(8, 2), draw(2, 11), mask, {}),
        (draw(8, 1), draw(8, 11), mask, {}),
        (draw(8, 1), draw(2, 11), None, {}),
        (draw(8, 1), draw(2, 11), mask.expand(3, 8, 1, 11), {}),
        (draw(8, 1), draw(2, 11), mask, {"softcap": 50.0}),
    ):
        assert not _is_one_token(query, key, given, options)
