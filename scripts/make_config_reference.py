"""Writes docs/config_reference.md from the table of keys, gmt_tune/integrations/torchtune/config/keys.yaml.

python scripts/make_config_reference.py          # writes it
python scripts/make_config_reference.py --check  # writes nothing; exits with 1 if it differs
"""

import argparse
import sys
from pathlib import Path

from gmt_tune.integrations.torchtune.config.keys import GROUPS, Key, may_differ

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config_reference.md"

HEAD = """\
# Every key of a config

Made by `python scripts/make_config_reference.py` from the table that the config check, the configs and resuming read
(`gmt_tune/integrations/torchtune/config/keys.yaml`). A config is checked before the model is loaded: a key that is
misspelt, or a value that is out of range, is an error of one sentence.

- **takes**: the values that the check lets through. A *section* has a `_component_`, the dotted path of a class or
  function, and that component's arguments as keys, which the component checks: those of `GradientMask`, and of other
  components those that our configs use, are listed. `dataset_val` has the keys of `dataset`, and `ref_checkpointer`,
  which `gmt_full_dpo` needs and `gmt_full_finetune` does not have, those of `checkpointer`.
- **default**: what holds where a config does not have the key; *needed* if every config must.
- **on resuming**: *may differ* if `resume_from_checkpoint: True` goes on with another value than the checkpoint's.
  Others must be as they were.

Any key can be overridden on the command line (`gradient_mask.density=0.1`), and added. `~key` removes one, and
`~section` or `section=null` leaves out a section that the table says may be null. Name patterns need quotes for
YAML, and quotes around them for the shell: `'gradient_mask.dense=["*norm*"]'`. In paths, which are the
keys that end in `dir`, `path`, `file`, `files`, `folder`, `root` or `source`, `~/` is your home folder.

A key that other values refer to as `${key}` is a variable of your own, and may have any name. One in the file that
nothing refers to any more, since an override has replaced what did, has no effect, which the log says, unless it looks
like a misspelt key, which is refused. So is any other unknown key on the command line.

A config is code: [what that means](configs.md#a-config-is-code).
"""


def _row(key: Key) -> str:
    default = "null" if key.default is None else str(key.default)
    default = "*needed*" if key.needed else default and f"`{default}`"
    differs = "may differ" if may_differ(key.name) else ""
    cells = (f"`{key.name}`", key.takes.words, default, differs, key.comment)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def build() -> str:
    """The page's text."""
    head = "\n| key | takes | default | on resuming | meaning |\n|---|---|---|---|---|\n"
    return HEAD + "".join(f"\n## {title}\n{head}{''.join(map(_row, keys))}" for title, keys in GROUPS.items())


def main() -> int:
    """Write the page, or check it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page differs")
    args = parser.parse_args()
    text = build()
    if args.check:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
