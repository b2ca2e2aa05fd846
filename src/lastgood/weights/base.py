"""The base model of an adapter, from a local directory and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lastgood.errors import CorruptCheckpoint, Incompatible, NoCheckpoint, NotSupported
from lastgood.state.tensors import DTYPE_OF
from lastgood.store import local
from lastgood.weights.adapter import Adapter
from lastgood.weights.source import Weights

_HINT = "give the directory of the base model: --base DIR"

# Tasks whose head the base may lack: the adapter was trained on another class than the base was saved as.
_TASKS = {
    "SEQ_CLS": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("ForTokenClassification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("Model", "AutoModel"),
}
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def find_base(config: Mapping[str, Any]) -> Path:
    """The directory of the base that an adapter's configuration names. Raises NoCheckpoint."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise NoCheckpoint("the adapter doesn't say what its base model is", hint=_HINT)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=config.get("revision"), local_files_only=True))
    except Exception as error:  # it has a dozen kinds, some of them plain ValueErrors
        raise NoCheckpoint(f"the base model {name!r} isn't on this machine", hint=_HINT) from error


@dataclass(frozen=True, slots=True)
class Base:
    """weights: its safetensors files, if it has any. adapter: what it is loaded for."""

    path: Path
    config: Mapping[str, Any]
    weights: Weights | None
    adapter: Adapter

    @classmethod
    def open(cls, path: Path, adapter: Adapter) -> Base:
        """Raises NoCheckpoint, CorruptCheckpoint, NotSupported (a quantised model)."""
        try:
            config = json.loads(local.read((path / "config.json").resolve(), 64 << 20))
        except OSError as error:
            raise NoCheckpoint(f"{path} holds no model: config.json: {error.strerror or error}", hint=_HINT) from error
        except ValueError as error:
            raise CorruptCheckpoint(f"{path / 'config.json'}: {error}") from error
        if config.get("quantization_config"):
            raise NotSupported(
                f"{path} is a quantised model, into which nothing can be merged exactly",
                hint="give the unquantised model as the base: --base DIR",
            )
        files = _files(path)
        return cls(path, config, Weights.open(files) if files else None, adapter)

    def wide(self, wanted: torch.dtype | None) -> torch.dtype | str:
        """The dtype to load in, so that nothing is rounded before the merge; "auto" leaves it to transformers."""
        slots = [slot.dtype for _, slot in self.weights.slots.values()] if self.weights else []
        kinds = {DTYPE_OF[code] for code in slots if code in DTYPE_OF and DTYPE_OF[code].is_floating_point}
        if wanted is None:
            return kinds.pop() if len(kinds) == 1 else "auto"
        widest = wanted
        for kind in kinds or {torch.float32}:
            widest = torch.promote_types(widest, kind)
        return widest

    def load(self, dtype: torch.dtype | str) -> Any:
        """The live model, on the CPU, with room for what the adapter brings. Raises Incompatible, NotSupported."""
        import transformers

        options: dict[str, Any] = {}
        head = next((copy for name, copy in self.adapter.copies.items() if name.endswith(_HEADS)), None)
        task = self.adapter.config.get("task_type")
        if head is not None and task in ("SEQ_CLS", "TOKEN_CLS"):
            options["num_labels"] = head.shape[0]
        try:
            model, info = _class(transformers, self.config, self.adapter.config).from_pretrained(
                str(self.path), dtype=dtype, local_files_only=True, output_loading_info=True, **options
            )
        except (OSError, ValueError) as error:
            raise NotSupported(f"transformers can't load the base {self.path}: {error}") from error
        absent = sorted(set(info["missing_keys"]) - self.adapter.copies.keys())
        if absent:
            raise Incompatible(
                f"neither the base {self.path} nor the adapter has {', '.join(absent[:8])} of {type(model).__name__}",
                hint="give the base that the adapter was trained on",
            )
        self._make_room(model)
        return model.eval()

    def load_merged(self, path: Path) -> Any:
        """The merged model as it was saved. Raises Incompatible if something is missing."""
        import transformers

        config = json.loads(local.read(path / "config.json", 64 << 20))
        kind = getattr(transformers, config["architectures"][0])
        model, info = kind.from_pretrained(str(path), dtype="auto", local_files_only=True, output_loading_info=True)
        lost = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
        if lost:
            raise Incompatible(f"the merged model was not saved whole: {', '.join(lost[:8])}")
        return model.eval()

    def _make_room(self, model: Any) -> None:
        # Tokens that were added for the training: the adapter then brings the whole embedding.
        weight = weight_of(model, "get_input_embeddings")
        if weight is None:
            return
        place = weight.data_ptr()
        for name, tensor in model.state_dict().items():
            copy = self.adapter.copies.get(name)
            if tensor.data_ptr() == place and copy is not None and copy.shape[0] != tensor.shape[0]:
                model.resize_token_embeddings(copy.shape[0], mean_resizing=False)
                return


def weight_of(model: Any, getter: str) -> torch.Tensor | None:
    """The weight of the input or output embedding; None if the model has no such thing, as those for images."""
    try:
        weight = getattr(getattr(model, getter)(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    return weight if isinstance(weight, torch.Tensor) else None


def _class(transformers: Any, base: Mapping[str, Any], adapter: Mapping[str, Any]) -> Any:
    mapped = (adapter.get("auto_mapping") or {}).get("base_model_class")
    stated = (base.get("architectures") or [""])[0]
    ending, general = _TASKS.get(str(adapter.get("task_type")), ("", "AutoModel"))
    for name in (mapped, stated if str(stated).endswith(ending) else None, general):
        found = getattr(transformers, name, None) if isinstance(name, str) and name else None
        if found is not None:
            return found
    raise NotSupported(f"transformers has no class for {stated!r}")


def _files(path: Path) -> list[Path]:
    """The safetensors files that transformers would load; links of the hub's cache are followed."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [(path / "model.safetensors").resolve()]
    if not index.is_file():
        return []
    try:
        table = json.loads(local.read(index.resolve(), 256 << 20))["weight_map"]
        return [(path / name).resolve() for name in sorted(set(table.values()))]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CorruptCheckpoint(f"{index}: {error}") from error
