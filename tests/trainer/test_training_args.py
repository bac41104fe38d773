"""SIDTrainingArguments: defaults, validation, and the ways arguments are written down."""

import json

import pytest
from transformers import HfArgumentParser

from rqsid import SIDTrainingArguments


def make_args(tmp_path, **options):
    return SIDTrainingArguments(str(tmp_path / "run"), use_cpu=True, **options)


def test_defaults_keep_the_columns_that_the_collator_reads(tmp_path):
    args = make_args(tmp_path)
    assert args.remove_unused_columns is False
    assert args.label_names == ["labels"]
    assert args.eval_top_k == 50 and args.eval_num_beams is None and args.eval_normalize == "vocab"
    assert args.max_prompt_length is None and args.init_sid_rows is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
        ({"eval_top_k": 0}, "eval_top_k=0"),
        ({"eval_num_beams": 0}, "eval_num_beams=0"),
        ({"eval_num_beams": -3}, "eval_num_beams=-3"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"eval_normalize": "none"}, 'eval_normalize=\'none\'.*"vocab" or "sid"'),
        ({"init_sid_rows": "mean"}, 'init_sid_rows=\'mean\'.*"codebook" or "noise"'),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **options)


def test_a_command_line_and_a_json_file_give_the_same_arguments(tmp_path):
    options = {"max_prompt_length": 64, "eval_top_k": 7, "eval_num_beams": 30, "eval_normalize": "sid"}
    options |= {"init_sid_rows": "noise", "dataset_num_proc": 2, "learning_rate": 0.01}
    command = [f"--{name}={value}" for name, value in options.items()]
    parser = HfArgumentParser(SIDTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses([f"--output_dir={tmp_path}", "--use_cpu=True", *command])
    (tmp_path / "args.json").write_text(json.dumps(options | {"output_dir": str(tmp_path), "use_cpu": True}))
    (read,) = parser.parse_json_file(str(tmp_path / "args.json"))
    for args in (parsed, read):
        assert {name: getattr(args, name) for name in options} == options
    assert json.loads(parsed.to_json_string())["eval_normalize"] == "sid"
