"""What eviction cannot do is refused, in one sentence that says what to change.

- ``engine.py``: an engine's configuration, before the weights are loaded;
- ``requests.py``: a request's settings, in every front end (``server_settings.py`` tells it what
  the server offers);
- ``http.py``: settings that stand in a request's body where nobody reads them;
- ``count.py``: how many requests were refused.

``config.py`` refuses settings that are wrong by themselves, ``spec.py`` layers that cannot be
evicted, ``worker.py`` a second engine in one process.
"""
