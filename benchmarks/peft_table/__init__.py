"""PEFT's method comparison (MetaMathQA, Llama 3.2 3B) with our methods: the same data, steps, evaluation and columns.

``python -m benchmarks.peft_table --help`` says how; docs/results/peft_table.md is the page that it writes.

- ``configs/*.yaml``: what ``tune run gmt_full_finetune`` trains. ``experiments``: with which learning rates.
- ``data``: rows in the comparison's order. ``evaluation``: its prompt, its answers, its forgetting.
- ``runner``: ``tune run``, then the evaluation, then a JSON file of the comparison's layout in ``results/``.
- ``page``: their figures (``published.json``) beside ours.

The rules follow huggingface/peft, method_comparison/MetaMathQA, as of July 2026.
"""
