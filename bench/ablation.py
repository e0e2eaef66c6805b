"""The study of course lesson 10 with ten seeds: none, A, B and A+B, forty trainings in about two minutes on
one thread.

    python bench/ablation.py > results/ablation.json

The code is the lesson's own: the cells of nbs/course/solutions/10_ablation.ipynb that stand before its
first trainings are run as they are. The lesson quotes the numbers that this writes to
results/ablation.json.
"""

import json
import platform
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LESSON = ROOT / "nbs" / "course" / "solutions" / "10_ablation.ipynb"
FIRST_TRAINING = "recall, hits_of = run_arms("
SEEDS = range(10)


def lesson_code(path: Path = LESSON) -> str:
    """The code of the lesson up to its first trainings, without the cells for Colab and the check of fair
    arms."""
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    end = next(i for i, source in enumerate(sources) if source.startswith(FIRST_TRAINING))
    skipped = [s for s in sources[:end] if "google.colab" in s or s.startswith("for changes in")]
    return "\n\n".join(s for s in sources[:end] if s not in skipped)


def main() -> None:
    names: dict = {"__name__": "lesson"}
    exec(compile(lesson_code(), str(LESSON), "exec"), names)
    recall, _ = names["run_arms"](SEEDS)
    kept = {
        "command": "python bench/ablation.py > results/ablation.json",
        "measure": "Recall@1, text to image, 1,500 captions and 300 images",
        "seeds": list(SEEDS),
        "recall": {arm: [round(value, 4) for value in values.tolist()] for arm, values in recall.items()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
    }
    print(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
