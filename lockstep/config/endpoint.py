"""The rules of the endpoint: the server's own settings, and which replicas one server has behind it.

    internal   one server, the leader's, for all replicas of all hosts (no flag)
    hybrid     one server on each host, for the replicas there: -dph -dpl REPLICAS_HERE -dpr FIRST_OF_THEM
    external   one server for each replica: -dpn REPLICA, and -dpl REPLICAS_HERE where it shares this host with others

Replicas of a model that is not split by experts have nothing to tell each other, so a host's replicas are an engine of their own.
"""

from __future__ import annotations

import math
import re
import ssl
import tempfile
from dataclasses import replace
from pathlib import Path

from lockstep.config.errors import ConfigError
from lockstep.config.serve import ServeOptions
from lockstep.config.tree import EngineConfig
from lockstep.utils import env
from lockstep.utils.net import is_loopback
from lockstep.utils.sizes import parse_size

_POSITIVE = (
    *(
        "api_server_count",
        "max_header_bytes",
        "max_body_bytes",
        "max_tokenize_characters",
        "request_read_timeout",
        "keep_alive_timeout",
        "limit_concurrency",
    ),
    *("max_queued_tokens", "max_concurrency_per_key", "request_timeout"),
)
_NOT_NEGATIVE = ("shutdown_timeout", "max_num_queued_reqs", "port")
_FILES = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")
MOST_API_SERVERS = 64
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9_.~-]+|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?")
_OWN_PORTS = {"http": ":80", "https": ":443"}


def check_options(options: ServeOptions) -> ServeOptions:
    """The options with sizes as numbers and the environment's keys among the others. Raises ConfigError for what cannot be."""
    options = replace(
        options,
        max_header_bytes=_bytes("max_header_bytes", options.max_header_bytes),
        max_body_bytes=_bytes("max_body_bytes", options.max_body_bytes),
    )
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = getattr(options, name)
        least = "at least 0" if name in _NOT_NEGATIVE else "greater than 0"
        if value is not None and not (math.isfinite(value) and (value > 0 or (value == 0 and name in _NOT_NEGATIVE))):
            raise ConfigError(f"{name}={value} is impossible: it must be {least}.")
    elsewhere = [f"{name}={getattr(options, name)}" for name in ("host", "port") if getattr(options, name) != getattr(ServeOptions, name)]
    if options.uds is not None and elsewhere:
        raise ConfigError(f"uds={options.uds!r} with {' and '.join(elsewhere)}: a server listens at a path or at a port; leave one out.")
    if options.port > 65535:
        raise ConfigError(f"port={options.port} is no port: it must be from 0 (the system chooses) to 65535.")
    if options.api_server_count > MOST_API_SERVERS:
        raise ConfigError(f"api_server_count={options.api_server_count} is more than {MOST_API_SERVERS}: use one for each core to spare.")
    if options.root_path and (not options.root_path.startswith("/") or options.root_path.endswith("/")):
        raise ConfigError(f"root_path={options.root_path!r} must begin with / and not end with it, like /llm.")
    if not all(name.strip() for name in options.served_model_name):
        raise ConfigError("served_model_name='' is no name of a model: give the one that clients are to ask for, or leave it out.")
    _check_tls(options)
    _check_origins(options)
    return replace(options, api_key=_keys(options))


def is_open(options: ServeOptions) -> bool:
    """Whether others than this machine's users could reach the server and no key keeps them out."""
    return not options.api_key and options.uds is None and not is_loopback(options.host)


def for_endpoint(config: EngineConfig, options: ServeOptions) -> EngineConfig:
    """The configuration of the replicas that this server has behind it. Raises ConfigError for flags that exclude each other."""
    parallel = config.parallel
    rank, start, local = parallel.data_parallel_rank, parallel.data_parallel_start_rank, parallel.data_parallel_size_local
    if options.data_parallel_external_lb and options.data_parallel_hybrid_lb:
        raise ConfigError("data_parallel_external_lb with data_parallel_hybrid_lb: a server is one replica's, or a host's; leave one out.")
    if options.data_parallel_external_lb and rank is None:
        raise ConfigError("data_parallel_external_lb needs data_parallel_rank: say which replica this server is for.")
    if rank is not None and local is None and parallel.nnodes == 1 and parallel.data_parallel_backend == "mp":
        # Servers of one replica each are mostly given a host, or devices, of their own; those that share say so with -dpl.
        config = replace(config, parallel=replace(parallel, data_parallel_size_local=1))
    if not options.data_parallel_hybrid_lb:
        return config
    if parallel.nnodes > 1:
        raise ConfigError(
            f"data_parallel_hybrid_lb with nnodes={parallel.nnodes}: that is a server for each host, with replicas of its own, and nnodes "
            "is one server, over all hosts; leave one of them out."
        )
    size = parallel.data_parallel_size
    if rank is not None:
        raise ConfigError(
            f"data_parallel_hybrid_lb with data_parallel_rank={rank}: that is a server for each replica; leave one of them out."
        )
    start = start or 0
    if local is None:
        raise ConfigError(
            "data_parallel_hybrid_lb needs data_parallel_size_local: say how many replicas this host runs (-dpl), and the first of them "
            "(-dpr; default: 0)."
        )
    if parallel.data_parallel_backend != "mp":
        raise ConfigError(f"data_parallel_hybrid_lb with data_parallel_backend={parallel.data_parallel_backend!r}: use mp.")
    if local < 1:
        raise ConfigError(
            f"data_parallel_hybrid_lb with data_parallel_size_local={local}: a host with an endpoint runs at least 1 replica."
        )
    if start < 0 or start + local > size:
        raise ConfigError(
            f"data_parallel_start_rank={start} and data_parallel_size_local={local} make replicas {start} to {start + local - 1}, but "
            f"data_parallel_size={size} has 0 to {size - 1}: choose both so that they fit."
        )
    return replace(config, parallel=replace(parallel, data_parallel_start_rank=start))


def check_headless(options: ServeOptions) -> None:
    """A headless host has no endpoint. (That it ignores where to listen, and for whom, lets all hosts be given one command.)

    Raises ConfigError for what would say which endpoint it is, or of how many processes.
    """
    for name in ("data_parallel_external_lb", "data_parallel_hybrid_lb"):
        if getattr(options, name):
            raise ConfigError(f"{name} with headless: that is a server, and a headless host keeps replicas for one; leave one of them out.")
    if options.api_server_count > 1:
        raise ConfigError(
            f"api_server_count={options.api_server_count} with headless: a headless host speaks no HTTP; leave it out here, and set it on "
            "the leader."
        )


def _bytes(name: str, value: int | str) -> int:
    found = parse_size(value) if isinstance(value, str) else value
    if found is None:
        raise ConfigError(f"{name}={value!r} is no amount of memory: write bytes, or a number with K, M or G (1K is 1024), like 16M.")
    return found


def _keys(options: ServeOptions) -> list[str]:
    """The keys of the flag and of the environment. What no client could send in a header is no key."""
    keys = [*options.api_key, *env.api_keys()]
    for number, key in enumerate(keys, 1):
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise ConfigError(f"api_key number {number} is empty, or has characters that no client could send: use plain ASCII.")
    return keys


def _check_tls(options: ServeOptions) -> None:
    given = {name: getattr(options, name) for name in _FILES if getattr(options, name) is not None}
    for name, path in given.items():
        if not Path(path).is_file():
            raise ConfigError(f"{name}={path!r} is no file: name a PEM file that this user can read.")
    if options.ssl_cert_reqs not in (0, 1, 2):
        raise ConfigError(f"ssl_cert_reqs={options.ssl_cert_reqs} is not one of 0 (not asked for), 1 (checked) and 2 (required).")
    if given and options.ssl_certfile is None:
        raise ConfigError(f"{next(iter(given))} without ssl_certfile: name the server's own certificate too, or leave it out.")
    if options.ssl_cert_reqs and options.ssl_ca_certs is None:
        raise ConfigError(f"ssl_cert_reqs={options.ssl_cert_reqs} needs ssl_ca_certs: say whose certificates are taken.")
    if options.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
    except (ssl.SSLError, OSError) as e:
        raise ConfigError(
            f"ssl_certfile={options.ssl_certfile!r} and its key cannot be used: {e}: give PEM files that belong together."
        ) from None
    if options.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(options.ssl_ca_certs)
        except (ssl.SSLError, OSError) as e:
            raise ConfigError(f"ssl_ca_certs={options.ssl_ca_certs!r} cannot be used: {e}: give a file of certificates in PEM.") from None


def check_folder(name: str, path: str | None, mode: int = 0o777) -> None:
    """Make the folder of a setting, if there is none, and have a file in it for a moment. Raises ConfigError where that cannot be."""
    if path is None:
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True, mode=mode)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        why = e.strerror or e
        raise ConfigError(f"{name}={path!r} cannot be written to ({why}): name a folder of this user's, or leave it out.") from None


def _check_origins(options: ServeOptions) -> None:
    for origin in options.allowed_origins:
        if origin in ("*", "null"):  # null: of pages without an origin, like files
            continue
        found = _ORIGIN.fullmatch(origin)
        if not found or int(found[2] or 1) > 65535 or origin.endswith(_OWN_PORTS.get(origin.partition(":")[0], "/")):
            raise ConfigError(
                f"allowed_origins={origin!r} is no origin as browsers send it: write scheme://host or scheme://host:port, in lower case, "
                "international names as xn--..., with no path and no port that is the scheme's own, like https://a.example; * alone is any."
            )
    for anyone in {"*", "null"} & set(options.allowed_origins) if options.allow_credentials else ():
        raise ConfigError(f"allow_credentials with allowed_origins {anyone!r}: any page could act for whoever visits it; name the origins.")
    given = [name for name in ("allowed_methods", "allowed_headers", "allow_credentials") if getattr(options, name)]
    if given and not options.allowed_origins:
        raise ConfigError(f"{given[0]} without allowed_origins: no page of another origin is let in; name the origins, or leave it out.")
