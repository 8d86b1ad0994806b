"""Damaged compressed pixels in the node's own processes, where a codec that aborts would end all that they do."""

import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from node.transcode import UNCOMPRESSED, TranscodeError, transcoded_bytes
from node.web.catalog import StoredInstance
from node.web.rendered import View, pictures
from node.web.wado import CannotGiveError, NotThereError, frames
from tests.factories import make_ct_series
from tests.transfer_syntaxes import convert

NUM_DAMAGED = 150


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_damaged_pixels_are_refused_and_end_no_process(syntax: str, tmp_path: Path) -> None:
    (path,) = make_ct_series(tmp_path, num_slices=1, rows=64, columns=64)
    convert(path, syntax)
    command = [sys.executable, "-m", "tests.node.test_damaged_pixels", str(path), syntax]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def give_all(path: Path, syntax: str) -> None:
    """Asks for the Instance in every form, damaged in ever other ways; only what is documented may be raised."""
    intact, chance = path.read_bytes(), random.Random(1)
    pixels_at = intact.rfind(b"\xe0\x7f\x10\x00")
    instance = StoredInstance(
        case_series="1",
        study_instance_uid="1",
        series_instance_uid="1",
        sop_instance_uid="1",
        sop_class_uid="1",
        transfer_syntax_uid=syntax,
        num_frames=1,
        path=path,
    )
    for number in range(NUM_DAMAGED):
        damaged = bytearray(intact)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(pixels_at + 8, min(pixels_at + 80, len(damaged)))] = chance.randrange(256)
        if number % 3 == 0:
            del damaged[chance.randrange(pixels_at + 12, len(damaged)) :]
        path.write_bytes(damaged)
        with suppress(TranscodeError):
            transcoded_bytes(path, UNCOMPRESSED[0])
        with suppress(CannotGiveError, NotThereError):
            frames(instance, [1], UNCOMPRESSED[0])
        with suppress(CannotGiveError, NotThereError):
            list(pictures([(instance, [1])], "image/png", View()))


if __name__ == "__main__":
    give_all(Path(sys.argv[1]), sys.argv[2])
