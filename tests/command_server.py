"""Runs command lines of the scripts, one after the other, without importing everything each time.

Reads a JSON list a line, [script, argument, ...]; answers each with [exit status, stdout, stderr].
Each is a process forked before JAX has started anything.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback

from common import cli


def run(script, arguments):
    """What `python <script>.py <arguments>` does, in this process."""
    sys.argv = [f"{script}.py", *arguments]
    try:
        cli.run(importlib.import_module(script).main, script)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def answer(script, *arguments):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = run(script, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return [os.waitstatus_to_exitcode(status), *texts]


if __name__ == "__main__":
    for name in ("ssar_td3bc", "ssar_cql", "gymnasium_robotics", "gymnasium.envs.mujoco"):
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)
