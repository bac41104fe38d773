"""Processes that know nothing of rqsid yet, without nine seconds of imports for each.

    done = run_fresh("import rqsid, sys; print(sys.argv[1])", "hello", cwd=tmp_path, check=True)
    assert done.stdout == "hello\n"

Libraries are imported once per test process, in a template process (`fresh_template.py`) that forks a child for every call.
A child runs its code as `__main__`, with the arguments, environment and folder that it is given, and nothing of rqsid imported.
What differs from a new interpreter: libraries are imported already; of `PYTHON*` variables only `PYTHONPATH` may be set anew;
children share one hash seed; there is one thread per operation, whatever `OMP_NUM_THREADS` says.

Libraries that talk to the Hub read their variables (`HF_HOME`, `HF_ENDPOINT`, …) when they are imported. So there are two
templates: "transformers", with all libraries, for calls whose variables are those of the test process, and "torch", with those
that read no such variable, for all others.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

TEMPLATE = str(Path(__file__).with_name("fresh_template.py"))

LIBRARIES = {
    "torch": [
        *(
            "torch._dynamo",
            "torch.distributed.fsdp",
            "torch.distributed.checkpoint",
            "torch.nn.attention.flex_attention",
        ),
        *(
            "torch.export",
            "torch.utils.data",
            "scipy.stats",
            "sklearn",
            "pandas",
            "pyarrow.dataset",
            "pyarrow.parquet",
        ),
        *("pyarrow.json", "tokenizers.trainers", "safetensors.torch", "PIL.ImageOps", "fsspec.implementations.local"),
        *("requests", "httpx", "httpx2", "dill", "multiprocess.pool", "psutil", "jinja2.sandbox", "regex", "yaml"),
        *("xxhash", "tqdm.auto", "tqdm.contrib.concurrent", "filelock", "xml.dom.minidom", "xml.etree.ElementTree"),
    ],
    "transformers": [
        *("transformers.trainer", "transformers.pipelines", "transformers.models.llama.modeling_llama"),
        *("transformers.models.qwen2.modeling_qwen2", "transformers.models.auto.modeling_auto"),
        *(
            "transformers.models.auto.tokenization_auto",
            "transformers.loss.loss_utils",
            "transformers.quantizers.auto",
        ),
        *("datasets", "evaluate", "accelerate", "peft"),
    ],
}

# What libraries read when they are imported. HF_MODULES_CACHE is moved afterwards.
READ_ON_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_CACHE_HOME", "DISABLE_TELEMETRY")
LONE_THREADS = {
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}

CAN_FORK = sys.platform == "linux"

_environment = dict(os.environ)  # as it is before any test changes it
_templates = {}
_lock = threading.Lock()


def run_fresh(code, *args, env=None, cwd=None, timeout=300, libraries=None, without_rqsid=False, check=False):
    """
    Runs a script or code in a fresh process, as `subprocess.run` with `capture_output=True, text=True` would.

    Args:
        code (`str` or `Path`):
            Code (it is dedented), or the path of a script.
        args:
            What follows in `sys.argv`; made strings.
        env (`dict`, *optional*, defaults to `os.environ`):
            The whole environment of the process.
        cwd (*optional*, defaults to the current folder):
            The folder to start in. Code finds modules there, a script in its own folder, as with `python -c` and `python`.
        timeout (`float`, defaults to 300):
            Seconds after which the process and all that it started are killed.
        libraries (`str`, *optional*):
            "transformers" or "torch": what is imported already. Chosen by `env`, if not given.
        without_rqsid (`bool`, defaults to `False`):
            Whether rqsid is as good as not installed: neither importable nor found by `importlib`.
        check (`bool`, defaults to `False`):
            Whether another exit status than 0 is an error that shows the end of stderr.

    Returns:
        `subprocess.CompletedProcess` with `returncode`, `stdout` and `stderr`.

    Raises:
        `subprocess.TimeoutExpired`; `RuntimeError` where `check` asks for it.
    """
    options = {"env": env, "cwd": cwd, "libraries": libraries, "without_rqsid": without_rqsid}
    with start_fresh(code, *args, **options) as process:
        stdout, stderr = process.communicate(timeout)
    if check and process.returncode:
        raise RuntimeError(f"the process ended with status {process.returncode}:\n{stderr[-6000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_fresh(
    code, *args, env=None, cwd=None, libraries=None, without_rqsid=False, stdout=None, stderr=None
) -> "FreshProcess":
    """
    Starts what `run_fresh` runs. `stdout` and `stderr` may be open files (a pipe's end, for example); otherwise the output is
    kept for `communicate`. Used in a `with` statement, the process is killed at its end if it still runs.
    """
    env = {name: str(value) for name, value in (os.environ if env is None else env).items()}
    cwd = os.path.abspath(cwd or os.getcwd())
    request = {"env": env, "cwd": cwd, "args": [str(argument) for argument in args], "without_rqsid": without_rqsid}
    if isinstance(code, Path):
        request |= {"script": os.path.join(cwd, code), "code": None}
    else:
        request |= {"script": None, "code": textwrap.dedent(code)}
    given = _variables(env) == _variables(_environment)
    libraries = libraries or ("transformers" if given else "torch")
    if libraries == "transformers" and not given:
        raise ValueError(
            "the environment has other variables than the test process, which libraries have read when they were imported: "
            f"{dict(_variables(env).items() ^ _variables(_environment).items())}; leave `libraries` out, or pass 'torch'"
        )
    if libraries not in LIBRARIES:
        raise ValueError(f"libraries must be one of {list(LIBRARIES)}, not {libraries!r}")
    files = [tempfile.TemporaryFile() if file is None else file for file in (stdout, stderr)]
    with open(os.devnull) as nothing:
        start = _fork if CAN_FORK else _start
        process = start(request, libraries, [nothing.fileno(), *(file.fileno() for file in files)])
    return FreshProcess(process, [request["script"] or "-c", *request["args"]], files)


def run_ranks(processes, code, *args, env=None, timeout=300, check=True, **options):
    """
    Runs a script or code in several fresh processes that find each other through `torch.distributed`, with the variables that
    `torchrun` sets. When one fails, the others are killed and the end of its stderr is raised; with `check=False` all are waited for.

    Returns:
        A list of `subprocess.CompletedProcess`, by rank.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    env = dict(os.environ if env is None else env)
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(processes):
            own = env | shared | {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(stack.enter_context(start_fresh(code, *args, env=own, **options)))
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in ranks) and not (
            check and any(process.poll() for process in ranks)
        ):
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(ranks[0].args, timeout)
            time.sleep(0.02)
        failed = next((process for process in ranks if check and process.poll()), None)
        for process in ranks:
            process.kill()
        results = [process.communicate() for process in ranks]
    if failed:
        status, error = failed.returncode, results[ranks.index(failed)][1]
        raise RuntimeError(f"rank {ranks.index(failed)} ended with status {status}:\n{error[-6000:]}")
    pairs = zip(ranks, results, strict=True)
    return [subprocess.CompletedProcess(process.args, process.returncode, *outputs) for process, outputs in pairs]


class FreshProcess:
    """What `subprocess.Popen` is, as far as tests need it; `pid` is that of the process and of its group."""

    def __init__(self, process, args, files):
        self._process, self._files = process, files
        self.args, self.pid = args, process.pid

    @property
    def returncode(self):
        return self._process.returncode

    def poll(self):
        try:
            return self._process.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout=None):
        """The exit status, negative for a signal; after `timeout` seconds `subprocess.TimeoutExpired`."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise subprocess.TimeoutExpired(self.args, timeout) from error

    def communicate(self, timeout=None):
        """Waits, then returns what was written to stdout and stderr. Past `timeout` the process is killed."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self.kill()
            self.wait()
            error.stdout, error.stderr = self._outputs()
            raise
        return self._outputs()

    def send_signal(self, number):
        """To the process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """The process and all that it started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def _outputs(self):
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return texts

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.poll() is None:
            self.kill()
            self.wait()


class _Forked:
    """A child of a template, known by the socket on which the template tells its end."""

    def __init__(self, connection, pid):
        self._connection, self.pid, self.returncode = connection, pid, None

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("", timeout)
            answer = self._connection.recv(4, socket.MSG_WAITALL)
            self._connection.close()
            if not answer:
                raise RuntimeError("the template of fresh processes has ended")
            (self.returncode,) = struct.unpack("!i", answer)
        return self.returncode


def _variables(environment):
    names = (name for name in environment if name.startswith(READ_ON_IMPORT) and name != "HF_MODULES_CACHE")
    return {name: environment[name] for name in names}


def _fork(request, libraries, files):
    with _lock:
        if libraries not in _templates:
            _start_template(libraries)
        connection = _ask(_templates[libraries], request, files)
        pid = connection.recv(4, socket.MSG_WAITALL)
    if not pid:
        raise RuntimeError("the template of fresh processes has ended")
    return _Forked(connection, struct.unpack("!i", pid)[0])


def _ask(template, request, files):
    connection, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(template, [b"+"], [theirs.fileno(), *files])
    data = json.dumps(request).encode()
    connection.sendall(struct.pack("!Q", len(data)) + data)
    return connection


def _start_template(libraries):
    """The template "torch" is a process of this one; it forks the other."""
    with tempfile.TemporaryFile() as log:
        process = None
        if libraries == "torch":
            connection, theirs = socket.socketpair()
            env = {name: value for name, value in _environment.items() if name != "PYTHONPATH"} | LONE_THREADS
            command = [sys.executable, TEMPLATE, str(theirs.fileno()), *LIBRARIES["torch"]]
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "pass_fds": [theirs.fileno()]}
            with theirs:
                process = subprocess.Popen(command, env=env, cwd="/", start_new_session=True, **options)
        else:
            if "torch" not in _templates:
                _start_template("torch")
            with open(os.devnull) as nothing:
                files = [nothing.fileno(), log.fileno(), log.fileno()]
                connection = _ask(_templates["torch"], {"modules": LIBRARIES[libraries]}, files)
        if connection.recv(1) != b"+":
            log.seek(0)
            raise RuntimeError(f"the template of fresh processes did not start:\n{log.read().decode()[-6000:]}")
    _templates[libraries] = connection
    atexit.register(_end, connection, process)


def _end(connection, process):
    connection.close()
    if process is not None:
        process.wait()


def _start(request, libraries, files):
    """Where nothing is forked: a new interpreter."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(request, file)
    command = [sys.executable, TEMPLATE, "--once", file.name]
    stdin, stdout, stderr = files
    options = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "cwd": request["cwd"]}
    environment = _environment | request["env"] | LONE_THREADS
    return subprocess.Popen(command, env=environment, start_new_session=True, **options)
