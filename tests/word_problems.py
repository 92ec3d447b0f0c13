"""Made-up word problems to train on, where real ones are not needed."""

import json
import random
from pathlib import Path


def write_problems(path: Path, count: int, seed: int) -> None:
    """Word problems in the manner of GSM8K."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        name, thing = rng.choice(["Ana", "Ben", "Chloe", "Dan"]), rng.choice(["pens", "cups", "nuts", "maps"])
        a, b = rng.randint(2, 40), rng.randint(2, 9)
        question = f"{name} has {a} {thing} and buys {b} times as many. How many {thing} does {name} have now?"
        new, total = a * b, a + a * b
        answer = f"{name} buys {a}*{b}=<<{a}*{b}={new}>>{new} {thing}.\nIn all {a}+{new}={total}.\n#### {total}"
        lines.append(json.dumps({"question": question, "answer": answer}) + "\n")
    path.write_text("".join(lines))
