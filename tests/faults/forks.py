"""Calls as forks of this process, and notebooks without kernels: what takes seconds to start is there already."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import nbformat
import papermill

from srlib import experiment, provenance

NOTEBOOK = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# {title}

```{{code-cell}} ipython3
:tags: [parameters]

{parameters}
```

```{{code-cell}} ipython3
{code}
```
"""


@contextmanager
def known_sources(systems: Iterable[str]) -> Iterator[None]:
    """What is hashed once is known afterwards, in forks too, since the sources stay as they are."""
    hashed, reached = functools.cache(provenance.source_hash), functools.cache(provenance.imported_modules)
    with (
        patch.object(provenance, "source_hash", lambda modules: hashed(tuple(sorted(modules)))),
        patch.object(provenance, "imported_modules", lambda entries: reached(tuple(entries))),
    ):
        for system in systems:
            experiment.training_hash(system)
        yield


def execute_notebook(source, target, parameters, cwd, **options):
    """As papermill, but by this process; errors end in the same exception."""
    notebook = nbformat.read(source, as_version=4)
    names = {"get_ipython": lambda: SimpleNamespace(run_line_magic=lambda *_: [])}
    (position,) = (i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    injected = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    cell = nbformat.v4.new_code_cell(injected, metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(position + 1, cell)
    before = Path.cwd()
    os.chdir(cwd)
    try:
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                try:
                    exec(cell.source, names)
                except Exception as error:
                    nbformat.write(notebook, target)
                    name, told = type(error).__name__, traceback.format_exc().splitlines()
                    raise papermill.PapermillExecutionError(
                        number, number, cell.source, name, str(error), told
                    ) from error
        nbformat.write(notebook, target)
    finally:
        os.chdir(before)


class Fork:
    """A function of no arguments in a fork of this process, as a `subprocess.Popen` whose status is what it returns."""

    def __init__(self, function, output, env=None):
        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                os.environ.update(env or {})
                status = function()
            except SystemExit as ended:
                status = ended.code
            except BaseException:
                traceback.print_exc()
            finally:
                with suppress(OSError):  # a full disk
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)
