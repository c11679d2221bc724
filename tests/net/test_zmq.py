"""The channel between processes, where it differs from its twins (see tests/twins/test_channel.py)."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from penstock.core.messages import Cancel, Message
from penstock.net.codec import Codec
from penstock.net.zmq import ZmqChannel, private_endpoint

ROOT = Path(__file__).parents[2]


async def test_a_listener_that_raises_still_hears_what_came_behind() -> None:
    endpoint, folder = private_endpoint()
    near = ZmqChannel.bind(endpoint, Codec(Message))
    far = ZmqChannel.connect(endpoint, Codec(Message))
    heard: list[str] = []
    broken: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: broken.append(told))
    all_heard = asyncio.Event()

    def hear(message: object) -> None:
        assert isinstance(message, Cancel)
        heard.append(message.request)
        if message.request == "0":
            raise ValueError("a broken listener")
        if message.request == "9":
            all_heard.set()

    for number in range(10):  # all are there before anybody listens, so one event tells of them
        await far.send(Cancel(f"{number}"))
    await asyncio.sleep(0.3)
    near.listen(hear)
    try:
        await asyncio.wait_for(all_heard.wait(), 3)
    finally:
        await near.close()
        await far.close()
        shutil.rmtree(folder)
    assert heard == [f"{number}" for number in range(10)] and len(broken) == 1


PEER = """
    import asyncio, sys
    from penstock.core.messages import Failed, Message
    from penstock.net.codec import Codec
    from penstock.net.zmq import ZmqChannel, flush_closed

    async def listen(endpoint):
        channel, over = ZmqChannel.bind(endpoint, Codec(Message)), asyncio.Event()
        channel.watch(lambda why: over.set())
        channel.listen(lambda message: print(message.code, flush=True))
        print("bound", flush=True)
        await over.wait()

    async def speak(endpoint):
        channel = ZmqChannel.connect(endpoint, Codec(Message))
        await channel.send(Failed("BadModel", "last words", ""))
        await channel.close()
        flush_closed()

    asyncio.run({"listen": listen, "speak": speak}[sys.argv[1]](sys.argv[2]))
"""


def test_last_words_reach_a_peer_that_is_busy(tmp_path: Path) -> None:
    """The speaker's process must not end before the listener, which stands still for a moment, has them."""
    endpoint = f"ipc://{tmp_path}/e"

    def peer(role: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(PEER), role, endpoint]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    listener = peer("listen")
    assert listener.stdout is not None and listener.stdout.readline() == "bound\n"
    listener.send_signal(signal.SIGSTOP)
    with peer("speak") as speaker:
        with contextlib.suppress(subprocess.TimeoutExpired):
            speaker.wait(0.7)
        listener.send_signal(signal.SIGCONT)
        assert listener.communicate(timeout=10)[0] == "BadModel\n"
        assert speaker.wait(10) == 0
