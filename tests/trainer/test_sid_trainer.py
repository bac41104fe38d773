"""SIDTrainer against plain full-sequence forwards, against search(), and against itself after a restart."""

import copy
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from fresh_process import run_fresh
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from rqsid import SIDTokenizer, SIDTrainer, SIDTrainingArguments, search
from rqsid.trainer import tokenize_examples

FAMILIES = "base_tokenizer, make_tiny_model"
both_families = pytest.mark.parametrize(FAMILIES, [("llama", "llama"), ("qwen", "qwen")], indirect=True)
all_families = pytest.mark.parametrize(
    FAMILIES, [("llama", "llama"), ("qwen", "qwen"), ("llama", "baichuan")], indirect=True
)
qwen_and_baichuan = pytest.mark.parametrize(FAMILIES, [("qwen", "qwen"), ("llama", "baichuan")], indirect=True)
llama = pytest.mark.parametrize(FAMILIES, [("llama", "llama")], indirect=True)
qwen = pytest.mark.parametrize(FAMILIES, [("qwen", "qwen")], indirect=True)


@torch.no_grad()
def reference_loss(model, tokenizer, rows):
    """Mean cross-entropy of the answers' tokens: one plain forward a row, no padding, mask or position ids."""
    total, num_tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer.encode_prompts([row])["input_ids"][0]
        answer = tokenizer.encode_products(row["product"]) + [tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].double()
        log_probs = logits.log_softmax(-1)
        total -= sum(log_probs[len(prompt) + at - 1, token].item() for at, token in enumerate(answer))
        num_tokens += len(answer)
    return total / num_tokens


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# Loss


@all_families
def test_losses_equal_plain_full_sequence_cross_entropy(model, tokenizer, make_purchases, make_trainer):
    rows = make_purchases(8)
    assert len({len(ids) for ids in tokenizer.encode_prompts(rows)["input_ids"]}) > 2
    assert len({len(ids) for ids in tokenizer.encode_products([row["product"] for row in rows])}) > 1
    expected = reference_loss(model, tokenizer, rows)
    # Evaluated in batches that hold different numbers of rows and tokens.
    trainer = make_trainer(model, rows, rows, per_device_train_batch_size=8, per_device_eval_batch_size=3, max_steps=1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)

    # Row by row as well, where errors of opposite sign cannot cancel.
    for row in rows:
        batch = trainer.data_collator([tokenize_single(row, tokenizer)])
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model.eval(), batch).item()
        assert loss == pytest.approx(reference_loss(trainer.model, tokenizer, [row]), rel=1e-5)


def tokenize_single(row, tokenizer):
    columns = tokenize_examples({name: [value] for name, value in row.items()}, tokenizer)
    return {name: values[0] for name, values in columns.items()}


@qwen
def test_label_smoothing_smooths_the_answer_only(model, tokenizer, make_purchases, make_trainer):
    rows = make_purchases(4)
    total, num_tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer.encode_prompts([row])["input_ids"][0]
        answer = tokenizer.encode_products(row["product"]) + [tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        for at, token in enumerate(answer):
            log_prob = log_probs[len(prompt) + at - 1]
            total -= 0.8 * log_prob[token].item() + 0.2 * log_prob.mean().item()
            num_tokens += 1
    trainer = make_trainer(model, evaluation=rows, label_smoothing_factor=0.2)
    trainer.args.prediction_loss_only = True
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / num_tokens, rel=1e-5)


@both_families
def test_gradient_accumulation_is_exact(model, make_purchases, make_trainer):
    rows = make_purchases(8)
    runs = []
    for batch_size, steps in ((8, 1), (1, 8), (2, 4)):
        trainer = make_trainer(
            copy.deepcopy(model),
            rows,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",  # whose step is the gradient itself, where Adam's hardly depends on its size
            learning_rate=0.5,
            max_grad_norm=0.0,
        )
        trainer.train()
        runs.append((logged(trainer, "loss")[0], trainer.model.state_dict()))
    for loss, weights in runs[1:]:
        assert loss == pytest.approx(runs[0][0], rel=1e-5)
        for name, weight in runs[0][1].items():
            assert not torch.equal(weight, model.state_dict()[name]), f"{name} has not moved"
            torch.testing.assert_close(
                weights[name], weight, rtol=1e-4, atol=1e-6, msg=lambda text, at=name: at + text
            )


@both_families
def test_logits_are_computed_for_the_answer_only(model, tokenizer, make_purchases, make_trainer):
    rows = make_purchases(6)
    widths = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    trainer = make_trainer(model, rows, rows, per_device_train_batch_size=6, max_steps=1)
    # What is predicted: the longest answer and its end token.
    answer = max(len(ids) for ids in tokenizer.encode_products([row["product"] for row in rows])) + 1
    assert answer < min(len(ids) for ids in tokenizer.encode_prompts(rows)["input_ids"])
    trainer.train()
    assert widths == [answer]
    widths.clear()
    trainer.args.prediction_loss_only = True
    trainer.evaluate()
    assert widths == [answer]


# Training


@all_families
def test_training_moves_every_parameter_and_learns(model, tokenizer, make_purchases, make_trainer):
    train, test = make_purchases(200), make_purchases(20, seed=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(
        model, train, test, per_device_train_batch_size=16, max_steps=100, learning_rate=5e-3, logging_steps=10
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        assert not torch.allclose(parameter, before[name]), f"{name} has not moved"
    answers = tokenizer.encode_products(sorted({row["product"] for row in train}))
    # Input rows learn where a token is read, so all but the last of a SID; output rows where it is predicted.
    read = sorted({token for ids in answers for token in ids[:-1]})
    predicted = sorted({token for ids in answers for token in ids})
    for name, tokens in (("model.embed_tokens.weight", read), ("lm_head.weight", predicted)):
        moved = (model.get_parameter(name) - before[name])[tokens].abs().amax(1)
        assert (moved > 1e-4).all(), f"SID rows of {name} have not moved"

    losses = logged(trainer, "loss")
    assert losses[0] > 2 and losses[-1] < 0.3
    metrics = trainer.evaluate()
    assert metrics["eval_sid_recall@1"] == 1.0
    # The one product among them that shares its SID, p1, is the more popular of the two.
    assert metrics["eval_item_recall@1"] == 1.0
    assert metrics["eval_invalid_rate"] == 0.0


@qwen
def test_training_reads_a_stream(model, tokenizer, make_purchases, make_trainer):
    rows = make_purchases(16)
    expected = reference_loss(model, tokenizer, rows[:8])
    # One whose columns are known and one whose columns are not.
    streams = [Dataset.from_list(rows).to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(rows))]
    for stream in streams:
        trainer = make_trainer(copy.deepcopy(model), stream, stream, per_device_train_batch_size=8, max_steps=2)
        assert isinstance(trainer.train_dataset, IterableDataset)
        trainer.train()
        # A stream is not shuffled: the first step sees the first eight rows.
        assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)
        assert trainer.evaluate()["eval_num_rows"] == 16


@qwen
def test_tokenized_rows_lists_and_dataset_processes_give_the_same_rows(
    model, tokenizer, make_purchases, make_trainer, tmp_path
):
    rows = make_purchases(6)
    expected = make_trainer(model, rows).train_dataset.to_list()
    tokenized = Dataset.from_list(expected)
    assert make_trainer(model, tokenized).train_dataset is tokenized
    assert make_trainer(model, rows, dataset_num_proc=2).train_dataset.to_list() == expected
    args = SIDTrainingArguments(str(tmp_path / "run"), use_cpu=True)
    for given in (rows, expected):
        trainer = SIDTrainer(model, args, train_dataset=given, processing_class=tokenizer)
        assert trainer.train_dataset.to_list() == expected


# Evaluation


def metrics_by_hand(results, rows, tokenizer, ks, ndcg_k):
    """Item-level and SID-level metrics from what search() returned."""
    metrics = {}
    for level in ("item", "sid"):
        ranks = []
        for row, found in zip(rows, results, strict=True):
            if level == "item":
                ranking, target = [entry["product_id"] for entry in found], row["product"]
            else:
                ranking = list(dict.fromkeys(entry["sid"] for entry in found))
                target = "".join(tokenizer.convert_ids_to_tokens(tokenizer.encode_products(row["product"])))
            ranks.append(ranking.index(target) + 1 if target in ranking else math.inf)
        metrics |= {f"eval_{level}_recall@{k}": np.mean([rank <= k for rank in ranks]) for k in ks}
        gains = [1 / math.log2(1 + rank) if rank <= ndcg_k else 0 for rank in ranks]
        metrics[f"eval_{level}_ndcg@{ndcg_k}"] = np.mean(gains)
        metrics[f"eval_{level}_mrr"] = np.mean([1 / rank for rank in ranks])
    return metrics


@all_families
@pytest.mark.parametrize("normalize", ["vocab", "sid"])
def test_metrics_equal_those_of_search(model, tokenizer, make_purchases, make_trainer, normalize):
    # Products of all kinds as targets, so that an untrained model ranks them at all places. The number of rows is no
    # multiple of the batch size. As many SIDs as there are, so that both lists hold the same ranks.
    rows = [row | {"product": f"p{3 * at % 40}"} for at, row in enumerate(make_purchases(13))]
    options = {"eval_top_k": 40, "eval_num_beams": 30, "eval_normalize": normalize}
    trainer = make_trainer(model, evaluation=rows, per_device_eval_batch_size=4, **options)
    metrics = trainer.evaluate()
    results = search(model, tokenizer, rows, top_k=40, num_beams=30, normalize=normalize)
    expected = metrics_by_hand(results, rows, tokenizer, ks=(1, 10), ndcg_k=10)
    assert 0 < expected["eval_item_recall@10"] < 1 and 0 < expected["eval_item_mrr"] < expected["eval_sid_mrr"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["eval_num_rows"] == 13 and metrics["eval_invalid_rate"] == 0
    # A cutoff beyond the list would be understated, so there is none.
    assert "eval_item_recall@50" not in metrics

    predictions = trainer.predict(Dataset.from_list(rows))
    by_group = trainer.compute_retrieval_metrics(predictions, groups=["head"] * 5 + ["tail"] * 8, ks=[3])
    expected = metrics_by_hand(results[5:], rows[5:], tokenizer, ks=(3,), ndcg_k=10)
    assert by_group["item_recall@3/tail"] == pytest.approx(expected["eval_item_recall@3"])
    assert by_group["item_mrr/tail"] == pytest.approx(expected["eval_item_mrr"])


@both_families
def test_predictions_are_the_rankings_padded_to_one_shape(model, tokenizer, make_purchases, make_trainer):
    rows = make_purchases(5)
    catalog = tokenizer.catalog
    trainer = make_trainer(model, per_device_eval_batch_size=3, eval_top_k=60)
    predictions, labels, metrics = trainer.predict(Dataset.from_list(rows))
    products, sids = predictions
    assert products.shape == sids.shape == (5, 60) and labels.shape == (5,)
    assert catalog.product_ids(labels) == [row["product"] for row in rows]
    num_products, num_sids = len(catalog), catalog.num_sids
    assert num_sids < num_products < 60
    assert (products[:, num_products:] == -1).all() and (sids[:, num_sids:] == -1).all()
    assert (np.sort(products[:, :num_products]) == np.arange(num_products)).all()
    assert (np.sort(sids[:, :num_sids]) == np.arange(num_sids)).all()
    for row, found in enumerate(search(model, tokenizer, rows, top_k=60)):
        assert catalog.product_ids(products[row, :num_products]) == [entry["product_id"] for entry in found]
        ranking = list(dict.fromkeys(entry["sid"] for entry in found))
        assert tokenizer.sid_strings(sids[row, :num_sids]) == ranking
    assert metrics["test_item_recall@50"] == 1.0


@qwen
def test_a_user_may_bring_metrics_of_their_own(model, make_purchases, make_trainer):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"first": float((prediction.predictions[0][:, 0] == prediction.label_ids).mean())}

    trainer = make_trainer(model, evaluation=make_purchases(5), init={"compute_metrics": compute_metrics})
    metrics = trainer.evaluate()
    assert seen[0].predictions[0].shape == (5, 10) and seen[0].label_ids.shape == (5,)
    assert "eval_first" in metrics and "eval_item_mrr" not in metrics


@qwen
def test_fewer_rows_than_a_batch_holds(model, make_purchases, make_trainer):
    metrics = make_trainer(model, evaluation=make_purchases(2), per_device_eval_batch_size=8).evaluate()
    assert metrics["eval_num_rows"] == 2


@qwen
def test_several_evaluation_datasets(model, make_purchases, make_trainer):
    new, old = make_purchases(3, seed=1), make_purchases(4, seed=2)
    evaluation = {"new": Dataset.from_list(new), "old": Dataset.from_list(old)}
    trainer = make_trainer(model, evaluation=evaluation)
    metrics = trainer.evaluate()
    assert metrics["eval_new_num_rows"] == 3 and metrics["eval_old_num_rows"] == 4
    alone = make_trainer(model, evaluation=new).evaluate()
    for name in ("loss", "item_mrr", "sid_recall@10"):
        assert metrics[f"eval_new_{name}"] == pytest.approx(alone[f"eval_{name}"])
    # Given later, as a dict, or by name.
    later = make_trainer(model, evaluation=new).evaluate(evaluation)
    assert later["eval_old_item_mrr"] == pytest.approx(metrics["eval_old_item_mrr"])
    assert trainer.evaluate("old")["eval_item_mrr"] == pytest.approx(metrics["eval_old_item_mrr"])


@qwen
def test_prediction_loss_only_does_not_search(model, make_purchases, make_trainer, monkeypatch):
    def no_search(*args, **kwargs):
        raise AssertionError("beam_search was called")

    monkeypatch.setattr(sys.modules[SIDTrainer.__module__], "beam_search", no_search)
    trainer = make_trainer(model, evaluation=make_purchases(5), prediction_loss_only=True)
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert not any("recall" in name for name in metrics)
    trainer.args.prediction_loss_only = False
    with pytest.raises(AssertionError, match="beam_search was called"):
        trainer.evaluate()


# Saving


FRESH_PROCESS = """
import json, sys
from transformers import AutoModelForCausalLM
from rqsid import SIDTokenizer, initialize_sid_rows, search
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = SIDTokenizer.from_pretrained(sys.argv[1])
remade = initialize_sid_rows(model, tokenizer)
print(json.dumps({"remade": remade, "results": search(model, tokenizer, json.loads(sys.argv[2]), top_k=10)}))
"""


@pytest.mark.slow
@qwen_and_baichuan  # whose folders transformers would open with a tokenizer class of its own, or with code of theirs
def test_a_saved_model_gives_the_same_products_in_a_fresh_process(
    model, tokenizer, make_purchases, make_trainer, tmp_path
):
    train, test = make_purchases(32), make_purchases(4, seed=1)
    trainer = make_trainer(model, train, max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = search(model, tokenizer, test, top_k=10)
    # In another folder, so that nothing is imported from the current one.
    done = run_fresh(FRESH_PROCESS, tmp_path / "saved", json.dumps(test), cwd=tmp_path, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["remade"] is False
    for found, entries in zip(answer["results"], expected, strict=True):
        assert [(entry["product_id"], entry["sid"]) for entry in found] == [
            (entry["product_id"], entry["sid"]) for entry in entries
        ]
        assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in entries], abs=1e-5)


@all_families
def test_resuming_from_a_checkpoint_repeats_an_uninterrupted_run(
    model, tokenizer, make_tiny_model, make_purchases, make_trainer, tmp_path
):
    rows = make_purchases(24)
    options = {"per_device_train_batch_size": 4, "max_steps": 10, "learning_rate": 1e-3}
    whole = make_trainer(model, rows, **options, save_strategy="steps", save_steps=4)
    whole.train()
    # Checkpoint 4 lies in the middle of the first epoch; the fresh model has other weights and rows.
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert (checkpoint / "sid_manifest.json").is_file()
    fresh = make_tiny_model(tokenizer.base_size, seed=5)
    resumed = make_trainer(fresh, rows, **options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(logged(whole, "loss")) == 10
    assert logged(resumed, "loss")[-6:] == pytest.approx(logged(whole, "loss")[-6:], rel=1e-6)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    assert len(SIDTokenizer.from_pretrained(checkpoint)) == len(tokenizer)
    # Rows of a checkpoint are trained ones: another trainer on it leaves them alone.
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = loaded.get_input_embeddings().weight.detach().clone()
    make_trainer(loaded, rows, init_sid_rows="noise")
    assert torch.equal(loaded.get_input_embeddings().weight, before)


class ForgetEverything(TrainerCallback):
    """Wipes the output head at one step, so that the best checkpoint is not the last."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.lm_head.weight.zero_()


@qwen_and_baichuan
def test_the_best_checkpoint_by_item_recall_is_loaded_at_the_end(model, make_purchases, make_trainer):
    trainer = make_trainer(
        model,
        make_purchases(200),
        make_purchases(16, seed=1),
        init={"callbacks": [ForgetEverything(step=40)]},
        per_device_train_batch_size=16,
        max_steps=40,
        learning_rate=5e-3,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="steps",
        save_steps=20,
        load_best_model_at_end=True,
        metric_for_best_model="item_recall@10",
    )
    trainer.train()
    recalls = logged(trainer, "eval_item_recall@10")
    assert len(recalls) == 2 and recalls[0] > recalls[1]
    assert trainer.state.best_metric == recalls[0]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-20")
    assert trainer.evaluate()["eval_item_recall@10"] == recalls[0]


@llama
def test_training_in_half_precision_is_warned_of(model, make_purchases, make_trainer, caplog):
    rows = make_purchases(2)
    with caplog.at_level(logging.WARNING):
        make_trainer(copy.deepcopy(model), rows)
        assert "are trained as they are" not in caplog.text
        make_trainer(model.to(torch.bfloat16), rows)
    assert "Parameters of torch.bfloat16 are trained as they are" in caplog.text and 'dtype="float32"' in caplog.text


# Lengths and bad input


@qwen
def test_truncated_histories_are_counted(model, tokenizer, make_purchases, make_trainer, caplog):
    rows = [row | {"history": ["p1", "p2", "p3", "p4"][:kept]} for kept, row in enumerate(make_purchases(5))]
    lengths = [len(ids) for ids in tokenizer.encode_prompts(rows)["input_ids"]]
    with caplog.at_level(logging.WARNING):
        make_trainer(model, rows, max_prompt_length=max(lengths))
    assert "exceeded" not in caplog.text
    limit = max(lengths[:3])
    counts = tokenizer.encode_prompts(rows, max_length=limit)["num_truncated"]
    num_rows, num_products = sum(count > 0 for count in counts), sum(counts)
    assert 0 < num_rows < 5 and num_products >= num_rows
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(model, rows, max_prompt_length=limit)
    assert f"{num_rows} of 5 train prompts exceeded {limit} tokens: the {num_products} oldest products" in caplog.text
    assert max(map(len, trainer.train_dataset["input_ids"])) <= limit


@qwen
def test_prompts_and_answers_fill_the_context_and_no_more(tokenizer, make_tiny_model, make_purchases, make_trainer):
    rows = [row | {"history": [f"p{at}" for at in range(40)]} for row in make_purchases(4)]
    answer = tokenizer.max_sid_length + 1
    context = 64

    def short_model():
        return make_tiny_model(tokenizer.base_size, max_position_embeddings=context)

    with pytest.raises(ValueError, match=f"Use at most max_prompt_length={context - answer}"):
        make_trainer(short_model(), rows, max_prompt_length=context - answer + 1)
    for limit in (None, context - answer):
        trainer = make_trainer(short_model(), rows, rows, max_prompt_length=limit, max_steps=1)
        assert trainer.max_prompt_length == context - answer
        longest = max(map(len, trainer.train_dataset["input_ids"]))
        assert context - 2 * answer < longest <= context - answer
        trainer.train()
        assert trainer.evaluate()["eval_num_rows"] == 4
    with pytest.raises(ValueError, match="Prompt 0 takes .* tokens without its history"):
        make_trainer(short_model(), rows, max_prompt_length=5)


@qwen
def test_wrong_arguments_are_refused_by_name(model, tokenizer, base_tokenizer, make_purchases, make_trainer, tmp_path):
    args = SIDTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="processing_class is Qwen2Tokenizer.*SIDTokenizer.from_base"):
        SIDTrainer(model, args, processing_class=base_tokenizer)
    with pytest.raises(TypeError, match="processing_class is NoneType"):
        SIDTrainer(model, args)
    with pytest.raises(TypeError, match="args is TrainingArguments.*SIDTrainingArguments"):
        SIDTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True), processing_class=tokenizer)
    with pytest.raises(TypeError, match="model_init"):
        SIDTrainer(None, args, processing_class=tokenizer, model_init=lambda: model)
    with pytest.raises(ValueError, match='column "product"'):
        make_trainer(model, [{"query": "milk"}])
    with pytest.raises(ValueError, match="not in the catalog.*p999"):
        make_trainer(model, evaluation=[{"query": "milk", "product": "p999"}])
    with pytest.raises(ValueError, match="train dataset is empty"):
        make_trainer(model, Dataset.from_list(make_purchases(1)).select([]))
    with pytest.raises(TypeError, match="train dataset is a TensorDataset"):
        make_trainer(model, torch.utils.data.TensorDataset(torch.zeros(2)))
    trainer = make_trainer(model)
    with pytest.raises(ValueError, match="product_rows"):
        trainer.evaluate(Dataset.from_list([{"input_ids": [1, 2], "label_ids": [3]}]))
    with pytest.raises(ValueError, match='column "product"'):
        trainer.predict(Dataset.from_list([{"query": "milk"}]))


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("qwen", "qwen")], indirect=True)
def test_a_misspelt_column_is_warned_about(model, make_trainer, make_purchases, caplog):
    rows = [{"qurey" if key == "query" else key: value for key, value in row.items()} for row in make_purchases(4)]
    with caplog.at_level("WARNING"):
        make_trainer(model, train=rows)
    assert "no column ['query']" in caplog.text and "['qurey'] are not used" in caplog.text


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True)
def test_evaluation_in_small_pieces_changes_nothing(model, make_trainer, make_purchases, monkeypatch):
    trainer = make_trainer(model, evaluation=make_purchases(10))
    together = trainer.predict(trainer.eval_dataset)
    monkeypatch.setattr(sys.modules[SIDTrainer.__module__], "MAX_MEMORY", 1)
    apart = trainer.predict(trainer.eval_dataset)
    for one, other in zip(together.predictions, apart.predictions, strict=True):
        np.testing.assert_array_equal(one, other)


@llama
def test_serving_cuts_histories_where_training_did(model, tokenizer, make_purchases, make_trainer):
    rows = [row | {"history": [f"p{at}" for at in range(20)]} for row in make_purchases(3)]
    whole = tokenizer.encode_prompts(rows)["input_ids"]
    limit = max(map(len, whole)) - 20
    trainer = make_trainer(model, rows, max_prompt_length=limit)
    trained = trainer.train_dataset["input_ids"][:]
    assert max(map(len, trained)) <= limit
    assert tokenizer.encode_prompts(rows)["input_ids"] == trained
    # search builds the prompts of examples itself: the same as those given as ids.
    assert search(trainer.model, tokenizer, rows, top_k=5) == search(trainer.model, tokenizer, trained, top_k=5)


@llama
def test_tokenized_prompts_beyond_the_context_are_refused(model, tokenizer, make_purchases, make_trainer):
    rows = Dataset.from_list(make_purchases(3)).to_dict()
    tokenized = Dataset.from_dict(tokenize_examples(rows, tokenizer))
    longest = max(map(len, tokenized["input_ids"]))
    with pytest.raises(ValueError, match=f"prompt of {longest} tokens, more than {longest - 1}"):
        make_trainer(model, tokenized, max_prompt_length=longest - 1)
