"""Tables and the plot of bench/exchange.py's records. Needs no GPU."""

from __future__ import annotations

__all__ = ["PEERS", "ROWS", "format_report", "plot"]

# Records of the table that depend on comm_sms, in this order.
ROWS = {
    "ceiling": "raw TMA row push",
    "plan": "plan",
    "dispatch_unique": "dispatch, unique rows",
    "dispatch_unique_fp8": "dispatch, unique rows, fp8",
    "dispatch_expert": "dispatch, expert order",
    "dispatch_expanded": "dispatch, unique + expansion",
    "combine_unique": "combine, sums per rank",
    "combine_expert": "combine, expert order",
    "combine_summed": "combine, sum + unique",
}
PEERS = {
    "nccl": "NCCL all_to_all_single, unique rows",
    "copies_in_turn": "copy engine alone, peers in turn",
    "copies_at_once": "copy engine alone, peers at once",
}
LATENCY = {"both": "dispatch + combine", "with_plan": "plan + dispatch + combine"}


def format_report(result: dict) -> str:
    """All parts that were measured, the table last."""
    parts = []
    if "beside" in result:
        parts.append(_format_beside(result["beside"]))
    if "small" in result:
        parts.append(_format_small(result["small"]))
    if "latency" in result:
        parts.append(_format_latency(result["latency"]))
    if "table" in result:
        parts.append(_format_table(result["table"]))
    return "\n\n".join(parts)


def _format_table(records: list[dict]) -> str:
    """µs, then GB/s on the wire / logical, a column a comm_sms."""
    ours = {(r["name"], r["comm_sms"]): r for r in records if r["comm_sms"] is not None}
    counts = _counts(records)

    def rates(record: dict) -> str:
        if "wire_gb_s" not in record:
            return "-"
        return f"{record['wire_gb_s']:.0f}/{record['logical_gb_s']:.0f}"

    lines = _grid("us by comm_sms", counts, ROWS, ours, lambda r: f"{r['us']:.0f}")
    lines += ["", *_grid("GB/s wire/logical", counts, ROWS, ours, rates), ""]
    for record in records:
        if record["comm_sms"] is None:
            label = PEERS[record["name"]]
            lines.append(f"{label:36} {record['us']:.0f} us, {rates(record)} GB/s")
    return "\n".join(lines)


def _format_beside(records: list[dict]) -> str:
    """Slowdown of the MLP; "<" where communication ended before it, so that it is too small."""
    cells = {(r["name"], r["comm_sms"]): r for r in records}
    names = {name: ROWS[name] for name in ROWS if any(r["name"] == name for r in records)}
    titles = {
        "slowdown": "MLP beside it / alone on the same SMs",
        "of_all": "MLP beside it / alone on all SMs",
        "of_all_drawn": "the same, on all SMs, drawing tiles",
    }
    lines = []
    for field, title in titles.items():

        def share(record: dict, field: str = field) -> str:
            return f"{record[field]:.2f}{'' if record['covered'] > 0.98 else '<'}"

        lines += _grid(title, _counts(records), names, cells, share)
    return "\n".join(lines)


def _format_small(records: list[dict]) -> str:
    ceiling, dispatch = records
    return (
        f"8192 tokens, H 2048, top-8 of 128, {dispatch['comm_sms']} SMs: dispatch of unique rows "
        f"{dispatch['us']:.0f} us, {dispatch['wire_gb_s']:.0f} of {ceiling['wire_gb_s']:.0f} GB/s, "
        f"{dispatch['of_ceiling']:.1%} of the ceiling"
    )


def _format_latency(records: list[dict]) -> str:
    cells, names = {}, {}
    for r in records:
        name = f"{r['form']}, {r['name']}"
        names[name] = f"{r['form']}: {LATENCY[r['name']]}"
        cells[name, r["comm_sms"]] = r

    def time(record: dict) -> str:
        return f"{record['us']:.1f}{'' if record['launched_as'] == 'graph' else '*'}"

    lines = _grid("128 tokens, us", _counts(records), names, cells, time)
    if any(r["launched_as"] != "graph" for r in records):
        lines.append("* not captured: events around the calls, the host's launches included")
    return "\n".join(lines)


def _counts(records: list[dict]) -> list[int]:
    return list(dict.fromkeys(r["comm_sms"] for r in records if r["comm_sms"] is not None))


def _grid(title: str, counts: list[int], names: dict, cells: dict, text) -> list[str]:
    """A line a name, a column a count; "-" where there is no record."""
    width = 1 + max(map(len, [title, *names.values()]))
    lines = [f"{title:{width}}" + "".join(f"{count:8d}" for count in counts)]
    for name, label in names.items():
        records = [cells.get((name, count)) for count in counts]
        line = "".join(f"{text(record) if record else '-':>8}" for record in records)
        lines.append(f"{label:{width}}{line}")
    return lines


def plot(records: list[dict], path: str) -> None:
    """µs over SMs, dispatch and combine side by side; copy engines at 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for panel, operation in zip(panels, ("dispatch", "combine"), strict=True):
        styles = iter(("o-", "d-", "s-", "^-"))
        for name, label in ROWS.items():
            if name.startswith(operation):
                _curve(panel, records, name, label, next(styles), linewidth=1.8)
        _curve(panel, records, "ceiling", ROWS["ceiling"], "k--", linewidth=1)
        for record in records:
            if record["name"] in ("nccl", "copies_in_turn"):
                panel.axhline(record["us"], color="grey", linestyle=":", linewidth=1)
                at = (max(_counts(records)), record["us"])
                label = PEERS[record["name"]]
                panel.annotate(label, at, ha="right", va="bottom", fontsize=7, color="dimgrey")
        panel.set(xlabel="SMs that communicate (0: copy engines)", xticks=_counts(records))
        panel.set(title=operation, yscale="log")
        panel.yaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_minor_formatter("{x:.0f}")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    panels[0].set_ylabel("µs")
    figure.suptitle("Dispatch and combine, every token once a rank over the link")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _curve(panel, records: list[dict], name: str, label: str, style: str, **options) -> None:
    """Copy engines get a marker of their own: 0 is no smaller number of SMs, but another way."""
    points = sorted((r["comm_sms"], r["us"]) for r in records if r["name"] == name)
    with_sms = [point for point in points if point[0]]
    if with_sms:
        (line,) = panel.plot(*zip(*with_sms, strict=True), style, label=label, **options)
        label, color = None, line.get_color()
    else:
        color = None
    for count, us in points:
        if count == 0:
            panel.plot(0, us, "*", markersize=11, color=color, label=label)
