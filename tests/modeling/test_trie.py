import copy
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from tries import check_levels, check_trie

from rqsid.modeling import trie_building
from rqsid.modeling.trie import SIDTrie


def stack(sids):
    depth = max(map(len, sids))
    return torch.tensor([list(sid) + [-1] * (depth - len(sid)) for sid in sids])


# (10, 20, 30) -> row 0, (10, 21) -> row 1, (11, 30) -> row 2, (10, 20, 31) -> row 3.
# Breadth first: 1 = 10, 2 = 11; 3 = 10.20, 4 = 10.21, 5 = 11.30; 6 = 10.20.30, 7 = 10.20.31.
HAND = stack([(10, 20, 30), (10, 21), (11, 30), (10, 20, 31)])


def test_hand_computed():
    trie = SIDTrie(HAND)
    assert (trie.depth, trie.num_sids, trie.num_nodes, trie.max_token_id) == (3, 4, 8, 31)
    nodes = torch.arange(-1, 8)
    assert trie.sid_rows(nodes).tolist() == [-1, -1, -1, -1, -1, 1, 2, 0, 3]
    assert trie.is_leaf(nodes).tolist() == [False, False, False, False, False, True, True, True, True]
    assert trie.node_depths(nodes[1:]).tolist() == [0, 1, 1, 2, 2, 2, 3, 3]
    tokens, children, mask = trie.children(torch.tensor([[0, 1], [2, 4]]))
    assert tokens.tolist() == [[[10, 11], [20, 21]], [[30, 0], [0, 0]]]
    assert children.tolist() == [[[1, 2], [3, 4]], [[5, -1], [-1, -1]]]
    assert mask.tolist() == [[[True, True], [True, True]], [[True, False], [False, False]]]
    paths = torch.tensor(
        [[10, 20, 31], [10, 21, -1], [11, -1, -1], [-1, -1, -1], [11, 20, 30], [10, 21, 30], [9, 9, 9]]
    )
    assert trie.walk(paths).tolist() == [7, 4, 2, 0, -1, -1, -1]
    assert trie.walk(torch.empty((2, 0), dtype=torch.int64)).tolist() == [0, 0]


def test_children_keep_one_column_without_any_child():
    tokens, children, mask = SIDTrie(HAND).children(torch.tensor([7, -1]))
    assert tokens.tolist() == [[0], [0]] and children.tolist() == [[-1], [-1]] and not mask.any()


def test_the_path_does_not_resume_after_leaving():
    # The root's children must not be tried again from the node -1.
    assert SIDTrie(HAND).walk(torch.tensor([[99, 10, 21]])).tolist() == [-1]


def check_against_dict(sids, seed=0):
    """Every prefix, every child and some paths outside, against a dictionary of prefixes."""
    generator = torch.Generator().manual_seed(seed)
    sids = [sids[at] for at in torch.randperm(len(sids), generator=generator)]
    trie = SIDTrie(stack(sids))
    children = {}
    for sid in sids:
        for length in range(len(sid)):
            children.setdefault(sid[:length], set()).add(sid[length])
    prefixes = sorted(set(children) | set(sids), key=lambda prefix: (len(prefix), prefix))
    assert trie.num_nodes == len(prefixes) and trie.num_sids == len(sids) and trie.depth == max(map(len, sids))

    # breadth-first order by token ids is the order of (length, tokens)
    nodes = trie.walk(stack(prefixes))
    assert nodes.tolist() == list(range(len(prefixes)))
    rows = {sid: row for row, sid in enumerate(sids)}
    assert trie.sid_rows(nodes).tolist() == [rows.get(prefix, -1) for prefix in prefixes]
    assert trie.is_leaf(nodes).tolist() == [prefix in rows for prefix in prefixes]
    tokens, child_nodes, mask = trie.children(nodes)
    assert mask.shape[1] == max(map(len, children.values()))
    for at, prefix in enumerate(prefixes):
        assert tokens[at, mask[at]].tolist() == sorted(children.get(prefix, ()))
        assert trie.walk(
            stack([prefix + (token,) for token in tokens[at, mask[at]].tolist()] or [(-1,)])
        ).tolist() == (child_nodes[at, mask[at]].tolist() or [0])

    check_levels(trie, rows)
    check_trie(trie, rows)
    known = set(prefixes)
    near = {token + shift for sid in sids for token in sid for shift in (-1, 0, 1)} | {0, 2**31}
    outside = [prefix + (token,) for prefix in prefixes for token in near if token >= 0]
    outside = [path for path in outside if path not in known]
    assert (trie.walk(stack(outside)) == -1).all()


@settings(max_examples=60, deadline=None)
@given(
    sids=st.sets(st.lists(st.integers(3, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=25),
    factor=st.sampled_from([1, 7, 20_000]),
)
def test_random_sets_match_a_dictionary(sids, factor):
    sids = [tuple(token * factor for token in sid) for sid in sids]
    prefix_free = [s for s in sids if not any(t != s and t[: len(s)] == s for t in sids)]
    check_against_dict(sorted(prefix_free))


def test_keys_wider_than_63_bits():
    # 150k token ids over six levels: 17 * 6 bits and more
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 150_000, (60, 6), generator=generator)
    tokens[:, :2] %= 3
    check_against_dict(sorted(set(map(tuple, tokens.tolist()))))


def test_tokens_far_apart():
    wide = SIDTrie(torch.where(HAND == 31, 140_000, HAND))
    assert wide.walk(torch.tensor([[10, 20, 140_000], [10, 20, 31]])).tolist() == [7, -1]
    assert wide.children(torch.tensor([3]))[0].tolist() == [[30, 140_000]]


@pytest.mark.parametrize(
    "num_tokens, dtype",
    [(2**15, torch.int16), (2**15 + 1, torch.int16), (2**16, torch.int16), (2**16 + 1, torch.int32)],
)
def test_as_many_tokens_as_fit_into_an_edge(num_tokens, dtype):
    sequences = torch.stack([torch.arange(num_tokens - 1) + 3, torch.full((num_tokens - 1,), 2)], dim=1)
    trie = SIDTrie(sequences)
    assert trie._edges.dtype == dtype and trie.level_widths == [num_tokens - 1, 1]
    assert (trie.sid_rows(trie.walk(sequences)) == torch.arange(num_tokens - 1)).all()
    assert (trie.children(torch.tensor([0]))[0][0] == torch.arange(num_tokens - 1) + 3).all()
    assert trie.walk(torch.tensor([[2], [num_tokens + 2], [0]])).tolist() == [-1, -1, -1]


def test_memory_of_a_large_trie():
    generator = torch.Generator().manual_seed(0)
    codes = torch.unique(torch.randint(0, 512, (100_000, 3), generator=generator), dim=0)
    trie = SIDTrie(32_000 + codes + torch.tensor([0, 512, 1024]))
    tensors = (trie._edges, trie._indptr, trie._leaf_rows, trie._short_leaves)
    # 2 bytes of token for a node, 4 of offset for an inner one, 4 of row for a leaf
    num_inner = trie.num_nodes - trie.num_sids
    assert sum(tensor.nbytes for tensor in tensors) <= 2 * trie.num_nodes + 4 * (num_inner + trie.num_sids) + 4
    assert (trie.sid_rows(trie.walk(32_000 + codes + torch.tensor([0, 512, 1024]))) == torch.arange(len(codes))).all()


def test_all_padding_columns_are_no_depth():
    trie = SIDTrie(torch.tensor([[5, 6, -1], [7, -1, -1]]))
    assert trie.depth == 2 and trie.sid_rows(trie.walk(torch.tensor([[7]]))).tolist() == [1]


def test_one_sid_of_one_token():
    trie = SIDTrie(torch.tensor([[5]]))
    assert trie.num_nodes == 2 and trie.walk(torch.tensor([[5], [6], [4]])).tolist() == [1, -1, -1]


def test_input_is_neither_changed_nor_shared():
    sequences = HAND.clone()
    trie = SIDTrie(sequences)
    sequences.fill_(0)
    assert trie.sid_rows(trie.walk(HAND)).tolist() == [0, 1, 2, 3]
    moved = trie.to("cpu")
    assert moved is trie and moved.device == torch.device("cpu")


def test_to_moves_every_tensor():
    trie = SIDTrie(HAND)
    meta = trie.to("meta")
    tensors = [value for value in vars(meta).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8 and all(tensor.is_meta for tensor in tensors) and meta.device.type == "meta"
    assert trie.device.type == "cpu"
    # Moved once per device, so that every request may ask; a copy takes no copies with it.
    assert trie.to("meta") is meta and copy.copy(trie)._copies == {} and pickle.loads(pickle.dumps(trie))._copies == {}


def test_from_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    trie = SIDTrie.from_tokenizer(tokenizer)
    assert trie.sid_rows(trie.walk(tokenizer.sid_sequences())).tolist() == list(range(30))


def test_leaves_hold_the_rows_given():
    rows = torch.tensor([7, 2**31, 0, 5])
    trie = SIDTrie(HAND, rows)
    assert trie.sid_rows(trie.walk(HAND)).tolist() == [7, 2**31, 0, 5]
    assert trie.sid_rows(torch.arange(-1, 8)).tolist() == [-1, -1, -1, -1, -1, 2**31, 0, 7, 5]
    assert SIDTrie(HAND, rows % 11)._leaf_rows.dtype == torch.int32
    rows.fill_(3)
    assert trie.sid_rows(trie.walk(HAND)).tolist() == [7, 2**31, 0, 5]


def test_from_tokenizer_of_a_subset(make_tokenizer):
    tokenizer = make_tokenizer()
    kept = torch.tensor([23, 4, 29, 0, 11], dtype=torch.int32)
    trie = SIDTrie.from_tokenizer(tokenizer, kept)
    found = trie.sid_rows(trie.walk(tokenizer.sid_sequences()))
    assert found.tolist() == [row if row in kept.tolist() else -1 for row in range(30)]
    with pytest.raises(ValueError, match="has row 30 but the catalog only 30 SIDs"):
        SIDTrie.from_tokenizer(tokenizer, torch.tensor([3, 30]))


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ([0, 1, 2, 3], TypeError, "must be a tensor of the catalog's SID rows, got list"),
        (torch.tensor([0.0, 1, 2, 3]), TypeError, "integers, got torch.float32"),
        (torch.tensor([True, False, True, True]), TypeError, "integers, got torch.bool"),
        (torch.tensor([[0, 1, 2, 3]]), ValueError, "got (1, 4)"),
        (torch.tensor([], dtype=torch.int64), ValueError, "got (0,)"),
        (torch.tensor([4, -1, 2, 3]), ValueError, "0 or more, got -1"),
        (torch.tensor([4, 9, 2, 9]), ValueError, "holds row 9 more than once"),
    ],
)
def test_bad_sid_rows(make_tokenizer, rows, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SIDTrie(HAND, rows)
    with pytest.raises(error, match=re.escape(message)):
        SIDTrie.from_tokenizer(make_tokenizer(), rows)


def test_one_sid_row_for_each_sequence():
    with pytest.raises(ValueError, match=re.escape("the shape (4,) with at least one row, got (3,)")):
        SIDTrie(HAND, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "sequences, error, message",
    [
        ([[1, 2]], TypeError, "must be a tensor"),
        (torch.tensor([[1.0]]), TypeError, "integers, got torch.float32"),
        (torch.tensor([[True]]), TypeError, "integers, got torch.bool"),
        (torch.empty((0, 3), dtype=torch.int64), ValueError, "got (0, 3)"),
        (torch.empty((3, 0), dtype=torch.int64), ValueError, "got (3, 0)"),
        (torch.tensor([1, 2]), ValueError, "got (2,)"),
        (torch.tensor([[1, 2], [3, -2]]), ValueError, "got -2"),
        (torch.tensor([[1, 2, 3], [1, -1, 3]]), ValueError, "Row 1 of `sequences`, [1, -1, 3]"),
        (torch.tensor([[-1, -1], [1, 2]]), ValueError, "Row 0 of `sequences`, [-1, -1]"),
        (torch.tensor([[5, 6], [1, 2], [5, 6]]), ValueError, "Rows 0 and 2 of `sequences` are the same SID [5, 6]"),
        (torch.tensor([[5, -1], [1, 2], [5, -1]]), ValueError, "Rows 0 and 2 of `sequences` are the same SID [5, -1]"),
        (
            torch.tensor([[5, 6, 7], [1, 2, -1], [5, -1, -1]]),
            ValueError,
            "Row 2 of `sequences`, [5, -1, -1], is a prefix",
        ),
        (torch.tensor([[5, 6], [5, 7], [5, -1]]), ValueError, "Row 2 of `sequences`, [5, -1], is a prefix of row 0"),
    ],
)
def test_bad_sequences(sequences, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SIDTrie(sequences)


def test_walk_refuses_a_single_row():
    with pytest.raises(ValueError, match=re.escape("got (2,)")):
        SIDTrie(HAND).walk(torch.tensor([10, 20]))


def test_walk_from_roots():
    trie = SIDTrie(HAND)
    assert trie.walk(torch.tensor([[20, 30], [30, -1]]), torch.tensor([1, 2])).tolist() == [6, 5]
    assert trie.walk(torch.tensor([[10]]), torch.tensor([-1])).tolist() == [-1]
    with pytest.raises(ValueError, match=re.escape("one node for each of the 2 rows, got (1,)")):
        trie.walk(torch.tensor([[20], [30]]), torch.tensor([1]))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_children_of_a_given_width(width):
    trie = SIDTrie(HAND)
    nodes = torch.tensor([[0, 3], [4, -1]])
    free, given = trie.children(nodes), trie.children(nodes, width=width)
    for one, other, fill in zip(free, given, (0, -1, False), strict=True):
        assert other.shape == (2, 2, width)
        shared = min(width, 2)
        assert (one[..., :shared] == other[..., :shared]).all() and (other[..., shared:] == fill).all()


def test_nothing_is_read_back_from_an_accelerator():
    """Fake tensors have no values: whatever needs one on the host fails."""
    trie = SIDTrie(HAND)
    with FakeTensorMode(allow_non_fake_inputs=True):
        token_ids, nodes = torch.zeros((5, 3), dtype=torch.int64), torch.zeros((5, 2), dtype=torch.int64)
        assert trie.walk(token_ids).shape == trie.walk(token_ids, nodes[:, 0]).shape == (5,)
        assert [part.shape for part in trie.children(nodes, width=7)] == [(5, 2, 7)] * 3
        assert trie.sid_rows(nodes).shape == trie.is_leaf(nodes).shape == trie.node_depths(nodes).shape == (5, 2)
        with pytest.raises(DataDependentOutputException):
            trie.children(nodes)


def test_compiles_into_one_graph():
    trie = SIDTrie(HAND)

    def leaves(token_ids):
        _, children, mask = trie.children(trie.walk(token_ids), width=2)
        return torch.where(mask, trie.sid_rows(children), -2)

    compiled = torch.compile(leaves, fullgraph=True, backend="eager")
    assert compiled(HAND[:, :2]).tolist() == leaves(HAND[:, :2]).tolist() == [[0, 3], [-2, -2], [-2, -2], [0, 3]]


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_pieces_meet(monkeypatch, chunk):
    """Rows are looked at some at a time; a SID may begin a piece that shares its start with the one before."""
    monkeypatch.setattr(trie_building, "CHUNK_ROWS", chunk)
    generator = torch.Generator().manual_seed(chunk)
    tokens = torch.randint(3, 7, (200, 4), generator=generator)
    sids = sorted({tuple(row[: 2 + row[0] % 3]) for row in tokens.tolist()})
    check_against_dict([sid for sid in sids if not any(other != sid and other[: len(sid)] == sid for other in sids)])
    for row, message in (((10, 21), "are the same SID [10, 21, -1]"), ((10,), "is a prefix of row")):
        with pytest.raises(ValueError, match=re.escape(message)):
            SIDTrie(torch.cat([HAND, matrix_row(row)]))


def matrix_row(sid):
    return torch.tensor([list(sid) + [-1] * (3 - len(sid))])


def test_offsets_beyond_32_bits(monkeypatch):
    monkeypatch.setattr(trie_building, "INT32_MAX", 3)
    trie = SIDTrie(HAND)
    assert {trie._indptr.dtype, trie._short_leaves.dtype, trie._leaf_rows.dtype} == {torch.int64}
    monkeypatch.undo()
    for name in ("_edges", "_indptr", "_leaf_rows", "_short_leaves"):
        assert (getattr(trie, name) == getattr(SIDTrie(HAND), name)).all()
    check_against_dict([(10, 20, 30), (10, 21), (11, 30)])


def test_codes_in_any_order():
    """Sorted codes, an order that sorts them, and none give one trie; so does an order that is none."""
    random = np.random.default_rng(0)
    codes = np.unique(random.integers(0, 300, (4000, 3)), axis=0).astype(np.int16)
    ids = [np.arange(300) + 1000 * layer for layer in (2, 7, 4)]
    shuffled = random.permutation(len(codes))
    rows = np.argsort(shuffled)
    tries = [
        SIDTrie.from_codes(codes[shuffled], ids, sid_order=order)
        for order in (rows, rows.astype(np.int32), None, shuffled)
    ]
    paths = torch.from_numpy(np.stack([ids[layer][codes[shuffled][:, layer]] for layer in range(3)], axis=1))
    for trie in tries:
        assert (trie.sid_rows(trie.walk(paths)) == torch.arange(len(codes))).all()
        assert (trie._edges == tries[0]._edges).all() and (trie._leaf_rows == tries[0]._leaf_rows).all()


@pytest.mark.parametrize("sizes", [[256] * 8, [2**13] * 5 + [40], [2**16, 2**16, 2**16, 2**16, 2**16]])
@pytest.mark.parametrize("with_order", [False, True])
def test_more_codes_than_63_bits(sizes, with_order):
    random = np.random.default_rng(1)
    codes = np.stack([random.integers(0, size, 300) for size in sizes], axis=1)
    codes[:, :3] %= 4
    codes[::3, 1] = -1
    codes = np.unique(codes, axis=0)
    codes = codes[random.permutation(len(codes))]
    ids = np.split(np.arange(sum(sizes)) + 9, np.cumsum(sizes)[:-1])
    order = np.lexsort(codes.T[::-1]) if with_order else None
    trie = SIDTrie.from_codes(codes, ids, sid_order=order)
    sids = [tuple(int(ids[at][code]) for at, code in enumerate(row) if code >= 0) for row in codes.tolist()]
    check_trie(trie, {sid: row for row, sid in enumerate(sids)})
    assert trie._edges.dtype == (torch.int16 if sum(sizes) <= 2**16 else torch.int32)


@pytest.mark.parametrize(
    "codes, ids, options, message",
    [
        ([[0, 0], [0, 0]], [[5], [6]], {}, "row 0, codes [0, 0], is a prefix of or equal to that of row 1"),
        ([[0, 0], [0, -1]], [[5], [6]], {}, "row 1, codes [0, -1], is a prefix of or equal to that of row 0"),
        ([[0, 1]], [[5], [6]], {}, "Column 1 of the codes holds 1, but its layer has 1 codes"),
        ([[0, -2]], [[5], [6]], {}, "Column 1 of the codes holds -2"),
        ([[-1, -1]], [[5], [6]], {}, "row 0 has no code at all"),
        ([[0, 0]], [[5], [5]], {}, "one token for two codes"),
        ([[0, 0]], [[5]], {}, "do not fit token ids of 1 layers"),
        ([[0, 0]], [[5], [6]], {"layer_order": [0, 0]}, "do not fit"),
        ([[0, 0]], [[5], [6]], {"keep": np.array([False])}, "no SID"),
        (np.zeros((0, 2)), [[5], [6]], {}, "no SID"),
    ],
)
def test_bad_codes(codes, ids, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SIDTrie.from_codes(np.array(codes, dtype=np.int64), [np.array(layer) for layer in ids], **options)


@pytest.mark.slow
def test_a_million_sids():
    """Four layers of 1,024 codes at random: what `benchmarks/trie.py` builds, with the bytes that it may take."""
    keys = np.unique(np.random.default_rng(0).integers(0, 2**40, 1_000_000))
    codes = np.stack([keys >> 30, keys >> 20 & 1023, keys >> 10 & 1023, keys & 1023], axis=1).astype(np.int16)
    ids = [32_000 + 1024 * layer + np.arange(1024) for layer in range(4)]
    trie = SIDTrie.from_codes(codes, ids)
    assert trie.nbytes <= 16 * len(codes)
    some = np.random.default_rng(1).integers(0, len(codes), 5000)
    paths = torch.from_numpy(codes[some].astype(np.int64) + 32_000 + 1024 * np.arange(4))
    assert (trie.sid_rows(trie.walk(paths)).numpy() == some).all()
    assert (trie.walk((paths + 1).clamp(max=36_095)) >= 0).sum() < 10
    assert trie.level_widths[0] == 1024 and trie.level_sizes[1] == 1024
    assert trie.level_sizes[3] == len(np.unique(keys >> 10)) and trie.num_nodes == 1 + sum(
        len(np.unique(keys >> shift)) for shift in (30, 20, 10, 0)
    )
