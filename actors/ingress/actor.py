"""The ingress actor: HTTP on one side, mailboxes on the other, one event loop between them."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from pathlib import Path

import msgspec
import uvicorn
import uvloop
import zmq

from llm_runtime.actors.actor import Actor, Context, StartFailure, handles, role_of
from llm_runtime.actors.ingress.app import create_app
from llm_runtime.actors.ingress.config import IngressConfig, ServedModel
from llm_runtime.actors.ingress.control import Control
from llm_runtime.actors.ingress.crash_dumps import CrashDumps
from llm_runtime.actors.ingress.encoders import Encoders
from llm_runtime.actors.ingress.engines import Engines
from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.exchange import SHUTTING_DOWN
from llm_runtime.actors.ingress.history import FORGET_AFTER_S
from llm_runtime.actors.ingress.journal import Journal, slot_bytes
from llm_runtime.actors.ingress.ledger import Ledger
from llm_runtime.actors.ingress.metrics import INCARNATION, ActorFigures, IngressMetrics
from llm_runtime.actors.ingress.node_status import requests_of
from llm_runtime.actors.ingress.recent import RecentRequests
from llm_runtime.actors.ingress.server import Server
from llm_runtime.actors.ingress.service import Served, Service
from llm_runtime.actors.ingress.tokenization import Answer, Tokenization
from llm_runtime.actors.ingress.tracing import Tracing
from llm_runtime.actors.messages import (
    ActorStats,
    CacheFlushed,
    Detokenized,
    Embedded,
    EmbedRefused,
    EndRequests,
    ListRequests,
    Profiled,
    Refused,
    Registry,
    RequestsListed,
    SpanEnded,
    Texts,
    Tokenized,
    TokenizeFailed,
    TokenizerDescribed,
    Unknown,
)
from llm_runtime.actors.parsers.reasoning import reasoning_format
from llm_runtime.actors.parsers.tool_calls import tool_call_format

logger = logging.getLogger(__name__)

LISTENER = "listener"
"""Name of the inherited descriptor: a listening socket that all ingress workers share."""
JOURNAL = "journal"
"""Name, after the worker's own and a dot, of the inherited descriptor of its journal."""
TICK_S = 0.25
KEEP_ALIVE_S = 75
END_S = 2
"""After the drain deadline, for streams to send their last event."""


class Ingress(Actor):
    """One worker of the HTTP ingress.

    Instead of the actor's synchronous loop it runs an asyncio loop, which is woken by the mailbox's descriptor.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.config = msgspec.convert(self.args.config, IngressConfig)
        self.metrics = IngressMetrics(each.model for each in self.config.models)
        self.actors = ActorFigures()
        self.engines = Engines([each.model for each in self.config.models], self.mailbox.add_peer)
        self.tracing = self._tracing()
        self.ledger = Ledger(self.send, self.engines, self.metrics, self.config.stall_s, time.monotonic, self.tracing)
        self.models = [self._served(model) for model in self.config.models]
        self.control = Control(self.send, [peer for peer in self.args.peers if role_of(peer) == "ingress"])
        self.service = Service(
            self.config,
            self.name,
            self.ledger,
            self.models,
            self.metrics,
            self.actors,
            self.all_stats,
            self.control,
            self.tracing,
            self._recent(),
        )
        self.crash_dumps = None if self.service.recent is None else CrashDumps(self.service.recent)
        self.every(1.0, self._remember)
        self._server: Server
        self._crash: asyncio.Future[None]

    # -- life -----------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        descriptor = self.context.descriptors.get(LISTENER)
        if descriptor is None:
            raise StartFailure(f"{self.name} needs a listening socket: pass it as the descriptor '{LISTENER}'")
        listener = socket.socket(fileno=descriptor)
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise StartFailure(f"the descriptor '{LISTENER}' of {self.name} is not a listening socket")
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config = uvicorn.Config(
            create_app(self.service),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(self.config.drain_s) + END_S,
        )
        self._server = Server(config, listener, self._journal(), self.context, self.metrics.counters)

    def _served(self, model: ServedModel) -> Served:
        if model.tool_call_parser is not None:
            tool_call_format(model.tool_call_parser)  # so that it is refused now if it cannot be used
        if model.reasoning_parser is not None:
            reasoning_format(model.reasoning_parser)
        stall_s = self.config.stall_s
        return Served(
            model,
            Tokenization(self.send, model.tokenizer, stall_s, time.monotonic),
            Encoders(self.send, model.encoders, self.metrics.of(model.model), stall_s, time.monotonic),
        )

    def _recent(self) -> RecentRequests | None:
        if not self.config.crash_dump_dir:
            return None
        crashes = self.context.run_dir / "crashes"
        return RecentRequests(Path(self.config.crash_dump_dir), crashes, self.name, self.args.peers)

    def _tracing(self) -> Tracing | None:
        if self.config.tracing is None:
            return None
        from llm_runtime.actors.ingress.span_export import OtlpExporter  # its library is an extra

        return Tracing(self.config.tracing, OtlpExporter(self.config.tracing), self.name, self.incarnation)

    def _journal(self) -> Journal | None:
        """The memory file in which open connections are journalled, if there is one."""
        descriptor = self.context.descriptors.get(f"{self.name}.{JOURNAL}")
        if descriptor is None:
            return None
        return Journal(descriptor, slot_bytes(self.config.max_body_bytes), self.config.journal_bytes)

    def loop(self) -> None:
        """Serves HTTP and messages until shutdown is requested and running answers have ended."""
        loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._serve())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
            if self.tracing is not None:
                self.tracing.close()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._crash = loop.create_future()
        mailbox_fds = [int(inbox.getsockopt(zmq.FD)) for inbox in self.mailbox.sockets]
        for fd in mailbox_fds:
            loop.add_reader(fd, self._guarded_drain)
        loop.add_reader(self.link.shutdown_fd, self._shut_down)
        ticker = loop.create_task(self._tick())
        server = loop.create_task(self._server.serve())
        if self.crash_dumps is not None and self.incarnation > 1:
            self.crash_dumps.suspect(self.name, self.incarnation - 1)
        try:
            done, _ = await asyncio.wait({server, ticker, self._crash}, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            for fd in mailbox_fds:
                loop.remove_reader(fd)
            loop.remove_reader(self.link.shutdown_fd)
            ticker.cancel()
            self.ledger.flush()

    def _guarded_drain(self) -> None:
        """Takes what waits in the mailbox. Its descriptors only tell of changes, so whatever is left is taken on the
        loop's next round, after HTTP has had its turn."""
        try:
            self.drain()
            self.ledger.flush()
            if self.mailbox.waiting:
                asyncio.get_running_loop().call_soon(self._guarded_drain)
        except Exception as error:
            if not self._crash.done():
                self._crash.set_exception(error)

    async def _tick(self) -> None:
        """Everything that time brings. As long as this runs, the loop is not hung."""
        while True:
            self.link.doing("serving", self.args.busy_limit_s)
            self._guarded_drain()
            self._run_timers()
            self.ledger.watch()
            for each in self.models:
                each.tokenization.watch()
                each.encoders.watch()
            self.ledger.flush()
            self._server.abort_stalled(self.config.client_stall_s)
            await asyncio.sleep(TICK_S)

    def _shut_down(self) -> None:
        """Refuses new requests; running answers may go on for a while."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.link.shutdown_fd)
        self.service.draining = True
        self._server.should_exit = True
        loop.call_later(self.config.drain_s, self._end_answers)

    def _end_answers(self) -> None:
        error = ApiError(503, "The server is shutting down.", code=SHUTTING_DOWN, retry_after_s=1.0)
        for exchange in list(self.service.in_progress):
            exchange.interrupt(error)

    # -- figures --------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        figures = self.metrics.figures()
        figures[INCARNATION] = float(self.incarnation)
        figures["requests_in_progress"] = float(len(self.service.in_progress))
        figures["requests_live"] = float(len(self.ledger.live))
        figures["connections_open"] = float(len(self._server.server_state.connections))
        figures["tokenizations_pending"] = float(sum(len(each.tokenization) for each in self.models))
        figures["embeddings_pending"] = float(sum(len(each.encoders) for each in self.models))
        return figures

    def _remember(self) -> None:
        now = time.monotonic()
        self.actors.update(self.name, self.all_stats(), now)
        self.service.history.add(time.time(), self.actors.since(now - FORGET_AFTER_S))

    @handles(ActorStats)
    def actor_stats(self, message: ActorStats, sender: str) -> None:
        self.actors.update(sender, {**message.figures, INCARNATION: message.incarnation}, time.monotonic())

    @handles(SpanEnded)
    def span_ended(self, message: SpanEnded, sender: str) -> None:
        if self.tracing is not None:
            self.tracing.received(sender, message)

    # -- messages -------------------------------------------------------------------------------------------------

    def peer_started(self, peer: str, incarnation: int) -> None:
        if self.crash_dumps is not None:
            self.crash_dumps.peer_started(peer, incarnation)
        for each in self.models:
            if peer == each.model.tokenizer:
                each.tokenization.tokenizer_started()
                return
            if peer in each.model.encoders:
                each.encoders.encoder_started(peer)
                return
        self.ledger.scheduler_started(peer)

    @handles(Texts)
    def texts(self, message: Texts, sender: str) -> None:
        self.ledger.texts(message.events)

    @handles(Refused)
    def refused(self, message: Refused, sender: str) -> None:
        self.ledger.refused(message)

    @handles(Embedded)
    def embedded(self, message: Embedded, sender: str) -> None:
        for each in self._of_encoder(sender):
            each.answered(message)

    @handles(EmbedRefused)
    def embed_refused(self, message: EmbedRefused, sender: str) -> None:
        for each in self._of_encoder(sender):
            each.refused(message)

    @handles(Unknown)
    def unknown(self, message: Unknown, sender: str) -> None:
        self.ledger.unknown(message)

    @handles(Registry)
    def registry(self, message: Registry, sender: str) -> None:
        self.ledger.registry(message.engines)

    @handles(CacheFlushed)
    def cache_flushed(self, message: CacheFlushed, sender: str) -> None:
        self.control.answered(message, sender)

    @handles(Profiled)
    def profiled(self, message: Profiled, sender: str) -> None:
        self.control.answered(message, sender)

    @handles(EndRequests)
    def end_requests(self, message: EndRequests, sender: str) -> None:
        self.service.end(message.name)

    @handles(ListRequests)
    def list_requests(self, message: ListRequests, sender: str) -> None:
        self.send(sender, requests_of(self.service, message.rid))

    @handles(RequestsListed)
    def requests_listed(self, message: RequestsListed, sender: str) -> None:
        self.control.answered(message, sender)

    @handles(Tokenized)
    def tokenized(self, message: Tokenized, sender: str) -> None:
        self._tokenizer_answered(message)

    @handles(TokenizeFailed)
    def tokenize_failed(self, message: TokenizeFailed, sender: str) -> None:
        self._tokenizer_answered(message)

    @handles(Detokenized)
    def detokenized(self, message: Detokenized, sender: str) -> None:
        self._tokenizer_answered(message)

    @handles(TokenizerDescribed)
    def tokenizer_described(self, message: TokenizerDescribed, sender: str) -> None:
        self._tokenizer_answered(message)

    def _of_encoder(self, sender: str) -> list[Encoders]:
        """Who waits for an encoder."""
        return [each.encoders for each in self.models if sender in each.model.encoders]

    def _tokenizer_answered(self, message: Answer) -> None:
        for each in self.models:
            each.tokenization.answered(message)
