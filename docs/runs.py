"""The runs that the pages' terminal sessions are about: real fine-tunes of a tiny GPT-2, on the CPU, in seconds.

    python docs/runs.py PLACE     makes PLACE/out, PLACE/stock, PLACE/lora, PLACE/base, PLACE/train.py,
    PLACE/resume.py, PLACE/finish.py and PLACE/args.yaml

out    managed: killed in the save of step 350, resumed, killed again, resumed from step 300 as a branch
stock  without lastgood: killed in the save of step 250
lora   managed: an adapter on the model in base
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

LENGTH = 32
SCRIPT = '''"""A training script that knows nothing of lastgood. Its machine dies once, at step 320."""

import argparse
from pathlib import Path

from transformers import PrinterCallback
from transformers.utils import logging

from runs import trainer_for

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", required=True)
parser.add_argument("--resume_from_checkpoint")
args = parser.parse_args()
died = Path("died-once")
trainer = trainer_for(args.output_dir, until=350, die_at=None if died.exists() else 320)
died.touch()
logging.disable_progress_bar()
trainer.remove_callback(PrinterCallback)
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
print("done at step", trainer.state.global_step)
'''

RESUME = '''"""The next start of the script that was killed in a save, without lastgood."""

from runs import trainer_for

trainer_for("stock", until=300).train(resume_from_checkpoint=True)
'''
FINISH = '''"""The script of the managed run; another seed on the command line is another order of the data."""

import sys

from runs import managed

trainer = managed(learning_rate=5e-4, hyperparameters="new", seed=int((sys.argv[1:] or [7])[0]))
trainer.train(resume_from_checkpoint="auto")
'''
ARGUMENTS = """\
output_dir: out
max_steps: 1000
save_steps: 300
eval_strategy: steps
eval_steps: 200
load_best_model_at_end: true
metric_for_best_model: wer
"""


def rows() -> list[dict[str, list[int]]]:
    """Pieces of the standard library's own documentation, byte by byte."""
    pool = "\n".join(filter(None, (m.__doc__ for m in (argparse, json, random, shutil, signal, logging, subprocess))))
    data = pool.encode()
    pieces = [list(data[i : i + LENGTH]) for i in range(0, len(data) - LENGTH, LENGTH)]
    random.Random(1).shuffle(pieces)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def trainer_for(
    out: str, *, until: int = 500, die_at: int | None = None, die_in_save: int | None = None, **how: Any
) -> Any:
    """A stock Trainer. die_at: SIGKILL at that step; die_in_save: in the middle of the save of that step."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    class Mortal(Trainer):
        def save_model(self, *args: Any, **kwargs: Any) -> None:
            super().save_model(*args, **kwargs)
            if self.state.global_step == die_in_save:
                os.kill(os.getpid(), signal.SIGKILL)

    class DieAt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    set_seed(0)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model: Any = how.pop("model", None) or GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    settings = {
        "max_steps": until,
        "save_steps": 50,
        "eval_strategy": "steps",
        "eval_steps": 50,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 50,
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 7,
    }
    data: Any = rows()
    return Mortal(
        model=model,
        args=TrainingArguments(output_dir=out, **{**settings, **how}),
        train_dataset=data[48:144],  # few enough to learn them by heart: the best is not the last
        eval_dataset=data[:48],
        callbacks=[DieAt()] if die_at else [],
    )


def managed(**how: Any) -> Any:
    import lastgood

    options = {name: how.pop(name) for name in ("hyperparameters",) if name in how}
    return lastgood.manage(trainer_for("out", **how), **options)


def first() -> None:
    managed(die_in_save=350).train(resume_from_checkpoint="auto")


def second() -> None:
    managed(die_at=430).train(resume_from_checkpoint="auto")


def branch() -> None:
    managed(learning_rate=5e-4, hyperparameters="new").train(resume_from_checkpoint=300)


def stock() -> None:
    trainer_for("stock", die_in_save=250).train()


def lora() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import lastgood

    source = sorted(Path("out").glob("checkpoint-500"))[0]
    AutoModelForCausalLM.from_pretrained(source).save_pretrained("base")
    base = AutoModelForCausalLM.from_pretrained("base")
    adapter = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = trainer_for("lora", model=get_peft_model(base, adapter), until=150, save_total_limit=2)
    lastgood.manage(trainer).train(resume_from_checkpoint="auto")


PHASES = {"first": -9, "second": -9, "branch": 0, "stock": -9, "lora": 0}
"""What is run, each in a process of its own, and how it ends."""


def environment() -> dict[str, str]:
    """For everything that is launched: one thread, nothing from the network, this lastgood, plain output."""
    root = Path(__file__).resolve().parent
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LASTGOOD_") and k != "PYTHONPATH"}
    paths = os.pathsep.join([str(root.parent / "src"), str(root)])
    return {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def prepare(place: Path) -> None:
    """Everything that the sessions need, in an empty directory."""
    for phase, expected in PHASES.items():
        call = [sys.executable, __file__, ".", phase]
        found = subprocess.run(call, cwd=place, env=environment(), capture_output=True, text=True, check=False)
        assert found.returncode == expected, (
            f"{phase}: {found.returncode}\n{found.stdout[-3000:]}{found.stderr[-3000:]}"
        )
    for name, text in (("train.py", SCRIPT), ("resume.py", RESUME), ("finish.py", FINISH), ("args.yaml", ARGUMENTS)):
        (place / name).write_text(text)
    for path in [place / "stock", *(place / "stock").rglob("*")]:  # it died an hour ago: nobody is writing there
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        globals()[sys.argv[2]]()
    else:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        prepare(Path(sys.argv[1]))
