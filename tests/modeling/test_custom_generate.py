"""`generate()` with the search as a callable, as a folder, and where `from_pretrained` put it in place of `generate`."""

import ast
import functools
import logging
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, StoppingCriteria, TextStreamer

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDLogitsProcessor,
    SIDTokenizer,
    SIDTrie,
    TokenPruning,
    initialize_sid_rows,
    search,
    sid_generation_config,
)
from rqsid.modeling import custom_generate
from rqsid.modeling.code_export import save_custom_generate
from rqsid.modeling.custom_generate import sid_generate

EXAMPLES = [{"query": "potato chips", "history": ["p3", "p4"]}, {"query": "milk"}, {"profile": "age 35-44"}]
NUM_PRODUCTS = 40


@pytest.fixture(scope="module")
def tokenizer(base_tokenizer):
    """SIDs of two lengths; p0 and p1 share one."""
    random = np.random.default_rng(0)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8, 8], num_iterations=2))
    quantizer.fit(random.standard_normal((100, 6), dtype=np.float32))
    codes = random.integers(0, 8, (NUM_PRODUCTS, 3))
    codes[1] = codes[0]
    pruning = TokenPruning("top_k", layer=1, top_k=3).fit(codes, [8, 8, 8])
    product_ids = [f"p{row}" for row in range(NUM_PRODUCTS)]
    catalog = ProductCatalog.build(product_ids, codes, [8, 8, 8], pruning, popularity=np.arange(NUM_PRODUCTS))
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)
    if tokenizer.unk_token is not None:
        # Another than the end token, and with id 0, which `generate()` takes for none.
        tokenizer.pad_token = tokenizer.unk_token
        assert tokenizer.pad_token_id == 0
    return tokenizer


@pytest.fixture(scope="module")
def model(make_tiny_model, tokenizer):
    model = make_tiny_model(tokenizer.base_size)
    initialize_sid_rows(model, tokenizer, seed=1)
    return model


@pytest.fixture
def held(model):
    """The model's own generation config, to be filled with what a chat checkpoint leaves there."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    yield model.generation_config
    model.generation_config = before


@pytest.fixture(scope="module")
def inputs(tokenizer):
    prompts = tokenizer.encode_prompts(EXAMPLES)["input_ids"]
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    return dict(tokenizer.pad({"input_ids": prompts}, return_tensors="pt"))


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "a-model.v1"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    save_custom_generate(path)
    return str(path)


# One pair of each kind; the search's own tests try more.
on_both = pytest.mark.parametrize(
    "base_tokenizer, make_tiny_model", [("llama", "llama"), ("qwen", "qwen")], indirect=True, scope="module"
)


def ranked_sids(model, tokenizer, examples=EXAMPLES, **options):
    """What `search` finds, as SIDs: products that share one count once."""
    found = search(model, tokenizer, examples, top_k=NUM_PRODUCTS, num_beams=200, **options)
    return [list({entry["sid"]: entry["score"] for entry in ranked}.items()) for ranked in found]


def assert_ranked(output, model, tokenizer, inputs, top_k, **options):
    """Prompt, SID, end token and padding of each row, and its log-probability, as `search` has them."""
    expected = ranked_sids(model, tokenizer, **options)
    batch, length = inputs["input_ids"].shape
    assert output.sequences.shape == (batch * top_k, length + tokenizer.max_sid_length + 1)
    assert output.sequences.dtype == torch.int64 and output.sequences_scores.dtype == torch.float32
    assert output.sequences_scores.shape == (batch * top_k,)
    assert torch.equal(output.sequences[:, :length], inputs["input_ids"].repeat_interleave(top_k, 0))
    answers = output.sequences[:, length:].view(batch, top_k, -1).tolist()
    scores = output.sequences_scores.view(batch, top_k).tolist()
    for row in range(batch):
        ranking = expected[row][:top_k] + [("", -float("inf"))] * (top_k - len(expected[row]))
        for ids, score, (sid, logprob) in zip(answers[row], scores[row], ranking, strict=True):
            end = ids.index(tokenizer.eos_token_id)
            assert "".join(tokenizer.convert_ids_to_tokens(ids[:end])) == sid
            assert set(ids[end + 1 :]) <= {tokenizer.pad_token_id}
            assert score == pytest.approx(logprob, abs=1e-4)


def run(route, model, tokenizer, folder, inputs, **options):
    if route == "callable":
        options |= {"custom_generate": sid_generate, "sid_tokenizer": tokenizer}
    else:
        options |= {"custom_generate": folder, "trust_remote_code": True, "tokenizer": tokenizer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of generate() about its default length
        return model.generate(**inputs, **options)


@on_both
@pytest.mark.parametrize("route", ["callable", "folder"])
def test_generate_returns_what_search_finds(route, model, tokenizer, folder, inputs):
    for top_k in (1, 5):
        output = run(route, model, tokenizer, folder, inputs, top_k=top_k, beams=200, return_dict_in_generate=True)
        assert_ranked(output, model, tokenizer, inputs, top_k)
        bare = run(route, model, tokenizer, folder, inputs, top_k=top_k, beams=200)
        assert type(bare) is torch.Tensor and torch.equal(bare, output.sequences)
    assert run(route, model, tokenizer, folder, inputs).shape[0] == 10 * len(EXAMPLES)


@on_both
@pytest.mark.parametrize("route", ["callable", "folder"])
def test_rows_without_a_sid(route, model, tokenizer, folder, inputs):
    top_k = NUM_PRODUCTS + 7
    output = run(
        route, model, tokenizer, folder, inputs, top_k=top_k, return_dict_in_generate=True, output_scores=True
    )
    assert_ranked(output, model, tokenizer, inputs, top_k)
    rows = SIDLogitsProcessor(tokenizer, inputs["input_ids"].shape[1]).sid_rows(output.sequences).view(-1, top_k)
    num_sids = tokenizer.catalog.num_sids
    assert (rows[:, num_sids:] == -1).all()
    assert torch.equal(rows[:, :num_sids].sort(1).values, torch.arange(num_sids).expand(len(rows), -1))
    assert torch.equal(rows.flatten() >= 0, output.sequences_scores > -torch.inf)


@on_both
def test_prompts_without_padding_and_a_prompt_alone(model, tokenizer, folder, inputs):
    """`generate()` drops a mask of ones."""
    prompt = tokenizer.encode_prompts(EXAMPLES[:1])["input_ids"]
    alone = {"input_ids": torch.tensor(prompt), "attention_mask": torch.ones(1, len(prompt[0]), dtype=torch.int64)}
    output = run("callable", model, tokenizer, folder, alone, top_k=5, beams=200, return_dict_in_generate=True)
    assert_ranked(output, model, tokenizer, alone, 5, examples=EXAMPLES[:1])
    batch = run("callable", model, tokenizer, folder, inputs, top_k=5, beams=200)
    length = alone["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, length:], batch[:5, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("base_tokenizer, make_tiny_model", [("llama", "llama")], indirect=True, scope="module")
def test_padding_is_known_without_a_mask(model, tokenizer, folder, inputs):
    """To the folder, which names the padding token to `generate()`, where that is not the end token too."""
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    bare = {"input_ids": inputs["input_ids"]}
    found = run("folder", model, tokenizer, folder, bare, top_k=5, beams=200)
    assert torch.equal(found, run("folder", model, tokenizer, folder, inputs, top_k=5, beams=200))


@on_both
def test_tries_and_softmax_over_sids(model, tokenizer, folder, inputs):
    some = SIDTrie.from_tokenizer(tokenizer, torch.arange(5, 30))
    every = {"top_k": 6, "beams": 200, "return_dict_in_generate": True}
    output = run("callable", model, tokenizer, folder, inputs, trie=some, **every)
    assert_ranked(output, model, tokenizer, inputs, 6, trie=some)
    output = run("folder", model, tokenizer, folder, inputs, normalize="sid", **every)
    assert_ranked(output, model, tokenizer, inputs, 6, normalize="sid")
    tries = [some, SIDTrie.from_tokenizer(tokenizer), SIDTrie.from_tokenizer(tokenizer, torch.arange(3))]
    output = run("callable", model, tokenizer, folder, inputs, trie=tries, **every)
    assert_ranked(output, model, tokenizer, inputs, 6, trie=tries)
    with pytest.raises(ValueError, match="list of 2 for 3 prompts"):
        run("callable", model, tokenizer, folder, inputs, trie=tries[:2])


@on_both
@pytest.mark.parametrize("route", ["callable", "folder"])
def test_the_models_own_generation_config_has_no_effect(route, held, model, tokenizer, folder, inputs):
    expected = run(route, model, tokenizer, folder, inputs, top_k=4)
    held.update(do_sample=True, temperature=0.3, top_k=20, top_p=0.8, repetition_penalty=1.3, length_penalty=2.0)
    held.update(num_beams=4, num_return_sequences=2, no_repeat_ngram_size=2, suppress_tokens=[int(expected[0, -2])])
    assert torch.equal(run(route, model, tokenizer, folder, inputs, top_k=4), expected)
    # What is neutral, or said already, is no contradiction.
    neutral = {"do_sample": False, "repetition_penalty": 1.0, "length_penalty": 0.0, "temperature": 0.3}
    assert torch.equal(run(route, model, tokenizer, folder, inputs, top_k=4, **neutral), expected)


class Boost(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Stop(StoppingCriteria):
    def __call__(self, input_ids, scores):
        return torch.ones(len(input_ids), dtype=torch.bool)


@on_both
@pytest.mark.parametrize("route", ["callable", "folder"])
@pytest.mark.parametrize(
    "option",
    [
        {"do_sample": True},
        {"length_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"renormalize_logits": True},
        {"bad_words_ids": [[5]]},
        {"output_hidden_states": True},
        {"generation_config": GenerationConfig(top_k=7)},
        {"logits_processor": [Boost()]},
        {"stopping_criteria": [Stop()]},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [5]},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_would_change_the_ranking(route, option, model, tokenizer, folder, inputs):
    name = next(iter(option))
    named = {
        "generation_config": "`top_k=7` is refused.*pass `top_k`",
        "prefix_allowed_tokens_fn": "`logits_processor` holds a PrefixConstrained",
        "logits_processor": "`logits_processor` holds a Boost",
        "stopping_criteria": "`stopping_criteria` holds a Stop",
    }
    with pytest.raises(ValueError, match=named.get(name, f"`{name}=.*refused")):
        run(route, model, tokenizer, folder, inputs, **option)


@on_both
def test_beams_by_their_usual_names(model, tokenizer, folder, inputs):
    for option in ({"num_beams": 4}, {"num_return_sequences": 3, "do_sample": True}):
        with pytest.raises(ValueError, match="repeat every prompt . times.*Pass `beams` and `top_k`"):
            run("callable", model, tokenizer, folder, inputs, **option)
    expected = run("folder", model, tokenizer, folder, inputs, beams=6, top_k=6)
    assert not torch.equal(expected, run("folder", model, tokenizer, folder, inputs, beams=200, top_k=6))
    usual = run("folder", model, tokenizer, folder, inputs, num_beams=6, num_return_sequences=6)
    assert torch.equal(usual, expected)
    assert torch.equal(run("folder", model, tokenizer, folder, inputs, num_beams=6, beams=6, top_k=6), expected)
    with pytest.raises(ValueError, match="`num_beams=4` and `beams=6` mean the same"):
        run("folder", model, tokenizer, folder, inputs, num_beams=4, beams=6)
    config = sid_generation_config(model, tokenizer, num_beams=8, num_return_sequences=4)
    with pytest.raises(ValueError, match="`num_beams=8`.*repeat every prompt 8 times"):
        run("folder", model, tokenizer, folder, inputs, generation_config=config)


@on_both
@pytest.mark.parametrize("route", ["callable", "folder"])
def test_arguments_that_make_no_sense(route, base_tokenizer, model, tokenizer, folder, inputs, monkeypatch):
    with pytest.raises(TypeError, match="needs the SIDTokenizer.*`sid_tokenizer=tokenizer`"):
        run(route, model, None, folder, inputs, top_k=3)
    with pytest.raises(TypeError, match="knows no catalog"):
        run(route, model, base_tokenizer, folder, inputs, top_k=3)
    for option in ({"top_k": 0}, {"top_k": 2.5}, {"beams": 0}, {"beams": True}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}` must be a positive integer"):
            run(route, model, tokenizer, folder, inputs, **option)
    right = {name: tensor.flip(1) for name, tensor in inputs.items()}
    with pytest.raises(ValueError, match="padded on the left"):
        run(route, model, tokenizer, folder, right)
    with pytest.raises(ValueError, match="no `inputs_embeds`"):
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        run(route, model, tokenizer, folder, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    cache = model(input_ids=inputs["input_ids"][:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` holds"):
        run(route, model, tokenizer, folder, inputs, past_key_values=cache)
    monkeypatch.setattr(model.config, "sid_codebook", "another")
    with pytest.raises(ValueError, match="codebook another"):
        run(route, model, tokenizer, folder, inputs)


@on_both
def test_tokenizer_is_kept_from_a_callable(model, tokenizer, inputs):
    """The reason for `sid_tokenizer`: once this fails, `tokenizer` will do."""
    with pytest.warns(UserWarning, match="max_length"), pytest.raises(TypeError, match="needs the SIDTokenizer"):
        model.generate(**inputs, custom_generate=sid_generate, tokenizer=tokenizer)
    bound = functools.partial(sid_generate, tokenizer=tokenizer, top_k=2)
    with pytest.warns(UserWarning, match="max_length"):
        assert model.generate(**inputs, custom_generate=bound).shape[0] == 2 * len(EXAMPLES)


@on_both
def test_arguments_that_the_search_has_no_use_for(model, tokenizer, folder, inputs):
    with pytest.raises(ValueError, match="no use for `streamer`"):
        run("folder", model, tokenizer, folder, inputs, streamer=TextStreamer(tokenizer))
    with pytest.raises(ValueError, match="no use for `assistant_model`"):
        run("folder", model, tokenizer, folder, inputs, assistant_model=model)
    with pytest.raises(ValueError, match=r"hands no \['output_router_logits'\] on"):
        sid_generate(model, inputs["input_ids"], tokenizer=tokenizer, output_router_logits=True)


@on_both
def test_the_folder_needs_trust(model, tokenizer, folder, inputs):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        model.generate(**inputs, custom_generate=folder, tokenizer=tokenizer, trust_remote_code=False)


@on_both
def test_the_folder_is_quiet(model, tokenizer, folder, inputs, caplog, recwarn, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model.generate(**inputs, custom_generate=folder, trust_remote_code=True, tokenizer=tokenizer, top_k=2)
    assert not caplog.records and not recwarn


@on_both
def test_a_model_that_brings_its_generate(tokenizer, folder, inputs):
    """Ordinary calls stay what they are; calls that ask for SIDs rank them."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    brought = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(brought.generate, functools.partial) and not hasattr(plain.generate, "func")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    calls = [
        {"max_new_tokens": 4, "do_sample": False},
        {"max_new_tokens": 4, "num_beams": 3, "tokenizer": tokenizer, "stop_strings": ["milk"]},
        {"max_new_tokens": 4, "do_sample": True, "top_k": 3},
    ]
    for options in calls:
        torch.manual_seed(0)
        expected = plain.generate(ids, attention_mask=mask, **options)
        torch.manual_seed(0)
        assert torch.equal(brought.generate(ids, attention_mask=mask, **options), expected)
    config = sid_generation_config(plain, tokenizer, num_beams=8, num_return_sequences=4)
    for chosen in (plain, brought):
        processor = SIDLogitsProcessor(tokenizer, prompt_length=ids.shape[1])
        sequences = chosen.generate(**inputs, generation_config=config, logits_processor=[processor])
        assert (processor.sid_rows(sequences) >= 0).all() and len(sequences) == 4 * len(ids)

    expected = run("folder", plain, tokenizer, folder, inputs, top_k=3, beams=60)
    for options in (
        {"tokenizer": tokenizer, "top_k": 3, "beams": 60},
        {"tokenizer": tokenizer, "top_k": 3, "num_beams": 60},
        {"custom_generate": folder, "trust_remote_code": True, "tokenizer": tokenizer, "top_k": 3, "beams": 60},
    ):
        assert torch.equal(brought.generate(**inputs, **options), expected)
    assert torch.equal(run("callable", brought, tokenizer, folder, inputs, top_k=3, beams=60), expected)
    with pytest.raises(TypeError, match="needs the SIDTokenizer"):
        brought.generate(**inputs, beams=60)


def test_what_travels(tmp_path):
    """Each file is ours, imports nothing but its siblings and a few libraries, and all siblings are there."""
    written = save_custom_generate(tmp_path / "new", "org/shop")
    names = {path.removeprefix(f"{tmp_path}/new/custom_generate/") for path in written}
    assert {"generate.py", "README.md", "search.py", "trie.py"} < names
    assert names == {path.name for path in (tmp_path / "new" / "custom_generate").iterdir()}
    for name in names - {"README.md"}:
        tree = ast.parse((tmp_path / "new" / "custom_generate" / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in names
            elif isinstance(node, ast.ImportFrom | ast.Import):
                found = {node.module} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
                assert not {module.split(".")[0] for module in found} & {"rqsid", "sid_tokenizer", "modeling"}
    readme = (tmp_path / "new" / "custom_generate" / "README.md").read_text()
    assert readme.startswith("---\ntags:\n- custom_generate\n---") and "from_pretrained('org/shop'" in readme
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_custom_generate(tmp_path / "file")


def test_a_save_that_dies_leaves_no_half_file(tmp_path, monkeypatch):
    """And writes what `generate.py` imports before it."""
    save_custom_generate(tmp_path)
    folder = tmp_path / "custom_generate"
    before = {path.name: path.read_text() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.write_text("old")
    source = custom_generate.__file__
    real = open

    def dying(path, *args, **kwargs):
        if str(path).startswith(f"{folder}/generate.py"):
            raise OSError("disk full")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", dying)
    with pytest.raises(OSError, match="disk full"):
        save_custom_generate(tmp_path)
    monkeypatch.undo()
    assert source == custom_generate.__file__
    after = {path.name: path.read_text() for path in folder.iterdir()}
    assert after == before | {"generate.py": "old"}
