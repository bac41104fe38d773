"""
Publishes a finished run: model, tokenizer and code in one repository, the codebooks in another, the metrics as Spaces, and a
collection of them all.

    hf auth login
    python examples/publish.py runs/my-model org/my-model --codebook org/my-codebook \
        --collection "Semantic IDs of my shop" --license apache-2.0 --private --tag v1

The first argument is what `trainer.save_model()` left, or a checkpoint. Everything is checked before anything is uploaded; whatever
stops it half-way, the same command again completes it, and uploads nothing twice. Prompts are published by
`rqsid.trainer.prompt_datasets.push_prompts`.
"""

import argparse
import sys

from rqsid.trainer.publishing import publish_run


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Publishes a finished run on the Hub.", allow_abbrev=False)
    parser.add_argument("folder", help="what trainer.save_model() wrote, or a checkpoint")
    parser.add_argument("model", help="repository of the model, such as org/my-model")
    parser.add_argument("--codebook", help="repository of the codebooks, such as org/my-codebook; none if not given")
    parser.add_argument("--collection", help="title of a collection that holds what is published; none if not given")
    parser.add_argument("--no-metrics", action="store_true", help="do not publish the metrics as Spaces")
    parser.add_argument("--spaces", help="user or organization of the Spaces; that of the model if not given")
    parser.add_argument("--private", action="store_true", help="make what is published private")
    parser.add_argument("--revision", help="branch of model and codebooks; main if not given")
    parser.add_argument("--tag", help="tag for the commits of model and codebooks")
    parser.add_argument("--license", help="licence of model and codebooks, such as apache-2.0")
    parser.add_argument("--message", default="Publish a run", help="commit message")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit code: 0, or 1 if what was asked for cannot be done. Tokens come from `hf auth login` or HF_TOKEN."""
    arguments = parse_arguments(argv)
    try:
        published = publish_run(
            arguments.folder,
            arguments.model,
            codebook_id=arguments.codebook,
            metrics=not arguments.no_metrics,
            collection=arguments.collection,
            private=arguments.private or None,
            revision=arguments.revision,
            commit_message=arguments.message,
            tag=arguments.tag,
            license=arguments.license,
            space_namespace=arguments.spaces,
        )
    except (OSError, ValueError) as error:  # a PermissionError and a ConnectionError are OSErrors
        print(f"publish.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for name, entry in published.items():
        commit = f" at {entry['commit'][:7]}" if "commit" in entry else ""
        print(f"{name}: {entry['url']}{commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
