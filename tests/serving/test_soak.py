"""A pool too small for its load: retraction, eviction, shared prefixes and clients that leave, all at once."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.serving

CLIENTS, POOL = 6, 1280  # requests at once, and tokens for all of them
EACH = 8  # requests of a client
PROBE = [random.Random(0).randrange(2, 250) for _ in range(400)]


def test_page_means_stay_those_of_the_keys(start, model: Path, tmp_path: Path) -> None:
    watched, log = tmp_path / "means", tmp_path / "log"
    watched.mkdir()
    flags = f"--max-total-tokens {POOL} --max-running-requests {CLIENTS} --schedule-conservativeness 0"
    environ = {
        "PYTHONPATH": str(Path(__file__).parent / "watch"),
        "WATCH_MEANS": str(watched),
        "SGLANG_TEST_RETRACT": "1",  # beside those for want of room, after which SGLang admits fewer requests
        "SGLANG_TEST_RETRACT_INTERVAL": "40",
    }
    prefixes = [[random.Random(seed).randrange(2, 250) for _ in range(300)] for seed in (1, 2, 3)]
    with start(flags, model, log, **environ) as server:
        before = server.generate(PROBE, new=70)
        server.flush()

        def client(seed: int) -> None:
            numbers = random.Random(seed)
            for _ in range(EACH):
                prompt = [numbers.randrange(2, 250) for _ in range(numbers.randrange(20, 300))]
                if numbers.random() < 0.5:
                    prefix = numbers.choice(prefixes)
                    prompt = prefix[: numbers.randrange(65, 300)] + prompt
                new = numbers.randrange(10, 200)
                if numbers.random() < 0.2:
                    server.leave(prompt, new=400)
                else:
                    assert len(server.generate(prompt, new=new).ids) == new

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        server.flush()  # refused while anything runs
        assert server.generate(PROBE, new=70).ids == before.ids
        assert server.misa()["enabled"]
    (counts,) = [file.read_text().split() for file in watched.iterdir()]
    read, wrong = map(int, counts)
    retracted = sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log.read_text())))
    print(f"{retracted} requests retracted, {read} page means read")
    assert wrong == 0
    assert read > 1000
    assert retracted > 5
