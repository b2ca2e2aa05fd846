"""What a run resumes from, what it says about it, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer

import lastgood

from training import Bytes, Case, KillAt, Pad, arguments, outcome, tiny_gpt2

BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}


def managed(
    out: Path, *callbacks: Any, case: Case | None = None, options: dict[str, Any] | None = None, **args: Any
) -> Any:
    base = case or Case("resume")
    full = Case(base.name, rows=base.rows, args={**base.args, **args}, evaluate=base.evaluate, lora=base.lora)
    return lastgood.manage(full.trainer(out, *callbacks), **(options or {}))


def steps(out: Path) -> list[int]:
    return [record.step for record in lastgood.open(out).checkpoints if record.ours and record.current]


class Scores:
    """Evaluation that yields given numbers, whatever the model: a metric with a known best."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values

    def install(self, trainer: Any) -> Any:
        def evaluate(*_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_loss": self.values[trainer.state.global_step]}
            trainer.log(dict(metrics))
            trainer.control = trainer.callback_handler.on_evaluate(
                trainer.args, trainer.state, trainer.control, metrics
            )
            return metrics

        trainer.evaluate = evaluate
        return trainer


def test_the_first_launch_and_every_relaunch_are_the_same_command(tmp_path: Path, caplog: Any) -> None:
    for expected in ("starting at step 0", "resuming from checkpoint-8"):
        caplog.clear()
        with caplog.at_level("INFO", "lastgood"):
            managed(tmp_path).train(resume_from_checkpoint="auto")
        assert expected in caplog.text


@pytest.mark.parametrize("value", [True, "auto"])
def test_true_and_auto_on_a_directory_that_is_not_there_start_fresh(tmp_path: Path, value: Any) -> None:
    trainer = managed(tmp_path / "new", max_steps=2)
    assert trainer.train(resume_from_checkpoint=value).global_step == 2
    assert trainer.resume_report is None


@pytest.mark.parametrize("value", ["last", "best", 3, "3"])
def test_asking_for_what_is_not_there_is_an_error(tmp_path: Path, value: Any) -> None:
    trainer = managed(tmp_path, **BEST, eval_strategy="steps", eval_steps=2, case=Case("x", evaluate=True))
    with pytest.raises(lastgood.NoCheckpoint):
        trainer.train(resume_from_checkpoint=value)


@pytest.mark.parametrize("value", [1.5, ["checkpoint-2"], {"step": 2}, b"last"])
def test_a_wrong_value_names_the_right_ones(tmp_path: Path, value: Any) -> None:
    with pytest.raises(lastgood.UsageError, match="auto"):
        managed(tmp_path).train(resume_from_checkpoint=value)


def test_best_and_last_both_continue_at_the_right_step(tmp_path: Path) -> None:
    """Two checkpoints kept of four steps; a second trainer really resumes from the best of them."""
    scores = Scores({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5})
    settings = {
        **BEST,
        "max_steps": 4,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_total_limit": 2,
    }
    case = Case("lesson", evaluate=True)
    first = scores.install(managed(tmp_path, case=case, **settings))
    first.train()
    assert steps(tmp_path) == [2, 4]
    assert first.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert (first.state.best_global_step, first.state.best_metric) == (2, 1.0)

    last = scores.install(managed(tmp_path, case=case, **settings))
    assert last.train(resume_from_checkpoint="last").global_step == 4
    assert last.resume_report.step == 4

    best = scores.install(managed(tmp_path, case=case, **settings))
    assert best.train(resume_from_checkpoint="best").global_step == 4
    assert best.resume_report.step == 2


def test_a_branch_never_mixes_with_the_one_that_was_left(tmp_path: Path) -> None:
    """Crash at 6, back to 2: checkpoints 4 and 6 of before are not picked, not counted, not deleted."""
    long = managed(tmp_path, KillAtEnd(6))
    with pytest.raises(Stop):
        long.train()
    assert steps(tmp_path) == [2, 4, 6]
    branch = managed(tmp_path, KillAtEnd(4), save_total_limit=2)
    with pytest.raises(Stop):
        branch.train(resume_from_checkpoint=2)
    assert steps(tmp_path) == [2, 4]
    left = [record for record in lastgood.open(tmp_path).checkpoints if not record.current]
    assert sorted(record.step for record in left) == [4, 6]
    again = managed(tmp_path, save_total_limit=2)
    again.train(resume_from_checkpoint="auto")
    assert again.resume_report.step == 4
    assert steps(tmp_path) == [6, 8]
    assert sorted(r.step for r in lastgood.open(tmp_path).checkpoints if not r.current) == [4, 6]


def test_a_branch_without_a_save_yet_is_remembered(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        managed(tmp_path, KillAtEnd(6)).train()
    with pytest.raises(Stop):
        managed(tmp_path, KillAtEnd(3)).train(resume_from_checkpoint=2)
    third = managed(tmp_path)
    third.train(resume_from_checkpoint="auto")
    assert third.resume_report.step == 2


class Stop(Exception):
    pass


class KillAtEnd(KillAt):
    """An exception at the end of a step, after its save."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            raise Stop


def test_a_finished_run_does_not_train_another_step(tmp_path: Path) -> None:
    first = managed(tmp_path)
    first.train()
    second = managed(tmp_path)
    output = second.train(resume_from_checkpoint="auto")
    assert output.global_step == 8
    assert outcome(second)["weights"] == outcome(first)["weights"]
    assert steps(tmp_path) == [2, 4, 6, 8]
    assert "finished" in str(second.resume_report)


@pytest.mark.parametrize("known", [True, False], ids=["known", "cut short"])
def test_a_finished_run_knows_its_last_evaluation(known: bool, tmp_path: Path) -> None:
    """It comes after the last save. Killed before all of it was written down, it is made again."""
    case = Case("x", evaluate=True, args={"eval_steps": 2, **BEST})
    first = managed(tmp_path, case=case)
    first.train()
    expected = outcome(first)
    assert 8 in expected["evals"]
    if not known:
        for path in (tmp_path / ".lastgood" / "metrics").glob("*.after.json"):
            path.unlink()
    for _ in range(2):
        again = managed(tmp_path, case=case)
        again.train(resume_from_checkpoint="auto")
        assert outcome(again) == expected


def test_load_best_model_at_end_never_takes_a_score_from_another_step(tmp_path: Path) -> None:
    """Evaluated more often than saved: the best score is at a step without a checkpoint."""
    scores = Scores({1: 9.0, 2: 1.8, 3: 0.5, 4: 1.4, 5: 9.0, 6: 2.0, 7: 9.0, 8: 2.2})
    trainer = managed(tmp_path, case=Case("x", evaluate=True), **BEST, eval_strategy="steps", eval_steps=1)
    scores.install(trainer).train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (4, 1.4)
    kept = lastgood.open(tmp_path).best("eval_loss")
    loaded = type(trainer.model).from_pretrained(tmp_path / kept.name)
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), trainer.model.state_dict().values(), strict=True)
    )


def test_I10_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    scores = Scores({2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0})
    trainer = managed(
        tmp_path, case=Case("x", evaluate=True), **BEST, eval_strategy="steps", eval_steps=2, save_total_limit=1
    )
    scores.install(trainer).train()
    assert steps(tmp_path) == [2, 8]


def test_save_total_limit_keeps_the_newest_and_the_best_others(tmp_path: Path) -> None:
    scores = Scores({1: 1.7, 2: 1.5, 3: 1.6, 4: 1.9, 5: 2.2, 6: 2.5})
    trainer = managed(
        tmp_path, case=Case("x", evaluate=True), **BEST, max_steps=6, save_steps=1, eval_strategy="steps", eval_steps=1,
        save_total_limit=3,
    )  # fmt: skip
    scores.install(trainer).train()
    assert steps(tmp_path) == [2, 3, 6]
    reasons = [event["reasons"] for event in lastgood.open(tmp_path).history if event["event"] == "deleted"]
    assert len(reasons) == 3 and all(reason for reason in reasons)


def test_without_a_metric_the_limit_keeps_the_newest_and_says_so(tmp_path: Path, caplog: Any) -> None:
    trainer = managed(tmp_path, save_total_limit=2)
    assert "CKB006" in caplog.text
    trainer.train()
    assert steps(tmp_path) == [6, 8]


def test_full_state_only_for_the_newest(tmp_path: Path) -> None:
    trainer = managed(tmp_path, options={"keep": lastgood.Keep(last=3, full=1)})
    trainer.train()
    states = {record.step: record.state for record in lastgood.open(tmp_path).checkpoints}
    assert states == {4: "weights", 6: "weights", 8: "full"}
    with pytest.raises(lastgood.NoCheckpoint, match="holds the weights alone"):
        managed(tmp_path).train(resume_from_checkpoint=4)
    with pytest.raises(lastgood.IncompleteRestore, match="optimizer"):
        managed(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_I8_a_missing_part_needs_its_name(tmp_path: Path) -> None:
    managed(tmp_path, save_only_model=True, max_steps=4).train()
    allowed = {"allow_missing": ["optimizer", "scheduler", "rng", "progress"]}
    path = str(tmp_path / "checkpoint-2")
    with pytest.raises(lastgood.IncompleteRestore, match="allow_missing"):
        managed(tmp_path, options={"allow_missing": ["optimizer"]}).train(resume_from_checkpoint=path)
    trainer = managed(tmp_path, options=allowed)
    assert trainer.train(resume_from_checkpoint=path).global_step == 8
    assert {"optimizer", "scheduler"} <= set(trainer.resume_report.missing)


def test_I11_an_older_run_in_the_directory_is_left_alone(tmp_path: Path, caplog: Any) -> None:
    old = managed(tmp_path, max_steps=20, save_steps=10)
    old.train()
    shutil.copytree(tmp_path / "checkpoint-20", tmp_path / "checkpoint-best")
    before = tree(tmp_path / "checkpoint-20"), tree(tmp_path / "checkpoint-best")
    new = managed(tmp_path, KillAtEnd(6), save_total_limit=1)
    with pytest.raises(Stop):
        new.train(resume_from_checkpoint=False)
    relaunch = managed(tmp_path, save_total_limit=1)
    relaunch.train(resume_from_checkpoint="auto")
    assert relaunch.resume_report.step == 6
    assert (tree(tmp_path / "checkpoint-20"), tree(tmp_path / "checkpoint-best")) == before
    assert "CKR007" in caplog.text


def test_a_new_run_over_an_old_one_overwrites_nothing(tmp_path: Path) -> None:
    managed(tmp_path).train()
    before = tree(tmp_path / "checkpoint-8")
    second = managed(tmp_path)
    second.train()
    assert tree(tmp_path / "checkpoint-8") == before
    assert steps(tmp_path) == [2, 4, 6, 8]
    assert all("." in record.name for record in lastgood.open(tmp_path).checkpoints if record.ours)


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_lost_run_json_loses_no_recovery_point(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        managed(tmp_path, KillAtEnd(6)).train()
    shutil.rmtree(tmp_path / ".lastgood")
    trainer = managed(tmp_path)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.resume_report.step == 6


def test_a_moved_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        managed(tmp_path / "a", KillAtEnd(5)).train()
    (tmp_path / "a").rename(tmp_path / "b")
    trainer = managed(tmp_path / "b")
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.resume_report.step == 4


def test_a_checkpoint_of_another_run_starts_a_new_one_with_its_state(tmp_path: Path) -> None:
    managed(tmp_path / "a", max_steps=4).train()
    before = tree(tmp_path / "a" / "checkpoint-4")
    trainer = managed(tmp_path / "b")
    assert trainer.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-4").global_step == 8
    assert steps(tmp_path / "b") == [6, 8]
    assert tree(tmp_path / "a" / "checkpoint-4") == before


def test_a_run_directory_in_place_of_a_checkpoint_is_explained(tmp_path: Path) -> None:
    managed(tmp_path / "a", max_steps=2).train()
    with pytest.raises(lastgood.UsageError, match="is a run, not a checkpoint"):
        managed(tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a"))


def test_changed_hyperparameters_are_reported_with_what_takes_effect(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        managed(tmp_path, KillAtEnd(4)).train()
    trainer = managed(tmp_path, learning_rate=1e-3, max_steps=16)
    trainer.train(resume_from_checkpoint="auto")
    said = {change.what: change for change in trainer.resume_report.changed}
    assert "saved value stays" in said["learning_rate"].effect
    assert "schedule applies" in said["max_steps"].effect
    rates = [row["learning_rate"] for row in trainer.state.log_history if row.get("step") == 6]
    assert rates[0] > 5e-3, "the saved learning rate goes on, over the longer schedule"


def test_this_runs_hyperparameters_are_applied_on_request(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        managed(tmp_path, KillAtEnd(4)).train()
    trainer = managed(tmp_path, learning_rate=1e-3, weight_decay=0.5, options={"hyperparameters": "new"})
    trainer.train(resume_from_checkpoint="auto")
    rates = {row["step"]: row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row}
    assert rates[5] == pytest.approx(1e-3 * 4 / 8)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_new_save_steps_take_effect_on_resume(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        managed(tmp_path, KillAtEnd(4)).train()
    managed(tmp_path, save_steps=1).train(resume_from_checkpoint="auto")
    assert steps(tmp_path) == [2, 4, 5, 6, 7, 8]


def test_other_data_and_another_model_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        managed(tmp_path, KillAtEnd(4)).train()
    other = managed(tmp_path, case=Case("other", rows=40))
    other.train(resume_from_checkpoint="auto")
    assert {"data.length", "data.fingerprint"} & {change.what for change in other.resume_report.changed}

    wider = lastgood.manage(
        Trainer(model=tiny_gpt2(vocab_size=300), args=arguments(tmp_path), train_dataset=Bytes(64), data_collator=Pad())
    )
    with pytest.raises(lastgood.Incompatible, match=r"transformer\.wte\.weight"):
        wider.train(resume_from_checkpoint="auto")


def test_another_base_model_under_an_adapter_is_noticed(tmp_path: Path) -> None:
    lora = Case("lora", lora=True, args={"max_steps": 4})
    lastgood.manage(lora.trainer(tmp_path)).train()
    other = Case("lora", lora=True, args={"max_steps": 8}, model={"seed": 99})
    with pytest.raises(lastgood.IncompleteRestore, match="base model"):
        lastgood.manage(other.trainer(tmp_path)).train(resume_from_checkpoint="auto")
    allowed = lastgood.manage(other.trainer(tmp_path), allow_missing=["base_model"])
    assert allowed.train(resume_from_checkpoint="auto").global_step == 8


def test_another_adapter_setting_is_named(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def trainer(alpha: int) -> Any:
        built = Case("lora", args={"max_steps": alpha}).trainer(tmp_path)
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["c_attn"], fan_in_fan_out=True)
        built.model = built.model_wrapped = get_peft_model(tiny_gpt2(), config)
        return lastgood.manage(built)

    trainer(4).train()
    changed = trainer(8)
    changed.train(resume_from_checkpoint="auto")
    said = {change.what: (change.saved, change.now) for change in changed.resume_report.changed}
    assert said["adapters.default.lora_alpha"] == ("4", "8")


def test_another_optimizer_or_another_trained_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        managed(tmp_path, KillAtEnd(4)).train()
    with pytest.raises(lastgood.Incompatible, match="SGD"):
        managed(tmp_path, optim="sgd").train(resume_from_checkpoint="auto")
    frozen = managed(tmp_path)
    frozen.model.transformer.wpe.weight.requires_grad_(False)
    with pytest.raises(lastgood.Incompatible, match=r"transformer\.wpe\.weight"):
        frozen.train(resume_from_checkpoint="auto")


def test_patience_of_early_stopping_survives(tmp_path: Path) -> None:
    scores = Scores({2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0, 10: 5.0})
    settings = {**BEST, "max_steps": 10, "eval_strategy": "steps", "eval_steps": 2}
    case = Case("x", evaluate=True)
    first = managed(tmp_path, EarlyStoppingCallback(3), KillAtEnd(5), case=case, **settings)
    with pytest.raises(Stop):
        scores.install(first).train()
    second = scores.install(managed(tmp_path, EarlyStoppingCallback(3), case=case, **settings))
    assert second.train(resume_from_checkpoint="auto").global_step == 8


def test_save_strategy_best_and_no(tmp_path: Path) -> None:
    scores = Scores({2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5})
    settings = {**BEST, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"}
    scores.install(managed(tmp_path / "best", case=Case("x", evaluate=True), **settings)).train()
    assert steps(tmp_path / "best") == [2, 4]
    assert lastgood.open(tmp_path / "best").best("eval_loss").step == 4
    managed(tmp_path / "no", save_strategy="no").train()
    assert steps(tmp_path / "no") == []


def test_save_steps_as_a_share_of_the_run(tmp_path: Path) -> None:
    managed(tmp_path, save_steps=0.5).train()
    assert steps(tmp_path) == [4, 8]


def test_the_mixin_can_be_inherited_openly(tmp_path: Path) -> None:
    class Mine(lastgood.ManagedTrainer):  # type: ignore[misc, valid-type]
        pass

    def trainer(*callbacks: Any) -> Any:
        return Mine(
            model=tiny_gpt2(),
            args=arguments(tmp_path),
            train_dataset=Bytes(64),
            data_collator=Pad(),
            callbacks=list(callbacks),
        )

    with pytest.raises(Stop):
        trainer(KillAtEnd(5)).train(resume_from_checkpoint="auto")
    second = trainer()
    second.train(resume_from_checkpoint="auto")
    assert second.resume_report.step == 4


def test_a_subclass_keeps_its_own_overrides(tmp_path: Path) -> None:
    seen: list[int] = []

    class Mine(Trainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            seen.append(self.state.global_step)
            super()._save_checkpoint(model, trial)

    trainer = lastgood.manage(
        Mine(model=tiny_gpt2(), args=arguments(tmp_path), train_dataset=Bytes(64), data_collator=Pad())
    )
    trainer.train()
    assert isinstance(trainer, Mine)
    assert seen == steps(tmp_path) == [2, 4, 6, 8]


def test_training_twice_and_saving_the_model_by_hand(tmp_path: Path) -> None:
    trainer = managed(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "model.safetensors").exists()
    trainer.train(resume_from_checkpoint="auto")


def test_trainer_state_json_is_what_notebooks_expect(tmp_path: Path) -> None:
    managed(tmp_path).train()
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    assert [row["step"] for row in state["log_history"] if "loss" in row] == list(range(1, 9))
