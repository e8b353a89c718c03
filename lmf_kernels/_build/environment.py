"""Finds the torch that a build compiles for: that of the environment which the package is installed into."""

import importlib.util
import os
import subprocess
import sys


def find_torch() -> bool:
    """Whether torch can be imported, for which sys.path may be extended.

    pip builds in isolation: it hides the environment's packages by PYTHONPATH alone, and a torch among the build
    requirements would be a second one, downloaded. A child without that variable sees what the user sees.
    """
    if importlib.util.find_spec("torch") is not None:
        return True
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    ask = "import importlib.util as u, sys; print(*sys.path if u.find_spec('torch') else (), sep='\\n')"
    child = subprocess.run([sys.executable, "-c", ask], env=environment, cwd=os.sep, capture_output=True, text=True)
    # At the end: the build's own requirements come first.
    sys.path += [path for path in child.stdout.split("\n") if path and path not in sys.path]
    return importlib.util.find_spec("torch") is not None
