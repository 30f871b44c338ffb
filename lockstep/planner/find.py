"""From what the user calls a model to its shape: a catalogue name, a folder, a config.json, or a hub id. Weights are never read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from lockstep.config.build import nearest
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import read_config_json
from lockstep.planner.model import ModelShape, from_config

HUB_TIMEOUT_S = 5.0
CATALOGUE = Path(__file__).parent / "data" / "models.json"


@cache
def catalogue() -> dict[str, dict[str, Any]]:
    """name -> {hf_id, params_total, params_active, config} of the models that are known without a download."""
    found: dict[str, dict[str, Any]] = json.loads(CATALOGUE.read_text(encoding="utf-8"))["models"]
    return found


def find_model(name: str) -> tuple[ModelShape, str]:
    """(the model's shape, what `lockstep serve` should call it). Raises ConfigError with what to do."""
    known = _known(name)
    if known is not None:
        entry = catalogue()[known]
        return from_config(entry["config"], known), name if "/" in name else str(entry["hf_id"])
    path = Path(name).expanduser()
    if path.is_dir():
        return from_config(read_config_json(path), name), name
    if path.is_file():
        return from_config(_read(path), name), str(path.parent)
    if not name or name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") != 1:
        raise ConfigError(
            f"model {name!r} is no folder, no config.json, no hub id (owner/name) and not in the catalogue, which has "
            f"{', '.join(catalogue())}.{_suggested(name)}"
        )
    return from_config(_read(_from_hub(name)), name), name


def _suggested(name: str) -> str:
    """The catalogue's name that starts with what was typed, else the most similar one."""
    starts = [known for known in catalogue() if name and known.startswith(name.lower())]
    return f" Did you mean {starts[0]!r}?" if starts else nearest(name, catalogue())


def _known(name: str) -> str | None:
    """The catalogue's name for a name in any case, or for a hub id, Instruct versions included (they have the same shape)."""
    low = name.lower()
    if low in catalogue():
        return low
    return next((key for key, entry in catalogue().items() if _plain(str(entry["hf_id"])) == _plain(low)), None)


def _plain(hub_id: str) -> str:
    """A hub id without what changes no shape: that it is tuned, and the maker's name said twice."""
    return hub_id.lower().removesuffix("-instruct").replace("/meta-llama-", "/llama-")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read as a model's config ({e}): name a config.json, or a folder that has one.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object: name a model's config.json.")
    return raw


def _from_hub(name: str) -> Path:
    """The hub's config.json, from the download cache where it is there. The hub is asked once first: its library retries for long."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT_S)
        return Path(hf_hub_download(name, "config.json"))
    except Exception as e:  # of the HTTP client, which is the library's own choice, or of the library
        raise ConfigError(
            f"model {name!r} is not in the catalogue, and its config.json could not be had from the hub ({type(e).__name__}): "
            f"go online, or name a config.json.{_suggested(name)}"
        ) from None
