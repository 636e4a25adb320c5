"""Name a model by its weights and by its configuration, the same way for every engine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

WEIGHT_SAMPLE_BYTES = 4096


def weights_digest(model: str, revision: str) -> str:
    """Name the weights: by names, sizes, heads and tails of the files where they are local, else by name and revision.

    Two folders with the same base name hold different weights often enough (fine-tunes); the path itself may differ
    between machines that hold the same weights.
    """
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    if not files:
        return f"{model}@{revision}"
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size_bytes = path.stat().st_size
        digest.update(f"{path.name}:{size_bytes}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(WEIGHT_SAMPLE_BYTES))
            file.seek(max(0, size_bytes - WEIGHT_SAMPLE_BYTES))
            digest.update(file.read(WEIGHT_SAMPLE_BYTES))
    return digest.hexdigest()


def config_digest(config: dict[str, Any]) -> str:
    """Name a model configuration by what it says, not by where it was read or by what wrote it."""
    kept = {str(key): value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
