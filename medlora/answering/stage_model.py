"""A base model with the adapters of several stages; it is built once and answers questions with each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import transformers
from transformers import PreTrainedModel

from medlora.answering.answerer import AnswerSettings, McqAnswerer, find_letter_ids
from medlora.answering.cuda.fast_paths import FastPaths
from medlora.answering.rotations import predict
from medlora.artifacts.bases import read_extra_tokens
from medlora.config.evaluation import EvaluationConfig
from medlora.config.model import BaseModelConfig
from medlora.curriculum.chains import Link
from medlora.evaluation.predictions import Prediction
from medlora.model.base import dequantize_base, load_base
from medlora.model.chain import activate, load_chain
from medlora.model.tokenizer import load_stage_tokenizer, load_tokenizer
from medlora.records import McqRecord


class StageModel:
    """One base with every adapter of `stages` (name -> chain); activating another stage loads nothing.

    Each stage answers with its own tokenizer, so the plain base does not see words that a phase added. `shots` and `worked`
    are solved questions that every prompt shows, see `medlora.evaluation.questions.read_asked`. Raises InputError, before
    the model is loaded, when a tokenizer cannot answer with one of `letters`. `weights` says what the base computes with where
    that is not what the config names.
    """

    def __init__(
        self,
        base: BaseModelConfig,
        stages: Mapping[str, Sequence[Link]],
        config: EvaluationConfig,
        device: str = "cpu",
        seed: int = 0,
        shots: Sequence[McqRecord] = (),
        worked: McqRecord | None = None,
        letters: str = "",
    ) -> None:
        transformers.logging.set_verbosity_error()
        self.rotations = config.rotations
        self.chains = {name: list(chain) for name, chain in stages.items()}
        tokenizers = {name: load_stage_tokenizer(base, chain) for name, chain in self.chains.items()}
        if config.scoring in ("letter", "reason"):
            for tokenizer in tokenizers.values():
                find_letter_ids(tokenizer, config.style, letters)
        links = {link.name: Path(link.folder) for chain in self.chains.values() for link in chain}
        # The head covers the run's final vocabulary, whichever stages are here: a head of another width may round otherwise.
        whole = [load_tokenizer(base, extra_tokens=read_extra_tokens(base))] if base.extra_tokens else []
        quantized = base.model_copy(update={"dequantize": False})
        model = load_base(quantized, max([*tokenizers.values(), *whole], key=len), device)
        wanted = "always" if base.dequantize else config.dequantize
        self.weights = dequantize_base(model, wanted) if base.quantization != "none" else ""
        self.model = load_chain(model, list(links.items()))
        settings = AnswerSettings(
            scoring=config.scoring,
            style=config.style,
            worked=worked,
            shots=tuple(shots),
            max_tokens=config.max_tokens,
            token_budget=config.token_budget,
            normalisation=config.normalisation,
            samples=config.samples,
            temperature=config.temperature,
            seed=seed,
        )
        # A PeftModel hands on to the model below it what it does not have itself.
        whole_model = cast(PreTrainedModel, self.model)
        # What a GPU keeps from stage to stage and from batch to batch.
        fast = FastPaths(whole_model) if whole_model.device.type == "cuda" else None
        self.answerers = {name: McqAnswerer(whole_model, each, settings, fast) for name, each in tokenizers.items()}

    def answer(
        self, tests: Sequence[str], records: Sequence[McqRecord], stages: Sequence[str] | None = None
    ) -> list[Prediction]:
        """A prediction for each question and each of `stages` (unset = all); `tests` names the test of each question."""
        predictions = []
        for stage in self.chains if stages is None else stages:
            activate(self.model, [link.name for link in self.chains[stage]])
            predictions += predict(self.answerers[stage], tests, records, stage, self.rotations)
        return predictions
