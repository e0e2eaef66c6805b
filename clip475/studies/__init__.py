"Experiments with seeds and intervals: the built-in text tower, freezing and the claims."
