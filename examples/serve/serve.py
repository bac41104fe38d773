"""
Serves a fine-tuned model over HTTP.

    python examples/serve/serve.py --model my-model --port 8000 --segments segments.json

`--model` is a folder that SIDTrainer saved: model and tokenizer together. See README.md beside this file for requests,
answers and limits.
"""

import logging
from dataclasses import dataclass, field
from functools import partial

import uvicorn
from app import Limits, create_app
from engine import SearchEngine
from transformers import HfArgumentParser


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Folder with a model and its SIDTokenizer."})
    segments: str | None = field(
        default=None, metadata={"help": "JSON of name -> product ids, or parquet with segment and product_id."}
    )
    device: str | None = field(default=None, metadata={"help": "cuda if there is one, otherwise cpu."})
    num_beams: int | None = field(default=None, metadata={"help": "5 times --max_top_k, at least 50, if not given."})
    normalize: str = field(
        default="vocab", metadata={"help": "As the model was trained.", "choices": ["vocab", "sid"]}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "0.0.0.0 to be seen from outside."})
    port: int = field(default=8000, metadata={"help": "0 for any that is free."})


def main():
    script, limits = HfArgumentParser((ScriptArguments, Limits)).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    load = partial(
        SearchEngine.load,
        script.model,
        segments=script.segments,
        device=script.device,
        max_batch=limits.max_batch,
        num_beams=max(50, 5 * limits.max_top_k) if script.num_beams is None else script.num_beams,
        normalize=script.normalize,
    )
    app = create_app(load, limits)
    # Requests that are being answered when the server is told to stop are answered first.
    config = uvicorn.Config(
        app, script.host, script.port, access_log=False, timeout_graceful_shutdown=int(limits.timeout_s) + 5
    )
    server = uvicorn.Server(config)
    service = app.state.service
    service.on_failure = lambda: setattr(server, "should_exit", True)
    server.run()
    if service.error is not None:
        raise service.error


if __name__ == "__main__":
    main()
