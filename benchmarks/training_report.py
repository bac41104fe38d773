"""From the runs of the training benchmark to its tables and to what the goals say about them."""

from measures import markdown_table
from training_rows import ROWS, ROWS_PACKED, SESSION_METHODS, SESSIONS, SESSIONS_PACKED, SID, STOCK

# Of losses of about 12, after an update: what the order of float32 sums over 152,000 tokens leaves. In bfloat16, whose numbers lie
# 1/16 apart there, it would be more.
TOLERANCE = 1e-4


def speed_ratio(run, clock, part="forward_backward"):
    """Rows per second of SIDTrainer over those of the stock Trainer."""
    return run["methods"][STOCK][part][clock] / run["methods"][SID][part][clock]


def flop_limit(run):
    """The ratio that there would be if operations were all, each as fast as any other."""
    return run["methods"][STOCK]["flops_done"] / run["methods"][SID]["flops_done"]


def loss_difference(run, reference):
    """The largest over methods and steps."""
    methods = run["methods"]
    pairs = [zip(methods[name]["losses"], methods[reference]["losses"], strict=True) for name in methods]
    return max(abs(loss - other) for pair in pairs for loss, other in pair)


def memory_ratio(entry, kind):
    stock, own = (entry["methods"][name].get(kind) for name in (STOCK, SID))
    return own / stock if own is not None and stock else None


def session_ratio(run, clock, part="seconds"):
    """Answers per second of packed sessions over those of the faster way to have a row for each."""
    seconds = {name: values[part][clock] for name, values in run["methods"].items()}
    return min(seconds[ROWS], seconds[ROWS_PACKED]) / seconds[SESSIONS_PACKED]


def utilisation(values, peak_tflops):
    """Model-FLOPs utilisation: operations of forward and backward, none counted twice, over what the device could do."""
    return values["flops"] / values["seconds"]["wall"] / (peak_tflops * 1e12)


def judge(runs, memory, sessions, clock):
    """Goals, and whether this run met them. They are set for Qwen1.5-0.5B's shape; of several settings the worst counts."""
    runs, memory, sessions = (
        [run for run in part if run["shape"] == "Qwen1.5-0.5B"] for part in (runs, memory, sessions)
    )
    goals = []

    def add(goal, values, sign, limit):
        values = [value for value in values if value is not None]
        value = None if not values else min(values) if sign == ">=" else max(values)
        met = None if value is None else bool(value >= limit if sign == ">=" else value <= limit)
        goals.append({"goal": goal, "value": value, "limit": f"{sign} {limit:.3g}", "met": met})

    shares = [speed_ratio(run, clock) / flop_limit(run) for run in runs]
    add("forward and backward: share of the FLOP limit", shares, ">=", 0.93)
    for layers, limit in ((24, 1.5), (6, 3)):
        ratios = [speed_ratio(run, clock) for run in runs if run["layers"] == layers and not run["checkpointing"]]
        add(f"forward and backward, {layers} layers: rows per second / stock Trainer's", ratios, ">=", limit)
    for goal, limit, chosen in (
        ("24 layers", 0.6, [entry for entry in memory if entry["layers"] == 24 and not entry["checkpointing"]]),
        ("12 layers", 0.4, [entry for entry in memory if entry["layers"] == 12 and not entry["checkpointing"]]),
        ("gradient checkpointing", 0.4, [entry for entry in memory if entry["checkpointing"]]),
    ):
        add(
            f"{goal}: peak extra memory / stock Trainer's",
            [memory_ratio(entry, "plain") for entry in chosen],
            "<=",
            limit,
        )
    add(f"{SESSIONS_PACKED}: answers per second / {ROWS}", [session_ratio(run, clock) for run in sessions], ">=", 3)
    differences = [loss_difference(run, STOCK) for run in runs] + [loss_difference(run, ROWS) for run in sessions]
    add("largest difference of losses", differences, "<=", TOLERANCE)
    return goals


def cell(value, form="{:.2f}"):
    return "-" if value is None else form.format(value)


def where(run):
    rows = f"{run['rows']}{', checkpointing' if run['checkpointing'] else ''}"
    return [run["shape"], str(run["layers"]), str(run["prompt"]), rows]


def write_tables(result):
    setting, clock = result["setting"], result["setting"]["clock"]
    on_cpu, shapes = setting["device"] == "CPU", setting["shapes"]
    places = ["shape", "layers", "prompt", "rows"]
    everything = result["runs"] + result["memory"] + result["sessions"]
    lines = [
        f"{setting['device']}, {'float32' if on_cpu else 'bfloat16'}, {setting['threads']} thread(s), {clock} clock, random "
        "weights; " + ", ".join(f"{name} {number}" for name, number in setting["versions"].items()) + ".",
    ]
    for shape, layers in dict.fromkeys((run["shape"], run["layers"]) for run in everything):
        if layers != shapes[shape]["num_hidden_layers"]:
            lines.append(f"{shape} has {shapes[shape]['num_hidden_layers']} layers, here {layers}.")
    if setting["quick"]:
        lines.append("--quick: a small model. No basis for judgement.")

    body = []
    for run in result["runs"] + result["sessions"]:
        for name, values in run["methods"].items():
            tflops = values["flops"] / values["seconds"][clock] / 1e12
            mfu = None if setting["peak_tflops"] is None else utilisation(values, setting["peak_tflops"])
            parts = [values[part][clock] for part in ("seconds", "forward_backward", "optimizer")]
            body.append(
                [*where(run), name, *(cell(part, "{:.3g}") for part in parts)]
                + [cell(values["tokens"] / parts[0], "{:,.0f}"), cell(tflops, "{:.3g}"), cell(mfu, "{:.1%}")]
            )
    if body:
        header = [*places, "method", "s / step", "forward, backward", "optimizer", "tokens/s", "TFLOP/s", "MFU"]
        lines += ["", markdown_table(header, body)]

    body = []
    for run in result["runs"]:
        ratio, limit = speed_ratio(run, clock), flop_limit(run)
        losses = [f"{run['methods'][name]['losses'][-1]:.5f}" for name in (STOCK, SID)]
        body.append(
            [*where(run), cell(ratio), cell(limit), cell(ratio / limit), cell(speed_ratio(run, clock, "seconds"))]
            + [*losses, cell(loss_difference(run, STOCK), "{:.1e}")]
        )
    if body:
        header = [*places, "forward, backward: times as fast as stock", "FLOP limit", "share of it", "whole step"]
        header += ["loss, stock", "loss, SIDTrainer", "largest difference"]
        lines += ["", markdown_table(header, body)]

    body = []
    for entry in result["memory"]:
        row = where(entry)
        for kind in ("plain", "accumulating"):
            row += [cell(entry["methods"][name].get(kind), "{:,.0f}") for name in (STOCK, SID)]
            row.append(cell(memory_ratio(entry, kind)))
        body.append(row)
    if body:
        header = [*places, "stock, MiB", "SIDTrainer, MiB", "ratio", "accumulating: stock", "SIDTrainer", "ratio"]
        lines += [
            "",
            "Peak memory of a step beyond weights, gradients and optimizer states; then the same where gradients of another batch "
            "are there before.",
            "",
            markdown_table(header, body),
        ]

    body = []
    for run in result["sessions"]:
        seconds = {name: values["seconds"][clock] for name, values in run["methods"].items()}
        yardstick = min(seconds[ROWS], seconds[ROWS_PACKED])
        for name in SESSION_METHODS:
            values = run["methods"][name]
            ratios = [cell(yardstick / seconds[name]) if name in (SESSIONS, SESSIONS_PACKED) else "-"]
            body.append(
                [*where(run), name, str(values["answers"]), str(values["tokens"])]
                + [cell(values["answers"] / seconds[name], "{:.3g}"), *ratios, f"{values['losses'][-1]:.5f}"]
            )
    if body:
        header = [*places[:-1], "customers", "method", "answers", "tokens", "answers/s"]
        header += ["times as fast as the faster with one answer a row", "loss"]
        lines += ["", markdown_table(header, body)]

    verdict = {True: "PASS", False: "MISS", None: "not measured"}
    goals = [
        [goal["goal"], cell(goal["value"], "{:.4g}"), goal["limit"], verdict[goal["met"]]] for goal in result["goals"]
    ]
    lines += ["", "The goals are set for the shape of Qwen1.5-0.5B; of several settings the worst counts.", ""]
    return "\n".join([*lines, markdown_table(["goal", "here", "limit", ""], goals)])
