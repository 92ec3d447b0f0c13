"""What a person, or a script that reads a log file, sees while a run trains."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from gmt_tune.integrations.torchtune.run.progress import Progress

LINE = re.compile(
    r"epoch=2 step=(\d+)/6 loss=(\d+\.\d{4})(?: val_loss=(\d+\.\d{4}))? tokens_per_second=(\d+) "
    r"mask_share=(\d+\.\d)% time_left=(\d\d:\d\d)"
)


def test_without_a_terminal_each_logged_step_is_one_line_of_key_value_words(capsys):
    progress = Progress(epoch=2, total=6, done=0, every=2, is_shown=True)
    for step in range(1, 7):
        progress.update(10 + step, loss=1 / step, tokens_per_second=1234.5, mask_share=0.042)
        if step == 3:
            progress.show_validation(0.75)
    progress.close()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert lines.pop(1) == "epoch=2 step=3/6 val_loss=0.7500"
    matches = [LINE.fullmatch(line) for line in lines]
    assert [m[1] for m in matches] == ["2", "4", "6"]
    assert [m[2] for m in matches] == ["0.5000", "0.2500", "0.1667"]
    assert [m[3] for m in matches] == [None, "0.7500", "0.7500"]
    assert matches[0][4] == "1234" and matches[0][5] == "4.2" and matches[-1][6] == "00:00"
    for line in lines:
        assert all(len(word.split("=")) == 2 for word in line.split())


def test_the_last_step_is_told_even_where_it_is_not_due(capsys):
    progress = Progress(epoch=1, total=3, done=0, every=2, is_shown=True)
    for step in range(1, 4):
        progress.update(step, 1.0, 1.0, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["step=2/3", "step=3/3"]
    assert not any("mask_share" in line for line in lines)  # there is no mask


def test_time_left_counts_only_steps_of_this_run(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("gmt_tune.integrations.torchtune.run.progress.time.perf_counter", lambda: clock[0])
    progress = Progress(epoch=1, total=100, done=90, every=1, is_shown=True)
    clock[0] += 30
    progress.update(91, 1.0, 1.0, None)
    assert "time_left=04:30" in capsys.readouterr().out  # 9 steps of 30 s


def test_all_ranks_but_one_are_silent(capsys):
    progress = Progress(epoch=1, total=2, done=0, every=1, is_shown=False)
    progress.update(1, 1.0, 1.0, 0.5)
    progress.show_validation(1.0)
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [160, 0])
def test_on_a_terminal_there_is_a_bar_with_all_numbers(columns):
    """Also on a terminal that does not tell its width, as in some containers: then as much as usually fits."""
    program = (
        "from gmt_tune.integrations.torchtune.run.progress import Progress\n"
        "p = Progress(epoch=1, total=3, done=0, every=1, is_shown=True)\n"
        "p.update(1, 2.5, 1000.0, 0.1)\n"
        "p.show_validation(2.25)\n"
        "p.update(2, 2.0, 1000.0, 0.1)\n"
        "p.update(3, 1.5, 1000.0, 0.1)\n"
        "p.close()\n"
    )
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.run(
        [sys.executable, "-c", program], stderr=end, stdout=subprocess.PIPE, env=environment, timeout=120, check=True
    )
    os.close(end)
    shown = b""
    try:
        while chunk := os.read(terminal, 1 << 16):
            shown += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(terminal)
    last = shown.decode().strip().split("\r")[-1]
    assert process.stdout == b""  # a terminal sees the bar alone
    expected = ["epoch 1 step 3", "3/3", "loss=1.5000"]
    if columns:
        expected += ["val_loss=2.2500", "tokens_per_second=1000", "mask_share=10.0%"]
    assert [part for part in expected if part not in last] == []
