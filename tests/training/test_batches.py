"""Flat batches give the loss and the gradients of the plain padded batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medlora.config.model import BaseModelConfig, LoraSettings
from medlora.kernels import attention
from medlora.model.base import load_base
from medlora.model.chain import add_adapter
from medlora.model.tokenizer import load_tokenizer
from medlora.tokens.rows import IGNORED, Row
from medlora.training.batches import Collator, FlatCollator, flatten
from medlora.training.trainer import recompute_activations
from tests.support.batches import BATCHES, PREFIX, make_row, measure
from tests.support.tiny import FAMILIES
from tests.support.varlen import use_reference_varlen


@pytest.fixture(scope="module", params=FAMILIES)
def stacked(request: pytest.FixtureRequest, bases: dict[str, str]) -> Any:
    """A frozen adapter that does something, and a trained one on top of it."""
    base = BaseModelConfig(model=bases[request.param])
    model = load_base(base, load_tokenizer(base))
    for n, name in enumerate(("00", "01")):
        model = add_adapter(model, name, LoraSettings(r=4, alpha=8), [], seed=n)
        torch.manual_seed(n)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name and name in parameter_name:
                parameter.data.normal_(std=0.1)
    return model.train()


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("how", ["pieces of eight", "one piece", "varlen"])
def test_loss_and_gradients_are_those_of_the_padded_batch(
    stacked: Any, monkeypatch: pytest.MonkeyPatch, name: str, share_prefix: bool, how: str
) -> None:
    """Each segment's queries in one piece, in pieces of eight that are computed again where they see many keys, and all
    segments in one call of torch's varlen attention, for which a plain function stands in."""
    if how == "pieces of eight":
        monkeypatch.setattr(attention, "PIECE_SCORES", 128)
        monkeypatch.setattr(attention, "SAVED_KEYS", 20)
    calls = use_reference_varlen(monkeypatch) if how == "varlen" else []
    multimodal = stacked.config.model_type == "gemma3"
    padded = Collator(0, token_type_ids=multimodal)(BATCHES[name])
    flat = FlatCollator(share_prefix, token_type_ids=multimodal)(BATCHES[name])
    loss, gradients = measure(stacked, padded)
    flat_loss, flat_gradients = measure(stacked, flat)
    assert bool(calls) == (how == "varlen")
    assert flat_loss == pytest.approx(loss, rel=1e-5)
    assert flat_gradients.keys() == gradients.keys() and gradients
    for key, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(flat_gradients[key], gradient, atol=1e-5 * max(scale, 1e-6), rtol=1e-4, msg=key)


@pytest.mark.parametrize("how", ["on CPU", "varlen"])
def test_recomputed_activations_see_the_same_segments(stacked: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Gradient checkpointing runs attention once more in the backward pass."""
    if how == "varlen":
        use_reference_varlen(monkeypatch)
    multimodal = stacked.config.model_type == "gemma3"
    collate = FlatCollator(token_type_ids=multimodal)
    loss, gradients = measure(stacked, collate(BATCHES["shared prefix"]))
    runs: list[int] = []
    layers = [
        module for name, module in stacked.named_modules() if name.endswith(".0.self_attn") and "vision" not in name
    ]
    (attention,) = layers
    hook = attention.register_forward_pre_hook(lambda *_: runs.append(1) if torch.is_grad_enabled() else None)
    with recompute_activations(stacked, True):
        again, recomputed = measure(stacked, collate(BATCHES["shared prefix"]))
    hook.remove()
    assert again == loss and len(runs) == 2
    for key, gradient in gradients.items():
        torch.testing.assert_close(recomputed[key], gradient, msg=key)


def test_the_shared_beginning_stands_there_once() -> None:
    rows = BATCHES["shared prefix"]
    flat, segments = flatten(rows)
    assert len(flat.input_ids) == 21 + 6 + 11 + 4 + 30 == segments[-1][1]
    assert segments[:3] == [(0, 21, 0), (21, 27, 21), (27, 38, 21)]
    assert flat.position_ids[20:28] == [20, 21, 22, 23, 24, 25, 26, 21]
    assert sum(label != IGNORED for label in flat.labels) == sum(
        label != IGNORED for row in rows for label in row.labels
    )
    alone, segments = flatten(rows, share_prefix=False)
    assert len(alone.input_ids) == sum(len(row.input_ids) for row in rows) and len(segments) == 4


def test_a_prefix_never_reaches_what_is_learned() -> None:
    """Rows that begin alike down to their completions: the token before the first supervised one stays with its row."""
    same = [make_row(30, prompt=20) for _ in range(3)]
    flat, segments = flatten(same)
    assert segments[0] == (0, 19, 0) and [stop - start for start, stop, _ in segments[1:]] == [11, 11, 11]
    assert sum(label != IGNORED for label in flat.labels) == 30


@pytest.mark.parametrize(
    "rows",
    [
        BATCHES["one row"],
        BATCHES["packed text"],
        [make_row(5, prompt=3, prefix=PREFIX[:10]), make_row(6, prompt=3, prefix=PREFIX[:10])],  # too short to pay
        [make_row(30), make_row(30)],  # plain text: every token is learned
    ],
)
def test_where_nothing_can_be_shared_nothing_is(rows: list[Row]) -> None:
    _, segments = flatten(rows)
    assert all(shared == 0 for _, _, shared in segments)


def test_without_segments_attention_is_transformers_own(stacked: Any) -> None:
    ids = torch.tensor([[41, 42, 43, 44]])
    extra = {"token_type_ids": torch.zeros_like(ids)} if stacked.config.model_type == "gemma3" else {}
    with torch.no_grad():
        whole = stacked.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
        padded = stacked(
            input_ids=torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1),
            attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]),
            **({"token_type_ids": torch.zeros(1, 7, dtype=torch.long)} if extra else {}),
        ).logits
    stacked.train()
    torch.testing.assert_close(padded[:, 3:], whole, atol=1e-4, rtol=1e-4)
