"""The calibration runner: block after block, in full precision and quantized, with statistics on the way."""
