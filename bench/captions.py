#!/usr/bin/env python3
"""Encoding captions on the CPU: sorted and trimmed (clip475) beside batches padded to 77, and how quick tokens are.

    python bench/captions.py [--captions 256] [--batch 32] [--threads 1] [--repeats 2] [--data ../shared/data/coco2014] [--json]

The tower has the specification's size (63,428,096 parameters) and random weights: time does not depend on their values.
`padded` is what is often seen: `padding="max_length"`, batches in the order of the file, float32. Both sides include
tokenizing, take the same batch size and run in one process, one after the other. Seconds are CPU seconds of the quickest of `--repeats`.
Captions are COCO's, drawn by a fixed seed, where `--data` has them, else those of drawn scenes. The real cache sorts 200,000
captions in batches of 256, so each batch has about one length; here a small batch stands for that.
"""
import argparse, json, os, random, resource, sys, time
from functools import partial
from pathlib import Path

DATA = Path(__file__).resolve().parents[2]/"shared"/"data"/"coco2014"


def all_captions(data):
    "COCO's validation captions and their name, or those of 4,000 drawn scenes."
    file = Path(data)/"annotations"/"captions_val2014.json"
    if file.is_file(): return "COCO val2014", [a["caption"] for a in json.loads(file.read_text(encoding="utf-8"))["annotations"]]
    from clip475.scenes import caption_scene, make_scene
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
            tokens = tokenizer([c.lower() for c in captions[i:i+batch]], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
            rows.append(torch.nn.functional.normalize(encoder.tower(**tokens).text_embeds, dim=-1))
    return torch.cat(rows)


def encoding(captions, batch, repeats):
    "Captions a second of each way, with their ratio to `padded` and how far their results lie from it."
    import torch
    from clip475.core import LabConfig, autocast_dtype, seed_everything
    from clip475.text import encode_texts, load_text_encoder, load_tokenizer
    seed_everything(0)
    config, tokenizer = LabConfig.from_preset("coco"), load_tokenizer("builtin")
    encoder = load_text_encoder(config, pretrained=False)
    native = autocast_dtype(config, torch.device("cpu")) == torch.bfloat16
    lab = partial(encode_texts, captions, encoder, tokenizer, batch_size=batch)
    encode_texts(captions[:8], encoder, tokenizer)  # the first call of a process is slow
    usual, wanted = quickest(lambda: padded(captions, encoder, tokenizer, batch), 1)
    ways = {"padded to 77, fp32": {"captions_per_cpu_second": round(len(captions)/usual, 1), "ratio": 1.0}}
    for name, dtype in [("clip475, fp32", torch.float32)] + native*[("clip475, bf16", torch.bfloat16)]:
        seconds, rows = quickest(partial(lab, dtype=dtype), repeats)
        ways[name] = {"captions_per_cpu_second": round(len(captions)/seconds, 1), "ratio": round(usual/seconds, 2),
                      "max_difference": float((rows - wanted).abs().max()), "min_cosine": round(float((rows*wanted).sum(1).min()), 6)}
    return {"captions": len(captions), "batch": batch, "bf16_in_hardware": native, "ways": ways}


def tokenizing(captions):
    "Seconds to clean and to tokenize all captions, and how long they are."
    from clip475.text import clean_text, load_tokenizer, token_ids, tokenize
    tokenizer = load_tokenizer("builtin")
    cleaning, texts = quickest(lambda: [clean_text(c) for c in captions], 1)
    whole, tokens = quickest(lambda: tokenize(captions, tokenizer), 1)
    lengths = sorted(len(i) for i in token_ids(texts, tokenizer, None))
    return {"captions": len(captions), "clean_cpu_seconds": round(cleaning, 2), "tokenize_cpu_seconds": round(whole, 2), "shape": list(tokens["input_ids"].shape),
            "tokens_median": lengths[len(lengths)//2], "tokens_mean": round(sum(lengths)/len(lengths), 2), "tokens_max": lengths[-1],
            "truncated_at_77": sum(n > 77 for n in lengths)}


def measure(captions=256, batch=32, threads=1, repeats=2, data=DATA):
    "All of it, in this process."
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    import torch
    torch.set_num_threads(threads)
    source, everything = all_captions(data)
    drawn = random.Random(475).sample(everything, min(captions, len(everything)))
    result = {"source": source, "threads": threads, "torch": torch.__version__, "tokenizing": tokenizing(everything), "encoding": encoding(drawn, batch, repeats)}
    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == "darwin" else 2**10))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"captions": 256, "batch": 32, "threads": 1, "repeats": 2}.items(): parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", default=DATA, help="a folder in COCO 2014's layout")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    result = measure(**options)
    if as_json: return print(json.dumps(result))
    t, e = result["tokenizing"], result["encoding"]
    print(f"{result['source']}: {t['captions']:,} captions cleaned in {t['clean_cpu_seconds']} CPU seconds, cleaned and tokenized in {t['tokenize_cpu_seconds']}; "
          f"{t['tokens_median']} tokens in the median, {t['tokens_max']} at most, {t['truncated_at_77']} truncated at 77\n\n"
          f"{e['captions']} captions, batches of {e['batch']}, {result['threads']} thread(s)\n\n| way | captions per CPU second | ratio | largest difference | smallest cosine |\n| --- | ---: | ---: | ---: | ---: |")
    for name, way in e["ways"].items(): print(f"| {name} | {way['captions_per_cpu_second']} | {way['ratio']} | {way.get('max_difference', 0):.1e} | {way.get('min_cosine', 1)} |")
    if not e["bf16_in_hardware"]: print("\nThis processor has no bfloat16 of its own, so that row is left out.")


if __name__ == "__main__":
    main()
