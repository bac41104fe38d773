"""The study's identifier schemes, and the comparisons in the tables of trained cells, on made-up catalogues and ranks."""

import numpy as np
import pytest


def make_cell(
    arm, seed, ranks, groups="hhtt", task="product search, given profile (constructed: category)", users=None, **other
):
    """As a line of a results file, with the ranks of each row."""
    copies = len(ranks) // len(groups)
    users = list(range(len(ranks))) if users is None else users
    result = {
        "item_ranks": ranks,
        "users": users,
        "groups": {kind: [groups * copies] * 3 for kind in ("items", "interactions")},
        "about": {"data set": "made up", "task": task},
        "parameters": 10,
        "training_tokens": 20,
        "training_flops": 1200,
        "search_seconds": 1.0,
        "validation": [{"epoch": 1.0, "ndcg@10": 0.1}],
        "sids": {"unique": 5, "mean_length": 3.0, "collision_rate": 0.5, "pruned": 0, "recall_ceiling": {"10": 1.0}},
    }
    settings = {
        "data": {"name": "made up", "task": task},
        "embeddings": {"kind": "none", "of": "nothing"},
        "codebook_size": 4,
        "layers": 3,
        "model": {"family": "llama"},
        "training": {"epochs": 1},
        "arm": {"name": arm},
        "seed": seed,
    }
    return {
        "settings": settings | other,
        "seed": seed,
        "result": result,
        "cpu_seconds": 1.0,
        "commit": "c",
        "versions": {"torch": "2"},
    }


def test_differences_by_group_and_their_summary(study_modules):
    tables, comparisons = study_modules["training_tables"], study_modules["training_comparisons"]
    random = np.random.default_rng(0)
    base = [random.permutation([1, 0] * 100).tolist() for _ in range(2)]
    # "tail": every tail row is found, head rows are as they were; "equal": nothing changes; "fewer": other rows
    tail = [np.where(np.arange(200) % 4 > 1, 1, ranks).tolist() for ranks in base]
    cells = [make_cell("unpruned", seed, ranks) for seed, ranks in enumerate(base)]
    cells += [make_cell("tail", seed, ranks) for seed, ranks in enumerate(tail)]
    cells += [make_cell("equal", seed, ranks) for seed, ranks in enumerate(base)]
    cells += [make_cell("fewer", 0, base[0][:100])]
    text = tables.training_tables("Made up", cells)
    missed = np.mean(
        [np.mean([rank == 0 for rank, row in zip(ranks, range(200), strict=True) if row % 4 > 1]) for ranks in base]
    )
    assert f"| tail | items | +0.0000 [+0.0000, +0.0000] | {missed:+.4f} [" in text
    assert "| equal | items | +0.0000 [+0.0000, +0.0000] | +0.0000 [+0.0000, +0.0000] | +0.0000 [+0.0000" in text
    assert text.count("| fewer | none with the same rows |") == 2 and "| fewer | 1 | " in text
    assert "- test rows: 100 of 100 users or 200 of 200 users" in text
    # two arms with the baseline's rows, two metrics
    assert "4 comparisons: if no arm differed, about 0.2 of them" in text
    each = ", ".join(f"{np.sum(np.array(new) != old) / 200:+.4f}" for new, old in zip(tail, base, strict=True))
    assert f"| tail | better | better (p < .001) | {each} | better | better (p < .001) | {each} |" in text
    nothing = "no difference shown | no difference shown (p 1.000) | +0.0000, +0.0000"
    assert f"| equal | {nothing} | {nothing} |" in text
    # a worse arm, of the other order of columns
    arms = {"unpruned": [cells[2]], "worse": [cells[0]]}
    assert "| worse | worse | worse (p < .001) |" in "\n".join(comparisons.summary(arms))
    assert comparisons.summary({"unpruned": [cells[0]], "fewer": [cells[-1]]}) == []


def test_p_values_and_holm_by_hand(study_modules):
    statistics = study_modules["training_statistics"]
    # the smallest times 4, the next times 3, of which one must not be less than its predecessor
    assert statistics.holm([0.03, 0.01, 0.012, 0.9]) == pytest.approx([0.06, 0.04, 0.04, 0.9])
    assert statistics.holm([0.7, 0.6]) == [1.0, 1.0] and statistics.holm([]) == []
    # 60 of 400 users gain a hit, 40 lose one: z = 20 / sqrt(100 - 1) = 2.01, p = .044
    change = np.repeat([1.0, -1.0, 0.0], [60, 40, 300])[:, None]
    (p_value,) = statistics.p_values({0: change}, list(range(400)))
    assert p_value == pytest.approx(0.044, abs=0.01)
    # each user's rows count once when they are equal: four copies of everything say nothing more
    (copied,) = statistics.p_values({0: np.repeat(change, 4, 0)}, np.repeat(np.arange(400), 4).tolist())
    assert copied == pytest.approx(p_value)


def test_headings_tell_blocks_apart(study_modules):
    tables = study_modules["training_tables"]
    ranks = [1, 0, 1, 0]
    cells = [
        make_cell("unpruned", 0, ranks),
        make_cell("unpruned", 0, ranks, task="next item, given the history"),
        make_cell("unpruned", 0, ranks, training={"epochs": 2}),
    ]
    text = tables.training_tables("Made up", cells)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## made up, product search, llama, K = 4, 3 layers, epochs = 1",
        "## made up, next item, llama, K = 4, 3 layers",
        "## made up, product search, llama, K = 4, 3 layers, epochs = 2",
    ]
    assert "In short" not in text and "Paired" not in text.split("## ", 1)[1]
