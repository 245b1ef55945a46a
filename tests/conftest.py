"""Settings that all tests share."""

from hypothesis import settings

# The same examples on every run: a red CI must be the change's doing. `--hypothesis-profile=explore` draws new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("fixed")
