"""Files that a program changed and sealed again, so that `load` must look at what they say."""

import json

import numpy as np

from sqjax.files.checksums import checksum, seal_of


def sealed_again(raw):
    """The bytes of a file with the checksums of what is in it now; without a seal as they are."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.get("__metadata__", {})
    if "seal" not in metadata:
        return raw
    data = np.frombuffer(raw[start:], np.uint8)
    sums = {
        name: checksum(data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    metadata["sums"] = json.dumps(sums)
    metadata["seal"] = seal_of(metadata)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + raw[start:]
