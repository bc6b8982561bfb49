"""Files that hold a JSON object: configs of models, of training runs, and what work directories say of themselves."""

import json
from pathlib import Path
from typing import Any

from sora_jax.errors import InputError, one_line


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; InputError, naming the file, if it cannot be read or holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object")
    return values
