"""The training script of the demo: the same command starts it and starts it again after a crash."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any


def build(args: argparse.Namespace) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (args.place / "pairs.jsonl").read_text().splitlines()]
    data = Dataset.from_list(rows).shuffle(seed=1)
    config = SFTConfig(
        output_dir=str(args.out),
        max_steps=args.steps,
        save_steps=args.every,
        eval_strategy="steps",
        eval_steps=args.every,
        save_total_limit=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        per_device_train_batch_size=4,
        learning_rate=5e-4 if args.full else 5e-3,
        max_length=160,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=3,
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=config,
        train_dataset=data.select(range(64, min(len(data), 2064))),
        eval_dataset=data.select(range(48)),
        peft_config=None
        if args.full
        else LoraConfig(r=8, lora_dropout=0.05, fan_in_fan_out=True, task_type="CAUSAL_LM"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )


def digest(model: Any) -> str:
    """sha256 over names and bytes of all weights."""
    import torch

    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Path, required=True, help="where the corpus is")
    parser.add_argument("--model", required=True, help="name or path of the model to fine-tune")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=4, help="steps between saves, and between evaluations")
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter")
    args = parser.parse_args()

    import lastgood

    trainer = build(args)
    trainer = lastgood.manage(trainer)
    trainer.train(resume_from_checkpoint="auto")

    history = trainer.state.log_history
    result = {
        "weights": digest(trainer.model),
        "loss": {row["step"]: row["loss"] for row in history if "loss" in row},
        "eval_loss": {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row},
        "best": trainer.state.best_model_checkpoint,
    }
    (args.out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
