"""The miniature's tokenizer: byte-fallback BPE over whole words, with Gemma's turns."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medlora.miniature.corpus import EXTRA_TOKENS
from medlora.miniature.facts import MEDICAL, Fact
from medlora.miniature.general import GENERAL
from medlora.miniature.settings import CHAT_TEMPLATE, SPECIAL, VOCABULARY
from medlora.miniature.wording import QUESTIONS, STATEMENTS, word_fact_in_english
from medlora.prompts import render
from medlora.records import FIELDS, LETTERS, McqRecord, TranslationRecord


def _template_words() -> list[str]:
    """The words of every template without the words of facts, which must not grow together with their particles."""
    # A fact made of marks leaves only the words around it.
    marks = Fact(*["※"] * 7)
    questions = [word for wordings in QUESTIONS.values() for word in wordings]
    texts = [re.sub(r"\{[^}]*\}", "※", template) for template in (*STATEMENTS, *questions)]
    texts += [word_fact_in_english(marks)]
    record = McqRecord("1", "※", ("※",) * 5, "A", rationale={field: "※" for field in FIELDS})
    pair = TranslationRecord("2", "medicine: ※", "의학: ※")
    for example in (*render(record), *render(record, "reasoning_full", worked=record), *render(pair)):
        texts += [example.prompt, example.completion]
    texts += ["user\n", "model\n", "은 는 이 가 을 를 으로 로 의"]
    return [piece for text in texts for piece in re.findall(r" ?[^\s※.:?]+", text)]


def _words(facts: tuple[Fact, ...]) -> list[str]:
    """The words of the facts, each behind a space, without EXTRA_TOKENS; Korean thrice, so that it merges first."""
    korean = [cell for f in facts for cell in (f.subject, f.relation, f.term, f.answer)] * 3
    english = [cell for f in facts for cell in (f.relation_en, f.term_en, f.answer_en)]
    return [f" {word}" for cell in (*korean, *english) for word in cell.split() if word not in EXTRA_TOKENS]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer with chat template, trained on words instead of sentences.

    In so small a corpus sentences would merge terms with their particles, and a term would be another token in each
    place. For the same reason a space belongs to the word behind it, as in Gemma, and "\\n . : ?" are tokens of their
    own.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[\n.:?]"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = _words(MEDICAL + GENERAL)
    # Held-out words lend their syllables, not their merges: no piece of them may be unknown.
    alphabet = sorted({character for word in EXTRA_TOKENS for character in word} | set(LETTERS) | set("\n.:?▁"))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL, *bytes_],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, *_template_words() * 20], trainer)
    return _as_transformers(tokenizer)


def _as_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
