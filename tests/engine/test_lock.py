"""A run's folder has one owner at a time, whose lock ends with its process; every other process says who that is."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import join_trainers, run_ranks

from training.engine import lock
from training.engine.checkpoints import claim_output_dir, decided_by_main
from training.engine.run_folder import DATASET, LOCK, SAVED_RECIPE
from training.recipe import parse_pretrain

ROOT = Path(__file__).parents[2]
# Takes the folder, forks a child that lives on, as a loader's worker does for some seconds, and waits.
OWNER = """
import os, sys, time
from pathlib import Path
from training.engine import lock
lock.take(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(3600)
print(child, flush=True)
sys.stdin.read()
lock.give_back()
"""

PLACE = {"dataset": "digits", "content": {}}


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    lock.give_back()


@pytest.fixture
def owner(folder):
    """Another process that has the folder."""
    command = [sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        yield process
        os.kill(child, 9)
        process.kill()


def test_a_second_process_is_told_who_has_the_folder_since_when_and_what_to_do(folder, owner):
    with pytest.raises(ValueError, match="is in use by") as refusal:
        lock.take(folder)
    words = str(refusal.value)
    assert f"output_dir ({folder}) is in use by process {owner.pid} on {socket.gethostname()} since 20" in words
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait for it to end, stop it .* or name another", words)
    assert "\n" not in words
    assert not lock.held()


def test_the_lock_of_a_killed_process_is_taken_over_although_its_children_live(folder, owner):
    owner.kill()
    owner.wait()
    assert json.loads((folder / LOCK).read_text())["pid"] == owner.pid  # it had no time to tidy up
    lock.take(folder)
    assert lock.held() == [folder]
    lock.give_back()
    assert (folder / LOCK).read_text() == ""


def test_a_folder_that_was_given_back_is_free_for_others(folder, owner):
    owner.stdin.close()
    owner.wait()
    lock.take(folder)
    lock.take(folder)  # which is no conflict with oneself
    assert lock.held() == [folder]


def test_a_lock_file_that_is_a_link_is_not_written_through(folder, tmp_path_factory):
    private = tmp_path_factory.mktemp("home") / "private"
    private.write_text("words")
    (folder / LOCK).symlink_to(private)
    with pytest.raises(OSError, match="symbolic links"):
        lock.take(folder)
    assert private.read_text() == "words"


def test_two_commands_in_one_folder_leave_the_second_without_a_run(folder, owner):
    args = parse_pretrain(["--output_dir", str(folder), "--use_cpu"])
    with pytest.raises(ValueError, match=f"is in use by process {owner.pid}"):
        claim_output_dir(args.training, None, args.settings, args.defaults, {}, PLACE)
    assert [path.name for path in folder.iterdir()] == [LOCK]


def _rank(rank: int, folder: str) -> None:
    join_trainers(rank, folder, 2)
    taken = Path(folder, "taken")
    taken.mkdir(exist_ok=True)
    if rank == 1:  # stands for another command: the main process finds the folder taken
        lock.take(taken)
    dist.barrier()
    refusals = []
    for decide in (lambda: lock.take(taken), lambda: int("x")):
        try:
            decided_by_main(decide)
        except ValueError as error:
            refusals.append(str(error))
    Path(folder, f"refusals{rank}").write_text(json.dumps(refusals))
    assert decided_by_main(lambda: dist.get_rank() + 7) == 7
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_processes_of_a_run_get_the_refusal_of_the_main_one(tmp_path):
    run_ranks(_rank, (str(tmp_path),), 2)
    first, second = (json.loads((tmp_path / f"refusals{rank}").read_text()) for rank in range(2))
    assert first == second
    assert len(first) == 2
    assert "is in use by process" in first[0]


def test_the_folder_of_a_run_may_have_its_lock_and_its_recipe_before_it_begins(folder):
    args = parse_pretrain(["--output_dir", str(folder), "--use_cpu"])
    for _ in range(2):
        assert claim_output_dir(args.training, None, args.settings, args.defaults, {}, PLACE) is None
        lock.give_back()
    assert {path.name for path in folder.iterdir()} == {LOCK, SAVED_RECIPE, DATASET}
