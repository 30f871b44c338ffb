"""The settings of `lockstep serve` and `lockstep run-batch` beyond the engine's: their flags are generated from these fields."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lockstep.config.errors import ConfigError


def opt(default: Any, help: str, *alias: str) -> Any:
    """A field with its help text (one sentence) and short flags."""
    return field(default=default, metadata={"help": help, "alias": alias})


def several(help: str, *alias: str) -> Any:
    """A field that holds a list: its flag may be repeated."""
    return field(default_factory=list, metadata={"help": help, "alias": alias})


ToolParser = Literal["hermes", "llama3_json", "mistral", "pythonic"]
ReasoningParser = Literal["deepseek_r1", "qwen3"]


@dataclass
class ServeOptions:
    """Where the server listens, whom it lets in, and how much it takes."""

    host: str = opt("127.0.0.1", "Address to listen at; 0.0.0.0 is every interface (then set --api-key).")
    port: int = opt(8000, "Port to listen at; 0: the system chooses, and it is printed.")
    uds: str | None = opt(None, "Path of a Unix socket to listen at instead of host and port.")
    api_key: list[str] = several(
        "Key for clients to send as `Authorization: Bearer KEY`; all routes but /livez (/health), /readyz (/ready), /startupz and "
        "the page's shell ask for it. LOCKSTEP_API_KEY names more, where other users cannot read them."
    )
    served_model_name: list[str] = several("Name(s) of the model in the API; default: its folder's or hub id.")
    api_server_count: int = opt(1, "Processes that speak HTTP.", "-asc")
    chat_template: str | None = opt(None, "File with the Jinja chat template to use instead of the model's own.")
    tool_call_parser: ToolParser | None = opt(None, "How the model writes tool calls; default: as its family does.")
    enable_auto_tool_choice: bool = opt(True, "Whether the model may decide to call a tool; if not, only tool_choice can make it.")
    reasoning_parser: ReasoningParser | None = opt(
        None, "How the model writes what it thinks before it answers; default: thoughts are not told apart."
    )
    root_path: str = opt("", "Path under which a proxy serves this, like /llm.")
    profile_dir: str | None = opt(None, "Folder for what /stop_profile writes; default: profiles in the cache folder.")
    log_format: Literal["text", "json"] = opt("text", "Log lines as text or as JSON objects with request ids.")
    otlp_traces_endpoint: str = opt("", "URL of an OpenTelemetry collector (OTLP over HTTP) that gets a span for each request.")
    shutdown_timeout: float = opt(30.0, "Seconds that running requests have to finish after SIGTERM; a second signal ends them at once.")
    headless: bool = opt(False, "Take no requests: run this host's ranks (--node-rank 1 and up) or replicas (-dpr) for a leader.")
    data_parallel_external_lb: bool = opt(
        False,
        "One server for each replica, this one for --data-parallel-rank (which implies it), alone on its host but for -dpl: a load "
        "balancer is in front.",
        "-dpe",
    )
    data_parallel_hybrid_lb: bool = opt(
        False, "One server for each host, over its own replicas (-dpl of them, from -dpr on): a load balancer is in front.", "-dph"
    )
    ssl_keyfile: str | None = opt(None, "File of the TLS certificate's key (PEM); with --ssl-certfile the server speaks HTTPS.")
    ssl_certfile: str | None = opt(None, "File of the TLS certificate (PEM), followed by those that vouch for it.")
    ssl_ca_certs: str | None = opt(None, "File of the authorities (PEM) whose client certificates are taken.")
    ssl_cert_reqs: int = opt(0, "Client certificates: 0 are not asked for, 1 are checked where there is one, 2 are required.")
    allowed_origins: list[str] = several("Origin whose pages may use this server from a browser (CORS), like https://a.example; * is any.")
    allowed_methods: list[str] = several("Method that those pages may use; default: GET and POST.")
    allowed_headers: list[str] = several(
        "Header that those pages may send; default: Authorization, Content-Type, and those of request ids and OpenAI's clients."
    )
    allow_credentials: bool = opt(False, "Let those pages send cookies along; not with the origin *.")
    max_header_bytes: int = opt(16384, "Most bytes of a request's head; more is answered 431.")
    max_body_bytes: int = opt(16 << 20, "Most bytes of a request's body, counted as they come, like 16M; more is answered 413.")
    max_tokenize_characters: int = opt(
        1 << 20, "Most characters that /tokenize takes, or a prompt that is to be cut (truncate_prompt_tokens); more is answered 400."
    )
    request_read_timeout: float = opt(60.0, "Seconds in which a request's head has to come, and its body again; then 408.")
    keep_alive_timeout: float = opt(30.0, "Seconds after which a connection that asks nothing is closed.")
    limit_concurrency: int = opt(4096, "Most open connections of each process that speaks HTTP; one more is answered 503.")
    max_num_queued_reqs: int = opt(1024, "Most sequences (requests times n) waiting beyond those that the engine runs at once; then 429.")
    max_queued_tokens: int | None = opt(None, "Most tokens (prompt and output, times n) of all accepted requests together; then 429.")
    max_concurrency_per_key: int | None = opt(None, "Most requests of one API key at once (without keys: of one client address); then 429.")
    request_timeout: float = opt(3600.0, "Seconds after which a request is given up; a field `timeout` or X-Request-Timeout lowers it.")


def as_served(name: str) -> Any:
    """A field that is one of `ServeOptions` too, with its default, help and short flags."""
    known = ServeOptions.__dataclass_fields__[name]
    if known.default_factory is not MISSING:
        return field(default_factory=known.default_factory, metadata=known.metadata)
    return field(default=known.default, metadata=known.metadata)


@dataclass
class BatchOptions:
    """Which file of requests to answer, and how: the settings of `lockstep run-batch` beyond the engine's."""

    input_file: str | None = opt(None, "File of requests, one a line, in OpenAI's batch format; - is standard input.", "-i")
    output_file: str | None = opt(None, "File for the answers, one a line, as they get done; - is standard output.", "-o")
    max_concurrency: int | None = opt(None, "Most requests under way at once; default: twice what the engine runs at once.")
    served_model_name: list[str] = as_served("served_model_name")
    chat_template: str | None = as_served("chat_template")
    tool_call_parser: ToolParser | None = as_served("tool_call_parser")
    enable_auto_tool_choice: bool = as_served("enable_auto_tool_choice")
    reasoning_parser: ReasoningParser | None = as_served("reasoning_parser")
    max_body_bytes: int = as_served("max_body_bytes")
    request_timeout: float = as_served("request_timeout")
    quiet: bool = opt(False, "Say nothing on standard error but errors.")
    headless: bool = opt(False, "Answer nothing: run this host's ranks (--node-rank 1 and up) or replicas (-dpr) for a leader.")

    def served(self) -> ServeOptions:
        """The same as a server's settings. Nobody else asks, so its queue needs no bound."""
        shared = {name: value for name, value in vars(self).items() if name in ServeOptions.__dataclass_fields__}
        return ServeOptions(**shared, max_num_queued_reqs=sys.maxsize)


def read_chat_template(options: ServeOptions) -> str | None:
    """The text of --chat-template, None without one. Raises ConfigError when it cannot be read."""
    if options.chat_template is None:
        return None
    try:
        return Path(options.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"chat_template={options.chat_template!r} cannot be read ({e}): give the path of a Jinja file.") from None
