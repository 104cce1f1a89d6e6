"""Property tests judge results, never speed: a busy machine must not fail them."""

from hypothesis import settings

settings.register_profile("misa", deadline=None)
settings.register_profile("long", settings.get_profile("misa"), max_examples=300, stateful_step_count=50)
settings.load_profile("misa")
