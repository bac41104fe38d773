"""From the runs of the quantizer benchmark to its tables and to what the goals say about them."""

import numpy as np
from measures import markdown_table

GOAL_SETTING = "60,000 rows of text, three layers of 256 codes, one thread"


def summarize(runs, method):
    """Means over the seeds, but the median of CPU seconds; and the spread of the error, (largest - smallest) / mean."""
    of_method = [run for run in runs if run["method"] == method]
    errors = [run["relative_error"] for run in of_method]
    row = {
        "method": method,
        "seeds": len(of_method),
        "error_spread": (max(errors) - min(errors)) / float(np.mean(errors)),
    }
    for key in (
        "fit_memory_mib",
        "relative_error",
        "collision_rate",
        "encode_rows_per_second",
        "encode_share_of_gemm",
    ):
        values = [run[key] for run in of_method if run.get(key) is not None]
        row[key] = float(np.mean(values)) if values else None
    row["fit_cpu_seconds"] = float(np.median([run["fit_cpu_seconds"] for run in of_method]))
    for key in ("gini", "gini_null", "under_used"):
        row[key] = np.mean([run[key] for run in of_method], axis=0).tolist()
    row["worst_gini"] = float(max(max(run["gini"]) for run in of_method))
    row["most_under_used"] = int(max(sum(run["under_used"]) for run in of_method))
    return row


def add_ratios(rows, reference):
    for row in rows.values():
        for key in ("fit_cpu_seconds", "relative_error", "collision_rate"):
            known = reference in rows and rows[reference][key] > 0
            row[f"{key}_ratio"] = row[key] / rows[reference][key] if known else None


def judge(rows, encode):
    """
    Returns:
        `list[dict]`: per goal its `value` in this run, or `None` where it was not measured, the `limit`, and whether it is
        `met`.
    """
    fast, quality = rows.get("rqsid fast", {}), rows.get("rqsid quality", {})
    peers = [row["relative_error"] for name, row in rows.items() if not name.startswith("rqsid")]
    lowest = quality["relative_error"] / min(peers) if quality and peers else None
    encode = encode or {}
    goals = [
        ("fast: fit CPU / faiss.Kmeans", fast.get("fit_cpu_seconds_ratio"), "<=", 0.55),
        ("fast: relative error / faiss.Kmeans", fast.get("relative_error_ratio"), "<=", 0.985),
        ("fast: collisions / faiss.Kmeans", fast.get("collision_rate_ratio"), "<=", 0.75),
        ("quality: fit CPU / faiss.Kmeans", quality.get("fit_cpu_seconds_ratio"), "<=", 1.2),
        ("quality: relative error / faiss.Kmeans", quality.get("relative_error_ratio"), "<=", 0.97),
        ("quality: relative error / the best peer's", lowest, "<=", 1.0),
        ("encode: share of the matrix products' speed", encode.get("share_of_gemm"), ">=", 0.80),
        ("encode: share of faiss' speed", encode.get("share_of_faiss"), ">=", 0.95),
    ]
    for name, row in (("fast", fast), ("quality", quality)):
        spread = row.get("error_spread") if row.get("seeds", 0) > 1 else None
        goals += [
            (f"{name}: under-used codes, worst seed", row.get("most_under_used"), "<=", 0),
            (f"{name}: Gini, worst layer and seed", row.get("worst_gini"), "<=", 0.30),
            (f"{name}: spread of relative error over seeds", spread, "<=", 0.005),
        ]
    verdicts = []
    for goal, value, sign, limit in goals:
        met = None if value is None else bool(value <= limit if sign == "<=" else value >= limit)
        verdicts.append({"goal": goal, "value": value, "limit": f"{sign} {limit:g}", "met": met})
    return verdicts


def write_tables(result):
    def cell(value, digits=2):
        return "-" if value is None else f"{value:.{digits}f}"

    setting = result["setting"]
    with_spread = [row for row in result["methods"] if row["seeds"] > 1]
    header = [
        "method",
        "fit CPU s",
        "/ faiss",
        "memory MiB",
        "rel. error",
        "/ faiss",
        "Gini",
        "under-used",
        "collisions",
    ]
    header += ["/ faiss", "encode krows/s", "/ GEMM"]
    body = []
    for row in result["methods"]:
        speed = row["encode_rows_per_second"]
        body.append(
            [
                row["method"],
                cell(row["fit_cpu_seconds"], 1),
                cell(row["fit_cpu_seconds_ratio"]),
                cell(row["fit_memory_mib"], 0),
                cell(row["relative_error"], 4),
                cell(row["relative_error_ratio"], 3),
                " ".join(f"{value:.2f}" for value in row["gini"]),
                " ".join(f"{value:.0f}" for value in row["under_used"]),
                cell(row["collision_rate"], 4),
                cell(row["collision_rate_ratio"]),
                cell(None if speed is None else speed / 1000, 1),
                cell(row["encode_share_of_gemm"]),
            ]
        )
    nulls = result["methods"][0]["gini_null"]
    lines = [
        f"{setting['rows']} x {setting['dim']} {setting['embeddings']}, codebook sizes {setting['codebook_sizes']}, "
        f"{setting['threads']} thread(s).",
        "",
        f"Gini of codes drawn at random: {' '.join(f'{value:.2f}' for value in nulls)}. Under-used: codes with less than a "
        "tenth of the mean count. Where a method was fitted with several seeds, the median of CPU seconds and means of the "
        "rest.",
        *result["notes"],
        "",
        markdown_table(header, body),
    ]
    if with_spread:
        spreads = [[row["method"], str(row["seeds"]), f"{row['error_spread']:.2%}"] for row in with_spread]
        lines += ["", markdown_table(["method", "seeds", "spread of relative error"], spreads)]
    if result["encode"]:
        lines += ["", "Encoding, side by side in one process: " + encode_sentence(result["encode"])]
    goals = []
    for goal in result["goals"]:
        verdict = {True: "PASS", False: "MISS", None: "not measured"}[goal["met"]]
        goals.append([goal["goal"], "-" if goal["value"] is None else f"{goal['value']:.4g}", goal["limit"], verdict])
    lines += ["", f"The goals are set for {GOAL_SETTING}.", "", markdown_table(["goal", "here", "limit", ""], goals)]
    return "\n".join(lines)


def encode_sentence(encode):
    speeds = {name.removesuffix("_rows_per_second"): value for name, value in encode.items() if "rows_per" in name}
    return ", ".join(f"{name} {value / 1000:.1f} krows/s" for name, value in speeds.items()) + "."
