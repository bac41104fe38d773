"""examples/publish.py, on what a SIDTrainer leaves: what it prints, what it publishes, and that the card's lines run."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from rqsid import (
    ProductCatalog,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    SIDTokenizer,
    SIDTrainer,
    SIDTrainingArguments,
    initialize_sid_rows,
    save_custom_generate,
    search,
)
from rqsid.modeling import save_pipeline_code

SCRIPT = Path(__file__).parents[2] / "examples" / "publish.py"
ROWS = [{"history": [f"p{row}"], "query": "milk", "product": f"p{row + 1}"} for row in range(8)]

pytestmark = pytest.mark.parametrize(
    "base_tokenizer, make_tiny_model", [("qwen", "qwen")], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("example_publish", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def run(base_tokenizer, make_tiny_model, tmp_path_factory):
    random = np.random.default_rng(0)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[8, 8, 8], num_iterations=2))
    quantizer.fit(random.standard_normal((100, 6), dtype=np.float32))
    catalog = ProductCatalog.build([f"p{row}" for row in range(40)], random.integers(0, 8, (40, 3)), [8, 8, 8])
    tokenizer = SIDTokenizer.from_base(base_tokenizer, catalog, quantizer)
    model = make_tiny_model(tokenizer.base_size)
    initialize_sid_rows(model, tokenizer)
    folder = tmp_path_factory.mktemp("runs") / "night-7"
    arguments = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none", "eval_top_k": 5}
    trainer = SIDTrainer(
        model, SIDTrainingArguments(str(folder), **arguments), ROWS, ROWS[:4], processing_class=tokenizer
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rqsid.sid_tokenizer.card_sections.plot_layers", no_figure)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        trainer.create_model_card()
    return folder


def no_figure(*args, **kwargs):
    raise ImportError("matplotlib takes longer than all else here")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("rqsid.sid_tokenizer.card_sections.plot_layers", no_figure)


def test_a_run_of_the_trainer(hub, hub_client, main, run, capsys):
    command = [str(run), "org/shop", "--codebook", "org/codes", "--collection", "My shop", "--private", "--tag", "v1"]
    capsys.readouterr()
    assert main([*command, "--license", "mit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        *("codebook", "sid_retrieval", "sid_distribution", "model", "collection")
    ]
    commit = hub.commits("org/shop")[0]["id"]
    assert lines[3] == f"model: {hub.endpoint}/org/shop at {commit[:7]}"
    assert hub.refs("org/shop")["tags"]["v1"] == commit and hub_client.model_info("org/shop").private

    files = hub.files("org/shop")
    assert "training_args.json" in files and str(run.parent).encode() not in b"".join(files.values())
    assert not [name for name in files if "checkpoint" in name and name != "fit_checkpoint.py"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.model_name == "shop" and card.data.eval_results
    assert "night-7" not in card.text and card.text.count("org/codes") and "\n# shop\n" in card.text
    assert card.data["sid_codebook"]["revision"] == hub.commits("org/codes")[0]["id"]

    # The card's own lines, from the Hub.
    blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(blocks) == 2 and "import rqsid" not in blocks[1] and "also without rqsid:" in card.text
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), SIDTokenizer.from_pretrained(run)
    for block in blocks:
        before, call = block.rstrip("\n").rsplit("\n", 1)
        namespace = {}
        exec(before, namespace)
        found = eval(call, namespace)
        (example,) = eval(re.search(r"\[\{.*?\}\]", call)[0])
        expected = search(model, tokenizer, [example], top_k=10)
        assert [hit["product_id"] for hit in found[0]] == [hit["product_id"] for hit in expected[0]]

    # Once more, and a checkpoint upon it.
    uploaded = hub.uploaded_bytes
    assert main([*command, "--license", "mit"]) == 0 and capsys.readouterr().out.splitlines() == lines
    assert hub.uploaded_bytes == uploaded
    assert main([str(run / "checkpoint-1"), "org/shop", "--no-metrics", "--revision", "early"]) == 0
    assert capsys.readouterr().out.startswith("model: ")
    early = AutoModelForCausalLM.from_pretrained("org/shop", revision="early").state_dict()
    saved = AutoModelForCausalLM.from_pretrained(run / "checkpoint-1").state_dict()
    assert all((early[name] == saved[name]).all() for name in saved)
    assert "optimizer.pt" not in hub.files("org/shop", revision="early")


def test_errors_are_one_line(hub, hub_client, main, run, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        capsys.readouterr()
        assert main(list(arguments)) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and "hf_" not in captured.err
        return captured.err

    assert "There is no folder" in refused(str(tmp_path / "nothing"), "org/shop")
    assert "has no sid_manifest.json" in refused(str(tmp_path), "org/shop")
    assert "Repo id" in refused(str(run), "org/a/b")
    assert main([str(run), "org/tagged", "--no-metrics", "--tag", "v1"]) == 0
    checkpoint = str(run / "checkpoint-1")
    assert main([checkpoint, "org/tagged", "--no-metrics"]) == 0
    assert "has a tag 'v1' already" in refused(str(run), "org/tagged", "--no-metrics", "--tag", "v1")
    hub.fail(status=500, path=r".*", times=50)
    assert "did not come to its end" in refused(str(run), "org/shop")
    hub.stop_failing()
    monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    assert "may not" in refused(str(run), "org/shop", "--no-metrics")
    with pytest.raises(SystemExit):
        main([str(run)])


def test_code_needs_a_model(hub, run, tmp_path):
    """What `publish_run` writes, by hand: named in the config when all of it is there."""
    with pytest.raises(ValueError, match="no .*config.json that could name the pipeline.*merged"):
        save_pipeline_code(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json must hold a JSON object"):
        save_pipeline_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"}')
    written = save_pipeline_code(tmp_path)
    assert written[-1] == str(tmp_path / "config.json") and '"mine.Config"' in (tmp_path / "config.json").read_text()
    assert {Path(path).name for path in written} == {path.name for path in tmp_path.iterdir()}
    code = {Path(path).name for path in save_custom_generate(tmp_path)} - {"README.md", "generate.py"}
    assert code <= {path.name for path in tmp_path.iterdir()}
