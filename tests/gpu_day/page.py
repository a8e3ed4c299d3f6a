"""The day's page: what was measured, as tables of Markdown, and what was estimated beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def page(results: Mapping[str, Any]) -> str:
    """Returns the page of what ``python -m tests.gpu_day`` has measured so far."""
    lines = ["# Measured on a device", "", "`python -m tests.gpu_day`", ""]
    parts: Mapping[str, Any] = results["parts"]
    states = [
        (name, each["status"], f"{each['seconds']:.0f}", _short(each.get("error", ""))) for name, each in parts.items()
    ]
    done = {name: each["result"] for name, each in parts.items() if each["status"] == "done"}
    sections = (
        ("machine", "The machine", _pairs),
        ("tests ", "Tests", _tests),
        ("train ", "Train steps", _train),
        ("decode ", "Decoding", _decode),
        ("kernels ", "Kernels", _kernels),
        ("rates", "Rates of the cost model", _rates),
    )
    for prefix, title, write in sections:
        found = {name.removeprefix(prefix): each for name, each in done.items() if name.startswith(prefix)}
        if found:
            lines += [f"## {title}", "", *write(found), ""]
    lines += ["## Parts", "", *_table(("part", "state", "seconds", "what went wrong"), states)]
    missing = [name for name in results["planned"] if name not in parts]
    lines += ["", f"Not run yet: {', '.join(missing)}."] if missing else []
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"


def _short(text: str) -> str:
    return " ".join(text.split())[-200:]


def _number(value: float | None, digits: str = ".4g") -> str:
    return "" if value is None else format(value, digits)


def _pairs(found: Mapping[str, Any]) -> Iterator[str]:
    (values,) = found.values()
    cells = [(key, _number(value) if isinstance(value, float) else value) for key, value in values.items()]
    return _table(("", ""), cells)


def _tests(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [(name, each["passed"], each["failed"], each["skipped"]) for name, each in found.items()]
    yield from _table(("", "passed", "failed", "skipped"), rows)
    for each in found.values():
        for name, message in each["failures"].items():
            yield from ("", f"- `{name}`: {_short(message)}")


def _train(found: Mapping[str, Any]) -> Iterator[str]:
    head = ("", "variant", "support", "ms", "÷ dense", "tokens/s", "compile s", "peak GB", "estimated GB", "off by")
    rows = []
    for name, measured in found.items():
        for each in measured:
            peak, estimated = each["peak"], each["estimated_peak"]
            numbers = (_number(1e3 * each["seconds"]), f"{each['of_dense']:.2f}", f"{each['tokens_per_second']:,.0f}")
            memory = (f"{peak / 1e9:.3f}", f"{estimated / 1e9:.3f}", f"{estimated / peak - 1:+.1%}")
            rows.append((name, each["variant"], each["support"], *numbers, f"{each['compile_seconds']:.0f}", *memory))
    return _table(head, rows)


def _decode(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (
            name,
            each["tokens"],
            each["variant"],
            each["support"],
            _number(1e6 * each["seconds"]),
            f"{each['of_dense']:.2f}",
        )
        for name, measured in found.items()
        for each in measured
    ]
    return _table(("", "tokens", "variant", "support", "us", "÷ dense"), rows)


def _kernels(found: Mapping[str, Any]) -> Iterator[str]:
    head = ("", "weight", "what", "support", "tokens", "us", "roofline us", "of the roofline", "vendor us", "÷ vendor")
    rows = []
    for name, shapes in found.items():
        for shape, measured in shapes.items():
            for each in measured:
                roofline, vendor = each.get("roofline_us"), each.get("vendor_us")
                numbers = (_number(each["us"]), _number(roofline), _number(roofline and roofline / each["us"], ".0%"))
                beside = (_number(vendor), _number(vendor and each["us"] / vendor, ".2f"))
                tokens = "" if each["tokens"] is None else each["tokens"]
                rows.append((name, shape, each["what"], each["support"], tokens, *numbers, *beside))
    return _table(head, rows)


def _rates(found: Mapping[str, Any]) -> Iterator[str]:
    (values,) = found.values()

    def flat(rates: Mapping[str, Any]) -> dict[str, Any]:
        nested = {
            f"{key} {name}": each for key, by in rates.items() if isinstance(by, Mapping) for name, each in by.items()
        }
        return {**nested, **{key: each for key, each in rates.items() if not isinstance(each, Mapping)}}

    measured, default = flat(values["measured"]), flat(values["default"])
    return _table(
        ("", "measured", "default"), [(key, _number(measured[key]), _number(default.get(key))) for key in measured]
    )
