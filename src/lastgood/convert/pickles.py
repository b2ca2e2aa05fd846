"""Files of torch.save, read by torch's own loader for plain data; what it refuses is refused here as well."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lastgood.errors import CorruptCheckpoint, NotSupported
from lastgood.store import local

_REFUSED = (r"GLOBAL (\S+)", r"class (\S+)", r"type (\S+)")


def load(path: Path) -> Any:
    """What is in the file, on the CPU. Raises NotSupported for anything but tensors and plain data."""
    if local.size(path) is None:
        raise CorruptCheckpoint(f"{path} is missing or isn't a regular file")
    with open(path, "rb") as file:
        return _load(file, str(path))


def load_bytes(data: bytes, where: str) -> Any:
    """The same for an archive in memory; `where` is named in errors."""
    return _load(io.BytesIO(data), where)


def _load(file: Any, where: str) -> Any:
    try:
        with _numpy_states(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats of old versions of torch
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        found = next((match for pattern in _REFUSED if (match := re.search(pattern, text))), None)
        if found is None:
            raise CorruptCheckpoint(f"{where} can't be read: it is damaged, or torch.save didn't write it") from error
        raise NotSupported(
            f"{where} holds {found[1].strip('.,')}, which only unpickling could bring back; lastgood never executes"
            " pickles",
            hint="save it again without that object (numbers, strings, lists, dicts and tensors are read)",
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make torch raise whatever its next step comes upon
        raise CorruptCheckpoint(
            f"{where} can't be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def _numpy_states() -> Any:
    """Arrays of uint32, as NumPy's random state is one: numbers, not objects. Older versions name it differently."""
    core = getattr(np, "_core", None) or np.core
    rebuild = core.multiarray._reconstruct
    return torch.serialization.safe_globals(
        [
            rebuild,
            (rebuild, "numpy.core.multiarray._reconstruct"),
            (rebuild, "numpy._core.multiarray._reconstruct"),
            np.ndarray,
            np.dtype,
            type(np.dtype(np.uint32)),
        ]
    )
