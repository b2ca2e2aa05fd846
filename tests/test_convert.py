"""Checkpoints of every tool: read, imported, written again, and loaded by the tool itself."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

import lastgood
from lastgood.convert import bring, pickles, write
from lastgood.convert.content import PENDING, Content
from lastgood.convert.read import read
from lastgood.errors import CorruptCheckpoint, NotSupported, UsageError
from lastgood.format import archive
from lastgood.format import manifest as codec
from lastgood.repo.commit import commit
from lastgood.repo.staging import open_staging
from lastgood.state.tensors import same_bits

import realruns
from training import Case

PLACES = {
    "lightning_run": ("lightning", "checkpoints/epoch=0-step=4.ckpt"),
    "accelerate_run": ("accelerate", "checkpoints/checkpoint_1"),
    "dcp_run": ("dcp", "step-2"),
    "trainer_full": ("trainer", "checkpoint-4"),
    "trainer_peft": ("trainer", "checkpoint-4"),
    "trainer_sharded": ("trainer", "checkpoint-4"),
    "trainer_bin": ("trainer", "checkpoint-4"),
    "fsdp_trainer": ("fsdp", "checkpoint-2"),
    "fsdp_trainer_full": ("fsdp", "checkpoint-2"),
}
Make = Callable[[str], Path]


@pytest.fixture
def made(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    # Workers of xdist share what is made once; their folders lie in that of the session.
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "realruns"
    return lambda name: realruns.make(name, tmp_path / "from" / name, cache)


def place(made: Make, name: str) -> tuple[Path, Content]:
    layout, inside = PLACES[name]
    path = made(name) / inside
    return path, read(path, layout)


def same(left: Any, right: Any) -> bool:
    """Equality of types, keys and every bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and same_bits(left, right)
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, Mapping):
        return (
            isinstance(right, Mapping)
            and left.keys() == right.keys()
            and all(same(left[key], right[key]) for key in left)
        )
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


def fields(content: Content) -> dict[str, Any]:
    files = {name: path.read_bytes() for name, path in sorted(content.files.items())}
    return {name: getattr(content, name) for name in Content.__slots__} | {"files": files}


def differing(left: Content, right: Content) -> list[str]:
    mine, theirs = fields(left), fields(right)
    return [name for name in mine if not same(mine[name], theirs[name])]


def imported(content: Content, root: Path) -> tuple[Path, Any]:
    staging = open_staging(root)
    bring.stage(content, staging)
    about: dict[str, Any] = {"environment": {}, "arguments": {}, "facts": {}}
    record = commit(
        root,
        staging,
        run="0" * 16,
        step=max(0, content.step),
        seq=1,
        lineage=((1, 1),),
        parent=None,
        created=0.0,
        **about,
    )
    return root / record.name, record.manifest


@pytest.mark.parametrize("name", PLACES)
def test_an_import_gives_back_every_bit(name: str, made: Make, tmp_path: Path) -> None:
    _, content = place(made, name)
    path, manifest = imported(content, tmp_path / "run")
    assert manifest.full
    assert differing(read(path, "imported", manifest), content) == []
    assert differing(read(path, "imported"), content) == []
    for file in path.rglob("*"):
        assert not archive.is_archive(file), "no pickles in a checkpoint of ours"


@pytest.mark.parametrize("name", PLACES)
def test_what_is_read_is_what_torch_finds(name: str, made: Make) -> None:
    path, content = place(made, name)
    assert content.model and len(content.optimizers) == 1
    assert content.step == {"dcp_run": 2, "fsdp_trainer": 2, "fsdp_trainer_full": 2}.get(name, 4)
    if name.startswith("trainer"):
        assert same(content.optimizers[0], torch.load(path / "optimizer.pt"))
        assert same(content.schedulers, [torch.load(path / "scheduler.pt")])
    if name in ("dcp_run", "fsdp_trainer", "fsdp_trainer_full"):
        names = content.parameter_names
        assert names is not None
        assert set(names) < set(content.model) | {"transformer.wte.weight"}
        for number, moments in content.optimizers[0]["state"].items():
            if names[number] in content.model:
                assert moments["exp_avg"].shape == content.model[names[number]].shape
    if name in ("trainer_full", "fsdp_trainer"):
        assert content.rng is not None and content.epoch is not None


def test_shards_of_several_processes_make_the_tensors_of_one(made: Make) -> None:
    sharded, whole = place(made, "fsdp_trainer")[1], place(made, "fsdp_trainer_full")[1]
    assert sharded.optimizers[0]["param_groups"] == whole.optimizers[0]["param_groups"]
    assert sharded.parameter_names == whole.parameter_names
    assert sharded.rest["rng_ranks"].keys() == whole.rest["rng_ranks"].keys() == {"1"}
    for number, moments in whole.optimizers[0]["state"].items():
        for key, tensor in moments.items():
            torch.testing.assert_close(sharded.optimizers[0]["state"][number][key], tensor, rtol=1e-4, atol=1e-6)


# ---- back to the same tool ---------------------------------------------------------------


def load_accelerate(path: Path) -> list[Any]:
    from accelerate import Accelerator

    class Tally:
        state: Any = None

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    accelerator = Accelerator(cpu=True)
    model = realruns.gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    tally = Tally()
    accelerator.register_for_checkpointing(tally)
    accelerator.load_state(str(path))
    found = [dict(model.state_dict()), optimizer.state_dict(), scheduler.state_dict(), tally.state]
    return [*found, torch.get_rng_state(), list(np.random.get_state())]


@pytest.mark.parametrize("way", ["at once", "by way of an import"])
def test_accelerate_loads_what_it_saved(way: str, made: Make, tmp_path: Path) -> None:
    path, content = place(made, "accelerate_run")
    if way == "by way of an import":
        content = read(imported(content, tmp_path / "run")[0], "imported")
    assert write.to_accelerate(content, tmp_path / "out") == []
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(file.name for file in path.iterdir())
    expected, found = load_accelerate(path), load_accelerate(tmp_path / "out")
    assert same(found, expected)
    assert differing(read(tmp_path / "out", "accelerate"), content) == ["name"]


@pytest.mark.filterwarnings("ignore")  # what Lightning has to say about small runs and about torch
@pytest.mark.parametrize("way", ["at once", "by way of an import"])
def test_lightning_goes_on_from_what_it_saved(way: str, made: Make, tmp_path: Path) -> None:
    path, content = place(made, "lightning_run")
    if way == "by way of an import":
        content = read(imported(content, tmp_path / "run")[0], "imported")
    out = tmp_path / "out.ckpt"
    assert write.to_lightning(content, out) == []
    mine, theirs = torch.load(out, weights_only=True), torch.load(path, weights_only=True)
    assert same({key: mine[key] for key in sorted(mine)}, {key: theirs[key] for key in sorted(theirs)})
    assert mine["state_dict"]._metadata == theirs["state_dict"]._metadata
    assert same(fit(out, tmp_path / "b"), fit(path, tmp_path / "a"))


def fit(path: Path, root: Path) -> list[Any]:
    import lightning.pytorch as pl

    class Tuned(pl.LightningModule):
        def __init__(self, rate: float = 1e-2, width: int = 16) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = realruns.gpt2()

        def training_step(self, batch: Any, _index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["rate"])
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    pl.seed_everything(7, verbose=False)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(default_root_dir=root, max_steps=6, accelerator="cpu", devices=1, **quiet)  # type: ignore[arg-type]
    steps: list[int] = []
    module = Tuned()
    module.on_train_batch_start = lambda *_: steps.append(trainer.global_step)  # type: ignore[method-assign]
    data: Any = realruns.rows()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2), ckpt_path=path)
    assert steps == [4, 5]
    optimizer: Any = trainer.optimizers[0]
    return [dict(module.state_dict()), optimizer.state_dict(), trainer.global_step]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("way", ["at once", "by way of an import"])
def test_dcp_loads_what_it_saved(way: str, made: Make, tmp_path: Path) -> None:
    path, content = place(made, "dcp_run")
    if way == "by way of an import":
        content = read(imported(content, tmp_path / "run")[0], "imported")
    assert write.to_dcp(content, tmp_path / "out") == []
    assert same(load_dcp(tmp_path / "out"), load_dcp(path))
    again = read(tmp_path / "out", "dcp")
    assert differing(again, content) == ["name"]


def load_dcp(path: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = realruns.gpt2()
    weights, moments = get_state_dict(model, torch.optim.AdamW(model.parameters(), lr=1.0))
    state = {"model": weights, "optimizer": moments, "step": 0}
    load(state, storage_reader=FileSystemReader(path), no_dist=True)
    assert state["step"] == 2
    return state


@pytest.mark.parametrize("name", ["trainer_full", "trainer_peft", "trainer_sharded"])
@pytest.mark.parametrize("way", ["at once", "by way of an import"])
def test_the_trainer_finds_what_it_saved(name: str, way: str, made: Make, tmp_path: Path) -> None:
    path, content = place(made, name)
    if way == "by way of an import":
        content = read(imported(content, tmp_path / "run")[0], "imported")
    assert write.to_trainer(content, tmp_path / "out") == []
    again = read(tmp_path / "out", "trainer")
    assert differing(again, content) == ["name"]
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert same(
            torch.load(tmp_path / "out" / file, weights_only=False), torch.load(path / file, weights_only=False)
        )


# ---- from ours to a stock Trainer --------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_stock_trainer_goes_on_exactly_from_a_managed_checkpoint(lora: bool, tmp_path: Path) -> None:
    case = Case("managed", lora=lora, args={"save_steps": 3})
    managed = lastgood.manage(case.trainer(tmp_path / "run"))
    managed.train()
    path = tmp_path / "run" / "checkpoint-3"
    content = read(path, "", codec.decode((path / codec.NAME).read_bytes(), str(path)))
    assert (content.step, content.layout) == (3, "")
    assert content.parameter_names is not None and PENDING not in content.rest
    assert write.to_trainer(content, tmp_path / "stock" / "checkpoint-3") == []
    stock = case.trainer(tmp_path / "stock")
    assert type(stock) is Trainer
    stock.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-3"))
    assert stock.state.global_step == 8
    assert same(dict(stock.model.state_dict()), dict(managed.model.state_dict()))  # type: ignore[union-attr]
    assert same(stock.optimizer.state_dict(), managed.optimizer.state_dict())  # type: ignore[union-attr]
    assert stock.lr_scheduler.state_dict() == managed.lr_scheduler.state_dict()  # type: ignore[union-attr]


def test_an_evaluation_that_was_due_is_told(tmp_path: Path) -> None:
    lastgood.manage(Case("evaluated", evaluate=True).trainer(tmp_path / "run")).train()
    content = read(tmp_path / "run" / "checkpoint-4", "")
    assert content.rest[PENDING] is True
    assert any("evaluation" in note for note in write.to_trainer(content, tmp_path / "out"))


@pytest.mark.parametrize("target", ["accelerate", "lightning", "dcp"])
def test_a_managed_run_goes_to_every_tool(target: str, tmp_path: Path) -> None:
    lastgood.manage(Case("plain").trainer(tmp_path / "run")).train()
    content = read(tmp_path / "run" / "checkpoint-4", "")
    writer: Any = {"accelerate": write.to_accelerate, "lightning": write.to_lightning, "dcp": write.to_dcp}[target]
    notes = writer(content, tmp_path / "out.ckpt")
    assert "data of the source" in notes
    again = read(tmp_path / "out.ckpt", target)
    for name in ("model", "optimizers", "schedulers"):
        assert same(getattr(again, name), getattr(content, name)), name
    if target != "lightning":
        assert same(again.rng, content.rng)


@pytest.mark.filterwarnings("ignore")  # as above
def test_lightning_counts_on_from_what_another_tool_saved(made: Make, tmp_path: Path) -> None:
    _, content = place(made, "dcp_run")
    content.step = 4
    write.to_lightning(content, tmp_path / "out.ckpt", prefix="model.")
    weights, optimizer, step = fit(tmp_path / "out.ckpt", tmp_path / "a")
    assert step == 6
    assert {int(moments["step"]) for moments in optimizer["state"].values()} == {4}, "2 steps there, 2 more here"
    assert not same(weights["model.transformer.wte.weight"], content.model["transformer.wte.weight"])


# ---- what is refused ---------------------------------------------------------------------


class Own:
    """An object that only unpickling could bring back."""


@pytest.mark.parametrize("value", [Own(), {"deep": [Own()]}, np.float64(1.5), print])
def test_objects_are_refused_by_name_and_never_unpickled(value: Any, made: Make) -> None:
    path, _ = place(made, "accelerate_run")
    torch.save({"state": value}, path / "custom_checkpoint_0.pkl")
    with pytest.raises(NotSupported, match=r"custom_checkpoint_0.pkl holds \S+.*never executes pickles"):
        read(path, "accelerate")


def test_deepspeed_is_sent_to_its_own_converter(made: Make) -> None:
    with pytest.raises(NotSupported, match=r"zero_to_fp32\.py"):
        read(made("deepspeed_layout") / "checkpoint-2", "deepspeed")


def test_damage_is_found(made: Make) -> None:
    path, _ = place(made, "dcp_run")
    file = path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(CorruptCheckpoint, match=r"__1_0\.distcp"):
        read(path, "dcp")
    path, _ = place(made, "lightning_run")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptCheckpoint, match="can't be read"):
        read(path, "lightning")


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer_states": [{"state": {5: {}}, "param_groups": [{"params": [0]}]}]},
        {"optimizer_states": 5},
        {"lr_schedulers": {"a": 1}},
        {"epoch": "first"},
        {"global_step": torch.ones(1)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_laid_out_differently_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(1)}, **wrong}, tmp_path / "x.ckpt")
    with pytest.raises(CorruptCheckpoint, match=r"x\.ckpt"):
        read(tmp_path / "x.ckpt", "lightning")
    (tmp_path / "y.ckpt").write_bytes(b"no archive")
    with pytest.raises(CorruptCheckpoint, match="can't be read"):
        read(tmp_path / "y.ckpt", "lightning")


def test_what_json_and_tensors_cannot_hold_is_refused_by_place(tmp_path: Path) -> None:
    for rest, place in (
        ({"a": {"b": Own()}}, r"rest\.a\.b"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "a.b"),
    ):
        content = Content(model={"weight": torch.ones(2)}, rest=rest)
        with pytest.raises(NotSupported, match=place):
            bring.stage(content, open_staging(tmp_path))


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    content = Content(model={"weight": torch.ones(2)}, step=3)
    write.to_trainer(content, tmp_path / "out")
    for writer in (write.to_trainer, write.to_accelerate, write.to_dcp, write.to_lightning):
        with pytest.raises(UsageError, match="exists already"):
            writer(content, tmp_path / "out")
    content.files["config.json"] = tmp_path / "gone"
    with pytest.raises(UsageError, match="gone"):
        write.to_trainer(content, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_alone_make_no_full_checkpoint(tmp_path: Path) -> None:
    tensor = torch.tensor(struct.unpack("<2f", b"\x00\x00\xc0\x7f\x00\x00\x00\x80"))  # NaN and -0.0
    content = Content(layout="dcp", name="x", model={"weight": tensor}, step=3, rest={"note": {1: tensor}})
    path, manifest = imported(content, tmp_path)
    assert not manifest.full
    assert differing(read(path, "imported", manifest), content) == []


@pytest.mark.parametrize("data", [b"", b"r", b"PK", b"\x80\x02", b"\x80\x02}q", b"\x80\x02X\xff\xff\xff\xff", b"j\x01"])
def test_whatever_torch_comes_upon_in_a_damaged_file_is_damage(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"x\.pt can't be read"):
        pickles.load(tmp_path / "x.pt")
    with pytest.raises(CorruptCheckpoint, match="inside can't be read"):
        pickles.load_bytes(data, "inside")
