"""Bundles whose manifest and hashes fit, because whoever made them wrote those too: one ValueError, and nothing outside is touched."""

import copy
import json
import shutil
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rqsid import SIDTokenizer
from rqsid.sid_tokenizer import bundle
from rqsid.sid_tokenizer.catalog_columns import COLUMNS
from rqsid.sid_tokenizer.files import checksum, file_entry, read_tensors, write_tensors
from rqsid.sid_tokenizer.sid_tokens import check_token_format, layer_tokens
from rqsid.sid_tokenizer.text_encoding import TextEncoder

FILES = (
    "tokenizer.json",
    "sid_codebook.safetensors",
    "sid_catalog.safetensors",
    "sid_prompt.json",
    "sid_manifest.json",
)
NUMBERS = [True, 1.5, "1", None, -1, 2**70, [], {}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_parts):
    pieces = {letter: at for at, letter in enumerate(["</s>", *"abcdefghijklmnopqrstuvwxyz:<>_/ "])}
    base = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=pieces, merges=[])), eos_token="</s>")
    _, quantizer, catalog = make_parts()
    folder = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SIDTokenizer, "_auto_class", None)  # no files of code
        SIDTokenizer.from_base(base, catalog, quantizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "bundle")
    return tmp_path / "bundle"


def vouch(folder, **changes):
    """A manifest whose hashes and checksum fit whatever lies there."""
    manifest = json.loads((folder / "sid_manifest.json").read_text())
    manifest["files"] = {name: file_entry(folder / name) for name in manifest["files"]}
    manifest |= changes
    manifest.pop("checksum", None)
    (folder / "sid_manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


def edit_json(folder, name, change):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(content)))


def read(folder):
    return bundle.read_bundle(folder / "sid_manifest.json", {name: folder / name for name in FILES})


def assert_refused(action, message):
    with pytest.raises(ValueError, match=message) as caught:
        action()
    assert type(caught.value) is ValueError and len(str(caught.value)) < 2000


def test_the_untouched_copy_loads(folder):
    vouch(folder)
    read(folder)
    SIDTokenizer.from_pretrained(folder)


# The manifest

ENTRY = {"bytes": 3, "sha256": "0" * 64}
MANIFESTS = {
    **{f"file {name!r}": (lambda m, n=name: {"files": m["files"] | {n: ENTRY}}, "names the file .* no bundle has")
       for name in ("../../x", "/etc/passwd", "C:\\x", "training_args.bin", "sub/tokenizer.json", "", "\x00", "x" * 10**5)},
    **{f"bytes {value!r}": (lambda m, v=value: {"files": m["files"] | {"tokenizer.json": ENTRY | {"bytes": v}}},
                            "describes tokenizer.json as") for value in NUMBERS},
    **{f"sha {value!r}": (lambda m, v=value: {"files": m["files"] | {"tokenizer.json": ENTRY | {"sha256": v}}},
                          "describes tokenizer.json as") for value in (None, 1, "", "0" * 63, "0" * 64 + "\n", "G" * 64)},
    "entry of a number": (lambda m: {"files": m["files"] | {"sid_prompt.json": 5}}, "describes sid_prompt.json as 5"),
    "files of a list": (lambda m: {"files": list(m["files"])}, "lacks tokenizer.json"),
    "files of a text": (lambda m: {"files": " ".join(m["files"])}, "lacks tokenizer.json"),
    "gigantic tokenizer": (lambda m: {"files": m["files"] | {"tokenizer.json": ENTRY | {"bytes": 2**40}}},
                           "tokenizer.json holds 1099511627776 bytes, more than"),
    **{f"base_size {value!r}": (lambda m, v=value: {"base_size": v}, "says base_size=") for value in NUMBERS},
    **{f"layer_order {value!r}": (lambda m, v=value: {"layer_order": v}, "layer_order=")
       for value in ("012", None, 5, {"0": 1}, [0, 1], [0, 1, 1], [0, 1, 2.0], [True, 0, 2], [[0], 1, 2], [0, 1, 2**70], [0, 1, -1], [])},
    **{f"special {value!r}": (lambda m, v=value: {"special_tokens": v}, "says special_tokens=")
       for value in (None, [], {}, {"eos_token": "</s>"}, {"eos_token": 1, "pad_token": None},
                     {"eos_token": "</s>", "pad_token": "</s>", "backend_tokenizer": "x"}, {"eos_token": {}, "pad_token": []})},
    **{f"format_version {value!r}": (lambda m, v=value: {"format_version": v}, "has format version") for value in NUMBERS},
    "products": (lambda m: {"products": "9" * 10**6}, "says products='999"),
    "sids": (lambda m: {"sids": 2**70}, "says sids=1180591620717411303424"),
    "history": (lambda m: {"history": [{"id": "x" * 10**6}] * 3}, "says history="),
    "sizes": (lambda m: {"codebook_sizes": [10**12] * 3}, "says codebook_sizes="),
    "pruning": (lambda m: {"pruning": {"strategy": "none"}}, "says pruning="),
}  # fmt: skip


def test_manifests_that_are_refused(folder):
    original = json.loads((folder / "sid_manifest.json").read_text())
    for name, (change, message) in MANIFESTS.items():
        manifest = {**original, **change(original)}
        manifest.pop("checksum")
        (folder / "sid_manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
        with pytest.raises(ValueError, match=message) as caught:
            read(folder)
        assert type(caught.value) is ValueError and len(str(caught.value)) < 2000, name
        assert "sid_manifest.json" in str(caught.value) or "layer_order" in str(caught.value), name


def test_a_manifest_is_checked_before_any_file_is_opened(folder, monkeypatch):
    manifest = json.loads((folder / "sid_manifest.json").read_text())
    manifest["files"] = dict.fromkeys([*FILES[:-1], "../secret"], ENTRY)
    manifest.pop("checksum")
    (folder / "sid_manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    monkeypatch.setattr(bundle, "check_file", lambda *args: pytest.fail("a file was opened"))
    assert_refused(lambda: read(folder), "names the file '../secret'")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_edited_manifests_and_prompts(whole, tmp_path_factory, data):
    """Random edits with a fitting checksum: refused by name, or the same parts."""
    folder = tmp_path_factory.getbasetemp() / "edited"
    if not folder.exists():
        shutil.copytree(whole, folder)
    for name in ("sid_manifest.json", "sid_prompt.json"):
        shutil.copy(whole / name, folder / name)
    value = st.sampled_from([*NUMBERS, "x", "../x", [1], {"a": 1}, [0, 1, 2], ["</s>"], "{letter.__class__}"])
    name = data.draw(st.sampled_from(["sid_manifest.json", "sid_prompt.json"]))
    content = json.loads((folder / name).read_text())
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(value)
    (folder / name).write_text(json.dumps(content))
    if name == "sid_manifest.json":
        content.pop("checksum", None)
        (folder / name).write_text(json.dumps(content | {"checksum": checksum(content)}))
    else:
        vouch(folder)
    try:
        parts = read(folder)
    except ValueError as error:
        assert type(error) is ValueError and len(str(error)) < 2000
        return
    assert len(parts["catalog"]) == 60 and sorted(parts["layer_order"]) == [0, 1, 2]
    assert layer_tokens([4, 5, 6], 0, parts["token_format"])
    template = parts["prompt_template"]
    assert all(isinstance(piece, str) for piece in template.pieces({template.fields[-1]: "q"}).head[:1])


# Spellings of tokens


@pytest.mark.parametrize(
    "token_format",
    [
        "{letter.__class__}{code}",
        "{letter.__class__.__init__.__globals__}{code}",
        "{letter[0]}{code}",
        "{code:>999999999}{letter}",
        "{letter:>999999999}{code}",
        "{code:0999999999}{letter}",
        "{code!r}{letter}",
        "{code:{letter}}{letter}",
        "{0}{1}",
        "{}{}",
        "{letter}{code",
        "{letter}_{code}" + "x" * 100,
        "{letter}\ud800{code}",
        None,
        5,
        ["{letter}{code}"],
        {"letter": "code"},
    ],
)
def test_formats_that_are_refused(token_format):
    tracemalloc.start()
    assert_refused(lambda: check_token_format(token_format), "token_format=")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert_refused(lambda: layer_tokens([2, 2], 0, token_format), "token_format=")


def test_formats_that_are_fine():
    for token_format in (
        "<{letter}_{code}>",
        "{code}{letter}",
        "{{{letter}}}{code:03d}",
        "[{letter}:{code:04}]",
        "ﬁ{letter}ß{code}",
    ):
        check_token_format(token_format)


def test_a_format_in_a_manifest_is_named(folder):
    vouch(folder, token_format="{letter.__class__}{code}")
    assert_refused(
        lambda: SIDTokenizer.from_pretrained(folder), "sid_manifest.json: token_format='{letter.__class__}{code}'"
    )


def test_more_tokens_than_the_tokenizer_can_hold_are_not_spelled(folder):
    """Codebooks of 2^24 codes each, which are allowed, would be fifty million strings."""
    tensors, config = read_tensors(folder / "sid_catalog.safetensors", COLUMNS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    sizes = [2**20] * 3  # keys of 63 bits, in the order that they had
    config |= {"codebook_sizes": sizes, "pruning": config["pruning"] | {"codebook_sizes": sizes}}
    tensors |= {name: tensors[name].int() for name in ("product_codes", "sid_codes")}
    write_tensors(folder / "sid_catalog.safetensors", tensors, config)
    tracemalloc.start()
    begin = time.process_time()
    vouch(folder, codebook_sizes=sizes, pruning=config["pruning"])
    assert_refused(
        lambda: SIDTokenizer.from_pretrained(folder), "SIDs of 3145728 tokens, more than tokenizer.json has room for"
    )
    assert time.process_time() - begin < 3 and tracemalloc.get_traced_memory()[1] < 3e7
    tracemalloc.stop()


# Codebooks


def test_codebooks_that_are_refused(folder):
    path = folder / "sid_codebook.safetensors"
    names = [f"codebook_{layer}" for layer in range(3)]
    tensors, config = read_tensors(path, names)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    cases = [
        (tensors, config | {"embedding_dim": value}, "codebook_0 in .* expected") for value in (*NUMBERS, 7, 2**40)
    ]
    cases += [(tensors, config | {"num_beams": value}, "num_beams") for value in ("x", 0, -1, True, 2**40, None, [])]
    for key in ("num_iterations", "seed", "sample_per_code", "num_sample_iterations"):
        cases += [(tensors, config | {key: value}, key) for value in ("x", 1.5, True, 2**70, [])]
    for key in ("capacity", "relocation_threshold"):
        cases += [(tensors, config | {key: value}, key) for value in ("x", True, [], 1e300)]
    cases += [(tensors, config | {key: ["x"]}, "configuration") for key in ("preset", "init", "metric")]
    cases += [(tensors, config | {"normalize_residuals": value}, "normalize_residuals") for value in (1, "no", None)]
    cases += [
        (tensors, config | {"skipped_codes": value}, "configuration")
        for value in (
            {"9": [1]},
            {"0": [99]},
            {"0": [1, 1]},
            {"x": [1]},
            [1],
            {"0": {}},
            {"0": [True]},
            {"9" * 5000: [1]},
        )
    ]
    cases += [
        (tensors, config | {"normalize_residuals": True}, "lacks scale_0"),
        (tensors | {"payload": torch.zeros(9)}, config, "holds 'payload', which this version"),
        (tensors | {"codebook_1": tensors["codebook_1"].T.contiguous()}, config, "codebook_1 in .* is \\(6, 5\\)"),
        (tensors | {"codebook_0": tensors["codebook_0"].flatten()}, config, "codebook_0 in .* is \\(24,\\)"),
        (tensors | {"codebook_0": tensors["codebook_0"].bool()}, config, "codebook_0 in .* torch.bool"),
    ]
    tracemalloc.start()
    for columns, settings_, message in cases:
        write_tensors(path, columns, settings_)
        vouch(folder)
        with pytest.raises(ValueError, match="sid_codebook.safetensors") as caught:
            read(folder)
        assert type(caught.value) is ValueError and len(str(caught.value)) < 2000
        assert caught.match(message), (settings_, str(caught.value))
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()


# Files that transformers and tokenizers read


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": ' + "[" * 50_000, "tokenizer_config.json is not valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "tokenizer_config.json"),
        ("[" * 100 + "]" * 100, "tokenizer_config.json"),
        ("[]", "tokenizer_config.json|cannot be read"),
        ("\ufeff{}", "tokenizer_config.json is not valid JSON"),
        ('{"eos_token": "</s>", "eos_token": "</s>"}', "'eos_token' stands twice"),
        ({"sid_parts": {"catalog": {}}}, "tokenizer_config.json sets 'sid_parts'"),
        ({"catalog_file": "/etc/passwd"}, "tokenizer_config.json sets 'catalog_file'"),
        ({"manifest_file": "../x"}, "tokenizer_config.json sets 'manifest_file'"),
        ({"init_inputs": ["x"]}, "tokenizer_config.json sets 'init_inputs'"),
        ({"tokenizer_object": "x"}, "tokenizer_config.json sets 'tokenizer_object'"),
        ({"eos_token": 5}, "eos_token|cannot be read"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "cannot be read|invalid literal"),
        ({"added_tokens_decoder": []}, "cannot be read"),
        ({"extra_special_tokens": 5}, "cannot be read"),
    ],
)
def test_configurations_of_the_tokenizer_that_are_refused(folder, content, message):
    path = folder / "tokenizer_config.json"
    if isinstance(content, dict):
        edit_json(folder, path.name, lambda config: config | content)
    else:
        path.write_text(content)
    assert_refused(lambda: SIDTokenizer.from_pretrained(folder), message)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "named"]
)
def test_gigantic_files_that_no_manifest_vouches_for(folder, name):
    path = folder / name
    if name == "named":
        path = folder / "additional_chat_templates" / "named.jinja"
        path.parent.mkdir()
    with open(path, "wb") as file:
        file.truncate(3 * 2**30)  # a hole, which takes no disk
    tracemalloc.start()
    begin = time.process_time()
    assert_refused(lambda: SIDTokenizer.from_pretrained(folder), f"{path.name} holds 3221225472 bytes, more than the")
    assert time.process_time() - begin < 5 and tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()


def test_more_special_tokens_than_can_be_compared(folder):
    tokens = [f"<q{at}>" for at in range(10**5)]
    edit_json(folder, "tokenizer_config.json", lambda config: config | {"extra_special_tokens": tokens})
    begin = time.process_time()
    assert_refused(lambda: SIDTokenizer.from_pretrained(folder), "lists 100000 special tokens, more than the 32768")
    assert time.process_time() - begin < 5


def edit_token(state, spelling, **changes):
    state = copy.deepcopy(state)
    next(token for token in state["added_tokens"] if token["content"] == spelling).update(changes)
    return state


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: {"version": "1.0", "padding": "x" * 200}, "tokenizer.json"),
        (lambda state: state | {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "tokenizer.json"),
        (lambda state: state | {"model": {"type": "Evil"}}, "tokenizer.json"),
        (
            lambda state: state | {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
            "tokenizer.json",
        ),
        (lambda state: state | {"added_tokens": [5]}, "tokenizer.json"),
        (
            lambda state: state | {"added_tokens": state["added_tokens"][:-1]},
            "tokenizer.json lacks some of the catalog's SID tokens",
        ),
        (lambda state: edit_token(state, "<c_5>", content="<c_4>"), "tokenizer.json"),
        (
            lambda state: (
                state | {"model": state["model"] | {"vocab": state["model"]["vocab"] | {"<c_5>": 2**32 - 1}}}
            ),
            "tokenizer.json",
        ),
    ],
)
def test_tokenizer_files_that_are_refused(folder, change, message):
    edit_json(folder, "tokenizer.json", change)
    vouch(folder)
    begin = time.process_time()
    assert_refused(lambda: SIDTokenizer.from_pretrained(folder), message)
    assert time.process_time() - begin < 5


def test_a_deep_tokenizer_file(folder):
    (folder / "tokenizer.json").write_text('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}")
    vouch(folder)
    assert_refused(
        lambda: SIDTokenizer.from_pretrained(folder),
        "tokenizer.json or tokenizer_config.json cannot be read|not valid JSON",
    )


def test_an_end_token_that_is_a_sid_token(folder):
    for name in ("eos_token", "pad_token"):
        edit_json(folder, "tokenizer_config.json", lambda config, name=name: config | {name: "<a_0>"})
        special = {"eos_token": "</s>", "pad_token": "</s>"} | {name: "<a_0>"}
        vouch(folder, special_tokens=special)
        assert_refused(lambda: SIDTokenizer.from_pretrained(folder), f"{name}='<a_0>' is a SID token")
        edit_json(folder, "tokenizer_config.json", lambda config, name=name: config | {name: "</s>"})


def test_prompts_that_are_refused(folder):
    for change, message in (
        ({"prefix": ["<a_1>"]}, "sid_prompt.json puts SID tokens around prompts"),
        (
            {"suffix": ["<nowhere>"]},
            "sid_prompt.json puts '<nowhere>' around prompts, which tokenizer.json does not hold",
        ),
        ({"prefix": "</s>"}, "sid_prompt.json puts '</s>' around prompts, which is no list"),
        ({"prefix": [1]}, "sid_prompt.json puts \\[1\\] around prompts"),
        ({"prefix": ["\ud800"]}, "sid_prompt.json is not valid JSON .*half a surrogate pair"),
        ({"template": None}, "sid_prompt.json holds no prompt template"),
        ({"template": [1]}, "sid_prompt.json holds no prompt template"),
        ({"template": {"fields": []}}, "sid_prompt.json holds no prompt template"),
        ({"template": {"fields": ["x" * 10**6] * 2}}, "sid_prompt.json holds no prompt template"),
        ({"template": {"max_length": True}}, "sid_prompt.json holds no prompt template .*max_length"),
        ({"template": {"__class__": "x"}}, "sid_prompt.json holds no prompt template"),
        ({"code": "x"}, "sid_prompt.json holds code, which"),
    ):
        original = (folder / "sid_prompt.json").read_text()
        edit_json(folder, "sid_prompt.json", lambda prompt, change=change: prompt | change)
        vouch(folder)
        assert_refused(lambda: SIDTokenizer.from_pretrained(folder), message)
        (folder / "sid_prompt.json").write_text(original)


def test_text_encoders_of_ids_with_gaps():
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 2**31}, merges=[]))
    begin = time.process_time()
    with pytest.raises(ValueError, match="has 2 tokens, but ids up to 2147483648"):
        TextEncoder(backend, np.array([], dtype=int))
    assert time.process_time() - begin < 1  # writing such a vocabulary out takes minutes
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1000}, merges=[]))
    assert TextEncoder(backend, np.array([], dtype=int)).encode_batch(["ab"]) == [[0, 1000]]
