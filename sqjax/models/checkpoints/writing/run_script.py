"""The script that runs exported programs. It imports jax and numpy, and nothing of sqjax."""

#: run.py, which `export` writes beside the programs. It finds the weights by the manifest, which
#: says where each begins, because so it needs no package for safetensors.
RUN = '''\
"""Up to 16 tokens after the ids 1, 2, 3, the likeliest each time: python run.py 16 1,2,3"""
import json, pathlib, re, sys, jax, jax.export, jax.numpy as jnp, numpy as np
here = pathlib.Path(__file__).parent
about = json.loads((here / "manifest.json").read_text())
weights, file, n, rows = [], here / "weights.safetensors", about["prompt"], about["batch"]
how = f"usage: run.py NEW_TOKENS{' ID,ID,...' * rows}: whole numbers, at most {n} ids in a prompt"
re.fullmatch(rf"\\d+( \\d+(,\\d+){{,{n - 1}}}){{{rows}}}", " ".join(sys.argv[1:])) or sys.exit(how)
for w in about["weights"]:  # one that is packed has two codes of 4 bits in a byte, low half first
    x = np.memmap(file, jnp.dtype(w["stored"]), "r", w["offset"], tuple(w["stored_shape"]))
    x = jax.lax.bitcast_convert_type(x, jnp.int4).reshape(w["shape"]) if w["packed"] else x
    weights.append(jnp.asarray(x).astype(w["dtype"]))
load = lambda name: jax.export.deserialize(bytearray((here / name).read_bytes())).call
ids = [([-1] * n + [int(i) for i in row.split(",")])[-n:] for row in sys.argv[2:]]  # -1: no token
logits, cache = jax.jit(load("prefill.bin"))(weights, np.int32(ids))
step, new = jax.jit(load("decode.bin"), donate_argnums=2), []
while len(new) < min(int(sys.argv[1]), about["new_tokens"]):
    new.append(np.argmax(logits, axis=1))
    logits, cache = step(weights, np.int32(new[-1])[:, None], cache)
for row in np.transpose(new).tolist():
    print(*row[: next((i + 1 for i, token in enumerate(row) if token in about["stop"]), None)])
'''
