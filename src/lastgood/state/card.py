"""The README that PEFT writes with an adapter: the same at every save of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def same_card(model: Any, card: dict[str, bytes]) -> Iterator[None]:
    """PEFT compiles a template for it at every save, half the time of saving an adapter: once is enough.

    card: the run's memory of it, empty before the first save.
    """
    original = getattr(model, "create_or_update_model_card", None)
    if original is None:
        yield
        return

    def create_or_update_model_card(output_dir: str) -> None:
        path = Path(output_dir) / "README.md"
        if "README.md" not in card:
            original(output_dir)
            card["README.md"] = path.read_bytes()
        else:
            path.write_bytes(card["README.md"])

    model.__dict__["create_or_update_model_card"] = create_or_update_model_card
    try:
        yield
    finally:
        del model.__dict__["create_or_update_model_card"]
