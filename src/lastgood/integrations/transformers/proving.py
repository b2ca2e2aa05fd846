"""A Trainer that `lastgood doctor --prove` launched: it repeats some steps in a scratch directory and leaves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lastgood.errors import UsageError
from lastgood.talk import say

RUN, UNTIL = "LASTGOOD_PROVE", "LASTGOOD_PROVE_UNTIL"


@dataclass(frozen=True, slots=True)
class Proving:
    """scratch: a run directory with one checkpoint; until: the step after which the process ends."""

    scratch: Path
    until: int

    @classmethod
    def asked(cls) -> Proving | None:
        """What the environment asks for; None in a run like any other."""
        scratch, until = os.environ.get(RUN), os.environ.get(UNTIL, "")
        if not scratch:
            return None
        if not until.isdigit() or not Path(scratch).is_dir():
            raise UsageError(
                f"{RUN}={scratch} and {UNTIL}={until} are for `lastgood doctor --prove` alone",
                hint=f"unset {RUN} to train",
            )
        return cls(Path(scratch), int(until))

    def take_over(self, trainer: Any) -> None:
        """Nothing that this Trainer writes may reach the real run, a hub or a tracker."""
        trainer.args.output_dir = os.fspath(self.scratch)
        trainer.args.push_to_hub = False
        handler = trainer.callback_handler
        handler.callbacks = [
            callback
            for callback in handler.callbacks
            if not type(callback).__module__.startswith("transformers.integrations")
        ]

    def leave(self, trainer: Any) -> NoReturn:
        """End the process: what the script does after training is meant for a run that is finished."""
        trainer.is_in_train = False
        trainer.state.save_to_json(os.fspath(self.scratch / "trainer_state.json"))
        say(f"proving ends at step {trainer.state.global_step}")
        raise SystemExit(0)
