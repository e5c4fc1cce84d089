from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from mlxgpt.playground import scheduler
from mlxgpt.playground.scheduler import DeviceWorker, TooManyRequestsError


def count_items(name: str, count: int, log: list[str]) -> Iterator[str]:
    try:
        for n in range(count):
            log.append(name)
            yield f"{name}{n}"
    finally:
        log.append(f"{name} ends in {threading.current_thread().name}")


def test_tasks_take_turns_in_one_thread() -> None:
    log: list[str] = []

    async def gather(device: DeviceWorker, name: str, count: int) -> list[str]:
        return [item async for item in device.stream(lambda: count_items(name, count, log))]

    async def run_both() -> list[list[str]]:
        device = DeviceWorker()
        hold = threading.Event()
        blocker = asyncio.create_task(device.call(hold.wait))
        tasks = [asyncio.create_task(gather(device, *args)) for args in (("a", 3), ("b", 5))]
        await asyncio.sleep(0.05)
        hold.set()
        await blocker
        return await asyncio.gather(*tasks)

    assert asyncio.run(run_both()) == [["a0", "a1", "a2"], ["b0", "b1", "b2", "b3", "b4"]]
    assert [entry for entry in log if len(entry) == 1] == list("abababbb")
    assert "a ends in device" in log


def test_closing_a_stream_closes_its_iterator() -> None:
    log: list[str] = []

    async def run() -> None:
        device = DeviceWorker()
        async for _ in (items := device.stream(lambda: count_items("a", 10**9, log))):
            break
        await items.aclose()
        for _ in range(1000):
            if any("ends" in entry for entry in log):
                return
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert log[-1] == "a ends in device"


def test_errors_are_raised_in_the_consumer() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    async def run() -> list[int]:
        device, items = DeviceWorker(), list[int]()

        async def all_items() -> None:
            async for item in device.stream(fail):
                items.append(item)

        with pytest.raises(KeyError, match="two"):
            await all_items()
        assert await device.call(lambda: 7) == 7, "the worker still runs"
        return items

    assert asyncio.run(run()) == [1]


def test_number_of_waiting_requests_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_WAITING", 2)

    async def run() -> None:
        device = DeviceWorker()
        tasks = [asyncio.create_task(device.call(lambda: time.sleep(0.05))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequestsError):
            await device.call(lambda: None)
        await asyncio.gather(*tasks)
        await device.call(lambda: None)

    asyncio.run(run())


def test_paused_consumer_does_not_count_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_WAITING", 1)
    log: list[str] = []

    async def run() -> list[str]:
        device = DeviceWorker()
        paused = device.stream(lambda: count_items("a", 1000, log))
        first = await anext(paused)
        assert await device.call(lambda: 7) == 7, "the paused consumer does not count"
        for _ in range(5):
            await device.call(lambda: None)
        assert log.count("a") <= 1 + scheduler.MAX_PREFETCH
        return [first, *[item async for item in paused]]

    assert asyncio.run(run()) == [f"a{n}" for n in range(1000)], "no item is lost"
    assert log[-1] == "a ends in device"
