"""Samples from documents as they are read: for corpora too large to prepare, on the Hub or in local files.

Documents are split over the ranks first and packed by each rank for itself. The order is that of the source, or of a
shuffle buffer; unlike prepared data it is not the same for other numbers of ranks. A stream knows its place: after a
resume it goes on bit for bit, unless there is a shuffle buffer, which is filled anew and gives another order.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from data_sources import KNOWN_CORPORA, DataSource, Kind, is_held_out, load_hub_dataset, read_documents
from masked_proteins import check_masking, encode_residues, mask_sequence
from recipe_error import RecipeError
from text_blocks import block_sample
from transformers import PreTrainedTokenizerBase

DOCUMENTS_AT_ONCE = 64
SAMPLES_AHEAD = 256  # read and tokenized before they are asked for
SAMPLES_BACK = 4096  # of which the place is known: more than lie between reading a sample and training on it

Sample = dict[str, np.ndarray]


class Place(NamedTuple):
    """Where a stream was after ``samples`` samples: the state of the documents, and the tokens left over."""

    samples: int
    documents: dict[str, Any]
    left_over: list[int]


def read_local(files: Sequence[str], kind: Kind, column: str | None) -> Iterator[dict[str, str]]:
    """Yield the documents of files as rows; a section of a .txt file is a document."""
    source = DataSource(tuple(map(Path, files)), column=column)
    for piece in read_documents(source, kind):
        yield {"document": piece.text, "place": piece.place}


class DocumentStream(torch.utils.data.IterableDataset[Sample]):
    """One rank's samples, without end: the source is read again and again.

    The documents that `is_held_out` holds out are left out. Iterate in the process that trains (no loader workers): a
    thread reads ahead.

    Args:
        source: documents, not tokens.
        kind: "text" or "proteins".
        validation_fraction: in [0, 1).
        rank: of ``world_size``.
        seed: of the shuffle buffer, crops and masks.
        shuffle_buffer: documents among which the next is drawn; 0 keeps the order of the source.

    Raises:
        RecipeError: if the source cannot be streamed.
    """

    def __init__(
        self,
        source: DataSource,
        kind: Kind,
        *,
        validation_fraction: float,
        rank: int,
        world_size: int,
        seed: int,
        shuffle_buffer: int,
    ) -> None:
        if source.holds_tokens:
            raise RecipeError(f"--streaming: {source.files[0]} holds tokens already; leave the flag out")
        if source.dataset_name in KNOWN_CORPORA and KNOWN_CORPORA[source.dataset_name].rows_are_lines:
            raise RecipeError(f"--streaming: the rows of {source.dataset_name} are lines; leave the flag out")
        try:
            import datasets
            from datasets.distributed import split_dataset_by_node
        except ImportError as error:
            raise RecipeError("--streaming needs the package datasets: pip install datasets") from error
        if source.dataset_name is not None:
            documents = load_hub_dataset(source, streaming=True)
            self.column, self.name = str(source.column), source.dataset_name
        else:
            options = {"files": [str(file) for file in source.files], "kind": kind, "column": source.column}
            documents = datasets.IterableDataset.from_generator(read_local, gen_kwargs=options)
            self.column, self.name = "document", str(source.files[0])
        if shuffle_buffer:
            documents = documents.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.documents = split_dataset_by_node(documents, rank=rank, world_size=world_size)
        self.validation_fraction = validation_fraction
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.passes = 0
        self._start = Place(0, {}, [])
        self._skip = 0
        self._places: deque[Place] = deque()
        self._error: BaseException | None = None

    def samples_of(
        self, rows: Sequence[dict[str, Any]], left_over: list[int], number: int
    ) -> tuple[list[Sample], list[int]]:
        """Turn documents into samples, the first with this number; returns them and the tokens left over."""
        raise NotImplementedError

    def state_dict(self, samples: int) -> dict[str, Any]:
        """Return this rank's place after the first ``samples`` samples of the run, as JSON can hold it.

        Raises:
            ValueError: if the stream has not come so far, or is further than it remembers.
        """
        place = next((place for place in reversed(self._places) if place.samples <= samples), None)
        if place is None:
            raise ValueError(f"the place after {samples} samples is not known")
        return {"world_size": self.world_size, "rank": self.rank, "skip": samples - place.samples, **place._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place at the next iteration.

        Raises:
            RecipeError: if it was saved by another rank, or a run of another number of ranks.
        """
        if (state["rank"], state["world_size"]) != (self.rank, self.world_size):
            raise RecipeError(
                f"this stream was saved by rank {state['rank']} of {state['world_size']} and is read by rank "
                f"{self.rank} of {self.world_size}: resume with as many processes"
            )
        self._start = Place(state["samples"], state["documents"], state["left_over"])
        self._skip = state["skip"]

    def __iter__(self) -> Iterator[Sample]:
        if torch.utils.data.get_worker_info() is not None:
            raise RecipeError(
                "--streaming keeps its place in the process that trains: give --dataloader_num_workers 0"
            )
        waiting: queue.Queue[Sample | Place | None] = queue.Queue(SAMPLES_AHEAD)
        stopped = threading.Event()
        self._places.clear()
        reader = threading.Thread(target=self._read, args=(waiting, stopped), daemon=True)
        reader.start()
        skip = self._skip
        try:
            while (item := waiting.get()) is not None:
                if isinstance(item, Place):
                    self._places.append(item)
                    while len(self._places) > 1 and self._places[1].samples + SAMPLES_BACK < item.samples:
                        self._places.popleft()
                elif skip:
                    skip -= 1
                else:
                    yield item
            assert self._error is not None
            raise self._error
        finally:
            stopped.set()
            while not waiting.empty():  # lets a reader that waits for room see that it is stopped
                waiting.get_nowait()
            reader.join()

    def _read(self, waiting: "queue.Queue[Sample | Place | None]", stopped: threading.Event) -> None:
        """Put places and samples into the queue, None after an error."""

        def put(item: Sample | Place | None) -> bool:
            while not stopped.is_set():
                try:
                    waiting.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        number, state, left_over = self._start
        try:
            if state:
                self.documents.load_state_dict(state)
                self.passes = int(state["epoch"])
            while True:
                self.documents.set_epoch(self.passes)
                found = False
                for rows, place in self._batches():
                    if not put(Place(number, place, left_over)):
                        return
                    samples, left_over = self.samples_of(rows, left_over, number)
                    number += len(samples)
                    found = True
                    if not all(map(put, samples)):
                        return
                if not found and not state:
                    raise RecipeError(f"{self.name} holds no documents for rank {self.rank}")
                state = {}
                self.passes += 1
        except BaseException as error:  # handed to the process that trains
            self._error = error
            put(None)

    def _batches(self) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """Yield the documents of one pass a few at a time, each with the state from which they are read."""
        rows: list[dict[str, Any]] = []
        place = self.documents.state_dict()
        for row in self.documents:
            text = row[self.column]
            if text and text.strip() and not is_held_out(text, self.validation_fraction):
                rows.append({"document": text, "place": row.get("place", self.name)})
            if len(rows) == DOCUMENTS_AT_ONCE:
                yield rows, place
                rows, place = [], self.documents.state_dict()
        if rows:
            yield rows, place


class TextStream(DocumentStream):
    """A rank's blocks of tokens with their targets, as `text_blocks.TextBlocks` has them; documents packed in order.

    Args:
        source: text.
        tokenizer: with an end-of-text token, which closes each document.
        block_size: inputs in a block.
    """

    def __init__(
        self,
        source: DataSource,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        validation_fraction: float,
        rank: int,
        world_size: int,
        seed: int = 0,
        shuffle_buffer: int = 0,
    ) -> None:
        super().__init__(
            source,
            "text",
            validation_fraction=validation_fraction,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle_buffer=shuffle_buffer,
        )
        self.tokenizer = tokenizer
        self.block_size = block_size

    def samples_of(
        self, rows: Sequence[dict[str, Any]], left_over: list[int], number: int
    ) -> tuple[list[Sample], list[int]]:
        texts = [row["document"] for row in rows]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        tokens = [*left_over]
        for ids in encoded["input_ids"]:
            tokens += [*ids, self.tokenizer.eos_token_id]
        stream = np.array(tokens, dtype=np.int64)
        count = (len(stream) - 1) // self.block_size
        starts = range(0, count * self.block_size, self.block_size)
        samples = [block_sample(stream[start : start + self.block_size + 1]) for start in starts]
        return samples, tokens[count * self.block_size :]


class ProteinStream(DocumentStream):
    """A rank's masked sequences, as `masked_proteins.MaskedProteins` has them.

    Args:
        source: sequences.
        max_length: of a sample, with ``<cls>`` and ``<eos>``.
        mask_fraction: of the residues, in (0, 1).
    """

    def __init__(
        self,
        source: DataSource,
        max_length: int,
        *,
        validation_fraction: float,
        rank: int,
        world_size: int,
        seed: int = 0,
        shuffle_buffer: int = 0,
        mask_fraction: float = 0.15,
    ) -> None:
        check_masking(max_length, mask_fraction)
        super().__init__(
            source,
            "proteins",
            validation_fraction=validation_fraction,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle_buffer=shuffle_buffer,
        )
        self.max_length = max_length
        self.mask_fraction = mask_fraction

    def samples_of(
        self, rows: Sequence[dict[str, Any]], left_over: list[int], number: int
    ) -> tuple[list[Sample], list[int]]:
        samples: list[Sample] = []
        for row in rows:
            residues = encode_residues(row["document"], row["place"])
            if len(residues):
                rng = np.random.default_rng([self.seed, self.rank, number + len(samples)])
                samples.append(mask_sequence(residues, self.max_length, rng, self.mask_fraction))
        return samples, left_over
