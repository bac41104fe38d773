"""Every Python block of the README runs, one after the other, on what the README says that the reader brings."""

import re
from pathlib import Path

import numpy as np
import pytest
from baichuan_checkpoints import write_checkpoint
from datasets import Dataset, DatasetDict
from safetensors.numpy import save_file
from sentencepiece_models import write_baichuan_folder

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama"), ("qwen", "qwen")], indirect=True)
def test_the_snippets_run(base_tokenizer, make_tiny_model, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    base_tokenizer.save_pretrained(checkpoint)
    make_tiny_model(len(base_tokenizer)).save_pretrained(checkpoint)
    random = np.random.default_rng(0)
    product_ids = [f"B{row:04d}" for row in range(400)]
    purchases = Dataset.from_list(
        [
            {"profile": "age 35-44", "history": product_ids[row : row + 3], "query": "fresh milk", "product": bought}
            for row, bought in enumerate(product_ids[3:19])
        ]
    )
    namespace = {
        "product_ids": product_ids,
        "embeddings": random.standard_normal((400, 8), dtype=np.float32),
        "popularity": random.integers(0, 99, 400),
        "purchases": DatasetDict(train=purchases, validation=purchases.select(range(4))),
        "checkpoint": str(checkpoint),
        "log": Dataset.from_list(
            [
                {"user": row // 4, "product": bought, "query": "fresh milk"}
                for row, bought in enumerate(product_ids[:24])
            ]
        ).to_iterable_dataset(),
        "new_ids": ["N1", "N2"],
        "new_embeddings": random.standard_normal((2, 8), dtype=np.float32),
    }
    text = README.read_text(encoding="utf-8")
    text = re.sub(r"\n## To the Hub and back\n.*?\n## ", "\n## ", text, flags=re.DOTALL)  # in tests/hub
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "embeddings").mkdir(parents=True)
    shard = {"embeddings": random.standard_normal((5000, 8), dtype=np.float32)}
    save_file(shard, tmp_path / "out" / "embeddings" / "embeddings-00000.safetensors")
    published = tmp_path / "Baichuan2-7B-Base"
    published.mkdir()
    write_baichuan_folder(published)
    write_checkpoint(published, vocab_size=1000)
    for snippet in snippets:
        snippet = snippet.replace("baichuan-inc/Baichuan2-7B-Base", str(published))
        exec(compile(snippet, str(README), "exec"), namespace)

    found = namespace["search"](
        namespace["model"], namespace["tokenizer"], [{"history": product_ids[:3], "query": "potato chips"}], top_k=10
    )
    assert len(found[0]) == 10 and {"product_id", "sid", "score"} <= set(found[0][0])
    assert namespace["catalog"].version == 4 and namespace["catalog"].product_rows(["N1", "N2"]).tolist() == [400, 401]
    assert all(
        namespace["tokenizer"].decode_products(namespace["sequences"][:, namespace["inputs"]["input_ids"].shape[1] :])
    )


def test_the_files_it_names_are_there():
    text = README.read_text(encoding="utf-8")
    for path in (
        re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) + re.findall(r"`(examples/[^`]+)`", text) + ["CITATION.cff"]
    ):
        assert (README.parent / path).exists(), path


def test_its_commands_are_targets_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    for target in commands:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
