"""finetune.py's arguments, files and models, its shipped configurations, and the memory that they are said to need."""

import copy
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GgufConfig

from rqsid import ProductCatalog, SIDTokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune"
CONFIGS = sorted((EXAMPLE / "configs").glob("*.yaml"))
ROWS = [{"history": ["p1"], "query": "milk", "product": "p0"}, {"history": [], "query": "chips", "product": "p2"}]


@pytest.fixture(scope="module")
def modules():
    """The example's modules, which import each other as a script's do."""
    names = ["config", "loading", "finetune", "estimate_memory"]
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer(request):
    shared = next(part for part in request.config.pluginmanager.get_plugins() if hasattr(part, "BASE_TOKENIZERS"))
    codes = torch.cartesian_prod(*[torch.arange(2)] * 3).numpy()
    catalog = ProductCatalog.build([f"p{row}" for row in range(8)], codes, [2, 2, 2])
    return SIDTokenizer.from_base(shared.BASE_TOKENIZERS["llama"](), catalog)


@pytest.fixture(scope="module")
def tiny_llama(request):
    shared = next(part for part in request.config.pluginmanager.get_plugins() if hasattr(part, "TINY_MODELS"))
    return shared.TINY_MODELS["llama"]


@pytest.fixture
def parse(modules, tmp_path):
    def parse(text, *arguments):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return modules["config"].parse_arguments([str(tmp_path / "config.yaml"), *arguments])

    return parse


NEEDED = "model: some/model\ntokenizer: some/tokenizer\ntrain: a.parquet\n"


def test_yaml_and_command_line(parse):
    text = f"""{NEEDED}
validation: [b.parquet, c.parquet]
learning_rate: 1e-5
max_steps: 7
max_prompt_length: null
eval_strategy: "no"
tasks: {{purchase: 2, query: 1}}
lr_scheduler_kwargs: {{num_cycles: 2}}
report_to: [tensorboard]
bf16: yes
"""
    script, args = parse(text, "--max_steps=9", "--train", "d.jsonl", "e.jsonl", "--streaming", "--lora_r", "4")
    assert (script.model, script.train, script.validation) == (
        "some/model",
        ["d.jsonl", "e.jsonl"],
        ["b.parquet", "c.parquet"],
    )
    assert (args.learning_rate, args.max_steps, args.max_prompt_length) == (1e-5, 9, None)
    assert script.tasks == {"purchase": 2, "query": 1} and args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.report_to == ["tensorboard"] and args.bf16 and script.streaming and script.lora_r == 4
    assert args.use_cpu == (not torch.accelerator.is_available())  # what the machine asks for
    assert parse(NEEDED, "--tasks", '{"title": 3}')[0].tasks == {"title": 3}


def test_command_line_alone(modules, tmp_path):
    arguments = ["--model=m", "--tokenizer=t", "--train=a.csv", f"--output_dir={tmp_path}"]
    script, args = modules["config"].parse_arguments(arguments)
    assert (script.model, script.train, args.output_dir) == ("m", ["a.csv"], str(tmp_path))


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("learning_rat: 1", [], r"unknown names learning_rat \(did you mean learning_rate"),
        ("", ["--max_step=3"], r"Unknown arguments: --max_step=3 \(did you mean max_steps"),
        ("", ["--save_strategyy", "no"], r"--save_strategyy \(did you mean save_strategy"),
        ("eval_strategy: no", [], 'eval_strategy is False, to YAML.*Quote the word: "no"'),
        ("max_steps: ten", [], "max_steps is 'ten': invalid literal"),
        ("bf16: maybe", [], "bf16 is 'maybe': Truthy value expected"),
        ("train: null", [], "Missing: train.*--train"),
        ("", ["--tasks", "{purchase: 1}"], "--tasks {purchase: 1} is no JSON"),
    ],
)
def test_refused_arguments(parse, text, arguments, message):
    text = (
        "\n".join(line for line in NEEDED.splitlines() if line.split(":")[0] not in text.split(":")[0]) + "\n" + text
    )
    with pytest.raises(ValueError, match=message):
        parse(text, *arguments)


def test_refused_files(modules, tmp_path):
    with pytest.raises(ValueError, match="There is no configuration .*missing.yaml"):
        modules["config"].parse_arguments([str(tmp_path / "missing.yaml")])
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="holds a list; it must consist of lines"):
        modules["config"].parse_arguments([str(tmp_path / "list.yaml")])


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_files_patterns_and_folders(modules, tokenizer, tmp_path):
    load = modules["loading"].load_purchases
    write(tmp_path / "train" / "deep", "a.jsonl", ROWS)
    write(tmp_path / "train", "b.jsonl", ROWS[:1])
    (tmp_path / "train" / "notes.txt").write_text("none of it")
    write(tmp_path / "other", "c.json", ROWS)
    for paths, count in (
        ([f"{tmp_path}/train"], 3),
        ([f"{tmp_path}/train/**/*.jsonl"], 3),
        ([f"{tmp_path}/train/*.jsonl", f"{tmp_path}/other/c.json"], 3),
        ([f"{tmp_path}/train/b.jsonl"], 1),
    ):
        assert len(load(paths, "train", tokenizer)) == count
        assert len(list(load(paths, "train", tokenizer, streaming=True))) == count


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", None, r"train: .*a\.jsonl is no file, folder or pattern.*; in .*: b\.jsonl"),
        ("a.txt", "text", "is none of .parquet, .csv"),
        ("a.jsonl", '{"history": [], "item": "p1"}', r'lacks the column "product".*found \[\'history\', \'item\'\]'),
        (
            "a.jsonl",
            '{"product": "p1", "item": "p1"}',
            r"none of the prompt's columns \['history', 'profile', 'query'\]",
        ),
        ("a.csv", "history,query,product\np1,milk,p2\n", "CSV files cannot hold lists"),
    ],
)
def test_refused_purchases(modules, tokenizer, tmp_path, name, content, message):
    write(tmp_path, "b.jsonl", ROWS)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        modules["loading"].load_purchases([f"{tmp_path}/{name}"], "train", tokenizer)


def test_refused_mixture_of_formats(modules, tokenizer, tmp_path):
    write(tmp_path, "b.jsonl", ROWS)
    (tmp_path / "a.csv").write_text("query,product\nmilk,p2\n")
    with pytest.raises(ValueError, match=r"several formats \(.csv, .jsonl\)"):
        modules["loading"].load_purchases([str(tmp_path)], "train", tokenizer)


def test_a_tokenizer_of_another_model(modules, tokenizer, tiny_llama, tmp_path):
    load = modules["loading"].load_model
    tiny_llama(tokenizer.base_size - 1).save_pretrained(tmp_path / "small")
    with pytest.raises(
        ValueError, match=rf"base has {tokenizer.base_size} tokens, .*rows for {tokenizer.base_size - 1}"
    ):
        load(str(tmp_path / "small"), tokenizer)

    tiny_llama(tokenizer.base_size).save_pretrained(tmp_path / "model")
    assert load(str(tmp_path / "model"), tokenizer).dtype == torch.float32
    base = json.loads(tokenizer.backend_tokenizer.to_str())
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(base))
    load(str(tmp_path / "model"), tokenizer)
    base["model"]["vocab"] |= {"▁": base["model"]["vocab"]["e"], "e": base["model"]["vocab"]["▁"]}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(base))
    with pytest.raises(ValueError, match="2 of .* tokens of .* have other ids in the tokenizer"):
        load(str(tmp_path / "model"), tokenizer)


def test_refused_folders(modules, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="model: there is no folder .*nothing"):
        modules["loading"].load_model(f"{tmp_path}/nothing", tokenizer)
    with pytest.raises(ValueError, match="tokenizer: there is no folder .*nothing"):
        modules["loading"].load_tokenizer(f"{tmp_path}/nothing")
    with pytest.raises(ValueError, match="There is no a.gguf in .*; GGUF files there: none"):
        modules["loading"].load_model(str(tmp_path), tokenizer, gguf_file="a.gguf")


def test_a_model_of_a_quantized_file_can_be_saved(modules, tiny_llama, tmp_path):
    for tied in (False, True):
        model = tiny_llama(100, tie_word_embeddings=tied)
        model.config.quantization_config = GgufConfig()
        plain = modules["loading"].without_quantization(model)
        assert not hasattr(plain.config, "quantization_config") and hasattr(model.config, "quantization_config")
        assert not any(tensor.is_meta for tensor in [*plain.parameters(), *plain.buffers()])
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
        plain.save_pretrained(tmp_path / str(tied))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        input_ids = torch.arange(20)[None]
        with torch.no_grad():
            assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configurations(path, modules):
    script, args = modules["config"].parse_arguments([str(path), "--report_to=none"])
    text, settings = path.read_text(encoding="utf-8"), yaml.safe_load(path.read_text(encoding="utf-8"))
    for config in re.findall(r"--config_file (\S+)", text):
        assert (EXAMPLE.parents[1] / config).is_file()
    assert set(re.findall(r"examples/finetune/configs/(\S+)", text)) <= {path.name}
    if not script.gguf_file:
        assert path.name in text and (script.lora_r is not None) == path.stem.endswith("lora")
        # "estimated by estimate_memory.py": by the same shapes and numbers, today
        lines = [line.removeprefix("#   ") for line in text.splitlines() if " GPUs: " in line]
        assert lines == [modules["estimate_memory"].describe(settings, 8, nodes) for nodes in (1, 2)]


@pytest.mark.parametrize(
    "name, count", [("meta-llama/Llama-2-7b-hf", 6_738_415_616), ("Qwen/Qwen1.5-0.5B", 463_987_712)]
)
def test_shapes_are_those_of_the_checkpoints(modules, name, count):
    estimate = modules["estimate_memory"]
    config = estimate.model_config(name)
    assert estimate.count_parameters(config, {}, 0)[:2] == (count, count)
    rows = 100 * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert estimate.count_parameters(config, {}, 100)[0] == count + rows
    lora = {"lora_r": 8, "lora_target_modules": ["q_proj"]}
    adapters = 8 * 2 * config.hidden_size * config.num_hidden_layers
    assert estimate.count_parameters(config, lora, 100)[:2] == (count + rows + adapters, rows + adapters)


def test_estimates_by_hand(modules):
    """7B parameters on 8 GPUs: 22 bytes each (DDP), 2 bytes each and 18 shared out (ZeRO-2), 18 shared out and the largest layer (ZeRO-3)."""
    total, largest = 7_000_000_000, 131_072_000
    found = modules["estimate_memory"].state_bytes(total, total, largest, 8, 1)
    assert found == {"DDP": 154e9, "ZeRO-2": 14e9 + 15.75e9, "ZeRO-3": 4 * largest + 15.75e9}
    assert (
        modules["estimate_memory"].state_bytes(total, 0, largest, 4, 2)["ZeRO-2"] == 14e9
    )  # frozen: bfloat16 weights


def test_activations_against_what_autograd_saves(modules, tiny_llama):
    """Saved tensors of a forward pass in bfloat16, weights apart, are within a factor of two of the estimate."""
    model = tiny_llama(100, hidden_size=64, intermediate_size=172, num_hidden_layers=4).bfloat16().train()
    weights = {weight.data_ptr() for weight in model.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    def forward():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.model(torch.randint(0, 100, (2, 96)), use_cache=False).last_hidden_state
        return sum(size for size, _ in saved.values()), hidden

    config = copy.deepcopy(model.config)
    config.vocab_size = 0
    measured, _ = forward()
    estimate = modules["estimate_memory"].activation_bytes(config, 2, 96, 0, False)
    assert 0.5 < measured / estimate < 2
    assert modules["estimate_memory"].activation_bytes(config, 2, 96, 0, True) < 0.45 * estimate


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_adapters_tasks_and_resuming(modules, tokenizer, tiny_llama, tmp_path, streaming, caplog):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tiny_llama(tokenizer.base_size).save_pretrained(tmp_path / "model")
    write(tmp_path, "train.jsonl", ROWS * 8)
    arguments = [f"--{name}={tmp_path}/{file}" for name, file in (("model", "model"), ("tokenizer", "tokenizer"))]
    arguments += [f"--train={tmp_path}/train.jsonl", f"--validation={tmp_path}/train.jsonl", "--report_to=none"]
    arguments += [f"--output_dir={tmp_path}/run", "--eval_top_k=4", "--save_steps=1", "--logging_steps=1", "--resume"]
    arguments += ["--lora_r=2", "--lora_target_modules=all-linear", f"--streaming={streaming}"]
    arguments += ["--tasks", '{"purchase": 2, "query": 1}', "--disable_tqdm=true"]
    with caplog.at_level("INFO", logger="rqsid"):
        first = modules["finetune"].main([*arguments, "--max_steps=2"])  # nothing to resume from
    assert sum("Training on 1 process with no engine" in record.message for record in caplog.records) == 1
    assert type(first.model).__name__.startswith("Peft")
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert len(losses) == 2

    second = modules["finetune"].main([*arguments, "--max_steps=3"])
    log = [entry for entry in second.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in log[:2]] == losses and log[2]["step"] == 3
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "sid_manifest.json", "train_results.json", "eval_results.json"} <= files
