"""What the Trainer pushes: one state in one commit, whatever happens meanwhile, and nothing that should stay here."""

import json
import os
import traceback
from types import SimpleNamespace

import pytest
import torch
from fresh_process import run_fresh
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import LoraConfig
from pushing_training import make_tokenizer, make_trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from rqsid import ResidualQuantizer, SIDTokenizer, load_lora, search
from rqsid.trainer import check_checkpoint
from rqsid.trainer.run_card import finish_card

pytestmark = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
PROMPTS = [{"query": "potato chips", "history": ["p3"]}, {"query": "fresh milk"}]


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer):
    return make_tokenizer(base_tokenizer)


@pytest.fixture
def make(tokenizer, make_tiny_model, tmp_path, hub, hub_client):
    def make(model=None, output_dir=tmp_path / "run", **args):
        model = make_tiny_model(tokenizer.base_size) if model is None else model
        args = {"push_to_hub": True, "hub_model_id": "alice/m", "hub_token": hub.token, "evaluation": 0} | args
        return make_trainer(model, tokenizer, output_dir, **args)

    yield make
    tokenizer.prompt_template.max_length = None


def rankings(model, tokenizer):
    return [[(one["product_id"], one["score"]) for one in row] for row in search(model.eval(), tokenizer, PROMPTS, 5)]


def content_of(hub, repo_type="model"):
    """All that a Hub holds, of every revision of every repository."""
    for kind, name in hub.store.repos:
        for commit in hub.commits(name, repo_type=kind):
            yield f"{name} {commit['message']} {commit['description']}".encode()
            for path, content in hub.files(name, commit["id"], kind).items():
                yield path.encode() + content


class KeepWeights(TrainerCallback):
    """What each checkpoint held, although it may be deleted."""

    def __init__(self):
        self.weights = {}

    def on_save(self, args, state, control, **kwargs):
        path = f"{args.output_dir}/checkpoint-{state.global_step}/model.safetensors"
        with open(path, "rb") as file:
            self.weights[state.global_step] = file.read()


def test_every_push_is_one_state(make, hub, tokenizer, tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    # The first upload is still going on when its checkpoint has been deleted and the next one is there.
    hub.fail(status=None, delay=0.7, path="/commit/", times=1)
    keep = KeepWeights()
    trainer = make(
        init={"callbacks": [keep]},
        evaluation=6,
        hub_strategy="checkpoint",
        hub_always_push=True,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=6,
        save_total_limit=1,
        report_to="tensorboard",
        hub_private_repo=True,
    )
    trainer.train()
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith("_push-")]
    # what is published last is another state than that of the last checkpoint
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(0.5)
    info = trainer.push_to_hub(license="mit")
    commits = hub.commits("alice/m")[::-1]
    assert [commit["message"] for commit in commits] == [
        *(f"Training in progress, step {step}" for step in (2, 4, 6)),
        "End of training",
    ]
    assert info.oid == commits[-1]["id"] and hub.repo("alice/m").private
    assert os.listdir(tmp_path / "run").count("checkpoint-2") == 0

    for step, commit in zip((2, 4, 6), commits, strict=False):
        files = hub.files("alice/m", commit["id"])
        for folder in ("", "last-checkpoint/"):
            assert files[f"{folder}model.safetensors"] == keep.weights[step]
            assert {f"{folder}config.json", f"{folder}sid_manifest.json", f"{folder}training_args.json"} < set(files)
        assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == step
        listed = json.loads(files["last-checkpoint/sid_checkpoint.json"])["files"]
        there = {name.removeprefix("last-checkpoint/"): len(content) for name, content in files.items() if "/" in name}
        assert listed == {name: size for name, size in there.items() if name != "sid_checkpoint.json"}
        assert f"6 rows, after {step} optimizer steps." in files["README.md"].decode()
        assert "without the optimizer's state" in files["README.md"].decode()
        assert not [name for name in files if name.endswith((".pt", ".pth", ".bin"))]
        assert files["sid_layers.png"].startswith(b"\x89PNG")
    assert keep.weights[2] != keep.weights[4] != keep.weights[6]

    # a revision in the middle loads as well as the last one
    for revision, weights in ((commits[0]["id"], keep.weights[2]), ("main", None)):
        model = AutoModelForCausalLM.from_pretrained("alice/m", revision=revision)
        loaded = SIDTokenizer.from_pretrained("alice/m", revision=revision)
        assert len(rankings(model, loaded)[0]) == 5
        if weights is None:
            assert rankings(model, loaded) == rankings(trainer.model, tokenizer)
    folder = snapshot_download("alice/m", revision=commits[0]["id"])
    check_checkpoint(f"{folder}/last-checkpoint", to_resume=False)
    with pytest.raises(ValueError, match="pushed without hub_push_optimizer=True"):
        make(push_to_hub=False).train(resume_from_checkpoint=f"{folder}/last-checkpoint")

    # published elsewhere, the card names no checkpoints that are only here
    for name, stays in (("alice/m", True), ("org/shop", False)):
        card = finish_card(SimpleNamespace(path=trainer.args.output_dir), tmp_path / "run", name)
        assert (f'"{name}"' in card.text, "## Checkpoints" in card.text, "## Versions" in card.text) == (
            True,
            stays,
            True,
        )

    # neither tokens nor paths of this machine
    token, path = hub.token.encode(), str(tmp_path).encode()
    assert not [content[:80] for content in content_of(hub) if token in content or path in content]
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any("tfevents" in file.name for file in written) and len(written) > 50
    assert not [file for file in written if token in file.read_bytes()]
    assert hub.token not in caplog.text + "".join(capfd.readouterr()) + repr(trainer.args) + str(trainer.args)


def test_checkpoints_with_the_optimizer_resume_from_the_hub(make, hub, tmp_path):
    trainer = make(hub_strategy="all_checkpoints", hub_push_optimizer=True, hub_always_push=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    card = hub.files("alice/m")["README.md"].decode()
    assert "These states are pickles, which run code when they are loaded" in card
    folder = snapshot_download("alice/m", allow_patterns="checkpoint-2/*")
    resumed = make(output_dir=tmp_path / "other", push_to_hub=False)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses and len(losses) == 4
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    # Nothing else goes along: a push of the model itself has no pickles, whatever the option says.
    trainer.push_to_hub()
    assert not [name for name in hub.files("alice/m") if "/" not in name and name.endswith((".pt", ".pth", ".bin"))]


def test_a_push_that_fails_stops_no_training(make, hub, tmp_path, caplog):
    trainer = make(hub_strategy="every_save", hub_always_push=True)
    hub.fail(status=403, path="/preupload/", times=None, message="You are over your quota")
    trainer.train()
    assert trainer.state.global_step == 4 and hub.commits("alice/m") == []
    warned = [record.getMessage() for record in caplog.records if "A push to alice/m failed" in record.getMessage()]
    assert warned and all("over your quota" in text and "\n" not in text for text in warned)
    with pytest.raises(PermissionError, match="over your quota"):
        trainer.push_to_hub()
    future = trainer.push_to_hub(blocking=False)
    with pytest.raises(PermissionError, match="over your quota"):
        future.result()
    hub.stop_failing()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files("alice/m")
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith("_push-")]


def test_a_checkpoint_that_comes_while_a_push_is_under_way(make, hub, caplog):
    trainer = make(save_steps=1, max_steps=2)
    hub.fail(status=None, delay=1.5, path="/preupload/", times=1)
    trainer.train()
    assert [commit["message"] for commit in hub.commits("alice/m")] == ["Training in progress, step 1"]
    assert "Not pushed (Training in progress, step 2): the push before is still under way" in caplog.text


def test_tokens_that_are_not_accepted(make, hub):
    wrong = "hf_" + "wrong" * 4
    with pytest.raises(PermissionError, match="rejected the token for alice/m") as caught:
        make(hub_token=wrong)
    assert "\n" not in str(caught.value) and wrong not in "".join(traceback.format_exception(caught.value))
    trainer = make()
    with pytest.raises(PermissionError, match="It needs the role `write`") as caught:
        trainer.push_to_hub(token=hub.read_token)
    assert hub.read_token not in str(caught.value) and "\n" not in str(caught.value)


def test_codebook_branch_and_tag(make, hub, tokenizer):
    trainer = make(push_to_hub=False, hub_codebook_id="codebook", max_steps=1, save_strategy="no")
    trainer.train()
    future = trainer.push_to_hub("Candidate", blocking=False, revision="candidate", private=True, tag="v1", tags="new")
    info = future.result()
    trainer._finish_current_push()
    assert hub.repo("alice/m").private and hub.repo("alice/codebook").private
    refs = hub.refs("alice/m")
    assert refs["branches"]["candidate"] == refs["tags"]["v1"] == info.oid and hub.files("alice/m") == {}
    (commit,) = hub.commits("alice/codebook")
    card = ModelCard(hub.files("alice/m", "v1")["README.md"].decode())
    assert (
        card.data["sid_codebook"] == {"repo": "alice/codebook", "revision": commit["id"]} and "new" in card.data.tags
    )
    assert f"[alice/codebook](https://huggingface.co/alice/codebook), at commit `{commit['id']}`" in card.text
    quantizer = ResidualQuantizer.from_pretrained("alice/codebook", revision=commit["id"])
    for one, other in zip(quantizer.parameters(), tokenizer.quantizer.parameters(), strict=True):
        assert torch.equal(one, other)
    # Another push of the same state is none.
    assert trainer.push_to_hub(revision="candidate", private=True, tags="new").oid == info.oid
    assert len(hub.commits("alice/codebook")) == 1
    # A licence that is said late goes to both.
    trainer.push_to_hub(license="mit")
    for name in ("alice/m", "alice/codebook"):
        assert ModelCard(hub.files(name)["README.md"].decode()).data.license == "mit"


def test_an_adapter_takes_the_place_of_a_model(make, hub, tokenizer, make_tiny_model, tmp_path):
    make(max_steps=1, save_strategy="no").push_to_hub(license="mit", language="de")
    whole = hub.commits("alice/m")[0]["id"]
    base = tmp_path / "base"
    make_tiny_model(tokenizer.base_size).save_pretrained(base)
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    model, folder = AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    trainer = make(model, output_dir=folder, init={"peft_config": lora}, save_steps=4)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("alice/m")
    assert {"adapter_config.json", "adapter_model.safetensors", "sid_adapter.json", "tokenizer.json"} < set(files)
    assert not {"config.json", "model.safetensors", "generation_config.json"} & set(files)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert not [content[:80] for content in content_of(hub) if str(tmp_path).encode() in content]
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft" and card.data.base_model is None
    # what was said there once, of which this folder knows nothing
    assert (card.data.license, card.data.language) == ("mit", "de")
    assert 'load_lora("alice/m", base_model="…")' in card.text

    found = load_lora("alice/m", base_model=str(base), token=hub.token)
    assert rankings(found, SIDTokenizer.from_pretrained("alice/m")) == rankings(trainer.model, tokenizer)
    with pytest.raises(ValueError, match="names no base model"):
        load_lora("alice/m")
    with pytest.raises(ValueError):
        load_lora("alice/m", base_model=str(base), revision=whole)
    # What was there before is there still, and whole.
    AutoModelForCausalLM.from_pretrained("alice/m", revision=whole)


def test_a_card_that_somebody_made_their_own(make, hub, hub_client, monkeypatch):
    trainer = make(evaluation=4, save_strategy="no")
    trainer.push_to_hub()
    text = "---\nlicense: mit\ntags: [mine]\n---\n\nMy words.\n"
    hub_client.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="alice/m")
    trainer.evaluate()
    # they change it once more while the push uploads
    text, uploads = text.replace("My", "My last"), []

    def edit(**kwargs):
        if not uploads:
            uploads.append(kwargs)
            hub_client.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="alice/m")
        return create_commit(**kwargs)

    create_commit = HfApi.create_commit
    monkeypatch.setattr(HfApi, "create_commit", lambda self, *args, **kwargs: edit(self=self, **kwargs))
    trainer.push_to_hub(language="en")
    assert uploads
    card = ModelCard(hub.files("alice/m")["README.md"].decode())
    assert card.text.strip() == "My last words." and card.data.license == "mit" and card.data.language == "en"
    assert card.data.tags[0] == "mine" and "rqsid" in card.data.tags
    assert card.data.eval_results[0].metric_type == "item_recall@1"


def test_what_cannot_be_pushed(make, hub, tokenizer, make_tiny_model, base_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="hub_codebook_id and hub_model_id are both 'alice/m'"):
        make(hub_codebook_id="alice/m")
    with pytest.raises(ValueError, match="hub_codebook_id='m' is alice/m, the model's repository"):
        make(output_dir=tmp_path / "m", hub_model_id=None, hub_codebook_id="m")
    with pytest.raises(PermissionError, match="stranger/codes"):
        make(hub_codebook_id="stranger/codes")
    bare = make_tokenizer(base_tokenizer, with_quantizer=False)
    with pytest.raises(ValueError, match="the tokenizer has no quantizer"):
        make_trainer(make_tiny_model(bare.base_size), bare, tmp_path / "x", hub_codebook_id="org/codebook")
    with pytest.raises(ValueError, match="eval_bootstrap=-1"):
        make(eval_bootstrap=-1)
    trainer = make()
    trainer.save_whole_model = lambda folder: os.makedirs(folder)
    with pytest.raises(ValueError, match="There are no weights that could be loaded"):
        trainer.push_to_hub()
    assert os.listdir(tmp_path / "run") == []


ENDS_WHILE_PUSHING = """
import sys
from transformers import AutoModelForCausalLM
import rqsid.trainer.model_card
from rqsid import SIDTokenizer, SIDTrainer, SIDTrainingArguments

rqsid.trainer.model_card.save_figure = lambda *_: False  # matplotlib takes seconds
folder = sys.argv[1]
tokenizer = SIDTokenizer.from_pretrained(folder)
trainer = SIDTrainer(
    AutoModelForCausalLM.from_pretrained(folder),
    SIDTrainingArguments(folder, push_to_hub=True, hub_model_id="alice/m", use_cpu=True, report_to="none"),
    [{"query": "milk", "product": "p1"}],
    processing_class=tokenizer,
)
trainer.push_to_hub("First", blocking=False, tag="one")
trainer.push_to_hub("Second", blocking=False, language="en", tag="two")
"""


@pytest.mark.slow
def test_a_process_ends_when_it_has_pushed(make, hub, tmp_path):
    make(push_to_hub=False).save_whole_model(tmp_path / "saved")
    environment = hub.environment(tmp_path / "home")
    done = run_fresh(ENDS_WHILE_PUSHING, str(tmp_path / "saved"), env=environment, check=True)
    assert [commit["message"] for commit in hub.commits("alice/m")] == ["Second", "First"], done.stderr
    assert set(hub.refs("alice/m")["tags"]) == {"one", "two"} and "push" not in done.stderr
    assert not [name for name in os.listdir(tmp_path / "saved") if name.startswith("_push-")]
