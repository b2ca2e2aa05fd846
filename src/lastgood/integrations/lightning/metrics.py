"""Metrics: which of those logged are of this very step, and the means that are still being taken over an epoch."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lastgood.model import finite
from lastgood.state import tree

SHOWN = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


META = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx",
    "dataloader_idx", "metric_attribute",
)  # fmt: skip
"""How a metric was logged, beside the way in which its values are joined."""


class Fresh:
    """Lightning keeps the value of a metric until the next one: an old val_loss must not rank a newer checkpoint."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}

    def mark(self, trainer: Any) -> None:
        """What is there now is known."""
        self._seen = dict(trainer.callback_metrics)

    def values(self, trainer: Any) -> dict[str, float]:
        """Those that were logged since `mark`."""
        found = {}
        for name, value in trainer.callback_metrics.items():
            number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            if self._seen.get(name) is not value and isinstance(number, (int, float)):
                found[name] = float(number)
        return found


def capture(trainer: Any, module: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Everything about metrics that a resumed epoch goes on with, as JSON."""
    shown = {name: plain(getattr(trainer, name)) for name in SHOWN}
    means = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        if not metric.meta.on_epoch or metric.has_reset:
            continue
        meta = {name: getattr(metric.meta, name) for name in META} | {"reduce_fx": metric.meta.reduce_fx.__name__}
        value = metric.value if metric.is_tensor else None  # an object that is logged has its state in `states`
        size = metric.cumulated_batch_size if metric.is_tensor and metric.meta.is_mean_reduction else None
        means[key] = {"meta": meta, "value": value, "size": size, "updates": metric._update_count}
    states = {
        name: {"state": dict(metric.metric_state), "updates": metric._update_count}
        for name, metric in torchmetrics(module).items()
    }
    return {
        "shown": tree.encode(shown, tensors, "metrics.shown"),
        "means": tree.encode(means, tensors, "metrics.means"),
        "states": tree.encode(states, tensors, "metrics.states"),
    }


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is no number: logged values are tensors or numbers."""
    return {
        str(name): value
        for name, value in values.items()
        if isinstance(value, torch.Tensor) or finite(value) is not None
    }


def torchmetrics(module: torch.nn.Module) -> dict[str, Any]:
    """The torchmetrics objects in a module by name; their running state is in no state_dict."""
    from torchmetrics import Metric

    return {name: part for name, part in module.named_modules() if isinstance(part, Metric)}


def restore(trainer: Any, module: torch.nn.Module, saved: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Means:
    """Put back what can be now; the means wait for the first value of each."""
    for name, values in tree.decode(saved["shown"], tensors).items():
        getattr(trainer, name).update(values)
    live = torchmetrics(module)
    for name, entry in tree.decode(saved["states"], tensors).items():
        if name not in live:
            continue
        for key, value in entry["state"].items():
            setattr(live[name], key, _moved(value, live[name].device))
        live[name]._update_count, live[name]._computed = entry["updates"], None
    return Means(tree.decode(saved["means"], tensors))


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value.clone().to(device) if isinstance(value, torch.Tensor) else value


class Means:
    """Epoch means of before the save. Lightning makes an accumulator at the first value: then both are joined.

    Where no value comes any more in this epoch, an accumulator is made for its end, and taken away after it.
    """

    def __init__(self, waiting: dict[str, Any]) -> None:
        self.waiting = waiting
        self.made: list[str] = []

    def join(self, results: Any) -> None:
        for key in [key for key in self.waiting if key in results and not results[key].has_reset]:
            self._add(self.waiting.pop(key), results[key])

    def _add(self, saved: dict[str, Any], metric: Any) -> None:
        metric._update_count += saved["updates"]
        metric._computed = None
        if not metric.is_tensor:
            return
        before = saved["value"].to(metric.value.device)
        if metric.meta.is_mean_reduction:
            metric.cumulated_batch_size = saved["size"].to(metric.value.device) + metric.cumulated_batch_size
            metric.value = before + metric.value
        elif metric.meta.is_sum_reduction:
            metric.value = before + metric.value
        else:
            metric.value = metric.meta.reduce_fx(before, metric.value)

    def fill(self, results: Any, module: torch.nn.Module) -> None:
        """The epoch ends: what still waits gets an accumulator of its own."""
        self.join(results)
        source = sys.modules[type(results).__module__]
        for key, saved in self.waiting.items():
            meta = source._Metadata(**saved["meta"])
            meta.sync = source._Sync()
            metric = source._ResultMetric(meta, saved["value"] is not None)
            if not metric.is_tensor:
                metric.value = module.get_submodule(meta.metric_attribute)
            else:
                metric.to(saved["value"].device)
            self._add(saved, metric)
            results[key] = metric
            self.made.append(key)
        self.waiting = {}

    def clear(self, results: Any) -> None:
        """A new epoch begins: Lightning makes its own."""
        for key in self.made:
            results.pop(key, None)
        self.made = []
