"""What the tests that run a method's file as a program share."""
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn as nn

import common
from toy import faces as toy

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


def weights(folder) -> dict:
    """{"part.tensor name": tensor} of all finished parts of a run."""
    return {f"{path.stem}.{name}": tensor for path in sorted(Path(folder).glob("*.safetensors"))
            for name, tensor in safetensors.torch.load_file(path).items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def toy_data(folder, size=32, share=0.01) -> Path:
    """A small data/toy: train/, val/ and test/ of whole people, pairs/, with all labels. 1 percent is 10 people and 20 pairs."""
    toy.draw(folder, size, share)
    return Path(folder)


def toy_pictures(folder, count, size=40) -> None:
    faces = toy.toy_faces(torch.arange(count), torch.arange(count), size=size)
    for i, image in enumerate(faces.image):
        common.write_image(folder / f"{i:02d}.png", image)


KILLED = """
import os, signal, sys
import common, {method}
{method}.SIZES["toy"] = {sizes}
save = common.Run.save
def dying(run, stage, step, *rest):
    save(run, stage, step, *rest)
    if (stage, step + 1) == ({stage!r}, {step}):
        os.kill(os.getpid(), signal.SIGKILL)
common.Run.save = dying
common.command_line("x", {method}.VERBS, sys.argv[1:])
"""


def kill(method: str, sizes: dict, stage: str, step: int, *flags) -> None:
    """`METHOD.py train` with toy sizes `sizes` in a process of its own, which gets SIGKILL after that step of that stage."""
    text = KILLED.format(method=method, sizes=sizes, stage=stage, step=step)
    command = [sys.executable, "-c", text, "train", *map(str, flags)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr[-2000:]


class Trap:
    """An object whose unpickling would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class ScriptTrap(nn.Module):
    """Saved as a TorchScript archive, it writes a file while torch.jit.load reads it."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path, self.training = state[0], state[1]
        assert torch.from_file(state[0], True, 1).numel() == 1

    def forward(self, x):
        return x
