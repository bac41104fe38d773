"""
The study: what happens to the tokens of residual quantization, on any catalogue, and what that does to a model.

    python examples/study/study.py picture --data DIR --encoder BAAI/bge-small-en-v1.5 --out runs/study
    python examples/study/study.py published --data DIR --out runs/study
    python examples/study/study.py causes --out runs/study
    python examples/study/study.py all --data DIR --encoder BAAI/bge-small-en-v1.5 --out runs/study
    python examples/study/study.py remedies --data DIR --encoder BAAI/bge-small-en-v1.5 --out runs/study
    python examples/study/study.py tables --out runs/study

`harm`, `probes`, `remedies`, `dense`, `schemes` and `append` train language models; `all` is every experiment. Each command goes on
where an earlier one stopped: what `--out` holds of finished cells is not computed again. `tables` are also written at the end of
every other command. See README.md for the layouts of `--data`.
"""

import argparse

import causes as causes_module
import picture as picture_module
from accuracy_tables import write_accuracy_tables
from append import append
from append_tables import write_append_tables
from catalogues import load_catalogue
from cells import commit
from codes import check_size
from datasets import disable_progress_bars
from dense import dense
from dense_tables import write_dense_tables
from item_embeddings import KINDS, embed
from schemes import schemes
from tables import write_tables
from training_cells import LAYERS, SEEDS, SIZE, harm, probes, remedies
from training_figures import write_training_figures
from training_tables import write_training_tables
from transformers.utils import logging

TRAINING = {
    "harm": harm,
    "probes": probes,
    "remedies": remedies,
    "dense": dense,
    "schemes": schemes,
    "append": append,
}
HAVE_ARMS = ("remedies", "schemes")
WRITERS = (
    write_tables,
    write_training_tables,
    write_training_figures,
    write_dense_tables,
    write_append_tables,
    write_accuracy_tables,
)


def main(arguments=None):
    args = make_parser().parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    if args.arms and args.experiment not in HAVE_ARMS:
        raise SystemExit(
            f"--arms chooses among those of {' or '.join(HAVE_ARMS)}, {args.experiment} has others. Leave it out."
        )
    commit()  # before anything that takes time, during which files may change
    if args.experiment in ("published", "picture", "all"):
        run_published(args)
    if args.experiment in ("picture", "all"):
        run_picture(args)
    if args.experiment in ("causes", "all"):
        run_causes(args)
    for experiment in TRAINING:
        if args.experiment in (experiment, "all"):
            run_training(args, experiment)
    print(f"Tables: {[path for write in WRITERS for path in write(args.out)]}")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["published", "picture", "causes", "all", *TRAINING, "tables"])
    parser.add_argument("--data", action="append", help="A folder, or completejourney; may be repeated.")
    parser.add_argument("--out", default="runs/study", help="Folder of results.")
    parser.add_argument(
        "--encoder", help="A sentence-transformers model; without it there are no sentence embeddings."
    )
    parser.add_argument(
        "--embeddings", choices=KINDS, action="append", help="Which; all that are possible if not given."
    )
    parser.add_argument("--max_seq_length", type=int, default=128, help="Tokens of a text that the encoder reads.")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=None,
        help="Codes per layer; 64 and 256 if not given, 128 for training.",
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=None, help="Layers; 3 and 4 if not given, 3 for training."
    )
    parser.add_argument(
        "--any_size", action="store_true", help="Take --sizes of more than a twentieth of the products, too."
    )
    parser.add_argument("--quantizers", choices=picture_module.QUANTIZERS, nargs="+", help="Both if not given.")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="0, 1 and 2 if not given.")
    parser.add_argument("--epochs", type=int, default=None, help="Of language models; 4 if not given.")
    parser.add_argument(
        "--train_rows", type=int, default=None, help="Sessions or rows that language models learn; all if not given."
    )
    parser.add_argument(
        "--arms", nargs="+", help="Of remedies or schemes, by their names in the tables; all if not given."
    )
    parser.add_argument(
        "--task",
        choices=["search", "next item"],
        default="search",
        help="Of language models; without queries the task is the next item, whatever is asked for.",
    )
    parser.add_argument("--quick", action="store_true", help="The smallest cells: a minute, and says nothing.")
    return parser


def run_published(args):
    if not args.data:
        raise SystemExit("--data is missing: a folder of purchases and products, or completejourney.")
    for data in args.data:
        picture_module.published(load_catalogue(data), args.out)


def run_picture(args):
    kinds = args.embeddings or [kind for kind in KINDS if args.encoder or kind != "sentence encoder"]
    options = {"sizes": [16], "layers": [3], "seeds": [0], "epochs": 2} if args.quick else {}
    names = ("sizes", "layers", "seeds", "quantizers")
    options |= {name: getattr(args, name) for name in names if getattr(args, name)} | {"any_size": args.any_size}
    for data in args.data:
        catalogue = load_catalogue(data)
        for kind in kinds:
            embeddings, described = embed(catalogue, kind, args.out, args.encoder, args.max_seq_length)
            picture_module.picture(catalogue, embeddings, described, args.out, **options)


def run_causes(args):
    options = {"num_items": 1000, "dim": 8, "sizes": [16], "seeds": [0, 1]} if args.quick else {}
    options |= {name: getattr(args, name) for name in ("sizes", "seeds") if getattr(args, name)}
    causes_module.causes(args.out, **options)


def run_training(args, experiment):
    """The first of the embeddings that are possible; with `--sizes` and `--layers` every pair of those for harm, one for the others."""
    if not args.data:
        raise SystemExit("--data is missing: a folder of purchases and products, or completejourney.")
    kind = (args.embeddings or ["sentence encoder" if args.encoder else "dual tower"])[0]
    if args.experiment == "all" and experiment == "append" and kind == "dual tower":
        print("append is left out: a tower has seen purchases of all products. Pass --encoder.")
        return
    is_one_of_all = args.experiment == "all"  # whose --sizes and --layers are those of the picture
    default = [16 if args.quick else SIZE]
    sizes = default if is_one_of_all else args.sizes or default
    layers = [LAYERS] if is_one_of_all else args.layers or [LAYERS]
    changes = {name: getattr(args, name) for name in ("epochs", "train_rows") if getattr(args, name)}
    options = {"seeds": args.seeds or ([0] if args.quick else SEEDS), "quick": args.quick, "changes": changes}
    if experiment != "harm":
        if len(sizes) > 1 or len(layers) > 1:
            raise SystemExit(f"{experiment} takes one of --sizes and one of --layers, got {sizes} and {layers}.")
        options |= {"size": sizes[0], "layers": layers[0]}
    elif args.quick or (not is_one_of_all and (args.sizes or args.layers)):
        options["configurations"] = [(size, count) for size in sizes for count in layers]
    if args.arms:
        options["names"] = args.arms
    for data in args.data:
        catalogue = load_catalogue(data)
        for size in () if args.any_size else sizes:
            check_size(size, len(catalogue.product_ids))
        embeddings, described = embed(catalogue, kind, args.out, args.encoder, args.max_seq_length)
        if args.task == "next item":
            catalogue = catalogue.without_queries()
        TRAINING[experiment](catalogue, embeddings, described, args.out, **options)


if __name__ == "__main__":
    main()
