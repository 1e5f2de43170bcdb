from __future__ import annotations

from hypothesis import settings

settings.register_profile("uq", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("uq")
