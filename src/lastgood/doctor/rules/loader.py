"""Rules about the data order, and what else makes a resumed run differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lastgood.doctor.case import Case
from lastgood.doctor.log import Raised
from lastgood.doctor.rule import Rule, Sight, advice
from lastgood.doctor.rules import loader_disk as seen
from lastgood.doctor.rules.distributed_disk import RANDOM, ranks
from lastgood.model import TRAINERS, Record

BATCH = ("per_device_train_batch_size",)
CADENCE = ("logging_steps", "eval_steps", "save_steps")
ORDER = (
    "seed", "data_seed", "gradient_accumulation_steps", "dataloader_drop_last", "train_sampling_strategy",
    "group_by_length", "world_size",
)  # fmt: skip
SCHEDULE = ("max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "lr_scheduler_kwargs")
MANY = 10_000
"""Batches from which on skipping them by loading them takes a while."""


def _skips_nothing(case: Case) -> Iterator[Sight]:
    if case.settings is not None and case.settings.ignore_data_skip:
        yield Sight(saw="ignore_data_skip=True")


def _told_otherwise(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """The Trainer's own list, in the lines below its warning."""
    rows = re.findall(
        r"^\s*(\w+): (.+?) \(from args\) != (.+?) \(from trainer_state\.json\)",
        match.string[match.end() : match.end() + 2000],
        re.MULTILINE,
    )
    found = [(name, saved, now) for name, now, saved in rows]
    if found:
        yield _changed(found, [])


def _otherwise(case: Case) -> Iterator[Sight]:
    if together := seen.given(case):
        record, saved, now = together
        if found := seen.differing(saved, now, (*BATCH, *CADENCE)):
            yield _changed(found, seen.batches(case, record, saved, now), record.name)
    for before, after in seen.neighbours(case):
        assert case.disk is not None
        saved, now = case.disk.arguments(before), case.disk.arguments(after)
        if found := seen.differing(saved, now, BATCH):
            effect = seen.batches(case, before, saved, now)
            yield Sight(
                where=after.name,
                saw=f"since {before.name}: {seen.said(found)}",
                evidence=tuple(effect),
                severity="info",
            )


def _changed(found: Sequence[seen.Difference], effect: Sequence[str], where: str = "") -> Sight:
    batch = [item for item in found if item[0] in BATCH]
    return Sight(
        where=where,
        saw=f"saved -> now: {seen.said(found)}",
        evidence=tuple(effect),
        severity=None if batch else "info",
        means="" if batch else "only when it logs, evaluates and saves changes; the model doesn't notice",
        fix=(*(f"{name}={saved}" for name, saved, _ in batch),
             "gradient_accumulation_steps, so that their product stays the same") if batch
        else ("nothing, if it was meant",),
    )  # fmt: skip


def _order(case: Case) -> Iterator[Sight]:
    assert case.disk is not None
    if together := seen.given(case):
        record, saved, now = together
        if found := seen.differing(saved, now, ORDER):
            same_size = not seen.differing(saved, now, BATCH)
            effect = seen.batches(case, record, saved, now) if same_size else []
            yield _other_order(record, f"saved -> now: {seen.said(found)}", found, effect)
    changed = {record.name: found for record, found in seen.facts(case)}
    for before, after in seen.neighbours(case):
        found = seen.differing(case.disk.arguments(before), case.disk.arguments(after), ORDER)
        if found := [*found, *changed.pop(after.name, [])]:
            yield _other_order(after, f"since {before.name}: {seen.said(found)}", found, [], past=True)
    for record in case.disk.close:
        if found := changed.get(record.name, []):
            yield _other_order(record, f"since the checkpoint before: {seen.said(found)}", found, [], past=True)


def _other_order(
    record: Record, saw: str, found: Sequence[seen.Difference], effect: Sequence[str], *, past: bool = False
) -> Sight:
    fix = tuple(f"{name}={saved}" for name, saved, _ in found if name in ORDER and name != "world_size")
    return Sight(
        where=record.name,
        saw=saw,
        evidence=tuple(effect),
        severity="info" if past else None,
        means="from there on the data came in another order: part of that epoch was seen twice or never"
        if past
        else "",
        fix=("nothing, if it was meant",) if past else fix,
    )


def _schedule(case: Case) -> Iterator[Sight]:
    assert case.disk is not None
    if together := seen.given(case):
        record, saved, now = together
        yield from _stretched(case, record, saved, now)
    for before, after in seen.neighbours(case):
        then, later = (case.disk.state(record).get("max_steps") for record in (before, after))
        saved, now = case.disk.arguments(before), case.disk.arguments(after)
        found = [
            *seen.differing({"steps in all": then}, {"steps in all": later}, ("steps in all",)),
            *seen.differing(saved, now, ("lr_scheduler_type", "warmup_steps", "warmup_ratio")),
        ]
        if found and isinstance(then, int) and isinstance(later, int):
            yield Sight(
                where=after.name,
                saw=f"since {before.name}: {seen.said(found)}",
                evidence=tuple(_rates(case, before, saved, {**now, "max_steps": later})),
                severity="info",
                fix=("nothing, if it was meant",),
            )


def _stretched(case: Case, record: Record, saved: seen.Arguments, now: seen.Arguments) -> Iterator[Sight]:
    assert case.disk is not None
    told = case.disk.state(record).get("max_steps")
    before = told if type(told) is int and told > 0 else seen.length(case, record, saved)
    after = seen.length(case, record, {**saved, **now})
    found = seen.differing(saved, now, SCHEDULE)
    if before == after:  # more epochs change nothing where max_steps decides
        found = [item for item in found if item[0] not in ("max_steps", "num_train_epochs")]
    rate = seen.differing(saved, now, ("learning_rate",))
    if not found and not rate:
        return
    evidence = [f"steps in all: {before} -> {after}"] if before != after and after is not None else []
    evidence += _rates(case, record, saved, now) if found else []
    if after is not None and record.step >= after:
        evidence.append(f"{record.name} is at step {record.step} already: the run would end at once")
    if rate:
        evidence.append("learning_rate has no effect: the optimizer's state brings the saved one with it")
    yield Sight(
        where=record.name,
        saw=f"saved -> now: {seen.said([*found, *rate])}",
        evidence=tuple(evidence),
        means="" if found else f"the run goes on with {rate[0][1]}, not with {rate[0][2]}",
        fix=(*(f"{name}={value}" for name, value, _ in found),
             "or a fresh start from the weights, if the new schedule is wanted from its beginning"),
    )  # fmt: skip


def _rates(case: Case, record: Record, saved: seen.Arguments, now: seen.Arguments) -> list[str]:
    both = seen.rates(case, record, saved, now)
    if both is None:
        return []
    return [f"learning rate at step {record.step + 1}: {both[0]:.4g} by the schedule as it was, {both[1]:.4g} now"]


def _far(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    count = int(next(group for group in match.groups() if group).replace(",", ""))
    assert case.log is not None
    if count >= MANY:
        yield Sight(saw=case.log.line_of(match), evidence=(f"{count:,} batches are passed over",))


def _stream(case: Case) -> Iterator[Sight]:
    """A managed run says what its data is: a stream has no length."""
    assert case.disk is not None
    record = case.disk.good
    data = record.manifest.facts.get("data") if record is not None and record.manifest is not None else None
    if record is None or record.manifest is None or not isinstance(data, dict) or "length" in data:
        return
    times = record.manifest.arguments.get("gradient_accumulation_steps")
    count = record.step * (times if type(times) is int and times > 0 else 1)
    if data.get("type") and count >= MANY:
        yield Sight(
            where=record.name,
            saw=f"the data is a stream ({str(data['type'])[:60]}), {count:,} batches are behind",
            evidence=("it has no length, so a resume can only load them again",),
        )


def _no_random(case: Case) -> Iterator[Sight]:
    """An optimizer is there, so it is meant to be resumed from; without one other rules speak."""
    assert case.disk is not None
    for record in case.disk.close:
        parts = record.manifest.parts if record.manifest is not None else {}
        saved = record.layout in TRAINERS and record.state != "incomplete"
        if saved and parts.get("optimizer") and not parts.get("rng"):
            yield Sight(where=record.name, saw="there is no rng_state.pth, though the optimizer was saved")


def _no_scaler(case: Case) -> Iterator[Sight]:
    assert case.disk is not None
    for record in case.disk.close:
        if record.layout not in ("trainer", "fsdp") or "training_args.bin" not in case.disk.files(record):
            continue
        parts = record.manifest.parts if record.manifest is not None else {}
        if not parts.get("optimizer") or parts.get("scaler"):
            continue
        saved = case.disk.arguments(record)
        if saved.get("fp16") is True and not saved.get("deepspeed"):
            processes = len(ranks(case.disk, record, RANDOM)) or 1
            yield Sight(
                where=record.name,
                saw="fp16=True, and there is no scaler.pt",
                evidence=(f"optimizer and scheduler are there, saved by {processes} process{'es' * (processes > 1)}",),
            )


def _lives_on(case: Case) -> Iterator[Sight]:
    s = case.settings
    if s is not None and s.persistent_workers and s.num_workers > 0:
        yield Sight(saw="dataloader_persistent_workers=True")


RULES: tuple[Rule, ...] = (
    Rule(
        code="CKL001",
        title="A resume doesn't go to its place in the data",
        severity="warning",
        arguments=lambda case: advice(_skips_nothing(case), case),
        means="a resumed run sees the first samples of the epoch twice and the last ones never",
        cause="With ignore_data_skip the Trainer begins the epoch anew after a resume, though it counts on from the"
        " step that was saved. People turn it on because skipping takes long; it takes long only where batches have to"
        " be loaded to be passed over.",
        fix=("ignore_data_skip=False",),
        source="transformers 5.23, Trainer._init_training_state",
    ),
    Rule(
        code="CKL002",
        title="The batch size, or how often is saved, isn't that of the checkpoint",
        severity="warning",
        warning=r"The following arguments do not match the ones in the .trainer_state\.json.",
        log=_told_otherwise,
        run=_otherwise,
        means="an epoch has another number of steps: the place in the data, the end of the run and the learning rate"
        " move, and part of the data is seen twice or never",
        cause="The Trainer counts in steps. It finds its place in the epoch by dividing the saved step by the steps per"
        " epoch of now, and with another batch size that is another place. It says so in one warning line and goes on.",
        fix=("the saved values",),
        source="transformers 5.23, compare_trainer_and_checkpoint_args",
    ),
    Rule(
        code="CKL003",
        title="The data comes in another order than before the save",
        severity="warning",
        run=_order,
        means="a resume says nothing; part of the epoch is seen twice or never, and the run isn't the same any more",
        cause="The order of an epoch follows from the seed, the data and the number of processes, and how far a step"
        " goes from the gradient accumulation. If any of them changes at a resume, the batches that are skipped aren't"
        " those that were seen.",
        fix=("the saved values",),
        source="transformers 5.23: compare_trainer_and_checkpoint_args looks at none of these; sampler by data_seed",
    ),
    Rule(
        code="CKL004",
        title="The learning rate schedule isn't that of the checkpoint",
        severity="warning",
        message=r"^KeyError: 'lr_lambdas'",
        log=seen.other_kind,
        run=_schedule,
        means="the learning rate jumps at the resume: the schedule is computed anew for the new length, from the saved"
        " step on",
        cause="A schedule isn't saved, only how many steps it has done. With another max_steps, number of epochs or"
        " warm-up the curve is another one, and the run goes on where that one is by then. The base learning rate, on"
        " the other hand, comes with the optimizer's state: a new learning_rate has no effect.",
        fix=("the saved values",),
        source="transformers 5.23, Trainer._load_optimizer_and_scheduler; torch LambdaLR.load_state_dict",
    ),
    Rule(
        code="CKL005",
        title="A resume has to pass over very many batches",
        severity="info",
        warning=r"Fast-forwarding the dataloader past [\d,]+ epochs and\s+([\d,]+) batches"
        r"|Will skip the first \d+ epochs then the first ([\d,]+) batches",
        log=_far,
        run=_stream,
        means="nothing where the data has a length: indices are skipped. A stream (IterableDataset) loads and throws"
        " away every one of them, which takes as long as loading them took",
        cause="A stream can't be entered in the middle unless it can tell where it is (state_dict). Without that, the"
        " only way to the place is to read everything before it again, tokenisation included.",
        fix=(
            "a dataset with state_dict (datasets.IterableDataset) in torchdata's StatefulDataLoader",
            "a dataset with a length instead of a stream",
        ),
        source="transformers 5.23, Trainer; accelerate.skip_first_batches; transformers #11284, #31441",
    ),
    Rule(
        code="CKL006",
        title="A checkpoint has no random states",
        severity="info",
        warning=r"Didn't find an RNG file",
        run=_no_random,
        means="a resume from it works and says nothing, but draws other numbers than the uninterrupted run: dropout and"
        " shuffling differ from there on",
        cause="rng_state.pth is written after the optimizer: a save that was interrupted, or a copy that left it out."
        " The Trainer asks for rng_state.pth on one process and for rng_state_N.pth on several, so another number of"
        " processes doesn't find them either.",
        fix=("lastgood -C {root} resume  # a checkpoint that has everything", "nothing, if bit for bit isn't needed"),
        source="transformers 5.23, Trainer._load_rng_state (a line at the level of information)",
    ),
    Rule(
        code="CKL007",
        title="A run in half precision was saved without its loss scale",
        severity="warning",
        run=_no_scaler,
        means="after a resume the scale begins at 65536 again: the first steps overflow and are left out, the scheduler"
        " counts on",
        cause="fp16 multiplies the loss by a scale that is found while training. It is in scaler.pt; old versions and"
        " own loops don't save it, and a copy may have left it out.",
        fix=("bf16=True, where the GPU can: it needs no scale", "keep scaler.pt with the checkpoint"),
        source="transformers 5.23, Trainer._load_scaler (silent if the file is missing); transformers #34053",
    ),
    Rule(
        code="CKL008",
        title="Data loading processes outlive the epoch",
        severity="warning",
        arguments=_lives_on,
        means="if the dataset draws random numbers, a resume after the first epoch draws others: its workers"
        " keep their random state from epoch to epoch and nothing can read it",
        cause="With persistent workers the processes that load data live on from epoch to epoch, and so do their random"
        " generators. No checkpoint can hold those; new workers begin with fresh ones.",
        fix=("dataloader_persistent_workers=False, unless loading is deterministic",),
        source="torch DataLoader(persistent_workers=True)",
    ),
    Rule(
        code="CKL009",
        title="A resumed run went another way than before",
        severity="warning",
        run=seen.another_way,
        means="the resume wasn't exact",
        cause="A managed run writes a line per step: its loss, and a hash of its data. After a crash the steps since"
        " the last checkpoint are trained again, and should be the same. Other data: seed, sampler, batch size or"
        " workers were changed, or the data was. Another loss on the same data: weights or random states aren't"
        " those that were saved.",
        fix=(
            "lastgood diff ONE OTHER  # the two checkpoints: what was changed between them",
            "lastgood -C {root} doctor --prove STEP -- python train.py",
        ),
        source="lastgood, .lastgood/trail.jsonl",
    ),
)
