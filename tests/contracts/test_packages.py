"""What packages of the project have in common."""

import subprocess
import sys

EVERYTHING = """
import importlib, inspect, pkgutil, sys
import mxrot

MODULES = {"mxrot.progress"}  # exported as a module
packages = [mxrot]
for found in pkgutil.walk_packages(mxrot.__path__, "mxrot."):
    try:
        module = importlib.import_module(found.name)
    except ImportError as error:
        assert error.name and not error.name.startswith("mxrot"), (found.name, error)
        continue
    if found.ispkg:
        packages.append(module)
for package in packages:
    for name in getattr(package, "__all__", ()):
        if inspect.ismodule(getattr(package, name)) and f"{package.__name__}.{name}" not in MODULES:
            print(f"{package.__name__}.{name}")
"""


def test_no_module_takes_the_place_of_what_its_package_exports() -> None:
    """A module that is imported late is put into its package under its name, whatever had that name before."""
    found = subprocess.run([sys.executable, "-c", EVERYTHING], capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr
