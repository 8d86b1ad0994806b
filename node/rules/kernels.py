"""Whether a reconstruction kernel is sharp (bone) or smooth (soft tissue), by the vendors' own names.

Siemens prints the rule: kernels B10 to B41 are for soft tissue, and "for higher sharpness, as is required e.g. in
patient protocols for cervical spine", B50 to B80 (SOMATOM Sensation Cardiac, operating instructions A60, "Body
Kernels"); the digits of the newer names (Br36, Br60, Hr64) mean the same. GE names its algorithms for what they are for
(SOFT, STANDARD, BONE, BONEPLUS). For Philips and Canon/Toshiba the table holds only the names met most often, by use
and without a printed source. A lung kernel is sharp too, and counts as bone. Everything
else is unknown: write a condition on `kernel` for it.
"""

import re
from collections.abc import Sequence

_BONE = (
    r"(HD ?)?(BONE|BONEPLUS|EDGE|LUNG|ULTRA)",  # GE
    r"YC|YD|D|E",  # Philips
    r"FC3[0-5]|FC5[0-2]|FC8[01]",  # Canon/Toshiba: bone, lung, high resolution
)
_SOFT = (
    r"(HD ?)?(SOFT|STANDARD)",  # GE; DETAIL lies between
    r"A|B|UA|UB",  # Philips
    r"FC0[1-9]|FC1[0-9]|FC2[0-7]",  # Canon/Toshiba: body and head
)
_SIEMENS = r"[BDHIJQTU][A-Z]?(\d\d)[A-Z]?"
_SIEMENS_SHARPEST_SOFT = 49


def kernel_type(kernel: Sequence[str]) -> str:
    """ "bone", "soft" or "unknown" for the values of ConvolutionKernel; the first that is known decides.

    >>> kernel_type(["Br60f", "3"]), kernel_type(["STANDARD"]), kernel_type(["X9"])
    ('bone', 'soft', 'unknown')
    """
    for value in (value.strip().upper() for value in kernel):
        siemens = re.fullmatch(_SIEMENS, value)
        if siemens:
            return "soft" if int(siemens[1]) <= _SIEMENS_SHARPEST_SOFT else "bone"
        for patterns, kind in ((_BONE, "bone"), (_SOFT, "soft")):
            if any(re.fullmatch(pattern, value) for pattern in patterns):
                return kind
    return "unknown"
