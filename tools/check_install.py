"Says in one sentence when torch and torchvision, freshly installed, do not import together."
import sys

from clip475.core import LabError, check_torch

try: check_torch()
except LabError as problem: sys.exit(f"clip475: {problem}")
