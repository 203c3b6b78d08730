"""How commands end: in words that any terminal shows, in one line where something stops them, and with all their processes."""

import errno
import fcntl
import io
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import termios
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from ranks import join_trainers, run_ranks
from tiny_models import save_encoder
from tqdm import trange

from modeling_moco import MoCoModel
from modeling_moco.distributed_moco import gather
from training.engine import lock
from training.engine.checkpoints import newest_complete
from training.engine.preemption import TellOfLongSteps
from training.engine.results import read_results
from training.engine.run_folder import LOCK, METRICS, RESULTS
from training.errors import DataError, one_line_errors
from training.process import command

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--dataset_name", "digits", "--max_train_samples", "64", "--max_eval_samples", "16", "--image_size", "32"),
    *("--eval_resize", "32", "--use_cpu"),
]
TRAINING = ["--global_batch_size", "16", "--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "True"]
TWO = ["accelerate.commands.launch", "--quiet", "--config_file", str(ROOT / "configs/accelerate/two_cpus.yaml")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "run")


def ends(main, capsys) -> tuple[int, list[str]]:
    """Status and lines on stderr of a command that is stopped."""
    with pytest.raises(SystemExit) as end:
        command(main)([])
    return end.value.code, capsys.readouterr().err.splitlines()


# Words


def test_names_that_the_terminal_cannot_encode_do_not_end_a_command(encoder, tmp_path, script, monkeypatch):
    for part, count in (("train", 20), ("test", 4)):
        for i, name in enumerate(["été", "猫"] * count):
            path = tmp_path / "images" / part / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 50 + 20 * (i % 2)).convert("RGB").save(path)
    flags = ["--dataset_name", str(tmp_path / "images"), "--image_size", "32", "--eval_resize", "32", "--use_cpu"]
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        script("linear_probe").main([str(encoder), *flags, *TRAINING, "--output_dir", str(tmp_path / "été")])
        terminal.flush()
        shown = written.getvalue().decode("ascii")
    assert re.search(r"\\xe9t\\xe9 is called ", shown)


# What stops a command


class _Exchanged(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("0.png has 30 x 40 pixels: bring it back")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("inside", [True, False])
def test_images_that_are_gone_are_one_line_after_a_training_too(workers, inside, capsys):
    """Where a worker process meets them, its error comes with a traceback."""

    def main(argv):
        with one_line_errors() if inside else nullcontext():
            list(torch.utils.data.DataLoader(_Exchanged(), num_workers=workers))

    status, lines = ends(main, capsys)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: 0.png has 30 x 40 pixels: bring it back")


def test_ctrl_c_is_one_line_with_the_status_of_an_interrupt(capsys):
    def main(argv):
        signal.raise_signal(signal.SIGINT)

    status, lines = ends(main, capsys)
    assert status == 130
    assert lines == ["Interrupted. What was complete is kept; give the same command again."]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/proc/self/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/proc/self/x"),
    ],
)
def test_a_full_disk_is_one_line_that_names_it(error, capsys):
    def main(argv):
        raise error

    status, (line,) = ends(main, capsys)
    assert status == 2
    assert line.startswith("error: the disk of /proc/self/x (mounted at /proc) is full")
    assert line.endswith("make room there and give the same command again")


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError):
        command(lambda argv: (tmp_path / "missing").read_text())([])


def test_a_command_gives_back_its_folder_however_it_ends(tmp_path, capsys):
    def main(argv):
        lock.take(tmp_path)
        assert lock.held()
        raise KeyboardInterrupt

    ends(main, capsys)
    assert not lock.held()


def full_disk(script, name: str, argv: list[str], size: int, capsys) -> str:
    """The one line of a command that may write no file larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(SystemExit) as end:
            script(name).main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert end.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    return line


def test_an_evaluation_on_a_full_disk_leaves_what_was_there(encoder, tmp_path, script, capsys):
    model = tmp_path / "model"
    MoCoModel.from_pretrained(encoder).save_pretrained(model)
    script("knn").main([str(model), *SMALL, "--knn_k", "3"])
    before = (model / RESULTS).read_bytes()
    line = full_disk(script, "knn", [str(model), *SMALL, "--knn_k", "5", "--max_eval_samples", "20"], 2000, capsys)
    assert re.search(rf"the disk of {model}/\S+ \(mounted at \S+\) is full", line)
    assert (model / RESULTS).read_bytes() == before
    assert not list(model.rglob("*.tmp"))
    script("knn").main([str(model), *SMALL, "--knn_k", "5", "--max_eval_samples", "20"])
    assert [entry["protocol"] for entry in read_results(model)] == [f"weighted kNN, k {k}, T 0.07" for k in (3, 5)]


@pytest.mark.slow
def test_fine_tuning_on_a_full_disk_is_one_line_and_goes_on_when_there_is_room(encoder, tmp_path, script, capsys):
    folder = tmp_path / "run"
    argv = [str(encoder), *SMALL, *TRAINING, "--output_dir", str(folder)]
    line = full_disk(script, "finetune", argv, 100_000, capsys)
    assert f"the disk of {folder} (mounted at " in line
    script("finetune").main(argv)
    assert "ended" in json.loads((folder / "metrics.json").read_text())


def start(
    words: list[str], ignored: tuple[signal.Signals, ...] = (), env: dict[str, str] | None = None
) -> subprocess.Popen:
    """A command in a process group of its own, as a terminal starts one."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {})

    def signals():  # those that a shell starts in the background ignore Ctrl-C, these tests among them
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": signals}
    return subprocess.Popen([sys.executable, *words], env=env, text=True, start_new_session=True, **both)


def wait_for(word: str, process: subprocess.Popen) -> None:
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
def test_an_interrupted_evaluation_says_one_line_and_leaves_nothing_unfinished(encoder, tmp_path):
    model = tmp_path / "model"
    MoCoModel.from_pretrained(encoder).save_pretrained(model)
    flags = ["--dataset_name", "digits", "--image_size", "224", "--eval_resize", "224", "--use_cpu", "--knn_k", "3"]
    flags += ["--dataloader_num_workers", "1", "--per_device_eval_batch_size", "8"]
    with start([str(ROOT / "scripts/knn.py"), str(model), *flags]) as process:
        wait_for("kNN of", process)
        os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to workers too
        _, err = process.communicate()
    assert process.returncode == 130
    assert [line for line in err.splitlines() if line.strip()] == [
        "Interrupted. What was complete is kept; give the same command again."
    ]
    assert not (model / RESULTS).exists()
    assert not [path for path in model.rglob("*") if path.suffix in (".tmp", ".arrow")]


def pretrain(folder: Path, *flags: str) -> list[str]:
    return [
        *(str(ROOT / "scripts/pretrain.py"), *SMALL, "--queue_size", "64", "--global_batch_size", "16"),
        *("--num_train_epochs", "400", "--eval_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "True"),
        *("--dataloader_persistent_workers", "False", "--output_dir", str(folder), *flags),
    ]


@pytest.mark.slow
def test_ctrl_c_saves_a_run_with_its_workers_and_the_second_ends_at_once(tmp_path):
    folder = tmp_path / "run"
    with start(pretrain(folder, "--dataloader_num_workers", "1")) as process:
        wait_for("'loss'", process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 75
    step = re.search(r"Stopped by SIGINT at step (\d+), saved. The same command continues.", out)[1]
    assert newest_complete(folder) == (folder / f"checkpoint-{step}", [])
    assert "Traceback" not in err
    assert (folder / LOCK).read_text() == ""
    with start(pretrain(folder, "--dataloader_num_workers", "1")) as process:
        wait_for("'loss'", process)
        os.kill(process.pid, signal.SIGINT)
        assert "Once more ends at once" in next(line for line in process.stderr if "Ctrl-C" in line)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode in (-signal.SIGINT, 75)  # 75 where the step was over before
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_and_stops(tmp_path):
    folder = tmp_path / "run"
    ours, its = os.openpty()
    termios.tcsetwinsize(its, (24, 120))  # a progress bar needs columns

    def session():
        os.setsid()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    words = [sys.executable, *pretrain(folder, "--dataloader_num_workers", "1", "--disable_tqdm", "False")]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(words, env=env, stdin=its, stdout=its, stderr=its, preexec_fn=session, close_fds=True)
    os.close(its)
    shown = b""
    while not re.search(rb"loss\W+\d", shown):  # of the progress bar
        shown += os.read(ours, 10_000)
    os.close(ours)
    assert process.wait() == 75
    assert newest_complete(folder)[0] is not None


@pytest.mark.slow
def test_nohup_is_obeyed(tmp_path):
    words = pretrain(tmp_path / "run", "--dataloader_num_workers", "0")
    with start(words, ignored=(signal.SIGHUP,)) as process:
        wait_for("'loss'", process)
        os.kill(process.pid, signal.SIGHUP)
        wait_for("'loss'", process)
        wait_for("'loss'", process)
        os.kill(process.pid, signal.SIGTERM)
        out, _ = process.communicate()
    assert process.returncode == 75
    assert "Stopped by SIGTERM" in out


def torchrun(*flags: str) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *flags]


def ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if b"pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_processes_without_their_launcher_save_and_end(tmp_path):
    folder = tmp_path / "run"
    words = [*torchrun(), *pretrain(folder, "--batch_norm", "shuffle", "--dataloader_num_workers", "0")]
    with start(words) as process:
        wait_for("'loss'", process)
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        os.kill(process.pid, signal.SIGKILL)
        out, err = process.communicate()  # until the last of them has closed its output
    (step,) = re.findall(r"Stopped by SIGHUP at step (\d+), saved", out)
    assert newest_complete(folder) == (folder / f"checkpoint-{step}", [])
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("env", "warned"),
    [
        ({}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "0", "RANK": "0"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "RANK": "0"}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "RANK": "1"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "RANK": "0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, False),
    ],
)
def test_a_launcher_that_may_start_again_is_told_what_it_needs(env, warned, monkeypatch, capsys):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    command(lambda argv: None)([])
    assert ("needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before the launcher" in capsys.readouterr().err) == warned


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_process_that_was_told_to_stop_is_started_again_where_the_launcher_may(tmp_path):
    folder = tmp_path / "run"
    flags = ["--batch_norm", "shuffle", "--num_train_epochs", "20", "--dataloader_num_workers", "0"]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with start([*torchrun("--max_restarts", "1"), *pretrain(folder, *flags)], env=env) as process:
        wait_for("'loss'", process)
        os.kill(ranks_of(process.pid)[1], signal.SIGTERM)
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "warning: max_restarts" not in err
    (step,) = re.findall(r"Stopped by SIGTERM at step (\d+), saved", out)
    assert int(step) < 80
    assert json.loads((folder / METRICS).read_text())["ended"]


@pytest.mark.slow
def test_ctrl_c_saves_a_run_on_two_processes_once(tmp_path):
    folder = tmp_path / "run"
    launched = ["-m", *TWO, *pretrain(folder, "--batch_norm", "shuffle", "--dataloader_num_workers", "1")]
    with start(launched) as process:
        wait_for("'loss'", process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode != 0  # the launcher's own, whatever its processes end with
    (step,) = re.findall(r"Stopped by SIGINT at step (\d+), saved", out)
    assert newest_complete(folder) == (folder / f"checkpoint-{step}", [])
    assert err.count("Ctrl-C: saving") == 1
    assert "[rank" not in err  # no traceback of ours


@pytest.mark.slow
def test_the_second_of_two_commands_in_one_folder_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "run"
    with start(pretrain(folder, "--dataloader_num_workers", "0")) as first:
        wait_for("'loss'", first)
        second = start(pretrain(folder, "--dataloader_num_workers", "0"))
        _, err = second.communicate()
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
    assert second.returncode == 2
    (line,) = (line for line in err.splitlines() if line.strip())
    assert line.startswith(f"error: output_dir ({folder}) is in use by process {first.pid} on ")


# All processes


def _late(rank: int, folder: str) -> None:
    join_trainers(rank, folder, 2)

    def main(argv):
        if rank == 0:  # still at work when the other has nothing left to do
            Path(folder, "published").write_text("all")

    command(main)([])
    assert not torch.distributed.is_initialized()
    assert Path(folder, "published").read_text() == "all"  # all processes waited for the main one


@pytest.mark.slow
def test_processes_wait_for_each_other_and_leave_their_group(tmp_path):
    run_ranks(_late, (str(tmp_path),), 2)


def statuses(runs: int, processes: int, words: list[str]) -> list[list[int]]:
    driver = [sys.executable, str(ROOT / "tests/support/forked_runs.py"), str(runs), str(processes), *words]
    done = subprocess.run(driver, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    lines = [[int(status) for status in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == runs, done.stderr
    return lines


@pytest.mark.slow
def test_a_hundred_runs_on_two_processes_end_with_status_0(encoder, tmp_path):
    """Twelve of fine-tuning, and 88 of a few collectives inside the wrapper that all commands have."""
    assert datasets.config.HF_HUB_OFFLINE
    finetune = ["finetune", str(encoder), *SMALL, *TRAINING, "--output_dir", str(tmp_path / "run{run}")]
    assert statuses(12, 2, finetune) == [[0, 0]] * 12
    # Equal to the bit, so that they count as one measurement of two numbers. Other tests have one process.
    assert len([entry for entry in read_results(encoder) if entry["processes"] == 2]) == 2
    assert all(json.loads((tmp_path / f"run{run}" / METRICS).read_text()) for run in range(12))
    assert statuses(88, 2, []) == [[0, 0]] * 88


@pytest.mark.slow
def test_four_processes_train_stop_continue_and_are_evaluated(tmp_path):
    folder = tmp_path / "run"
    flags = [*SMALL, "--queue_size", "64", "--global_batch_size", "16", "--batch_norm", "shuffle", "--knn_k", "3"]
    flags += ["--num_train_epochs", "2", "--disable_tqdm", "True", "--dataloader_num_workers", "0"]
    flags += ["--dataloader_persistent_workers", "False", "--output_dir", str(folder)]
    assert statuses(1, 4, ["pretrain", *flags]) == [[0, 0, 0, 0]]
    for words in (
        ["pretrain", *flags],  # which has ended
        ["knn", str(folder), "--knn_k", "3", "--use_cpu"],
        ["finetune", str(folder), *TRAINING, "--use_cpu"],
        ["probe", str(folder), *TRAINING, "--use_cpu"],
        ["probe", str(folder), "--mode", "cached", "--learning_rates", "1", "--use_cpu"],
        ["report", str(folder)],
    ):
        assert statuses(1, 4, words) == [[0, 0, 0, 0]], words


def _one_hangs(rank: int, folder: str) -> None:
    join_trainers(rank, folder, 2)
    said = Path(folder, "said")
    watch = TellOfLongSteps(0.2)
    watch.on_step_begin(None, SimpleNamespace(global_step=6), None)
    if rank == 1:  # until the other has said that it waits
        watch.close()
        while not said.is_file():
            time.sleep(0.05)
    else:
        sys.stderr = _Kept(said)
    gather(torch.zeros(1))
    watch.on_step_end(None, None, None)
    assert rank == 1 or watch.seconds == 0.4  # twice as long until it is said again


class _Kept(io.StringIO):
    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def write(self, text: str) -> int:
        if text.strip():
            self.path.write_text(text)
        return len(text)


def test_processes_say_where_they_wait_for_one_that_hangs(tmp_path):
    run_ranks(_one_hangs, (str(tmp_path),), 2)
    assert re.match(
        r"process 0: step 7 has taken 0.2 s so far, in forward \(distributed_moco.py, line \d+\). One that hangs keeps all",
        (tmp_path / "said").read_text(),
    )


def test_names_of_others_do_not_steer_a_terminal(capfd):
    @command
    def show(words):
        for stream in (sys.stdout, sys.stderr):
            print(*words, sep="\n", file=stream)
        logging.getLogger("training.test").warning(words[0])
        for _ in trange(2, position=1, file=sys.stderr):
            pass

    show(["\x1b]0;title\x07\x1b[2J", "a\u202eb", "tab\tand é", "\x9b1m"])
    said = capfd.readouterr()
    for text in (said.out, said.err):
        assert "\\x1b]0;title\\x07\\x1b[2J\na\\u202eb\ntab\tand é\n\\x9b1m\n" in text
    assert not set("\x07\x9b\u202e") & set(said.out + said.err)
    assert set(re.findall("\x1b..", said.err)) == {"\x1b[A"}  # of the progress bar
    print("\x1b[2J")  # the program's own stream again
    assert capfd.readouterr().out == "\x1b[2J\n"


@pytest.mark.slow
def test_several_processes_draw_one_preview_and_end(tmp_path):
    folder = tmp_path / "images"
    for number in range(20):
        path = folder / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).convert("RGB").save(path)
    flags = ["--dataset_name", str(folder), "--use_cpu", "--preview_views", str(tmp_path / "views")]
    assert statuses(1, 2, ["pretrain", *flags]) == [[0, 0]]
    assert (tmp_path / "views.png").is_file()
