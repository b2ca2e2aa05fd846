"""lastgood diff: what changed from one checkpoint to another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from lastgood.cli import text
from lastgood.cli.average import weight_files
from lastgood.cli.checkout import need_torch
from lastgood.cli.place import REV, pick, place, run_option
from lastgood.cli.show import tensors
from lastgood.cli.table import Style, emit, emit_json, forms
from lastgood.errors import UsageError
from lastgood.model import Record
from lastgood.store import local
from lastgood.view import View, look

SCHEMA = "lastgood.diff/1"
CONFIGS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "tokenizer.json", "chat_template.jinja",
)  # fmt: skip
"""Small files of a model that are compared by what they say."""


@click.command()
@click.argument("a", type=REV)
@click.argument("b", type=REV)
@run_option
@forms
@click.option("--values", is_flag=True, help="Compare the weights themselves, by layer group. Needs torch.")
@click.option("--top", default=20, metavar="N", help="With --values: the N groups that changed most (default: 20).")
@click.option("--exit-code", is_flag=True, help="Exit status 1 if anything differs.")
def diff(root: str | None, a: str, b: str, style: Style, values: bool, top: int, exit_code: bool) -> None:
    """What differs from A to B: metrics, arguments, environment, configs, tokenizer, tensors.

    --values reads both sets of weights in blocks, so it works for models larger than memory.
    """
    path, first = place(root, a)
    view = look(path)
    old = pick(view, first or "latest")
    new_path, second = place(root or str(path), b)
    other = view if new_path.resolve() == path.resolve() else look(new_path)
    new = pick(other, second or "latest")
    content = compare(view, old, other, new)
    if values:
        content["values"] = _values(view, old, other, new)
    differs = any(content[key] for key in ("metrics", "arguments", "environment", "facts", "files", "tensors"))
    differs = differs or bool(values and content["values"]["changed"])
    if style.json:
        emit_json(SCHEMA, content)
    else:
        emit(_lines(content, top))
    if exit_code and differs:
        raise click.exceptions.Exit(1)


def compare(view: View, old: Record, other: View, new: Record) -> dict[str, Any]:
    """Everything but the weights' values; {} where nothing differs."""
    mine, theirs = old.manifest, new.manifest
    before = {**({"loss": mine.facts["loss"]} if mine and "loss" in mine.facts else {}), **old.metrics}
    after = {**({"loss": theirs.facts["loss"]} if theirs and "loss" in theirs.facts else {}), **new.metrics}
    return {
        "a": {"name": old.name, "step": old.step, "id": old.id or None, "path": str(view.path(old))},
        "b": {"name": new.name, "step": new.step, "id": new.id or None, "path": str(other.path(new))},
        "metrics": {name: c for name, c in changes(before, after).items() if not text.is_timing(name)},
        "arguments": changes(view.arguments(old), other.arguments(new)),
        "environment": changes(mine.environment if mine else {}, theirs.environment if theirs else {}),
        "facts": changes(_without_loss(mine), _without_loss(theirs)),
        "files": {n: c for n in CONFIGS if (c := _file(view, old, other, new, n))},
        "tensors": _tensor_changes(view, old, other, new),
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    """key -> [before, after] where they differ; nested keys are joined by dots; None for what isn't there."""
    flat_a, flat_b = _flat(before), _flat(after)
    keys = [*flat_a, *(key for key in flat_b if key not in flat_a)]
    return {
        k: [flat_a.get(k), flat_b.get(k)]
        for k in keys
        if flat_a.get(k) != flat_b.get(k) or (k in flat_a) != (k in flat_b)
    }


def _flat(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and depth < 20:
            found |= _flat(value, f"{name}.", depth + 1)
        else:
            found[name] = value
    return found


def _without_loss(manifest: Any) -> dict[str, Any]:
    return {key: value for key, value in manifest.facts.items() if key != "loss"} if manifest is not None else {}


def _file(view: View, old: Record, other: View, new: Record, name: str) -> dict[str, Any] | str:
    a, b = (_read(v, r, name) for v, r in ((view, old), (other, new)))
    if a == b:
        return {}
    if a is None or b is None:
        return "only in B" if a is None else "only in A"
    try:
        before, after = json.loads(a), json.loads(b)
    except (ValueError, RecursionError):
        return f"differs ({len(a)} and {len(b)} bytes)"
    if not isinstance(before, dict) or not isinstance(after, dict):
        return "differs"
    found = changes(before, after)
    return found if len(found) <= 40 else f"differs in {len(found)} places"


def _read(view: View, record: Record, name: str) -> bytes | None:
    if record.manifest is None or name not in record.manifest.files:
        return None
    try:
        return local.read(view.path(record) / name, 64 << 20)
    except OSError:
        return None


def _tensor_changes(view: View, old: Record, other: View, new: Record) -> dict[str, Any]:
    """Names, dtypes and shapes of the model's tensors; not their values."""
    a, b = (_outline(v, r) for v, r in ((view, old), (other, new)))
    found: dict[str, Any] = {}
    gone, added = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    moved = {name: [a[name], b[name]] for name in a.keys() & b.keys() if a[name] != b[name]}
    if gone:
        found["removed"] = gone
    if added:
        found["added"] = added
    if moved:
        found["reshaped"] = moved
    return found


def _outline(view: View, record: Record) -> dict[str, str]:
    names = set(record.manifest.parts.get("model", ()) if record.manifest is not None else ())
    return {
        row["name"]: f"{row['dtype']}{row['shape']}"
        for row in tensors(view, record)[0]
        if not names or row["file"] in names
    }


def _values(view: View, old: Record, other: View, new: Record) -> dict[str, Any]:
    need_torch("diff --values")
    from lastgood.weights.compare import compare as weigh
    from lastgood.weights.compare import groups
    from lastgood.weights.source import Weights

    a, b = (Weights.open(weight_files(v, r)) for v, r in ((view, old), (other, new)))
    if not set(a.names()) & set(b.names()):
        raise UsageError(f"{old.name} and {new.name} have no tensor in common", hint="an adapter and a whole model?")
    result = weigh(a, b)
    rows = [
        {"group": g.name, "relative": g.relative, "elements": g.elements, "changed": g.changed_elements}
        for g in groups(result)
    ]
    states = [change.state for change in result.tensors]
    return {
        "same": states.count("same"),
        "changed": len(states) - states.count("same"),
        "groups": sorted(rows, key=lambda row: -(row["relative"] if row["relative"] == row["relative"] else 1e308)),
    }


def _lines(content: dict[str, Any], top: int) -> list[str]:
    a, b = content["a"], content["b"]
    out = [
        click.style(f"{text.plain(a['name'])} -> {text.plain(b['name'])}", bold=True)
        + f"  step {a['step']} -> {b['step']}"
    ]
    for key in ("metrics", "arguments", "environment", "facts"):
        rows = content[key]
        out.append(click.style(key, bold=True) + ("" if rows else "  same"))
        out += [f"  {text.plain(name)}  {_change(old, new)}" for name, (old, new) in rows.items()]
    out.append(click.style("files", bold=True) + ("" if content["files"] else "  same configs and tokenizer"))
    for name, what in content["files"].items():
        if isinstance(what, str):
            out.append(f"  {name}  {what}")
            continue
        out += [f"  {name}: {text.plain(key)}  {_change(old, new)}" for key, (old, new) in what.items()]
    shapes = content["tensors"]
    out.append(click.style("tensors", bold=True) + ("" if shapes else "  same names, dtypes and shapes"))
    for kind in ("added", "removed"):
        if shapes.get(kind):
            names = ", ".join(map(text.plain, shapes[kind][:8]))
            out.append(f"  {kind} {len(shapes[kind])}: {names}" + (" ..." if len(shapes[kind]) > 8 else ""))
    out += [
        f"  {text.plain(n)}  {text.plain(old)} -> {text.plain(new)}"
        for n, (old, new) in shapes.get("reshaped", {}).items()
    ]
    if "values" in content:
        out += _weights(content["values"], top)
    return out


def _weights(values: dict[str, Any], top: int) -> list[str]:
    rows = values["groups"][:top]
    wide = max((text.width(row["group"]) for row in rows), default=0)
    most = max((row["relative"] for row in rows if row["relative"] < float("inf")), default=0.0) or 1.0
    out = [click.style(f"{'layer group':<{wide}}  |dW|/|W|", bold=True)]
    for row in rows:
        bar = "" if row["relative"] != row["relative"] else "#" * round(24 * min(1.0, row["relative"] / most))
        share = 100 * row["changed"] / max(1, row["elements"])
        out.append(f"{text.plain(row['group']):<{wide}}  {row['relative']:9.2e}  {share:5.1f} % {bar}".rstrip())
    out.append(f"{values['changed']} tensors changed, {values['same']} are the same")
    return out


def _change(old: Any, new: Any) -> str:
    said = f"{text.plain(_short(old))} -> {text.plain(_short(new))}"
    if isinstance(old, (int, float)) and isinstance(new, (int, float)) and not isinstance(old, bool) and old:
        said += f" ({100 * (new - old) / abs(old):+.1f} %)"
    return said


def _short(value: Any) -> str:
    if isinstance(value, float):
        return text.number(value)
    return "(not there)" if value is None else text.fit(str(value), 80)
