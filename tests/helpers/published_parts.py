"""What tests of the Hub publish: the names of products, the sizes of codebooks; and a look at a card."""

from huggingface_hub import ModelCard

SIZES = [8, 6, 4]
PRODUCTS = [f"p{row}" for row in range(90)]


def card_of(hub, repo_id, **where):
    return ModelCard(hub.files(repo_id, **where)["README.md"].decode())
