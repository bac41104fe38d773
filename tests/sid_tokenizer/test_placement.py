"""Which SIDs newcomers get, by hand; and everything that a changing catalog refuses."""

import numpy as np
import pytest
import torch

from rqsid import RQVAE, ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, RQVAEConfig, TokenPruning


def make_quantizer(*codebooks, **options):
    """A quantizer of the given codebooks, lists of numbers: all embeddings have one dimension."""
    sizes = [len(codebook) for codebook in codebooks]
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=sizes, embedding_dim=1, **options))
    for parameter, codebook in zip(quantizer.codebooks, codebooks, strict=True):
        parameter.data = torch.tensor(codebook, dtype=torch.float32)[:, None]
    return quantizer


QUANTIZER = make_quantizer([0, 10, 20], [0, 1, 3])


def build(codes, collisions="share", **options):
    codes = np.array(codes)
    ids = [chr(ord("a") + row) for row in range(len(codes))]
    return ProductCatalog.build(ids, codes, [3, 3], collisions=collisions, quantizer=QUANTIZER, **options)


def sids(catalog, ids):
    """As strings of digits, `.` where there is no code."""
    rows = catalog.sid_rows(catalog.product_rows(list(ids)))
    return ["".join("." if code < 0 else str(code) for code in row).rstrip(".") for row in catalog.sid_codes[rows]]


def names(catalog, sid):
    """Ids of the products of a SID given as its digits."""
    codes = [[-1 if digit == "." else int(digit) for digit in sid.ljust(3, ".")]]
    return "".join(catalog.product_ids(catalog.products_of(catalog.find_sids(codes)[0])))


def test_a_newcomer_shares_what_has_no_suffix():
    catalog = build([[0, 0], [1, 1]], popularity=[2, 5])
    rows = catalog.append(["c", "d", "e"], [[0, 0], [2, 2], [0, 0]], popularity=[3, 0, 2])
    assert rows.tolist() == [2, 3, 4] and rows.dtype == np.int64
    assert sids(catalog, "abcde") == ["00", "11", "00", "22", "00"]
    assert names(catalog, "00") == "cae" and names(catalog, "11") == "b"  # ties: who was there first


def test_suffixes_continue_in_order_of_popularity():
    catalog = build([[0, 0], [0, 0], [1, 1]], "suffix", popularity=[1, 2, 0], suffix_size=5)
    assert sids(catalog, "abc") == ["001", "000", "11"]
    catalog.append(["d", "e", "f", "g", "h"], [[0, 0], [0, 0], [1, 1], [2, 2], [2, 2]], popularity=[1, 7, 9, 0, 4])
    assert sids(catalog, "abcdefgh") == ["001", "000", "11", "003", "002", "11", "221", "220"]
    catalog.append(["i", "j"], [[2, 2], [0, 0]])
    assert sids(catalog, "ij") == ["222", "004"]
    # The next policy changes nothing where suffixes are: no SID may be the beginning of another.
    catalog.append(["k"], [[2, 2]], collisions="share")
    catalog.append(["l"], [[2, 2]], collisions="reassign", quantizer=QUANTIZER)
    assert sids(catalog, "kl") == ["223", "224"]


def test_a_new_group_shares_if_asked_to():
    catalog = build([[0, 0], [0, 0]], "suffix")
    catalog.append(["c", "d"], [[1, 1], [1, 1]], collisions="share")
    catalog.append(["e", "f"], [[1, 1], [1, 1]])  # what is shared stays shared
    assert sids(catalog, "cdef") == ["11"] * 4 and names(catalog, "11") == "cdef"


def test_exhausted_suffixes_are_refused_whole():
    catalog = build([[0, 0], [0, 0]], "suffix", suffix_size=3)
    columns, history = catalog.columns, list(catalog.history)
    for codes in ([[0, 0], [0, 0]], [[1, 1]] * 4, [[2, 2], [0, 0], [0, 0]]):
        with pytest.raises(
            ValueError, match="4 products would share the codes .* of which 3 are reserved. Pass reuse"
        ):
            catalog.append([f"n{row}" for row in range(len(codes))], codes)
        assert catalog.columns is columns and catalog.history == history
    catalog.append(["c"], [[0, 0]])
    catalog.withdraw(["a", "b", "c"])
    with pytest.raises(ValueError, match="4 products"):
        catalog.append(["d"], [[0, 0]])
    with pytest.raises(ValueError, match="4 products"):
        catalog.append(list("defg"), [[0, 0]] * 4, reuse_withdrawn=True)
    catalog.append(["d", "e", "f"], [[0, 0]] * 3, popularity=[1, 3, 2], reuse_withdrawn=True)
    assert sids(catalog, "def") == ["002", "000", "001"]


def test_withdrawn_suffixes_are_reused_lowest_first_if_asked():
    catalog = build([[0, 0]] * 6 + [[1, 1]] * 2, "suffix", suffix_size=9)
    catalog.withdraw(["e", "b", "d", "g"])
    catalog.append(["n"], [[0, 0]])
    assert sids(catalog, "n") == ["006"]
    catalog.append(list("opqrs"), [[0, 0]] * 5, popularity=[1, 2, 3, 4, 0], reuse_withdrawn=True)
    assert sids(catalog, "rqpos") == ["001", "003", "004", "007", "008"]
    assert names(catalog, "001") == "r" and sids(catalog, "bg") == ["001", "110"]
    # Whoever comes back has its SID still, and shares it then.
    catalog.restore(["b"])
    assert sids(catalog, "b") == ["001"] and names(catalog, "001") == "rb"
    catalog.append(["t"], [[1, 1]], reuse_withdrawn=True)
    assert sids(catalog, "t") == ["110"]


def test_the_leaf_of_withdrawn_products_is_not_reused_unless_asked():
    catalog = build([[0, 0], [0, 1], [1, 0]])
    catalog.withdraw(["b"])
    with pytest.raises(
        ValueError, match="1 products meet SIDs whose products are all withdrawn.*reuse_withdrawn=True"
    ):
        catalog.append(["d", "e"], [[0, 1], [0, 0]])
    assert catalog.version == 2 and len(catalog) == 3
    catalog.append(["d", "e"], [[0, 1], [0, 0]], quantizer=QUANTIZER)
    assert sids(catalog, "de") == ["02", "00"]  # 00 has products, 01 is closed
    catalog.append(["f", "g"], [[0, 1], [0, 1]], reuse_withdrawn=True)
    assert sids(catalog, "fg") == ["01", "01"] and names(catalog, "01") == "fg"


def test_a_mover_does_not_meet_those_who_stay_in_the_same_batch():
    """20, the leaf nearest to 21, is where two newcomers of the same batch share or have suffixes: 22 is next."""
    for collisions, expected in (("suffix", ["200", "201", "22"]), ("share", ["20", "20", "22"])):
        catalog = build([[2, 1], [0, 0], [0, 0]], "suffix")
        catalog.withdraw(["a"])
        catalog.append(["x", "y", "z"], [[2, 0], [2, 0], [2, 1]], collisions=collisions, quantizer=QUANTIZER)
        assert sids(catalog, "xyz") == expected
        catalog.append(["v"], [[2, 1]], quantizer=QUANTIZER)  # (2, ·) is full
        assert sids(catalog, "v")[0][0] in "01"


def test_a_path_with_suffixes_never_takes_one_without():
    """Not even if all of its products are withdrawn and may be replaced: 00 would be the beginning of 000."""
    catalog = build([[0, 0], [0, 0], [0, 1]], "suffix")
    catalog.withdraw(["a", "b"])
    catalog.append(["d"], [[0, 1]], collisions="reassign", quantizer=QUANTIZER, reuse_withdrawn=True)
    assert sids(catalog, "d") == ["02"]
    catalog.append(["e"], [[0, 0]], collisions="reassign", quantizer=QUANTIZER, reuse_withdrawn=True)
    assert sids(catalog, "e") == ["000"]


def test_reassigned_newcomers_take_the_nearest_free_leaf():
    catalog = build([[0, 0], [0, 0], [1, 2]], "reassign", popularity=[1, 2, 0])
    assert sids(catalog, "abc") == ["01", "00", "12"]
    catalog.append(["d"], [[0, 0]], quantizer=QUANTIZER)
    assert sids(catalog, "d") == ["02"]
    # (0, ·) is full: the next prefix is 1, from -10 the nearest of whose codes is 0.
    catalog.append(["e", "f"], [[0, 2], [1, 2]], quantizer=QUANTIZER, popularity=[0, 1])
    assert sids(catalog, "ef") == ["10", "11"]
    with pytest.raises(ValueError, match='reassign" looks for the nearest free leaf.*pass quantizer='):
        catalog.append(["g"], [[2, 2]])
    with pytest.raises(ValueError, match=r"4 products need a SID.*room for 3"):
        catalog.append(list("ghij"), [[2, 2]] * 4, quantizer=QUANTIZER)
    assert (catalog.version, len(catalog)) == (3, 6)
    catalog.append(["g"], [[0, 0]], collisions="share")  # shares, without a quantizer
    assert sids(catalog, "g") == ["00"]
    catalog.append(list("hij"), [[2, 2]] * 3, quantizer=QUANTIZER)
    assert sids(catalog, "hij") == ["22", "21", "20"]
    catalog.withdraw(["h", "c"])
    with pytest.raises(ValueError, match=r"1 products need a SID.*room for 0"):
        catalog.append(["k"], [[2, 2]], quantizer=QUANTIZER)
    catalog.append(["k", "l"], [[2, 1], [2, 1]], quantizer=QUANTIZER, reuse_withdrawn=True)
    assert sorted(sids(catalog, "kl")) == ["12", "22"]


def test_capacity_counts_withdrawn_products_unless_reused():
    def make():
        catalog = build([[0, 0], [0, 0], [0, 0]], "reassign", capacity=2)
        assert sids(catalog, "abc") == ["00", "00", "01"]
        catalog.withdraw(["a"])
        return catalog

    catalog = make()
    catalog.append(["d", "e"], [[0, 0], [0, 0]], quantizer=QUANTIZER)
    assert sids(catalog, "de") == ["01", "02"]
    catalog = make()
    catalog.append(["d", "e"], [[0, 0], [0, 0]], quantizer=QUANTIZER, reuse_withdrawn=True)
    assert sids(catalog, "de") == ["00", "01"]
    # One of 00 is left, so that who shares may join it; none of 01.
    catalog = make()
    catalog.withdraw(["c"])
    catalog.append(["d", "e"], [[0, 0], [0, 1]], collisions="share", quantizer=QUANTIZER)
    assert sids(catalog, "de") == ["00", "02"]


def test_popularity_decides_who_of_the_newcomers_stays():
    catalog = build([[2, 2]], "reassign")
    catalog.append(["b", "c", "d"], [[0, 0]] * 3, popularity=[1, 3, 2], quantizer=QUANTIZER)
    assert sids(catalog, "cdb") == ["00", "01", "02"]


def test_pruned_codes_are_one_leaf():
    codes = np.array([[0, 0], [1, 0], [0, 1]])
    pruning = TokenPruning("top_k", layer=0, top_k=2).fit(codes, [3, 3])
    catalog = build(codes, "reassign", pruning=pruning)
    assert sids(catalog, "abc") == [".0", ".1", ".2"] or sids(catalog, "abc") == [".0", ".2", ".1"]
    catalog.append(["d"], [[1, 1]], quantizer=QUANTIZER)
    assert sids(catalog, "d")[0].startswith("2")
    catalog.append(["e", "f"], [[1, 1], [0, 1]], quantizer=QUANTIZER)
    with pytest.raises(ValueError, match="room for 0"):
        catalog.append(["g"], [[0, 2]], quantizer=QUANTIZER)


def test_embeddings_are_encoded_and_measured():
    """11.4 is nearest to (1, 1); of the leaves that are free, 12 would be nearer to the code's vector than to 9.4."""
    catalog = build([[1, 1], [0, 2]], "reassign")
    embeddings = np.array([[11.4], [21.1]], dtype=np.float32)
    assert QUANTIZER.encode(embeddings).tolist() == [[1, 1], [2, 1]]
    for given in (embeddings, torch.tensor(embeddings)):
        fresh = build([[1, 1], [0, 2]], "reassign")
        fresh.append(["c", "d"], embeddings=given, quantizer=QUANTIZER)
        assert sids(fresh, "cd") == ["10", "21"] and fresh.codes[2:].tolist() == [[1, 1], [2, 1]]
    # Measured from 11.9 rather than from 11, code 3 (13) is nearer than code 0 (10).
    catalog.append(["c"], [[1, 1]], embeddings=np.array([[11.9]], dtype=np.float32), quantizer=QUANTIZER)
    assert sids(catalog, "c") == ["12"]


def test_keys_beyond_63_bits():
    """Byte strings as keys: appended SIDs are found, told apart and continued as others are."""
    random = np.random.default_rng(0)
    sizes = [8192] * 8
    codes = random.integers(0, 8192, (200, 8))
    codes[100:] = codes[:100]
    codes[::10] = 0
    codes[5::10] = 8191
    for collisions in ("share", "suffix"):
        options = {"collisions": collisions} | ({"suffix_size": 20} if collisions == "suffix" else {})
        catalog = ProductCatalog.build([f"p{row}" for row in range(100)], codes[:100], sizes, **options)
        whole = ProductCatalog.build([f"p{row}" for row in range(200)], codes, sizes)
        catalog.append([f"p{row}" for row in range(100, 200)], codes[100:])
        everything = catalog.sid_codes[catalog.sid_rows(np.arange(200))]
        assert (everything[:, :-1] == codes).all()
        assert (catalog.find_sids(everything) == catalog.sid_rows(np.arange(200))).all()
        assert (catalog.find_sids(catalog.sid_codes) == np.arange(catalog.num_sids)).all()
        if collisions == "share":
            assert catalog.num_sids == whole.num_sids and (everything[:, -1] == -1).all()
            old = catalog.at_version(1)
            assert (old.find_sids(everything[:100]) == old.sid_rows(np.arange(100))).all()
        else:
            zeros = catalog.sid_codes[catalog.sid_rows(np.arange(0, 200, 10)), -1]
            assert sorted(zeros.tolist()) == list(range(20))
    with pytest.raises(ValueError, match=r"up to 2\^63 possible SIDs"):
        quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=sizes, embedding_dim=1))
        catalog.append(["q"], [[1] * 8], collisions="reassign", quantizer=quantizer)


# Bad input. A catalog that refuses is as it was.

LONG = "ü" * 513  # 1,026 bytes


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"product_ids": ["x", "y", "x"]}, ValueError, "'x' appears more than once"),
        (
            {"product_ids": ["x", "b", "y"]},
            ValueError,
            "1 of 3 products are in the catalog already, for instance 'b'.*leave",
        ),
        ({"product_ids": ["x", "c", "y"]}, ValueError, r"'c'. Ids are never given twice: restore\(\.\.\.\) brings"),
        ({"product_ids": ["x", "", "y"]}, ValueError, "row 1 is empty"),
        ({"product_ids": ["x", LONG, "y"]}, ValueError, "row 1 takes 1026 bytes"),
        ({"product_ids": ["x", "y\udc80", "z"]}, ValueError, "UTF-8"),
        ({"product_ids": ["x", 7, "z"]}, TypeError, "7 .row 1. is int"),
        ({"product_ids": ["x", None, "z"]}, TypeError, "None .row 1. is NoneType"),
        ({"product_ids": "xyz"}, TypeError, "single string"),
        ({"product_ids": ["x"]}, ValueError, "codes has 3 rows for 1 product ids"),
        ({"codes": [[0, 0], [0, 3], [0, 0]]}, ValueError, "Layer 1 holds the code 3"),
        ({"codes": [[0, 0], [-1, 1], [0, 0]]}, ValueError, r"absent \(-1\) entries"),
        ({"codes": [[0, 0], [-2, 1], [0, 0]]}, ValueError, "holds the code -2"),
        ({"codes": [[0, 0, 0]] * 3}, ValueError, r"shape \(3, 3\)"),
        ({"codes": [0, 1, 2]}, ValueError, r"shape \(3,\)"),
        ({"codes": [[0.0, 0.0]] * 3}, TypeError, "integers, got float64"),
        ({"codes": None}, ValueError, "Pass codes, or embeddings and quantizer"),
        ({"codes": None, "quantizer": QUANTIZER}, ValueError, "Pass codes, or embeddings and quantizer"),
        ({"codes": None, "embeddings": np.zeros((3, 1))}, ValueError, "Pass codes, or embeddings and quantizer"),
        (
            {"codes": None, "embeddings": np.zeros((3, 2), np.float32), "quantizer": QUANTIZER},
            ValueError,
            "dimension|columns|shape",
        ),
        (
            {"codes": None, "embeddings": np.full((3, 1), np.nan, np.float32), "quantizer": QUANTIZER},
            ValueError,
            "NaN|infinite",
        ),
        ({"embeddings": np.zeros((2, 1), np.float32)}, ValueError, "embeddings has 2 rows for 3"),
        ({"popularity": [1, 2]}, ValueError, "popularity has 2 rows for 3"),
        ({"popularity": [1, 2, np.nan]}, ValueError, "one finite number per product"),
        ({"popularity": [1, 2, np.inf]}, ValueError, "one finite number per product"),
        ({"popularity": np.ones((3, 1))}, ValueError, "one finite number per product"),
        ({"texts": ["t"]}, ValueError, "texts has 1 rows for 3"),
        ({"texts": ["t", None, "u"]}, TypeError, "None .row 1."),
        ({"texts": ["t", "\ud800", "u"]}, ValueError, "UTF-8"),
        ({"collisions": "suffix"}, ValueError, 'needs suffix tokens, of which this catalog has none. Pass "reassign"'),
        ({"collisions": "merge"}, ValueError, "'merge' is unknown"),
        (
            {"quantizer": make_quantizer([0, 10, 20], [0, 1])},
            ValueError,
            r"codebooks \[3, 2\].*the catalog has \[3, 3\]",
        ),
        (
            {"quantizer": make_quantizer([0, 10, 20], [0, 1, 4])},
            ValueError,
            "codebook version .*, the catalog was built with",
        ),
        (
            {"quantizer": ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=[3, 3]))},
            ValueError,
            "is not fitted, the catalog has",
        ),
        (
            {"quantizer": RQVAE(RQVAEConfig(codebook_sizes=[3, 3], embedding_dim=1))},
            ValueError,
            "codebook version|fitted",
        ),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_bad_input_of_append(arguments, error, message, loaded, tmp_path):
    catalog = build([[0, 0], [0, 1], [1, 1]], texts=["A", "B", "C"])
    catalog.withdraw(["c"])
    if loaded:
        catalog.save(tmp_path / "catalog")
        catalog = ProductCatalog.load(tmp_path / "catalog")
    state = dict(catalog.__dict__)
    contents = {name: column.tobytes() for name, column in catalog.columns.items()}
    with pytest.raises(error, match=message):
        catalog.append(**{"product_ids": ["x", "y", "z"], "codes": [[0, 0], [2, 2], [0, 2]]} | arguments)
    assert catalog.__dict__.keys() == state.keys() and all(catalog.__dict__[key] is state[key] for key in state)
    assert {name: column.tobytes() for name, column in catalog.columns.items()} == contents


@pytest.mark.parametrize("suffix_size", [True, 0, -1, 2.0, "3", np.int64(3)])
def test_suffix_size_must_be_a_number(suffix_size):
    with pytest.raises(ValueError, match="suffix_size=.* must be a whole number from 1"):
        build([[0, 0], [0, 1]], "suffix", suffix_size=suffix_size)


@pytest.mark.parametrize("capacity", [True, 0, -1, 2.0, "3", None])
def test_capacity_must_be_a_number(capacity):
    with pytest.raises(ValueError, match="capacity=.* must be a whole number from 1"):
        build([[0, 0], [0, 1]], "reassign", capacity=capacity)


def test_options_of_build_that_need_others():
    codes = np.zeros((2, 2), dtype=int)
    for options, message in (
        ({"capacity": 2}, 'capacity=2 needs collisions="reassign"'),
        ({"capacity": 2, "collisions": "suffix"}, 'capacity=2 needs collisions="reassign"'),
        ({"suffix_size": 4, "collisions": "reassign"}, 'suffix_size=4 needs collisions="suffix"'),
        ({"embeddings": np.zeros((2, 1), np.float32)}, 'embeddings are used by collisions="reassign" only'),
    ):
        with pytest.raises(ValueError, match=message):
            build(codes, **options)


def test_reassign_without_a_quantizer_is_refused():
    with pytest.raises(ValueError, match='reassign" looks for the nearest free leaf.*pass quantizer='):
        ProductCatalog.build(["a", "b"], np.zeros((2, 2), int), [3, 3], collisions="reassign")


def changes():
    catalog = build([[0, 0], [0, 0], [1, 1]])
    catalog.withdraw(["c"])
    return catalog


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda c: c.withdraw(["a", "a"]), ValueError, "1 products are named more than once, for instance 'a'"),
        (lambda c: c.withdraw(["a", "b", "b", "a", "a"]), ValueError, "3 products are named more than once"),
        (lambda c: c.withdraw(["a", "c"]), ValueError, "1 of these products are withdrawn already, for instance 'c'"),
        (lambda c: c.withdraw(["a", "z"]), ValueError, "1 of 2 product ids are not in the catalog, for instance 'z'"),
        (lambda c: c.withdraw("a"), TypeError, "single string"),
        (lambda c: c.withdraw([0]), TypeError, "not a string"),
        (lambda c: c.withdraw(["a\udc80"]), ValueError, "UTF-8"),
        (lambda c: c.restore(["c", "a"]), ValueError, "1 of these products are not withdrawn, for instance 'a'"),
        (lambda c: c.restore(["c", "c"]), ValueError, "'c'. Name each once"),
        (lambda c: c.restore(["z"]), ValueError, "not in the catalog"),
        (lambda c: c.restore("c"), TypeError, "single string"),
        (lambda c: c.update_popularity(["a", "a"], [1, 2]), ValueError, "named more than once"),
        (lambda c: c.update_popularity(["a", "z"], [1, 2]), ValueError, "not in the catalog"),
        (lambda c: c.update_popularity(["a", "b"], [1, np.nan]), ValueError, "one finite number for each of the 2"),
        (lambda c: c.update_popularity(["a", "b"], [1, -np.inf]), ValueError, "one finite number for each of the 2"),
        (lambda c: c.update_popularity(["a", "b"], [1]), ValueError, r"got shape \(1,\)"),
        (lambda c: c.update_popularity(["a", "b"], [[1, 2]]), ValueError, r"got shape \(1, 2\)"),
        (lambda c: c.update_popularity(["a", "b"], 3), ValueError, r"got shape \(\)"),
        (lambda c: c.update_popularity(["a"], None), ValueError, r"got shape \(\)"),
        (lambda c: c.at_version(0), ValueError, "version=0: this catalog has versions 1 to 2"),
        (lambda c: c.at_version(3), ValueError, "version=3: this catalog has versions 1 to 2"),
        (lambda c: c.at_version(-1), ValueError, "version=-1"),
        (lambda c: c.at_version(True), ValueError, "version=True"),
        (lambda c: c.at_version("1"), ValueError, "version='1'"),
        (lambda c: c.at_version(1.0), ValueError, "version=1.0"),
        (lambda c: c.at_version(None), ValueError, "version=None"),
        (lambda c: c.forget_versions(0), ValueError, "before=0: this catalog has versions 1 to 2"),
        (lambda c: c.forget_versions(3), ValueError, "before=3"),
        (lambda c: c.forget_versions(True), ValueError, "before=True"),
        (lambda c: c.forget_versions("2"), ValueError, "before='2'"),
        (lambda c: c.forget_versions(2.0), ValueError, "before=2.0"),
    ],
)
def test_bad_changes(call, error, message):
    catalog = changes()
    state = dict(catalog.__dict__)
    with pytest.raises(error, match=message):
        call(catalog)
    assert all(catalog.__dict__[key] is state[key] for key in state)


def test_changes_of_nothing_make_no_version():
    catalog = changes()
    for call in (catalog.withdraw, catalog.restore, lambda ids: catalog.update_popularity(ids, [])):
        call([])
        assert catalog.version == 2
    assert catalog.append([], np.zeros((0, 2), dtype=int)).shape == (0,)
    assert (catalog.version, len(catalog)) == (2, 3)
    catalog.update_popularity(["a", "b"], [0, 0])
    assert catalog.version == 2
    catalog.update_popularity(["a", "b"], [0, 1])
    assert catalog.version == 3 and catalog.history[-1]["count"] == 1


def test_forgotten_versions():
    catalog = changes()
    catalog.update_popularity(["b"], [4])
    catalog.forget_versions(2)
    assert catalog.oldest_version == 2 and len(catalog.columns["withdrawn_log"]) == 0
    with pytest.raises(ValueError, match="version=1 was given up by forget_versions; 2 is the oldest"):
        catalog.at_version(1)
    assert names(catalog.at_version(2), "00") == "ab" and names(catalog, "00") == "ba"
    catalog.forget_versions()
    assert catalog.oldest_version == 3 and len(catalog.columns["popularity_log_rows"]) == 0
    catalog.restore(["c"])
    assert catalog.at_version(3).withdrawn.tolist() == [False, False, True] and catalog.version == 4


def test_versions_of_repeated_changes_by_hand():
    """Products that leave and come back, popularities that change twice, products and SIDs of later."""
    catalog = build([[0, 0], [0, 0], [2, 2]], popularity=[1, 2, 3])
    catalog.withdraw(["a", "b"])  # 2
    catalog.restore(["b"])  # 3
    catalog.withdraw(["b"])  # 4
    catalog.append(["d", "e"], [[1, 1], [2, 2]], popularity=[7, 8], texts=["D", "E"])  # 5
    catalog.update_popularity(["c", "d"], [4, 9])  # 6
    catalog.update_popularity(["c"], [10])  # 7
    catalog.restore(["a", "b"])  # 8
    assert [entry["change"] for entry in catalog.history][4:] == [
        "append",
        "update_popularity",
        "update_popularity",
        "restore",
    ]
    expected = [("ba", "c"), ("", "c"), ("b", "c"), ("", "c"), ("", "ec"), ("", "ec"), ("", "ce"), ("ba", "ce")]
    popularity = [3, 3, 3, 3, 3, 4, 10, 10]
    for version, (first, last) in enumerate(expected, start=1):
        old = catalog.at_version(version)
        assert (names(old, "00"), names(old, "22")) == (first, last), version
        assert old.popularity[2] == popularity[version - 1]
        there = version >= 5
        assert old.find_products(["d", "e", "a"]).tolist() == ([3, 4, 0] if there else [-1, -1, 0])
        assert old.find_sids([[1, 1, -1], [2, 2, -1]]).tolist() == ([2, 1] if there else [-1, 1])
        assert old.texts([0, 2]) == ["", ""] and len(old) == (5 if there else 3)
    assert catalog.texts([3, 4]) == ["D", "E"] and catalog.at_version(5).popularity[3] == 7


def test_texts_of_newcomers():
    catalog = build([[0, 0], [1, 1]], texts=["Öl", ""])
    catalog.append(["c"], [[0, 0]])
    catalog.append(["d", "e"], [[0, 0], [0, 0]], texts=["", "Käse"])
    assert catalog.texts(np.arange(5)) == ["Öl", "", "", "", "Käse"]
    assert [catalog.at_version(version).texts([0, 1]) for version in (1, 2, 3)] == [["Öl", ""]] * 3
