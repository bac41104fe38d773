"""Processes from a template are what new interpreters are, as far as tests look."""

import json
import os
import signal
import subprocess
import sys
import time

import fresh_process
import pytest
from fresh_process import run_fresh, run_ranks, start_fresh

HUB = {"HF_HOME": "/nowhere", "HF_ENDPOINT": "http://localhost:1"}

LOOK = """
import json, os, sys, threading
modules = sorted({name.split(".")[0] for name in sys.modules})
tasks = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
print(json.dumps({
    "modules": modules, "argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ), "name": __name__,
    "python": [sys.executable, sys.version, sys.prefix, sys.path[0], list(sys.flags)], "threads": tasks,
    "stdin": sys.stdin.read(), "file": globals().get("__file__"), "main": sys.modules["__main__"].__dict__ is globals(),
}))
"""


@pytest.fixture(params=["template", "interpreter"])
def either(request, monkeypatch):
    """As Linux has it, and as the others do."""
    monkeypatch.setattr(fresh_process, "CAN_FORK", request.param == "template" and sys.platform == "linux")


def test_nothing_but_libraries_is_there(either, tmp_path, monkeypatch):
    done = run_fresh(LOOK, 1, "two", cwd=tmp_path, env=os.environ | {"NEW": "yes"}, check=True)
    assert done.stderr == "" and done.returncode == 0
    found = json.loads(done.stdout)
    assert not {"rqsid", "conftest", "pytest", "fresh_process", "matplotlib"} & set(found["modules"])
    assert ("torch" in found["modules"]) == ("transformers" in found["modules"]) == fresh_process.CAN_FORK
    assert found["argv"] == ["-c", "1", "two"] and found["folder"] == str(tmp_path) and found["stdin"] == ""
    assert found["environment"]["NEW"] == "yes" and found["name"] == "__main__" and found["main"]
    assert found["file"] is None and found["threads"] == 1
    assert found["python"] == [sys.executable, sys.version, sys.prefix, "", list(sys.flags)]
    monkeypatch.delenv("HOME")
    assert run_fresh("import os; print('HOME' in os.environ, 'NEW' in os.environ)").stdout == "False False\n"


@pytest.mark.skipif(not fresh_process.CAN_FORK, reason="templates are forked on Linux only")
def test_one_does_not_see_what_another_has_done():
    run_fresh("import sys, rqsid, torch; sys.modules['fake'] = torch; torch.manual_seed(1)", check=True)
    code = """
    import random, sys, numpy, torch
    print("rqsid" in sys.modules, "fake" in sys.modules)
    print(numpy.random.rand(), random.random(), torch.rand(1).item())
    """
    first, second = (run_fresh(code, check=True).stdout.splitlines() for _ in range(2))
    assert first[0] == second[0] == "False False"
    assert not set(first[1].split()) & set(second[1].split())


@pytest.mark.skipif(not fresh_process.CAN_FORK, reason="templates are forked on Linux only")
def test_variables_of_the_hub_are_read(tmp_path):
    """A process with a home of its own has imported nothing that would have read another one."""
    environment = os.environ | HUB | {"HF_MODULES_CACHE": str(tmp_path)}
    found = json.loads(run_fresh(LOOK, env=environment, check=True).stdout)
    late = {"huggingface_hub", "transformers", "datasets", "evaluate", "accelerate", "peft", "sentencepiece"}
    assert "torch" in found["modules"] and not late & set(found["modules"])
    code = """
    from huggingface_hub import constants
    from transformers import dynamic_module_utils
    print(constants.HF_HUB_CACHE, constants.ENDPOINT, dynamic_module_utils.HF_MODULES_CACHE, constants.HF_HUB_OFFLINE)
    """
    assert run_fresh(code, env=environment).stdout.split() == [
        "/nowhere/hub",
        HUB["HF_ENDPOINT"],
        str(tmp_path),
        "True",
    ]
    # Variables of the test process, and a folder for code.
    ours = os.environ | {"HF_MODULES_CACHE": str(tmp_path)}
    assert "transformers" in json.loads(run_fresh(LOOK, env=ours).stdout)["modules"]
    assert run_fresh(code, env=ours).stdout.split()[2:] == [str(tmp_path), "True"]
    assert "transformers" not in json.loads(run_fresh(LOOK, libraries="torch").stdout)["modules"]
    with pytest.raises(ValueError, match="HF_HOME"):
        run_fresh(LOOK, env=environment, libraries="transformers")
    with pytest.raises(ValueError, match="'numpy'"):
        run_fresh(LOOK, libraries="numpy")


@pytest.mark.parametrize("depth", ["transformers", "torch"])
def test_without_rqsid(either, depth, tmp_path):
    code = """
    import importlib.metadata, importlib.util
    print(importlib.util.find_spec("rqsid"), [d.name for d in importlib.metadata.distributions() if d.name == "rqsid"])
    print(importlib.util.find_spec("json") is not None, importlib.metadata.version("torch"))
    try:
        importlib.metadata.version("rqsid")
    except importlib.metadata.PackageNotFoundError:
        print("no version")
    import rqsid.trainer
    """
    done = run_fresh(code, without_rqsid=True, libraries=depth, cwd=tmp_path)
    assert done.stdout.splitlines()[0] == "None []" and done.stdout.splitlines()[1].startswith("True 2.")
    assert done.returncode == 1 and "ModuleNotFoundError: No module named 'rqsid'" in done.stderr
    assert done.stdout.splitlines()[2] == "no version"
    found = run_fresh("import importlib.util; print(importlib.util.find_spec('rqsid').name)", libraries=depth)
    assert found.stdout == "rqsid\n"


def test_ends(either, tmp_path):
    for code, status, error in [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('so long')", 1, "so long\n"),
        ("raise SystemExit", 0, ""),
        ("import os; os._exit(7)", 7, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, ""),
    ]:
        done = run_fresh(code)
        assert (done.returncode, done.stdout) == (status, "") and error in done.stderr, code
    done = run_fresh("print('before')\ndef f():\n    raise ValueError('no')\nf()")
    assert done.returncode == 1 and done.stdout == "before\n"
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ValueError: no\n")
    assert 'File "<string>", line 4, in <module>' in done.stderr and "fresh_template" not in done.stderr
    with pytest.raises(RuntimeError, match="status 1:(.|\n)*ValueError: no"):
        run_fresh("raise ValueError('no')", check=True)
    # Threads are waited for, and what was registered for the end is done.
    code = "import atexit, threading; atexit.register(print, 'end'); threading.Timer(0.1, print, ['thread']).start()"
    assert run_fresh(code).stdout == "thread\nend\n"
    (tmp_path / "beside.py").write_text("VALUE = 5")
    (tmp_path / "script.py").write_text("import beside, sys\nprint(beside.VALUE, sys.argv, __file__)\nraise OSError")
    done = run_fresh(tmp_path / "script.py", "x", cwd="/")
    script = str(tmp_path / "script.py")
    assert done.stdout == f"5 {[script, 'x']} {script}\n" and f'File "{script}", line 3' in done.stderr
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert run_fresh("import beside; print(beside.VALUE)", env=environment, cwd="/").stdout == "5\n"


def test_what_hangs_is_killed(either, tmp_path):
    code = """
    import subprocess, sys, time
    child = subprocess.Popen(["sleep", "100"])
    print(child.pid, flush=True)
    time.sleep(100)
    """
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_fresh(code, timeout=2)
    child = int(caught.value.stdout)
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}") or " Z " in open(f"/proc/{child}/stat").read():
            break
        time.sleep(0.05)
    else:
        raise AssertionError("what it started lives on")


def test_started_and_watched(either):
    """Several at a time, output as it comes, and signals."""
    read, write = os.pipe()
    with os.fdopen(read) as output, os.fdopen(write, "w") as end:
        code = "import sys, time; print('ready', file=sys.stderr, flush=True); time.sleep(100)"
        with start_fresh(code, stderr=end) as one, start_fresh("print('other')") as other:
            assert output.readline() == "ready\n" and one.poll() is None
            assert other.communicate(60) == ["other\n", ""]
            with pytest.raises(subprocess.TimeoutExpired):
                one.wait(0.1)
            one.send_signal(signal.SIGTERM)
            assert one.wait(60) == one.returncode == one.poll() == -signal.SIGTERM
    with start_fresh("import time; time.sleep(100)") as process:
        pass
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(not fresh_process.CAN_FORK, reason="templates are forked on Linux only")
def test_children_die_with_the_test_process(tmp_path):
    """Nothing is left when a test process is killed: neither templates nor what they have forked."""
    code = """
    import os, pathlib, sys
    sys.path.insert(0, sys.argv[1])
    import fresh_process
    fresh_process.LIBRARIES |= {"torch": ["json"], "transformers": ["ast"]}
    child = fresh_process.start_fresh("import os, time; print(os.getppid(), flush=True); time.sleep(100)")
    while not child._outputs()[0]:
        pass
    torch = fresh_process.start_fresh("import os; print(os.getppid())", libraries="torch").communicate()[0]
    print(child.pid, child._outputs()[0], torch, flush=True)
    os.kill(os.getpid(), 9)
    """
    done = run_fresh(code, os.path.dirname(fresh_process.__file__), libraries="torch")
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(set(pids)) == 3
    for _ in range(200):
        living = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
        living = [pid for pid in living if open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"]
        if not living:
            break
        time.sleep(0.05)
    assert not living


def test_ranks(tmp_path):
    code = """
    import os, sys, torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    print(dist.get_rank(), os.environ["LOCAL_RANK"], total.item(), sys.argv[1])
    if sys.argv[1] == "fail" and dist.get_rank() == 1:
        raise ValueError("rank 1 cannot")
    dist.barrier()
    """
    assert [done.stdout for done in run_ranks(3, code, "x")] == [f"{rank} {rank} 6 x\n" for rank in range(3)]
    with pytest.raises(RuntimeError, match="rank 1 ended with status 1:(.|\n)*rank 1 cannot"):
        run_ranks(2, code, "fail")
    code = "import os, sys, time; time.sleep(0.3 * int(os.environ['RANK'])); print('end'); sys.exit(3)"
    ended = run_ranks(2, code, check=False)
    assert [(done.returncode, done.stdout) for done in ended] == [(3, "end\n")] * 2
    with pytest.raises(subprocess.TimeoutExpired):
        run_ranks(2, "import time; time.sleep(100)", timeout=0.5)
