import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

OPTIONS = {"dim": 16, "num_epochs": 8, "batch_size": 64}


@pytest.fixture(scope="module")
def purchases(purchases_module, make_frames):
    return purchases_module.build_purchases(**make_frames(), targets_per_basket=10)


@pytest.fixture(scope="module")
def tower(dual_tower_module, purchases):
    return dual_tower_module.train_dual_tower(purchases.train, purchases.products, **OPTIONS)


def test_loss_by_hand(dual_tower_module):
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    products = torch.tensor([[2.0, 0.0], [0.0, 3.0], [2.0, 0.0]])
    labels = torch.tensor([4, 1, 4])
    log_probabilities = torch.log(torch.tensor([0.1, 0.2, 0.1, 0.2, 0.4]))
    # A feature dict stands for its embeddings: the model hands back what it gets.
    loss = dual_tower_module.SampledSoftmaxLoss(lambda features: features, log_probabilities, scale=2.0)
    found = loss([{"sentence_embedding": queries}, {"sentence_embedding": products}], labels)

    # scale * inner product, divided by the share, against the batch's other products; rows 0 and 2 are product 4.
    row_0 = math.exp(4) / 0.4 / (math.exp(4) / 0.4 + math.exp(0) / 0.2)
    row_1 = math.exp(6) / 0.2 / (math.exp(6) / 0.2 + 2 * math.exp(0) / 0.4)
    row_2 = math.exp(4) / 0.4 / (math.exp(4) / 0.4 + math.exp(6) / 0.2)
    assert found.item() == pytest.approx(-(math.log(row_0) + math.log(row_1) + math.log(row_2)) / 3, rel=1e-5)


def test_tokenizing_once_is_tokenizing(dual_tower_module, tower, purchases):
    texts = dual_tower_module._query_texts(purchases.train, purchases.products)[:5] + ["nothing known", ""]
    expected = tower[0].preprocess(texts)
    found = dual_tower_module._token_bags(dual_tower_module._tokenize(tower[0], texts).to_pylist())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_texts(dual_tower_module, purchases):
    row = purchases.products["product_id"][:].index("101")
    assert dual_tower_module._product_texts(purchases.products)[row] == (
        "pid_101 mfr_1 type_tortilla_chips category_bag_snacks line_1_tortilla_chips size_10_oz brand_national "
        "tortilla chips"
    )
    # 101 and 106 are tortilla chips, 100 and 102 are not; 106 was bought last.
    example = {"profile": "age 65+, income 50-74k", "query": "tortilla chips", "history": ["101", "100", "106", "102"]}
    examples = {column: [value] for column, value in example.items()}
    assert dual_tower_module._query_texts(examples, purchases.products) == [
        "type_tortilla_chips tortilla chips profile_age_65+ profile_income_50-74k pid_101 pid_106 pid_106"
    ]


def test_embeddings(dual_tower_module, tower, purchases):
    products = dual_tower_module.embed_products(tower, purchases.products)
    queries = dual_tower_module.embed_queries(tower, purchases.test, purchases.products)
    assert products.shape == (len(purchases.products), 16) and products.dtype == np.float32
    assert queries.shape == (len(purchases.test), 16) and queries.dtype == np.float32
    for embeddings in (products, queries):
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert dual_tower_module.duplicate_share(products) == 0


def test_it_learns_types_and_habits(dual_tower_module, tower, purchases):
    products = dual_tower_module.embed_products(tower, purchases.products)
    queries = dual_tower_module.embed_queries(tower, purchases.test, purchases.products)
    types = np.array(purchases.products["type"][:])
    best = np.argmax(queries @ products.T, axis=1)
    # Five types of similar size: an untrained tower is right about one time in five.
    assert np.mean(types[best] == np.array(purchases.test["query"][:])) > 0.95


def test_training_repeats_and_sees_nothing_of_later_periods(
    dual_tower_module, purchases_module, make_frames, tower, purchases
):
    later = purchases_module.build_purchases(**make_frames(validation=5, test=5), targets_per_basket=10)
    assert later.test.to_dict() != purchases.test.to_dict()
    again = dual_tower_module.train_dual_tower(later.train, later.products, **OPTIONS)
    assert again[0].tokenizer.to_str() == tower[0].tokenizer.to_str()
    assert torch.equal(again[0].embedding.weight, tower[0].embedding.weight)
    other = dual_tower_module.train_dual_tower(purchases.train, purchases.products, seed=1, **OPTIONS)
    assert other[0].embedding.weight.shape == tower[0].embedding.weight.shape
    assert not torch.equal(other[0].embedding.weight, tower[0].embedding.weight)


def test_saved_and_loaded(dual_tower_module, tower, purchases, tmp_path):
    tower.save_pretrained(str(tmp_path))
    loaded = dual_tower_module.train_dual_tower(purchases.train, purchases.products, encoder=str(tmp_path))
    for embed in (
        lambda model: dual_tower_module.embed_products(model, purchases.products),
        lambda model: dual_tower_module.embed_queries(model, purchases.test, purchases.products),
    ):
        np.testing.assert_array_equal(embed(loaded), embed(tower))


def test_an_encoder_reads_titles(dual_tower_module, purchases, tmp_path):
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(purchases.products["title"][:], trainer)
    static = dual_tower_module.StaticEmbedding(tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save_pretrained(str(tmp_path))

    model = dual_tower_module.train_dual_tower(purchases.train, purchases.products, encoder=str(tmp_path))
    assert torch.equal(model[0].embedding.weight.cpu(), static.embedding.weight.cpu())
    titles = purchases.products["title"][:]
    embeddings = dual_tower_module.embed_products(model, purchases.products)
    np.testing.assert_array_equal(embeddings, model.encode(titles))
    queries = dual_tower_module.embed_queries(model, purchases.test, purchases.products)
    np.testing.assert_array_equal(queries, model.encode(purchases.test["query"][:]))


def test_training_refusals(dual_tower_module, purchases):
    train, products = purchases.train, purchases.products
    with pytest.raises(ValueError, match="1 examples in batches of 64"):
        dual_tower_module.train_dual_tower(train.select([0]), products, **OPTIONS)
    with pytest.raises(ValueError, match="in batches of 1 "):
        dual_tower_module.train_dual_tower(train, products, batch_size=1)
    target = train[0]["product"]
    without = products.filter(lambda row: row["product_id"] != target)
    with pytest.raises(ValueError, match=f"1 products of train are not in the catalogue, for instance '{target}'"):
        dual_tower_module.train_dual_tower(train, without)
    bought = next(row for row in purchases.test if row["history"])["history"][0]
    without = products.filter(lambda row: row["product_id"] != bought)
    with pytest.raises(ValueError, match="histories are not in the catalogue"):
        dual_tower_module.train_dual_tower(train.filter(lambda row: row["product"] != bought), without)


def test_duplicate_share(dual_tower_module):
    embeddings = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [1, 2], [3, 4], [3, 5]], dtype=np.float32)
    # (1, 2) three times and (3, 4) twice, of seven.
    assert dual_tower_module.duplicate_share(embeddings) == pytest.approx(5 / 7)
    assert dual_tower_module.duplicate_share(embeddings[:2]) == 0


def test_load_embeddings(dual_tower_module, tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 3))
    np.save(tmp_path / "a.npy", array)
    save_file({"anything": torch.tensor(array, dtype=torch.float32)}, tmp_path / "a.safetensors")
    save_file({"anything": torch.tensor(array, dtype=torch.bfloat16)}, tmp_path / "half.safetensors")
    for name, tolerance in (("a.npy", 0), ("a.safetensors", 0), ("half.safetensors", 0.01)):
        loaded = dual_tower_module.load_embeddings(tmp_path / name, 5)
        assert loaded.dtype == np.float32
        np.testing.assert_allclose(loaded, array.astype(np.float32), rtol=tolerance)
    assert dual_tower_module.load_embeddings(str(tmp_path / "a.npy"), 5).shape == (5, 3)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.ones(5), r"shape \(5,\)"),
        (np.ones((4, 3)), "4 rows for 5 products"),
        (np.array([[1.0], [2.0], [np.nan], [4.0], [np.inf]]), "2 rows are not finite in float32, the first is row 2"),
        (np.array([[1.0], [2.0], [3.0], [1e300], [5.0]]), "the first is row 3"),
        (np.array([["a"]] * 5), "not numbers"),
    ],
)
def test_load_embeddings_refusals(dual_tower_module, tmp_path, array, message):
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(ValueError, match=message):
        dual_tower_module.load_embeddings(tmp_path / "bad.npy", 5)


def test_load_embeddings_refuses_other_files(dual_tower_module, tmp_path):
    with pytest.raises(ValueError, match="suffix"):
        dual_tower_module.load_embeddings(tmp_path / "a.pt", 5)
    save_file({"a": torch.ones(5, 2), "b": torch.ones(5, 2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        dual_tower_module.load_embeddings(tmp_path / "two.safetensors", 5)
    np.save(tmp_path / "objects.npy", np.array([[{}]] * 5), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        dual_tower_module.load_embeddings(tmp_path / "objects.npy", 5)
