"""From what the user calls the model to a local folder: embedded demo, local folder, or hub id."""

from __future__ import annotations

import re
from pathlib import Path

from lockstep.config.errors import ConfigError
from lockstep.config.tree import ModelConfig

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "demo"
DEMO_NAME = "lockstep-demo"
# Only data: no code and no pickled weights are ever downloaded. Subfolders hold other formats of the same weights.
WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
UNWANTED = ["*/*", "consolidated*.safetensors"]
TOKENIZER_ONLY = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja", "*.model", "config.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_folder(name: str, revision: str | None = None, *, setting: str = "model", tokenizer_only: bool = False) -> Path:
    """The folder of a checkpoint, downloaded when `name` is a hub id. Raises ConfigError with what to do."""
    if not name:
        return DEMO_FOLDER
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if local.is_file():
        raise ConfigError(f"{setting}={name!r} is a file: name the folder that holds config.json and *.safetensors.")
    if not _HUB_ID.fullmatch(name) or name.startswith(("./", "../", "/", "~")):
        raise ConfigError(f"{setting}={name!r}: there is no such folder, and it is not a hub id (owner/name). Check the spelling.")
    return _download(name, revision, setting, TOKENIZER_ONLY if tokenizer_only else WANTED)


def tokenizer_folder(model: ModelConfig, folder: Path) -> Path:
    """The folder that holds the tokenizer: the model's own, or the one the user named."""
    return find_folder(model.tokenizer, setting="tokenizer", tokenizer_only=True) if model.tokenizer else folder


def _download(name: str, revision: str | None, setting: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{setting}={name!r}" + (f" (revision={revision!r})" if revision else "")
    local = "or name a local folder that has config.json and *.safetensors"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))
    except GatedRepoError:
        raise ConfigError(f"{what} is gated on the hub: accept its terms there and log in (`hf auth login`), {local}.") from None
    except RevisionNotFoundError:
        raise ConfigError(f"{what}: the hub has the model but not this revision. Check the branch, tag or commit.") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"{what} is neither a local folder nor a model on the hub (or it is private: `hf auth login`).") from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{what} is neither a local folder nor in the download cache, and the hub is out of reach: go online, {local}."
        ) from None
    except HFValidationError as e:
        raise ConfigError(f"{what} is neither a local folder nor a possible hub id: {e}") from None
    except (HfHubHTTPError, OSError) as e:
        raise ConfigError(f"{what} could not be downloaded ({type(e).__name__}: {e}): try again, {local}.") from None
