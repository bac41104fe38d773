import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rqsid import ProductCatalog, PromptTemplate, ResidualQuantizer, ResidualQuantizerConfig, SIDTokenizer
from rqsid.sid_tokenizer import bundle, files
from rqsid.sid_tokenizer.files import (
    check_file,
    checksum,
    file_entry,
    read_json,
    read_tensors,
    replace_atomically,
    write_json,
    write_tensors,
)

FILES = [
    "tokenizer.json",
    "sid_codebook.safetensors",
    "sid_catalog.safetensors",
    "sid_prompt.json",
    "sid_manifest.json",
]


def small_base(end="</s>"):
    pieces = {letter: at for at, letter in enumerate([end, *"abcdefghijklmnopqrstuvwxyz:<>_/ "])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=pieces, merges=[])), eos_token=end)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, make_parts):
    """Two folders whose files differ one by one."""
    folders = []
    for seed, end in enumerate(["</s>", "<end>"]):
        _, quantizer, catalog = make_parts(seed=seed)
        template = PromptTemplate(answer=f"Answer {seed}:")
        tokenizer = SIDTokenizer.from_base(small_base(end), catalog, quantizer, prompt_template=template)
        folders.append(tmp_path_factory.mktemp("bundle"))
        tokenizer.save_pretrained(folders[-1])
    return folders


@pytest.fixture
def folder(bundles, tmp_path):
    shutil.copytree(bundles[0], tmp_path / "bundle")
    return tmp_path / "bundle"


def assert_refused(folder, *words):
    """With a ValueError that names the file; any other kind of error fails the test."""
    with pytest.raises(ValueError) as caught:
        SIDTokenizer.from_pretrained(folder)
    assert type(caught.value) is ValueError
    for word in words:
        assert word in str(caught.value)


def test_the_untouched_copy_loads(folder):
    SIDTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_file(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    assert_refused(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_longer_file(folder, name):
    with open(folder / name, "ab") as file:
        file.write(b"x")
    assert_refused(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte(folder, name):
    content = (folder / name).read_bytes()
    random = np.random.default_rng(0)
    for position in [0, len(content) - 2, *random.integers(0, len(content), 12)]:
        for mask in (0x01, 0x04):
            changed = bytearray(content)
            changed[position] ^= mask
            (folder / name).write_bytes(changed)
            assert_refused(folder, name)
    (folder / name).write_bytes(content)
    SIDTokenizer.from_pretrained(folder)


def test_every_flip_of_the_manifest(folder):
    """Nothing else vouches for the manifest, so that each of its bytes is tried, without the tokenizer around it."""
    path = folder / "sid_manifest.json"
    content = path.read_bytes()
    files = {name: str(folder / name) for name in FILES}
    bundle.read_bundle(str(path), files)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="sid_manifest.json"):
            bundle.read_bundle(str(path), files)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(folder, name):
    os.remove(folder / name)
    assert_refused(folder, name)


@pytest.mark.parametrize("name", FILES[:-1])
def test_file_of_another_bundle(bundles, folder, name):
    shutil.copy(bundles[1] / name, folder / name)
    assert_refused(folder, name)


def test_manifest_of_another_bundle(bundles, folder):
    shutil.copy(bundles[1] / "sid_manifest.json", folder)
    assert_refused(folder, "manifest")  # which of the files are the strangers cannot be known


def test_tokenizer_config_missing_or_of_another_bundle(bundles, folder):
    shutil.copy(bundles[1] / "tokenizer_config.json", folder)
    assert_refused(folder, "tokenizer_config.json", "'<end>'", "'</s>'")
    os.remove(folder / "tokenizer_config.json")
    assert_refused(folder, "tokenizer_config.json", "None")


def test_plain_tokenizer_folder(tmp_path):
    small_base().save_pretrained(tmp_path)
    assert_refused(tmp_path, "There is no sid_manifest.json", "from_base")


def edit_manifest(folder, renew=True, **changes):
    """Changes entries (None removes one); `renew` makes the checksum fit again."""
    manifest = json.loads((folder / "sid_manifest.json").read_text())
    manifest = {key: value for key, value in (manifest | changes).items() if value is not None}
    if renew:
        manifest.pop("checksum")
        manifest["checksum"] = checksum(manifest)
    (folder / "sid_manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_manifest_of_another_version(folder, version):
    edit_manifest(folder, renew=False, format_version=version)
    assert_refused(folder, "sid_manifest.json has format version", "reads 1")


def manifest_keys(folder):
    return set(json.loads((folder / "sid_manifest.json").read_text())) - {"format_version"}


def test_manifest_without_a_key(bundles, folder):
    for key in manifest_keys(folder):
        shutil.copy(bundles[0] / "sid_manifest.json", folder)
        edit_manifest(folder, renew=False, **{key: None})
        assert_refused(folder, "sid_manifest.json", f"lacks {key}")


def test_manifest_with_another_value(bundles, folder):
    for key in manifest_keys(folder):
        shutil.copy(bundles[0] / "sid_manifest.json", folder)
        edit_manifest(
            folder, renew=False, **{key: {"tokenizer.json": 1, "sid_catalog.safetensors": 1, "sid_prompt.json": 1}}
        )
        assert_refused(folder, "sid_manifest.json", "checksum")


def test_manifest_that_contradicts_the_files_but_has_a_fitting_checksum(bundles, folder):
    changes = {
        "codebook_sizes": [4, 5, 7],
        "suffix_size": 3,
        "products": 61,
        "sids": 1,
        "layer_order": [0, 2, 1],
        "pruning": {},
        "files": {},
    }
    for key, value in changes.items():
        shutil.copy(bundles[0] / "sid_manifest.json", folder)
        edit_manifest(folder, **{key: value})
        assert_refused(folder, key if key != "files" else "sid_manifest.json")


@pytest.mark.parametrize("content", ["[]", "null", "", "{", '{"format_version": 1', "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["sid_manifest.json"])
def test_manifest_that_is_no_json_object(folder, name, content):
    (folder / name).write_text(content)
    assert_refused(folder, name)


def replace_file(folder, name):
    """Lets the manifest vouch for the present content of a file."""
    manifest = json.loads((folder / "sid_manifest.json").read_text())
    edit_manifest(folder, files=manifest["files"] | {name: file_entry(str(folder / name))})


@pytest.mark.parametrize("content", [{}, {"template": {}}, {"template": {"unknown": 1}, "prefix": []}, {"prefix": []}])
def test_prompt_file_that_the_manifest_vouches_for(folder, content):
    (folder / "sid_prompt.json").write_text(json.dumps(content))
    replace_file(folder, "sid_prompt.json")
    assert_refused(folder, "sid_prompt.json")


def test_codebooks_that_the_manifest_vouches_for(bundles, folder, make_parts):
    path = folder / "sid_codebook.safetensors"
    names = [f"codebook_{layer}" for layer in range(3)]
    tensors, config = read_tensors(path, names)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    bad = [
        (tensors | {"codebook_1": tensors["codebook_1"][:-1]}, config),
        (tensors | {"codebook_1": tensors["codebook_1"].long()}, config),
        (tensors | {"codebook_1": torch.full_like(tensors["codebook_1"], torch.nan)}, config),
        ({name: tensors[name] for name in names[:2]}, config),
        (tensors, config | {"codebook_sizes": [4, 5, 7]}),
        (tensors, {key: value for key, value in config.items() if key != "seed"}),
    ]
    for columns, settings in bad:
        write_tensors(path, columns, settings)
        replace_file(folder, path.name)
        assert_refused(folder, "sid_codebook.safetensors")


def test_codebooks_of_earlier_versions_load(bundles, folder):
    """Which knew five keys of the configuration, and neither prices nor scales."""
    path = folder / "sid_codebook.safetensors"
    names = [f"codebook_{layer}" for layer in range(3)]
    tensors, config = read_tensors(path, names)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    earlier = ("codebook_sizes", "embedding_dim", "num_iterations", "relocation_threshold", "seed")
    write_tensors(path, tensors, {key: config[key] for key in earlier})
    replace_file(folder, path.name)
    loaded, whole = (SIDTokenizer.from_pretrained(place).quantizer for place in (folder, bundles[0]))
    assert loaded.config.metric == "euclidean" and loaded.config.capacity is None and loaded.config.num_beams == 1
    points = np.random.default_rng(1).standard_normal((50, 6)).astype(np.float32)
    assert (loaded.encode(points) == whole.encode(points)).all()


@pytest.mark.parametrize(
    "config",
    [
        {"capacity": 1.2},
        {"normalize_residuals": True},
        {"metric": "cosine", "normalize_residuals": True, "capacity": 1.2},
        {"preset": "fast", "num_beams": 3, "init": "staged", "seed": 2**42 - 1},
    ],
)
def test_codebooks_with_prices_and_scales_round_trip(tmp_path, config):
    embeddings = np.random.default_rng(0).standard_normal((80, 6)).astype(np.float32)
    embeddings *= np.random.default_rng(1).uniform(0.5, 3, (80, 1)).astype(np.float32)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[4, 5, 6], **config)).fit(embeddings)
    codes = quantizer.encode(embeddings)
    catalog = ProductCatalog.build([f"p{row}" for row in range(80)], codes, quantizer.codebook_sizes)
    SIDTokenizer.from_base(small_base(), catalog, quantizer).save_pretrained(tmp_path)
    loaded = SIDTokenizer.from_pretrained(tmp_path).quantizer
    before, after = dict(quantizer.named_parameters()), dict(loaded.named_parameters())
    kinds = {name.split(".")[0] for name in before}
    assert ("prices" in kinds) == ("capacity" in config) and ("scales" in kinds) == ("normalize_residuals" in config)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded.encode(embeddings) == codes).all()
    np.testing.assert_array_equal(loaded.decode(codes), quantizer.decode(codes))
    for name in bundle.CODEBOOK_CONFIG + bundle.OPTIONAL_CODEBOOK_CONFIG:
        assert getattr(loaded.config, name) == getattr(quantizer.config, name), name


def test_tokenizer_without_one_sid_token_that_the_manifest_vouches_for(folder):
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<c_5>"]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    replace_file(folder, "tokenizer.json")
    assert_refused(folder, "tokenizer.json lacks some of the catalog's SID tokens")


STEPS = ["write_tensors", "write_catalog", "write_json", "file_entry", "checksum"]


@pytest.mark.parametrize("step", STEPS)
def test_failing_save_leaves_no_manifest(folder, tmp_path, monkeypatch, step):
    tokenizer = SIDTokenizer.from_pretrained(folder)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save_pretrained(tmp_path / "fresh")
    monkeypatch.undo()
    assert list((tmp_path / "fresh").iterdir()) == []


@pytest.mark.parametrize("step", STEPS)
def test_failing_save_over_another_bundle_leaves_it(bundles, folder, monkeypatch, step):
    tokenizer = SIDTokenizer.from_pretrained(bundles[1])

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(bundle, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save_pretrained(folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    SIDTokenizer.from_pretrained(folder)


def test_saving_with_a_prefix_is_refused(folder, tmp_path):
    tokenizer = SIDTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="filename_prefix='x'"):
        tokenizer.save_pretrained(tmp_path / "fresh", filename_prefix="x")


def test_replace_atomically(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replace_atomically(path) as temporary:
        assert os.path.dirname(temporary) == str(tmp_path)
        with open(temporary, "w") as file:
            file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]

    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error):
            with replace_atomically(path) as temporary:
                with open(temporary, "w") as file:
                    file.write("half")
                raise error
        assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]

    with pytest.raises(FileNotFoundError):
        with replace_atomically(tmp_path / "no folder" / "file"):
            pass


def test_written_files_have_the_usual_permissions(tmp_path):
    write_json(tmp_path / "ours", {})
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_failing_rename_leaves_no_temporary(tmp_path, monkeypatch):
    def fail(*args):
        raise PermissionError

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(PermissionError):
        write_json(tmp_path / "file", {"a": 1})
    assert os.listdir(tmp_path) == []


def test_json_round_trip_and_limits(tmp_path):
    content = {"ü": ["漢", 1.5, None, True], "a": {"b": []}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    with pytest.raises(ValueError, match="x.json holds .* bytes, more than the 5"):
        read_json(tmp_path / "x.json", max_bytes=5)
    (tmp_path / "x.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="x.json is not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(TypeError):
        write_json(tmp_path / "y.json", {"a": {1}})
    assert sorted(os.listdir(tmp_path)) == ["x.json"]


def test_tensor_round_trip(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1],  # not contiguous
        "b": torch.arange(4.0).reshape(2, 2).T,
        "c": np.zeros((0, 3), dtype=np.uint8),
    }
    write_tensors(tmp_path / "x.safetensors", arrays, {"k": [1, "ü"]})
    tensors, config = read_tensors(tmp_path / "x.safetensors", ["a", "b", "c"])
    assert config == {"k": [1, "ü"]}
    for name, array in arrays.items():
        assert np.array_equal(tensors[name].numpy(), np.asarray(array)) and tensors[name].shape == array.shape
    with pytest.raises(ValueError, match="x.safetensors lacks d, e"):
        read_tensors(tmp_path / "x.safetensors", ["a", "e", "d"])


def test_check_file_and_checksum(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    entry = file_entry(path)
    assert entry == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    check_file(path, entry)
    for content in (b"abd", b"ab", b"abcd"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file (holds|differs)"):
            check_file(path, entry)
    assert checksum({"a": 1, "b": [2]}) == checksum({"b": [2], "a": 1}) != checksum({"a": 1, "b": [3]})


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_edited_special_tokens_are_refused(folder, name):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "<a_0>"}))
    with pytest.raises(ValueError, match=f"tokenizer_config.json gives {name}='<a_0>'"):
        SIDTokenizer.from_pretrained(folder)


def test_a_truncated_tokenizer_config_is_named(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        SIDTokenizer.from_pretrained(folder)
