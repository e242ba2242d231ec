"""Run the commands in forks of one process, which has imported what they need.

`python tests/warm.py` reads a request in JSON from each line of its standard input and answers with
an exit code. A fork is a process with arguments, environment, directory and output of its own; what
it saves is the import of torch and Lightning, which is most of the time of most commands.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

import numpy
import torch

TIMEOUT = 300  # seconds


def main() -> None:
    import sklearn.datasets  # noqa: F401

    import repnet.cli.deploy
    import repnet.cli.train
    import repnet.deploy.pipeline
    import repnet.training.run  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            become(**request)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(
    script: str, arguments: list[str], directory: str, variables: dict[str, str], output: str
) -> NoReturn:
    """Be `python SCRIPT ARGUMENTS`, which writes to the files `stdout` and `stderr` in `output`."""
    signal.alarm(TIMEOUT)
    for number, name in enumerate((os.devnull, f"{output}/stdout", f"{output}/stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:1] = [str(Path(script).parent), *variables["PYTHONPATH"].split(os.pathsep)]
    sys.argv = [script, *arguments]
    torch.seed()  # anew, as in every process
    numpy.random.seed()  # noqa: NPY002
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:  # as at the end of an interpreter
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
