"""`penstock serve --remote` as a user meets it: two processes, one in front of the other, and OpenAI's client."""

from __future__ import annotations

import re
import signal

import pytest
from openai import OpenAI

from tests.serve.test_serve import needs_model, penstock, serving


@pytest.mark.slow
@needs_model
def test_one_server_in_front_of_another() -> None:
    with serving("--api-key", "inner") as behind:
        sets = ["--set", "fleet.0.name=mine", "--set", "fleet.0.remote.api_key=inner"]
        front = penstock("serve", "--remote", behind.url, "--port", "0", *sets)
        try:
            assert front.stdout is not None
            ready = front.stdout.readline()
            found = re.search(r"ready at (http://[\d.]+:\d+)/v1 - mine on the server", ready)
            assert found, ready
            ask = dict(prompt="import os\n\ndef ", max_tokens=16, temperature=0)
            texts = []
            for url, key, model in ((behind.url, "inner", "default"), (found[1], "any", "mine")):
                with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                    told = client.completions.create(model=model, **ask)  # type: ignore[call-overload]
                    stream = client.completions.create(model=model, stream=True, **ask)  # type: ignore[call-overload]
                    texts += [told.choices[0].text, "".join(one.choices[0].text for one in stream)]
                    assert (told.usage.completion_tokens, told.model) == (16, model)
            assert len(set(texts)) == 1
            front.send_signal(signal.SIGTERM)
            assert front.wait(timeout=20) == 0
        finally:
            if front.poll() is None:
                front.kill()
                front.wait()
