"""Decoding of a batch as one step over static lanes, replayed as a CUDA graph.

An ordinary step of a 4B model launches some 3,000 kernels, which takes 20 to 50 times as long as reading its weights. A graph
launches them at once. It needs work that is the same each time, on memory that stays: `Lanes` for keys and values, and the
decoder's own state for everything else. Nothing in a step is decided by the host.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch

from medlora.answering.cuda.adapters import PreparedAdapters, PreparedStage
from medlora.answering.cuda.captures import Capture, CudaCapture, Replay
from medlora.answering.cuda.lanes import Lanes, find_mask_kinds, make_masks
from medlora.answering.prefix_cache import Prefix, compute_last_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

COLUMNS = 128
"""Lanes grow by so many columns: each width is a graph of its own, and columns beyond the last token are read, too."""

LEAST_ROWS = 8
"""A batch is not made smaller than this: a step of fewer rows takes as long, and would be a graph of its own."""

Shape = tuple[PreparedStage, int, int, float]
"""What a graph is for: a stage, rows, columns, and the temperature of sampling (0: greedy)."""


class Decoder:
    """Steps of one model over lanes that it keeps from batch to batch; `release` gives the memory back.

    Raises NotImplementedError for a model whose layers are neither full nor sliding attention.
    """

    def __init__(self, model: PreTrainedModel, adapters: PreparedAdapters, capture: Capture | None = None) -> None:
        self.model, self.adapters, self.device = model, adapters, torch.device(model.device)
        self.capture = capture or (CudaCapture() if self.device.type == "cuda" else None)
        self.config = model.config.get_text_config()
        self.kinds = find_mask_kinds(model)
        embeddings = cast(torch.nn.Embedding, model.get_input_embeddings())
        self.unknown = torch.zeros(embeddings.weight.shape[0], dtype=torch.bool, device=self.device)
        self.captured = self.replayed = self.ordinary = 0
        """Graphs recorded, steps replayed, ordinary steps."""
        self._waited = False
        self.release()

    def release(self) -> None:
        """Free lanes and graphs; the next batch makes them anew."""
        if self.captured and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last step of a batch may still be running
        self.lanes: Lanes | None = None
        self.graphs: dict[Shape, Replay] = {}
        self.stage: PreparedStage | None = None

    @contextmanager
    def releasing(self) -> Iterator[None]:
        """While inside, memory that runs out also gives lanes and graphs back; the error is raised on."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.release()
            raise

    # ---- a batch begins ---------------------------------------------------------------------------------------------

    def prefill(
        self, prompts: Sequence[Sequence[int]], pad_id: int, prefix: Prefix | None, new_tokens: int, temperature: float
    ) -> torch.Tensor:
        """Prefill the lanes; the logits after each prompt, [rows, vocabulary]."""
        longest, cached = max(map(len, prompts)), len(prefix.ids) if prefix else 0
        self.rows, self.temperature = round_up_to_power(len(prompts)), temperature
        lanes = self._reserve(self.rows, longest + new_tokens)
        self._enter_stage()
        lanes.restart(self.rows, self.round_up_columns(longest + new_tokens))
        padding = [longest - len(row) for row in prompts]
        pads = torch.tensor(padding, device=self.device)
        columns = torch.arange(longest, device=self.device)
        ids = [[pad_id] * pad + list(row) for pad, row in zip(padding, prompts, strict=True)]
        if prefix:
            lanes.put_prefix(prefix, pads, any(padding))
        positions = (columns[cached:] - pads[:, None]).clamp(min=0)
        logits = compute_last_logits(
            self.model,
            input_ids=torch.tensor([row[cached:] for row in ids], device=self.device),
            attention_mask=(columns >= pads[:, None]).long(),
            position_ids=positions,
            past_key_values=lanes,
            use_cache=True,
        )
        lanes.places.filled, lanes.places.decoding = longest, True
        lanes.places.column.fill_(longest)
        for state, values in ((self.token, 0), (self.position, positions[:, -1:] + 1), (self.pad, pads)):
            state[len(prompts) : self.rows] = 0  # rows that only fill the batch up: they see zeros and themselves
            state[: len(prompts)] = values
        return logits

    def round_up_columns(self, columns: int) -> int:
        """The width of lanes for so many tokens."""
        return -(-columns // COLUMNS) * COLUMNS

    def _reserve(self, rows: int, columns: int) -> Lanes:
        columns = self.round_up_columns(columns)
        if self.lanes is not None:
            places = self.lanes.places
            if rows <= places.most_rows and columns <= places.most_columns:
                return self.lanes
            rows, columns = max(rows, places.most_rows), max(columns, places.most_columns)
            self.release()  # first the old memory, then the new
        self.lanes = Lanes(self.config.num_hidden_layers, rows, columns, self.device)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.position, self.pad = torch.zeros_like(self.token), torch.zeros_like(self.token[:, 0])
        self.drawn = torch.zeros(rows, 1, dtype=torch.float64, device=self.device)
        return self.lanes

    def _enter_stage(self) -> None:
        self.stage = self.adapters.find()
        kept = {*self.adapters.stages.values()}
        self.graphs = {shape: graph for shape, graph in self.graphs.items() if shape[0] in kept}

    # ---- a token ----------------------------------------------------------------------------------------------------

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row [rows, 1]; sampled by `self.drawn` where there is a temperature."""
        logits = logits.float().masked_fill(self.unknown, -torch.inf)
        if not self.temperature:
            return logits.argmax(-1, keepdim=True)
        summed = (logits / self.temperature).softmax(-1).double().cumsum(-1)
        drawn = self.drawn[: len(logits)]
        return torch.searchsorted(summed, drawn * summed[:, -1:], right=True)

    def compute_logits(self) -> torch.Tensor:
        """The logits after the present token of every row, [rows, vocabulary]."""
        assert self.lanes is not None
        window = getattr(self.config, "sliding_window", None)
        masks = make_masks(self.kinds, self.lanes.places, self.pad[: self.rows], window, self.model.dtype)
        logits: torch.Tensor = self.model(
            input_ids=self.token[: self.rows],
            attention_mask=masks,
            position_ids=self.position[: self.rows],
            past_key_values=self.lanes,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def compute_step(self) -> None:
        """Everything between two tokens; reads and writes device memory alone."""
        assert self.lanes is not None
        self.token[: self.rows] = self.choose(self.compute_logits())
        self.position[: self.rows] += 1
        self.lanes.places.column += 1

    def step(self) -> None:
        """The next token of every row, into `self.token`."""
        assert self.lanes is not None and self.stage is not None
        places = self.lanes.places
        places.columns = min(self.round_up_columns(places.filled + 1), places.most_columns)
        shape = (self.stage, self.rows, places.columns, self.temperature)
        if self.capture and shape in self.graphs:
            self.graphs[shape]()
            self.replayed += 1
        else:
            # The first step of a shape is an ordinary one: it does its work, and libraries set themselves up for the capture.
            may_record = self._compute_watched()
            self.ordinary += 1
            if may_record and places.filled + 1 < places.columns:  # else the next step is one of another shape
                self._record(shape)
        places.filled += 1

    def _compute_watched(self) -> bool:
        """An ordinary step; whether it could have been captured.

        What is set up once - a kernel is compiled, a table is filled - may wait for the device in one step and never
        again. So graphs are given up where two watched steps in a row have waited.
        """
        if self.capture:
            try:
                with self.capture.watching():
                    self.compute_step()
                self._waited = False
                return True
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # LLM.int8 asks for outliers, some kinds of RoPE for the longest position
                if self._waited:
                    self._go_without(str(error))
                self._waited = True
        self.compute_step()  # what was begun has only written keys and values, which this writes again
        return False

    def _record(self, shape: Shape) -> None:
        assert self.capture is not None
        try:
            replay = self.capture.record(self)
            if self.captured or self._repeats(replay):  # one look is enough: what differs, differs in every shape
                self.graphs[shape] = replay
                self.captured += 1
            else:
                self._go_without("a replay does not give what the model gives")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._go_without(str(error))

    def _go_without(self, why: str) -> None:
        log.warning("generation goes on without CUDA graphs: %s", why.splitlines()[0] if why else "no reason given")
        self.capture = None
        self.graphs.clear()

    def _repeats(self, replay: Replay) -> bool:
        """Whether a replay writes the tokens that an ordinary step writes; leaves the state as it was."""
        assert self.lanes is not None
        state = (self.token, self.position, self.lanes.places.column)
        before = [tensor.clone() for tensor in state]
        found = []
        for run in (self.compute_step, replay):
            run()
            found.append(self.token[: self.rows].clone())
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        return torch.equal(*found)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in a batch of a smaller size."""
        assert self.lanes is not None
        size = max(round_up_to_power(len(rows)), min(LEAST_ROWS, self.rows))
        places = torch.tensor([*rows, *[rows[0]] * (size - len(rows))], device=self.device)
        self.lanes.keep_rows(places)
        for state in (self.token, self.position, self.pad, self.drawn):
            state[:size] = state[places]
        self.rows = size


def round_up_to_power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def round_down_to_power(n: int) -> int:
    """The greatest power of two that is not above n."""
    return 1 << (n.bit_length() - 1)
