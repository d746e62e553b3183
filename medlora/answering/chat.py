"""Stages that answer on a terminal: one base with all adapters, a question at a time, its words as they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from medlora.answering.answerer import Answer, AnswerSettings, McqAnswerer
from medlora.answering.cuda.fast_paths import FastPaths
from medlora.answering.generation import get_pad_id
from medlora.artifacts.bases import read_extra_tokens
from medlora.config.model import BaseModelConfig
from medlora.curriculum.chains import Link
from medlora.evaluation.stages import find_asking
from medlora.kernels.modes import in_eval_mode
from medlora.model.base import load_base
from medlora.model.chain import activate, load_chain
from medlora.model.tokenizer import load_stage_tokenizer, load_tokenizer, stop_token_ids
from medlora.prompts import Example
from medlora.records import McqRecord
from medlora.tokens.encode import encode_prompts

Write = Callable[[str], None]
"""Takes a piece of an answer as soon as it is written."""


class Chat:
    """One base with the adapters of `stages`; each stage answers with its own tokenizer and template."""

    def __init__(self, base: BaseModelConfig, stages: Mapping[str, Sequence[Link]], max_tokens: int) -> None:
        transformers.logging.set_verbosity_error()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.stages, self.max_tokens = dict(stages), max_tokens
        self.tokenizers = {name: load_stage_tokenizer(base, chain) for name, chain in stages.items()}
        whole = [load_tokenizer(base, extra_tokens=read_extra_tokens(base))] if base.extra_tokens else []
        links = {link.name: Path(link.folder) for chain in stages.values() for link in chain}
        model: Any = load_base(base, max([*self.tokenizers.values(), *whole], key=len), device)
        model = load_chain(model, list(links.items())) if links else model
        self.model = model
        self.fast = FastPaths(model) if device == "cuda" else None
        self.stage = next(iter(stages))
        self.switch(self.stage)

    def switch(self, stage: str) -> None:
        """Let another stage answer from now on; raises KeyError where there is none of that name."""
        chain = self.stages[stage]
        if any(self.stages.values()):
            activate(self.model, [link.name for link in chain])
        self.stage = stage

    def ask(self, question: str, write: Write) -> None:
        """Answer a question, which stands alone: what was asked before is not in the prompt."""
        tokenizer = self.tokenizers[self.stage]
        ids = torch.tensor(encode_prompts(tokenizer, [Example(question, "")]), device=self.model.device)
        known = set(tokenizer.get_vocab().values())
        rows = self.model.get_input_embeddings().weight.shape[0]
        with in_eval_mode(self.model), torch.no_grad():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=stop_token_ids(tokenizer, self.model),
                pad_token_id=get_pad_id(tokenizer),
                # Padding of the vocabulary, and words that only a later stage added.
                suppress_tokens=[i for i in range(rows) if i not in known] or None,
                streamer=_Streamer(tokenizer, write),
            )

    def weigh(self, question: McqRecord) -> Answer:
        """The letters' probabilities of a question, asked as the stage was trained: with its reasoning, or at once."""
        scoring, style = find_asking(self.stages[self.stage])
        settings = AnswerSettings(scoring=scoring, style=style, max_tokens=self.max_tokens)
        (answer,) = McqAnswerer(self.model, self.tokenizers[self.stage], settings, self.fast).answer([question])
        return answer


class _Streamer(transformers.TextStreamer):
    """Hands on whole words: a character of Korean may be made of several tokens."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what will not change any more."""
        self.write(text)
