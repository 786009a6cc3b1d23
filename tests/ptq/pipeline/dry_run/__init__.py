"""Tests of `ptq.pipeline.dry_run`."""
