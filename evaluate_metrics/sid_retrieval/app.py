from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

# By file: a bare name would be looked up on the Hub.
launch_gradio_widget(evaluate.load(str(Path(__file__).resolve().with_name("sid_retrieval.py"))))
