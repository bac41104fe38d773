"""Writes down the environment that a launcher gives to its first process: python launched_environment.py FOLDER NAME"""

import json
import os
import sys
from pathlib import Path

if os.environ["RANK"] == "0":
    folder, name = sys.argv[1:]
    Path(folder, f"{name}.json").write_text(json.dumps({"environment": dict(os.environ)}))
