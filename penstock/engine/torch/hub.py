"""Model names. In this order: "default" (the model in this package), a local folder or GGUF file, a name on a Hugging
Face hub.

Hub names go through huggingface_hub: it shows progress, resumes downloads that were cut short, keeps everything in its
cache (`cache_dir`, else its own default) and asks nobody when offline (`is_offline`, or HF_HUB_OFFLINE=1). Only what
is needed is fetched: safetensors, configuration and tokenizer files. `endpoint` names another server with the same API.

Of a repository with GGUF files one is fetched: ORG/REPO:FILE.gguf, or ORG/REPO:WORD where one file has the word in its
name (Q4_K_M, say), or ORG/REPO where there is only one. Files that are numbered are fetched together.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from penstock.core.errors import BadModel, missing_extra
from penstock.engine.folder import local_folder
from penstock.engine.torch.checkpoints.gguf.folder import SUFFIX, only_one
from penstock.engine.torch.checkpoints.gguf.format import NUMBERED

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
    repository, _, wanted = name.partition(":")
    if (
        not HUB_NAME.fullmatch(repository)
        or name.startswith(".")
        or (not wanted and name.endswith(SUFFIX))
    ):
        raise BadModel(
            f"there is no model folder {name}",
            hint="give an existing folder or .gguf file, a Hub name like Qwen/Qwen3-0.6B, or 'default'",
        )
    hub = _Hub(repository, endpoint, cache_dir, revision, is_offline)
    if not wanted:
        folder = hub.fetch(PATTERNS)
        if any(folder.glob("*.safetensors")):
            return folder
    chosen = _choose(hub.ggufs(), wanted, repository)
    if chosen is None:  # what is missing is said when it is opened
        return folder or hub.fetch(PATTERNS)
    fetched = local_folder(hub.fetch([_numbered(chosen)]) / chosen)
    if fetched is None:
        raise BadModel(f"{repository} has no file {chosen}", hint=LOOK)
    return fetched


def _choose(files: Sequence[str], wanted: str, repository: str) -> str | None:
    """The GGUF file that is meant; None where there is none and none was asked for. Raises BadModel."""
    if wanted in files:
        return wanted
    some = [one for one in files if wanted.lower() in one.lower()]
    if wanted and not some:
        raise BadModel(
            f"{repository} has no GGUF file {wanted}", hint=f"it has {', '.join(files) or 'none'}"
        )
    return only_one(some, repository)


def _numbered(file: str) -> str:
    """The pattern of a file and those that are numbered with it."""
    found = NUMBERED.match(file)
    return file if found is None else f"{found.group(1)}-*-of-{found.group(3)}{SUFFIX}"


@dataclass(frozen=True)
class _Hub:
    """One repository."""

    name: str
    endpoint: str | None
    cache_dir: Path | None
    revision: str | None
    is_offline: bool

    def fetch(self, patterns: Sequence[str]) -> Path:
        """The folder that has the files of these patterns. Raises BadModel, MissingExtra."""
        huggingface_hub = _package()
        with self._errors():
            found = huggingface_hub.snapshot_download(
                self.name,
                revision=self.revision,
                cache_dir=self.cache_dir,
                endpoint=self.endpoint,
                local_files_only=self.is_offline,
                allow_patterns=list(patterns),
                ignore_patterns=list(SKIPPED),
            )
        return Path(found)

    def ggufs(self) -> list[str]:
        """Names of GGUF files: the hub's, offline those that are here."""
        if self.is_offline:
            folder = self.fetch(PATTERNS)
            found = [str(path.relative_to(folder)) for path in folder.rglob(f"*{SUFFIX}")]
        else:
            with self._errors():
                api = _package().HfApi(endpoint=self.endpoint)
                found = api.list_repo_files(self.name, revision=self.revision)
        return sorted(name for name in found if name.endswith(SUFFIX))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever the hub's client raises, in our words."""
        from huggingface_hub import errors

        name = self.name
        try:
            yield
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
            raise BadModel(f"{name} has no revision {self.revision!r}") from None
        except errors.LocalEntryNotFoundError as error:
            raise BadModel(_not_here(name, self.is_offline, error), hint=LOOK) from None
        except (errors.HfHubHTTPError, OSError) as error:
            raise BadModel(f"{name} could not be fetched: {error}", hint=LOOK) from None
        except _connection_errors() as error:
            raise BadModel(f"{name} could not be fetched: {error}", hint=LOOK) from None


def _package() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise missing_extra("huggingface-hub", "engine") from None
    return huggingface_hub


def _connection_errors() -> tuple[type[Exception], ...]:
    """Errors of the HTTP client that huggingface_hub uses, which differs by its version and that it lets through."""
    clients = (sys.modules.get(name) for name in ("httpx2", "httpx"))
    return tuple(client.HTTPError for client in clients if client is not None)


LOOK = "check the connection and the endpoint, or download the folder and give its path"


def _not_here(name: str, is_offline: bool, error: Exception) -> str:
    if is_offline:
        return f"{name} is not in the local cache, and offline mode forbids asking the hub"
    return f"{name} is not in the local cache and the hub cannot be reached: {error}"
