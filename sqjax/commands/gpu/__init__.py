"""One short visit to a GPU: is everything right on it, how fast is it, and what takes the time.

    python -m sqjax.commands.gpu --record FILE [--part check|matmul|layer|model|decode] [--tiny]

`sqjax bench gpu` is the same. It starts from the source tree with the core dependencies alone;
PyTorch is measured beside where it can be imported. `--tiny` runs all of it on any machine.

- `script`: the command line, and the time that each part may take.
- `notes`: the record, which grows row by row.
- `profile`: times of calls, and of the kernels that they launch.
- `weights`: random quantized weights, made in the form that they have in memory.
- `check`, `exact`, `wholes`: whether results are right.
- `matmul`, `beside_torch`: one product after another.
- `llama`: a layer, prefill and decoding of a model of Llama-3-8B's shapes.
"""
