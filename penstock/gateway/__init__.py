"""The front door: HTTP in, `core.Request` out, tokens back as text.

It speaks OpenAI's API (and the extras vLLM users know), keeps tenants apart, and never schedules: models are
reached through `core.ports.Service` only. Text lives here and nowhere else. Layers, each knowing only those below:

    app          routes, keys, request ids, CORS, life span         server   uvicorn, signals, draining
    cold         models, health, metrics, tokenise, playground
    exchange     one call: submit, listen, notice a client that left, write
    completions, chat   the two shapes of an answer, as JSON and as event stream
    answer       token ids of one answer -> text that may be shown (detokenize, stop)
    bodies, ask  JSON -> checked fields -> requests
    text, template      a model folder's tokenizer and chat template
    wire, errors, metrics, config
"""
