"""Runs in processes of their own that can be killed at any moment, and what they leave behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

from veridical.saes import checkpoint

SCRIPT = """
import sys, time
sys.path[:0] = [{here!r}]
import torch
torch.set_num_threads(1)
import {module} as t
from veridical.saes import group
if {slow}:
    plain = group.Group.step
    def slowly(self, *given):
        time.sleep(0.005)
        return plain(self, *given)
    group.Group.step = slowly
t.{function}({store!r})
"""


def start(function, store, slow):
    """A process that calls a test module's function with a store, its steps slowed down if `slow`."""
    names = {"module": Path(function.__code__.co_filename).stem, "function": function.__name__}
    script = SCRIPT.format(here=str(Path(__file__).parent), store=str(store), slow=slow, **names)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", script], env=env)


def latest(folder):
    """Steps of the last checkpoint in a folder; 0 without one."""
    return max((int(file.stem) for file in folder.glob("*.json")), default=0)


def wait_for(happened, process):
    """Returns once it did, or the process ended by itself."""
    until = time.monotonic() + 120
    while not happened() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)


def members(store):
    """What a run has finished: file name to content."""
    return {file.name: file.read_bytes() for file in sorted((store / checkpoint.MEMBERS).iterdir())}
