"""Rules about disks and memory that run out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from lastgood import policy
from lastgood.doctor.case import Case
from lastgood.doctor.log import Raised
from lastgood.doctor.rule import Rule, Sight
from lastgood.doctor.rules import moments, space_disk
from lastgood.manager import RESERVE
from lastgood.units import size


def _full(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    assert case.log is not None
    if "</torch_" in raised.text or "/dev/shm" in raised.text:
        return  # shared memory, not a disk: CKS007
    far = space_disk.elsewhere(case, raised.text)
    yield Sight(
        saw=case.log.line_of(match),
        evidence=(*far, *space_disk.room(case)),
        fix=("make room there, or point TMPDIR and HF_HOME to a larger disk",) if far else space_disk.fix(case),
    )


def _full_unsaid(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """torch's words for a write that came up short; other rules speak where the log has the reason."""
    assert case.log is not None
    if re.search(OTHERS, raised.text):
        return
    evidence = list(space_disk.room(case))
    whole = policy.latest(case.disk.records) if case.disk is not None else None
    if case.disk is not None and whole is not None and case.disk.free > whole.size + RESERVE:
        evidence.append(
            "there is room for a save now: something was removed since, or a quota or a limit of the file size"
            " (ulimit -f) stopped it; `quota -s` and `ulimit -f` decide"
        )
    yield Sight(saw=case.log.line_of(match), evidence=tuple(evidence), fix=space_disk.fix(case))


def _write_failed(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    assert case.log is not None
    if re.search(r"File too large|(?:Errno|os error) 27\b", raised.text):
        yield Sight(
            saw=case.log.line_of(match),
            evidence=space_disk.room(case),
            means="the file grew beyond the largest that is allowed: what lies there is cut off",
            fix=("ulimit -f unlimited before the start", "the file system's own limit: 4 GiB on FAT32, exFAT has none"),
        )
        return
    yield Sight(saw=case.log.line_of(match), evidence=space_disk.room(case), fix=(*space_disk.fix(case), "try again"))


def _quota(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    assert case.log is not None
    yield Sight(
        saw=case.log.line_of(match),
        evidence=(*space_disk.elsewhere(case, raised.text), *space_disk.room(case)),
        fix=("quota -s, on Lustre `lfs quota -h -u $USER {root}`: bytes and files", *space_disk.fix(case)),
    )


def _gpu(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Memory that ran out in an ordinary step is no matter of checkpoints: nothing is said about it."""
    assert case.log is not None
    evidence = []
    whole = policy.latest(case.disk.records) if case.disk is not None else None
    if whole is not None and case.disk is not None:
        files = case.disk.files(whole)
        state = sum(n for name, n in files.items() if "optim" in name)
        evidence.append(f"{whole.name}: {size(whole.size)}, of which {size(state)} are the optimizer's state")
    if moments.loading(raised):
        yield Sight(
            saw=f"while a checkpoint was loaded: {case.log.line_of(match)}",
            evidence=tuple(evidence),
            means="the run that saved had room; a resume needs more for a moment, since what is loaded comes on top",
            fix=(
                'torch.load(..., map_location="cpu"), then load_state_dict',
                "empty the GPU of other processes (nvidia-smi): the run that crashed may still hold its memory",
                "delete the model that from_pretrained made before the Trainer loads the checkpoint",
            ),
        )
    elif moments.saving(raised):
        yield Sight(
            saw=f"while a checkpoint was saved: {case.log.line_of(match)}",
            evidence=tuple(evidence),
            means="the checkpoint of this step isn't whole",
            fix=(
                "fsdp_config state_dict_type='SHARDED_STATE_DICT': nothing is gathered on one GPU",
                "FullStateDictConfig(offload_to_cpu=True, rank0_only=True)",
                "torch.cuda.empty_cache() before the save",
            ),
        )


def _host(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Who was killed and when; whether by the kernel or the scheduler stands in the kernel's log alone."""
    assert case.log is not None
    text = match.string
    shared = re.search(r"</torch_|/dev/shm|shared memory|Bus error", match.group(0) + text[match.end() :][:300])
    begun = moments.begun(match)
    newest = case.disk.newest if case.disk is not None else None
    half = newest is not None and newest.state == "incomplete"
    evidence = [f"before it the log says: {begun}"] if begun else []
    if case.disk is not None:
        evidence += space_disk.half_written(case.disk)
        evidence += _memory(shared=bool(shared))
        whole = policy.latest(case.disk.records)
        evidence += [f"{whole.name} takes {size(whole.size)} on disk, and so much in memory"] if whole else []
    if shared:
        yield Sight(
            saw=case.log.line_of(match),
            evidence=tuple(evidence),
            means="the shared memory of the data loader's workers (or of an asynchronous save) was full",
            fix=("docker run --shm-size=16g, or --ipc=host", "dataloader_num_workers=0 tells whether it is that"),
        )
        return
    saving = bool(begun) or half or moments.saving(raised)
    yield Sight(
        saw=case.log.line_of(match),
        evidence=tuple(evidence),
        severity=None if saving else "warning",
        means=""
        if saving
        else "nothing tells of a save at that moment: the kernel (memory) or the scheduler (time) ended the process;"
        " `dmesg | grep -i oom` or the job's record decides",
    )


def _memory(*, shared: bool) -> list[str]:
    """The memory of this machine, which is the one that failed if the run directory is local."""
    try:
        if shared:
            status = os.statvfs("/dev/shm")
            return [f"/dev/shm of this machine: {size(status.f_blocks * status.f_frsize)}"]
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return [f"memory of this machine: {size(total)}"]
    except (OSError, ValueError, AttributeError):
        return []


def _unwritable(case: Case, raised: Raised, match: re.Match[str]) -> Iterator[Sight]:
    """Only of the run directory, or of what a save does: other programs' files are denied for other reasons."""
    assert case.log is not None
    far = space_disk.elsewhere(case, raised.text)
    about = moments.saving(raised) or raised.passed("save", "save_file", "makedirs") or "checkpoint" in raised.text
    if far or not (about or "open file failed" in raised.text or "serializing" in raised.text):
        return
    evidence = []
    if case.disk is not None:
        root = case.disk.root
        status = root.stat()
        read_only = hasattr(os, "statvfs") and bool(os.statvfs(root).f_flag & getattr(os, "ST_RDONLY", 1))
        may = (
            "is mounted read-only" if read_only else "can" + ("" if os.access(root, os.W_OK) else "'t") + " be written"
        )
        evidence.append(f"{root} {may} now; it belongs to user {status.st_uid}, mode {status.st_mode & 0o777:o}")
        evidence += space_disk.half_written(case.disk)
    yield Sight(saw=case.log.line_of(match), evidence=tuple(evidence))


NO_SPACE = r"No space left on device|\[Errno 28\]|os error 28\b"
QUOTA = r"Disk quota exceeded|\[Errno 122\]|os error 122\b"
TOO_LARGE = r"File too large|\[Errno 27\]|os error 27\b"
READ_ONLY = r"Read-only file system|\[Errno 30\]|os error 30\b"
DENIED = r"\[Errno 13\] Permission denied|Permission denied \(os error 13\)|strerror: Permission denied"
OTHERS = "|".join((NO_SPACE, QUOTA, TOO_LARGE, READ_ONLY, DENIED))

RULES: tuple[Rule, ...] = (
    Rule(
        code="CKS001",
        title="The disk is full",
        severity="error",
        message=NO_SPACE,
        log=_full,
        run=space_disk.full_now,
        over=("CKS002", "CKS003", "CKS005"),
        means="the checkpoint that was being written isn't whole, and the run ended or goes on without saving",
        cause="Every save writes a whole new checkpoint before an older one goes, so the disk needs room for one more"
        " than are kept. A full checkpoint is about three times the weights in 32 bit, for AdamW keeps two numbers per"
        " weight. A disk can also run out of inodes (files) while bytes are free, and the file that failed may lie"
        " elsewhere: in /tmp or in a cache.",
        fix=("lastgood -C {root} prune --to-free 20GB",),
        source="ENOSPC, errno 28; safetensors, torch.save in its older format, Python's own files",
    ),
    Rule(
        code="CKS002",
        title="A file of torch.save came out shorter than it should: the disk was full",
        severity="error",
        message=r"inline_container\.cc:\d+\].*unexpected pos|basic_ios::clear: iostream error",
        log=_full_unsaid,
        over=("CKS003", "CKS005"),
        means="the file, most often optimizer.pt, is cut off; nothing can load it, and a resume from here fails",
        cause="torch's zip writer notices that the file isn't as long as what it wrote, and says `unexpected pos` with"
        " two positions instead of the system's reason. That reason is nearly always a full disk, else a quota, a limit"
        " of the file size or a network disk that failed.",
        fix=("lastgood -C {root} prune --to-free 20GB",),
        source="torch 2.13, caffe2/serialize/inline_container.cc, PyTorchStreamWriter; provoked on a full tmpfs",
    ),
    Rule(
        code="CKS003",
        title="Writing a checkpoint failed",
        severity="error",
        message=rf"PytorchStreamWriter failed writing file|{TOO_LARGE}|write\(\): fd \d+ failed with",
        log=_write_failed,
        means="the file is cut off, and the checkpoint isn't whole",
        cause="The system refused a write: the disk or a quota is full, a limit of the file size is reached, or a"
        " network disk failed for a moment.",
        fix=("lastgood -C {root} df",),
        source="torch, PyTorchStreamWriter; EFBIG, errno 27",
    ),
    Rule(
        code="CKS004",
        title="The quota of the user or group is used up, though the disk has room",
        severity="error",
        message=QUOTA,
        log=_quota,
        over=("CKS001", "CKS002", "CKS003", "CKS005"),
        means="the checkpoint that was being written isn't whole; df doesn't show it, for the disk itself isn't full",
        cause="Shared file systems give each user or project a share of bytes and of files. Checkpoints in a home"
        " directory reach it soon.",
        fix=("quota -s",),
        source="EDQUOT, errno 122; mmdetection #12069, returnn #1829",
    ),
    Rule(
        code="CKS005",
        title="The saves that are still to come don't fit on the disk",
        severity="warning",
        run=space_disk.upcoming,
        means="the disk will be full before the run ends",
        cause="The size of the newest checkpoint, the steps that are left and the policy (save_total_limit, or Keep)"
        " say how much is still to be written. A new checkpoint is written before an old one goes.",
        fix=("lastgood -C {root} prune --to-free 20GB",),
        source="simulate.simulate with the run's own policy; store.local.free",
    ),
    Rule(
        code="CKS006",
        title="GPU memory ran out while a checkpoint was loaded or saved",
        severity="error",
        message=r"(?:CUDA|HIP|XPU|MPS backend) out of memory|OutOfMemoryError: ",
        log=_gpu,
        means="the run ends",
        cause="Loading puts the saved state beside what is there already; if it is loaded straight to the GPU, that"
        " takes twice the memory for a moment. A save that gathers a sharded model on one GPU takes all of it there.",
        fix=('map_location="cpu"',),
        source="torch.load, FSDP's FULL_STATE_DICT; transformers #3730, #22159, accelerate #1444, Lightning #20312",
    ),
    Rule(
        code="CKS007",
        title="The machine's memory ran out, or something killed the process",
        severity="error",
        message=r"DefaultCPUAllocator: can't allocate memory|\[Errno 12\] Cannot allocate memory|^MemoryError\b"
        r"|unable to (?:write to|mmap \d+ bytes from|open shared memory object) (?:file )?</torch_"
        r"|DataLoader worker \(pid\(?s?\)? [^)]*\).*(?:is killed by signal: (?:Killed|Bus error)|exited unexpectedly)"
        r"|No space left on device.*/dev/shm|/dev/shm.*No space left on device",
        warning=r"Signal 9 \(SIGKILL\)|exitcode\s*:\s*-9\b|Out of memory: Killed process|oom-kill|oom_kill event"
        r"|^\S+: line \d+:\s+\d+ Killed\b|^Killed\s*$|insufficient shared memory \(shm\)",
        log=_host,
        means="the checkpoint of this moment isn't whole: while saving, a copy of the state lies in memory besides the"
        " running one",
        cause="A save on the CPU side holds one more copy of the state: gathered shards, a pinned copy for an"
        " asynchronous save, safetensors' buffer. Containers count files in /dev/shm as memory too, and have 64 MB of"
        " it by default. The kernel kills without a traceback.",
        fix=(
            "save synchronously (no async_save), or shard the state (SHARDED_STATE_DICT)",
            "give the job more memory: a full checkpoint has to fit twice",
            "dmesg | grep -i oom tells whether the kernel did it",
        ),
        source="Linux oom killer; torch elastic's report; torch DataLoader; torch, c10/core/impl/alloc_cpu.cpp",
    ),
    Rule(
        code="CKS008",
        title="The run directory can't be written",
        severity="error",
        message=rf"{READ_ONLY}|{DENIED}|Transport endpoint is not connected|\[Errno 107\]",
        log=_unwritable,
        means="nothing was saved since; the checkpoints from before are as they were",
        cause="A network disk or a mounted drive (Google Drive in Colab, NFS) dropped its connection and came back"
        " read-only, the kernel remounted a disk after an error, or the directory belongs to another user.",
        fix=(
            "mount it again, then start the run again: it goes on from {good}",
            "save to a local disk and copy from there (lastgood checkout, or rsync)",
            "chown or chmod, if it belongs to somebody else",
        ),
        source="EROFS, EACCES, ENOTCONN; torch 2.13 says `open file failed with strerror: ...`",
    ),
)
