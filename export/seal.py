"""A model file ends with the SHA-256 of all that comes before it (standard library only).

It is one more entry of the file's metadata: protocol buffers concatenate. So the file stays one
file, any reader of ONNX takes it, and a flipped bit or a cut is seen before anything is computed.
"""

from __future__ import annotations

import hashlib
from typing import Final

from export.metadata import ModelFileError

# ModelProto.metadata_props, field 14: an entry of 74 bytes with key (1) and value (2).
_BEFORE: Final = b"\x72\x4a" + b"\x0a\x06sha256" + b"\x12\x40"
_BYTES: Final = len(_BEFORE) + 64


def seal(content: bytes) -> bytes:
    """What is to follow `content`, an ONNX model."""
    return _BEFORE + hashlib.sha256(content).hexdigest().encode()


def check_seal(content: bytes) -> bool:
    """Whether the file is sealed: older ones are not. Raises ModelFileError where it does not hold
    what was sealed."""
    end = content[-_BYTES:]
    if not end.startswith(_BEFORE):
        return False
    if end != seal(content[:-_BYTES]):
        raise ModelFileError("its SHA-256 does not match: it was changed or damaged.")
    return True
