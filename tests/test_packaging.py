"""The wheel and what it declares, and the rules that the source files keep."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from importlib.metadata import requires
from pathlib import Path

import pytest
from fresh_process import run_fresh
from packaging.requirements import Requirement

import rqsid

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rqsid", "sid_tokenizer", "modeling", "trainer", "evaluate_metrics")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ids = [str(path.relative_to(ROOT)) for path in SOURCES]

CARD = "transformers datasets accelerate tokenizers huggingface-hub evaluate deepspeed safetensors".split()

# What files that travel to the Hub may import at the top, so that they open without the package.
HUB_THIRD_PARTY = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "tqdm", "huggingface_hub"}


def imports_of(tree, top_only=False):
    """(level, module) of each import: level 0 is absolute, 1 the same folder, 2 the folder above."""
    found = []
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


# Source files


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_dependencies_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    imports = imports_of(ast.parse(path.read_text(encoding="utf-8")))
    absolute = {name.split(".")[0] for level, name in imports if level == 0}
    # An absolute import of a sibling finds nothing once the package is installed, or another distribution's.
    assert not absolute & set(PACKAGES), f"absolute imports within the package: {absolute & set(PACKAGES)}"
    siblings = {name.split(".")[0] for level, name in imports if level >= 2}
    allowed = {
        "sid_tokenizer": set(),
        "modeling": {"sid_tokenizer"},
        "trainer": {"sid_tokenizer", "modeling", "evaluate_metrics"},
        "evaluate_metrics": set(),
        "rqsid": set(),
    }[package]
    assert siblings <= allowed, f"{package} imports {siblings - allowed}"
    assert max((level for level, _ in imports), default=0) <= 2


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parent.name == "sid_tokenizer"], ids=lambda p: p.name
)
def test_tokenizer_files_can_travel_to_the_hub(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for level, name in imports_of(tree):
        # transformers copies sibling files by a single dot and a single name; it finds nothing deeper.
        assert level <= 1, f"relative import {'.' * level}{name}"
        if level == 1:
            assert (path.parent / f"{name}.py").is_file(), f"{name} is no file of the same folder"
    top = {name.split(".")[0] for level, name in imports_of(tree, top_only=True) if level == 0}
    assert top - set(sys.stdlib_module_names) <= HUB_THIRD_PARTY


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_library_code_neither_prints_nor_asserts_nor_unpickles(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {name.split(".")[0] for level, name in imports_of(tree) if level == 0}
    assert not found & {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert vanishes under python -O"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print", f"line {node.lineno}: print"
            assert called not in ("torch.load", "torch.save"), f"line {node.lineno}: {called} pickles"
            assert called.split(".")[-1] not in ("load", "save") or not any(
                keyword.arg == "allow_pickle" for keyword in node.keywords
            ), f"line {node.lineno}: {called}(allow_pickle=…)"


def test_every_public_name_exists_and_is_documented():
    expected = """ResidualQuantizer ResidualQuantizerConfig diagnose TokenPruning ProductCatalog SIDTokenizer SIDTrie
        SIDLogitsProcessor search SIDTrainer SIDTrainingArguments SIDDataCollator""".split()
    assert set(expected) <= set(rqsid.__all__)
    assert len(set(rqsid.__all__)) == len(rqsid.__all__)
    for name in rqsid.__all__:
        # A dataclass without a docstring gets its signature as one.
        docstring = getattr(rqsid, name).__doc__
        assert docstring and not docstring.startswith(f"{name}("), f"{name} has no docstring"


def test_training_is_imported_when_it_is_asked_for():
    code = """
    import sys, rqsid
    from transformers import AutoConfig
    late = ("rqsid.trainer", "datasets", "evaluate", "pandas")
    late = [name for name in late if name in sys.modules and name not in sys.argv]
    assert not late, late
    assert set(rqsid.__all__) <= set(dir(rqsid)) and not hasattr(rqsid, "trained")
    assert type(AutoConfig.for_model("baichuan")) is rqsid.BaichuanConfig  # registered all the same
    from rqsid import SIDTrainer
    assert SIDTrainer is rqsid.SIDTrainer is rqsid.trainer.SIDTrainer is sys.modules["rqsid.trainer"].SIDTrainer
    names = {}
    exec("from rqsid import *", names)
    assert set(rqsid.__all__) <= set(names)
    """
    run_fresh(code, "pandas", libraries="torch", check=True)  # pandas is in the template


def test_checkers_of_types_see_what_is_imported_later():
    tree = ast.parse((ROOT / "rqsid" / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    assert {alias.name for node in checked.body for alias in node.names} == rqsid._OF_TRAINER <= set(rqsid.__all__)


# Declarations


def test_setup_lists_every_package_on_disk():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assignments = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    listed = ast.literal_eval(assignments["PACKAGES"])
    folders = {str(path.parent.relative_to(ROOT)) for path in SOURCES}
    assert set(listed.values()) == folders
    for name, folder in listed.items():
        assert name == ("rqsid" if folder == "rqsid" else "rqsid." + folder.replace("/", "."))


def test_versions_and_changelog_agree():
    citation, changelog = ROOT / "CITATION.cff", ROOT / "CHANGELOG.md"
    if citation.exists():
        for version in re.findall(
            r"^version:\s*[\"']?([^\"'\s]+)", citation.read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert version == rqsid.__version__
    if changelog.exists():
        text = changelog.read_text(encoding="utf-8")
        released = rqsid.__version__.split(".dev")[0]
        # While a version is in development its changes may stand under "Unreleased".
        headings = re.findall(r"^## .*$", text, re.MULTILINE)
        assert any(released in heading or "unreleased" in heading.lower() for heading in headings)
        assert ".dev" in rqsid.__version__ or any(released in heading for heading in headings)


def test_third_party_imports_are_declared():
    declared = {Requirement(line).name.replace("-", "_").lower() for line in requires("rqsid") if "extra" not in line}
    for path in SOURCES:
        if path.name == "app.py":
            continue  # runs as a Space, with requirements.txt of its own
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {name.split(".")[0] for level, name in imports_of(tree, top_only=True) if level == 0}
        third_party = names - set(sys.stdlib_module_names) - {"tqdm"}  # a dependency of transformers and datasets
        assert third_party <= declared, f"{path.name} imports {third_party - declared}"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy: a build leaves folders beside the sources, and takes stale files from those of the last one.
    # Tests and examples come along, since they must stay out of the wheel by themselves.
    source = tmp_path_factory.mktemp("source")
    for folder in (*PACKAGES, "tests", "examples"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_one_package_and_all_of_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata_name = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = BytesParser().parsebytes(archive.read(metadata_name))
        top_level = archive.read(metadata_name.replace("METADATA", "top_level.txt")).decode().split()
    assert top_level == ["rqsid"]
    assert {name.split("/")[0] for name in names} == {"rqsid", metadata_name.split("/")[0]}

    files = {name for name in names if name.startswith("rqsid/")}
    expected = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    expected = {name if name.startswith("rqsid/") else f"rqsid/{name}" for name in expected}
    for module in ("sid_retrieval", "sid_distribution"):
        expected.add(f"rqsid/evaluate_metrics/{module}/README.md")
    assert expected <= files
    assert not [name for name in files - expected if not name.endswith(("README.md", "requirements.txt", ".typed"))]
    assert not [name for name in names if "test" in name.lower()]

    assert metadata["Name"] == "rqsid" and metadata["Version"] == rqsid.__version__
    assert metadata["License"] == "Apache-2.0" or metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert set(CARD) <= {requirement.name for requirement in requirements}
    # Installed with everything but deepspeed, which needs a compiler and is an extra.
    always = {requirement.name for requirement in requirements if requirement.marker is None}
    assert set(CARD) - always == {"deepspeed"}
    transformers = next(requirement for requirement in requirements if requirement.name == "transformers")
    assert "4.57.0" not in transformers.specifier and "5.23.0" in transformers.specifier


TINY_ROAD = """
import sys
from pathlib import Path
import evaluate, numpy as np, rqsid
from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, TokenPruning
target = Path(sys.argv[1]).resolve()
for module in list(sys.modules.values()):
    if module.__name__.split(".")[0] == "rqsid":
        assert Path(module.__file__).resolve().is_relative_to(target), module.__file__
embeddings = np.random.default_rng(0).standard_normal((60, 4), dtype=np.float32)
quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[4, 4, 4], num_iterations=3)).fit(embeddings)
codes = quantizer.encode(embeddings)
pruning = TokenPruning(strategy="top_k", layer=1, top_k=1).fit(codes, quantizer.codebook_sizes)
catalog = ProductCatalog.build([f"p{row}" for row in range(60)], codes, quantizer.codebook_sizes, pruning)
assert catalog.product_ids(catalog.product_rows(["p7", "p59"])) == ["p7", "p59"]
assert set(catalog.lengths().tolist()) == {2, 3}
metric = evaluate.load(rqsid.metric_path("sid_retrieval"))
scores = metric.compute(predictions=[["p1", "p2"], ["p3", "p1"]], references=["p2", "p3"], ks=(1, 2), ndcg_ks=(2,))
assert scores["item_recall@1"] == 0.5 and scores["item_mrr"] == 0.75, scores
evaluate.load(rqsid.metric_path("sid_distribution"))
print("version", rqsid.__version__)
"""


@pytest.mark.slow
def test_the_installed_wheel_works_on_its_own(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    command += ["--disable-pip-version-check", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in target.iterdir()} == {"rqsid", f"rqsid-{rqsid.__version__}.dist-info", "bin"}
    assert [path.name for path in (target / "bin").iterdir()] == ["rqsid"]
    # PYTHONPATH comes before an editable installation, and a cache of its own keeps other copies of the metrics away.
    environment = os.environ | {"PYTHONPATH": str(target), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = run_fresh(TINY_ROAD, target, cwd=tmp_path, env=environment, check=True)
    assert done.stdout.split() == ["version", rqsid.__version__]
