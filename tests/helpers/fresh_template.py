"""The process behind `fresh_process`: it imports libraries, nothing of ours, and forks a child for every request.

Started by `fresh_process` as a script, either as a template (a socket's number and what to import), or, where nothing can be
forked, for one request (a JSON file). Whoever holds the other end of a child's socket holds the child: when it closes, the
child's group is killed; when the template's own closes, all of them are, and the template ends.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import pathlib
import selectors
import signal
import socket
import struct
import sys
import tempfile
import threading
import types


class _Without:
    """A finder that finds everything but one distribution."""

    def __init__(self, finder, name):
        self._finder, self._name = finder, name

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == self._name else self._finder.find_spec(name, path, target)

    def find_distributions(self, context=None):
        found = self._finder.find_distributions(context) if hasattr(self._finder, "find_distributions") else ()
        return (distribution for distribution in found if distribution.name != self._name)

    def __getattr__(self, attribute):
        return getattr(self._finder, attribute)


def run(request):
    """Runs the request's code as `__main__` and ends the process as an interpreter would."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # some libraries ask for it when they are imported
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # children of one template would draw alike; `random` sees to itself
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    if "transformers" in sys.modules and "HF_MODULES_CACHE" in os.environ:
        _move_modules_cache(os.environ["HF_MODULES_CACHE"])
    script = request["script"]
    added = [os.path.dirname(os.path.abspath(script)) if script else ""]
    added += [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = added
    if request["without_rqsid"]:
        sys.meta_path[:] = [_Without(finder, "rqsid") for finder in sys.meta_path]
    importlib.invalidate_caches()
    sys.argv = [script or "-c", *request["args"]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    try:
        code = request["code"]
        if script:
            main.__file__ = script
            with open(script, encoding="utf-8") as file:
                code = file.read()
        exec(compile(code, script or "<string>", "exec", dont_inherit=True), main.__dict__)
        status = 0
    except SystemExit as exit:
        status = exit.code
        if status is None or isinstance(status, int):
            status = (status or 0) & 0xFF
        else:
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        status = 1
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120
    os._exit(status)


def _fork(others, files):
    """Forks; the child has `files` as its standard streams and none of the sockets in `others`, and dies with its parent."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    for stream, number in enumerate(files):
        os.dup2(number, stream)
    for number in files:
        os.close(number)
    for other in others:
        other.close()
    return 0


def _read(connection):
    size = struct.unpack("!Q", connection.recv(8, socket.MSG_WAITALL))[0]
    return json.loads(connection.recv(size, socket.MSG_WAITALL))


def prepare(modules):
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # what is not installed, nobody will import
            if error.name.split(".")[0] != name.split(".")[0]:
                raise
    if os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) > 1:
        names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
        raise RuntimeError(f"a process of several threads cannot be forked safely, and this one has {names}")
    gc.collect()
    gc.freeze()  # else the next collection would write to, and so copy, every page


def serve(control):
    """Answers requests until `control` closes."""
    parent = os.getppid()
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    control.sendall(b"+")
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    children = {}
    while os.getppid() == parent:
        for key, _ in selector.select(5):
            if key.fileobj is woken:
                woken.recv(4096)
            elif key.fileobj is control:
                message, numbers, *_ = socket.recv_fds(control, 1, 4)
                if not message:
                    return _kill(children)
                connection, files = socket.socket(fileno=numbers[0]), numbers[1:]
                request = _read(connection)
                others = [control, woken, wake, selector, *children.values()]
                pid = _fork(others, files)
                if not pid and "modules" in request:
                    prepare(request["modules"])
                    return serve(connection)
                if not pid:
                    connection.close()
                    run(request)
                os.setpgid(pid, pid)
                for number in files:
                    os.close(number)
                if "modules" in request:
                    connection.close()
                    continue
                connection.sendall(struct.pack("!i", pid))
                children[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
            elif key.data in children:  # nobody says anything on these: closed
                _kill([key.data])
                selector.unregister(key.fileobj)
        _reap(children, selector)
    _kill(children)


def _reap(children, selector):
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        connection = children.pop(pid, None)
        if connection is None:
            continue
        if connection in selector.get_map():
            selector.unregister(connection)
        try:
            connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
        except OSError:
            pass  # who asked is gone
        connection.close()


def _kill(children):
    for pid in children:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _move_modules_cache(folder):
    """The one variable that libraries read when imported which a request may still change."""
    for name in ("transformers.utils.hub", "transformers.dynamic_module_utils"):
        sys.modules[name].HF_MODULES_CACHE = folder
    for name in ("datasets.config", "evaluate.config"):
        sys.modules[name].HF_MODULES_CACHE = pathlib.Path(folder)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    if sys.argv[1] == "--once":
        with open(sys.argv[2], encoding="utf-8") as file:
            run(json.load(file))
    prepare(sys.argv[2:])
    serve(socket.socket(fileno=int(sys.argv[1])))
