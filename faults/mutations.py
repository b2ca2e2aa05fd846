"""What makes lastgood safe on the disk, and how it is taken away: see `faults.mutants`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """file: in the package. old: its text, there exactly once; new: what it becomes. red: what has to catch it.

    red: "LANE OPERATION EVERY", or the arguments of pytest in tests/.
    """

    name: str
    file: str
    old: str
    new: str
    red: str


ON_DISK: Sequence[Mutant] = (
    Mutant(
        "no fsync of a small file",
        "store/local.py",
        "            if sync:\n                fs.system.sync(handle)\n        finally:",
        "        finally:",
        "power tag(tagged) 1",
    ),
    Mutant(
        "no fsync of staged files",
        "store/local.py",
        "    handle = reopened(path)\n    try:\n        fs.system.sync(handle)\n",
        "    handle = reopened(path)\n    try:\n        pass\n",
        "power next_save(three) 3",
    ),
    Mutant(
        "no fsync of directories",
        "store/local.py",
        '    if os.name == "nt":\n        return\n',
        "    return\n",
        "power next_save(three) 3",
    ),
    Mutant(
        "no fsync behind a rename",
        "store/local.py",
        "    fs.system.rename(source, target)\n    sync_dir(target.parent)",
        "    fs.system.rename(source, target)",
        "power next_save(three) 3",
    ),
    Mutant(
        "no fsync behind a replacement",
        "store/local.py",
        "        fs.system.unlink(temporary)\n        raise\n    sync_dir(path.parent)\n",
        "        fs.system.unlink(temporary)\n        raise\n",
        "power tag(tagged) 1",
    ),
    Mutant(
        "a replacement in place",
        "store/local.py",
        '    temporary = path.with_name(f".{path.name}.{fs.system.token(4)}")\n    write(temporary, [data])\n',
        '    temporary = path.with_name(f".{path.name}.{fs.system.token(4)}")\n    unlink(path)\n'
        "    write(temporary, [data])\n",
        "crash tag(tagged) 1",
    ),
    Mutant(
        "a short write taken for a whole one",
        "store/local.py",
        "            view = view[fs.system.write(handle, view) :]\n",
        "            fs.system.write(handle, view)\n            view = view[len(view) :]\n",
        "test_local.py",
    ),
    Mutant(
        "a torn line spoils the next one",
        "store/local.py",
        '            if fs.system.read(handle, 1) != b"\\n":\n',
        "            if False:\n",
        "test_failures.py test_crash_points.py test_trail.py test_review.py test_machine.py",
    ),
    Mutant(
        "a rename over what is there",
        "store/local.py",
        "    if os.path.lexists(target):\n        raise FileExistsError",
        "    if False:\n        raise FileExistsError",
        "test_local.py",
    ),
    Mutant(
        "a limit taken for damage",
        "store/local.py",
        "    return error.errno in _PASSING\n",
        "    return False\n",
        "look next_save(three) 7",
    ),
    Mutant(
        "no second look after EIO",
        "store/local.py",
        "        if error.errno != errno.EIO:\n            raise\n        return act()\n",
        "        raise\n",
        "look next_save(three) 7",
    ),
    Mutant(
        "links are followed",
        "store/local.py",
        '_SAFE = getattr(os, "O_NOFOLLOW", 0) | ',
        "_SAFE = ",
        "test_corruption.py test_security_links.py",
    ),
    Mutant(
        "staged files aren't synced before the manifest",
        "repo/commit.py",
        "    staging.sync()\n",
        "",
        "power next_save(three) 3",
    ),
    Mutant(
        "staged names aren't synced",
        "repo/staging.py",
        "for name in (*self.files, MANIFEST)], self.directories())",
        "for name in (*self.files, MANIFEST)], [])",
        "power next_save(three) 3",
    ),
    Mutant(
        "a save that failed to become durable stays",
        "repo/commit.py",
        "        if not source.exists() and id_at(target) == source.name:\n",
        "        if False:\n",
        "test_crash_points.py",
    ),
    Mutant(
        "a step that is there is in the way",
        "repo/commit.py",
        "    local.rename(root / name, root / aside)\n",
        "    local.remove_tree(root / name)\n",
        "crash save_again(three) 1",
    ),
    Mutant(
        "deleted in place",
        "repo/gc.py",
        "    reserve.spend(root, lambda: local.vanish(root / name, hole))\n",
        "    hole = root / name\n",
        "crash save_and_prune(three) 1",
    ),
    Mutant(
        "a strip begins with the files",
        "repo/gc.py",
        "    reserve.spend(root, lambda: local.replace(directory / codec.NAME, codec.encode(light)))\n",
        "    for name in gone:\n        local.unlink(directory / name)\n"
        "    local.replace(directory / codec.NAME, codec.encode(light))\n",
        "crash save_and_strip(three) 1",
    ),
    Mutant(
        "what is pinned may go",
        "repo/gc.py",
        "not record.ours or record.pinned or theirs",
        "not record.ours or theirs",
        "test_crash_points.py",
    ),
    Mutant(
        "nobody asks who holds it", "repo/gc.py", "            if why:  #", "            if False:  #", "test_leases.py"
    ),
    Mutant(
        "leftovers stay",
        "repo/gc.py",
        '    for place in ("tmp", "trash"):\n',
        "    for place in ():\n",
        "crash next_save(three) 5",
    ),
    Mutant(
        "the sweep follows links",
        "repo/gc.py",
        "        if not hidden(root, place).is_symlink():",
        "        if True:",
        "test_bin.py test_security_links.py",
    ),
    Mutant(
        "damage is resumed from",
        "finding.py",
        'lambda record: verify.problems(root, record, full=check == "full", sure=True, held=held)',
        "lambda record: ()",
        "test_corruption.py test_damage.py",
    ),
    Mutant(
        "sizes alone are compared",
        "repo/verify.py",
        'return "" if found == expected else',
        'return "" if found.size == expected.size else',
        "test_corruption.py test_damage.py",
    ),
    Mutant(
        "missing files are overlooked",
        "repo/read.py",
        '    return "; ".join(faults[:3])\n',
        '    return ""\n',
        "test_crash_points.py -k I6",
    ),
    Mutant(
        "a look that failed is believed",
        "behind.py",
        "        return records(self.root, sure=True)\n",
        "        return records(self.root)\n",
        "look next_save(three) 7",
    ),
    Mutant(
        "going back isn't written down",
        "manager.py",
        "                write_head(self.door, Head(",
        "                (lambda *_: None)(self.door, Head(",
        "crash go_back(three) 4",
    ),
    Mutant(
        "flipped bits in small files are read",
        "repo/sealed.py",
        "    if KEY in value and",
        "    if False and",
        "test_corruption.py",
    ),
    Mutant(
        "two writers",
        "repo/lock.py",
        "            self._lock.acquire()\n",
        "            pass\n",
        "test_crash_points.py test_processes.py test_fenced.py",
    ),
    Mutant(
        "a fence that stays up",
        "repo/lock.py",
        "            if is_fence(name) and name != self._fence.name:\n",
        "            if False:\n",
        "test_fenced.py",
    ),
    Mutant(
        "late metrics aren't synced",
        "repo/metrics.py",
        'f"{line}\\n".encode(), sync=True)',
        'f"{line}\\n".encode(), sync=False)',
        "power record_metric(tagged) 1",
    ),
    Mutant(
        "adopted files aren't synced",
        "repo/adopt.py",
        "    local.sync_tree(item.path, item.files)\n",
        "",
        "test_faults.py -k did_not_sync",
    ),
    Mutant(
        "an undo begins with the manifest",
        "repo/bin.py",
        "    for file, (kept, target) in there.items():\n",
        "    local.replace(directory / codec.NAME, local.read(source / codec.NAME, codec.LIMIT))\n"
        "    for file, (kept, target) in there.items():\n",
        "crash undo(stripped) 1",
    ),
    Mutant(
        "no reserve",
        "repo/reserve.py",
        "        if error.errno not in FULL or not give_up(root):\n",
        "        if True:\n",
        "test_disk_full.py",
    ),
    Mutant(
        "a file is cut before it is surely out of sight",
        "store/dissolve.py",
        "        local.sync_dir(directory.parent)\n",
        "        pass\n",
        "test_dissolve.py -k I10",
    ),
    Mutant(
        "what has another name is cut",
        "store/dissolve.py",
        "if status.st_nlink != 1 or not",
        "if not",
        "test_dissolve.py -k I11",
    ),
    Mutant(
        "what is being read is cut",
        "store/dissolve.py",
        "if status.st_nlink != 1 or not fs.system.alone(handle):",
        "if status.st_nlink != 1:",
        "test_dissolve.py -k I11",
    ),
    Mutant(
        "who has to leave cuts on",
        "store/dissolve.py",
        "            if over():\n                return False\n            fs.",
        "            fs.",
        "test_dissolve.py -k I13",
    ),
    Mutant(
        "large files are cut where they are",
        "repo/gc.py",
        "    reserve.spend(root, lambda: local.vanish(root / name, hole))\n",
        "    from lastgood.store.dissolve import _cut\n\n"
        '    for path in (root / name).glob("*.safetensors"):\n        _cut(path, STEP, bool, bool)\n'
        "    reserve.spend(root, lambda: local.vanish(root / name, hole))\n",
        "crash save_and_free(three) 1",
    ),
)
