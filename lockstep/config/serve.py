"""The settings of `lockstep serve` beyond the engine's: its flags are generated from these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def opt(default: Any, help: str, *alias: str) -> Any:
    """A field with its help text (one sentence) and short flags."""
    return field(default=default, metadata={"help": help, "alias": alias})


def several(help: str, *alias: str) -> Any:
    """A field that holds a list: its flag may be repeated."""
    return field(default_factory=list, metadata={"help": help, "alias": alias})


@dataclass
class ServeOptions:
    """Where the server listens, whom it lets in, and how much it takes."""

    host: str = opt("127.0.0.1", "Address to listen at; 0.0.0.0 is every interface (then set --api-key).")
    port: int = opt(8000, "Port to listen at; 0: the system chooses, and it is printed.")
    uds: str | None = opt(None, "Path of a Unix socket to listen at instead of host and port.")
    api_key: list[str] = several("Key for clients to send as `Authorization: Bearer KEY`; all routes but /livez and /readyz ask for it.")
    served_model_name: list[str] = several("Name(s) of the model in the API; default: its folder's or hub id.")
    api_server_count: int = opt(1, "Processes that speak HTTP.", "-asc")
    root_path: str = opt("", "Path under which a proxy serves this, like /llm.")
    log_format: Literal["text", "json"] = opt("text", "Log lines as text or as JSON objects with request ids.")
    otlp_traces_endpoint: str = opt("", "URL of an OpenTelemetry collector (OTLP over HTTP) that gets a span for each request.")
    shutdown_timeout: float = opt(30.0, "Seconds that running requests have to finish after SIGTERM; a second signal ends them at once.")
