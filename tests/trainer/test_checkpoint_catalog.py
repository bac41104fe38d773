"""Checkpoints hold links to one catalog, whatever is deleted in between."""

import os

import numpy as np
import pytest

from rqsid import SIDTokenizer

one_family = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)


def train(make_trainer, model, purchases, **args):
    trainer = make_trainer(
        model, purchases, per_device_train_batch_size=4, max_steps=6, save_strategy="steps", save_steps=2, **args
    )
    trainer.train()
    return trainer


@one_family
def test_checkpoints_share_one_catalog(model, tokenizer, make_purchases, make_trainer, tmp_path):
    trainer = train(make_trainer, model, make_purchases(24))
    trainer.save_model(tmp_path / "last")
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4, 6)] + [tmp_path / "last"]
    assert len({os.stat(folder / "sid_catalog.safetensors").st_ino for folder in folders}) == 1
    for folder in folders:
        loaded = SIDTokenizer.from_pretrained(folder).catalog
        assert loaded.history == tokenizer.catalog.history
        assert all((loaded.columns[name] == column).all() for name, column in tokenizer.catalog.columns.items())
        assert not [name for name in os.listdir(folder) if name.startswith(".sid_") or name.endswith(".tmp")]


@one_family
def test_only_the_last_checkpoint_is_kept(model, tokenizer, make_purchases, make_trainer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "start")
    inode = os.stat(tmp_path / "start" / "sid_catalog.safetensors").st_ino
    loaded = SIDTokenizer.from_pretrained(tmp_path / "start")
    trainer = make_trainer(
        model,
        make_purchases(24),
        per_device_train_batch_size=4,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
    )
    trainer.processing_class = loaded
    # The folder that it came from may go as well.
    for name in os.listdir(tmp_path / "start"):
        if name != "sid_catalog.safetensors":
            os.remove(tmp_path / "start" / name)
    trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert os.stat(checkpoint / "sid_catalog.safetensors").st_ino == inode
    # Without the first file, from one checkpoint to the next.
    os.remove(tmp_path / "start" / "sid_catalog.safetensors")
    trainer.save_model(tmp_path / "last")
    assert os.stat(tmp_path / "last" / "sid_catalog.safetensors").st_ino == inode


@one_family
def test_a_catalog_that_grew_between_checkpoints(model, tokenizer, make_purchases, make_trainer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "start")
    loaded = SIDTokenizer.from_pretrained(tmp_path / "start")
    trainer = make_trainer(model, make_purchases(8))
    trainer.processing_class = loaded
    trainer.save_model(tmp_path / "before")
    loaded.catalog.append(["new"], codes=np.array([[1, 2, 3]]))
    trainer.save_model(tmp_path / "after")
    trainer.save_model(tmp_path / "again")
    inodes = [
        os.stat(tmp_path / name / "sid_catalog.safetensors").st_ino for name in ("start", "before", "after", "again")
    ]
    assert inodes[0] == inodes[1] != inodes[2] == inodes[3]
    catalogs = [SIDTokenizer.from_pretrained(tmp_path / name).catalog for name in ("before", "after")]
    assert [len(catalog) for catalog in catalogs] == [len(tokenizer.catalog), len(tokenizer.catalog) + 1]
    assert catalogs[1].product_ids([-1 + len(catalogs[1])]) == ["new"]
