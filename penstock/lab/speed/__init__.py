"""How fast the engine is beside others: `penstock bench engine`.

Theory. On a shared machine a figure taken now cannot be compared with one taken in an hour, so all engines take turns
within one run: each in a process and an environment of its own, the same model, the same prompts, a few seconds each.
Whoever measures stands outside: engines say when a token is out, in lines (peer.py), and clock and processor time are
read by one process for all of them. With one thread the figure is work per processor second of the engine's processes,
which the load of others hardly changes; with more, spinning threads make that meaningless, and the wall's 5th
percentile is taken, as others only ever make it slower.

Refuses: opinions of how an engine is to be driven. That is in the engine's driver: side.py for Penstock, and
benchmarks/peers/ for others.

    reading.py   what a plain read of memory gets: the roof of decoding
    models.py    models of random weights
    peer.py      an engine's process and the lines it speaks
    side.py      Penstock as such a process
    asks.py      what is asked, and the samples that come of it
    turns.py     engines in turns
    figures.py   from samples to figures and ratios
    text.py      as tables
    perplexity.py   what fewer bits cost: `penstock bench quality`
"""
