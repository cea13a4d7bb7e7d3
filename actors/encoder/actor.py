"""The encoder actor: embeds or classifies sequences. It owns nothing: what it loses is sent again by the ingresses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from llm_runtime.actors.actor import Actor, BadMessage, StartFailure, handles
from llm_runtime.actors.checkpoint import CheckpointError, PoolingConfig, read_pooling_config
from llm_runtime.actors.encoder.config import EncoderConfig
from llm_runtime.actors.encoder.models.bert import Bert
from llm_runtime.actors.encoder.models.decoder import Decoder
from llm_runtime.actors.encoder.queue import Queue, Request
from llm_runtime.actors.messages import Abort, Embed, Embedded, EmbedRefused, TokenSequence

Vectors = NDArray[np.float32]


class Vectorizer(Protocol):
    """A model with its pooling and head."""

    nbytes: int

    def vectors(self, sequences: Sequence[Tensor], types: Sequence[Tensor | None]) -> Tensor:
        """The answers to sequences of token ids, int64 [length], the short ones first: float32 [n, vector size].

        types: token type ids of each, None for zeros.
        """
        ...


class Encoder(Actor):
    """Answers `Embed`: computes what waits in batches, and looks into the mailbox between them."""

    def setup(self) -> None:
        """Maps the weights and computes once, so that the first request is as fast as the others."""
        self.config = msgspec.convert(self.args.config, EncoderConfig)
        self.queue = Queue(self.config.chunk_tokens)
        self.sequences = self.tokens = self.batches = 0
        self.busy_s = 0.0
        self._due = False
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        try:
            self.pooling, self.model = self._load()
            self._vectors([TokenSequence(0, b"\0\0\0\0")])
        except CheckpointError as error:
            raise StartFailure(str(error)) from None

    @handles(Embed)
    def embed(self, message: Embed, sender: str) -> None:
        """Queues a request."""
        try:
            for sequence in message.sequences:
                self._check(sequence)
        except BadMessage as error:
            self.send(sender, EmbedRefused(message.rid, 400, f"The text cannot be computed: {error}."))
            return
        request = sender, message.rid
        if len(self.queue) >= self.config.max_queue and request not in self.queue:
            self.send(sender, EmbedRefused(message.rid, 429, "The engine's queue is full.", 1.0))
            return
        self.queue.put(request, message.sequences)
        self._continue()

    @handles(Abort)
    def abort(self, message: Abort, sender: str) -> None:
        """Forgets a request."""
        self.queue.drop((sender, message.rid))

    def peer_started(self, peer: str, incarnation: int) -> None:
        self.queue.drop_of(peer)

    def stats(self) -> dict[str, float]:
        """Requests that wait, what has been computed, and the seconds that it took."""
        return {
            "num_queue_reqs": float(len(self.queue)),
            "encoder_sequences": float(self.sequences),
            "encoder_tokens": float(self.tokens),
            "encoder_batches": float(self.batches),
            "encoder_seconds": self.busy_s,
            "weights_bytes": float(self.model.nbytes),
        }

    def _load(self) -> tuple[PoolingConfig, Vectorizer]:
        config, path = self.config, Path(self.config.model)
        pooling = read_pooling_config(path, config.task)
        if config.max_model_len > pooling.max_position:
            raise StartFailure(
                f"max_model_len = {config.max_model_len} is more than the model's {pooling.max_position}: lower it"
            )
        if pooling.encoder is not None:
            return pooling, Bert(path, pooling)
        arena = self.context.descriptors.get(config.weights_arena)
        if arena is None:
            raise StartFailure(f"{self.name} needs an arena for weights: pass it as a descriptor")
        most = max(config.chunk_tokens, config.max_model_len)
        return pooling, Decoder(path, pooling, config.dtype, arena, most, config.max_model_len)

    def _check(self, sequence: TokenSequence) -> None:
        length, odd = divmod(len(sequence.tokens), 4)
        if odd or not 1 <= length <= self.config.max_model_len or len(sequence.types) not in (0, length):
            raise BadMessage(f"a sequence of {len(sequence.tokens)} bytes, with {len(sequence.types)} types")
        ids = np.frombuffer(sequence.tokens, "<i4")
        if ids.min() < 0 or ids.max() >= self.pooling.vocab_size:
            raise BadMessage("a token is outside the vocabulary")
        encoder = self.pooling.encoder
        if sequence.types and (encoder is None or max(sequence.types) >= encoder.types):
            raise BadMessage("a token type is not one of the model's")

    def _continue(self) -> None:
        """Computes a batch after the messages that wait now."""
        if not self._due and len(self.queue):
            self._due = True
            self.after(0.0, self._compute)

    def _compute(self) -> None:
        self._due = False
        batch = self.queue.take()
        if batch:
            began = time.perf_counter()
            vectors = self._vectors([sequence for _, sequence in batch])
            self._answer(batch, vectors)
            self.batches += 1
            self.sequences += len(batch)
            self.tokens += sum(len(sequence.tokens) // 4 for _, sequence in batch)
            self.busy_s += time.perf_counter() - began
        self._continue()

    @torch.inference_mode()
    def _vectors(self, sequences: Sequence[TokenSequence]) -> Vectors:
        ids = [torch.from_numpy(np.frombuffer(each.tokens, "<i4").astype(np.int64)) for each in sequences]
        types = [
            torch.from_numpy(np.frombuffer(each.types, np.uint8).astype(np.int64)) if each.types else None
            for each in sequences
        ]
        vectors = self.model.vectors(ids, types)
        if self.pooling.normalize:
            vectors = normalize(vectors, dim=1)
        return vectors.numpy().astype("<f4", copy=False)

    def _answer(self, batch: Sequence[tuple[Request, TokenSequence]], vectors: Vectors) -> None:
        rows: dict[Request, list[int]] = {}
        for row, (request, _) in enumerate(batch):
            rows.setdefault(request, []).append(row)
        for (ingress, rid), of_request in rows.items():
            places = np.array([batch[row][1].place for row in of_request], "<i4")
            self.send(ingress, Embedded(rid, places.tobytes(), vectors[of_request].tobytes()))
