"""Files that stop a stock Trainer from resuming a managed checkpoint as if its optimizer were there.

A stock Trainer that finds no optimizer.pt goes on silently with a fresh optimizer. So a
managed checkpoint holds an `optimizer.pt` and a `scheduler.pt` that torch.load refuses
with a message of ours: zip archives without any pickle in them, whose byte order record
(the first thing torch reads and checks) is that message.
"""

from __future__ import annotations

import io
import zipfile

MESSAGE = (
    "none. This checkpoint is managed by lastgood: the optimizer, scheduler and random states are in"
    " optimizer.safetensors and resume.json, where a stock Trainer doesn't look. To resume from it, add"
    " `trainer = lastgood.manage(trainer)` before trainer.train(), or make a copy that a stock Trainer resumes from:"
    " `lastgood checkout THIS_DIRECTORY NEW_DIRECTORY --format trainer`. The weights can be used as they are."
)

NAMES = ("optimizer.pt", "scheduler.pt")


def content(name: str) -> bytes:
    """The bytes of the guard called `name`; always the same."""
    archive = name.partition(".")[0]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for record, text in (("version", "3\n"), ("byteorder", MESSAGE)):
            file.writestr(zipfile.ZipInfo(f"{archive}/{record}", (1980, 1, 1, 0, 0, 0)), text)
    return buffer.getvalue()
