"""The secret that block hashes are keyed with: new with each server, unless something has to know them again."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress

from penstock.assemble.config import Config
from penstock.cluster.deployment import key_of
from penstock.core.errors import BadConfig

KEY_BYTES = 16


def hash_key_of(config: Config) -> bytes:
    """Engines that outlive their server know it, and so do blocks on disk (cache.tiers). Raises BadConfig."""
    if config.serve.outlive is not None:
        return key_of(config.serve.outlive)
    folders = [each.cache.tiers.folder for each in config.fleet if each.cache.tiers.disk_bytes]
    if not folders:
        return secrets.token_bytes(KEY_BYTES)
    path = folders[0] / "key"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            os.write(made, secrets.token_bytes(KEY_BYTES))
            os.close(made)
        key = path.read_bytes()
    except OSError as error:
        raise BadConfig(
            f"{path} cannot be used: {error.strerror}",
            hint="cache.tiers.dir names a folder that can be written",
        ) from None
    if len(key) != KEY_BYTES:
        raise BadConfig(f"{path} holds no key", hint="delete it, and what else is in its folder")
    return key
