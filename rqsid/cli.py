"""The command `rqsid`."""

import argparse
import sys

DIAGNOSE = """\
Tell whether a catalog's semantic IDs have an hourglass: a middle layer whose codes are used far less evenly than those
around it. Writes report.md, report.json and figures (PNG, SVG) that say which layer it is, whether better training of
the codebooks removes it, and what each remedy would cost, from pruning one token of the layer, which loses nothing, to
pruning all of them.

With --embeddings alone, codebooks are fitted twice, plainly (random start, nothing moved) and better (under-used codes
are moved), and compared. With --codes too, your codes are compared with the better ones. With --codes alone, nothing
is fitted.
"""
EXAMPLES = """\
examples:
  rqsid diagnose --embeddings embeddings.npy
  rqsid diagnose --embeddings embeddings.npy --codes codes.parquet --codebook_sizes 256 256 256
  rqsid diagnose --embeddings shards/ --purchases purchases.parquet --output_dir diagnosis
"""


def main(arguments=None):
    """
    Args:
        arguments (`list[str]`, *optional*):
            What follows `rqsid` on the command line; `sys.argv[1:]` if not given.

    Returns:
        `int`: the exit status, 0, or 2 after an error that was explained on standard error.
    """
    parser = argparse.ArgumentParser("rqsid", description="Generative search with semantic IDs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    diagnose = commands.add_parser(
        "diagnose",
        help="tell whether a catalog's semantic IDs have an hourglass, and what to do about it",
        description=DIAGNOSE,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    given = diagnose.add_argument_group("what you have (at least --embeddings or --codes)")
    given.add_argument(
        "--embeddings",
        metavar="PATH",
        help="a .npy file of shape (N, D), a .safetensors file, or a folder of .safetensors shards",
    )
    given.add_argument(
        "--codes",
        metavar="FILE",
        help="the codes you have, unpruned: a .npy file of shape (N, L), or a .parquet file with a list column 'codes' or "
        "one column per layer, and product ids; rows as in --embeddings, unless both files have ids",
    )
    given.add_argument(
        "--codebook_sizes",
        metavar="K",
        nargs="+",
        type=int,
        help="codes of each layer, first layer first (default without --codes: 256 256 256)",
    )
    given.add_argument(
        "--purchases",
        metavar="FILE",
        help="a .parquet or .csv file, one row a purchase: the report then tells results by interactions, too",
    )
    given.add_argument(
        "--product_ids",
        metavar="PATH",
        help="ids of the rows of --embeddings: a .parquet, .csv or .txt file, or a folder of product_ids-*.parquet "
        "(default: those beside the shards, or in --codes)",
    )
    given.add_argument(
        "--id_column",
        metavar="NAME",
        default="product_id",
        help="column of the ids in the files above, but for product_ids-*.parquet (default: %(default)s)",
    )
    given.add_argument(
        "--count_column",
        metavar="NAME",
        help="how often a row of --purchases counts (default: the column 'count' if there is one, otherwise once)",
    )
    wanted = diagnose.add_argument_group("what you get")
    wanted.add_argument("--output_dir", metavar="FOLDER", default="diagnosis", help="default: %(default)s")
    wanted.add_argument("--seed", type=int, default=0, help="of all fits and samples (default: %(default)s)")
    options = parser.parse_args(arguments)

    from .catalogue_report import report_catalogue  # only now, so that a question for help is answered at once

    try:
        summary = report_catalogue(say=lambda line: sys.stderr.write(line + "\n"), **_without(options, "command"))
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"rqsid {options.command}: error: {error}\n")
        return 2
    sys.stdout.write(summary + "\n")
    return 0


def _without(options, name):
    return {key: value for key, value in vars(options).items() if key != name}
