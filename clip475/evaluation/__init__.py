"Recall@K, baselines, zero-shot classes, mistakes and maps of the shared space."
