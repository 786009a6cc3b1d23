"""The calibration runner: text to tokens, the map of a model, the pass through its blocks, statistics.

Knows no quantizers, formats or metrics.
"""
