#!/usr/bin/env python3
"""Encoding captions on the CPU: sorted and trimmed (clip475) beside batches padded to 77, and how quick
tokens are.

    python bench/captions.py [--batches 5] [--padded 128] [--threads 1] [--repeats 1] \\
        [--data ../shared/data/coco2014] [--json]

The tower has the specification's size (63,428,096 parameters) and random weights: time does not depend
on their values. `clip475` encodes `--batches` of the batches of 256 that the lab makes of all captions,
evenly spaced from the shortest to the longest; `positions_per_caption` says how well they stand for
all. `padded` is what is often seen: `padding="max_length"`, float32, batches of 32, on captions drawn
from the same ones; its rows are compared with the lab's. Both sides include tokenizing and run in one
process. Seconds are CPU seconds, the fewest of `--repeats`. Captions are COCO's where `--data` has
them, else those of drawn scenes.
"""

import argparse
import json
import os
import random
import resource
import sys
import time
from functools import partial
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco2014"


def all_captions(data):
    "COCO's validation captions and their name, or those of 4,000 drawn scenes."
    file = Path(data) / "annotations" / "captions_val2014.json"
    if file.is_file():
        return "COCO val2014", [
            a["caption"] for a in json.loads(file.read_text(encoding="utf-8"))["annotations"]
        ]
    from clip475.data.scenes import caption_scene, make_scene

    return "drawn scenes", [c.text for i in range(4000) for c in caption_scene(make_scene(42, i))]


def quickest(fn, times):
    "CPU seconds of the quickest call, and what it returned; other programs on the machine do not count."
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        result = fn()
        best = min(best, time.process_time() - start)
    return best, result


def padded(captions, encoder, tokenizer, batch):
    "As public solutions do it: every caption padded to 77, in the order given."
    import torch

    rows = []
    with torch.no_grad():
        for i in range(0, len(captions), batch):
            tokens = tokenizer(
                [c.lower() for c in captions[i : i + batch]],
                padding="max_length",
                truncation=True,
                max_length=77,
                return_tensors="pt",
            )
            rows.append(torch.nn.functional.normalize(encoder.tower(**tokens).text_embeds, dim=-1))
    return torch.cat(rows)


def some_batches(captions, tokenizer, count, size=256):
    """`count` whole batches of the lab's order, shortest to longest, and the mean positions per caption in
    them and in all."""
    from clip475.data.tokens import _token_ids, clean_text

    texts = list(dict.fromkeys(clean_text(c) for c in captions))
    random.Random(475).shuffle(texts)  # equal lengths in any order
    pairs = sorted(((len(ids), i) for i, ids in enumerate(_token_ids(texts, tokenizer))))
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    picked = [batches[int((k + 0.5) * len(batches) / count)] for k in range(count)]

    def mean(some):
        return round(sum(batch[-1][0] * len(batch) for batch in some) / sum(map(len, some)), 2)

    return [texts[i] for batch in picked for _, i in batch], {
        "sample": mean(picked),
        "all": mean(batches),
        "padded": 77,
    }


def encoding(captions, batches, sample, repeats):
    "Captions per CPU second of each way, with their ratio to `padded` and how far their rows lie from it."
    import torch

    from clip475.core.config import LabConfig
    from clip475.core.devices import autocast_dtype, seed_everything
    from clip475.data.tokens import load_tokenizer
    from clip475.models.text import encode_texts, load_text_encoder

    seed_everything(0)
    config, tokenizer = LabConfig.from_preset("coco"), load_tokenizer("builtin")
    encoder = load_text_encoder(config, pretrained=False)
    native = autocast_dtype(config, torch.device("cpu")) == torch.bfloat16
    texts, positions = some_batches(captions, tokenizer, batches)
    drawn = random.Random(0).sample(range(len(texts)), min(sample, len(texts)))
    encode_texts(texts[:8], encoder, tokenizer)  # the first call of a process is slow
    seconds, wanted = quickest(lambda: padded([texts[i] for i in drawn], encoder, tokenizer, 32), repeats)
    usual = len(drawn) / seconds
    ways = {"padded to 77, fp32": {"captions_per_cpu_second": round(usual, 1), "ratio": 1.0}}
    for name, dtype in [("clip475, fp32", torch.float32)] + native * [("clip475, bf16", torch.bfloat16)]:
        seconds, rows = quickest(partial(encode_texts, texts, encoder, tokenizer, dtype=dtype), repeats)
        ways[name] = {
            "captions_per_cpu_second": round(len(texts) / seconds, 1),
            "ratio": round(len(texts) / seconds / usual, 2),
            "max_difference": float((rows[drawn] - wanted).abs().max()),
            "min_cosine": round(float((rows[drawn] * wanted).sum(1).min()), 6),
        }
    return {
        "captions": len(texts),
        "compared": len(drawn),
        "positions_per_caption": positions,
        "bf16_in_hardware": native,
        "ways": ways,
    }


def tokenizing(captions):
    "Seconds to clean and to tokenize all captions, and how long they are."
    from clip475.data.tokens import _token_ids, clean_text, load_tokenizer, tokenize

    tokenizer = load_tokenizer("builtin")
    cleaning, texts = quickest(lambda: [clean_text(c) for c in captions], 1)
    whole, tokens = quickest(lambda: tokenize(captions, tokenizer), 1)
    lengths = sorted(len(i) for i in _token_ids(texts, tokenizer, None))
    return {
        "captions": len(captions),
        "clean_cpu_seconds": round(cleaning, 2),
        "tokenize_cpu_seconds": round(whole, 2),
        "shape": list(tokens["input_ids"].shape),
        "tokens_median": lengths[len(lengths) // 2],
        "tokens_mean": round(sum(lengths) / len(lengths), 2),
        "tokens_max": lengths[-1],
        "truncated_at_77": sum(n > 77 for n in lengths),
    }


def measure(batches=5, padded=128, threads=1, repeats=1, data=DATA):
    "All of it, in this process."
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    import torch

    torch.set_num_threads(threads)
    source, captions = all_captions(data)
    result = {
        "source": source,
        "threads": threads,
        "torch": torch.__version__,
        "tokenizing": tokenizing(captions),
        "encoding": encoding(captions, batches, padded, repeats),
    }
    result["peak_mb"] = round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"batches": 5, "padded": 128, "threads": 1, "repeats": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", default=DATA, help="a folder in COCO 2014's layout")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    result = measure(**options)
    if as_json:
        return print(json.dumps(result))
    t, e = result["tokenizing"], result["encoding"]
    print(
        f"{result['source']}: {t['captions']:,} captions cleaned in {t['clean_cpu_seconds']} CPU seconds, "
        f"cleaned and tokenized in {t['tokenize_cpu_seconds']}; {t['tokens_median']} tokens in the median, "
        f"{t['tokens_max']} at most, {t['truncated_at_77']} truncated at 77\n\n{e['captions']:,} captions, "
        f"{e['positions_per_caption']['sample']} positions each when trimmed "
        f"({e['positions_per_caption']['all']} in all of the file), {e['compared']} compared, "
        f"{result['threads']} thread(s)\n\n| way | captions per CPU second | ratio | largest difference | "
        "smallest cosine |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name, way in e["ways"].items():
        print(
            f"| {name} | {way['captions_per_cpu_second']} | {way['ratio']} | "
            f"{way.get('max_difference', 0):.1e} | {way.get('min_cosine', 1)} |"
        )
    if not e["bf16_in_hardware"]:
        print("\nThis processor has no bfloat16 of its own, so that row is left out.")


if __name__ == "__main__":
    main()
