"""Long sequences of changes to a catalog, against a catalog of plain lists; versions; failures that leave no trace."""

import copy
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rqsid import ProductCatalog, ResidualQuantizer, ResidualQuantizerConfig, TokenPruning


def make_quantizer(sizes, seed=0, dim=3, **options):
    """A quantizer with random codebooks, as if fitted."""
    random = np.random.default_rng(seed)
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=list(sizes), embedding_dim=dim, **options))
    for at, codebook in enumerate(quantizer.codebooks):
        codebook.data = torch.tensor(random.standard_normal(tuple(codebook.shape)) / 1.6**at).float()
    return quantizer


class PlainCatalog:
    """What a catalog should hold, as lists with an entry per product."""

    def __init__(self, sizes, pruning, capacity, suffix_size):
        self.sizes, self.pruning, self.capacity, self.suffix_size = sizes, pruning, capacity, suffix_size
        self.ids, self.codes, self.sids, self.popularity, self.withdrawn, self.texts = [], [], [], [], [], []

    def paths(self, codes):
        return [tuple(row) for row in self.pruning.apply(np.asarray(codes)).tolist()]

    def members(self):
        """All products of each SID, by popularity, ties by row."""
        members = {}
        for row in sorted(range(len(self.ids)), key=lambda row: (-self.popularity[row], row)):
            members.setdefault(self.sids[row], []).append(row)
        return members

    def live(self, rows):
        return [row for row in rows if not self.withdrawn[row]]

    def leaves(self):
        return set(self.paths(list(itertools.product(*map(range, self.sizes)))))

    def place(self, codes, popularity, policy, reuse):
        """
        Returns:
            SIDs of newcomers, `None` for those that take a free leaf elsewhere; the products that each leaf counts for
            these, `capacity` and more where it takes none; whether any looks for a leaf; and what there is too little of.
        """
        paths, members = self.paths(codes), self.members()
        plain = {sid[:-1] for sid in members if sid[-1] < 0}
        dead = {sid[:-1] for sid in members if sid[-1] < 0 and not self.live(members[sid])}
        unused = {}  # suffixes that may be given, in their order
        for sid in members:
            if sid[-1] >= 0:
                used = [other[-1] for other in members if other[:-1] == sid[:-1]]
                again = [suffix for suffix in used if not self.live(members[*sid[:-1], suffix])]
                unused[sid[:-1]] = (sorted(again) if reuse else []) + [*range(max(used) + 1, self.suffix_size)]
        order = sorted(range(len(paths)), key=lambda at: (-popularity[at], at))
        sids, movers, others, short = [None] * len(paths), [], set(), set()
        for at in order:
            path = paths[at]
            if path in unused:
                if not unused[path]:
                    short.add("suffixes")
                    continue
                sids[at] = (*path, unused[path].pop(0))
            elif policy == "reassign" or (path in dead and not reuse):
                movers.append(at)
            else:
                others.add(path)
                crowd = [other for other in order if paths[other] == path]
                has_suffix = policy == "suffix" and path not in plain and len(crowd) > 1
                if has_suffix and len(crowd) > self.suffix_size:
                    short.add("suffixes")
                sids[at] = (*path, crowd.index(at) if has_suffix else -1)
        load = Counter()
        for sid, rows in members.items():
            load[sid[:-1]] = len(self.live(rows) if reuse else rows)
            if sid[-1] >= 0 or (not reuse and not self.live(rows)):
                load[sid[:-1]] = self.capacity
        load.update(dict.fromkeys(others, self.capacity))
        room = sum(max(0, self.capacity - load[leaf]) for leaf in self.leaves())
        if len(movers) > room:
            short.add("room")
        for at in movers:
            if load[paths[at]] < self.capacity:
                sids[at] = (*paths[at], -1)
                load[paths[at]] += 1
        return sids, load, len(movers) > 0, short

    def add(self, ids, codes, popularity, texts, sids):
        self.ids += ids
        self.codes += np.asarray(codes).tolist()
        self.popularity += list(popularity)
        self.texts += texts or [""] * len(ids)
        self.sids += sids
        self.withdrawn += [False] * len(ids)


def check_equal(catalog, plain, later=None):
    """All that can be asked of a catalog; `later` are products and SIDs that it does not have yet."""
    rows, members = np.arange(len(plain.ids)), plain.members()
    assert len(catalog) == len(plain.ids) and catalog.num_sids == len(members)
    assert catalog.product_ids(rows) == plain.ids and catalog.texts(rows) == plain.texts
    assert catalog.find_products(plain.ids).tolist() == rows.tolist()
    assert catalog.codes.tolist() == plain.codes
    assert catalog.popularity.tolist() == plain.popularity
    assert catalog.withdrawn.tolist() == plain.withdrawn
    sids = [tuple(row) for row in catalog.sid_codes.tolist()]
    assert [sids[row] for row in catalog.sid_rows(rows)] == plain.sids
    assert catalog.find_sids(np.array(plain.sids)).tolist() == catalog.sid_rows(rows).tolist()
    assert [catalog.products_of(row).tolist() for row in range(len(sids))] == [
        plain.live(members[sid]) for sid in sids
    ]
    has_live = [row for row, sid in enumerate(sids) if plain.live(members[sid])]
    assert catalog.live_sid_rows().tolist() == has_live
    products, positions = catalog.expand_sids(np.arange(len(sids))[None], len(rows) + 1)
    listed = [(row, at) for at, sid in enumerate(sids) for row in plain.live(members[sid])]
    listed += [(-1, -1)] * (len(rows) + 1 - len(listed))
    assert list(zip(products[0].tolist(), positions[0].tolist(), strict=True)) == listed
    report, groups = catalog.collision_report(ks=(1, 2)), [len(plain.live(members[sid])) for sid in sids]
    num_live = sum(groups)
    assert (report.products, report.sids, report.largest_group) == (num_live, len(has_live), max(groups, default=0))
    assert report.recall_ceiling[2] == pytest.approx(
        sum(min(2, size) for size in groups) / num_live if num_live else 1
    )

    assert len(set(plain.ids)) == len(plain.ids)
    sequences = {tuple((at, code) for at, code in enumerate(sid) if code >= 0) for sid in sids}
    assert len(sequences) == len(sids)
    assert not any(one[:length] in sequences for one in sequences for length in range(len(one)))
    if later is not None:
        new_ids, new_sids = later.ids[len(rows) :], sorted(set(later.sids) - set(plain.sids))
        assert (catalog.find_products(new_ids) == -1).all()
        if new_sids:
            assert (catalog.find_sids(np.array(new_sids)) == -1).all()


def freeze(catalog):
    """What `assert_untouched` compares with: contents, not only the arrays' names."""
    state = dict(catalog.__dict__)
    return state, {name: column.copy() for name, column in catalog.columns.items()}, copy.deepcopy(catalog.history)


def assert_untouched(catalog, frozen):
    state, columns, history = frozen
    assert catalog.columns is state["columns"] and catalog.history == history
    assert all(catalog.__dict__[name] == state[name] for name in state if name not in ("columns", "_sid_index"))
    for name, column in columns.items():
        assert np.array_equal(catalog.columns[name], column) and catalog.columns[name].dtype == column.dtype, name


class Changes(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.catalog = None

    def teardown(self):
        shutil.rmtree(self.folder)

    @initialize(
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        seed=st.integers(0, 10**6),
        policy=st.sampled_from(["share", "suffix", "reassign"]),
        data=st.data(),
    )
    def build(self, sizes, seed, policy, data):
        self.random = np.random.default_rng(seed)
        self.quantizer, self.policy, self.count = make_quantizer(sizes, seed), policy, 0
        capacity = data.draw(st.integers(1, 3)) if policy == "reassign" else 1
        ranking = self.draw_codes(sizes, 30)
        pruning = TokenPruning("none").fit(ranking, sizes)
        if len(sizes) > 1 and data.draw(st.booleans()):
            layer = data.draw(st.integers(0, len(sizes) - 2))
            top_k = data.draw(st.integers(1, sizes[layer]))
            by_share = {"strategy": "top_k", "top_k": top_k} if top_k < sizes[layer] else {"strategy": "drop_layer"}
            pruning = TokenPruning(layer=layer, **by_share).fit(ranking, sizes)
        model = PlainCatalog(sizes, pruning, capacity, 0)
        num_products = data.draw(st.integers(1, 12))
        if policy == "reassign":
            num_products = min(num_products, len(model.leaves()) * capacity)
        ids, codes, popularity, texts = self.draw_products(sizes, num_products)
        embeddings = None
        if policy == "reassign" and data.draw(st.booleans()):
            embeddings = self.random.standard_normal((num_products, 3)).astype(np.float32)
        suffix_size = None
        if policy == "suffix":
            suffix_size = max(Counter(model.paths(codes)).values()) + data.draw(st.integers(0, 3))
            model.suffix_size = suffix_size
        knows = policy == "reassign" or data.draw(st.booleans())
        self.catalog = ProductCatalog.build(
            ids,
            codes,
            sizes,
            pruning,
            popularity,
            texts,
            collisions=policy,
            capacity=capacity,
            suffix_size=suffix_size,
            quantizer=self.quantizer if knows else None,
            embeddings=embeddings,
        )
        expected = model.place(codes, popularity, policy, False)
        self.adopt(model, self.catalog, expected, ids, codes, popularity, texts)
        self.model, self.versions = model, [copy.deepcopy(model)]

    def draw_codes(self, sizes, count):
        spread = self.random.integers(1, 5)  # few codes make crowded SIDs
        return np.stack([self.random.integers(0, min(size, spread), count) for size in sizes], axis=1)

    def draw_products(self, sizes, count):
        ids = [f"p{self.count + at}" + "·" * (at % 3) for at in range(count)]
        self.count += count
        popularity = self.random.integers(-1, 3, count).astype(float)
        texts = [f"text {at}" for at in range(count)] if self.random.random() < 0.5 else None
        return ids, self.draw_codes(sizes, count), popularity.tolist(), texts

    def adopt(self, model, catalog, expected, ids, codes, popularity, texts):
        """Compares the SIDs of newcomers with those expected; where a free leaf was found, checks that it may be taken."""
        sids, load, _, short = expected
        assert not short
        rows = catalog.find_products(ids)
        found = [tuple(sid) for sid in catalog.sid_codes[catalog.sid_rows(rows)].tolist()]
        paths, leaves = model.paths(codes), model.leaves()
        for at, sid in enumerate(sids):
            if sid is None:
                assert found[at][-1] == -1 and found[at][:-1] in leaves
                load[found[at][:-1]] += 1
                assert load[found[at][:-1]] <= model.capacity, "a leaf without room was taken"
            else:
                assert found[at] == sid
        for at, sid in enumerate(sids):
            depth = next((depth for depth, code in enumerate(paths[at]) if found[at][depth] != code), None)
            if sid is None:  # who left a prefix left it without room
                beside = [leaf for leaf in leaves if leaf[: depth + 1] == paths[at][: depth + 1]]
                assert all(load[leaf] >= model.capacity for leaf in beside)
        model.add(ids, codes, popularity, texts, found)

    @rule(
        count=st.integers(1, 8),
        policy=st.sampled_from([None, "share", "suffix", "reassign"]),
        reuse=st.booleans(),
        by_embeddings=st.booleans(),
        with_quantizer=st.booleans(),
        on_branch=st.booleans(),
    )
    def append(self, count, policy, reuse, by_embeddings, with_quantizer, on_branch):
        model = copy.deepcopy(self.model)
        ids, codes, popularity, texts = self.draw_products(model.sizes, count)
        arguments = {"codes": codes, "quantizer": self.quantizer if with_quantizer else None}
        if by_embeddings:
            embeddings = self.random.standard_normal((count, 3)).astype(np.float32)
            arguments = {"embeddings": embeddings, "quantizer": self.quantizer}
            codes = self.quantizer.encode(embeddings)
        arguments |= {"popularity": popularity, "texts": texts, "collisions": policy, "reuse_withdrawn": reuse}
        catalog = self.catalog.at_version(self.catalog.version) if on_branch else self.catalog
        policy = policy or self.policy
        expected = model.place(codes, popularity, policy, reuse)
        too_little = {
            "suffixes": "are reserved. Pass reuse_withdrawn",
            "room": "have room for",
            "quantizer": "pass quantizer=",
        }
        short = expected[3] | ({"quantizer"} if expected[2] and not (with_quantizer or by_embeddings) else set())
        if policy == "suffix" and not model.suffix_size:
            frozen = freeze(catalog)
            with pytest.raises(ValueError, match="needs suffix tokens, of which this catalog has none"):
                catalog.append(ids, **arguments)
            assert_untouched(catalog, frozen)
        elif short:
            frozen = freeze(catalog)
            with pytest.raises(ValueError, match="|".join(too_little[what] for what in short)):
                catalog.append(ids, **arguments)
            assert_untouched(catalog, frozen)
        else:
            added = catalog.append(ids, **arguments)
            assert added.tolist() == list(range(len(self.model.ids), len(self.model.ids) + count))
            self.adopt(model, catalog, expected, ids, codes, popularity, texts)
            check_equal(catalog, model)
            self.commit(model, on_branch)

    def commit(self, model, on_branch=False):
        """Changes of a branch are not seen by the catalog that it came from, which the invariant finds as it was."""
        if not on_branch:
            self.model = model
            self.versions.append(copy.deepcopy(model))

    def some(self, rows):
        return self.random.permutation(rows)[: self.random.integers(1, len(rows) + 1)].tolist()

    @precondition(lambda self: self.catalog is not None and not all(self.model.withdrawn))
    @rule(everything=st.booleans())
    def withdraw(self, everything):
        live = self.model.live(range(len(self.model.ids)))
        rows = live if everything else self.some(live)
        self.catalog.withdraw([self.model.ids[row] for row in rows])
        for row in rows:
            self.model.withdrawn[row] = True
        self.commit(self.model)

    @precondition(lambda self: self.catalog is not None and any(self.model.withdrawn))
    @rule()
    def restore(self):
        rows = self.some([row for row, gone in enumerate(self.model.withdrawn) if gone])
        self.catalog.restore([self.model.ids[row] for row in rows])
        for row in rows:
            self.model.withdrawn[row] = False
        self.commit(self.model)

    @rule()
    def update_popularity(self):
        rows = self.some(range(len(self.model.ids)))
        values = self.random.integers(-1, 3, len(rows)).astype(float).tolist()
        before = self.catalog.version
        self.catalog.update_popularity([self.model.ids[row] for row in rows], values)
        if any(self.model.popularity[row] != value for row, value in zip(rows, values, strict=True)):
            for row, value in zip(rows, values, strict=True):
                self.model.popularity[row] = value
            self.commit(self.model)
        else:
            assert self.catalog.version == before

    @precondition(lambda self: self.catalog is not None)
    @rule(kind=st.sampled_from(["append", "withdraw", "restore", "update_popularity"]))
    def fail(self, kind):
        """A batch with one product too many, the last."""
        model, frozen = self.model, freeze(self.catalog)
        if kind == "append":
            ids = ["new", model.ids[-1]]
            with pytest.raises(ValueError, match="1 of 2 products are in the catalog already"):
                self.catalog.append(ids, self.draw_codes(model.sizes, 2), collisions="share", reuse_withdrawn=True)
        elif kind == "update_popularity":
            with pytest.raises(ValueError, match="'unknown'"):
                self.catalog.update_popularity([model.ids[0], "unknown"], [99, 99])
        else:
            wrong = [row for row, gone in enumerate(model.withdrawn) if gone == (kind == "withdraw")]
            right = [row for row, gone in enumerate(model.withdrawn) if gone != (kind == "withdraw")]
            if wrong:
                message = "withdrawn already" if kind == "withdraw" else "not withdrawn"
                with pytest.raises(ValueError, match=f"1 of these products are {message}"):
                    getattr(self.catalog, kind)([model.ids[row] for row in [*right, wrong[0]]])
        assert_untouched(self.catalog, frozen)

    @precondition(lambda self: self.catalog is not None)
    @rule(same_path=st.booleans())
    def save_and_load(self, same_path):
        path = os.path.join(self.folder, "same" if same_path else f"{time.monotonic_ns()}")
        self.catalog.save(path)
        loaded = ProductCatalog.load(path)
        for name, column in self.catalog.columns.items():
            assert np.array_equal(column, loaded.columns[name]) and column.dtype == loaded.columns[name].dtype, name
        self.catalog = loaded

    @precondition(lambda self: self.catalog is not None)
    @rule(share=st.floats(0, 1))
    def forget_versions(self, share):
        oldest = self.catalog.oldest_version
        before = oldest + int(share * (self.catalog.version - oldest))
        self.catalog.forget_versions(before)
        assert self.catalog.oldest_version == before
        if before > 1:
            with pytest.raises(ValueError, match=f"given up by forget_versions; {before} is the oldest"):
                self.catalog.at_version(before - 1)

    @invariant()
    def the_catalog_is_what_it_should_be(self):
        if self.catalog is not None:
            assert self.catalog.version == len(self.versions)
            check_equal(self.catalog, self.model)

    @invariant()
    def versions_are_what_they_were(self):
        if self.catalog is None:
            return
        for version in {
            self.catalog.oldest_version,
            self.random.integers(self.catalog.oldest_version, self.catalog.version + 1),
        }:
            old = self.catalog.at_version(int(version))
            assert old.version == version == old.history[-1]["version"]
            assert old.oldest_version == self.catalog.oldest_version == old.history[0]["version"]
            check_equal(old, self.versions[version - 1], self.model)
            # SIDs of then keep their rows.
            assert np.array_equal(self.catalog.sid_codes[: old.num_sids], old.sid_codes)


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
TestChanges = pytest.mark.slow(TestChanges)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["share", "suffix", "reassign"])
def test_many_products_do_not_move(policy, tmp_path):
    """200,000 products, 1,000 withdrawn before and after 2,000 are appended: every array of the old ones stays."""
    random, sizes, num_products = np.random.default_rng(0), [64, 64, 64], 200_000
    quantizer = make_quantizer(sizes)
    ids = [f"p{row:06d}" for row in range(num_products)]
    # As frequencies are in catalogues: few codes have many of the products.
    codes = (random.power(0.7, (num_products, 3)) * 64).astype(np.int64)
    popularity = random.integers(0, 100, num_products).astype(float)
    options = {"collisions": policy, "quantizer": quantizer} | ({"suffix_size": 500} if policy == "suffix" else {})
    catalog = ProductCatalog.build(ids, codes, sizes, None, popularity, **options)
    before = {name: column.copy() for name, column in catalog.columns.items()}
    sids = catalog.sid_codes[catalog.sid_rows(np.arange(num_products))].copy()
    if policy != "share":
        assert catalog.num_sids == num_products

    first_gone = random.permutation(num_products)[:1000]
    catalog.withdraw([ids[row] for row in first_gone])
    start = time.perf_counter()
    new_ids = [f"n{row:06d}" for row in range(2000)]
    new_codes = (random.power(0.7, (2000, 3)) * 64).astype(np.int64)
    rows = catalog.append(new_ids, new_codes, quantizer=quantizer)
    seconds = time.perf_counter() - start
    second_gone = np.setdiff1d(random.permutation(num_products)[:2000], first_gone)[:1000]
    catalog.withdraw([*[ids[row] for row in second_gone], *new_ids[:10]])
    assert rows.tolist() == list(range(num_products, num_products + 2000))

    num_sids = len(before["sid_codes"])
    for name in ("product_codes", "product_sids", "popularity", "product_id_bytes", "sid_codes"):
        assert np.array_equal(catalog.columns[name][: len(before[name])], before[name]), name
    assert np.array_equal(catalog.sid_codes[catalog.sid_rows(np.arange(num_products))], sids)
    assert catalog.find_products(ids + new_ids).tolist() == list(range(num_products + 2000))
    new_sids = catalog.sid_rows(rows)
    gone = np.concatenate([first_gone, second_gone, rows[:10]])
    listed = catalog.expand_sids(np.arange(catalog.num_sids)[None], num_products)[0]
    assert len(np.intersect1d(listed, gone)) == 0 and (listed >= 0).sum() == num_products + 2000 - len(gone)
    dead = np.setdiff1d(
        catalog.sid_rows(first_gone), catalog.sid_rows(np.setdiff1d(np.arange(num_products), first_gone))
    )
    assert len(np.intersect1d(new_sids, dead)) == 0
    if policy == "suffix":  # who met a SID without suffix shares it
        assert (catalog.sid_codes[new_sids[new_sids < num_sids], -1] == -1).all() and (new_sids >= num_sids).any()
    if policy == "reassign":
        assert (new_sids >= num_sids).all() and len(np.unique(new_sids)) == 2000
        own = np.unique(new_codes, axis=0, return_index=True)[1]  # the first of each that no product had stay
        had = set(map(tuple, sids[:, :3].tolist()))
        free = [row for row in own.tolist() if tuple(new_codes[row].tolist()) not in had]
        assert free and (catalog.sid_codes[new_sids[free], :3] == new_codes[free]).all()

    catalog.save(tmp_path / "catalog")
    old = ProductCatalog.load(tmp_path / "catalog", version=1)
    for name, column in before.items():
        assert np.array_equal(old.columns[name], column), name
    assert seconds < 60
