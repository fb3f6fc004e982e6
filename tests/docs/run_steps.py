"""Runs a document's steps in the current folder: `python run_steps.py STEPS.json RESULTS.json`.

All Python blocks share one namespace, as they do for a reader; each bash block has its own shell. Stops at the first
step that fails. A server (`safevlm serve`, `transformers serve`) runs until the next one starts or the document ends.
"""

import contextlib
import doctest
import io
import json
import re
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

SERVERS = ("safevlm serve", "transformers serve")


def main(steps: Path, results: Path):
    namespace, done, servers = {"__name__": "__main__"}, [], []
    try:
        for step in json.loads(steps.read_text()):
            start = time.monotonic()
            if step["language"] == "python":
                code, printed = run_python(step["text"], namespace, step["where"])
            elif step["text"].startswith(SERVERS):
                code, printed = start_server(step["text"], step["ready"], servers)
            else:
                code, printed = run_bash(step["text"])
            seconds = round(time.monotonic() - start, 1)
            done.append({**step, "code": code, "printed": printed[0], "errors": printed[1], "seconds": seconds})
            if code:
                break
    finally:
        stop(servers)
        results.write_text(json.dumps(done))


def run_bash(text: str):
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, timeout=300)
    return done.returncode, (done.stdout, done.stderr)


def run_python(text: str, namespace: dict, where: str):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            if text.lstrip().startswith(">>>"):
                test = doctest.DocTestParser().get_doctest(text, namespace, where, None, 0)
                failed = doctest.DocTestRunner(verbose=False).run(test, out=out.write, clear_globs=False).failed
                namespace.update(test.globs)
                return failed, ("", out.getvalue())
            exec(compile(text, where, "exec"), namespace)
    except BaseException:
        return 1, (out.getvalue(), traceback.format_exc())
    return 0, (out.getvalue(), "")


def start_server(text: str, ready: str, servers: list):
    """Stops earlier servers and starts another one; returns when the URL `ready` answers."""
    stop(servers)
    # Not through the client of preloaded.py on the PATH: ending that would not end the server. -P: the document's
    # folder may contain a folder named safevlm.
    text = re.sub("^safevlm ", f"{sys.executable} -P -m safevlm.trainer.cli ", text)
    with open("server.log", "w+") as log:
        servers.append(subprocess.Popen(["bash", "-c", f"exec {text}"], stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(ready, timeout=5):
                    return 0, ("", "")
            except (urllib.error.URLError, ConnectionError):
                if servers[-1].poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    return 1, ("", log.read()[-4000:])
                time.sleep(0.25)


def stop(servers: list):
    while servers:
        server = servers.pop()
        server.terminate()
        server.wait(timeout=30)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
