"""
The quantizers that are compared. Each function fits one and returns a pair of functions, `encode` from points (N, D) to codes
(N, L) and `decode` from codes to points. What only one of them needs is imported inside it.
"""

import numpy as np
import torch

from rqsid import RQVAE, ResidualQuantizer, ResidualQuantizerConfig, RQVAEConfig

ITERATIONS = 25


def rqsid(points, sizes, seed, **options):
    quantizer = ResidualQuantizer(ResidualQuantizerConfig(codebook_sizes=sizes, seed=seed, **options)).fit(points)
    return quantizer.encode, quantizer.decode


def rqvae(points, sizes, seed, **options):
    quantizer = RQVAE(RQVAEConfig(codebook_sizes=sizes, seed=seed, **options)).fit(points)
    return quantizer.encode, quantizer.decode


def faiss_kmeans(points, sizes, seed, iterations=ITERATIONS):
    import faiss

    indices = []

    def fit_layer(residual, size, layer):
        kmeans = faiss.Kmeans(residual.shape[1], size, niter=iterations, seed=seed * len(sizes) + layer + 1)
        kmeans.train(residual)
        indices.append(kmeans.index)
        return kmeans.centroids, None

    def assign(residual, layer):
        return indices[layer].search(residual, 1)[1][:, 0]

    return _layer_by_layer(points, sizes, fit_layer, assign)


def faiss_residual(points, sizes, seed, beam_size=None):
    import faiss

    bits = [size.bit_length() - 1 for size in sizes]
    if sizes != [2 ** bits[0]] * len(sizes):
        raise ValueError(f"codebook sizes {sizes}: faiss.ResidualQuantizer needs equal powers of two.")
    quantizer = faiss.ResidualQuantizer(points.shape[1], len(sizes), bits[0])
    quantizer.cp.seed = seed + 1234
    if beam_size is not None:
        quantizer.max_beam_size = beam_size
    quantizer.train(points)

    def encode(some):
        return faiss.unpack_bitstrings(quantizer.compute_codes(some), len(sizes), bits[0])

    def decode(codes):
        return quantizer.decode(faiss.pack_bitstrings(codes.astype(np.int32), bits[0]))

    return encode, decode


def sklearn_kmeans(points, sizes, seed, iterations=ITERATIONS):
    from sklearn.cluster import KMeans

    fitted = []

    def fit_layer(residual, size, layer):
        kmeans = KMeans(size, init="k-means++", n_init=1, max_iter=iterations, random_state=seed * len(sizes) + layer)
        fitted.append(kmeans.fit(residual))
        return kmeans.cluster_centers_, kmeans.labels_

    return _layer_by_layer(points, sizes, fit_layer, lambda residual, layer: fitted[layer].predict(residual))


def semantic_id(points, sizes, seed, iterations=ITERATIONS):
    from semantic_id.algorithms.rq_kmeans import RQKMeans

    quantizer = RQKMeans(len(sizes), sizes, max_iter=iterations, n_init=1, random_state=seed)
    quantizer.fit(points)
    return quantizer.encode, quantizer.decode


def fast_pytorch_kmeans(points, sizes, seed, iterations=ITERATIONS):
    from fast_pytorch_kmeans import KMeans

    torch.manual_seed(seed)
    np.random.seed(seed)
    fitted = []

    def fit_layer(residual, size, layer):
        kmeans = KMeans(size, max_iter=iterations)
        labels = kmeans.fit_predict(torch.from_numpy(residual))
        fitted.append(kmeans)
        return kmeans.centroids.numpy(), labels.numpy()

    return _layer_by_layer(
        points, sizes, fit_layer, lambda residual, layer: fitted[layer].predict(torch.from_numpy(residual)).numpy()
    )


def vector_quantize_pytorch(points, sizes, seed, epochs=5, batch_size=4096):
    """Moving averages over batches, with k-means on the first batch and dead codes replaced, as its README advises."""
    from vector_quantize_pytorch import ResidualVQ

    torch.manual_seed(seed)
    rows = torch.from_numpy(points)
    quantizer = ResidualVQ(
        dim=points.shape[1],
        num_quantizers=len(sizes),
        codebook_size=tuple(sizes),
        kmeans_init=True,
        threshold_ema_dead_code=2,
    )
    with torch.no_grad():
        for _ in range(epochs):
            for batch in torch.randperm(len(rows)).split(batch_size):
                quantizer(rows[batch][None])
    quantizer.eval()

    @torch.no_grad()
    def encode(some):
        parts = [quantizer(chunk[None])[1][0] for chunk in torch.from_numpy(some).split(batch_size)]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def decode(codes):
        return quantizer.get_output_from_indices(torch.from_numpy(np.ascontiguousarray(codes))[None])[0].numpy()

    return encode, decode


def _layer_by_layer(points, sizes, fit_layer, assign):
    """
    Residual quantization with somebody's k-means.

    Args:
        fit_layer (callable): from (residual, size, layer) to the codebook (K, D) and, where fitting gave them, the codes (N,).
        assign (callable): from (residual, layer) to codes (N,).
    """
    codebooks, residual = [], points.copy()
    for layer, size in enumerate(sizes):
        codebook, codes = fit_layer(residual, size, layer)
        codebooks.append(np.array(codebook, dtype=np.float32))
        if layer + 1 < len(sizes):
            residual -= codebooks[layer][assign(residual, layer) if codes is None else codes]

    def encode(some):
        residual, codes = some.copy(), np.empty((len(some), len(sizes)), dtype=np.int32)
        for layer, codebook in enumerate(codebooks):
            codes[:, layer] = assign(residual, layer)
            if layer + 1 < len(sizes):
                residual -= codebook[codes[:, layer]]
        return codes

    def decode(codes):
        return sum(codebook[codes[:, layer]] for layer, codebook in enumerate(codebooks))

    return encode, decode


FAISS = "faiss.Kmeans"
# What the goals are about; fitted once per seed, in turns. The last is rqsid's own Lloyd without what it adds to it.
SEEDED = [FAISS, "rqsid fast", "rqsid quality", "rqsid random, no relocation"]

# name: (function, module it needs, distribution to install, options, options with --quick or None to leave it out)
METHODS = {
    "rqsid fast": (rqsid, "rqsid", "rqsid", {"preset": "fast"}, {"preset": "fast"}),
    "rqsid quality": (rqsid, "rqsid", "rqsid", {"preset": "quality"}, {"preset": "quality"}),
    "rqsid random, no relocation": (rqsid, "rqsid", "rqsid", {"relocation_threshold": 0}, {"relocation_threshold": 0}),
    "rqsid quality, k-means++": (rqsid, "rqsid", "rqsid", {"init": "k-means++"}, None),
    "rqsid quality, staged": (rqsid, "rqsid", "rqsid", {"init": "staged"}, None),
    "rqsid fast, staged": (rqsid, "rqsid", "rqsid", {"init": "staged", "preset": "fast"}, None),
    FAISS: (faiss_kmeans, "faiss", "faiss-cpu", {}, {}),
    "faiss.ResidualQuantizer": (faiss_residual, "faiss", "faiss-cpu", {}, None),
    "faiss.ResidualQuantizer, beam 1": (faiss_residual, "faiss", "faiss-cpu", {"beam_size": 1}, {"beam_size": 1}),
    "scikit-learn KMeans": (sklearn_kmeans, "sklearn", "scikit-learn", {}, {"iterations": 5}),
    "semantic-id RQKMeans": (semantic_id, "semantic_id", "semantic-id", {}, None),
    "fast-pytorch-kmeans": (fast_pytorch_kmeans, "fast_pytorch_kmeans", "fast-pytorch-kmeans", {}, None),
    "vector-quantize-pytorch ResidualVQ": (
        vector_quantize_pytorch,
        "vector_quantize_pytorch",
        "vector-quantize-pytorch",
        {},
        {"epochs": 1},
    ),
    "rqsid RQVAE, 10 epochs": (rqvae, "rqsid", "rqsid", {"num_epochs": 10}, None),
    "rqsid RQVAE, 2 epochs": (rqvae, "rqsid", "rqsid", None, {"num_epochs": 2}),
}
