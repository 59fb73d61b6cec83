"""Models that do not fit in memory: calibrated, smoothed and quantized a layer at a time.

And the statistics of models that others have calibrated: `stats_from_act_scales`.

    stats = sqjax.calibrate_layers("path/to/model", batches)
    model, qparams = sqjax.load_quantized("path/to/model", sqjax.W8A8, stats, alpha=0.85)

May import `models`, `methods`, `calibration`, `folding` and `weights`; and the small helpers
`sqjax._*`.
"""
