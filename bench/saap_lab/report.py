"""Records of a comparison as rows, as tables of text and as one JSON summary: mean and spread over sequences, early and late
layers apart, beside the bytes read. Knows records, not how they came to be, and draws nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from saap_index.backends.scalar_quantizer import STORAGE_CODES

from . import ruler
from .quality import mean_by_name, spread

Records = Mapping[str, Any]

LATE = 0.45
"""Layers from this share of the model's depth on are late: in early ones a few frequent tokens draw much of the attention."""

MASS = "saap-mass-"
"""Begins the name of a method with a target of attention mass."""

_LAST = ("saap", "published", "topk", "topk_group", "topk_weighted", "ivf", "quest", "moments", "recent", "random")
"""Order of the methods, after all others."""


@dataclass(frozen=True)
class LayerRow:
    """A method at a share over a group of layers."""

    method: str
    share: float
    captured: tuple[float, float]
    """Attention mass in percent of that outside sinks and window: mean and spread over sequences."""
    error: tuple[float, float]
    """Of the output, relative: mean and spread."""
    tokens: float
    """Read per step and KV head."""
    kv_bytes: float
    """Per step and layer, as the others."""
    other_bytes: float
    shared_bytes: float
    coded_bytes: dict[str, float] = field(default_factory=dict, kw_only=True)
    """Of K and V by storage code, if a method's tokens were coded like the index's; empty where they cannot be, or in records of
    before."""


@dataclass(frozen=True)
class TextRow:
    """A method at a share in every layer that was replaced: means and spreads over sequences."""

    method: str
    share: float
    kl: tuple[float, float]
    """To the dense model's distribution of the next token, nats."""
    top1: tuple[float, float]
    """Same first choice, percent."""
    perplexity_ratio: tuple[float, float]
    """Of the text, to the dense model's."""
    tokens: float
    """Read per layer and step."""
    kv_bytes: float
    other_bytes: float
    sequences: int
    coded_bytes: dict[str, float] = field(default_factory=dict, kw_only=True)
    """As in `LayerRow`."""


def layer_rows(records: Records, layers: Iterable[int] | None = None) -> list[LayerRow]:
    """Pool over layers (None: all): mass weighted by mass within a sequence, then mean and spread over the sequences."""
    wanted = None if layers is None else set(layers)
    groups: dict[tuple[str, float], dict[str, list[Mapping[str, Any]]]] = {}
    for key, record in records.items():
        kind, *rest = key.split("/")
        if kind == "layer" and (wanted is None or int(rest[-3]) in wanted):
            groups.setdefault((rest[-2], float(rest[-1])), {}).setdefault("/".join(rest[:-3]), []).append(record)
    rows = []
    for (method, share), sequences in groups.items():
        captured = [100 * sum(r["captured"] for r in each) / sum(r["outside"] for r in each) for each in sequences.values()]
        errors = [sum(r["error"] for r in each) / len(each) for each in sequences.values()]
        pooled = [r for each in sequences.values() for r in each]
        means = (sum(r[x] for r in pooled) / len(pooled) for x in ("tokens", "kv_bytes", "other_bytes", "shared_bytes"))
        coded = mean_by_name([r.get("coded_bytes") or {} for r in pooled])
        rows.append(LayerRow(method, share, spread(captured), spread(errors), *means, coded_bytes=coded))
    return sorted(rows, key=lambda r: (r.share, -(r.captured[0] if not math.isnan(r.captured[0]) else -1)))


def text_rows(records: Records) -> list[TextRow]:
    """End to end: mean and spread over the sequences."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for key, record in records.items():
        kind, *rest = key.split("/")
        if kind == "text":
            groups.setdefault((rest[-2], float(rest[-1])), []).append(record)
    rows = []
    for (method, share), each in groups.items():
        kl, top1 = (spread([r[x] for r in each]) for x in ("kl", "top1"))
        ratio = spread([math.exp(r["log_perplexity_ratio"]) for r in each])
        tokens, kv_bytes, other_bytes = (sum(r[x] for r in each) / len(each) for x in ("tokens", "kv_bytes", "other_bytes"))
        percent = (100 * top1[0], 100 * top1[1])
        coded = mean_by_name([r.get("coded_bytes") or {} for r in each])
        rows.append(TextRow(method, share, kl, percent, ratio, tokens, kv_bytes, other_bytes, len(each), coded_bytes=coded))
    return sorted(rows, key=lambda r: (r.share, r.kl[0]))


def needle_rows(records: Records) -> dict[tuple[str, float], tuple[int, int]]:
    """Right answers and questions by method and share."""
    counts: dict[tuple[str, float], tuple[int, int]] = {}
    for key, record in records.items():
        kind, *rest = key.split("/")
        if kind == "needle":
            method = rest[-2], float(rest[-1])
            right, questions = counts.get(method, (0, 0))
            counts[method] = right + bool(record["right"]), questions + 1
    return counts


def needle_cells(records: Records) -> dict[tuple[str, float], dict[tuple[str, int, float], bool]]:
    """Of needles named by kind, length and depth, by method and share: (kind, length, depth) -> whether the answer was right."""
    cells: dict[tuple[str, float], dict[tuple[str, int, float], bool]] = {}
    for key, record in records.items():
        if key.startswith("needle/"):
            _, name, method, share = key.split("/")
            kind, *place = name.split(".", 2)
            if len(place) == 2:
                cells.setdefault((method, float(share)), {})[kind, int(place[0]), float(place[1])] = bool(record["right"])
    return cells


def ruler_rows(records: Records) -> dict[tuple[str, float], dict[tuple[str, int], tuple[float, int]]]:
    """By method and share: (task, length) -> mean score in percent, and samples."""
    scores: dict[tuple[str, float], dict[tuple[str, int], list[float]]] = {}
    for key, record in records.items():
        if key.startswith("ruler/"):
            _, name, method, share = key.split("/")
            task, length, _ = name.split(".")
            scores.setdefault((method, float(share)), {}).setdefault((task, int(length)), []).append(record["score"])
    order = sorted(scores, key=lambda key: (key[0] != "dense", key[1], rank(key[0]), key[0]))
    return {key: {cell: (100 * sum(x) / len(x), len(x)) for cell, x in scores[key].items()} for key in order}


def ruler_averages(records: Records) -> dict[tuple[str, float], dict[int, float]]:
    """By method and share: length -> mean of the tasks' scores, percent."""
    averages: dict[tuple[str, float], dict[int, float]] = {}
    for key, cells in ruler_rows(records).items():
        for length in sorted({n for _, n in cells}):
            each = [mean for (_, n), (mean, _) in cells.items() if n == length]
            averages.setdefault(key, {})[length] = sum(each) / len(each)
    return averages


def drift_rows(records: Records) -> dict[tuple[str, float], list[tuple[float, float, float]]]:
    """By method and share, in order of the text: (middle of a stretch in tokens, KL in nats, same first choice in percent), means
    over the sequences."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for key, record in records.items():
        if key.startswith("drift/"):
            *_, method, share = key.split("/")
            groups.setdefault((method, float(share)), []).append(record)
    rows: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for name, each in sorted(groups.items(), key=lambda item: (item[0][1], rank(item[0][0]), item[0][0])):
        means = [[sum(x) / len(x) for x in zip(*(r[part] for r in each), strict=True)] for part in ("kl", "top1")]
        wide = each[0]["tokens"] / len(means[0])
        rows[name] = [((i + 0.5) * wide, kl, 100 * same) for i, (kl, same) in enumerate(zip(*means, strict=True))]
    return rows


def masses(records: Records) -> dict[str, dict[str, float]]:
    """Per target: mean of all attention that was read (sinks and window included), the share of KV heads whose mean over texts
    reaches the target, the worst head, and tokens read."""
    totals: dict[str, dict[tuple[str, int], list[float]]] = {}
    tokens: dict[str, list[float]] = {}
    for key, record in records.items():
        method = key.split("/")[-2] if key.startswith("layer/") else ""
        if method.startswith(MASS):
            tokens.setdefault(method, []).append(record["tokens"])
            for head, total in enumerate(record["total_per_head"]):
                totals.setdefault(method, {}).setdefault((key.split("/")[-3], head), []).append(total)
    rows = {}
    for method, heads in totals.items():
        means, target = [spread(values)[0] for values in heads.values()], float(method.removeprefix(MASS))
        rows[method] = {
            "target": target, "mean": spread(means)[0], "heads_reaching": sum(x >= target for x in means) / len(means),
            "least": min(means), "tokens": spread(tokens[method])[0], "heads": len(means),
        }
    return rows


def layer_numbers(records: Records) -> list[int]:
    """Layers measured one by one, ascending."""
    return sorted({int(key.split("/")[-3]) for key in records if key.startswith("layer/")})


def by_layer(records: Records) -> dict[int, list[LayerRow]]:
    """Rows of each layer measured, of methods that choose."""
    return {x: [row for row in layer_rows(records, [x]) if row.method != "dense"] for x in layer_numbers(records)}


def layers_replaced(records: Records, depth: int) -> str:
    """How many layers of the model had another attention when its answers were measured, in words; '' if they were not."""
    counts = {len(row["per_layer"]) for key, row in records.items() if key.startswith("text/") and "per_layer" in row}
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    if low == high == depth:
        return f"every layer replaced ({depth})"
    return f"{high if low == high else f'{low} to {high}'} of {depth} layers replaced, the others as the model has them"


def late_layers(depth: int) -> range:
    """Numbers of the late layers of a model with so many."""
    return range(math.ceil(LATE * depth), depth)


def rank(method: str) -> int:
    """Place of a method in tables and legends."""
    return _LAST.index(method) if method in _LAST else -1


def ordered(methods: Iterable[str]) -> list[str]:
    """Methods by `rank`, then by name."""
    return sorted(methods, key=lambda name: (rank(name), name))


def as_text(records: Records, depth: int, each_layer: bool = False) -> str:
    """Every table that the records have figures for; each_layer : a table layer by layer too, a column for each method."""
    sequences = {key.split("/")[1] for key in records if key.startswith(("layer/", "text/"))}
    spreads = "spread: standard deviation over sequences" if len(sequences) > 1 else "one has no spread: (-)"
    lines = [f"{len(sequences)} sequence{'s' * (len(sequences) > 1)}; {spreads}"] if sequences else []
    late = late_layers(depth)
    for title, layers in (("all layers measured", None), ("late layers", late), ("early layers", range(late.start))):
        lines += _layers_table(title, layer_rows(records, layers))
    lines += _text_table(text_rows(records), layers_replaced(records, depth) or "layers replaced")
    lines += _needle_counts(needle_rows(records))
    if each_layer:
        lines += _each_layer_tables(by_layer(records))
    lines += [*_mass_table(masses(records)), *_needle_table(needle_cells(records)), *_drift_table(records)]
    lines += _ruler_tables(records)
    return "\n".join(lines) + "\n"


def _line(share: str, method: str, *cells: str) -> str:
    return f"{share:>6} {method:<14}" + "".join(f"{cell:>11}" for cell in cells)


def _deviation(value: float, digits: int) -> str:
    """A standard deviation in brackets; a single sequence has none."""
    return "(-)" if math.isnan(value) else f"({value:.{digits}f})"


def coded_heads(unit: str) -> list[str]:
    """Of the columns with bytes if keys and values were codes."""
    return [f"{unit} {name.replace('/SQ', '/')}" for name in STORAGE_CODES]


def _coded_cells(coded: Mapping[str, float], unit: float, digits: int) -> list[str]:
    return [f"{coded[name] / unit:.{digits}f}" if name in coded else "-" for name in STORAGE_CODES]


def _layers_table(title: str, rows: list[LayerRow]) -> list[str]:
    if not rows:
        return []
    lines = [
        "",
        f"{title}: attention mass captured outside sinks and window, pooled by mass over layers, and output error, the "
        "mean of layers (mean, spread over sequences); SQ8, SQ8/4: K and V if all but sinks and window were codes",
        _line("share", "method", "mass %", "", "error", "", "tokens", "kB K, V", "kB other", "kB weights", *coded_heads("kB")),
    ]
    for r in rows:
        mass = (f"{r.captured[0]:.1f}", _deviation(r.captured[1], 1), f"{r.error[0]:.4f}", _deviation(r.error[1], 4))
        kilobytes = (f"{x / 1e3:.1f}" for x in (r.kv_bytes, r.other_bytes, r.shared_bytes))
        coded = _coded_cells(r.coded_bytes, 1e3, 1)
        lines.append(_line(f"{r.share:.1%}", r.method, *mass, f"{r.tokens:.0f}", *kilobytes, *coded))
    return lines


def _text_table(rows: list[TextRow], where: str) -> list[str]:
    if not rows:
        return []
    sequences = f"{rows[0].sequences} sequence{'s' * (rows[0].sequences > 1)}"
    lines = [
        "",
        f"{where}, {sequences}: against the dense model (mean, spread over sequences)",
        _line("share", "method", "KL", "", "same 1st %", "", "perplex. x", "", "tokens", "MB a token", *coded_heads("MB")),
    ]
    for t in rows:
        answers = (f"{t.kl[0]:.4f}", _deviation(t.kl[1], 4), f"{t.top1[0]:.1f}", _deviation(t.top1[1], 1))
        ratio = (f"{t.perplexity_ratio[0]:.4f}", _deviation(t.perplexity_ratio[1], 4))
        megabytes = f"{(t.kv_bytes + t.other_bytes) / 1e6:.2f}"
        coded = _coded_cells({name: x + t.other_bytes for name, x in t.coded_bytes.items()}, 1e6, 2)
        lines.append(_line(f"{t.share:.1%}", t.method, *answers, *ratio, f"{t.tokens:.0f}", megabytes, *coded))
    return lines


def _needle_counts(counts: Mapping[tuple[str, float], tuple[int, int]]) -> list[str]:
    if not counts:
        return []
    lines = ["", "needles, the question processed by the method too: right answers"]
    for (method, share), (right, questions) in sorted(counts.items(), key=lambda item: (item[0][1], item[0][0])):
        lines.append(f"{share:6.1%} {method:<14} {right:3d} of {questions}")
    return lines


def _each_layer_tables(rows: Mapping[int, list[LayerRow]]) -> list[str]:
    lines = []
    for share in sorted({row.share for each in rows.values() for row in each}):
        by_method = {layer: {row.method: row for row in each if row.share == share} for layer, each in rows.items()}
        methods = ordered({method for each in by_method.values() for method in each})
        lines += [
            "", f"layer by layer at {share:.1%}: mass captured %, output error, kB of K, V and tables",
            f"{'layer':>6}" + "".join(f"{method:>26}" for method in methods),
        ]
        for layer, each in by_method.items():
            cells = [_layer_cell(each[method]) if method in each else "" for method in methods]
            lines.append(f"{layer:6}" + "".join(f"{cell:>26}" for cell in cells))
    return lines


def _layer_cell(row: LayerRow) -> str:
    return f"{row.captured[0]:7.1f} {row.error[0]:8.4f} {(row.kv_bytes + row.other_bytes) / 1e3:8.0f}"


def _mass_table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not rows:
        return []
    title = "targets of attention mass, sinks and window included: mean over layers and KV heads, heads that reach it"
    return ["", title] + [
        f"{name:<16} mean {m['mean']:.4f}   {m['heads_reaching']:.1%} of {m['heads']} heads   least {m['least']:.3f}   "
        f"{m['tokens']:.0f} tokens"
        for name, m in sorted(rows.items())
    ]


def _needle_table(cells: Mapping[tuple[str, float], Mapping[tuple[str, int, float], bool]]) -> list[str]:
    kinds = {(kind, length) for answers in cells.values() for kind, length, _ in answers}
    if not kinds:
        return []
    columns = sorted(kinds, key=lambda column: (column[0] != "passkey", column))
    lines = ["", "needles by length in tokens: a letter for each depth, first to last; x right, . wrong"]
    lines.append(f"{'share':>6} {'method':<16}" + "".join(f"{kind} {length}".rjust(17) for kind, length in columns))
    for (method, share), answers in sorted(cells.items(), key=lambda item: (item[0][1], rank(item[0][0]))):
        words = []
        for column in columns:
            depths = sorted(depth for kind, length, depth in answers if (kind, length) == column)
            words.append("".join("x" if answers[column[0], column[1], depth] else "." for depth in depths))
        lines.append(f"{share:6.1%} {method:<16}" + "".join(f"{word:>17}" for word in words))
    return lines


def _drift_table(records: Records) -> list[str]:
    """KL over eighths of the text, and the last quarter by the first."""
    rows = drift_rows(records)
    if not rows:
        return []
    length = next(r["tokens"] for key, r in records.items() if key.startswith("drift/"))
    edges = [round(length * (i + 1) / 8) for i in range(8)]
    lines = [
        "", f"drift: KL to the dense model in {length} tokens that it wrote itself, by position; last quarter by first",
        f"{'share':>6} {'method':<14}" + "".join(f"{f'to {edge}':>10}" for edge in edges) + f"{'ratio':>8}",
    ]
    for (method, share), points in rows.items():
        kl = [kl for _, kl, _ in points]
        eighths = [(a + b) / 2 for a, b in zip(kl[::2], kl[1::2], strict=True)]
        begin, end = sum(kl[: len(kl) // 4]), sum(kl[-(len(kl) // 4) :])
        ratio = f"{end / begin:8.2f}" if begin > 0 else f"{'-':>8}"
        lines.append(f"{share:6.1%} {method:<14}" + "".join(f"{x:10.4f}" for x in eighths) + ratio)
    return lines


def _ruler_tables(records: Records) -> list[str]:
    """A table for each length, a column for each task in RULER's order."""
    rows, averages, lines = ruler_rows(records), ruler_averages(records), list[str]()
    for length in sorted({n for cells in rows.values() for _, n in cells}):
        tasks = [task for task in ruler.KINDS if any((task, length) in cells for cells in rows.values())]
        counts = sorted({count for cells in rows.values() for (_, n), (_, count) in cells.items() if n == length})
        samples = "-".join(map(str, dict.fromkeys((counts[0], counts[-1])))) + " sample" + "s" * (counts[-1] > 1)
        lines += [
            "", f"RULER's tasks at {length} tokens, {samples} each: % of the answers' strings that occur",
            f"{'share':>6} {'method':<14}" + "".join(f"{ruler.KINDS[task].short:>6}" for task in tasks) + f"{'mean':>7}",
        ]
        for (method, share), cells in rows.items():
            if length in averages[method, share]:
                scores = (f"{cells[task, length][0]:6.0f}" if (task, length) in cells else f"{'-':>6}" for task in tasks)
                lines.append(f"{share:6.1%} {method:<14}" + "".join(scores) + f"{averages[method, share][length]:7.1f}")
    return lines


def summary(records: Records, depth: int) -> dict[str, Any]:
    """Everything in the tables as plain data; what is not a number is None."""
    late = late_layers(depth)
    groups = {"all": None, "late": late, "early": range(late.start)}
    content = {
        "layers": {name: [asdict(r) for r in layer_rows(records, group)] for name, group in groups.items()},
        "each_layer": {str(layer): [asdict(r) for r in rows] for layer, rows in by_layer(records).items()},
        "end": [asdict(r) for r in text_rows(records)],
        "targets": masses(records),
        "needles": [
            {"method": method, "share": share, "kind": kind, "length": length, "depth": place, "right": right}
            for (method, share), cells in sorted(needle_cells(records).items())
            for (kind, length, place), right in sorted(cells.items())
        ],
        "drift": [
            {"method": method, "share": share, "position": place, "kl": kl, "top1": same}
            for (method, share), points in drift_rows(records).items()
            for place, kl, same in points
        ],
        "ruler": [
            {"method": method, "share": share, "task": task, "length": length, "score": mean, "samples": count}
            for (method, share), cells in ruler_rows(records).items()
            for (task, length), (mean, count) in sorted(cells.items())
        ],
    }
    plain: dict[str, Any] = _plain(content)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
