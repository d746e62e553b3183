"""The loss in chunks is that of the whole logits, with its gradients, for heads of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import Gemma2Config, Gemma2ForCausalLM

from medlora.config.model import LoraSettings
from medlora.kernels import supervised_head as head_module
from medlora.kernels.supervised_head import SupervisedHead
from medlora.tokens.rows import Row
from medlora.training.batches import Collator
from tests.support.batches import build
from tests.support.tiny import FAMILIES

LABELS = torch.tensor([[-100, 41, 42, -100, 44, 45, -100], [-100, -100, -100, 63, 64, 65, 66]])


def measure_plainly(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    extra = {"token_type_ids": torch.zeros_like(ids)} if model.config.model_type == "gemma3" else {}
    logits = model(input_ids=ids, use_cache=False, **extra).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def measure_in_chunks(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    rows = [Row(i.tolist(), labels.tolist(), list(range(7))) for i, labels in zip(ids, LABELS, strict=True)]
    batch = Collator(0, token_type_ids=model.config.model_type == "gemma3")(rows)
    labels, head = batch.pop("labels"), SupervisedHead(model)
    with head.at(batch.pop("supervised")):
        loss = head.compute_loss(model(**batch, use_cache=False), labels)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model: Any, ids: torch.Tensor) -> None:
    loss, gradients = measure_plainly(model, ids)
    chunked, chunked_gradients = measure_in_chunks(model, ids)
    assert chunked == pytest.approx(loss, rel=1e-5)
    assert chunked_gradients.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        scale = max(gradient.abs().max().item(), 1e-6)
        torch.testing.assert_close(chunked_gradients[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=name)
    assert model(input_ids=ids[:, :1].repeat(1, 5)).logits.shape[:2] == (2, 5), "the head sees every position again"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 500 * 3, 2**27])
def test_the_loss_is_that_of_the_whole_logits(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch, family: str, rows: bool, chunk_bytes: int
) -> None:
    """One position at a time, a few, and all eight at once; also where a target is a trained row of the vocabulary."""
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", chunk_bytes)
    model, added = build(bases[family], [LoraSettings(r=4, alpha=8)], rows=rows)
    monkeypatch.setitem(globals(), "LABELS", LABELS.clone())
    ids = torch.arange(14).view(2, 7) + 40
    if added:
        LABELS[0, 1], LABELS[1, 5] = added
        ids[0, 1], ids[1, 5] = added
    model.train() if family != "medgemma" else model.eval()
    check(model, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_what_is_read(bases: dict[str, str], family: str) -> None:
    """Its MLP sees supervised positions alone, and all of them again afterwards; the layer before it sees all."""
    model, _ = build(bases[family], [LoraSettings(r=4, alpha=8)])
    seen: list[int] = []
    for layer in model.get_decoder().layers[-2:]:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][..., 0].numel()))
    head, ids = SupervisedHead(model), torch.arange(14).view(2, 7) + 40
    seen.clear()
    extra = {"token_type_ids": torch.zeros_like(ids)} if model.config.model_type == "gemma3" else {}
    with head.at(torch.tensor([0, 3, 8])):
        model(input_ids=ids, use_cache=False, **extra)
    assert seen == [14, 3]
    model(input_ids=ids, use_cache=False, **extra)
    assert seen == [14, 3, 14, 14]


def test_a_compiled_model_is_not_compiled_anew_at_every_step(bases: dict[str, str]) -> None:
    """torch.compile gives up after eight times. The first backward pass, which makes gradients, counts once more."""
    model, _ = build(bases["llama"], [LoraSettings(r=4, alpha=8)])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled, head = torch.compile(model, backend=counter), SupervisedHead(model)
    ids, counts = torch.arange(14).view(2, 7) + 40, []
    for step in range(4):
        with head.at(torch.tensor([step, 3, 8])):
            loss = head.compute_loss(compiled(input_ids=ids, use_cache=False), LABELS.clamp(min=0))
        loss.backward()
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[1] == counts[3]
    torch._dynamo.reset()


def test_a_head_that_is_trained_whole_is_computed_again_in_the_backward_pass(
    bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", 1)
    model, _ = build(bases["llama"], [LoraSettings(r=4, alpha=8)])
    model.get_output_embeddings().weight.requires_grad_(True)
    check(model, torch.arange(14).view(2, 7) + 40)


def test_logits_that_are_more_than_the_head_s_stay_the_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its logits behind the head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    capped = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=100, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, **sizes)
    )
    assert not SupervisedHead(capped).deferred
    check(capped, torch.arange(14).view(2, 7) + 40)


def test_losses_of_unlikely_targets_are_finite(bases: dict[str, str]) -> None:
    """Where the target's share is 0 in float32, its loss is still the distance of the logits."""
    weight = torch.zeros(5, 4)
    weight[0, 0], weight[1, 0] = 300.0, -300.0
    hidden = torch.tensor([[1.0, 0, 0, 0]], requires_grad=True)
    loss = head_module._ChunkedLoss.apply(hidden, weight, torch.tensor([1]), None, None, 8)
    loss.backward()
    assert loss.item() == pytest.approx(600.0)
    torch.testing.assert_close(hidden.grad, torch.tensor([[600.0, 0, 0, 0]]))
