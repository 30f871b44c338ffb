"""`lockstep serve` from its settings to its end: the port first, then the engine's process, then HTTP.

    this process: HTTP  --ZeroMQ-->  the engine's process: router  -->  replica processes  -->  their ranks

The port is bound before anything is loaded, and held: a port that is taken is told at once, and who asks is told that it starts
(`starting`). While the engine loads, the tokenizer does too, here. With --api-server-count the HTTP is spoken by processes of their
own (`processes`), on the same socket. At the end the engine's process gets a moment for its own; none after a second signal.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import signal
import socket
import stat
from pathlib import Path
from types import FrameType

from lockstep.config.endpoint import check_folder, check_options, for_endpoint, is_open
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.serve import ServeOptions, read_chat_template
from lockstep.config.source import DEMO_NAME, tokenizer_folder
from lockstep.config.tree import EngineConfig
from lockstep.config.validate import resolve
from lockstep.frontend.async_engine import AsyncEngine
from lockstep.frontend.chat import check_template
from lockstep.frontend.engine_handle import CLIENT
from lockstep.frontend.engine_keeper import EngineKeeper
from lockstep.frontend.tokenizer import load_in_background, load_tokenizer
from lockstep.observability import logging
from lockstep.observability.otel import check_endpoint
from lockstep.server.launch_serving import Steps, run_serving
from lockstep.server.processes import ApiLaunch, connect_limit_s, serve_by_processes
from lockstep.server.starting import Porch
from lockstep.server.state import ServerState
from lockstep.server.watchdog import Watchdog
from lockstep.utils import env
from lockstep.utils.interrupt import heard, terminable

_log = logging.get_logger(__name__)


def serve(config: EngineConfig, options: ServeOptions, *, client: str = CLIENT) -> int:
    """Serve until told to stop; the exit code. Raises ConfigError or ExecutorError when it cannot start, or cannot go on."""
    env.choose_log_format(options.log_format)
    logging.configure(config.runtime.log_level)
    check_chat_template(options)
    options = check_options(options)
    check_folder("profile_dir", options.profile_dir)
    check_folder("incident_dir", config.runtime.incident_dir, 0o700)
    check_endpoint(options.otlp_traces_endpoint)
    config, spec, folder = resolve(for_endpoint(config, options), hybrid=options.data_parallel_hybrid_lb)
    raise_descriptor_limit()
    listener = listen(options)
    words = tokenizer_folder(config.model, folder)
    names = model_names(config, options)
    with terminable(), contextlib.closing(listener):
        handle, code = EngineKeeper(config, spec, folder, client=client), 1

        def ready() -> None:
            announce(options, names[0], listener)

        try:
            with contextlib.closing(Porch(options, listener)) as porch:
                if options.api_server_count > 1:
                    handle.wait()
                    launch = ApiLaunch(options=options, config=config, spec=spec, folder=str(folder), words=str(words), names=names)
                    code = serve_by_processes(launch, handle, listener, porch, ready)
                else:
                    state = state_over(handle, options, spec, folder, words, names)
                    code = serve_alone(state, handle, listener, Steps(porch.let_go, ready))
        finally:
            told = end(handle, at_once=code > 128)
            if options.uds:
                Path(options.uds).unlink(missing_ok=True)
    return code if code > 128 else told or code


def check_chat_template(options: ServeOptions) -> None:
    """A chat template that cannot be used is told before anything is loaded, and not by every client. Raises ConfigError."""
    text = read_chat_template(options)
    if text is not None:
        check_template(str(options.chat_template), text)


def end(handle: EngineKeeper, *, at_once: bool) -> int:
    """End the engine's process: it gets a moment to end what is below it, unless at once, or a signal comes meanwhile.

    The exit code for that signal; 0 without one.
    """
    told: list[int] = []

    def now(number: int, _: FrameType | None) -> None:
        told.append(number)
        handle.kill()

    before = {number: signal.signal(number, now) for number in heard()}
    try:
        if at_once:
            handle.kill()
        handle.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + told[0] if told else 0


def state_over(handle: EngineKeeper, options: ServeOptions, spec: ModelSpec, folder: Path, words: Path, names: list[str]) -> ServerState:
    """What the routes of this process need, once the engine runs; not connected. Raises as `EngineKeeper.wait`. words: the tokenizer's."""
    tokenizer = load_in_background(lambda: load_tokenizer(words))
    handle.wait()
    return ServerState(options, AsyncEngine(handle.endpoint, handle.secret, spec, folder, tokenizer.result()), names)


def serve_alone(state: ServerState, handle: EngineKeeper, listener: socket.socket, steps: Steps) -> int:
    """HTTP in this process, until the end; the exit code. Raises ExecutorError."""

    def failure() -> Exception | None:
        found, state.engine.lost_why = handle.failure(), handle.lost_why
        return found

    with contextlib.closing(Watchdog()) as watchdog:
        watched = steps._replace(turned=watchdog.turned, rest=watchdog.rest)
        return run_serving(state, failure, listener, watched, connect_limit_s(handle.config))


def model_names(config: EngineConfig, options: ServeOptions) -> list[str]:
    """The names of the model in the API."""
    return options.served_model_name or [config.model.model or DEMO_NAME]


def announce(options: ServeOptions, model: str, listener: socket.socket) -> None:
    """Say where the server is, and whom that lets in."""
    scheme, (host, port) = "https" if options.ssl_certfile else "http", listener.getsockname()[:2] if not options.uds else ("", 0)
    where = options.uds or f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    logging.say(f"lockstep serves {model} at {where}")
    if is_open(options):
        _log.warning(
            "ANYBODY who reaches %s can use this server: host=%s is not this machine alone, and no --api-key is set. Set one (or "
            "LOCKSTEP_API_KEY), or listen at 127.0.0.1.",
            *(where, options.host),
        )
    elif not options.uds and not options.api_key:
        indent = "" if env.log_format() == "json" else "  "
        logging.say(f"{indent}only this machine can reach it (--host and --api-key open it to others)")


def listen(options: ServeOptions) -> socket.socket:
    """The bound socket. Raises ConfigError when it cannot be had."""
    if options.uds:
        return _listen_at_path(options.uds)
    try:
        family, kind, proto, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
    except OSError as e:
        raise _no_port(options, e) from None
    try:
        # Over sockets in TIME_WAIT only. Never SO_REUSEPORT: two servers would share a port, and requests go to either.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
    except OSError as e:
        found.close()
        raise _no_port(options, e) from None
    return found


def _no_port(options: ServeOptions, error: OSError) -> ConfigError:
    foreign = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
    advice = "give --host an address of this machine, like 127.0.0.1, or 0.0.0.0 for all of them" if foreign else "give another --port"
    if error.errno == errno.EACCES:
        advice = "ports below 1024 are for the system's own services; give another --port"
    return ConfigError(f"host={options.host} port={options.port} cannot be listened at: {error.strerror}: {advice}.")


def _listen_at_path(path: str) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            Path(path).unlink()
        found.bind(path)
        found.listen(1024)
    except OSError as e:
        found.close()
        raise ConfigError(f"uds={path!r} cannot be listened at: {e.strerror or e}: give another path, or remove what is there.") from None
    return found


def _is_stale(path: str) -> bool:
    """Whether there is a socket that nobody listens at any more: a former server's."""
    if not Path(path).exists() or not stat.S_ISSOCK(Path(path).stat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
    return False


def raise_descriptor_limit() -> None:
    """As many open sockets as the system allows: each stream is one, and the usual limit of 1024 is for programs with few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 20) if hard > 0 else 1 << 20, hard))
