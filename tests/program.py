"""What the tests that run a method's file as a program share."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import common

ROOT = Path(__file__).parent.parent


def caller(method, libraries_talk=False):
    """(call, refused): run a command line of the method in this process; expect status 2 and one line on stderr.

    libraries_talk: lines of other packages (progress while loading) may stand beside it.
    """
    def call(*argv):
        common.command_line(method.__doc__, method.VERBS, [str(a) for a in argv])

    def refused(capsys, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(*argv)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and not any("Traceback" in line for line in lines), lines
        found = [line for line in lines if line.startswith(("error", "stopped")) or not libraries_talk]
        assert len(found) == 1, lines
        return found[0]

    return call, refused


def weights(folder):
    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def toy_pictures(folder, count):
    faces = common.toy_faces(torch.arange(count), torch.arange(count), size=40)
    for i, image in enumerate(faces.image):
        common.write_image(folder / f"{i:02d}.png", image)


def train_once_more(call, refused, capsys, monkeypatch, finished, folder, *flags, read=weights):
    """Two copies of a finished run train a stage again, with other flags; one is stopped after its first step.

    Resuming must go on with the new training, not take the stage for finished. Returns the weights of both.
    """
    stopped, straight = (shutil.copytree(finished, folder / name) for name in ("stopped", "straight"))
    with monkeypatch.context() as patch:
        update = common.Stage.update

        def stopping(stage, *loss, **logged):
            update(stage, *loss, **logged)
            stage.stop = True
        patch.setattr(common.Stage, "update", stopping)
        assert "stopped at step 1 of" in refused(capsys, "train", *flags, "-o", stopped)
    call("train", *flags, "-o", stopped, "--resume_from_checkpoint", "latest")
    call("train", *flags, "-o", straight)
    before, after = read(finished), read(straight)
    assert any(not torch.equal(before[n], after[n]) for n in after)
    return read(stopped), after


def kill_in_stage(program, out, stage, *flags):
    """SIGKILL `program train -o out` as soon as state.pt is of that stage; returns the arguments, to go on with."""
    command = [sys.executable, program, "train", *flags, "--checkpointing_steps", "1", "-o", str(out)]
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=str(torch.get_num_threads()))
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    for _ in range(2400):
        if process.poll() is not None:
            break
        if (out / "state.pt").exists() and torch.load(out / "state.pt", weights_only=True)["stage"] == stage:
            break
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    return command[2:]
