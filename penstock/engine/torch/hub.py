"""Model names. In this order: "default" (the model in this package), a local folder, a name on a Hugging Face hub.

Hub names go through huggingface_hub: it shows progress, resumes downloads that were cut short, keeps everything in its
cache (`cache_dir`, else its own default) and asks nobody when offline (`is_offline`, or HF_HUB_OFFLINE=1). Only what
is needed is fetched: safetensors, configuration and tokenizer files. `endpoint` names another server with the same API.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from penstock.core.errors import BadModel, missing_extra
from penstock.engine.folder import local_folder

PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
SKIPPED = ("consolidated*", "original/*", "onnx/*", "*/*.safetensors")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_model(
    name: str,
    *,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    revision: str | None = None,
    is_offline: bool = False,
) -> Path:
    """The local folder of a model, downloaded if need be. Raises BadModel, MissingExtra."""
    folder = local_folder(name)
    if folder is not None:
        return folder
    if not HUB_NAME.fullmatch(name) or name.startswith("."):
        raise BadModel(
            f"there is no model folder {name}",
            hint="give an existing folder, a Hub name like Qwen/Qwen3-0.6B, or 'default'",
        )
    try:
        import huggingface_hub
    except ImportError:
        raise missing_extra("huggingface-hub", "engine") from None
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            endpoint=endpoint,
            local_files_only=is_offline,
            allow_patterns=list(PATTERNS),
            ignore_patterns=list(SKIPPED),
        )
    except errors.GatedRepoError:
        raise BadModel(
            f"{name} is gated: its owner wants you to accept terms first",
            hint="accept them on its page, then log in with `hf auth login`",
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadModel(
            f"there is no model {name} on the hub, or it is private",
            hint="check the spelling; for a private model log in with `hf auth login`",
        ) from None
    except errors.RevisionNotFoundError:
        raise BadModel(f"{name} has no revision {revision!r}") from None
    except errors.LocalEntryNotFoundError as error:
        raise BadModel(_not_here(name, is_offline, error), hint=LOOK) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise BadModel(f"{name} could not be fetched: {error}", hint=LOOK) from None
    except _connection_errors() as error:
        raise BadModel(f"{name} could not be fetched: {error}", hint=LOOK) from None
    return Path(found)


def _connection_errors() -> tuple[type[Exception], ...]:
    """Errors of the HTTP client that huggingface_hub uses, which differs by its version and that it lets through."""
    clients = (sys.modules.get(name) for name in ("httpx2", "httpx"))
    return tuple(client.HTTPError for client in clients if client is not None)


LOOK = "check the connection and the endpoint, or download the folder and give its path"


def _not_here(name: str, is_offline: bool, error: Exception) -> str:
    if is_offline:
        return f"{name} is not in the local cache, and offline mode forbids asking the hub"
    return f"{name} is not in the local cache and the hub cannot be reached: {error}"
