"""Cards: what they say, and whose they are."""

import re
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from published_parts import SIZES, card_of

from rqsid import (
    TokenPruning,
    diagnose,
)
from rqsid.sid_tokenizer import card_push
from rqsid.sid_tokenizer.card_push import generated_comment
from rqsid.sid_tokenizer.card_sections import (
    as_code,
    citation,
    describe_pruning,
    diagnose_catalog,
    layout_section,
    library_versions,
    save_figure,
)

pytestmark = pytest.mark.usefixtures("quick_figures")
MODEL_CARD = "---\nlicense: mit\ntags:\n- finetuned\n---\n# A model, and what I think of it\r\n"

one_base = pytest.mark.parametrize("base_tokenizer", ["llama"], indirect=True)


def test_cards_of_others_keep_their_text(hub, hub_client, quantizers):
    quantizer = quantizers["kmeans"]
    quantizer.push_to_hub("alice/codebook", tags=["one"])
    ours = card_of(hub, "alice/codebook").content
    quantizer.push_to_hub("alice/codebook", tags=["two"])  # ours is written anew
    assert "two" in card_of(hub, "alice/codebook").data.tags and "one" not in card_of(hub, "alice/codebook").data.tags
    edited = ours.replace(generated_comment("codebook") + "\n", "").replace("# codebook", "# My codebook")
    hub_client.upload_file(repo_id="alice/codebook", path_in_repo="README.md", path_or_fileobj=edited.encode())
    quantizer.push_to_hub("alice/codebook")
    assert hub.files("alice/codebook")["README.md"].decode() == edited
    quantizer.push_to_hub("alice/codebook", tags=["two", "semantic-ids"])
    card = card_of(hub, "alice/codebook")
    assert "# My codebook" in card.text and {"one", "two"} < set(card.data.tags)
    assert card.data.tags.count("semantic-ids") == 1


@pytest.mark.parametrize("status", [403, 429, 503])
def test_a_card_that_cannot_be_asked_for_is_not_taken_for_none(hub, hub_client, quantizers, status):
    quantizers["kmeans"].push_to_hub("alice/codebook")
    hub_client.upload_file(repo_id="alice/codebook", path_in_repo="README.md", path_or_fileobj=b"# Mine")
    commits = hub.commits("alice/codebook")
    hub.fail(status=status, path="/resolve/.*README.md", times=None)
    with pytest.raises(PermissionError if status == 403 else ConnectionError, match=str(status)) as caught:
        quantizers["priced"].push_to_hub("alice/codebook")
    assert "\n" not in str(caught.value)
    assert hub.commits("alice/codebook") == commits
    hub.stop_failing()
    quantizers["priced"].push_to_hub("alice/codebook")
    assert hub.files("alice/codebook")["README.md"] == b"# Mine"


@pytest.mark.parametrize("when", ["while it is saved", "while it is uploaded"])
def test_a_card_written_during_a_push_is_kept(hub, hub_client, quantizers, monkeypatch, when):
    quantizer = quantizers["kmeans"]
    quantizer.push_to_hub("alice/codebook")
    written = []

    def after_writing(function):
        def call(*args, **kwargs):
            if not written:
                written.append(True)
                hub_client.upload_file(repo_id="alice/codebook", path_in_repo="README.md", path_or_fileobj=b"# Mine")
            return function(*args, **kwargs)

        return call

    if when == "while it is saved":
        monkeypatch.setattr(card_push, "push_folder", after_writing(card_push.push_folder))
    else:
        # upload_file above makes a commit of its own, which is no part of the push.
        create_commit = huggingface_hub.HfApi.create_commit
        monkeypatch.setattr(
            huggingface_hub.HfApi,
            "create_commit",
            lambda self, *args, **kwargs: after_writing(create_commit)(self, *args, **kwargs),
        )
    diagnosis = diagnose(np.zeros((3, 3), dtype=int), SIZES)
    quantizer.push_to_hub("alice/codebook", diagnosis=diagnosis, license="mit")
    assert written and (412 in [request.status for request in hub.requests]) == (when != "while it is saved")
    files = hub.files("alice/codebook")
    assert files["README.md"] == b"# Mine" and "sid_layers.png" not in files


@one_base
def test_sections(make_tokenizer, base_tokenizer, embeddings, quantizers, monkeypatch, tmp_path):
    tokenizer = make_tokenizer(token_format="<|{letter}`{code}|>", layer_order=[1, 0, 2])
    section = layout_section(tokenizer)
    assert "| a (0) | 8 | `` <\\|a`0\\|> `` … `` <\\|a`7\\|> `` |" in section
    assert "in the order b, a, c, suffix." in section
    assert "The 2 most frequent codes of layer b (1) are left out" in section
    assert f"| distinct SIDs | {tokenizer.catalog.num_sids:,} |" in section
    report = tokenizer.catalog.collision_report()
    assert f"| item-level Recall@1 cannot exceed | {report.recall_ceiling[1]:.4f} |" in section

    codes = quantizers["kmeans"].encode(embeddings)
    for rule, match in (
        (TokenPruning("none"), "Nothing is pruned: a SID has a token of each layer."),
        (TokenPruning("drop_layer"), "Layer b (1) is left out of all SIDs."),
        (TokenPruning("top_k", layer=0, top_k=1), "The most frequent code of layer a (0) is left out."),
        (TokenPruning("threshold", layer=1, threshold=0.25), "it takes for 25.0% of what they were counted by"),
        (
            TokenPruning("top_k", layer="auto", top_k=1),
            "no middle layer was found|least balanced of the middle layers",
        ),
    ):
        assert re.search(match.replace("(", r"\(").replace(")", r"\)"), describe_pruning(rule.fit(codes, SIZES)))

    # Once per version of the catalog.
    diagnosis = diagnose_catalog(tokenizer.catalog, tokenizer.cache)
    assert diagnose_catalog(tokenizer.catalog, tokenizer.cache) is diagnosis
    assert diagnosis.to_dict() == diagnose(codes, SIZES).to_dict()
    tokenizer.catalog.withdraw(["p1"])
    assert diagnose_catalog(tokenizer.catalog, tokenizer.cache) is not diagnosis
    assert "90, 1 of them withdrawn" in layout_section(tokenizer)
    assert as_code("a") == "`a`" and as_code("a\nb|``") == "``` a b\\|`` ```"
    assert library_versions(("torch", "no-such-library")) == {"torch": library_versions()["torch"]}

    # Equal diagnoses make equal figures, which are not pushed again.
    monkeypatch.undo()
    figures = [tmp_path / name for name in ("1.png", "2.png")]
    assert all(save_figure(diagnosis, str(path)) for path in figures)
    assert figures[0].read_bytes() == figures[1].read_bytes() and figures[0].read_bytes()[1:4] == b"PNG"

    # Without matplotlib there is no figure, which is no error.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not save_figure(diagnosis, str(tmp_path / "x.png")) and not (tmp_path / "x.png").exists()


def test_the_citation_is_that_of_the_repository():
    cff = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())
    paper, text = cff["preferred-citation"], " ".join(citation().split())
    for part in (
        cff["title"],
        paper["title"],
        paper["doi"],
        paper["url"],
        str(paper["year"]),
        paper["collection-title"],
    ):
        assert part in text
    assert " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]) in text
