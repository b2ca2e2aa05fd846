"""Rules about several processes and their shards."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator

from lastgood.doctor.case import Case
from lastgood.doctor.log import Raised
from lastgood.doctor.rule import Rule, Sight
from lastgood.doctor.rules import moments
from lastgood.doctor.rules.distributed_disk import (
    ZERO,
    few_random_states,
    indices,
    listed,
    lost_shards,
    nearest,
    never_finished,
    ranks,
)


def _zero(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    saved, now = int(match.group(1)), int(match.group(2))
    disk = case.disk
    evidence, place = [], "CHECKPOINT/global_stepN"
    for record in disk.close if disk is not None else ():
        if disk is not None and (found := ranks(disk, record, ZERO)):
            evidence = [f"{record.name} holds ZeRO optimizer files of {max(found) + 1} processes"]
            folder = next(name for name in disk.files(record) if ZERO.search(name)).rpartition("/")[0]
            place = shlex.quote(str(disk.path(record) / folder))
    yield Sight(
        saw=f"saved by {saved} data-parallel processes, resumed by {now}",
        evidence=tuple(evidence),
        fix=(
            f"start with {saved} processes",
            f"python -m deepspeed.checkpoint.ds_to_universal --input_folder {place} --output_folder UNIVERSAL, then"
            " load_universal=true in the section `checkpoint` of the DeepSpeed configuration",
            "weights alone: python zero_to_fp32.py . pytorch_model.bin inside the checkpoint, and a fresh optimizer",
        ),
    )


def _missing_key(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    name = match.group(1)
    if name.endswith(".step"):  # an optimizer whose state has no step: CKV008 knows which
        return
    evidence, fix = _names(case, name)
    yield Sight(saw=f"{name} isn't in the checkpoint", evidence=evidence, fix=fix)


def _names(case: Case, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what the newest index has instead, a fix if only a prefix differs)."""
    if case.disk is None:
        return (), ()
    for record in reversed(case.disk.close):
        for folder, index in indices(case.disk, record):
            there = sorted({item.name for item in index.items})
            where = f"{record.name}/{folder}".rstrip("/")
            tail = [other for other in there if other.endswith(f".{name}") or name.endswith(f".{other}")]
            if tail:
                extra = tail[0].removesuffix(name) or f"no {name.removesuffix(tail[0])!r}"
                line = f"{where} has {tail[0]}: only the beginning of the name differs"
                return (line,), (f"save and load the same nesting: the checkpoint's names begin with {extra!r}",)
            near = difflib.get_close_matches(name, there, 3, 0.8) if len(there) < 20_000 else []
            tops = sorted({other.partition(".")[0] for other in there})
            said = f"the nearest is {listed(near)}" if near else f"its names begin with {listed(tops)}"
            return (f"{where} holds {len(there)} entries; {said}",), ()
    return (), ()


def _shape(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    saved, now, name = match.groups()
    evidence = []
    for record in reversed(case.disk.close) if case.disk is not None else ():
        for folder, index in indices(case.disk, record) if case.disk is not None else ():
            if name in index.tensors:
                dtype, shape = index.tensors[name]
                evidence.append(f"{f'{record.name}/{folder}'.rstrip('/')} has it as {dtype} {list(shape)}")
    yield Sight(saw=f"{name}: saved {saved}, now {now}", evidence=tuple(evidence[:1]))


def _timed_out(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Serious with a save before it; without one only a note, for any collective can time out."""
    newest = case.disk.newest if case.disk is not None else None
    half = newest if newest is not None and newest.state == "incomplete" else None
    line = moments.begun(match)
    evidence = [f"before it the log says: {line}"] if line else []
    if half is not None:
        evidence.append(f"{half.name} is half written: {half.problem}")
    if took := re.search(r"Timeout\(ms\)=(\d{1,12})", match.string[match.start() : match.start() + 600]):
        evidence.append(f"the limit was {int(took[1]) / 1000:g} s (ddp_timeout)")
    assert case.log is not None
    saving = bool(line) or half is not None or moments.saving(raised)
    yield Sight(
        saw=case.log.line_of(match),
        evidence=tuple(evidence),
        severity=None if saving else "info",
        means="" if saving else "processes waited for one that didn't come; nothing in the log tells of a save before",
    )


def _raced(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """A directory that another process renamed or deleted first."""
    assert case.log is not None
    text = match.group(0)
    gone = "No such file" in text
    if gone and not raised.passed("rmtree", "_rmtree_safe_fd", "_rmtree_unsafe", "rename", "replace", "renames"):
        return  # a checkpoint that simply isn't there is another matter
    left = [n for n in case.disk.beside if n.startswith("tmp-checkpoint")] if case.disk is not None else []
    yield Sight(
        saw=case.log.line_of(match),
        evidence=(f"left behind: {listed(sorted(left))}",) if left else (),
    )


def _fsdp(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    name = match.group(1).rstrip("/").rpartition("/")[2]
    record = next((r for r in case.disk.records if r.name == name), None) if case.disk is not None else None
    files = case.disk.files(record) if case.disk is not None and record is not None else {}
    parts = sorted({file.partition("/")[0] for file in files if file.startswith("pytorch_model_fsdp")})
    step = record.step if record is not None else "STEP"
    yield Sight(
        saw=case.log.line_of(match) if case.log is not None else "",
        evidence=(f"{name} holds {listed(parts)}, {sum(files.values())} bytes in {len(files)} files",) if parts else (),
        fix=(
            "start with FSDP as before: fsdp=True, or accelerate launch with the same configuration",
            f"lastgood -C {{root}} export {step} --to accelerate TARGET  # all of it in one piece",
        ),
    )


def _only_model(case: Case) -> Iterator[Sight]:
    """What the Trainer will refuse, from the arguments alone."""
    given, s = case.arguments, case.settings
    assert s is not None
    fsdp = given.get("fsdp") not in (None, False, "", [])
    sharded = "DeepSpeed" if given.get("deepspeed") else "FSDP" if fsdp else ""
    if not s.save_only_model or not sharded:
        return
    config = given.get("fsdp_config")
    kind = config.get("state_dict_type") if isinstance(config, dict) else None
    if s.load_best_model_at_end:
        yield Sight(saw=f"save_only_model=True and load_best_model_at_end=True with {sharded}")
    elif sharded == "FSDP" and isinstance(kind, str) and "SHARDED" in kind.upper() and "UN" not in kind.upper():
        yield Sight(saw=f"save_only_model=True and fsdp_config state_dict_type={kind!r}")


def _custom(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    folder, count = match.group(1), re.search(r"Found checkpoints: (\d+)\s+Registered objects: (\d+)", raised.text)
    if folder is None:
        there = nearest(case.disk, match.group(2)) if case.disk is not None else ()
        yield Sight(saw=f"there is no {match.group(2)}", evidence=there, fix=("name a folder that save_state() wrote",))
        return
    saved, now = count.groups() if count else ("?", "?")
    lines = []
    name = folder.rstrip("/").rpartition("/")[2]
    for record in case.disk.records if case.disk is not None else ():
        if case.disk is not None and record.name.rpartition("/")[2] == name:
            files = [file for file in case.disk.files(record) if file.startswith("custom_checkpoint_")]
            lines.append(f"{record.name} holds {listed(files) or 'no custom_checkpoint_N.pkl'}")
    yield Sight(saw=f"{saved} custom objects were saved, {now} are registered now", evidence=tuple(lines))


RULES: tuple[Rule, ...] = (
    Rule(
        code="CKD001",
        title="The optimizer was saved by another number of processes than resume now",
        severity="error",
        message=r"used a DP world size of (\d+) but the current world size is (\d+)",
        log=_zero,
        means="DeepSpeed doesn't load the optimizer: ZeRO's parts fit the old number of processes alone",
        cause="ZeRO cuts the optimizer's state into as many pieces as there are data-parallel processes, and the pieces"
        " are saved as they are. With another number of GPUs nothing puts them together again unless they are"
        " converted to the universal format first.",
        fix=("start with the old number of processes",),
        source="DeepSpeed, ZeRO optimizers' load_state_dict; DeepSpeed #2898, #3810, #5405",
    ),
    Rule(
        code="CKD002",
        title="The distributed checkpoint doesn't have something that the model or optimizer expects",
        severity="error",
        message=r"Missing key in checkpoint state_dict: (\S+?)\.?$",
        log=_missing_key,
        means="nothing is loaded: torch.distributed.checkpoint wants every name that is asked for",
        cause="The state that is loaded into is nested or built otherwise than the one that was saved: another wrapper"
        " (model., _orig_mod., module.), an adapter more, another optimizer, or a parameter that never got a"
        " gradient and so had no optimizer state when it was saved.",
        fix=(
            "build the state to load into exactly as for the save: the same wrappers, the same optimizer",
            "DefaultLoadPlanner(allow_partial_load=True), if what is missing may start afresh",
        ),
        source="torch 2.13, distributed/checkpoint/default_planner.py, create_default_local_load_plan",
    ),
    Rule(
        code="CKD003",
        title="A tensor in the distributed checkpoint has another shape than the model's",
        severity="error",
        message=r"Size mismatch between saved (torch\.Size\(\[[^\]]*\]\)|\S+) and current: (.+?) for (\S+)",
        log=_shape,
        means="nothing is loaded",
        cause="Another number of processes is no reason: shapes are those of whole tensors. The model was built from"
        " another configuration, or its vocabulary was resized before the save and not now.",
        fix=("build the model from the configuration that was saved, then load",),
        source="torch 2.13, distributed/checkpoint/default_planner.py, create_default_local_load_plan",
    ),
    Rule(
        code="CKD004",
        title="A distributed save never finished: its index is missing",
        severity="error",
        message=r"metadata is None; global metadata read failed"
        r"|\[Errno 2\] No such file or directory: '[^']*/\.metadata'",
        run=never_finished,
        means="it can't be loaded, whatever the shards hold: the index over them is written last",
        cause="Every process writes its shards, then the first one writes .metadata, which says where everything lies."
        " A crash, a full disk or a process that died in between leaves shards that nobody can read.",
        fix=(
            "lastgood -C {root} log  # which checkpoints are whole; load the one before",
            "lastgood -C {root} doctor --fix  # moves it aside",
        ),
        source="torch 2.13, distributed/checkpoint/state_dict_loader.py; filesystem.py, finish",
    ),
    Rule(
        code="CKD005",
        title="Shards of a distributed checkpoint are missing",
        severity="error",
        message=r"(?:No such file or directory|FileNotFoundError).*__\d+_\d+\.distcp",
        run=lost_shards,
        means="it can't be loaded from here",
        cause="Each process writes its own part. If every node wrote to a disk of its own, no node has all parts; else"
        " a copy was interrupted or left files out.",
        fix=(
            "copy the missing files together from the nodes that wrote them",
            "save to storage that all nodes share",
            "lastgood -C {root} log  # load an older checkpoint",
        ),
        source="torch 2.13, distributed/checkpoint/filesystem.py, FileSystemReader.read_data",
    ),
    Rule(
        code="CKD006",
        title="Processes waited for each other in vain around a save",
        severity="error",
        message=r"Timed out waiting \d+ms for (?:recv|send) operation to complete",
        warning=r"Watchdog caught collective operation timeout",
        log=_timed_out,
        means="the run ends, and the checkpoint that was being written isn't whole",
        cause="Saving sharded state takes all processes: if only the first one calls save (`if rank == 0:` around"
        " trainer.save_model or save_state), the others wait until the timeout. The same happens if writing takes"
        " longer than the timeout, or if one process died of a full disk or of memory.",
        fix=(
            "call save on every process, without `if rank == 0:` around it",
            "ddp_timeout=7200, if writing simply takes that long",
            "look at the other processes' logs: one of them may have failed first",
        ),
        source="torch, ProcessGroupNCCL's watchdog, gloo; accelerate #2000, #2375, #3250",
    ),
    Rule(
        code="CKD007",
        title="Several processes renamed or deleted the same checkpoint",
        severity="error",
        message=r"(?:\[Errno 39\] )?Directory not empty: .*(?:tmp-)?checkpoint.*"
        r"|\[Errno 2\] No such file or directory: '[^'\n]*(?:tmp-checkpoint|checkpoint-\d+)[^'\n]*'",
        log=_raced,
        means="the process that came second fails, though the checkpoint may be whole",
        cause="Each node or process takes itself for the one that renames the finished directory or deletes the old"
        " one. On shared storage they meet in the same directory. transformers 4.36 to 4.38 renamed on every"
        " process.",
        fix=(
            "save_on_each_node=False on shared storage",
            "pip install --upgrade transformers",
            "rename and delete on the first process alone, then wait for it (barrier)",
        ),
        source="transformers #27820, #28364, #28848, #35580, #20988, #13035",
    ),
    Rule(
        code="CKD008",
        title="A checkpoint of FSDP is loaded by a run without FSDP",
        severity="error",
        message=r"Checkpoint found at (.+?) is only supported when using PyTorch FSDP",
        log=_fsdp,
        means="the Trainer refuses: the weights lie in FSDP's own form",
        cause="Under FSDP the Trainer saves the model as pytorch_model_fsdp, in shards or in one file. Only a run that"
        " is started with FSDP reads that back.",
        fix=("start with FSDP as before",),
        source="transformers 5.23, Trainer._load_from_checkpoint",
    ),
    Rule(
        code="CKD009",
        title="Saving the model alone doesn't go together with how the weights are sharded",
        severity="error",
        message=r"save_only_model option is not compatible with FSDP state dict type 'SHARDED_STATE_DICT'"
        r"|can't be used with .save_only_model. along with .load_best_model_at_end",
        arguments=_only_model,
        means="the Trainer refuses to start",
        cause="With save_only_model there is no sharded state from which the best model could be loaded at the end, and"
        " FSDP's shards alone aren't a model that from_pretrained can read.",
        fix=(
            "save_only_model=False, and keep=lastgood.Keep(last=..., full=1) to save space",
            "fsdp_config state_dict_type='FULL_STATE_DICT', load_best_model_at_end=False",
        ),
        source="transformers 5.23, Trainer.create_accelerator_and_postprocess",
    ),
    Rule(
        code="CKD010",
        title="Random states of some processes are missing",
        severity="warning",
        run=few_random_states,
        means="a resume says nothing: these processes draw other numbers than without the interruption (dropout,"
        " shuffling), and if one of them died in the save, the rest may be older than it looks",
        cause="Every process writes its own rng_state file. One is missing if its process died during the save, if its"
        " node wrote to a disk of its own, or if a copy left it out. The Trainer only logs that at the level of"
        " information.",
        fix=(
            "lastgood -C {root} resume --check  # which checkpoint is whole",
            "copy the missing files from the node that wrote them",
        ),
        source="transformers 5.23, Trainer._load_rng_state",
    ),
    Rule(
        code="CKD011",
        title="What accelerate loads isn't what it saved",
        severity="error",
        message=r"Number of custom checkpoints in folder (.+?) does not match the number of registered objects"
        r"|Tried to find (.+?) but folder does not exist",
        log=_custom,
        means="load_state() stops; by then model and optimizer may already be loaded",
        cause="save_state() writes one custom_checkpoint_N.pkl for each object given to register_for_checkpointing(),"
        " in that order, and load_state() wants as many objects registered; or the folder isn't where it was.",
        fix=("register the same objects in the same order before load_state()",),
        source="accelerate 1.15, Accelerator.load_state",
    ),
)
