"""From the runs of the search benchmark to its tables and to what the goals say about them."""

from measures import markdown_table
from search_measures import PHASES
from search_peers import DICTIONARY, SID, VOCAB

TOLERANCE = 1e-3


def judge(runs, memory, clock):
    """Goals, and whether this run met them. Of several prompts the worst counts."""
    goal_runs = [run for run in runs if (run["sids"], run["beams"]) == (100_000, 50) and 256 <= run["prompt"] <= 512]
    goal_memory = [entry for entry in memory if (entry["sids"], entry["beams"]) == (100_000, 50)]
    goals = []

    def add(goal, values, sign, limit):
        values = [value for value in values if value is not None]
        value = None if not values else min(values) if sign == ">=" else max(values)
        met = None if value is None else bool(value >= limit if sign == ">=" else value <= limit)
        goals.append({"goal": goal, "value": value, "limit": f"{sign} {limit:.3g}", "met": met})

    for vocabulary, method, limit in ((32_000, VOCAB, 40), (152_000, VOCAB, 25), (152_000, SID, 80)):
        ratios = [speed_ratio(run, method, clock) for run in goal_runs if run["vocabulary"] == vocabulary]
        add(f"{method}, {vocabulary:,} tokens: times as fast as the dictionary trie", ratios, ">=", limit)
    equal = [run["equality"].get(DICTIONARY, {}) for run in goal_runs]
    add("SIDs of the dictionary trie that search found", [entry.get("same_sids") for entry in equal], ">=", 1)
    add("largest difference of their scores", [entry.get("score_difference") for entry in equal], "<=", TOLERANCE)
    for method in (VOCAB, SID):
        ratios = [memory_ratio(entry, method) for entry in goal_memory if 256 <= entry["prompt"] <= 512]
        add(f"{method}: peak extra memory / dictionary trie's", ratios, "<=", 1 / 3)
    for vocabulary, method in ((32_000, VOCAB), (152_000, VOCAB), (152_000, SID)):
        shares = [run["limit"].get(method, {}).get("overhead") for run in goal_runs if run["vocabulary"] == vocabulary]
        add(f"{method}, {vocabulary:,} tokens: share of time beyond the model's forwards", shares, "<=", 0.10)
    return goals


def speed_ratio(run, method, clock):
    seconds = run["seconds"]
    return seconds[DICTIONARY][clock] / seconds[method][clock] if {DICTIONARY, method} <= seconds.keys() else None


def limit_ratio(run, method, clock):
    known = DICTIONARY in run["seconds"]
    return run["seconds"][DICTIONARY][clock] / run["limit"][method]["seconds"][clock] if known else None


def memory_ratio(entry, method):
    peaks = entry["methods"]
    if not peaks.get(DICTIONARY) or not peaks.get(method):
        return None
    return peaks[method]["peak_mib"] / peaks[DICTIONARY]["peak_mib"]


def cell(value, form="{:.3g}"):
    return "-" if value is None else form.format(value)


def write_tables(result, methods):
    setting, clock = result["setting"], result["setting"]["clock"]
    searches = [name for name in methods if name in (VOCAB, SID)]
    others = [name for name in methods if name not in (VOCAB, SID)]
    lines = [
        f"Llama of {setting['model_layers']} layers x {setting['hidden_size']} with random weights, float32, SIDs of "
        f"{setting['sid_length']} x {setting['codebook_size']} codes, one prompt at a time, {setting['threads']} thread(s); "
        + ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
        + ".",
        *result["notes"],
        "",
    ]

    varying = result["varying_length"]
    rows = [
        [
            label,
            cell(varying[f"{name}_top_found"], "{:.1%}"),
            cell(varying[f"{name}_beams_found"], "{:.1%}"),
            cell(varying[f"short_{name}"], "{:.1%}"),
            cell(varying[f"{name}_score_error"], "{:.1e}"),
        ]
        for name, label in (
            ("search", f"search, {varying['beams']} beams"),
            ("generate", f"generate, SIDLogitsProcessor, {varying['beams']} beams"),
            ("wide_search", "search, no beam left out"),
        )
    ]
    lines += [
        f"SIDs of varying length: {varying['sids']:,} SIDs, {varying['short_share']:.0%} of them short, a small model trained "
        f"for {varying['steps']} steps, {varying['prompts']} prompts. Search returns {varying['search_in_generate']:.1%} of "
        f"what generate does. Of brute force's best {varying['beams']}, {varying['short_exact']:.1%} are short; it differs "
        f"from plain forwards by {varying['brute_force_error']:.1e} at most.",
        "",
        markdown_table(
            [
                "against brute force",
                f"of its best {varying['top_k']}",
                f"of its best {varying['beams']}",
                "short ones",
                "score error",
            ],
            rows,
        ),
        "",
    ]

    rows = []
    for run in result["runs"]:
        for name in searches:
            shares = run["phases"][name]
            limit = run["limit"][name]
            rows.append(
                [*where(run), name, cell(run["seconds"][name][clock] * 1000, "{:.0f}")]
                + [cell(limit["seconds"][clock] * 1000, "{:.0f}"), cell(limit_ratio(run, name, clock), "{:.1f}")]
                + [cell(limit["overhead"], "{:.1%}")]
                + [cell(shares[phase], "{:.1%}") for phase in (*PHASES, "rest")]
            )
    if rows:
        header = ["tokens", "SIDs", "prompt", "beams", "method", "ms", "model alone, ms"]
        header += ["times as fast as the dictionary trie", "beyond it"]
        lines += [
            "Phases of a search. Model alone: one prefill, the forwards of the levels, and the head's matrix products, which no "
            "exact search can do without; beyond it: 1 - model alone / search, the median of pairs. The phase head also holds "
            "the softmax's normaliser.",
            "",
            markdown_table([*header, *PHASES, "rest"], rows),
            "",
        ]

    rows = []
    for entry in result["memory"]:
        for name in entry["methods"]:
            peak = entry["methods"][name] or {}
            ratio = memory_ratio(entry, name)
            rows.append(
                [*where(entry), name, cell(peak.get("peak_mib"), "{:.0f}"), cell(ratio, "{:.2f}")]
                + [cell(peak.get("constraint_mib"), "{:.0f}")]
            )
    header = ["tokens", "SIDs", "prompt", "beams", "method", "peak extra MiB", "/ dictionary", "trie MiB"]
    lines += [markdown_table(header, rows), ""]

    rows = []
    for run in result["runs"]:
        seconds = run["seconds"]
        for name in methods:
            equality = run["equality"].get(name, {})
            rows.append(
                [*where(run), name, cell(seconds[name]["wall"]), cell(seconds[name]["cpu"])]
                + [cell(speed_ratio(run, name, clock), "{:.2f}" if name in others else "{:.1f}")]
                + [cell(equality.get("same_sids"), "{:.1%}"), cell(equality.get("score_difference"), "{:.1e}")]
            )
    header = [
        "tokens",
        "SIDs",
        "prompt",
        "beams",
        "method",
        "seconds",
        "CPU s",
        "times as fast as the dictionary trie",
    ]
    lines += [
        "Same SIDs: the share of the method's SIDs that search, vocab returns too; and the largest difference of their "
        "scores. With sid the softmax is another, hence other SIDs.",
        "",
        markdown_table([*header, "same SIDs", "score difference"], rows),
        "",
    ]

    verdict = {True: "PASS", False: "MISS", None: "not measured"}
    goals = [
        [goal["goal"], cell(goal["value"], "{:.4g}"), goal["limit"], verdict[goal["met"]]] for goal in result["goals"]
    ]
    lines += [
        "The goals are set for 50 beams, prompts of 256 to 512, 100,000 SIDs, 2 cores; of several prompts the worst counts.",
        "",
    ]
    return "\n".join([*lines, markdown_table(["goal", "here", "limit", ""], goals)])


def where(entry):
    return [f"{entry['vocabulary']:,}", f"{entry['sids']:,}", str(entry["prompt"]), str(entry["beams"])]
