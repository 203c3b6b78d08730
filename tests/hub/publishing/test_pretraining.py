"""A run that publishes what it saves, while it goes on and at its end."""

import tempfile
import threading

import huggingface_hub
import pytest
from hub_server import TOKEN
from published_runs import model_of, push
from tiny_trainer import TINY, build, image_rows

from training.engine.checkpoints import newest_complete
from training.engine.results import encoder_digest
from training.evaluation.probe_arguments import LinearProbeArguments
from training.hub.repository import PublishCallback, Repository
from training.trainer import MoCoTrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx")  # and httpx2: the client's own use of them


@pytest.mark.slow
def test_a_run_publishes_every_save_and_its_end(hub, script, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = [*TINY, "--num_train_epochs", "3", "--output_dir", str(folder)]
    flags += ["--push_to_hub", "True", "--hub_model_id", "org/live"]
    script("pretrain").main(flags)
    assert "Published: http" in capsys.readouterr().out
    *saves, last = hub.repos["org/live"].log
    assert last == "End of training"
    assert saves  # one that is still under way lets the next go by
    assert set(saves) <= {f"Training in progress, step {step}" for step in (4, 8, 12)}
    assert TOKEN not in (folder / "recipe.yaml").read_text()
    files = hub.files("org/live")
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    assert "knn" in files["README.md"].decode().lower()
    for name, data in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(data)
    assert encoder_digest(model_of(tmp_path / "pulled")) == encoder_digest(model_of(folder))


def test_transformers_trainer_never_sees_that_a_run_is_published(tmp_path):
    args = MoCoTrainingArguments(output_dir=str(tmp_path), use_cpu=True, push_to_hub=True, hub_model_id="org/live")
    assert args.publish
    assert not args.push_to_hub  # all that makes Trainer upload by itself
    trainer = build(image_rows(), tmp_path)
    with pytest.raises(ValueError, match="a trainer does not publish"):
        trainer.push_to_hub()


def test_one_upload_at_a_time_which_nobody_waits_for_but_the_last(hub, run, monkeypatch):
    uploads = PublishCallback(Repository("org/live"), every_save=True)
    uploads.prepare()
    hub.open.clear()
    late = threading.Timer(300, hub.open.set)  # or a test that fails would not end
    late.daemon = True
    late.start()
    uploads.send(run, "first")
    uploads.send(run / "checkpoint-4", "second, while the first is under way")
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    # The first goes on when the run waits for it; a run that does not wait would have begun the last by then.
    join = threading.Thread.join

    def let_go_and_join(thread, timeout=None):
        if threading.current_thread() is threading.main_thread():
            hub.open.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", let_go_and_join)
    uploads.send_last(run / "checkpoint-8", "last")
    late.cancel()
    steps = [path.split("/")[4] for method, path in hub.requests if method == "POST" and path.startswith("api/models/")]
    assert steps == ["preupload", "commit"] * 2  # nothing of the last was sent while the first was under way
    assert hub.repos["org/live"].log == ["first", "last"]


def test_a_run_that_may_not_publish_does_not_begin(hub, script, tmp_path, capsys):
    flags = [*TINY, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "run"), "--push_to_hub", "True"]
    hub.may_write = False
    for more, words in (
        ([], "use a token that may write there"),
        (["--hub_strategy", "checkpoint"], "are pickles"),
    ):
        with pytest.raises(SystemExit):
            script("pretrain").main([*flags, "--hub_model_id", "org/live", *more])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("linear_probe").main([str(tmp_path), "--dataset_name", "digits", "--push_to_hub", "True"])
    assert "flag --push_to_hub is unknown" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"scripts/push_to_hub\.py"):
        LinearProbeArguments(output_dir=str(tmp_path), use_cpu=True, push_to_hub=True)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.slow
def test_a_failed_upload_does_not_end_a_run(hub, script, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    hub.breaks = 10**6
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")  # nor is there room
    folder = tmp_path / "run"
    flags = [*TINY, "--num_train_epochs", "1", "--output_dir", str(folder), "--push_to_hub", "True"]
    with pytest.raises(SystemExit):  # its end says so
        script("pretrain").main([*flags, "--hub_model_id", "org/live"])
    assert "set TMPDIR" in caplog.text
    assert "set TMPDIR" in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(SystemExit):
        script("pretrain").main([*flags, "--hub_model_id", "org/live"])
    assert "give the same command again" in capsys.readouterr().err
    assert (folder / "results.json").is_file()
    assert newest_complete(folder)[0] == folder / "checkpoint-4"
    assert hub.repos["org/live"].log == []
    hub.breaks = 0
    push(script, str(folder), "org/live")
    assert hub.repos["org/live"].log == ["Publish a MoCo model"]
