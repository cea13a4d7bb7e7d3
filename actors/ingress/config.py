"""What an ingress worker is told by the topology."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from llm_runtime.actors.checkpoint import CheckpointFacts, SamplingDefaults
from llm_runtime.actors.ingress.tracing import TracingConfig

Seconds = Annotated[float, Meta(gt=0, le=7 * 24 * 3600)]
Count = Annotated[int, Meta(ge=1, lt=2**31)]


class ServedModel(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model that clients can ask for.

    Attributes:
        model: the model that engines must have registered with, `EngineInfo.model`. Empty: any.
        served_model_names: names under which clients may ask for the model; the first one is used in answers.
        max_model_len: context length in tokens, prompt and output together.
        vocab_size: token ids of clients must be below this.
        eos_token_ids: ids that end an answer, unless the client asks for `ignore_eos`.
        sampling: parameters of requests that do not give them.
        tokenizer: name of the actor that tokenizes.
        tool_call_parser: the format in which the model calls tools; None leaves its calls in the content.
        reasoning_parser: the format of the model's reasoning; None leaves it in the content.
        task: what the model is for. encoders: the actors that embed or classify, where it is for that.
        vector_size: numbers of an embedding, or one a label.
        labels: a classifier's classes. activation: what makes scores of its numbers.
        files: what the checkpoint says about itself.
    """

    served_model_names: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]
    max_model_len: Count
    vocab_size: Count
    model: str = ""
    eos_token_ids: list[Annotated[int, Meta(ge=0, lt=2**31)]] = []
    sampling: SamplingDefaults = SamplingDefaults()
    tokenizer: str = "tokenizer"
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    task: Literal["generate", "embed", "classify"] = "generate"
    encoders: list[str] = []
    vector_size: Annotated[int, Meta(ge=0)] = 0
    labels: list[str] = []
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    files: CheckpointFacts = CheckpointFacts()

    @property
    def name(self) -> str:
        """The name that is used in answers to requests that give none."""
        return self.served_model_names[0]

    @property
    def root(self) -> str:
        """What the engines call it."""
        return self.model or self.name


class IngressConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `config` of an ingress worker's child spec.

    Attributes:
        models: what is served; no two share a name.
        api_key: what clients must send as `Authorization: Bearer KEY`; None lets everybody in.
        admin_api_key: what administrators must send; None lets those in who may ask for anything.
        cors_origins: web pages of other servers that may ask, `*` for all of them.
        allowed_hosts: names under which the server may be asked, besides those of this machine; None for any.
        request_timeout_s: a request that takes longer ends with an error.
        drain_s: after a shutdown request, how long running answers may go on. Must be below the child spec's
            `shutdown` time by a few seconds.
        client_stall_s: a client that reads nothing for so long is disconnected.
        stall_s: a request without any progress for so long is asked for again; doubles up to a minute.
        max_body_bytes: larger request bodies are refused with status 413.
        max_stop_strings: how many stop strings a request may have.
        max_n: how many answers to one prompt a client may ask for.
        max_concurrent: requests in progress in this worker; more are refused with status 503.
        journal_bytes: memory that the journal of open connections may take; those beyond it do not survive this worker.
        status_socket: path of a Unix socket at which the node tells its supervision tree; empty if there is none.
        tracing: where spans go; None traces nothing.
        access_log: one line for each request that has been answered.
        cache_report: whether answers say how many tokens of the prompt were cached.
        priority: who may say how urgent a request is; administrators can only where they have a key.
        response_dir: where responses are stored, shared by all workers of the node; empty for nowhere.
        response_store_bytes: what they may take there; 0 stores nothing.
        crash_dump_dir: where requests are written that were in progress when an actor crashed; empty for nowhere.
    """

    models: Annotated[list[ServedModel], Meta(min_length=1)]
    api_key: Annotated[str, Meta(min_length=1)] | None = None
    admin_api_key: Annotated[str, Meta(min_length=1)] | None = None
    cors_origins: list[str] = []
    allowed_hosts: list[str] | None = None
    request_timeout_s: Seconds = 3600.0
    drain_s: Annotated[float, Meta(ge=0, le=3600)] = 30.0
    client_stall_s: Seconds = 60.0
    stall_s: Seconds = 10.0
    max_body_bytes: Count = 8 * 2**20
    max_stop_strings: Count = 64
    max_n: Count = 128
    max_concurrent: Count = 1024
    journal_bytes: Count = 512 * 2**20
    status_socket: str = ""
    tracing: TracingConfig | None = None
    access_log: bool = False
    cache_report: bool = True
    priority: Literal["anyone", "admin", "nobody"] = "anyone"
    response_dir: str = ""
    response_store_bytes: Annotated[int, Meta(ge=0)] = 0
    crash_dump_dir: str = ""
