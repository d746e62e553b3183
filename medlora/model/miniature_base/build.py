"""Builds the miniature base model: an ordinary Hugging Face folder, made once and cached."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from transformers import GenerationConfig

from medlora.miniature import fingerprint
from medlora.model.miniature_base.network import start_network
from medlora.model.miniature_base.pretraining import OnProgress, pretrain
from medlora.model.miniature_base.tokenizer import train_tokenizer


def build(folder: Path, seed: int = 0, on_progress: OnProgress | None = None) -> None:
    """Trains tokenizer and base model and writes them to `folder`; the same seed gives the same bytes on one machine.

    Runs on one CPU thread (torch's thread count and random state are put back afterwards). `on_progress` gets
    {"what", "step", "total", "loss", "letters"} every few steps.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = train_tokenizer()
            model = start_network(tokenizer)
            model.train()
            pretrain(model, tokenizer, seed, on_progress)
    finally:
        torch.set_num_threads(threads)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end],
        pad_token_id=tokenizer.pad_token_id,
    )
    with _no_progress_bars():
        model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def ensure(cache_folder: Path, seed: int = 0, on_progress: OnProgress | None = None) -> Path:
    """The folder of the base model for `seed` under `cache_folder`, built at the first call.

    Safe to call from several processes: one builds, under a lock and into a temporary folder that is renamed when
    complete; the others wait and find it.
    """
    cache_folder.mkdir(parents=True, exist_ok=True)
    folder = cache_folder / f"miniature-{seed}-{fingerprint()}"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # what an interrupted build left
            build(unfinished, seed, on_progress)
            unfinished.rename(folder)
    return folder
