"""Models written as checkpoints that others read: `save_huggingface`, `save_compressed_tensors`.

What reading knows serves here too: the families' tables of names, and layouts, in both directions.
"""
