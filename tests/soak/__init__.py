"""Random traffic through one engine for as long as one likes: nothing leaks, nobody is wronged.

    arrivals     the requests, drawn
    watch        what must hold at every step and at rest, and what is counted
    quiet        a sample of the answers, against each request alone
    soak         rounds of traffic until the time is up

``scripts/soak`` runs it for half an hour, ``tests/engine/test_soak.py`` a few rounds of it.
"""
