"""The secret that block hashes are keyed with: new with each server, unless something has to know them again."""

from __future__ import annotations

import secrets

from penstock.assemble.config import Config
from penstock.cluster.deployment import KEY_BYTES, kept_key, key_of
from penstock.core.errors import BadConfig

HINT = "cache.tiers.dir names a folder that can be written"


def hash_key_of(config: Config) -> bytes:
    """Engines that outlive their server know it, and so do blocks on disk (cache.tiers). Raises BadConfig."""
    folders = [each.cache.tiers.folder for each in config.fleet if each.cache.tiers.disk_bytes]
    outlive = config.serve.outlive
    if not folders:
        return secrets.token_bytes(KEY_BYTES) if outlive is None else key_of(outlive)
    path = folders[0] / "key"  # before a deployment's, which ends with its last server
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(f"{path} cannot be used: {error.strerror}", hint=HINT) from None
    return kept_key(path, hint=HINT)
