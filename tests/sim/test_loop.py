"""Virtual time: exact jumps, order of equal timers, loud refusals."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar, copy_context

import pytest

from penstock.core import clock
from penstock.sim.loop import VirtualLoop, run


def test_equal_timers_fire_in_the_order_they_were_set() -> None:
    async def main() -> list[int]:
        loop, fired = asyncio.get_running_loop(), list[int]()
        for number in range(500):
            loop.call_at(3.0, fired.append, number)
            loop.call_at(1.0 + number % 7, lambda: None)  # stirs the heap
        await asyncio.sleep(10)
        return fired

    assert run(main()) == list(range(500))


def test_the_clock_jumps_to_the_very_instant_of_the_timer() -> None:
    async def main() -> list[float]:
        loop, seen = asyncio.get_running_loop(), list[float]()
        at = 0.0
        for _ in range(1000):
            at += 0.1
            loop.call_at(at, lambda: seen.append(loop.time()))
        await asyncio.sleep(200)
        return seen

    at, want = 0.0, []
    for _ in range(1000):
        at += 0.1
        want.append(at)
    assert run(main()) == want


def test_timeout_fires_at_its_virtual_instant() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run(main()) == 5.0


def test_starts_at_a_given_instant_even_where_floats_are_coarse() -> None:
    async def main() -> float:
        await asyncio.sleep(0.25)
        return asyncio.get_running_loop().time()

    assert run(main(), start_at=1.7e9) == 1.7e9 + 0.25
    assert run(main(), start_at=1e12) == 1e12 + 0.25


def test_a_timer_in_the_past_does_not_move_the_clock_back() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.call_at(3.0, future.set_result, None)
        await future
        return loop.time()

    assert run(main(), start_at=9.0) == 9.0


def test_deadlock_names_who_waits() -> None:
    async def stuck() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        asyncio.create_task(stuck(), name="the-replica")
        await asyncio.sleep(2.5)
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match=r"virtual deadlock at 2\.5 s.*the-replica \(.*stuck"):
        run(main())


def test_cancelled_timers_neither_fire_nor_stop_the_clock() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        for _ in range(5000):
            loop.call_at(50.0, pytest.fail, "fired").cancel()
        assert len(loop._agenda.timers) < 1000  # far timeouts of finished requests do not pile up
        await asyncio.sleep(100)
        return loop.time()

    assert run(main()) == 100.0


def test_100k_timers() -> None:
    async def main() -> list[float]:
        loop, seen = asyncio.get_running_loop(), list[float]()
        for number in range(100_000):
            loop.call_at((number * 7919) % 100_003, lambda: seen.append(loop.time()))
        await asyncio.sleep(200_000)
        return seen

    seen = run(main())
    assert len(seen) == 100_000 and seen == sorted(seen)


def test_threads_and_sockets_are_refused() -> None:
    async def threads() -> None:
        await asyncio.to_thread(print)

    async def sockets() -> None:
        await asyncio.open_connection("127.0.0.1", 9)

    async def processes() -> None:
        await asyncio.create_subprocess_exec("true")

    for main in (threads, sockets, processes):
        with pytest.raises(RuntimeError, match="virtual time"):
            run(main())


def test_another_thread_may_not_call_in() -> None:
    async def main() -> list[str]:
        loop, told = asyncio.get_running_loop(), list[str]()

        def call() -> None:
            try:
                loop.call_soon_threadsafe(print)
            except RuntimeError as error:
                told.append(str(error))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return told

    assert "another thread" in run(main())[0]


def test_tasks_have_contexts_of_their_own_and_callbacks_the_one_they_are_given() -> None:
    word = ContextVar("word", default="none")
    heard: list[str] = []

    async def speak(own: str) -> None:
        word.set(own)
        await asyncio.sleep(1)
        heard.append(word.get())

    async def main() -> None:
        await asyncio.gather(speak("one"), speak("two"))

        def hear() -> None:
            heard.append(word.get())

        given = copy_context()
        given.run(word.set, "given")
        loop = asyncio.get_running_loop()
        loop.call_soon(hear, context=given)
        loop.call_later(1, hear, context=given)
        await asyncio.sleep(2)

    run(main())
    assert heard == ["one", "two", "given", "given"]


def test_a_callback_that_raises_ends_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_at(1.0, lambda: 1 // 0)
        await asyncio.sleep(5)

    with pytest.raises(ZeroDivisionError):
        run(main())


def test_task_groups_gather_and_cancellation_work() -> None:
    async def work(for_s: float) -> float:
        await asyncio.sleep(for_s)
        return asyncio.get_running_loop().time()

    async def main() -> list[float]:
        task = asyncio.create_task(work(1e9))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work(s)) for s in (3.0, 1.0, 2.0)]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return [t.result() for t in tasks]

    assert run(main()) == [3.0, 1.0, 2.0]


def test_the_clock_is_that_of_the_loop_that_runs_in_this_thread() -> None:
    """Virtual loops announce themselves; a real loop in another thread, or afterwards, is not mistaken for one."""
    seen: dict[str, bool] = {}

    async def real(name: str) -> None:
        loop = asyncio.get_running_loop()
        seen[name] = clock.running_loop() is loop and abs(clock.now() - loop.time()) < 60

    async def main() -> None:
        loop = asyncio.get_running_loop()
        seen["virtual"] = clock.running_loop() is loop and clock.now() == 5.0
        other = threading.Thread(target=lambda: asyncio.run(real("in another thread")))
        other.start()
        other.join()
        seen["virtual still"] = clock.running_loop() is loop

    run(main(), start_at=5.0)
    asyncio.run(real("afterwards"))
    with pytest.raises(RuntimeError):
        clock.now()
    assert seen == dict.fromkeys(seen, True) and len(seen) == 4
