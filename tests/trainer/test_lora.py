"""LoRA: what is trained and what stays, adapters saved, resumed, merged and loaded, and what is refused."""

import itertools
import json
import logging
import os
import sys

import pytest
import torch
from datasets import Dataset
from fresh_process import run_fresh
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from rqsid import SIDTrainer, SIDTrainingArguments, initialize_sid_rows, search
from rqsid.modeling.norm_head import NormHead
from rqsid.trainer.lora import add_lora, embedding_names, load_lora, save_lora

FAMILIES = "base_tokenizer, make_tiny_model"
LLAMA, QWEN, BAICHUAN = ("llama", "llama"), ("qwen", "qwen"), ("llama", "baichuan")
all_families = pytest.mark.parametrize(FAMILIES, [LLAMA, QWEN, BAICHUAN], indirect=True)
untied_and_tied = pytest.mark.parametrize(FAMILIES, [LLAMA, QWEN], indirect=True)
llama = pytest.mark.parametrize(FAMILIES, [LLAMA], indirect=True)
qwen = pytest.mark.parametrize(FAMILIES, [QWEN], indirect=True)

LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.0)


@pytest.fixture
def base(tmp_path, tokenizer, make_tiny_model):
    """The folder of a model of the base vocabulary: Qwen2 with a tied head and five spare rows, the others untied without."""
    is_qwen = "qwen" in make_tiny_model.__name__
    options = {"tie_word_embeddings": True} if is_qwen else {}
    make_tiny_model(tokenizer.base_size + 5 * is_qwen, **options).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def plain(base, tokenizer):
    """The model as the base, with SID rows."""
    model = AutoModelForCausalLM.from_pretrained(base)
    initialize_sid_rows(model, tokenizer, seed=42)  # as the trainer's seed is
    return model


@pytest.fixture
def train(tokenizer, make_purchases, tmp_path):
    """`train(model, **args)`: the trainer, after it has trained."""

    def train(model, resume=None, evaluation=None, init=None, **args):
        args = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none", "max_steps": 4} | args
        args = {"learning_rate": 0.02, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True} | args
        trainer = SIDTrainer(
            model,
            SIDTrainingArguments(per_device_train_batch_size=4, eval_top_k=5, **args),
            train_dataset=Dataset.from_list(make_purchases(24)),
            eval_dataset=evaluation,
            processing_class=tokenizer,
            **(init or {}),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    yield train
    tokenizer.prompt_template.max_length = None


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def rankings_of(model, tokenizer, purchases):
    results = search(model.eval(), tokenizer, purchases, top_k=5)
    return [[(product["product_id"], product["score"]) for product in row] for row in results]


@torch.no_grad()
def logits_of(model, tokenizer):
    ids = torch.cat([torch.arange(50, 60), tokenizer.new_token_ids()[:10]])[None]
    return model.eval()(ids, use_cache=False).logits


# What is trained


@all_families
def test_adapters_and_sid_rows_are_trained_and_nothing_besides(base, plain, tokenizer, train):
    before = logits_of(plain, tokenizer)
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    first_loss = losses_of(train(AutoModelForCausalLM.from_pretrained(base), max_steps=1))[0]
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = add_lora(plain, tokenizer, config)
    assert config.trainable_token_indices is None and config.task_type is None  # a copy was changed
    assert torch.equal(logits_of(model, tokenizer), before)
    trained = trained_of(model)
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
    ids = tokenizer.new_token_ids()
    is_tied = plain.config.tie_word_embeddings
    rows = [value for name, value in trained.items() if "trainable_tokens" in name]
    assert [len(value) for value in rows] == [len(ids)] * (1 if is_tied else 2)

    trainer = train(model)
    # From where the unadapted model is; losses are rounded in the log.
    assert losses_of(trainer)[0] == pytest.approx(first_loss, abs=2e-4)
    assert losses_of(trainer)[-1] < first_loss
    after = trained_of(model)
    assert all(not torch.equal(after[name], value) for name, value in trained.items())
    merged = model.merge_and_unload()
    matrices = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, value in merged.state_dict().items():
        if name in matrices:
            assert torch.equal(value[: tokenizer.base_size], weights[name][: tokenizer.base_size])
            moved = (value != weights[name]).any(1)[ids]
            # Every row of the output is in each step's softmax; those of the input only where the token was read.
            assert moved.all() if is_tied or name == "lm_head.weight" else moved.float().mean() > 0.3
            assert torch.equal(value[ids[-1] + 1 :], weights[name][ids[-1] + 1 :])
        else:
            assert torch.equal(value, weights[name]) != name.endswith("q_proj.weight")
    if "baichuan" in type(merged).__name__.lower():
        assert type(merged.lm_head) is NormHead


@llama
@pytest.mark.parametrize("use_reentrant", [None, True])
def test_gradient_checkpointing_gives_the_same_gradients(base, tokenizer, train, use_reentrant):
    def run(name, **args):
        model = AutoModelForCausalLM.from_pretrained(base)
        initialize_sid_rows(model, tokenizer)
        torch.manual_seed(0)
        model = add_lora(model, tokenizer, LORA)
        before = trained_of(model)
        trainer = train(model, max_steps=2, **args)
        assert model.is_gradient_checkpointing is (name == "checkpointed")
        assert all(not torch.equal(value, before[key]) for key, value in trained_of(model).items())
        return losses_of(trainer), trained_of(model)

    kwargs = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    losses, plain = run("plain")
    again, checkpointed = run("checkpointed", gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert again == losses
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, atol=1e-5, rtol=1e-4)


@all_families
def test_targets_of_families_that_peft_does_not_know(plain, tokenizer):
    config = add_lora(plain, tokenizer, LoraConfig(r=2)).peft_config["default"]
    found = {name.rpartition(".")[2] for name in config.target_modules}
    if plain.config.model_type == "baichuan":
        assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    else:
        assert found == {"q_proj", "v_proj"}


@llama
def test_what_the_configuration_trains_already_is_kept_and_said(base, tokenizer, caplog):
    def add(**options):
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(base)
        initialize_sid_rows(model, tokenizer)
        with caplog.at_level(logging.WARNING, logger="rqsid.trainer.lora"):
            return add_lora(model, tokenizer, LoraConfig(r=2, target_modules=["q_proj"], **options))

    logging.getLogger("rqsid").propagate = True
    ids = tokenizer.new_token_ids().tolist()
    model = add(modules_to_save=["lm_head"])
    assert model.peft_config["default"].trainable_token_indices == {"model.embed_tokens": ids}
    assert "modules_to_save trains and saves lm_head whole" in caplog.text
    model = add(modules_to_save=["lm_head", "embed_tokens"])
    assert model.peft_config["default"].trainable_token_indices is None
    model = add(trainable_token_indices=ids[2:])
    assert model.peft_config["default"].trainable_token_indices == ids[2:]
    assert f"leaves 2 of {len(ids)} rows of SID tokens in model.embed_tokens untrained" in caplog.text
    assert f"leaves {len(ids)} of {len(ids)} rows of SID tokens in lm_head untrained" in caplog.text
    model = add(trainable_token_indices={"embed_tokens": ids, "lm_head": ids})
    assert not caplog.text
    assert model.peft_config["default"].trainable_token_indices == {"embed_tokens": ids, "lm_head": ids}


# Saving, resuming, merging, loading


@all_families
def test_saved_adapters_hold_rows_and_no_matrices(base, plain, tokenizer, train, make_purchases, tmp_path):
    model = add_lora(plain, tokenizer, LORA)
    trainer = train(model)
    prompts = [{name: row[name] for name in ("profile", "history", "query")} for row in make_purchases(6, seed=3)]
    expected = rankings_of(model, tokenizer, prompts)
    adapter = str(tmp_path / "adapter")
    trainer.save_model(adapter)
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    assert sorted(map(len, (value for name, value in tensors.items() if "trainable_tokens" in name))) == sorted(
        len(value) for name, value in trained_of(model).items() if "trainable_tokens" in name
    )
    assert sum(value.numel() for value in tensors.values()) == sum(map(torch.numel, trained_of(model).values()))
    assert not [name for name in os.listdir(adapter) if name.startswith(".")]
    logits = logits_of(model, tokenizer)

    loaded = load_lora(adapter)
    assert torch.equal(logits_of(loaded, tokenizer), logits)
    assert loaded.config.vocab_size == model.config.vocab_size and not trained_of(loaded)
    assert rankings_of(loaded, tokenizer, prompts) == expected
    more = load_lora(adapter, base_model=base, is_trainable=True)
    assert trained_of(more).keys() == trained_of(model).keys()
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, tokenizer), logits, atol=2e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again, tokenizer), logits_of(merged, tokenizer))
    assert again.config.sid_codebook == tokenizer.codebook_fingerprint()
    found = rankings_of(again, tokenizer, prompts)
    for row, other in zip(found, expected, strict=True):
        assert [product for product, _ in row] == [product for product, _ in other]
        assert [score for _, score in row] == pytest.approx([score for _, score in other], abs=1e-4)


FRESH = """
import json, sys
from transformers import AutoModelForCausalLM
from rqsid import SIDTokenizer, search
from rqsid.trainer.lora import load_lora

folder = sys.argv[1]
prompts = json.load(open(f"{folder}/prompts.json"))
result = {}
for name in ("llama", "qwen", "baichuan"):
    tokenizer = SIDTokenizer.from_pretrained(f"{folder}/{name}-adapter")
    models = load_lora(f"{folder}/{name}-adapter"), AutoModelForCausalLM.from_pretrained(f"{folder}/{name}-merged")
    result[name] = [
        [[(product["product_id"], product["score"]) for product in row] for row in found]
        for found in (search(model.eval(), tokenizer, prompts, top_k=5) for model in models)
    ]
json.dump(result, open(f"{folder}/result.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)
def test_a_fresh_process_finds_the_same_products(request, tokenizer, make_purchases, tmp_path):
    """With adapters and with merged models, over an untied, a tied and a normalised output layer."""
    shared = next(part for part in request.config.pluginmanager.get_plugins() if hasattr(part, "BASE_TOKENIZERS"))
    prompts = [{name: row[name] for name in ("profile", "history", "query")} for row in make_purchases(6, seed=3)]
    expected = {}
    for name, make in shared.TINY_MODELS.items():
        make(tokenizer.base_size, tie_word_embeddings=name == "qwen").save_pretrained(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        initialize_sid_rows(model, tokenizer)
        start = rankings_of(model, tokenizer, prompts)
        model = add_lora(model, tokenizer, LORA)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        expected[name] = rankings_of(model, tokenizer, prompts)
        assert expected[name] != start
        for folder in ("adapter", "merged"):
            tokenizer.save_pretrained(tmp_path / f"{name}-{folder}")
        save_lora(model, tmp_path / f"{name}-adapter")
        model.merge_and_unload().save_pretrained(tmp_path / f"{name}-merged")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "script.py").write_text(FRESH, encoding="utf-8")
    run_fresh(tmp_path / "script.py", tmp_path, check=True)
    for name, (adapted, merged) in json.loads((tmp_path / "result.json").read_text()).items():
        for found in (adapted, merged):
            for row, other in zip(found, expected[name], strict=True):
                assert [score for _, score in row] == pytest.approx([score for _, score in other], abs=1e-4)
                assert {product for product, _ in row} == {product for product, _ in other}


@untied_and_tied
def test_a_resumed_training_ends_as_an_uninterrupted_one(base, tokenizer, train, tmp_path):
    def make():
        model = AutoModelForCausalLM.from_pretrained(base)
        initialize_sid_rows(model, tokenizer)
        torch.manual_seed(0)
        return add_lora(model, tokenizer, LORA)

    whole = train(make(), save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert json.loads((checkpoint / "sid_adapter.json").read_text())["vocab_size"] == whole.model.config.vocab_size
    torch.manual_seed(99)
    resumed = train(make(), resume=str(checkpoint), output_dir=str(tmp_path / "other"))
    assert losses_of(resumed) == losses_of(whole)
    for name, value in trained_of(whole.model).items():
        assert torch.equal(trained_of(resumed.model)[name], value), name


@llama
def test_the_best_adapter_is_fetched_at_the_end(plain, tokenizer, train, make_purchases, tmp_path):
    calls = itertools.count()
    trainer = train(
        add_lora(plain, tokenizer, LORA),
        evaluation=Dataset.from_list(make_purchases(4, seed=2)),
        init={"compute_metrics": lambda prediction: {"calls": next(calls)}},
        **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
        **{"load_best_model_at_end": True, "metric_for_best_model": "calls", "greater_is_better": False},
    )
    best, last = (str(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4))
    assert trainer.state.best_model_checkpoint == best
    logits = logits_of(trainer.model, tokenizer)
    assert torch.equal(logits, logits_of(load_lora(best), tokenizer))
    assert not torch.equal(logits, logits_of(load_lora(last), tokenizer))


@llama
def test_rows_that_the_checkpoint_lacks_are_in_the_adapter(base, tokenizer, tmp_path):
    # Padded by the user to a multiple of 64 before: what is behind the tokens is in no checkpoint, and in every softmax.
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    assert model.config.vocab_size > len(tokenizer)
    initialize_sid_rows(model, tokenizer)
    model = add_lora(model, tokenizer, LORA)
    save_lora(model, tmp_path / "adapter")
    assert torch.equal(logits_of(load_lora(tmp_path / "adapter"), tokenizer), logits_of(model, tokenizer))


@llama
def test_matrices_that_are_trained_whole_are_saved_whole(base, plain, tokenizer, train, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = add_lora(plain, tokenizer, config)
    train(model, max_steps=2).save_model(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(load_lora(str(tmp_path / "adapter")), tokenizer), logits_of(model, tokenizer))


@llama
def test_saving_keeps_the_card_and_other_files(plain, tokenizer, tmp_path):
    model = add_lora(plain, tokenizer, LORA)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\nMy words.\n")
    (tmp_path / "notes.txt").write_text("kept")
    for _ in range(2):
        save_lora(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "My words." in card and "lora" in card
    assert (tmp_path / "notes.txt").read_text() == "kept"
    save_lora(model, tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


# Refusals


@llama
def test_adapters_that_cannot_work_are_refused(base, plain, tokenizer, monkeypatch):
    with pytest.raises(TypeError, match="peft_config is a dict; pass a configuration of peft"):
        add_lora(plain, tokenizer, {"r": 4})
    with pytest.raises(ValueError, match="PrefixTuningConfig puts virtual tokens.*Use LoraConfig"):
        add_lora(plain, tokenizer, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="IA3Config trains no rows of some tokens.*Use LoraConfig"):
        add_lora(plain, tokenizer, IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="task_type='SEQ_CLS'"):
        add_lora(plain, tokenizer, LoraConfig(task_type="SEQ_CLS"))
    for targets in (["q_proj", "lm_head"], ".*(q_proj|lm_head)"):
        with pytest.raises(ValueError, match="target_modules has lm_head, where the rows of the SID tokens are"):
            add_lora(plain, tokenizer, LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match=r"no rows.*initialize_sid_rows\(model, tokenizer\) first"):
        add_lora(AutoModelForCausalLM.from_pretrained(base), tokenizer, LORA)
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="does not work under DeepSpeed ZeRO-3 without CUDA.*Use ZeRO-2"):
        add_lora(plain, tokenizer, LORA)
    del settings
    quantized = AutoModelForCausalLM.from_pretrained(base)
    initialize_sid_rows(quantized, tokenizer)
    quantized.lm_head.weight = torch.nn.Parameter(quantized.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="lm_head is quantized .torch.int8"):
        add_lora(quantized, tokenizer, LORA)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"pip install 'rqsid\[peft\]'"):
            add_lora(plain, tokenizer, LORA)
        with pytest.raises(ImportError, match=r"pip install 'rqsid\[peft\]'"):
            load_lora(base)
    adapted = add_lora(plain, tokenizer, LORA)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(adapted, tokenizer, LORA)


@qwen
def test_a_tied_matrix_is_trained_by_row_or_refused(plain, tokenizer):
    for options in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}):
        with pytest.raises(ValueError, match="Leave it out"):
            add_lora(plain, tokenizer, LoraConfig(**options))
    assert embedding_names(plain) == ["model.embed_tokens"]


@llama
def test_adapters_are_loaded_onto_their_own_base(base, plain, tokenizer, make_tiny_model, tmp_path):
    adapter = str(tmp_path / "adapter")
    model = add_lora(plain, tokenizer, LORA)
    model.save_pretrained(adapter, save_embedding_layers=False)
    with pytest.raises(ValueError, match="no sid_adapter.json.*save_lora writes it"):
        load_lora(adapter)
    save_lora(model, adapter)
    for rows, found in ((tokenizer.base_size - 3, "does not hold all"), (len(tokenizer) + 1, "does not hold all")):
        with pytest.raises(ValueError, match=f"base model has {rows} rows.*{found}"):
            load_lora(adapter, base_model=make_tiny_model(rows))
    other = make_tiny_model(len(tokenizer))
    other.config.sid_codebook = "0" * 16
    with pytest.raises(ValueError, match="rows for the SID tokens of codebook 0000"):
        load_lora(adapter, base_model=other)
    foreign = get_peft_model(make_tiny_model(tokenizer.base_size), LORA)
    with pytest.raises(ValueError, match="base_model has an adapter already"):
        load_lora(adapter, base_model=foreign)
    with pytest.raises(ValueError, match="The model has no rows for SID tokens"):
        save_lora(foreign, tmp_path / "foreign")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model.*Pass base_model="):
        load_lora(adapter)
    path = tmp_path / "adapter" / "sid_adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match="format version 2"):
        load_lora(adapter, base_model=base)
