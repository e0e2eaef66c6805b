"""How many scenes one core draws in a second: python bench/scenes.py [--json]

Facts and picture at 64 × 64 pixels, everything included: the first scenes pay for the drawings that later
ones reuse.
"""

import json
import sys
from time import perf_counter

from clip475.data.scenes import caption_scene, draw_scene, make_scene


def rate(work, count):
    start = perf_counter()
    for i in range(count):
        work(i)
    return count / (perf_counter() - start)


if __name__ == "__main__":
    found = {
        "scenes_per_second_cold": rate(lambda i: draw_scene(make_scene(1, i)), 1000),
        "scenes_per_second": rate(lambda i: draw_scene(make_scene(2, i)), 5000),
        "captioned_scenes_per_second": rate(lambda i: caption_scene(make_scene(2, i)), 5000),
    }
    print(
        json.dumps({k: round(v) for k, v in found.items()})
        if "--json" in sys.argv
        else "\n".join(f"{k.replace('_', ' '):30} {v:8,.0f}" for k, v in found.items())
    )
