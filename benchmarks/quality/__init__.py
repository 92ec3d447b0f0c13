"""Compares gradient-mask tuning with plain fine-tuning, random masks, one-off masks, half fine-tuning and LoRA.

``python -m benchmarks.quality --help`` says how; docs/results.md discusses what came out.

- ``suites/*.yaml``: a task, its training regime and grid. ``methods/*.yaml``: what differs from plain fine-tuning.
- ``experiment``: a suite and a method become the config of one run. ``tasks``: rows and texts.
- ``runner``: ``tune run``, then the evaluation, then one JSON file. ``evaluation``: measures a model's folder.
- ``results``, ``report``: from those files to tables and figures.
"""
