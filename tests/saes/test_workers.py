"""Work on several threads: in order, one core each, and the same numbers as on one thread."""

import multiprocessing
import threading

import pytest
import torch
from oracles import gradients
from sae_makers import made

from veridical.saes import scan
from veridical.saes.workers import each


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def square(number):
    return number * number, torch.get_num_threads()


def test_results_come_in_order_from_threads_of_one_core(threads):
    threads(3)
    meet, seen = threading.Barrier(3, timeout=60), set()

    def work(number):
        if number < 3:
            meet.wait()  # ends only where three run at once
        seen.add(threading.get_ident())
        return square(number)

    assert each(work, range(20)) == [(number * number, 1) for number in range(20)]
    assert len(seen) == 3
    assert threading.get_ident() not in seen
    assert torch.get_num_threads() == 3
    found = []
    late = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert found == [3]  # threads that others start are not held to one core


def test_one_thread_works_by_itself(threads):
    threads(1)
    assert each(lambda _: threading.get_ident(), range(3)) == [threading.get_ident()] * 3


def test_an_error_comes_out_and_later_work_goes_on(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        each(lambda number: 1 // number, [1, 0, 1])
    assert each(square, [3, 4]) == [(9, 1), (16, 1)]


def test_a_forked_process_has_threads_of_its_own(threads):
    threads(2)
    each(square, [1, 2])
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(each, (square, [5, 6])).get(60) == [(25, 1), (36, 1)]


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka", "crosscoder"])
def test_losses_and_gradients_are_those_of_one_thread(architecture, threads, monkeypatch):
    """Twelve parts of three members, with dead latents among them, by four threads."""
    monkeypatch.setattr(scan, "CPU_BYTES", 1)
    monkeypatch.setattr(scan, "CORE_BYTES", 1)
    x = torch.randn(256, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    dead = torch.zeros(3, 40, dtype=torch.bool)
    dead[:, [1, 5, 8]] = True
    found = []
    for number in (1, 4):
        threads(number)
        saes = [made(architecture, seed=seed, aux=0.5) for seed in range(3)]
        stack = type(saes[0]).stack(saes).requires_grad_(True)
        loss = stack.loss(x, dead=dead)
        found.append((loss.total.detach(), loss.fired, gradients(stack, loss.total.sum())))
    (total, fired, grads), (other, also, others) = found
    torch.testing.assert_close(other, total, rtol=1e-12, atol=1e-12)
    assert torch.equal(fired, also)
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-11, atol=1e-12, msg=name)
