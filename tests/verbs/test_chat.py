"""`penstock chat` as people and pipes use it: a real process, a small server, a real terminal."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import sys
from pathlib import Path

import pytest

from penstock.__main__ import run
from tests.lab.little_server import Little, serving

ROOT = Path(__file__).parents[2]
ASK = [sys.executable, "-m", "penstock", "chat"]


async def piped(text: str, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the verb with `text` piped in."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = await asyncio.to_thread(run, ["chat", *args])
    return code, out.getvalue(), err.getvalue()


async def test_a_pipe_is_one_prompt_and_one_answer() -> None:
    little = Little()
    async with serving(little) as url:
        assert await piped("hello\n", url, "--max-tokens", "3") == (0, " word word word\n", "")
        assert little.bodies[-1]["messages"] == [{"role": "user", "content": "hello"}]
        code, out, _ = await piped("def a():\n", url, "--complete", "--max-tokens", "2")
        assert (code, out) == (0, " word word\n")
        assert little.bodies[-1]["prompt"] == "def a():\n"
        code, _, err = await piped("hi", url, "--model", "none")
        assert code == 2 and "serves no model 'none'" in err and "hint: it serves: little" in err
        code, _, err = await piped("", url)
        assert code == 2 and "nothing was piped in" in err
    code, _, err = await piped("hi", url)
    assert code == 2 and "cannot reach" in err and "Traceback" not in err


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, *args: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [*ASK, *args])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    async def until(self, text: str, timeout_s: float = 20.0) -> str:
        """What is shown up to and with `text`; it is not looked at again."""
        async with asyncio.timeout(timeout_s):
            while text not in self.seen:
                await asyncio.sleep(0.01)
                os.set_blocking(self.fd, False)
                try:
                    self.seen += os.read(self.fd, 4096).decode()
                except (BlockingIOError, OSError):
                    pass
        before, _, self.seen = self.seen.partition(text)
        return before + text

    async def end(self) -> int:
        async with asyncio.timeout(20):
            while True:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    return os.waitstatus_to_exitcode(status)
                await asyncio.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="pseudo-terminals differ")
async def test_a_conversation_in_a_terminal() -> None:
    little = Little(token_s=0.02)
    async with serving(little) as url:
        terminal = Terminal(url, "--max-tokens", "400", "--system", "be brief")
        await terminal.until("> ")
        terminal.type("one\n")
        await terminal.until(" word word")
        terminal.type("\x03")  # Ctrl-C
        await terminal.until("[stopped]")
        await terminal.until("> ")
        terminal.type("two\n")
        await terminal.until(" word word")
        said = [
            (each["role"], each["content"].split()[0]) for each in little.bodies[-1]["messages"]
        ]
        assert said == [("system", "be"), ("user", "one"), ("assistant", "word"), ("user", "two")]
        terminal.type("\x03")
        await terminal.until("> ")
        terminal.type("/clear\n")
        await terminal.until("> ")
        terminal.type("/system be long\n")
        await terminal.until("> ")
        terminal.type("/help\n")
        await terminal.until("/help /clear /system")
        await terminal.until("> ")
        terminal.type("three\n")
        await terminal.until(" word")
        assert [each["content"] for each in little.bodies[-1]["messages"]] == ["be long", "three"]
        terminal.type("\x03")
        await terminal.until("> ")
        terminal.type("/quit\n")
        assert await terminal.end() == 0
    assert little.num_cut == 3 and little.num_open == 0
