import io
import sys

import torch
from fake import FakeModel

from veridical.activations import collect
from veridical.progress import bar


def test_quiet_when_nobody_watches(capfd):
    collect(FakeModel(), ["abc", "de"])
    assert capfd.readouterr() == ("", "")


def test_shown_with_rate_and_time_left(capfd):
    collect(FakeModel(delay=0.05), ["abc", "de"] * 20, batch_tokens=30, progress=True)
    said = capfd.readouterr().err
    assert "collect" in said
    assert "100%" in said
    assert "tokens/s" in said
    assert "<" in said, "time left"


def test_shown_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert not bar(10, "x").disable
    assert bar(10, "x", progress=False).disable
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert bar(10, "x").disable


def test_moments_and_index_are_made_without_threads_left_behind(tmp_path):
    import threading

    collect(FakeModel(), ["abc", "de"], store=tmp_path / "store")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("veridical")]
    assert torch.is_grad_enabled()
