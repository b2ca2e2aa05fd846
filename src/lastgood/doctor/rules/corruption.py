"""Rules about files that aren't what was written."""

from __future__ import annotations

from lastgood.doctor.rule import Rule
from lastgood.doctor.rules import corruption_disk as disk
from lastgood.doctor.rules import corruption_finite as numbers
from lastgood.doctor.rules import corruption_log as log

_BACK = ("lastgood -C {root} resume --check", "lastgood doctor --fix {root}")
_STOPS = "the Trainer stops with a message that doesn't name the file, though older checkpoints may be good"

RULES: tuple[Rule, ...] = (
    Rule(
        code="CKC001",
        title="A safetensors file is empty",
        severity="error",
        message=r"header too small|HeaderTooSmall",
        log=log.by_bytes("CKC001"),
        run=disk.seen("CKC001"),
        means=_STOPS,
        cause="The file was created, and then the machine crashed, the process was killed, or the disk was full. Some"
        " file systems keep the name of a file over a power cut, and not its content.",
        fix=_BACK,
        source="safetensors 0.8, SafetensorError HeaderTooSmall",
    ),
    Rule(
        code="CKC002",
        title="A safetensors file is cut off",
        severity="error",
        message=r"incomplete metadata, file not fully covered|MetadataIncompleteBuffer"
        r"|invalid header length|InvalidHeaderLength",
        log=log.by_bytes("CKC002"),
        run=disk.seen("CKC002"),
        means=_STOPS,
        cause="The save, or a copy or download of it, ended in the middle. The header at its beginning says how long"
        " the file should be.",
        fix=("copy or download the file again, if it was complete elsewhere", *_BACK),
        source="safetensors 0.8, SafetensorError MetadataIncompleteBuffer, InvalidHeaderLength",
    ),
    Rule(
        code="CKC003",
        title="A file is something else than its name says",
        severity="error",
        message=r"header too large|HeaderTooLarge"
        r"|invalid load key, '([^']+)'"
        r"|WeightsUnpickler error:\s+Unsupported operand (\d+)",
        log=log.not_what_it_is,
        run=disk.seen("CKC003"),
        means="it can't be loaded; nothing was lost if the real file can be fetched",
        cause="A clone without git-LFS leaves pointers of 130 bytes in the place of the files. A download without"
        " access leaves the error page. A .bin that was renamed is a pickle still. A header above 100 MB is refused.",
        fix=(
            "git lfs pull, for a pointer; huggingface-cli download, for a page",
            "lastgood -C {root} resume --check",
        ),
        source="safetensors 0.8, SafetensorError HeaderTooLarge; torch 2.13, _weights_only_unpickler; kohya-ss #990,"
        " safetensors #668",
    ),
    Rule(
        code="CKC004",
        title="The header of a safetensors file is garbage",
        severity="error",
        message=r"InvalidHeaderDeserialization|InvalidHeaderStart|InvalidTensorView|InvalidHeader\b"
        r"|invalid (?:JSON|UTF-8) in header|invalid shape, data type, or offset",
        log=log.unknown_header,
        run=disk.seen("CKC004"),
        means=_STOPS,
        cause="The file has its length, and other bytes than were written: zeros where blocks never reached the disk"
        " before a power cut, or a copy that mixed two files.",
        fix=_BACK,
        source="safetensors 0.8, SafetensorError InvalidHeaderDeserialization",
    ),
    Rule(
        code="CKC005",
        title="A file of torch.save is cut off",
        severity="error",
        message=r"PytorchStreamReader failed|files saved in the legacy \.tar format",
        log=log.by_bytes("CKC005"),
        run=disk.seen("CKC005"),
        means=_STOPS,
        cause="torch.save writes a zip archive, whose table of contents is at its end. A save, copy or download that"
        " ended early has none. A file of zero bytes (blocks that a power cut took) is taken for a format of 2017.",
        fix=("copy or download the file again, if it was complete elsewhere", *_BACK),
        source="torch 2.13, caffe2/serialize/inline_container.cc; torch.serialization.load",
    ),
    Rule(
        code="CKC006",
        title="A file of torch.save is empty",
        severity="error",
        message=r"^EOFError.*",
        log=log.ended,
        run=disk.seen("CKC006"),
        means="the Trainer stops with an EOFError without a word, though older checkpoints may be good",
        cause="optimizer.pt, scheduler.pt or rng_state.pth was created and never written: a crash, a power cut or a"
        " full disk. The unpickler meets the end of the file at once.",
        fix=_BACK,
        source="torch 2.13, torch.serialization._legacy_load: EOFError from an empty file",
    ),
    Rule(
        code="CKC007",
        title="A file of torch.save is cut off early",
        severity="error",
        message=r"OSError: \[Errno 22\] Invalid argument$",
        log=log.invalid,
        over=("CKC005",),
        means="the Trainer stops with `Invalid argument`, which is about the file and not about any argument",
        cause="The table of a zip archive is looked for from the end of the file. In a file that was cut in the middle"
        " of its tensors the search ends in a seek to nowhere, and the system call says Invalid argument.",
        fix=_BACK,
        source="torch 2.13, PyTorchFileReader: seen at 30 and 50 % of optimizer.pt",
    ),
    Rule(
        code="CKC008",
        title="A file of a checkpoint isn't what was saved",
        severity="error",
        run=disk.changed,
        means="nothing else notices: it would be loaded, or stop the resume",
        cause="A bit that flipped on a disk or in a copy, a file that was deleted, edited or overwritten. Neither"
        " safetensors nor torch.load checks what it reads; the hashes of a managed or adopted checkpoint do.",
        fix=_BACK,
        source="lastgood verify --full; torch 2.13 ignores the checksums of its archives",
    ),
    Rule(
        code="CKC009",
        title="A file of torch.save in the old format is cut off",
        severity="error",
        message=r"storage has wrong size: expected -?\d+ got -?\d+|unexpected EOF, expected \d+ more bytes",
        log=log.legacy,
        means=_STOPS,
        cause="Until 1.6 torch.save wrote a pickle followed by the tensors, and use_new_zipfile_serialization=False"
        " still does. Such a file tells only on reading that it is too short.",
        fix=("copy or download the file again, if it was complete elsewhere", *_BACK),
        source="torch 2.13, torch.serialization._legacy_load",
    ),
    Rule(
        code="CKC010",
        title="The storage went away for a moment",
        severity="warning",
        message=r"\[Errno 116\].*|Stale file handle|\[Errno 5\].*|Input/output error|\[Errno 121\].*"
        r"|\(os error (?:5|116|121)\)",
        log=log.hiccup,
        run=disk.seen("CKC010"),
        means="the run died of a failure that a second try would have got over; what was being written may be cut off",
        cause="A server of NFS or Lustre that was restarted, or a directory that somebody replaced, makes open files"
        " stale. Errno 5 on a local disk is a disk that is failing: dmesg tells.",
        fix=(
            "lastgood run -- COMMAND  # launched again from the newest good checkpoint",
            "save to a local disk, and copy from there",
            "lastgood -C {root} verify --full  # what was damaged by it",
        ),
        source="errno(3): ESTALE, EIO, EREMOTEIO; returnn #1829",
    ),
    Rule(
        code="CKC011",
        title="The training diverged: NaN or infinity was saved",
        severity="error",
        message=r"probability tensor contains either `inf`, `nan` or element < 0",
        warning=r"\{'loss': '?-?(?:nan|inf)\b.*",
        log=numbers.in_log,
        run=numbers.diverged,
        means="the model answers with nothing but NaN, and no resume from here gets over it",
        cause="One step with a gradient that isn't finite makes all weights NaN, and every save after it keeps that."
        " With logging_nan_inf_filter, which is on by default, the logged loss doesn't even show it.",
        fix=(
            "lastgood -C {root} bisect --mark  # the next resume takes the last healthy one",
            "lastgood doctor --full {root}  # all of them, every byte",
        ),
        source="IEEE 754; transformers 5.23, Trainer (logging_nan_inf_filter)",
    ),
)
