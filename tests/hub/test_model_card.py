"""Model cards say what the run was: metadata that the Hub's client reads, and text without this machine's business."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import LoraConfig
from pushing_training import make_purchases, make_tokenizer, make_trainer
from transformers import TrainerCallback

from rqsid import search
from rqsid.trainer.evaluations import hub_dataset, split_bounds
from rqsid.trainer.hub_pushes import hide_paths

families = pytest.mark.parametrize(
    "base_tokenizer, make_tiny_model",
    [("llama", "llama"), ("qwen", "qwen"), ("llama", "baichuan")],
    indirect=True,
)
one_family = pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer):
    return make_tokenizer(base_tokenizer)


@pytest.fixture
def make(tokenizer, make_tiny_model, tmp_path):
    def make(model=None, tokenizer=tokenizer, **args):
        model = make_tiny_model(tokenizer.base_size) if model is None else model
        args = {"hub_model_id": "org/ranker", "max_steps": 2, "save_strategy": "no"} | args
        return make_trainer(model, tokenizer, tmp_path / "run", **args)

    yield make
    tokenizer.prompt_template.max_length = None


def read_card(tmp_path):
    return ModelCard.load(tmp_path / "run" / "README.md")


def run_code(card, number):
    """Runs a code block of a card, and returns what its last line gives."""
    code = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)[number].rstrip().split("\n")
    names = {}
    exec("\n".join(code[:-1]), names)
    return eval(code[-1], names)


@families
def test_the_card_of_a_run(make, hub_client, tokenizer, tmp_path):
    validation = {"warm": Dataset.from_list(make_purchases(9, 1)), "cold": Dataset.from_list(make_purchases(5, 2))}
    args = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.4}, "warmup_steps": 1}
    args |= {"loss_type": "focal", "loss_gamma": 2.0, "run_name": "carol's run", "hub_token": "hf_secretsecret"}
    trainer = make(evaluation=validation, eval_strategy="epoch", **args)
    trainer.train()
    trainer.predict(make_purchases(7, seed=3))
    trainer.push_to_hub(token=True, language="en", license="apache-2.0", tags=["shop"], finetuned_from="org/base")
    card = read_card(tmp_path)
    card.validate()
    data = card.data
    assert (data.language, data.license, data.base_model) == ("en", "apache-2.0", "org/base")
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"shop", "rqsid", "generative-retrieval"} < set(data.tags) and data.datasets is None

    # metadata, text and log say the same
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "ranker" and [result.dataset_name for result in results[::8]] == ["eval_warm", "eval_cold", "test"]
    assert [result.metric_type for result in results[:8]] == [
        f"{level}_{metric}" for level in ("item", "sid") for metric in ("recall@1", "recall@10", "ndcg@10", "mrr")
    ]
    compared = 0
    for result in results:
        low, high = result.metric_args["low"], result.metric_args["high"]
        assert low <= result.metric_value <= high and result.metric_args["step"] == 2
        assert result.metric_args["bootstrap"] == 1000 and f"{low:.4f} to {high:.4f}" in result.metric_name
        assert f"{result.metric_value:.4f} ({low:.4f} to {high:.4f})" in card.text
        if result.dataset_name != "test":
            assert logged[f"{result.dataset_name}_{result.metric_type}"] == result.metric_value
            compared += 1
    assert compared == 16 and not [name for name in logged if name.endswith(("_low", "_high"))]
    for rows, prefix in ((9, "eval_warm"), (5, "eval_cold"), (7, "test")):
        assert f"### {prefix}\n\n{rows} rows, after 2 optimizer steps." in card.text

    # the rest of the text
    assert "fine-tuned from [org/base](https://huggingface.co/org/base)" in card.text
    assert "ranks the 40 products of its catalog" in card.text and "The 3 most frequent codes of layer b" in card.text
    assert "![Codes of each layer by frequency](sid_layers.png)" in card.text and "Hourglass score" in card.text
    assert "Training on 1 process with no engine" in card.text and "2 of 2 optimizer steps" in card.text
    assert "with 50 beams" in card.text and "Training took" in card.text and "resumed" not in card.text
    table = dict(re.findall(r"^\| (\w+) \| `(.*)` \|$", card.text.split("| argument |")[1].split("\n\n")[0], re.M))
    assert table == {
        **{"learning_rate": "0.005", "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": 0.4}'},
        **{"warmup_steps": "1", "weight_decay": "0.0", "optim": trainer.args.optim.value, "max_grad_norm": "1.0"},
        **{"per_device_train_batch_size": "4", "gradient_accumulation_steps": "1", "max_steps": "2", "seed": "42"},
        **{"max_prompt_length": str(trainer.max_prompt_length), "loss_type": "focal", "loss_gamma": "2.0"},
    }
    assert "- transformers 5." in card.text and "@inproceedings{kuai-etal-2024-breaking" in card.text
    assert str(tmp_path) not in str(card) and "hf_secret" not in str(card) and "carol" not in str(card)

    # what it says of its use is so
    prompts = [{"history": ["p0", "p1"], "query": "…"}]
    expected = [row["product_id"] for row in search(trainer.model.eval(), tokenizer, prompts, top_k=10)[0]]
    assert [row["product_id"] for row in run_code(card, 0)[0]] == expected
    assert [row["product_id"] for row in run_code(card, 1)[0]] == expected


@one_family
def test_a_run_without_evaluation_or_quantizer(make, base_tokenizer, tmp_path):
    bare = make_tokenizer(base_tokenizer, with_quantizer=False)
    trainer = make(tokenizer=bare, evaluation=0, loss_normalize="sid")
    trainer.create_model_card()
    card = read_card(tmp_path)
    assert "The model was not evaluated." in card.text and "This model was not trained here." in card.text
    assert card.data.eval_results is None and card.data.license is None and card.data.base_model is None
    assert 'search it with `normalize="sid"`' in card.text and 'top_k=10, normalize="sid")' in card.text


@one_family
def test_metrics_of_ones_own(make, tmp_path):
    found = {"my|score": 0.5, "of": {"depth": 1}, "name": "text"}
    trainer = make(evaluation=4, init={"compute_metrics": lambda prediction: found})
    trainer.evaluate()
    trainer.create_model_card()
    card = read_card(tmp_path)
    assert "### eval\n\nAfter 0 optimizer steps.\n\n| | |\n|---|---|\n| `loss` |" in card.text
    assert "| `my\\|score` | 0.5000 |" in card.text and card.data.eval_results is None
    assert "Item-level metrics" not in card.text and "depth" not in card.text and "`name`" not in card.text


@one_family
def test_intervals_are_those_of_the_rows(make, tmp_path):
    """Against resamples of our own, of which each row is a hit or none."""
    trainer = make(eval_top_k=60, evaluation=24)
    hits = trainer.predict(trainer.eval_dataset)
    hits = (hits.predictions[0][:, :10] == hits.label_ids[:, None]).any(1)
    trainer.evaluate()
    trainer.create_model_card()
    card = read_card(tmp_path)
    assert "The first 40 of 40 products" in card.text
    (result,) = (
        one for one in card.data.eval_results if (one.metric_type, one.dataset_name) == ("item_recall@10", "eval")
    )
    assert 0 < result.metric_value == hits.mean() < 1
    chosen = np.random.default_rng(1).integers(0, len(hits), (20_000, len(hits)))
    expected = np.percentile(hits[chosen].mean(1), [2.5, 97.5])
    assert np.abs(expected - [result.metric_args["low"], result.metric_args["high"]]).max() <= 1.01 / len(hits)


@one_family
def test_results_of_another_step(make, tmp_path):
    """The best model is loaded in the end, and evaluations of before an interruption are known from the log."""
    trainer = make(
        evaluation=5,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        eval_bootstrap=0,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it is the first
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    trainer.create_model_card()
    card = read_card(tmp_path)
    assert "5 rows, after 1 optimizer steps." in card.text and "the model after 1 of 2 optimizer steps" in card.text
    assert ", the best of those evaluated by `loss`; 2 steps were trained (1.00 epochs)." in card.text
    first = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert card.data.eval_results[0].metric_value == first["eval_item_recall@1"]
    assert card.data.eval_results[0].metric_args == {"step": 1} and "intervals" not in card.text

    trainer.evaluations, trainer.loaded_step = {}, None
    trainer.state.global_step = 7
    trainer.create_model_card()
    card = read_card(tmp_path)
    assert "5 rows, after 2 optimizer steps; the model here is that of step 7." in card.text
    assert card.data.eval_results[0].metric_args == {"step": 2}


class Carbon(TrainerCallback):
    tracker = SimpleNamespace(final_emissions=None)

    def on_train_end(self, args, state, control, **kwargs):
        self.tracker = SimpleNamespace(final_emissions=0.0123)


@one_family
def test_what_is_known_of_the_world_around(make, hub_client, make_tiny_model, tokenizer, tmp_path):
    """A base model's licence, data sets of the Hub, and measured emissions."""
    base = tmp_path / "base"
    model = make_tiny_model(tokenizer.base_size)
    model.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: llama2\n---\n")
    loaded = type(model).from_pretrained(base)
    rows = "\n".join(map(json.dumps, make_purchases(8))).encode()
    where = {"repo_id": "org/purchases", "repo_type": "dataset"}
    hub_client.create_repo(**where)
    commit = hub_client.upload_file(path_or_fileobj=rows, path_in_repo="train.jsonl", **where).oid
    train = load_dataset("org/purchases", split="train")
    place = {"id": "org/purchases", "revision": commit, "config": "default", "split": "train"}
    assert hub_dataset(train) == hub_dataset(train.select([1]).map(dict)) == place
    assert hub_dataset(None) == hub_dataset([]) == hub_dataset(Dataset.from_list([{"a": 1}])) == {}
    parts = {"warm": train.select(range(5)), "cold": train.select(range(5, 8))}
    trainer = make(loaded, evaluation=parts, init={"callbacks": [Carbon()]})
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    card = read_card(tmp_path)
    card.validate()
    assert card.data.license == "llama2" and card.data.base_model is None and card.data.datasets == ["org/purchases"]
    assert card.data.to_dict()["co2_eq_emissions"] == {
        "emissions": 12.3,
        "source": "CodeCarbon",
        "training_type": "fine-tuning",
    }
    assert "12.3 g of CO2" in card.text and "on org/purchases" in card.text and str(tmp_path) not in str(card)
    # parts of one split are told apart, also where the Hub would put them together
    results = card.data.to_dict()["model-index"][0]["results"]
    for result, part, rows in zip(results, parts, (5, 3), strict=True):
        called = f"train, eval_{part}"
        assert (result["dataset"]["split"], result["dataset"]["name"]) == (called, f"org/purchases, eval_{part}")
        assert (result["dataset"]["type"], result["dataset"]["revision"]) == ("org/purchases", commit)
        assert f"### org/purchases, {called}\n\n{rows} rows, after 2 optimizer steps." in card.text
        assert [metric["type"] for metric in result["metrics"]].count("item_mrr") == 1
    trainer.evaluations, trainer.state.log_history = {}, []
    trainer.evaluate(train)
    trainer.create_model_card()
    (result,) = read_card(tmp_path).data.to_dict()["model-index"][0]["results"]
    assert (result["dataset"]["split"], result["dataset"]["name"]) == ("train", "org/purchases")


@one_family
def test_adapters(make, make_tiny_model, tokenizer, tmp_path):
    model = make_tiny_model(tokenizer.base_size)
    model.config._name_or_path = model.name_or_path = "org/base"
    trainer = make(model, init={"peft_config": LoraConfig(r=4, target_modules=["q_proj"])}, evaluation=0)
    trainer.save_model()  # with the card that peft writes
    trainer.create_model_card()
    card = read_card(tmp_path)
    assert (card.data.library_name, card.data.base_model) == ("peft", "org/base")
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert 'model = load_lora("org/ranker")\n' in card.text and "More Information Needed" not in card.text
    assert "pipeline" not in card.text.replace("pipeline_tag", "")
    assert "The adapter: r `4`, lora_alpha `8`, lora_dropout `0.0`, bias `none`; on `q_proj`." in card.text
    assert "- peft " in card.text and "- deepspeed" not in card.text


@one_family
def test_a_card_that_somebody_wrote(make, tmp_path):
    trainer = make(evaluation=4)
    trainer.evaluate()
    (tmp_path / "run" / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# My words\n")
    trainer.create_model_card()
    card = read_card(tmp_path)
    assert card.text.strip() == "# My words" and card.data.license == "mit" and card.data.tags[0] == "mine"
    assert len(card.data.eval_results) == 8
    # One that this trainer wrote is written anew, and keeps what was said in it once.
    (tmp_path / "run" / "README.md").unlink()
    trainer.create_model_card(license="mit", language="de", tags="shop")
    trainer.create_model_card(model_name="Another")
    card = read_card(tmp_path)
    assert "# Another" in card.text and (card.data.license, card.data.language) == ("mit", "de")
    assert "shop" in card.data.tags and len(card.data.tags) == len(set(card.data.tags))


def test_bounds_are_kept_apart():
    metrics = {"mrr": 0.5, "mrr_low": 0.4, "mrr_high": 0.6, "num_rows": 3.0, "price_low": 1.0}
    assert split_bounds(metrics) == ({"mrr": 0.5, "num_rows": 3.0, "price_low": 1.0}, {"mrr": (0.4, 0.6)})


def test_paths_are_hidden_wherever_they_stand(tmp_path):
    (tmp_path / "plan.json").touch()
    arguments = {
        "output_dir": str(tmp_path),
        "optim": "adamw_torch",
        "fsdp_config": {"a": [str(tmp_path / "plan.json"), 1]},
    }
    (tmp_path / "training_args.json").write_text(json.dumps(arguments))
    hide_paths(tmp_path)
    hidden = json.loads((tmp_path / "training_args.json").read_text())
    assert hidden == {"output_dir": tmp_path.name, "optim": "adamw_torch", "fsdp_config": {"a": ["plan.json", 1]}}
