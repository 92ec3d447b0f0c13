"""Rows a second of the look at a JSON Lines file before training, beside what reading the file takes by itself.

Each repetition reads the lines alone, then parses them with ``json.loads``, then scans them as a recipe does; medians
of the repetitions are printed as a table in Markdown. The files are made here.

    python benchmarks/data_scan.py
    python benchmarks/data_scan.py --rows 500000 --repeats 9
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gmt_tune.data.scan import scan_section

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests. "
USER, ASSISTANT = {"role": "user", "content": TEXT * 2}, {"role": "assistant", "content": TEXT * 6}
# Kind of rows: the keys of its section, and a row
KINDS = {
    "chat, 2 messages": (
        {"_component_": "chat_dataset", "conversation_column": "messages", "conversation_style": "openai"},
        {"messages": [USER, ASSISTANT]},
    ),
    "chat, 8 messages": (
        {"_component_": "chat_dataset", "conversation_column": "messages", "conversation_style": "openai"},
        {"messages": [USER, ASSISTANT] * 4},
    ),
    "question and answer": (
        {"_component_": "instruct_dataset"},
        {"input": USER["content"], "output": ASSISTANT["content"]},
    ),
    "pair of conversations": (
        {"_component_": "preference_dataset"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": TEXT * 5}]},
    ),
}


def read_lines(file: Path) -> None:
    with file.open(encoding="utf-8") as lines:
        for _ in lines:
            pass


def parse(file: Path) -> None:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            json.loads(line)


def seconds(work: Callable, *arguments: object) -> float:
    """Processor time of a call, which other programs on the machine do not add to."""
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def measure(rows: int, repeats: int, folder: Path) -> list[tuple[str, int, list[float]]]:
    """For each kind of rows: its name, bytes of a row, and rows a second read, parsed and scanned."""
    found = []
    for name, (keys, row) in KINDS.items():
        file = folder / "rows.jsonl"
        line = json.dumps(row) + "\n"
        file.write_text(line * rows, encoding="utf-8")
        section = {**keys, "_component_": f"torchtune.datasets.{keys['_component_']}", "source": "json"}
        section["data_files"] = str(file)
        works: list[tuple[Callable, tuple]] = [
            (read_lines, (file,)),
            (parse, (file,)),
            (scan_section, (section, "dataset")),
        ]
        times = [[seconds(work, *arguments) for work, arguments in works] for _ in range(repeats)]
        found.append((name, len(line), [rows / statistics.median(column) for column in zip(*times, strict=True)]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="of each file (default: 100000)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, of which medians are taken (default: 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.rows, args.repeats, Path(folder))
    print("| rows | bytes each | lines read | `json.loads` | scan, rows a second | scan's time beside `json.loads` |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, size, (read, parsed, scanned) in found:
        print(f"| {name} | {size} | {read:,.0f} | {parsed:,.0f} | {scanned:,.0f} | {parsed / scanned:.2f} |")


if __name__ == "__main__":
    main()
