"Says in one sentence when torch and torchvision, freshly installed, do not import together."

import sys

from clip475.core.devices import _check_torch
from clip475.core.files import LabError

try:
    _check_torch()
except LabError as problem:
    sys.exit(f"clip475: {problem}")
