import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_narrow_and_wide_tokens_agree():
    # a range of token ids beyond int16 needs wider edges; the tree is the same
    narrow, wide = SIDTrie(HAND), SIDTrie(torch.where(HAND == 31, 140_000, HAND))
    assert narrow._edge_tokens.dtype == torch.int16 and wide._edge_tokens.dtype == torch.int32
    assert wide.walk(torch.tensor([[10, 20, 140_000], [10, 20, 31]])).tolist() == [7, -1]
    assert wide.children(torch.tensor([3]))[0].tolist() == [[30, 140_000]]


def test_memory_of_a_large_trie():
    generator = torch.Generator().manual_seed(0)
    codes = torch.unique(torch.randint(0, 512, (100_000, 3), generator=generator), dim=0)
    trie = SIDTrie(32_000 + codes + torch.tensor([0, 512, 1024]))
    tensors = (trie._edge_tokens, trie._indptr, trie._node_rows)
    # 2 bytes of token and 4 each of offset and row for a node; with most codes' pairs taken there are 1.9 nodes a SID
    assert sum(tensor.nbytes for tensor in tensors) <= 10 * trie.num_nodes + 4
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
    assert moved is not trie and moved.device == torch.device("cpu") and moved.num_sids == 4


def test_to_moves_every_tensor():
    trie = SIDTrie(HAND)
    meta = trie.to("meta")
    tensors = [value for value in vars(meta).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4 and all(tensor.is_meta for tensor in tensors) and meta.device.type == "meta"
    assert trie.device.type == "cpu"


def test_from_tokenizer(make_tokenizer):
    tokenizer = make_tokenizer()
    trie = SIDTrie.from_tokenizer(tokenizer)
    assert trie.sid_rows(trie.walk(tokenizer.sid_sequences())).tolist() == list(range(30))


def test_leaves_hold_the_rows_given():
    rows = torch.tensor([7, 2**31, 0, 5])
    trie = SIDTrie(HAND, rows)
    assert trie.sid_rows(trie.walk(HAND)).tolist() == [7, 2**31, 0, 5]
    assert trie.sid_rows(torch.arange(-1, 8)).tolist() == [-1, -1, -1, -1, -1, 2**31, 0, 7, 5]
    assert SIDTrie(HAND, rows % 11)._node_rows.dtype == torch.int32
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
