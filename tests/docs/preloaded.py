"""A process that imports torch and transformers once and forks for each command, which saves seconds per command.

It does not import safevlm, so each command imports today's code as a fresh process would. The `safevlm` on the
documents' PATH is a client of this process.

    python preloaded.py serve SOCKET         # the process
    python preloaded.py SOCKET ARGUMENTS     # the client: runs `safevlm ARGUMENTS` here and exits with its code
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback


def serve(path: str):
    """For each request, forks a child that runs `safevlm ARGUMENTS` or a Python file; replies with its exit code."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    from PIL import Image  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForImageTextToText,
        AutoProcessor,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Trainer,
        pipeline,
    )

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket):
    """In the child: runs the request in a child of its own and sends back its exit code."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    request = json.loads(message)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.chdir(request["folder"])
            os.environ.clear()
            os.environ.update(request["environment"])
            sys.argv = request["arguments"]
            code = _run(request["arguments"])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _run(arguments: list[str]) -> int:
    if arguments[0].endswith(".py"):
        sys.path.insert(0, os.path.dirname(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")
        return 0
    from safevlm.trainer.cli import main

    return main(arguments[1:])


def call(path: str, arguments: list[str], folder: str, environment: dict[str, str], streams=(0, 1, 2)) -> int:
    """Has the process at socket `path` run `arguments`; returns the exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = {"arguments": arguments, "folder": folder, "environment": environment}
        socket.send_fds(connection, [json.dumps(request).encode()], streams)
        return int(connection.recv(64) or 1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(call(sys.argv[1], ["safevlm", *sys.argv[2:]], os.getcwd(), dict(os.environ)))
